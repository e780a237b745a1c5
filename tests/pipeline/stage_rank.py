"""One rank of a small pipeline that runs single experiments; see `JOBS`.

`python stage_rank.py FOLDER STAGES JOB...`.
"""

import dataclasses
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from decoders import packed
from pipeline.ladder_rank import CASES, Case, feed, make_pipeline, stage_weights
from ranks import join_ranks, save_results

from megazh.model.decoder import Decoder
from megazh.model.document_map import encode_document_map

LENGTHS = [5, 4, 6]
"""Lengths of the documents in the row of the job `documents`."""
PIECES = [[5, 17, 3, 80], [9], [0], [41, 2]]
"""Token ids that the job `forward` feeds, one list after the other."""


def altered(batches: Iterator[Any], scale: float = 1.0, ignored: bool = False) -> Iterator[Any]:
    """Micro-batches with their scale multiplied, or with all labels ignored."""
    for inputs, (labels, own_scale) in batches:
        yield inputs, (torch.full_like(labels, -100) if ignored else labels, own_scale * scale)


def not_finite(name: str, stages: int) -> dict[str, Any]:
    """Train three steps; the loss of the second is NaN."""
    module, engine = make_pipeline(CASES[name], stages)
    losses, skipped, weights = [], [], []
    for step, scale in enumerate((1.0, math.nan, 1.0)):
        losses.append(float(engine.train_batch(altered(feed(step, 0, 1), scale))))
        skipped.append(engine.skipped_steps)
        weights.append(stage_weights(module))
    return {"losses": losses, "skipped": skipped, "weights": weights}


def no_labels(name: str, stages: int) -> dict[str, Any]:
    """Train one step in which all labels are ignored."""
    module, engine = make_pipeline(CASES[name], stages)
    before = stage_weights(module)
    loss = float(engine.train_batch(altered(feed(0, 0, 1), ignored=True)))
    return {"loss": loss, "skipped": engine.skipped_steps, "before": before, "weights": stage_weights(module)}


def vetoed(name: str, stages: int) -> dict[str, Any]:
    """Train a step, then one that rank 1 alone refuses."""
    module, engine = make_pipeline(CASES[name], stages)
    engine.train_batch(feed(0, 0, 1))
    before, seen = stage_weights(module), []

    def accept(loss: float, norm: float) -> bool:
        seen.append((loss, norm))
        return dist.get_rank() != 1

    engine.optimizer.accept = accept
    engine.train_batch(feed(1, 0, 1))
    return {
        "before": before, "weights": stage_weights(module), "seen": seen, "skipped": engine.skipped_steps,
        "updates": engine.optimizer.updates,
    }  # fmt: skip


def frozen(name: str, stages: int) -> dict[str, Any]:
    """Train two steps with the embedding and one matrix frozen."""
    module, engine = make_pipeline(CASES[name], stages, frozen=("embedding.weight", "blocks.0.mlp.up_proj.weight"))
    before = stage_weights(module)
    for step in range(2):
        engine.train_batch(feed(step, 0, 1))
    return {"before": before, "weights": stage_weights(module)}


def frozen_stage(name: str, stages: int) -> dict[str, Any]:
    """Train two steps with everything frozen up to the last block."""
    lower = [
        key for key, _ in Decoder(CASES[name].config).named_parameters() if key.startswith(("embedding", "blocks.0"))
    ]
    module, engine = make_pipeline(CASES[name], stages, frozen=tuple(lower))
    before = stage_weights(module)
    losses = [float(engine.train_batch(feed(step, 0, 1))) for step in range(2)]
    trained = [parameter.requires_grad for parameter in module.parameters()]
    return {"before": before, "weights": stage_weights(module), "losses": losses, "trained": any(trained)}


def tampered(name: str, stages: int) -> dict[str, Any]:
    """The error of `check_tied` after one weight of the last stage's copy has grown by one unit in the last place."""
    from megazh.errors import WorkerError
    from megazh.pipeline.engine import check_tied

    module, _ = make_pipeline(CASES[name], stages)
    check_tied(module)
    weight = module.tied_weight()
    if module.is_last:
        with torch.no_grad():
            weight[7, 3] = torch.nextafter(weight[7, 3], torch.tensor(1.0, dtype=weight.dtype))
    try:
        check_tied(module)
    except WorkerError as error:
        return {"error": str(error)}
    return {"error": ""}


def through_stages(
    module: Any, tokens: torch.Tensor, positions: torch.Tensor, boundaries: torch.Tensor
) -> torch.Tensor:
    """Run the forward pass through all stages.

    Returns logits (rows, seq, vocab) on the last stage, and on the others their own hidden states.
    """
    document_map = encode_document_map(positions, boundaries)
    states = tokens
    for stage in range(module.num_stages):
        found = torch.empty(*tokens.shape, module.config.hidden_size, dtype=next(module.parameters()).dtype)
        if stage == module.stage_id:
            found = module((states, document_map))[0].detach()
            own = module.logits(found) if module.is_last else found
        if stage < module.num_stages - 1:
            dist.broadcast(found, stage)
            states = found
    return own


def documents(name: str, stages: int) -> dict[str, Any]:
    """Logits of a row of three documents: unchanged, with another first token, and with other tokens near the end."""
    found = {}
    for checkpointing in (False, True):
        module, _ = make_pipeline(dataclasses.replace(CASES[name], checkpointing=checkpointing), stages)
        module.train()
        tokens, _, positions, boundaries = packed([LENGTHS], sum(LENGTHS) + 1)
        first, future = tokens.clone(), tokens.clone()
        first[0, 0] = (first[0, 0] + 1) % 97
        future[0, sum(LENGTHS[:2]) + 2 :] = (future[0, sum(LENGTHS[:2]) + 2 :] + 1) % 97
        rows = (tokens, first, future)
        found[str(checkpointing)] = [through_stages(module, row, positions, boundaries) for row in rows]
    return found


def forward(name: str, stages: int) -> dict[str, Any]:
    """Logits after each of `PIECES`, fed one after the other."""
    from megazh.pipeline.generate import pipeline_forward

    case = Case({"residual_dropout": 0.5}) if name == "dropout" else CASES[name]
    module, _ = make_pipeline(case, stages)
    module.eval()
    step = pipeline_forward(module, sum(map(len, PIECES)))
    return {"logits": [step(piece) for piece in PIECES]}


JOBS = {
    "not_finite": not_finite,
    "no_labels": no_labels,
    "vetoed": vetoed,
    "frozen": frozen,
    "frozen_stage": frozen_stage,
    "tampered": tampered,
    "documents": documents,
    "forward": forward,
}
"""Jobs by name; the command line gives `JOB/CASE`."""

if __name__ == "__main__":
    join_ranks()
    results = {}
    for argument in sys.argv[3:]:
        job, case_name = argument.split("/")
        results[argument] = JOBS[job](case_name, int(sys.argv[2]))
    save_results(Path(sys.argv[1]), results)
    dist.barrier()
    dist.destroy_process_group()
