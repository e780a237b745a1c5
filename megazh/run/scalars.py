"""The curves of TensorBoard and of trackers: which numbers of a record they show, and under which names."""

from typing import Any

_GIB = 1 << 30
_STEP = {
    "train/loss": "loss",
    "train/z_loss": "z_loss",
    "train/lr": "learning_rate",
    "train/grad_norm": "grad_norm",
    "train/skipped": "skipped",
    "train/tokens": "tokens",
    "speed/tokens_per_second": "tokens_per_second",
    "speed/tokens_per_second_per_gpu": "tokens_per_second_per_gpu",
    "speed/mfu": "mfu",
    "speed/step_seconds": "step_seconds",
    "speed/data_seconds": "data_seconds",
}
_IN_GIB = {"memory/allocated_gib": "memory_bytes", "memory/reserved_gib": "memory_reserved"}
_VALIDATION = ("loss", "perplexity", "bits_per_byte")


def scalars_of(record: dict[str, Any]) -> dict[str, float]:
    """The points of a record, given by its fields, of a step or a validation; without those that it does not know.

    Those of a corpus are under `validation/NAME/`, where there is more than one.
    """
    if "grad_norm" in record:
        found = {tag: record[field] for tag, field in _STEP.items()}
        known = {tag: field for tag, field in _IN_GIB.items() if record[field] is not None}
        found |= {tag: record[field] / _GIB for tag, field in known.items()}
    else:
        found = {f"validation/{field}": record[field] for field in _VALIDATION}
        corpora = record["corpora"] or {}
        for name, figures in corpora.items() if len(corpora) > 1 else ():
            found |= {f"validation/{name}/{field}": figures[field] for field in _VALIDATION}
    return {tag: float(value) for tag, value in found.items() if value is not None}
