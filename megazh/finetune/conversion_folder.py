"""The folder of a conversion: an index for each data set, and `mixture.yaml`, the manifest of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import yaml

from megazh.errors import DataError, MegazhError, UsageError
from megazh.files import write_atomic
from megazh.index.manifest import exact, load_manifest
from megazh.index.metadata import INDEX_SUFFIXES
from megazh.index.order import select_side, stream_key
from megazh.writing import check_writable

if TYPE_CHECKING:
    from megazh.finetune.convert import Converted

MANIFEST = "mixture.yaml"
_SALTS = 1000  # tries for a salt that leaves conversations on both sides
_HEAD = b"# A weight is a set's share of all tokens, times its weight in the registry.\n"


def check_folder(folder: Path, names: Sequence[str], overwrite: bool) -> None:
    """Check that a folder can be made or, with `overwrite`, replaced; one that holds more than a conversion is kept.

    Args:
        folder: the folder.
        names: names of the data sets, which become names of files.
        overwrite: whether an earlier conversion may be replaced.

    Raises:
        UsageError: it is a file, holds something, or cannot be written, or a name is none of a file.
    """
    for name in names:
        if not name or name.startswith(".") or "/" in name or "\0" in name or name.endswith(".tokenizer"):
            raise UsageError(f"set '{name}': cannot be the prefix of an index; rename it in its registry")
    start = f"--output {folder}"
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{start}: is a file; give the name of a folder that does not exist yet")
    there = sorted(each.name for each in folder.iterdir()) if folder.exists() else []
    if there and not overwrite:
        raise UsageError(f"{start}: holds {there[0]} already; give another folder, or replace it with --force")
    foreign = _foreign(folder, there)
    if foreign:
        raise UsageError(
            f"{start}: holds {foreign}, and no conversion alone: --force does not replace it; give another folder, or "
            "remove it"
        )
    check_writable(folder.absolute().parent, "give another folder", start)


def _foreign(folder: Path, names: Sequence[str]) -> str | None:
    """The first of `names` that no conversion has written into `folder`."""
    if not names:
        return None
    try:
        prefixes = [corpus.prefix for corpus in load_manifest(folder / MANIFEST).corpora]
    except MegazhError:
        return names[0]
    own = {MANIFEST, *(f"{prefix}{suffix}" for prefix in prefixes for suffix in INDEX_SUFFIXES)}
    own |= {name for prefix in prefixes for name in names if name.startswith(f"{prefix}.tokenizer.")}
    return next((name for name in names if name not in own), None)


def write_manifest(folder: Path, sets: "Sequence[Converted]", validation: float, seed: int) -> None:
    """Write the manifest of the indexes in `folder`.

    Raises:
        DataError: the conversations are too few for a validation side.
    """
    total = sum(each.tokens for each in sets)
    # Six digits: a share is read by people, and a millionth of the samples is less than any run notices.
    weights = [float(f"{each.weight * each.tokens / total:.6g}") for each in sets]
    values = {
        "seed": seed,
        "validation": {"fraction": validation, "salt": _salt(sets, validation)} if validation else None,
        "corpora": [
            {"name": each.name, "prefix": each.name, "weight": weight}
            for each, weight in zip(sets, weights, strict=True)
        ],
    }
    written = {key: value for key, value in values.items() if value is not None}
    text = yaml.safe_dump(written, sort_keys=False, allow_unicode=True).encode()
    write_atomic(folder / MANIFEST, (_HEAD if len(sets) > 1 else b"") + text)


def _salt(sets: "Sequence[Converted]", validation: float) -> str:
    """The empty salt, unless the conversations are so few that it leaves one of the sides empty."""
    hashes = np.concatenate([part for each in sets for part in each.hashes])
    limit = np.uint64(int(exact(validation) * 2**64))
    for salt in ("", *(f"v{number}" for number in range(1, _SALTS))):
        kept = len(select_side(hashes, stream_key("validation", salt), limit, True))
        if 0 < kept < len(hashes):
            return salt
    raise DataError(
        f"--validation {validation:g} keeps none of the {len(hashes):,} conversations, or all of them; give another "
        "share, or --validation 0"
    )
