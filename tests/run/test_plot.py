"""The plot of a run's losses."""

import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from megazh.errors import DataError, UsageError
from megazh.run import fonts
from megazh.run.history import Axis, Measure
from megazh.run.metrics import Metrics, StepRecord
from megazh.run.plot import PlotOptions, plot_losses, plot_runs


def write_run(folder: Path, losses: list[float], validations: bool = True, bits: float | None = None) -> None:
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
                metrics.validation(step, step * 1000, loss + 0.1, bits, 5)


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


@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")
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
    with pytest.raises(UsageError, match="no step is recorded"):
        plot_losses(tmp_path, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        plot_losses(tmp_path, tmp_path / "loss.png")


def test_other_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"loss\.svg: a loss plot is a PNG"):
        plot_losses(tmp_path, tmp_path / "loss.svg")


def texts_of(path: Path) -> list[str]:
    """The texts of an SVG, as a program that reads it finds them."""
    root = ElementTree.parse(path).getroot()
    return ["".join(each.itertext()) for each in root.iter("{http://www.w3.org/2000/svg}text")]


def test_several_runs_as_an_svg_whose_text_is_text(tmp_path: Path) -> None:
    names = ["深40层", "宽_16层", "_$x^2$ <b>&"]
    for number, name in enumerate(names):
        write_run(tmp_path / name, [5.0 / step**0.3 + number for step in range(1, 61)])
    output = tmp_path / "runs.svg"
    assert plot_runs([tmp_path / name for name in names], output, PlotOptions(title="三个模型 $1")) == []
    texts = texts_of(output)
    assert {*names, "三个模型 $1", "validation", "tokens", "loss (nats per token)"} <= set(texts)
    first = output.read_bytes()
    plot_runs([tmp_path / name for name in names], output, PlotOptions(title="三个模型 $1"))
    assert output.read_bytes() == first


def test_labels_replace_the_names_of_folders(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, [3.0, 2.0])
    plot_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "x.svg", PlotOptions(labels=["窄", "宽"]))
    assert {"窄", "宽"} <= set(texts_of(tmp_path / "x.svg"))
    with pytest.raises(UsageError, match="1 for 2 runs"):
        plot_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "x.svg", PlotOptions(labels=["窄"]))


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [tmp_path / "one" / "demo", tmp_path / "two" / "demo"]
    for folder in folders:
        write_run(folder, [3.0, 2.0])
    plot_runs(folders, tmp_path / "x.svg", PlotOptions())
    assert set(map(str, folders)) <= set(texts_of(tmp_path / "x.svg"))


def test_a_single_run_has_its_marks_and_rates(tmp_path: Path) -> None:
    write_run(tmp_path, [3.0, math.nan, math.nan, 2.0])
    with Metrics(tmp_path, 4, quiet=False) as metrics:
        metrics.event(3, "relayout", "another layout")
        metrics.event(3, "command", "not marked")
    plot_runs([tmp_path], tmp_path / "x.svg", PlotOptions(x=Axis.STEPS))
    assert {"skipped step (2)", "resume in another layout (1)", "learning rate", "gradient norm", "steps"} <= set(
        texts_of(tmp_path / "x.svg")
    )


def test_bits_per_byte_by_the_ratio_of_the_validation(tmp_path: Path) -> None:
    write_run(tmp_path, [3.0] * 20, bits=1.55)
    (note,) = plot_runs([tmp_path], tmp_path / "x.svg", PlotOptions(y=Measure.BITS, x=Axis.HOURS))
    assert note.endswith(f"{tmp_path} 0.5000"), "1.55 bits per byte for 3.1 nats per token"
    assert {"bits per byte", "hours of training steps"} <= set(texts_of(tmp_path / "x.svg"))


def test_bits_per_byte_need_a_validation(tmp_path: Path) -> None:
    write_run(tmp_path, [3.0] * 20)
    with pytest.raises(DataError, match="no validation with bits per byte is recorded"):
        plot_runs([tmp_path], tmp_path / "x.svg", PlotOptions(y=Measure.BITS))


@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")
def test_logarithmic_axes_and_ranges(tmp_path: Path) -> None:
    write_run(tmp_path, [5.0 / step**0.3 for step in range(1, 61)])
    with Metrics(tmp_path, 60, quiet=False) as metrics:
        metrics.validation(0, 0, 9.0, None, 5)
    options = PlotOptions(log_x=True, log_y=True, x_range=(1e3, 6e4), y_range=(1.0, 6.0))
    plot_runs([tmp_path], tmp_path / "x.png", options)
    assert imread(tmp_path / "x.png").shape[:2] == (660, 880)


@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")
def test_without_a_chinese_font_a_png_shows_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "深", [3.0, 2.0])
    monkeypatch.setattr(fonts, "_CHINESE", ())
    (note,) = plot_runs([tmp_path / "深"], tmp_path / "x.png", PlotOptions(title="深"))
    assert "no font on this machine has 深" in note
    assert "install the package fonts-noto-cjk" in note
    chosen = fonts.fonts_for(["深a"])
    assert (chosen.drawable("深a"), chosen.families) == ("<U+6DF1>a", (fonts.BASE,))
    plot_runs([tmp_path / "深"], tmp_path / "x.svg", PlotOptions(title="深"))
    assert "深" in texts_of(tmp_path / "x.svg")


def test_a_font_with_chinese_is_found_where_one_is_installed() -> None:
    chosen = fonts.fonts_for(["深 a"])
    if chosen.missing:
        pytest.skip("no font of this machine has Chinese")
    assert len(chosen.families) == 2
    assert fonts.fonts_for(["a"]).families == (fonts.BASE,)
