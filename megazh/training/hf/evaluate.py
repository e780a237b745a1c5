"""Validation and sampled continuations of a model under Hugging Face's Trainer."""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from megazh.model.generate import generate
from megazh.model.sampling import SamplingOptions
from megazh.progress import duration
from megazh.run.pulse import beat
from megazh.tokenizer.stream import decode_whole
from megazh.training.evaluate import SAMPLING
from megazh.training.held_out import HeldOut, Validation
from megazh.training.hf.model import PackedModel
from megazh.training.prompting import Prompting

_POLL_SECONDS, _LOG_SECONDS = 2.0, 30.0
_TOKENS_PER_POLL = 8


@torch.no_grad()
def validate(
    model: PackedModel, held_out: HeldOut, stop: Callable[[], bool], log: Callable[[str], None]
) -> Validation | None:
    """Validate. All ranks call it.

    Args:
        model: the model.
        held_out: the samples to validate on.
        stop: whether any rank was requested to stop; all ranks call it at the same micro-batches.
        log: prints a line of progress, every half minute.

    Returns:
        None if it was stopped.
    """
    feed, losses = held_out.feed, list[torch.Tensor]()
    begun = logged = time.monotonic()
    piece = 1
    model.eval()
    try:
        for done, ((tokens, document_map), (targets, scale)) in enumerate(feed):
            if done and done % piece == 0:
                if stop():
                    return None
                piece = _piece(done, time.monotonic() - begun, model.device)
                if time.monotonic() - logged > _LOG_SECONDS:
                    logged = time.monotonic()
                    left = (logged - begun) * (feed.micro_batches - done) / done
                    samples = done * held_out.samples // feed.micro_batches
                    log(f"validation: {samples:,} of {held_out.samples:,} samples, {duration(left)} left")
            moved = [each.to(model.device) for each in (tokens, document_map, targets)]
            losses.append(model(*moved, float(scale)))
    finally:
        model.train()
    return held_out.result(losses, model.device)


def _piece(done: int, seconds: float, device: torch.device) -> int:
    """Micro-batches until the next question whether to go on, the same on all ranks."""
    slowest = torch.tensor(seconds, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return max(1, int(done * _POLL_SECONDS / max(float(slowest), 1e-3)))


def sample_text(
    model: PackedModel,
    prompting: Prompting,
    prompt: str,
    count: int,
    seed: int,
    stop: Callable[[], bool],
    options: SamplingOptions = SAMPLING,
) -> str | None:
    """Sample a continuation; see `megazh.training.evaluate.sample_text`. Ranks draw for themselves."""
    ids, tokenizer = prompting.ids(prompt), prompting.tokenizer
    model.eval()
    try:
        tokens: list[int] = []
        forward = model.generation(len(ids) + count)
        for token in generate(forward, ids, count, options, tokenizer.vocab_size, prompting.end_ids, seed):
            tokens.append(token)
            beat("sampling")
            if len(tokens) % _TOKENS_PER_POLL == 0 and stop():
                return None
    finally:
        model.train()
    return decode_whole(tokenizer, [*ids, *tokens])[len(tokenizer.decode(ids)) :]
