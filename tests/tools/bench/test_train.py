"""The benchmark of training without a GPU: megazh through its own launcher, contenders left out, and refusals."""

import json
import sys
from pathlib import Path

import pytest
from processes import Finished, run_command

TOOLS = Path(__file__).parents[3] / "tools" / "bench"
SMALL = ["--recipe", "demo", "--device", "cpu", "--seq-len", 64, "--micro-batch-size", 2, "--micro-batches", 2]


def tool(name: str, *options: object, timeout: float = 200) -> Finished:
    return run_command([sys.executable, TOOLS / name, *map(str, options)], timeout=timeout)


@pytest.mark.ranks
@pytest.mark.slow
def test_both_layouts_train_on_the_same_tokens(tmp_path: Path) -> None:
    written = tmp_path / "bench.json"
    result = tool(
        "train.py", *SMALL, "--num-gpus", 2, "--stages", 1, "--stages", 2, "--steps", 4, "--warm-up", 1,
        "--contenders", "megazh", "seed", "--json", written,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads(written.read_text())
    flat, cut = found["results"]
    assert (flat["name"], cut["name"]) == ("megazh pp=1 dp=2", "megazh pp=2 dp=1")
    assert found["tokens_a_step"] == 2 * 2 * 64 * 2
    assert flat["losses"] == pytest.approx(cut["losses"], rel=1e-4)
    assert len(flat["seconds"]) == len(cut["seconds"]) == 3, "without the warm-up steps"
    assert "seed" in found["left_out"]
    assert "first step after " in result.stdout
    table = result.stdout[result.stdout.index("contender ") :].splitlines()
    assert [line.split()[:2] for line in table[1:3]] == [["megazh", "pp=1"], ["megazh", "pp=2"]]
    assert "waited for samples" in table[1]
    assert "MFU = tokens/s x 0.00" in result.stdout


@pytest.mark.ranks
@pytest.mark.slow
def test_both_engines_train_on_the_same_tokens(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    written = tmp_path / "bench.json"
    options = ["--contenders", "megazh", "megazh_hf", "--steps", 3, "--warm-up", 1, "--json", written]
    result = tool("train.py", *SMALL, *options)
    assert result.returncode == 0, result.stderr
    own, other = json.loads(written.read_text())["results"]
    assert (own["name"], other["name"]) == ("megazh", "megazh_hf")
    assert other["losses"] == pytest.approx(own["losses"], abs=1e-4)
    assert len(own["seconds"]) == len(other["seconds"]) == 2


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    result = tool("train.py", *SMALL, "--steps", 2, "--warm-up", 2)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "no step is left to measure" in result.stderr
    assert tool("train.py", "--help").returncode == 0


def test_kernels_are_grouped_by_what_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    from profile_step import group_of

    for kernel, group in {
        "_attention_backward_keys": "attention, backward",
        "_attention_forward": "attention, forward",
        "_norm_backward": "norm",
        "_cross_entropy": "cross entropy",
        "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT": "products",
        "ampere_bf16_s16816gemm_bf16_128x256_ldg8_f2f_stages_64x3_nn": "products",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel": "attention, backward",
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL": "communication",
        "Memcpy DtoD (Device -> Device)": "copies",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>": "elementwise and others",
    }.items():
        assert group_of(kernel) == group, kernel
