"""The lines of a run on a terminal of 80 columns."""

import dataclasses
import math
from typing import Any

import pytest
from run.test_metrics import record

from megazh.run.lines import step_line, validation_lines
from megazh.run.records import CorpusValidation, ValidationRecord

LONG = {"steps": 286_102, "eta_seconds": 3 * 86_400 + 4 * 3600}
"""1.4B parameters on 30B tokens with six GPUs."""


def bars(line: str) -> list[int]:
    """Where the parts of a line begin."""
    return [line.index(word) for word in ("loss", "norm", "tok/s", "ETA")]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"step": 123_456, **LONG},
            "step 123456/286102 loss 2.3141 norm 0.83 11.2k tok/s MFU 41% 18.2G ETA 3d04h",
        ),
        (
            {"step": 7, "mfu": None, "memory_bytes": None, "memory_reserved": None},
            "step   7/600 | loss 2.3141 | lr 4.87e-4 | norm 0.83 | 11.2k tok/s | ETA 3m12s",
        ),
        (
            {"step": 1, **LONG, "loss": math.nan, "grad_norm": math.inf, "skipped": True},
            "step      1/286102 loss nan    norm inf  11.2k tok/s MFU 41% skipped: not finite",
        ),
        (
            {"step": 1, **LONG, "loss": 12.5, "grad_norm": 90.0, "skipped": True},
            "step      1/286102 loss 12.500 norm 90.0 11.2k tok/s MFU 41% skipped: spike",
        ),
        (
            {"step": 7, "mfu": None, "memory_bytes": None, "memory_reserved": None, "skipped": True},
            "step   7/600 | loss 2.3141 | lr 4.87e-4 | norm 0.83 | skipped: spike",
        ),
    ],
)
def test_a_step(changes: dict[str, Any], line: str) -> None:
    assert step_line(record(**{"loss": 2.3141, **changes})) == line


@pytest.mark.parametrize("steps", [6, 600, 38_147, 286_102, 1_286_102])
@pytest.mark.parametrize("gpu", [True, False])
def test_no_step_is_wider_than_the_terminal_and_all_are_aligned(steps: int, gpu: bool) -> None:
    card = {} if gpu else {"mfu": None, "memory_bytes": None}
    lines = [
        step_line(record(step, steps=steps, loss=loss, grad_norm=norm, tokens_per_second=rate, **card))
        for step, loss, norm, rate in (
            (1, 11.9314, 14.25, 999_600.0),
            (steps // 2, 2.3141, 0.83, 11_200.0),
            (steps, 0.0123, 153.2, 1_970_000.0),
        )
    ]
    assert max(map(len, lines)) <= 80
    assert bars(lines[0]) == bars(lines[1]) == bars(lines[2])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, 123_456.7, 0.0, 1e-12])
def test_odd_numbers_fit(value: float) -> None:
    line = step_line(
        record(123_456, **LONG, loss=value, grad_norm=value, learning_rate=value, tokens_per_second=value, mfu=value)
    )
    assert len(line) <= 80
    assert line.startswith("step 123456/286102 loss ")


def test_a_validation() -> None:
    whole = ValidationRecord(123_456, 30_000_000_000, 2.2915, 1.0834, 292_968, math.exp(2.2915))
    (line,) = validation_lines(whole)
    assert line == "validation after step 123456 | loss 2.2915 | perplexity 9.89 | 1.0834 bits/byte"
    assert len(line) <= 80


def test_a_validation_of_several_corpora() -> None:
    corpora = {"维基": CorpusValidation.of(2.0, 1.0, 1400), "a\nb c": CorpusValidation.of(12.0, math.inf, 3)}
    one = ValidationRecord(1, 16, 2.5, 1.25, 1400, math.exp(2.5), {"维基": corpora["维基"]})
    assert len(list(validation_lines(one))) == 1
    assert list(validation_lines(dataclasses.replace(one, corpora=corpora))) == [
        "validation after step 1 | loss 2.5000 | perplexity 12.2 | 1.2500 bits/byte",
        "  维基  | loss 2.0000 | perplexity 7.39 | 1.0000 bits/byte | 1,400 samples",
        "  a b c | loss 12.0000 | perplexity 163k | inf bits/byte | 3 samples",
    ]
    assert CorpusValidation.of(math.nan, 1.0, 1).perplexity != CorpusValidation.of(1.0, 1.0, 1).perplexity
    assert CorpusValidation.of(1e9, 1.0, 1).perplexity == math.inf
