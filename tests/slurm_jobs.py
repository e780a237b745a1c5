"""Submit the files of slurm/ to a private Slurm cluster, from a folder of the test's own."""

import sys
from pathlib import Path

from slurm_cluster import SlurmCluster

ROOT = Path(__file__).parents[1]
TEMPLATES = ROOT / "slurm"
RUNS = ("pretrain_6x3090", "finetune_6x3090", "longlora_6x3090", "pretrain_2nodes")
"""Files that start a run."""

RECORDER = f"""#!/bin/bash
[[ $1 == - ]] && exec {sys.executable} "$@"
trap 'touch signalled; exit 75' USR1
printf '%s\\0' "$CUDA_VISIBLE_DEVICES" "$MEGAZH_REQUEUE" "$@" > arguments
[[ $* == *wait* ]] && for _ in {{1..300}}; do sleep 0.1; done
exit 0
"""
"""A Python that passes the check of jobs/setup.sh and records its arguments."""


def submit(
    slurm: SlurmCluster,
    folder: Path,
    *line: str | Path,
    environ: dict[str, str] | None = None,
    python: Path | None = None,
) -> str:
    """Submit a job from `folder`; returns its number.

    Args:
        line: words behind `sbatch`.
        environ: variables of the job besides those of this process.
        python: the job's Python; by default the one that runs the tests.
    """
    variables = {"MEGAZH_PYTHON": str(python or sys.executable), **(environ or {})}
    names = ",".join(["ALL", *(f"{name}={value}" for name, value in variables.items())])
    finished = slurm.run("sbatch", "--parsable", f"--export={names}", *line, cwd=folder)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def recorder(folder: Path) -> Path:
    """Write `RECORDER` to a file in `folder`; returns its path."""
    python = folder / "python"
    python.write_text(RECORDER)
    python.chmod(0o755)
    return python


def recorded(folder: Path) -> tuple[str, str, list[str]]:
    """What the recorder has seen in a job from `folder`: CUDA_VISIBLE_DEVICES, MEGAZH_REQUEUE, arguments."""
    visible, requeues, *arguments, _ = (folder / "arguments").read_text().split("\0")
    return visible, requeues, arguments


def log(folder: Path, job: str) -> str:
    """The log of a job that was submitted from `folder`."""
    (path,) = folder.glob(f"slurm-*-{job}.out")
    return path.read_text()
