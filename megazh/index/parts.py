"""Parts of the input that are indexed by themselves, such as the tasks of a Slurm array do, and merged afterwards."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megazh.corpus.sources import Source
from megazh.errors import UsageError

_MOST_PARTS = 9999


@dataclass(frozen=True)
class Part:
    """One of several parts of the input."""

    number: int
    """From 1 to `parts`."""
    parts: int

    def prefix(self, output: Path) -> Path:
        """Prefix of the index of this part, for the prefix `output` of all."""
        return Path(f"{output}.part-{self.number}-of-{self.parts}")


def parse_part(text: str) -> Part:
    """Read `3/8`, the third of eight parts. Raises ValueError."""
    number, slash, parts = text.partition("/")
    if not (slash and number.isascii() and number.isdigit() and parts.isascii() and parts.isdigit()):
        raise ValueError(f"expected part/parts, such as 3/8, found {text}")
    part = Part(int(number), int(parts))
    if not 1 <= part.number <= part.parts <= _MOST_PARTS:
        raise ValueError(f"expected a part from 1 to the number of parts, at most {_MOST_PARTS}, found {text}")
    return part


def sources_of(part: Part, sources: Sequence[Source]) -> list[Source]:
    """The sources of a part: consecutive ones, so that the merged parts are the index of all, of about equal size.

    Raises:
        UsageError: there are fewer files than parts.
    """
    if len(sources) < part.parts:
        raise UsageError(
            f"--part {part.number}/{part.parts}: {len(sources)} files do not make {part.parts} parts; take at most "
            f"{len(sources)} (a file is indexed as a whole), or MPI ranks, which share files"
        )
    ends = list(itertools.accumulate(source.size for source in sources))
    bounds = [0]
    for number in range(1, part.parts):
        fair = sum(end <= ends[-1] * number / part.parts for end in ends)
        bounds.append(min(max(fair, bounds[-1] + 1), len(sources) - (part.parts - number)))
    bounds.append(len(sources))
    return list(sources[bounds[part.number - 1] : bounds[part.number]])
