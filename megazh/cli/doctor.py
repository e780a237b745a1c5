"""`megazh doctor`: whether a machine, or all hosts of a job, are fit for training, and which settings to use."""

import argparse
from pathlib import Path

from megazh.cli.options import Subparsers, add_command

EXAMPLES = """examples:
  megazh doctor                                        this machine
  megazh doctor --recipe qwen0.5b_6x3090 -r /data/runs room for its checkpoints on that disk
  megazh doctor --json > doctor.json                   docs/cluster.md has its keys

Works without a GPU, and says what it skipped. Exit code 0: nothing is bad (warnings may be); 5: something is.
Measured links are kept for 'megazh plan RECIPE --measured'."""


def add_to(commands: Subparsers) -> None:
    """Add `doctor`."""
    parser = add_command(commands, "doctor", "whether machines are fit for training, and the settings to use", EXAMPLES)
    parser.add_argument("--recipe", metavar="NAME", help="recipe, file or run whose checkpoints have to fit")
    parser.add_argument(
        "-r", "--folder", type=Path, default=Path(), metavar="DIR", help="folder of runs (default: the current one)"
    )
    parser.add_argument("--limit", type=_seconds, default=300, metavar="SECONDS", help="for all checks (default: 300)")
    parser.add_argument("--json", action="store_true", help="print JSON in place of lines")
    parser.usage = "%(prog)s [options] [key=value ...]"
    parser.set_defaults(settings=[], call=_doctor)


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 1 <= number <= 86400:
        raise argparse.ArgumentTypeError(f"expected seconds from 1 to 86400, found {text}")
    return number


def _doctor(options: argparse.Namespace) -> None:
    import json

    from megazh.cluster.doctor.examine import Wanted, examine
    from megazh.cluster.doctor.measured import keep
    from megazh.cluster.doctor.report import Verdict, as_json, counts, lines, setting_lines, summary
    from megazh.errors import UsageError, WorkerError

    if not options.folder.is_dir():
        raise UsageError(f"--folder {options.folder}: no such folder; make it first, or give another one")
    if options.settings and not options.recipe:
        raise UsageError(f"{options.settings[0]}: a setting without a recipe; name it with --recipe")
    wanted = Wanted(options.folder.absolute(), options.limit, options.recipe or "", options.settings)
    report = examine(wanted)
    keep(report, [])
    if options.json:
        print(json.dumps(as_json([report], [], []), indent=1))
    else:
        print("\n".join([*lines(report), *setting_lines(report.settings), summary(report.findings, report.seconds)]))
    if bad := counts(report.findings)[Verdict.BAD]:
        raise WorkerError(f"doctor: {bad} of {len(report.findings)} checks are bad; each has its remedy above")
