#!/usr/bin/env python3
"""Hurt a run again and again, start it again each time as a scheduler would, and prove that nothing was lost.

    python tools/soak.py --minutes 60 --seed 1 --folder soak

docs/running.md says what is done and what is proven.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

try:
    from soak_compare import Take, bits_until, first_difference, recorded, retaken_difference
    from soak_faults import FAULTS, HANG_MINUTES, Clock, Ground, ballast_of
    from soak_report import Report, Struck
    from soak_run import MARK, Attempt, Follower, Layout, kill_marked

    from megazh.cli import run
    from megazh.cli.options import count, standalone
    from megazh.errors import MegazhError, UsageError, WorkerError
    from megazh.progress import duration
    from megazh.run.folder import RunFolder
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; run 'bash jobs/setup.sh' once, then use .venv/bin/python (or activate .venv)")

EXAMPLES = f"""examples:
  python tools/soak.py                                    ten minutes, a fault every minute
  python tools/soak.py --minutes 60 --seed 1 --folder soak
  python tools/soak.py --minutes 3 --every 5 --faults kill_rank,flip,layout
  python tools/soak.py -t hf --minutes 20

kinds of faults: {", ".join(FAULTS)}

Exit code 0: nothing was lost. 1: something was; the last line says what. All runs are on the CPU."""

RECIPE = """# Derived from the demo: smaller, so that a step takes less than 0.1 s, in fp32, and at a rate at which the
# differences in rounding between layouts do not grow (six layers at 1e-3 come to 4e-5 after 100 steps).
include: demo.yaml
model:
  {{vocab_size: 512, hidden_size: 48, num_hidden_layers: 4, num_attention_heads: 4, intermediate_size: 96,
    residual_dropout: {dropout}}}
data: {{manifest: {folder}/data/mixture.yaml, stories: 2000}}
batch: {{seq_len: 64, micro_batch_size: 2, global_batch_size: 8}}
optimizer: {{learning_rate: 5e-4}}
schedule: {{steps: {steps}, warmup: 100}}
precision: {{dtype: fp32}}
checkpoint: {{checkpoint_every: {every}, keep_last: 4}}
evaluation: {{validate_every: 100, validation_samples: 8, sample_every: 100, sample_tokens: 8}}
control: {{hang_minutes: {hang}}}
logging: {{samples: true}}
"""
CHECKPOINT_EVERY = 20
ALONE = Layout(1, 1, 2)
HOME = {"ds_pp": Layout(2, 2, 2), "hf": Layout(2, 1, 2)}
"""Layout in which a run begins; it stays so in the first half of its steps."""
DISK_MIB = 64
_MOUNTED = "SOAK_MOUNTED"
_EARLY, _EARLY_SECONDS = 0.15, 8.0
_GIVE_UP = 5  # starts in a row that end by themselves
_STATUS_SECONDS = 30.0


class Soak:
    """A soak under way."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder: Path = options.folder.resolve()
        self.choose = random.Random(options.seed)
        self.report = Report(options.seed, options.minutes)
        self.kinds = list(FAULTS) if options.faults is None else options.faults
        self.deck: list[str] = []
        self.mark = uuid.uuid4().hex
        self.env = {**os.environ, MARK: self.mark, "OMP_NUM_THREADS": "1"}
        self.env["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.clock: Clock | None = None
        self.disk = self.folder / "disk"
        self.steps: int = options.steps or min(5000, max(150, round(80 * options.minutes)))
        self.home = HOME[options.type]
        self.begun = self.struck = self._shown = time.monotonic()
        self.taken = 0

    def play(self) -> bool:
        """Do all of it; returns whether nothing was lost."""
        self._prepare()
        self._references()
        self.begun = self.struck = time.monotonic()
        number = 0
        going = True
        while going and not (number and self.over):
            number += 1
            going = self._round(number)
            self.report.write(self.folder)
        return self.report.passed

    @property
    def over(self) -> bool:
        """Whether the time for faults is over, or there were as many as are wanted."""
        enough = self.options.most is not None and len(self.report.struck) >= self.options.most
        return enough or time.monotonic() - self.begun > 60 * self.options.minutes

    def _prepare(self) -> None:
        self.folder.mkdir(parents=True)
        self.disk.mkdir()
        self.recipe = self.folder / "recipe.yaml"
        dropout = 0.1 if self.options.type == "ds_pp" else 0.0
        self.recipe.write_text(
            RECIPE.format(
                folder=self.folder,
                steps=self.steps,
                every=CHECKPOINT_EVERY,
                hang=HANG_MINUTES,
                dropout=dropout,
            )
        )
        if "full_disk" in self.kinds:
            if os.environ.get(_MOUNTED):
                size = f"size={DISK_MIB}m"
                subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", self.disk], check=True)
            else:
                self._leave_out("full_disk", "no file system can be mounted here (unshare -rm)")
        if "clock" in self.kinds:
            try:
                self.clock = Clock(self.folder)
                self.env |= self.clock.env
            except (OSError, subprocess.CalledProcessError) as error:
                self._leave_out("clock", f"no C compiler makes the library that shifts it: {error}")
        if not self.kinds:
            raise UsageError("none of these faults is possible here; see above")

    def _leave_out(self, kind: str, reason: str) -> None:
        self.kinds = [each for each in self.kinds if each != kind]
        self.report.left_out[kind] = reason
        self._say(f"{kind} is left out: {reason}")

    def _words(self, run_folder: Path, layout: Layout) -> list[str | Path]:
        words = [sys.executable, "-m", "megazh", "pretrain", "-t", self.options.type, "-c", self.recipe]
        return [*words, "-r", run_folder, "--device", "cpu", *layout.words()]

    def _references(self) -> None:
        """Train without a fault, in one process and in the layout that the runs begin in."""
        begun, started = time.monotonic(), list[tuple[Attempt, Follower]]()
        for name, layout in (("alone", ALONE), ("home", self.home)):
            follower = Follower(self.folder / name / "metrics.jsonl")
            words = self._words(self.folder / name, layout)
            started.append((Attempt(words, self.env, self.folder / f"{name}.log"), follower))
            while any(attempt.wait(0.1) is None for attempt, _ in started):
                for _, each in started:
                    each.look()
                done = min(each.last for _, each in started)
                left = (time.monotonic() - begun) * (self.steps - done) / max(done, 1)
                self._status(f"without faults: step {done:,} of {self.steps:,}, {duration(left)} left")
                if len(started) == 1 and follower.last:
                    break  # the data are made
        for attempt, _ in started:
            attempt.close()
            if attempt.process.returncode:
                raise WorkerError(f"without a fault, the run failed as well: see the logs in {self.folder}")
        self.alone, self.at_home = recorded(self.folder / "alone"), recorded(self.folder / "home")
        if different := first_difference(self.alone, self.at_home, self.at_home, 0):
            self.report.fail(f"two runs without faults differ: {different}")

    def _round(self, number: int) -> bool:
        """Train one run to its end, through faults; returns whether it came to its end."""
        path = self.disk / f"run-{number}"
        records, takes = Follower(path / "metrics.jsonl"), list[Take]()
        ground = Ground(path, records, self.env, self.home, self.choose, self.clock, self.options.type)
        ballast_of(ground).unlink(missing_ok=True)
        by_itself, waiting = 0, list[Struck]()
        while True:
            layout, begins = ground.layout, records.begins
            newest = int(ground.whole()[-1].name.removeprefix("step_")) if ground.whole() else 0
            attempt = Attempt(self._words(path, layout), self.env, self.folder / "terminal.log")
            ground.attempt = attempt
            fault = self._until_ended(ground, number, begins, newest, waiting)
            code = attempt.wait(0)
            if left := attempt.close():
                self.report.fail(f"{len(left)} processes outlived the command by 30 s")
            records.look()
            if records.begins > begins:
                losses = {step: loss for step, loss in records.losses.items() if step > records.begun_at}
                takes.append(Take(str(layout), records.begun_at, losses))
                self.report.steps += len(losses)
            if fault is not None:
                waiting.append(fault)
                if code:
                    fault.detail = f"{fault.detail} {FAULTS[fault.kind].afterwards(ground)}".strip()
                self._check(fault, code, ground)
                by_itself = 0
            elif code:
                by_itself += 1
                self.report.fail(f"run {number} ended by itself with exit code {code}; see {self.folder}/terminal.log")
                if by_itself == _GIVE_UP:
                    break
            if code == 0:
                break
        for each in waiting:
            self._settle(each, records, None)
        self._judge(number, path, takes)
        return code == 0

    def _until_ended(
        self, ground: Ground, number: int, begins: int, newest: int, waiting: list[Struck]
    ) -> Struck | None:
        """Follow an attempt until it has ended; returns the fault that ended it, if one did."""
        attempt, records = ground.attempt, ground.records
        early = self.choose.uniform(0, _EARLY_SECONDS) if self.choose.random() < _EARLY else None
        after = self.choose.randint(1, 2 * CHECKPOINT_EVERY)
        kind: str | None = None
        checked = False
        while attempt.wait(0.1) is None:
            records.look()
            begun = records.begins > begins
            if begun and not checked:
                checked = True
                if records.begun_at != newest:
                    self.report.fail(f"run {number} went on at step {records.begun_at}, and step {newest} is whole")
            if begun and records.last > records.begun_at:
                while waiting:
                    self._settle(waiting.pop(), records, time.monotonic())
            self._status(self._text(number, records))
            if self.over or time.monotonic() - self.struck < self.options.every:
                continue
            if begun and records.last >= records.begun_at + after:
                kind = self._draw(ground)
            elif not begun and early is not None and time.monotonic() - attempt.begun > early:
                early, kind = None, self._draw(ground, early=True)
            if kind is None:
                continue
            struck = self._strike(kind, ground, number, begun)
            if attempt.wait(0) is not None:
                return struck
            self.report.struck.append(struck)
            self.report.log(self.folder, struck)
            kind, after = None, records.last - records.begun_at + self.choose.randint(1, 2 * CHECKPOINT_EVERY)
        return None

    def _draw(self, ground: Ground, early: bool = False) -> str | None:
        """The next kind of fault, of those that can come now: each comes once before any comes again."""
        for refill in (False, True):
            if refill:
                kinds = [kind for kind in self.kinds if kind not in self.deck]
                self.choose.shuffle(kinds)
                self.deck += kinds
            for kind in self.deck:
                fault, at = FAULTS[kind], ground.records.last
                if fault.changes_layout and 2 * at < self.steps:
                    continue
                if (early and not fault.early) or len(ground.whole()) < fault.checkpoints:
                    continue
                self.deck.remove(kind)
                return kind
        return None

    def _strike(self, kind: str, ground: Ground, number: int, begun: bool) -> Struck:
        """Do a fault, and wait for what comes of it."""
        fault, attempt, records = FAULTS[kind], ground.attempt, ground.records
        now = time.monotonic()
        struck = Struck(kind, number, now - self.begun, records.last if begun else None, str(ground.layout))
        struck.began = self.struck = now
        struck.detail = fault.strike(ground)
        deadline, first = now + fault.seconds, records.last
        while attempt.wait(0.1) is None:
            records.look()
            self._status(self._text(number, records))
            if fault.may_go_on and records.last > first + CHECKPOINT_EVERY:
                struck.went_on = True
                break
            if time.monotonic() > deadline:
                ground.faults.append(f"it still runs {fault.seconds:.0f} s later, and was killed")
                kill_marked(f"{MARK}={self.mark}")
        records.look()
        if begun:
            struck.step = records.last
        for text in ground.faults:
            self.report.fail(f"{struck.text()}: {text}")
        ground.faults.clear()
        self._say(f"{duration(struck.at)} {struck.text()}{' (the run goes on)' if struck.went_on else ''}")
        return struck

    def _check(self, struck: Struck, code: int | None, ground: Ground) -> None:
        struck.code = code
        self.report.struck.append(struck)
        if code and code not in FAULTS[struck.kind].codes:
            allowed = ", ".join(map(str, sorted(FAULTS[struck.kind].codes))) or "none: it should go on"
            self.report.fail(f"{struck.text()}: exit code {code}, and expected is {allowed}")

    def _settle(self, struck: Struck, records: Follower, now: float | None) -> None:
        """Complete a fault by where the run went on."""
        if struck.code:
            struck.resumed = records.begun_at
            struck.lost = max(0, struck.step - records.begun_at) if struck.step is not None else 0
            if struck.lost and not FAULTS[struck.kind].loses:
                self.report.fail(f"{struck.text()}: {struck.lost} steps were lost, and it has time to save")
        if now is not None:
            struck.seconds = now - struck.began
            self._say(f"    {struck.kind}: {struck.outcome()}")
        self.report.log(self.folder, struck)

    def _judge(self, number: int, path: Path, takes: list[Take]) -> None:
        """Compare a run that has ended with those without faults."""
        bits = bits_until(takes)
        try:
            different = first_difference(
                self.alone, self.at_home, recorded(path), self.steps if bits is None else bits
            ) or retaken_difference(takes)
        except MegazhError as error:  # a file of the run is missing or damaged
            different = str(error)
        attempts = len(RunFolder(path).info().attempts)
        self._say(f"run {number}: {different or f'the same samples and losses, in {attempts} attempts'}")
        self.report.rounds.append((number, attempts, self.steps if bits is None else bits))
        if different:
            self.report.fail(f"run {number}: {different}")
        if different or self.options.keep:
            shutil.copytree(path, self.folder / path.name)
        shutil.rmtree(path)

    def _text(self, number: int, records: Follower) -> str:
        spent = time.monotonic() - self.begun
        left = 60 * self.options.minutes - spent
        what = f"{duration(left)} left" if not self.over else "no more faults, the run goes to its end"
        faults = f"{len(self.report.struck)} faults, {len(self.report.failures)} failures"
        return f"{duration(spent)}: {faults}, run {number} at step {records.last:,} of {self.steps:,}; {what}"

    def _status(self, text: str) -> None:
        terminal, now = sys.stderr.isatty(), time.monotonic()
        if now - self._shown > (0.5 if terminal else _STATUS_SECONDS):
            self._shown = now
            print(f"\r\x1b[K{text}" if terminal else text, end="" if terminal else "\n", file=sys.stderr, flush=True)

    def _say(self, text: str) -> None:
        print(f"\r\x1b[K{text}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def main(options: argparse.Namespace) -> None:
    """Soak, and print the report."""
    if options.folder.exists():
        raise UsageError(f"{options.folder}: exists already; name another --folder, or remove it")
    if unknown := [kind for kind in options.faults or [] if kind not in FAULTS]:
        raise UsageError(f"--faults {unknown[0]}: no such kind; there are {', '.join(FAULTS)}")
    soak = Soak(options)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends what it has started, and writes the report
    try:
        passed = soak.play()
    finally:
        kill_marked(f"{MARK}={soak.mark}")
        soak.report.write(soak.folder)
    print(soak.report.text())
    if not passed:
        sys.exit(1)


def with_disk_of_its_own() -> None:
    """Go on in a namespace in which a small disk can be mounted, where this system allows that."""
    words = ["unshare", "-rm"]
    if os.environ.get(_MOUNTED) or not shutil.which("unshare"):
        return
    if subprocess.run([*words, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode == 0:
        os.environ[_MOUNTED] = "1"
        os.execvp(words[0], [*words, sys.executable, *sys.argv])


if __name__ == "__main__":
    parser = standalone("hurt a run again and again, and prove that nothing was lost", EXAMPLES)
    parser.add_argument("--minutes", type=float, default=10.0, metavar="N", help="time in which faults come (10)")
    parser.add_argument("--most", type=count, metavar="N", help="end after N faults, if that is sooner")
    parser.add_argument("--every", type=float, default=60.0, metavar="SECONDS", help="time between faults (60)")
    parser.add_argument("--faults", type=lambda text: text.split(","), metavar="A,B", help="only these (all)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="seed of faults, places and moments (1)")
    parser.add_argument("--steps", type=count, metavar="N", help="steps of a run (80 a minute, 150 to 5000)")
    parser.add_argument("-t", "--type", choices=["ds_pp", "hf"], default="ds_pp", help="engine (ds_pp)")
    parser.add_argument(
        "--folder", type=Path, default=Path("soak"), metavar="DIR", help="new folder for runs, logs and report (soak)"
    )
    parser.add_argument("--keep", action="store_true", help="keep the folders of runs in which nothing was lost")
    parser.set_defaults(call=main)
    parsed = parser.parse_args()
    with_disk_of_its_own()
    sys.exit(run(parsed))
