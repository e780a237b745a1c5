"""How often the plot of a run is drawn while it trains."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from made_runs import write_metrics
from processes import wait_until

from megazh.run import redraw
from megazh.run.folder import RunFolder
from megazh.run.redraw import PLOT, Redrawing, draw_within


def test_the_longer_a_drawing_takes_the_more_seldom_it_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[subprocess.Popen[bytes]] = []
    start, clock = subprocess.Popen, [1000.0]

    def fake(words: list[str], **settings: object) -> subprocess.Popen[bytes]:
        begun.append(start([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))
        return begun[-1]

    monkeypatch.setattr(redraw.subprocess, "Popen", fake)
    monkeypatch.setattr(redraw, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    drawing = Redrawing(tmp_path)

    def drawn_at(seconds: float) -> int:
        clock[0] = 1000 + seconds
        drawing.draw()
        return len(begun)

    def end_at(seconds: float) -> None:
        clock[0] = 1000 + seconds
        begun[-1].communicate(b"\n")
        wait_until(lambda: drawing._seconds > 0, 20, "the end of the drawing")

    assert drawn_at(0) == 1
    assert drawn_at(70) == 1, "the first goes on"
    end_at(90)
    assert drawn_at(90 * 20 - 1) == 1
    assert drawn_at(90 * 20) == 2
    drawing.close()
    assert begun[-1].returncode is not None


def test_the_last_drawing_is_bounded_in_time(tmp_path: Path) -> None:
    write_metrics(RunFolder(tmp_path), steps=3)
    assert not draw_within(tmp_path, 0.01)
    assert not (tmp_path / PLOT).exists()
    assert draw_within(tmp_path, 60)
    assert (tmp_path / PLOT).read_bytes().startswith(b"\x89PNG")
