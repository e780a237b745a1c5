"""Python's garbage collector: frozen after the first step of a process, then used only between steps."""

from pathlib import Path

import pytest
from ranks import run_ranks


@pytest.mark.ranks
@pytest.mark.slow
def test_objects_are_frozen_after_the_first_step(stories: Path, tmp_path: Path) -> None:
    (found,) = run_ranks(Path(__file__).parent / "garbage_rank.py", 1, [stories], tmp_path, timeout=120)
    assert found["before steps"] == [(False, True)] + [(True, False)] * 4
    assert found["collected after"] == [3], "after a validation that is not the last"
