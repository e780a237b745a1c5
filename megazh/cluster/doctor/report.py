"""What an examination finds: verdicts with remedies, settings to use, measured links; as lines and as JSON."""

from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import Annotated, Any

from megazh.config import Config, choice

VERSION = 1
"""Version of the JSON; raised when a key changes its meaning or goes away."""


class Verdict(StrEnum):
    """Outcome of a check."""

    OK = "ok"
    WARNING = "warning"
    """Training works, but slower than it could, or something may fail later."""
    BAD = "bad"
    """Training would fail, hang, or compute wrong results."""
    SKIPPED = "skipped"
    """Not checked; the text has the reason."""


class Finding(Config):
    """A check's outcome, one line of the report."""

    subject: str
    """Part of the machine: versions, gpus, links, kernels, disk, limits, network, hosts."""
    verdict: Annotated[Verdict, choice(Verdict)]
    text: str
    """What was found, with numbers; for a skipped check the reason."""
    remedy: str = ""
    """What to do; empty where nothing is to be done."""


class Setting(Config):
    """A setting to use in the shell, or in the sbatch file, from which runs are started."""

    command: str
    """Line for the shell, such as `export NCCL_P2P_DISABLE=1`."""
    why: str


class Pair(Config):
    """Measured speeds between two GPUs of one host, or between two hosts."""

    first: str
    second: str
    copy_gb_s: float | None = None
    """GB/s of a copy from device to device by one process."""
    send_gb_s: float | None = None
    """GB/s of send and receive; NCCL between GPUs, one TCP connection between hosts."""
    all_reduce_gb_s: float | None = None
    """GB/s of an all-reduce over the two: bytes of the tensor by seconds."""
    expected_gb_s: float | None = None
    """GB/s in each direction that the link carries by its specification; None where that is unknown."""


class Report(Config):
    """Examination of one host."""

    version: int
    host: str
    findings: list[Finding]
    settings: list[Setting]
    facts: dict[str, str]
    """Versions and other facts that should be equal on all hosts, by name."""
    cards: list[str]
    """Name of each GPU."""
    pairs: list[Pair]
    """Measured links between the GPUs of this host."""
    seconds: float
    """Duration of the examination."""


class Found:
    """Collects what the checks of one host find."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.settings: list[Setting] = []
        self.facts: dict[str, str] = {}
        self.cards: list[str] = []
        self.pairs: list[Pair] = []

    def add(self, subject: str, verdict: Verdict, text: str, remedy: str = "") -> None:
        """Add a finding; line breaks in texts of foreign programs become spaces."""
        self.findings.append(Finding(subject=subject, verdict=verdict, text=_line(text), remedy=_line(remedy)))

    def use(self, command: str, why: str) -> None:
        """Add a setting to use; the same command only once."""
        if command not in [setting.command for setting in self.settings]:
            self.settings.append(Setting(command=command, why=_line(why)))

    def report(self, host: str, seconds: float) -> Report:
        """The report of this host."""
        return Report(
            version=VERSION,
            host=host,
            findings=self.findings,
            settings=self.settings,
            facts=self.facts,
            cards=self.cards,
            pairs=self.pairs,
            seconds=round(seconds, 1),
        )


def counts(findings: Iterable[Finding]) -> dict[Verdict, int]:
    """The number of findings by verdict."""
    found = dict.fromkeys(Verdict, 0)
    for finding in findings:
        found[finding.verdict] += 1
    return found


def lines(report: Report) -> Iterator[str]:
    """Yield the lines of a host's report for the terminal."""
    yield f"{report.host}:"
    yield from finding_lines(report.findings)


def finding_lines(findings: Iterable[Finding]) -> Iterator[str]:
    """Yield the findings, below a heading for each subject."""
    subject = ""
    for finding in findings:
        if finding.subject != subject:
            subject = finding.subject
            yield subject
        why = "why: " if finding.verdict is Verdict.SKIPPED else ""
        yield f"  {finding.verdict:<8} {why}{finding.text}"
        if finding.remedy:
            yield f"           remedy: {finding.remedy}"


def setting_lines(settings: Iterable[Setting]) -> Iterator[str]:
    """Yield the settings to use, those of several hosts once."""
    seen: set[str] = set()
    for setting in settings:
        if setting.command not in seen:
            if not seen:
                yield "settings to use:"
            seen.add(setting.command)
            yield f"  {setting.command}    # {setting.why}"
    if not seen:
        yield "settings to use: none; the defaults are right"


def summary(findings: list[Finding], seconds: float) -> str:
    """Last line: the number of findings by verdict, and the duration."""
    number = counts(findings)
    return f"{', '.join(f'{number[verdict]} {verdict}' for verdict in Verdict)}; {seconds:.0f} s"


def as_json(reports: list[Report], across: list[Finding], between: list[Pair]) -> dict[str, Any]:
    """The whole examination as JSON: `version`, `verdict` (the worst), `hosts`, `across` and `between` the hosts."""
    number = counts([finding for report in reports for finding in report.findings] + across)
    worst = next((verdict for verdict in (Verdict.BAD, Verdict.WARNING) if number[verdict]), Verdict.OK)
    return {
        "version": VERSION,
        "verdict": str(worst),
        "hosts": [report.model_dump(mode="json") for report in reports],
        "across": [finding.model_dump(mode="json") for finding in across],
        "between": [pair.model_dump(mode="json") for pair in between],
    }


def _line(text: str) -> str:
    """One printable line of bounded length."""
    text = " ".join(text.split())
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= 500 else f"{text[:497]}..."
