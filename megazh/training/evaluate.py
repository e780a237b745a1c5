"""Validation loss and sampled continuations, computed by the training pipeline itself.

Both take long, so they ask now and then whether to go on. All ranks get the same answer at the same place.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megazh.model.generate import generate
from megazh.model.sampling import SamplingOptions
from megazh.pipeline.generate import pipeline_forward
from megazh.progress import duration
from megazh.run.pulse import beat
from megazh.tokenizer.stream import decode_whole
from megazh.training.held_out import HeldOut, Validation
from megazh.training.prompting import Prompting

SAMPLING = SamplingOptions(temperature=0.7, top_k=50, top_p=0.95)
"""Sampling options of continuations during training."""

_FIRST_PIECE, _LARGEST_PIECE = 4, 256  # micro-batches between two questions whether to go on
_PIECE_SECONDS = 2.0
_LOG_SECONDS = 30.0
_TOKENS_PER_POLL = 8


def validate(
    engine: Any,
    held_out: HeldOut,
    agree: Callable[[float], tuple[bool, float]] = lambda seconds: (False, seconds),
    log: Callable[[str], None] = lambda line: None,
) -> Validation | None:
    """Validate. All ranks call it.

    Args:
        engine: the engine.
        held_out: the samples to validate on.
        agree: takes this rank's seconds of the last piece; returns, the same on all ranks, whether to stop and the
            seconds of the slowest rank.
        log: prints a line of progress, every half minute.

    Returns:
        None if it was stopped.
    """
    feed = held_out.feed
    total, done, piece = feed.micro_batches, 0, _FIRST_PIECE
    batches, losses = iter(feed), list[torch.Tensor]()
    begun = logged = time.monotonic()
    while done < total:
        count, piece_begun = min(piece, total - done), time.monotonic()
        found = engine.eval_batch(batches, reduce_output=None, bcast_loss=False, num_micro_batches=count)
        losses += found or []  # None except on the last stage
        done += count
        stop, seconds = agree(time.monotonic() - piece_begun)
        if stop:
            return None
        if time.monotonic() - logged > _LOG_SECONDS:
            logged = time.monotonic()
            left = (logged - begun) * (total - done) / done
            samples = done * held_out.samples // total
            log(f"validation: {samples:,} of {held_out.samples:,} samples, {duration(left)} left")
        faster = seconds * 2 < _PIECE_SECONDS
        piece = min(2 * piece, _LARGEST_PIECE) if faster else max(piece // 2, 1) if seconds > _PIECE_SECONDS else piece
    return held_out.result(losses, engine.device)


def sample_text(
    engine: Any,
    prompting: Prompting,
    prompt: str,
    count: int,
    seed: int,
    stop: Callable[[], bool] = lambda: False,
    options: SamplingOptions = SAMPLING,
) -> str | None:
    """Sample a continuation of `prompt`, or an answer, up to `count` tokens. All ranks call it and get the same.

    Args:
        engine: the engine.
        prompting: makes the ids of the prompt.
        prompt: text to continue, or question to answer.
        count: largest number of tokens.
        seed: seed of the random draws.
        stop: whether this rank was requested to stop; the stages of a replica agree on it every few tokens.
        options: how tokens are drawn.

    Returns:
        The text without the bytes of a last character that was cut; None if it was stopped.

    Raises:
        DataError: the logits are not finite.
    """
    ids, tokenizer = prompting.ids(prompt), prompting.tokenizer
    module = engine.module
    module.eval()
    try:
        forward = pipeline_forward(module, len(ids) + count)
        tokens: list[int] = []
        for token in generate(forward, ids, count, options, tokenizer.vocab_size, prompting.end_ids, seed):
            tokens.append(token)
            beat("sampling")
            if len(tokens) % _TOKENS_PER_POLL == 0 and _agree_in_replica(module, stop()):
                return None
    finally:
        module.train()
    return decode_whole(tokenizer, [*ids, *tokens])[len(tokenizer.decode(ids)) :]


def _agree_in_replica(module: Any, stop: bool) -> bool:
    """Whether any stage of this replica wants to stop. Replicas draw for themselves and may end at other tokens."""
    grid = module.mpu()
    if grid.pipe_parallel_size == 1:
        return stop
    flag = torch.tensor([stop], dtype=torch.int32, device=next(module.parameters()).device)
    dist.all_reduce(flag, dist.ReduceOp.MAX, group=grid.get_pipe_parallel_group())
    return bool(flag)
