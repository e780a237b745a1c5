"""Every Triton kernel, compiled for the cards that megazh is for; no GPU is needed, Triton with its ptxas is."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from processes import run_command

TOOL = Path(__file__).parents[3] / "tools" / "bench" / "kernels.py"
KIB = 1024
BLOCK_SHARED = {"sm80": 163 * KIB, "sm86": 99 * KIB, "sm89": 99 * KIB, "sm90": 227 * KIB}
KERNELS = {
    "rotate", "attention_forward", "attention_backward_queries", "attention_backward_keys", "norm_forward",
    "norm_backward", "swiglu_forward", "swiglu_backward", "cross_entropy", "embedding_gradient",
}  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All kernels as they are launched, for all cards."""
    written = tmp_path_factory.mktemp("kernels") / "kernels.json"
    result = run_command([sys.executable, TOOL, "--json", written], timeout=550)
    assert result.returncode == 0, result.stderr
    found: list[dict[str, Any]] = json.loads(written.read_text())
    assert len(result.stdout.splitlines()) == 1 + len(found)
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_kernel_compiles_for_every_card_and_fits_it(compiled: list[dict[str, Any]]) -> None:
    sources = (TOOL.parents[2] / "megazh" / "kernels").glob("*.py")
    written = {line[4 : line.index("(")].strip("_") for path in sources for line in _kernels(path)}
    assert written == KERNELS, "a kernel that is new must be launched in tools/bench/compiled_kernels.py"
    for card, limit in BLOCK_SHARED.items():
        own = [each for each in compiled if each["card"] == card]
        assert {each["kernel"] for each in own} == KERNELS
        for head_dim in (32, 48, 64, 128):
            for shape in (f"head_dim {head_dim}", f"head_dim {head_dim}, grouped"):
                assert sum(each["shape"] == shape and "attention" in each["kernel"] for each in own) == 3
        assert all(each["shared"] <= limit for each in own)
        assert all(each["spills"] <= 64 for each in own)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_attention_spills_nothing_on_a_3090_and_leaves_warps_to_wait_for_memory(compiled: list[dict[str, Any]]) -> None:
    for each in compiled:
        if "attention" in each["kernel"] and each["card"] in ("sm86", "sm89"):
            assert each["spills"] == 0, each
            assert each["resident_warps"] >= 8, each


def _kernels(path: Path) -> list[str]:
    """The lines `def NAME(...` of functions that are launched: of those that read `tl.program_id`."""
    functions = path.read_text().split("@triton.jit\n")[1:]
    return [function.splitlines()[0] for function in functions if "tl.program_id" in function]


def test_what_exceeds_the_limits_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOL.parent))
    monkeypatch.delitem(sys.modules, "kernels", raising=False)  # transformers imports tests/kernels by that name
    from compiled_kernels import Found
    from kernels import check

    from megazh.errors import WorkerError

    fits = Found("attention_forward", "head_dim 64", "sm86", 255, 99 * KIB, 8, 4, 4)
    check([fits], 8)
    with pytest.raises(WorkerError) as found:
        check([fits, replace(fits, shared=100 * KIB), replace(fits, spills=9)], 8)
    assert str(found.value) == (
        "attention_forward (head_dim 64) on sm86 needs 100 KiB of shared memory, a block may have 99 KiB; "
        "attention_forward (head_dim 64) on sm86 spills 9 bytes, at most 8 are allowed"
    )


def test_resident_warps_are_what_registers_shared_memory_and_the_card_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOL.parent))
    from compiled_kernels import CARDS

    card = CARDS["sm86"]
    assert card.resident_warps(registers=168, shared=12 * KIB, warps=4) == 12, "65,536 // (168 x 128) = 3 blocks"
    assert card.resident_warps(registers=64, shared=49 * KIB, warps=4) == 8, "two blocks, each with 1 KiB more"
    assert card.resident_warps(registers=32, shared=0, warps=16) == 48, "no more than the card holds"


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOL.parent))
    import compiled_kernels
    from triton import knobs

    from megazh.errors import UsageError

    def missing(_: object) -> None:
        raise RuntimeError("Cannot find ptxas")

    monkeypatch.setattr(type(knobs.nvidia), "ptxas", property(missing), raising=False)
    with pytest.raises(UsageError, match="ptxas is missing"):
        compiled_kernels.check_compiler()
    monkeypatch.setattr(compiled_kernels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="Triton is not installed"):
        compiled_kernels.check_compiler()
