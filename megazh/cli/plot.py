"""`megazh plot`: curves of one or several runs as a picture."""

import argparse
import math
from pathlib import Path

from megazh.cli.options import Subparsers, add_command, writing_output
from megazh.errors import UsageError

EXAMPLES = """examples:
  megazh plot runs/demo
  megazh plot runs/deep runs/middle runs/wide --label 深 中 宽 -o depth.svg --y-range 2.9 3.6
  megazh plot runs/adamw runs/muon --x hours --y bits --smooth 200 -o optimizers.png
  megazh plot runs/demo --x steps --smooth 0.98 --log-y --title '小故事' -o loss.png

The thick line is smoothed, and dots are validation. Of a single run, the picture also has learning rate, gradient norm,
and marks where steps were skipped and where it went back or was resumed."""


def add_to(commands: Subparsers) -> None:
    """Add `plot`."""
    parser = add_command(commands, "plot", "draw the curves of one or several runs as a PNG or SVG", EXAMPLES)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("plot.png"),
        metavar="FILE",
        help=".png or .svg, written anew (default: plot.png in the current folder)",
    )
    parser.add_argument("--x", choices=["tokens", "steps", "hours"], default="tokens", help="default: tokens")
    parser.add_argument(
        "--y", choices=["loss", "bits"], default="loss", help="bits: bits per byte of text (default: loss)"
    )
    parser.add_argument(
        "--smooth",
        default="auto",
        metavar="N",
        help="steps of a moving average, 0 for none; below 1, the weight of the past in an exponential average "
        "(default: auto, 2%% of the steps)",
    )
    parser.add_argument(
        "--label", nargs="+", default=[], metavar="NAME", help="names of the runs (default: those of their folders)"
    )
    parser.add_argument("--title", default="", metavar="TEXT", help="title (default: the name of a single run)")
    parser.add_argument("--log-x", action="store_true", help="logarithmic horizontal axis")
    parser.add_argument("--log-y", action="store_true", help="logarithmic vertical axis")
    ends = ("FROM", "TO")
    parser.add_argument("--x-range", nargs=2, type=_number, metavar=ends, help="part of the axis: 1B 5B")
    parser.add_argument("--y-range", nargs=2, type=_number, metavar=ends, help="part of the axis: 2.5 4")
    parser.set_defaults(call=_plot)


def _number(text: str) -> float:
    from megazh.cli.options import amount

    try:
        return float(text)
    except ValueError:
        return float(amount(text))


def _plot(options: argparse.Namespace) -> None:
    from megazh.run.history import Axis, Measure
    from megazh.run.plot import PlotOptions, labels_of, plot_runs
    from megazh.run.smoothing import parse_smoothing

    ranges = {axis: _range(axis, getattr(options, f"{axis}_range"), getattr(options, f"log_{axis}")) for axis in "xy"}
    single = len(options.runs) == 1
    title = options.title or ((options.label or labels_of(options.runs))[0] if single else "")
    chosen = PlotOptions(
        x=Axis(options.x),
        y=Measure(options.y),
        smoothing=parse_smoothing(options.smooth),
        labels=options.label,
        title=title,
        log_x=options.log_x,
        log_y=options.log_y,
        x_range=ranges["x"],
        y_range=ranges["y"],
    )
    with writing_output("-o", options.output):
        notes = plot_runs(options.runs, options.output, chosen)
    for line in notes:
        print(f"note: {line}")
    print(options.output)


def _range(axis: str, ends: list[float] | None, logarithmic: bool) -> tuple[float, float] | None:
    if ends is None:
        return None
    low, high = ends
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UsageError(f"--{axis}-range {low:g} {high:g}: expected a smaller and a larger number")
    if logarithmic and low <= 0:
        raise UsageError(f"--{axis}-range {low:g} {high:g}: a logarithmic axis has no 0; begin above it")
    return low, high
