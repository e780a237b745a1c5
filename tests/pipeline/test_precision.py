"""Dtypes, ZeRO stages and DeepSpeed versions that are refused before anything starts."""

import pytest

from megazh.errors import SeveralErrors, UsageError
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


@pytest.mark.parametrize("compute", [FP32, BF16])
@pytest.mark.parametrize("communication", [FP32, BF16])
def test_what_works_passes(compute: Dtype, communication: Dtype) -> None:
    check_engine(Precision(compute, FP32, communication), 1)


@pytest.mark.parametrize(
    ("dtypes", "zero_stage", "named", "reason", "remedy"),
    [
        ((FP32, FP32, FP32), 0, "zero_stage=0", "costs memory and changes no result", "set zero_stage=1"),
        ((FP32, FP32, FP32), 2, "zero_stage=2", "a pipeline stage needs whole", "set zero_stage=1"),
        ((BF16, FP32, FP32), 3, "zero_stage=3", "a pipeline stage needs whole", "set zero_stage=1"),
        ((FP32, BF16, FP32), 1, "grad_accum_dtype=bf16", "always summed in fp32", "leave grad_accum_dtype out"),
        ((BF16, FP16, FP32), 1, "grad_accum_dtype=fp16", "always summed in fp32", "leave grad_accum_dtype out"),
        ((FP16, FP32, FP32), 1, "precision.dtype=fp16", "loss scale", "set precision.dtype=bf16, or fp32"),
        ((BF16, FP32, FP16), 1, "communication_dtype=fp16", "loss scale", "set communication_dtype=bf16, or fp32"),
    ],
)
def test_what_the_engine_does_not_have_is_refused_by_name(
    dtypes: tuple[Dtype, Dtype, Dtype], zero_stage: int, named: str, reason: str, remedy: str
) -> None:
    with pytest.raises(UsageError) as refusal:
        check_engine(Precision(*dtypes), zero_stage)
    assert str(refusal.value).startswith(f"{named}: ")
    assert reason in str(refusal.value)
    assert remedy in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_all_that_is_refused_is_named_at_once() -> None:
    with pytest.raises(SeveralErrors) as refusal:
        check_engine(Precision(FP16, FP16, FP16), 0)
    assert len(str(refusal.value).splitlines()) == 4


def test_sizes_and_names_are_those_of_torch() -> None:
    for dtype in Dtype:
        assert dtype.torch.itemsize == dtype.bytes
        assert str(dtype.torch) == {"fp32": "torch.float32", "bf16": "torch.bfloat16", "fp16": "torch.float16"}[dtype]
