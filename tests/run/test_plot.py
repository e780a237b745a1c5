"""The plot of a run's losses."""

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from megazh.errors import DataError, UsageError
from megazh.run.metrics import Metrics, StepRecord
from megazh.run.plot import plot_losses


def write_run(folder: Path, losses: list[float], validations: bool = True) -> None:
    with Metrics(folder, 0, quiet=False) as metrics:
        for step, loss in enumerate(losses, 1):
            metrics.step(
                StepRecord(
                    step=step,
                    steps=len(losses),
                    tokens=step * 1000,
                    loss=loss,
                    learning_rate=1e-3 / step,
                    grad_norm=1.0 if math.isfinite(loss) else math.nan,
                    step_seconds=0.1,
                    tokens_per_second=1e4,
                    tokens_per_second_per_gpu=1e4,
                    mfu=None,
                    memory_bytes=None,
                    memory_reserved=None,
                    data_seconds=0.0,
                    skipped=not math.isfinite(loss),
                    eta_seconds=0.0,
                )
            )
            if validations and step % 10 == 0:
                metrics.validation(step, step * 1000, loss + 0.1, None, 5)


def coloured(path: Path, red: bool) -> int:
    """Number of pixels that are clearly red (validation) or clearly blue (training)."""
    pixels = imread(path)[..., :3]
    one, other = (0, 2) if red else (2, 0)
    return int(np.sum(pixels[..., one] > pixels[..., other] + 0.3))


def test_draws_a_png_with_both_losses(tmp_path: Path) -> None:
    write_run(tmp_path, [5.0 / step**0.3 for step in range(1, 61)])
    output = tmp_path / "pictures" / "loss.png"
    plot_losses(tmp_path, output)
    assert output.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert imread(output).shape[:2] == (660, 880)
    assert coloured(output, red=True) > 200
    assert coloured(output, red=False) > 200
    first = output.read_bytes()
    plot_losses(tmp_path, output)
    assert output.read_bytes() == first
    assert [entry.name for entry in output.parent.iterdir()] == ["loss.png"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "losses",
    [[3.0], [math.nan], [3.0, math.nan, math.inf, 2.0]],
    ids=["one step", "no finite step", "some not finite"],
)
def test_draws_short_and_broken_runs(tmp_path: Path, losses: list[float]) -> None:
    write_run(tmp_path, losses, validations=False)
    plot_losses(tmp_path, tmp_path / "loss.png")
    assert imread(tmp_path / "loss.png").shape[:2] == (660, 880)
    assert coloured(tmp_path / "loss.png", red=True) == 0


def test_run_without_a_step(tmp_path: Path) -> None:
    with Metrics(tmp_path, 0, quiet=False) as metrics:
        metrics.validation(0, 0, 11.9, 4.0, 3)
    with pytest.raises(DataError, match="no step is recorded"):
        plot_losses(tmp_path, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        plot_losses(tmp_path, tmp_path / "loss.png")


def test_other_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"loss\.svg: a loss plot is a PNG"):
        plot_losses(tmp_path, tmp_path / "loss.svg")
