"""The benchmark of micro-batches measures both consumers, for one corpus and for several."""

import re
import sys
from pathlib import Path

import pytest
from processes import run_command

TOOL = Path(__file__).parents[3] / "tools" / "bench" / "feed.py"


@pytest.mark.slow
@pytest.mark.parametrize("corpora", [1, 3])
def test_it_measures_the_cost_and_both_waits(tmp_path: Path, corpora: int) -> None:
    small = ["--tokens", "200000", "--seconds", "0.2", "--micro-batch-size", "4", "--global-batch-size", "8"]
    command = [sys.executable, TOOL, *small, "--corpora", str(corpora), "--tokens-per-second", "1e6"]
    finished = run_command(command, 90, {"MEGAZH_CACHE": str(tmp_path)})
    assert finished.returncode == 0, finished
    header, made, *taken = finished.stdout.splitlines()
    assert header == f"micro-batches of 4 x 512 tokens, 2 per step, {corpora} corpora; one every 2.0 ms"
    assert float(re.search(r"([0-9,]+) us of CPU time", made)[1].replace(",", "")) > 0
    assert len(taken) == 2
    for line in taken:
        assert float(re.search(r"\(([0-9.]+)% of the time\)", line)[1]) > 0


def test_a_step_is_whole_micro_batches() -> None:
    finished = run_command([sys.executable, TOOL, "--micro-batch-size", "3"], 60)
    assert finished.returncode == 2
    assert "--global-batch-size must be a multiple of --micro-batch-size" in finished.stderr
