"""For `kernels.py`: compile what the functions of `megazh/kernels` launch, for a card that need not be there."""

import contextlib
import importlib.util
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch

from megazh.errors import UsageError, WorkerError

TOKENS = 8192
"""Tokens of a micro-batch; code depends only on whether 16 divides it, which spills no more on sm86 if it does not."""
REGISTERS = 65536
"""Registers per multiprocessor of each card."""


@dataclass(frozen=True)
class Card:
    """What a block and a multiprocessor of a card may have (CUDA programming guide, technical specifications)."""

    capability: tuple[int, int]
    block_shared: int
    """Most bytes of shared memory per block."""
    shared: int
    """Bytes of shared memory per multiprocessor; each resident block takes 1 KiB more than it asks for."""
    warps: int
    """Most resident warps per multiprocessor."""

    def resident_warps(self, registers: int, shared: int, warps: int) -> int:
        """Warps that a multiprocessor holds at a time, of blocks that need so much each."""
        per_warp = -(-registers * 32 // 256) * 256  # registers are given out to warps, 256 at a time
        blocks = min(REGISTERS // (per_warp * warps), self.shared // (shared + 1024), self.warps // warps, 16)
        return blocks * warps


CARDS = {
    "sm80": Card((8, 0), 163 << 10, 164 << 10, 64),
    "sm86": Card((8, 6), 99 << 10, 100 << 10, 48),
    "sm89": Card((8, 9), 99 << 10, 100 << 10, 48),
    "sm90": Card((9, 0), 227 << 10, 228 << 10, 64),
}
"""A100; RTX 3090; RTX 4090; H100 and H200."""


@dataclass(frozen=True)
class Found:
    """One kernel, compiled for one card."""

    kernel: str
    shape: str
    """The shape that it was launched for, with what else its code depends on."""
    card: str
    registers: int
    """Registers per thread."""
    shared: int
    """Bytes of shared memory per block."""
    spills: int
    """Bytes per thread of registers that are stored to memory for lack of registers."""
    warps: int
    """Warps per block."""
    resident_warps: int
    """Warps that a multiprocessor holds at a time."""


def launches(head_dims: list[int]) -> dict[str, Callable[[], None]]:
    """The launches of a training step by shape: each is a function that makes them.

    Args:
        head_dims: sizes of a head, in dimensions.
    """
    found: dict[str, Callable[[], None]] = {}
    for head_dim in head_dims:
        found[f"head_dim {head_dim}"] = partial(_attention, head_dim, 12, 12)
        found[f"head_dim {head_dim}, grouped"] = partial(_attention, head_dim, 12, 4)
    largest = head_dims[-1]
    found[f"head_dim {head_dims[0]}, halves apart"] = partial(_attention, head_dims[0], 12, 4, parts=2)
    found[f"head_dim {largest}, fp16, 1 key, no bias"] = partial(_attention, largest, 16, 1, torch.float16, False)
    for width in (1024, 2048):
        found[f"width {width}"] = partial(_rows, width)
    found["151,936 ids"] = partial(_ids, 151_936, 1024)
    return found


def _tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _attention(
    head_dim: int,
    heads: int,
    kv_heads: int,
    dtype: torch.dtype = torch.bfloat16,
    with_sum: bool = True,
    parts: int = 1,
) -> None:
    from megazh.kernels.attention import document_attention, document_attention_backward
    from megazh.kernels.rotary import rotate_, rotate_back_

    qkv = _tensor(TOKENS, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    bounds = _tensor(parts, TOKENS, dtype=torch.int32)
    angles = _tensor(TOKENS, head_dim // 2, dtype=torch.float32)
    rotate_(qkv, angles, angles, heads + kv_heads, head_dim)
    out, lse = document_attention(qkv, bounds, heads, kv_heads)
    document_attention_backward(out, qkv, bounds, bounds, out, lse, heads, kv_heads, angles, angles, with_sum)
    rotate_back_(qkv, angles, angles, heads + kv_heads, head_dim, with_sum)


def _rows(width: int) -> None:
    from megazh.kernels.norm import add_norm, norm_backward
    from megazh.kernels.swiglu import swiglu, swiglu_backward_

    states, weight = _tensor(TOKENS, width), _tensor(width)
    for other in (None, states):
        total, normed, rstd = add_norm(states, other, weight, 1e-6)
        norm_backward(normed, total, rstd, weight, other)
        norm_backward(normed, total, rstd, weight, other, for_weight=False)
    gate_up = _tensor(TOKENS, 2 * 4 * width)
    swiglu_backward_(gate_up, swiglu(gate_up))


def _ids(vocab: int, width: int) -> None:
    from megazh.kernels.cross_entropy import cross_entropy_
    from megazh.kernels.embedding import add_embedding_gradient_

    logits, labels = _tensor(TOKENS, vocab), _tensor(TOKENS, dtype=torch.int32)
    for scale in (None, _tensor(1, dtype=torch.float32)):
        cross_entropy_(logits, labels, 0.0, scale, vocab)
    add_embedding_gradient_(_tensor(vocab, width, dtype=torch.float32), labels, _tensor(TOKENS, width))


def check_compiler() -> None:
    """Refuse where kernels cannot be compiled.

    Raises:
        UsageError: Triton or its ptxas is missing.
    """
    if importlib.util.find_spec("triton") is None:
        raise UsageError("Triton is not installed: pip install -r requirements/triton.txt")
    from triton import knobs

    try:
        _ = knobs.nvidia.ptxas.path
    except RuntimeError as error:
        raise UsageError(f"Triton's compiler ptxas is missing ({error}): install Triton again") from None


class _Driver:
    """In place of Triton's driver: a card by name, which can be compiled for and not be run on."""

    def __init__(self, card: str) -> None:
        self._card = card

    def get_current_device(self) -> str:
        """What Triton keeps compiled kernels by."""
        return self._card

    def get_current_stream(self, device: str) -> int:
        """Any stream: nothing is launched."""
        return 0

    def get_current_target(self) -> Any:
        """What to compile for."""
        from triton.backends.compiler import GPUTarget

        major, minor = CARDS[self._card].capability
        return GPUTarget("cuda", 10 * major + minor, 32)


def compile_kernels(card: str, head_dims: list[int], blocks_of: str | None = None) -> list[Found]:
    """Compile all kernels for one card; in a process without the variable TRITON_INTERPRET, with an empty cache.

    Args:
        card: a name in `CARDS`.
        head_dims: sizes of a head, in dimensions.
        blocks_of: the card whose block sizes the attention kernels take. Default: `card`.
    """
    from triton import knobs
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    compiled = JITFunction.run
    logs: dict[str, str] = {}
    found: list[Found] = []

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            result = compiled(kernel, *args, grid=grid, warmup=True, **options)
        # Shapes may share code, which is compiled once.
        each = _found(kernel.__name__, shape, card, result.metadata, logs.setdefault(result.hash, log.getvalue()))
        if each not in found:
            found.append(each)
        return result

    driver.set_active(_Driver(card))
    knobs.nvidia.dump_ptxas_log = True
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch("megazh.kernels.attention.capability", return_value=CARDS[blocks_of or card].capability),
    ):
        for shape, launch in launches(head_dims).items():  # noqa: B007 (`compile_only` reads it)
            launch()
    return found


def _found(kernel: str, shape: str, card: str, metadata: Any, log: str) -> Found:
    """What the log of `ptxas -v` says.

    Raises:
        WorkerError: the log says nothing of registers and spills.
    """
    registers, spills = re.search(r"Used (\d+) registers", log), re.search(r"(\d+) bytes spill stores", log)
    if registers is None or spills is None:
        raise WorkerError(f"ptxas does not report registers and spills of {kernel} for {card}: {log.strip()[:200]!r}")
    used, shared, warps = int(registers[1]), metadata.shared, metadata.num_warps
    resident = CARDS[card].resident_warps(used, shared, warps)
    return Found(kernel.removeprefix("_"), shape, card, used, shared, int(spills[1]), warps, resident)
