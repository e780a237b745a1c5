"""A picture of a packed sample: its segments, position ids, labels and attention mask."""

import io
from pathlib import Path

import numpy as np

from megazh.errors import UsageError
from megazh.files import write_atomic
from megazh.index.mixture import Mixture
from megazh.index.samples import IGNORED

_LARGEST_MASK = 2048


def draw_sample(mixture: Mixture, number: int, output: Path) -> None:
    """Draw training sample `number` to `output` (.png, .svg or .pdf).

    Top: the segment of each token, its position id, and where labels are ignored. Below: the attention mask. A token
    (row) attends to itself and to the earlier tokens (columns) of its segment.

    Raises:
        WriteError: `output` cannot be written.
        UsageError: matplotlib cannot draw the format that the suffix of `output` names.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sample = mixture.sample(number)
    seq_len = mixture.shape.seq_len
    boundaries = np.unique(sample.cu_seqlens)
    segment = np.searchsorted(boundaries, np.arange(seq_len), "right") - 1
    corpus, epoch, row = mixture.locate(number)
    table = mixture.table(corpus)
    filled = int(table.length[table.first_piece[row] : table.first_piece[row + 1]].sum())

    step = -(-seq_len // _LARGEST_MASK)  # draw every step-th token of long samples
    shown = np.arange(0, seq_len, step)
    colours = segment[shown].astype(float)
    colours[shown >= filled] = np.nan
    mask = np.full((len(shown), len(shown)), np.nan)
    attends = (segment[shown][:, None] == segment[shown][None, :]) & (shown[:, None] >= shown[None, :])
    mask[attends] = np.broadcast_to(segment[shown][:, None], mask.shape)[attends]
    mask[shown >= filled] = np.where(attends[shown >= filled], -1.0, np.nan)

    palette = matplotlib.colormaps["tab20"].copy()
    palette.set_under("0.75")
    limits = {"vmin": 0, "vmax": max(20, int(segment.max()) + 1), "cmap": palette, "interpolation": "nearest"}
    figure, axes = pyplot.subplots(
        4, 1, figsize=(7.0, 9.2), sharex=True, height_ratios=(0.5, 1.2, 0.35, 8.0), layout="constrained"
    )
    edges = (0, seq_len)
    axes[0].imshow(np.nan_to_num(colours, nan=-1.0)[None, :], aspect="auto", extent=(*edges, 0, 1), **limits)
    axes[0].set_ylabel("segment", rotation=0, ha="right", va="center")
    axes[1].plot(sample.position_ids, drawstyle="steps-post", color="0.2", linewidth=1)
    axes[1].set_ylabel("position id", rotation=0, ha="right", va="center")
    ignored = (sample.labels == IGNORED).astype(float)
    axes[2].imshow(ignored[None, :], aspect="auto", extent=(*edges, 0, 1), cmap="Reds", vmin=0, vmax=1.2)
    axes[2].set_ylabel("label −100", rotation=0, ha="right", va="center")
    axes[3].imshow(mask, aspect="auto", extent=(0, seq_len, seq_len, 0), **limits)
    axes[3].set_ylabel("token")
    axes[3].set_xlabel("attends to token")
    for axis in (axes[0], axes[2]):
        axis.set_yticks([])
    pieces = int(table.first_piece[row + 1] - table.first_piece[row])
    padding = f", {seq_len - filled} padding (grey)" if filled < seq_len else ""
    contents = f"{pieces} piece{'s' if pieces > 1 else ''} of documents{padding}"
    figure.suptitle(f"sample {number} ({mixture.shape.packing.value}, epoch {epoch}): {contents}", fontsize=10)
    picture, suffix = io.BytesIO(), output.suffix.removeprefix(".")
    try:
        metadata = {"Software": None} if suffix == "png" else None
        figure.savefig(picture, format=suffix or "none", dpi=110, metadata=metadata)
    except ValueError:
        raise UsageError(
            f"--output {output}: cannot draw {output.suffix or 'a file without suffix'}; use .png or .svg"
        ) from None
    finally:
        pyplot.close(figure)
    write_atomic(output, picture.getvalue())
