"""The report of a soak: a table of its faults, and PASS or FAIL."""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megazh.progress import duration
from megazh.writing import writing


@dataclass
class Struck:
    """A fault that came."""

    kind: str
    run: int
    """Number of the run."""
    at: float
    """Seconds since the first run began."""
    step: int | None
    """Newest step that was recorded; None where the run was still starting."""
    layout: str
    detail: str = ""
    """What exactly was done."""
    went_on: bool = False
    """Whether the run went on in spite of it."""
    code: int | None = None
    """Exit code of the run."""
    resumed: int | None = None
    """Step that the run went on from."""
    lost: int | None = None
    """Steps that were taken and had to be taken again."""
    seconds: float | None = None
    """Seconds until the run, started again, had recorded a new step."""
    began: float = field(default=0.0, repr=False)

    def text(self) -> str:
        """The fault in a line."""
        when = "while starting" if self.step is None else f"at step {self.step:,}"
        detail = f": {self.detail}" if self.detail else ""
        return f"{self.kind} in run {self.run} {when} ({self.layout}){detail}"

    def outcome(self) -> str:
        """What came of it, in words."""
        if self.resumed is None:
            return "the run has gone on"
        how = f"exit code {self.code}, {self.lost} steps lost, resumed at step {self.resumed:,}"
        return f"{how}, {self.seconds or 0:.0f} s{f', {self.detail}' if self.detail else ''}"


@dataclass
class Report:
    """What has happened so far."""

    seed: int
    minutes: float
    left_out: dict[str, str] = field(default_factory=dict)
    """Kinds of faults that are not possible here, with the reason."""
    struck: list[Struck] = field(default_factory=list)
    rounds: list[tuple[int, int, int]] = field(default_factory=list)
    """Runs that have ended: number, attempts, and the step up to which they stayed in the layout of their beginning."""
    steps: int = 0
    """Steps that were taken, lost ones included."""
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing was lost so far, and a run has ended."""
        return bool(self.rounds) and not self.failures

    def fail(self, text: str) -> None:
        """Note that something was lost or went wrong."""
        self.failures.append(text)

    def log(self, folder: Path, struck: Struck) -> None:
        """Append a fault to FOLDER/faults.jsonl."""
        path = folder / "faults.jsonl"
        values = {name: value for name, value in dataclasses.asdict(struck).items() if name != "began"}
        with writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values, ensure_ascii=False) + "\n")

    def write(self, folder: Path) -> None:
        """Write FOLDER/report.md."""
        if folder.is_dir():
            with writing(folder / "report.md"):
                (folder / "report.md").write_text(self.text() + "\n", encoding="utf-8")

    def text(self) -> str:
        """The report, as Markdown."""
        lines = [
            "| fault | count | exit codes | went on | steps lost, min / median / max | seconds to recover, the same |",
            "|---|---|---|---|---|---|",
        ]
        for kind in sorted({each.kind for each in self.struck}):
            of_kind = [each for each in self.struck if each.kind == kind]
            codes = sorted({str(each.code) for each in of_kind if each.code is not None})
            lost = _three([each.lost for each in of_kind if each.lost is not None])
            seconds = _three([each.seconds for each in of_kind if each.seconds is not None])
            went_on = sum(each.went_on for each in of_kind)
            lines.append(f"| {kind} | {len(of_kind)} | {', '.join(codes) or '-'} | {went_on} | {lost} | {seconds} |")
        again = sum(each.lost or 0 for each in self.struck)
        early = sum(each.step is None for each in self.struck)
        spent = max((each.at for each in self.struck), default=0.0)
        lines += [
            "",
            f"{len(self.struck)} faults in {duration(spent)} by seed {self.seed}, {early} of them while a run was "
            f"starting; {self.steps:,} steps taken, {again:,} of them lost and taken again.",
        ]
        for number, attempts, bits in self.rounds:
            lines.append(f"Run {number}: {attempts} attempts; one layout up to step {bits:,}.")
        lines += [f"Left out: {kind}, {reason}." for kind, reason in self.left_out.items()]
        lines += [f"* {text}" for text in self.failures]
        lines += ["", "PASS" if self.passed else f"FAIL: {self.failures[0] if self.failures else 'no run has ended'}"]
        return "\n".join(lines)


def _three(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return " / ".join(f"{value:.0f}" for value in (min(values), statistics.median(values), max(values)))
