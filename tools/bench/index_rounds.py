"""The rounds of `index.py`: each contender in its own process, one measurement each per round, and ratios."""

import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from index_contenders import PACKAGES
from index_text import Slice, write_jsonl

from megazh.errors import WorkerError

_SERVER = Path(__file__).with_name("index.py")
SLOW = ("datasets.map", "megatron-old")
HEAD_SHARE, HEAD_BYTES = 0.12, 300_000
PAIR = "two encoders"
INSTALL = "bash jobs/setup.sh --bench"
_MOST_WARM_UPS = 20


@dataclass
class Run:
    """One contender on a number of cores, and its measurements by round."""

    name: str
    cores: int
    processes: list["_Process"]
    encoder: str = ""
    megabytes: dict[int, float] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    cpu_seconds: dict[int, float] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    least_seconds: list[float] = field(default_factory=list)
    """Seconds of a build of one short document, by round; megazh only."""
    sha256: dict[int, str] = field(default_factory=dict)
    head_sha256: dict[int, str] = field(default_factory=dict)
    peak_rss: int = 0

    @property
    def title(self) -> str:
        return f"{self.name}, {self.cores} core{'s' if self.cores > 1 else ''}"

    @property
    def fixed(self) -> float:
        """Seconds of a build that do not depend on the size of the text."""
        return statistics.median(self.least_seconds) if self.least_seconds else 0.0

    def speeds(self) -> dict[int, float]:
        """MB/s by round."""
        return {number: self.megabytes[number] / seconds for number, seconds in self.seconds.items()}

    def large_speeds(self) -> dict[int, float]:
        """MB/s by round without the time `fixed`, as for large input; rounds that consist mostly of it are left out."""
        return {
            number: self.megabytes[number] / (seconds - self.fixed)
            for number, seconds in self.seconds.items()
            if self.fixed < 0.6 * seconds
        }

    def cpu_speeds(self) -> dict[int, float]:
        """MB per second of CPU time, by round: steadier than MB/s if other processes use the same cores."""
        return {number: self.megabytes[number] / seconds for number, seconds in self.cpu_seconds.items()}


class _Process:
    """The process of a contender; for its protocol see `index_contenders.serve`."""

    def __init__(self, name: str, cores: Sequence[int], tokenizer: Path, folder: Path, log: Path) -> None:
        self.name = name
        self._log = log
        command = [
            sys.executable,
            str(_SERVER),
            "--tokenizer",
            str(tokenizer),
            "--serve",
            name,
            "--folder",
            str(folder),
        ]
        command += ["--cores", ",".join(map(str, cores))]
        with open(log, "w") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )

    def answer(self) -> dict[str, Any]:
        """The next answer. Raises WorkerError if the process died instead."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            lines = self._log.read_text(errors="replace").strip().splitlines()
            raise WorkerError(f"ended with exit code {code}: {lines[-1] if lines else 'no message'}")
        return json.loads(line)

    def send(self, job: dict[str, Any]) -> None:
        """Send one line of JSON."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the process died: `answer` raises
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()

    def close(self) -> None:
        self._process.communicate()


class Bench:
    """All contenders, with their processes and results."""

    def __init__(self, tokenizer: Path, names: Sequence[str], folder: Path) -> None:
        self.left_out: dict[str, str] = {}
        self._folder = folder
        cores = sorted(os.sched_getaffinity(0))
        self.runs: list[Run] = []
        for name in names:
            package = PACKAGES.get(name)
            if package and importlib.util.find_spec(package) is None:
                self.left_out[name] = f"{package} is not installed: {INSTALL}"
                continue
            for number in (1,) if name == "encoder" else (1, 2):
                self._start(name, number, [cores[:number]], tokenizer)
        self._start(PAIR, 2, [cores[:1], cores[1:2]], tokenizer)
        for each in list(self.runs):
            self._try(each, self._load)

    def _start(self, name: str, number: int, places: list[list[int]], tokenizer: Path) -> None:
        if sum(map(len, places)) < number:
            self.left_out[f"{name}, {number} cores"] = "only one core is available to this process"
            return
        processes = []
        for place in places:
            own = self._folder / f"{name}-{number}-{place[0]}".replace(" ", "-")
            served = "encoder" if name == PAIR else name
            processes.append(_Process(served, place, tokenizer, own, own.with_suffix(".log")))
        self.runs.append(Run(name, number, processes))

    def _load(self, run: Run) -> None:
        for process in run.processes:
            reason = process.answer().get("left_out")
            if reason:
                raise WorkerError(reason)

    def _try(self, run: Run, step: Any, *arguments: Any) -> None:
        """Do a step with a contender. If it fails, the contender is left out from then on."""
        try:
            step(run, *arguments)
        except WorkerError as error:
            self.runs.remove(run)
            self.left_out[run.title] = str(error)
            for process in run.processes:
                process.close()

    def warm_up(self, text: Slice) -> None:
        for each in list(self.runs):
            self._try(each, self._warm_up, text)

    def _warm_up(self, run: Run, text: Slice) -> None:
        for _ in range(_MOST_WARM_UPS):
            if all(answer["warm"] for answer in self._work(run, text)):
                break
            time.sleep(0.5)

    def round(self, number: int, text: Slice) -> None:
        """Measure every contender once."""
        first = number * 2 % max(len(self.runs), 1)
        for each in [*self.runs[first:], *self.runs[:first]]:
            self._try(each, self._measure, text, number)

    def _measure(self, run: Run, text: Slice, number: int) -> None:
        answers = self._work(run, text)
        run.megabytes[number] = (text.head_bytes if run.name in SLOW else text.text_bytes) / 1e6
        run.seconds[number] = max(answer["seconds"] for answer in answers)
        run.cpu_seconds[number] = sum(answer["cpu_seconds"] for answer in answers)
        run.tokens[number] = sum(answer["tokens"] for answer in answers)
        run.encoder = answers[0]["encoder"]
        run.peak_rss = max(run.peak_rss, sum(answer["peak_rss"] for answer in answers))
        if run.name == "megazh":
            least = self._folder / f"least-{run.cores}.jsonl"
            write_jsonl(least, [f"第{number}轮。"])
            run.least_seconds.append(self._job(run, [[least]], 1)[0]["seconds"])
        if run.name != PAIR:
            run.head_sha256[number] = answers[0]["head_sha256"]
            if run.name not in SLOW:
                run.sha256[number] = answers[0]["sha256"]

    def _work(self, run: Run, text: Slice) -> list[dict[str, Any]]:
        files = [[text.head] if run.name in SLOW else text.files]
        if run.name == PAIR:
            files = [text.files[0::2], text.files[1::2]]
        return self._job(run, files, text.head_documents)

    def _job(self, run: Run, files: list[list[Path]], head_documents: int) -> list[dict[str, Any]]:
        for process, own in zip(run.processes, files, strict=True):
            process.send({"files": [str(file) for file in own], "head_documents": head_documents})
        for process in run.processes:
            process.answer()
        for process in run.processes:
            process.send({"go": True})
        return [process.answer() for process in run.processes]

    def close(self) -> None:
        """End all processes."""
        for each in self.runs:
            for process in each.processes:
                process.close()

    def find(self, name: str, cores: int) -> Run | None:
        return next((each for each in self.runs if (each.name, each.cores) == (name, cores)), None)


Speeds = Callable[[Run], dict[int, float]]


def ratio(over: Run | None, under: Run | None, speeds: Speeds = Run.speeds) -> float | None:
    """Median over the rounds of the speed of `over` divided by that of `under`; None if one of them is missing."""
    if over is None or under is None:
        return None
    above, below = speeds(over), speeds(under)
    both = [above[number] / below[number] for number in above.keys() & below.keys()]
    return statistics.median(both) if both else None


def targets(bench: Bench) -> list[dict[str, Any]]:
    """The targets of megazh, and the ratios that it reached."""
    one, two = bench.find("megazh", 1), bench.find("megazh", 2)
    wanted = [
        ("gigatoken, one core", 1.5, one, bench.find("gigatoken", 1)),
        ("megatron-old, one core", 25.0, one, bench.find("megatron-old", 1)),
        ("the bare encoder, one core", 0.75, one, bench.find("encoder", 1)),
        ("megazh on two cores, over one core", 1.7, two, one),
    ]
    found = []
    for what, target, over, under in wanted:
        reached = ratio(over, under)
        found.append(
            {
                "what": what,
                "target": target,
                "reached": reached,
                "met": None if reached is None else reached >= target,
                "large_input": ratio(over, under, Run.large_speeds),
                "by_cpu_time": None if over is two else ratio(over, under, Run.cpu_speeds),
            }
        )
    return found


def equal_ids(bench: Bench) -> dict[str, Any]:
    """Whether all contenders gave the same tokens as megazh in every round (without megazh: as the first contender)."""
    truth = bench.find("megazh", 1) or next((each for each in bench.runs if each.head_sha256), None)
    differing = [
        each.title
        for each in bench.runs
        if truth is not None
        and any(
            mine.get(number, digest) != digest
            for mine, theirs in ((each.head_sha256, truth.head_sha256), (each.sha256, truth.sha256))
            for number, digest in theirs.items()
        )
    ]
    compared = [each.title for each in bench.runs if each.head_sha256]
    return {"compared": compared, "differing": differing, "equal": not differing}
