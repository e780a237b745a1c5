"""Durations as Slurm writes and takes them."""

import re

_FORMS = (  # https://slurm.schedmd.com/sbatch.html, --time
    r"(?P<minutes>\d{1,8})(:(?P<seconds>\d{1,2}))?",
    r"(?P<hours>\d{1,6}):(?P<minutes>\d{1,2}):(?P<seconds>\d{1,2})",
    r"(?P<days>\d{1,5})-(?P<hours>\d{1,2})(:(?P<minutes>\d{1,2})(:(?P<seconds>\d{1,2}))?)?",
)
_SECONDS = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}


def slurm_seconds(text: str) -> int | None:
    """Seconds of `30` (minutes), `30:00`, `2:30:00`, `1-12`, `1-12:30` or `1-12:30:00`; None for anything else."""
    for form in _FORMS:
        if match := re.fullmatch(form, text, re.ASCII):
            return sum(int(number or 0) * _SECONDS[unit] for unit, number in match.groupdict().items())
    return None
