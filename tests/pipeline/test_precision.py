"""Dtypes, ZeRO stages and DeepSpeed versions that are refused before anything starts."""

import pytest

from megazh.errors import UsageError
from megazh.pipeline.precision import Dtype, Precision, check_deepspeed_version, check_engine

FP32, BF16, FP16 = Dtype


@pytest.mark.parametrize("version", ["0.16.9", "0.18.2", "0.19.4", "0.19.8", "0.20.0", "1.0.0", "0.19.4+cu128"])
def test_good_versions_of_deepspeed_pass(version: str) -> None:
    check_deepspeed_version(version)


@pytest.mark.parametrize("version", ["0.18.3", "0.18.10", "0.19.0", "0.19.3", "0.19.3+cu128"])
def test_versions_with_wrong_gradients_are_refused(version: str) -> None:
    with pytest.raises(UsageError) as refusal:
        check_deepspeed_version(version)
    assert str(refusal.value).startswith(f"DeepSpeed {version} scales pipeline gradients wrongly")
    assert str(refusal.value).endswith("install 0.19.4 or later")


@pytest.mark.parametrize(
    ("stages", "compute", "accumulation", "zero_stage", "tied"),
    [
        (1, FP32, FP32, 0, True),
        (1, FP32, FP32, 1, True),
        (6, BF16, FP32, 1, True),
        (6, BF16, BF16, 1, True),
        (6, FP16, FP16, 1, True),
        (6, FP16, FP32, 1, False),
        (1, FP16, FP32, 1, True),
    ],
)
def test_what_works_passes(stages: int, compute: Dtype, accumulation: Dtype, zero_stage: int, tied: bool) -> None:
    check_engine(stages, Precision(compute, accumulation, accumulation), zero_stage, tied)


@pytest.mark.parametrize(
    ("stages", "compute", "accumulation", "zero_stage", "tied", "named", "remedy"),
    [
        (1, FP32, FP32, 2, False, "zero_stage=2", "set zero_stage=1"),
        (2, BF16, FP32, 3, True, "zero_stage=3", "set zero_stage=1"),
        (2, FP32, FP32, 0, False, "zero_stage=0 with pipe_parallel_size=2", "set zero_stage=1"),
        (1, FP32, BF16, 1, False, "grad_accum_dtype=bf16 with precision.dtype=fp32", "use fp32"),
        (1, BF16, FP16, 1, False, "grad_accum_dtype=fp16 with precision.dtype=bf16", "use fp32, or bf16"),
        (1, FP16, BF16, 1, False, "grad_accum_dtype=bf16 with precision.dtype=fp16", "use fp32, or fp16"),
        (2, FP16, FP32, 1, True, "precision.dtype=fp16 with grad_accum_dtype=fp32", "set precision.dtype=bf16"),
    ],
)
def test_what_deepspeed_gets_wrong_is_refused_by_name(
    stages: int, compute: Dtype, accumulation: Dtype, zero_stage: int, tied: bool, named: str, remedy: str
) -> None:
    with pytest.raises(UsageError) as refusal:
        check_engine(stages, Precision(compute, accumulation, accumulation), zero_stage, tied)
    assert str(refusal.value).startswith(named)
    assert remedy in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("compute", Dtype)
@pytest.mark.parametrize("accumulation", Dtype)
def test_sums_are_in_place_for_bf16_with_fp32_accumulation_only(compute: Dtype, accumulation: Dtype) -> None:
    found = Precision(compute, accumulation, accumulation).sums_in_place
    assert found == ((compute, accumulation) == (BF16, FP32))


def test_sizes_and_names_are_those_of_torch() -> None:
    for dtype in Dtype:
        assert dtype.torch.itemsize == dtype.bytes
        assert str(dtype.torch) == {"fp32": "torch.float32", "bf16": "torch.bfloat16", "fp16": "torch.float16"}[dtype]


@pytest.mark.parametrize("compute", [FP32, BF16])
def test_fp16_is_sent_only_where_there_is_a_loss_scale(compute: Dtype) -> None:
    with pytest.raises(UsageError, match=rf"^communication_dtype=fp16 with precision\.dtype={compute}: .*=bf16"):
        check_engine(1, Precision(compute, FP32, FP16), 1, False)
    check_engine(1, Precision(compute, FP32, BF16), 1, False)
    check_engine(1, Precision(FP16, FP16, FP16), 1, False)
