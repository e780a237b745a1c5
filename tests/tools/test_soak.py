"""The soak: its comparer finds what was tampered with, and a short soak of real runs passes."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import run_command

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

from soak_compare import Recorded, Take, bits_until, first_difference, recorded, retaken_difference  # noqa: E402
from soak_report import Report, Struck  # noqa: E402

WHOLE = Recorded(
    losses=[(1, 5.0), (2, 4.5), (3, 4.25)],
    validations=[(0, 6.0), (3, 4.5)],
    samples={step: [(2 * step, f"a{step}"), (2 * step + 1, f"b{step}")] for step in (1, 2, 3)},
)


def difference(same_bits: int = 3, **changes: Any) -> str | None:
    """What is found of a run with other records."""
    return first_difference(WHOLE, WHOLE, dataclasses.replace(WHOLE, **changes), same_bits)


def test_the_same_records_are_the_same_and_rounding_is_allowed_in_another_layout_only() -> None:
    assert difference() is None
    rounded = [(1, 5.0), (2, 4.5), (3, 4.25 * (1 + 5e-6))]
    assert difference(2, losses=rounded) is None
    assert "step 3" in str(difference(3, losses=rounded))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"losses": [(1, 5.0), (2, 4.4), (3, 4.25)]}, "the loss of step 2 is 4.4"),
        ({"losses": [(1, 5.0), (2, float("nan")), (3, 4.25)]}, "the loss of step 2 is nan"),
        ({"losses": [(1, 5.0), (2, 4.5), (2, 4.5), (3, 4.25)]}, "one of step 2, not of step 3"),
        ({"losses": [(1, 5.0), (3, 4.25)]}, "one of step 3, not of step 2"),
        ({"losses": [(1, 5.0), (2, 4.5)]}, "step 3 is not recorded"),
        ({"losses": [*WHOLE.losses, (4, 4.0)]}, "step 4 is recorded behind the last step"),
        ({"samples": {**WHOLE.samples, 2: [(4, "a2"), (6, "b2")]}}, "step 2 was trained on samples [4, 6], not on"),
        ({"samples": {**WHOLE.samples, 2: [(4, "a2"), (5, "a2")]}}, "sample 5 of step 2 was trained on with other"),
        ({"samples": {**WHOLE.samples, 2: [*WHOLE.samples[2], (5, "b2")]}}, "samples [4, 5, 5]"),
        ({"samples": {1: WHOLE.samples[1], 3: WHOLE.samples[3]}}, "step 2 was trained on samples [], not on"),
        ({"samples": {**WHOLE.samples, 4: [(8, "a4")]}}, "samples of step 4 were trained on"),
        ({"validations": [(0, 6.0)]}, "validated at steps [0], not [0, 3]"),
        ({"validations": [(0, 6.0), (3, 4.6)]}, "the validation loss at step 3"),
    ],
)
@pytest.mark.parametrize("same_bits", [0, 3])
def test_what_was_tampered_with_is_found(changes: dict[str, Any], words: str, same_bits: int) -> None:
    assert words in str(difference(same_bits, **changes))


def test_a_step_that_is_taken_again_by_the_same_layout_has_the_same_bits() -> None:
    first = Take("1 x 1", 0, {step: float(step) for step in range(1, 30)})
    again = Take("1 x 1", 20, {step: float(step) for step in range(21, 40)})
    assert retaken_difference([first, again]) is None
    wrong = dataclasses.replace(again, losses={**again.losses, 25: 25.0000001})
    found = retaken_difference([first, wrong])
    assert found is not None
    assert "the loss of step 25 is 25.0000001 when it is taken again" in found
    assert retaken_difference([first, dataclasses.replace(wrong, layout="2 x 1")]) is None, "which may round otherwise"
    other = Take("2 x 1", 20, {21: 21.5})
    assert "step 25" in str(retaken_difference([first, other, wrong])), "from the same checkpoint of the first take"
    assert retaken_difference([first, Take("2 x 1", 10, dict.fromkeys(range(11, 30), 0.5)), wrong]) is None
    assert bits_until([first, again]) is None
    assert bits_until([first, other, again]) == 20


def test_the_report_is_a_table_and_fails_with_the_first_difference() -> None:
    report = Report(seed=4, minutes=1.0)
    for at, (lost, code) in enumerate([(0, 5), (7, 5), (3, -9)]):
        struck = Struck("kill_rank", 1, float(at), 10 if at else None, "1 x 1", code=code, lost=lost, seconds=8.0)
        report.struck.append(struck)
    report.steps = 100
    assert report.text().endswith("\nFAIL: no run has ended")
    report.rounds.append((1, 4, 50))
    lines = report.text().splitlines()
    assert "| kill_rank | 3 | -9, 5 | 0 | 0 / 3 / 7 | 8 / 8 / 8 |" in lines
    assert any("1 of them while a run was starting; 100 steps taken, 10 of them lost" in line for line in lines)
    assert lines[-1] == "PASS"
    report.fail("run 1: step 7 is not recorded")
    report.fail("another")
    assert report.text().endswith("* another\n\nFAIL: run 1: step 7 is not recorded")


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_through_faults_is_the_run_that_nobody_interrupted(tmp_path: Path) -> None:
    folder, kinds = tmp_path / "soak", ["kill_rank", "sigterm", "flip", "terminal", "clock", "layout"]
    options = ["--faults", ",".join(kinds), "--most", "6", "--every", "0", "--steps", "120", "--seed", "3", "--keep"]
    done = run_command([sys.executable, TOOLS / "soak.py", *options, "--folder", folder], timeout=380)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.rstrip().endswith("\nPASS")
    faults = [json.loads(line) for line in (folder / "faults.jsonl").read_text().splitlines()]
    assert len(faults) == 6
    assert {fault["kind"] for fault in faults} <= set(kinds)
    table = (folder / "report.md").read_text()
    assert table == done.stdout
    counts = [int(count) for count in re.findall(r"^\| \w+ \| (\d+) \|", table, re.MULTILINE)]
    assert sum(counts) == len(faults)
    # The same runs, of which one record is tampered with.
    path = folder / "run-1"
    alone, home, found = (recorded(each) for each in (folder / "alone", folder / "home", path))
    assert first_difference(alone, home, found, 0) is None
    metrics = path / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    at = next(number for number, line in enumerate(lines) if json.loads(line).get("step") == 7)
    metrics.write_text("".join([*lines[: at + 1], *lines[at:]]))
    assert "step 7" in str(first_difference(alone, home, recorded(path), 0))
