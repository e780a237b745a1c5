"""`megazh doctor`: whether a machine, or all hosts of a job, are fit for training, and which settings to use."""

import argparse
from pathlib import Path

from megazh.cli.options import Subparsers, add_command

EXAMPLES = """examples:
  megazh doctor                                        this machine
  megazh doctor --recipe qwen0.5b_6x3090 -r /data/runs room for its checkpoints on that disk
  megazh doctor --hostfile hosts                       all hosts of a hostfile, by ssh without a password
  salloc -N 2 --gres=gpu:6 megazh doctor --srun        all nodes of a Slurm job
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
    everywhere = parser.add_mutually_exclusive_group()
    everywhere.add_argument("--srun", action="store_true", help="examine and compare all nodes of this Slurm job")
    everywhere.add_argument(
        "-H", "--hostfile", type=Path, metavar="FILE", help="examine and compare the hosts of a hostfile, by ssh"
    )
    everywhere.add_argument("--agent", action="store_true", help=argparse.SUPPRESS)  # on each of these hosts
    parser.add_argument(
        "--limit", type=_seconds, default=300, metavar="SECONDS", help="for all checks of a host (default: 300)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of lines")
    parser.usage = "%(prog)s [options] [key=value ...]"
    parser.set_defaults(settings=[], call=_doctor, scheduled=True)  # a signal ends its processes, too


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
    from megazh.cluster.doctor.hosts import Examined, examine_hosts
    from megazh.cluster.doctor.measured import keep
    from megazh.cluster.doctor.reach import by_srun, by_ssh
    from megazh.cluster.doctor.report import Verdict, as_json, counts, finding_lines, lines, setting_lines, summary
    from megazh.errors import UsageError, WorkerError

    if options.agent:
        from megazh.cluster.doctor.agent import serve

        serve()
        return
    if not options.folder.is_dir():
        raise UsageError(f"-r {options.folder}: no such folder; make it first, or give another one")
    if options.settings and not options.recipe:
        raise UsageError(f"{options.settings[0]}: a setting without a recipe; name it with --recipe")
    wanted = Wanted(options.folder.absolute(), options.limit, options.recipe or "", options.settings)
    if options.srun or options.hostfile:
        examined = examine_hosts(*(by_srun() if options.srun else by_ssh(options.hostfile)), wanted)
    else:
        report = examine(wanted)
        examined = Examined([report], [], [], report.seconds)
    keep(examined.reports, examined.between)
    findings = [finding for report in examined.reports for finding in report.findings] + examined.across
    if options.json:
        print(json.dumps(as_json(examined.reports, examined.across, examined.between), indent=1))
    else:
        for report in examined.reports:
            print("\n".join(lines(report)))
        print("\n".join(finding_lines(examined.across)), end="\n" if examined.across else "")
        print("\n".join(setting_lines(setting for report in examined.reports for setting in report.settings)))
        print(summary(findings, examined.seconds))
    if bad := counts(findings)[Verdict.BAD]:
        raise WorkerError(f"doctor: {bad} of {len(findings)} checks are bad; each has its remedy above")
