"""An sbatch file for a run from a typed description, in the form of those in slurm/."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from megazh.cluster.slurm.chain import TEMPLATES
from megazh.cluster.slurm.times import slurm_seconds
from megazh.config import Config, choice
from megazh.errors import UsageError, WorkerError
from megazh.training.job import Task
from megazh.training.layout import make_layout
from megazh.training.recipe import read_recipe
from megazh.training.recipe_files import recipe_path

_SECONDS = 60.0  # for an answer of sbatch
_OUT_OF_REACH = ("establish a configuration source", "contact slurm controller")


def _matching(pattern: str, example: str) -> AfterValidator:
    """Let through text that matches a pattern as a whole: what it allows cannot end a line of a shell script."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text, re.ASCII):
            raise ValueError(f"expected something such as {example}, found {text!r}")
        return text

    return AfterValidator(check)


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError(f"has a line break or another character that is not printed: {text!r}")
    return text


def _time(text: str) -> str:
    if not slurm_seconds(text):
        raise ValueError(f"expected minutes, H:MM:SS, D-HH or D-HH:MM:SS, found {text!r}")
    return text


Word = Annotated[str, _matching(r"[A-Za-z0-9][A-Za-z0-9_.@+-]{0,99}", "gpu")]
Printable = Annotated[str, AfterValidator(_printable)]


class Description(Config):
    """What an sbatch file asks for, and what it runs."""

    name: Word
    """Name of the job and, behind `slurm-`, of its log."""
    recipe: Printable
    """Recipe of the run, by name or path."""
    task: Annotated[Task, choice(Task)] = Task.PRETRAIN
    engine: Literal["ds_pp", "hf"] = "ds_pp"
    """Engine of pretraining, see `megazh pretrain -t`."""
    nodes: Annotated[int, Field(ge=1, le=10_000)] = 1
    gpus: Annotated[int, Field(ge=1, le=64)] = 6
    """GPUs, and tasks, per node."""
    gpu_type: Word | None = None
    """Type of the GPUs as `sinfo -o %G` lists it. Default: any."""
    time: Annotated[str, AfterValidator(_time)] = "2-00:00:00"
    """Time limit as Slurm takes it: minutes, H:MM:SS, D-HH or D-HH:MM:SS."""
    lead: Annotated[int, Field(ge=1, le=65_535)] = 600
    """Seconds before the time limit at which the run is signalled to save and end."""
    cpus: Annotated[int, Field(ge=1, le=1024)] = 2
    """CPUs per task."""
    memory: Annotated[str, _matching(r"[1-9]\d{0,9}[KMGT]?", "96G")] = "96G"
    """Memory per node."""
    partition: Annotated[str, _matching(r"[A-Za-z0-9][A-Za-z0-9_.,-]{0,99}", "gpu")] | None = None
    """Partition, or several with commas. Default: the cluster's, in a comment to be filled in."""
    account: Word | None = None
    qos: Word | None = None
    allow_relayout: bool = False
    """Whether the run takes other stages and micro-batches than the recipe's where those do not fit its GPUs."""
    more: tuple[Printable, ...] = ()
    """Further words for the run's script: options and key=value settings."""

    @property
    def script(self) -> str:
        """The script in jobs/ that runs it."""
        return "run_pretrain.sh" if self.task is Task.PRETRAIN else "run_finetune.sh"


def render(asked: Description, path: Path | None = None) -> str:
    """The text of an sbatch file.

    Every value in it was checked: those of `#SBATCH` lines by patterns without blanks and quotes, the words of the
    command are quoted for the shell.

    Args:
        asked: the description.
        path: where the file is going to be. In slurm/ of the repository it finds the repository by its own path;
            elsewhere it names it.

    Raises:
        UsageError: the run would be signalled before it begins.
    """
    seconds = slurm_seconds(asked.time)
    assert seconds is not None
    if seconds <= asked.lead:
        raise UsageError(
            f"--time {asked.time}: the run saves {asked.lead} s before the limit, and would never begin; raise it, or "
            "give a smaller --lead"
        )
    return "\n".join([*_head(asked), *_directives(asked), *_body(asked, path)]) + "\n"


def check_run(asked: Description) -> None:
    """Raises MegazhError where the recipe cannot be read, or does not divide among so many GPUs."""
    settings = [word for word in asked.more if "=" in word and not word.startswith("-")]
    recipe, _ = read_recipe(recipe_path(asked.recipe), settings)
    if not asked.allow_relayout:
        make_layout(recipe, asked.nodes * asked.gpus)


def check_by_slurm(text: str) -> str:
    """Have Slurm check an sbatch file, without submitting it.

    Returns:
        What Slurm answers, or why it was not asked: there is none on this machine, or its controller is out of reach.

    Raises:
        UsageError: Slurm refuses it.
        WorkerError: Slurm does not answer.
    """
    if (sbatch := shutil.which("sbatch")) is None:
        return "not checked by Slurm: there is no sbatch on this machine"
    try:
        found = subprocess.run(
            [sbatch, "--test-only"], input=text, capture_output=True, text=True, errors="replace", timeout=_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise WorkerError(f"sbatch --test-only: {error}") from None
    answer = " ".join(found.stderr.split()).removeprefix("sbatch: ")
    if any(words in answer for words in _OUT_OF_REACH):
        return f"not checked by Slurm: {answer}"
    if found.returncode:
        raise UsageError(f"sbatch --test-only refuses it: {answer}")
    return answer


def _head(asked: Description) -> Iterator[str]:
    what = {Task.PRETRAIN: "Pretrain", Task.NORMAL: "Fine-tune", Task.LONG_CONTEXT: "Fine-tune on long texts"}
    yield "#!/usr/bin/env bash"
    yield f"# {what[asked.task]} by the recipe {asked.recipe}, from the folder of your data, which all nodes see:"
    yield from _HEAD.splitlines()


def _directives(asked: Description) -> Iterator[str]:
    yield f"#SBATCH --partition={asked.partition}" if asked.partition else "##SBATCH --partition=gpu"
    yield f"#SBATCH --account={asked.account}" if asked.account else "##SBATCH --account=mylab"
    if asked.qos:
        yield f"#SBATCH --qos={asked.qos}"
    yield f"#SBATCH --job-name={asked.name}"
    yield f"#SBATCH --time={asked.time}"
    yield f"#SBATCH --nodes={asked.nodes}"
    yield "# One task per GPU."
    yield f"#SBATCH --ntasks-per-node={asked.gpus}"
    yield f"#SBATCH --gres=gpu:{f'{asked.gpu_type}:' if asked.gpu_type else ''}{asked.gpus}"
    yield f"#SBATCH --cpus-per-task={asked.cpus}"
    yield f"#SBATCH --mem={asked.memory}"
    yield from _ABOUT_LOG.splitlines()
    yield f"#SBATCH --output=slurm-{asked.name}-%j.out"
    yield "#SBATCH --open-mode=append"
    yield from _ABOUT_SIGNAL.format(when=_when(asked.lead)).splitlines()
    yield f"#SBATCH --signal=B:USR1@{asked.lead}"
    yield "#SBATCH --requeue"


def _when(lead: int) -> str:
    return {600: "Ten minutes"}.get(lead, f"{lead} seconds")


def _body(asked: Description, path: Path | None) -> Iterator[str]:
    yield "set -euo pipefail"
    yield ""
    if path is not None and path.resolve().parent == TEMPLATES and _PLAIN_NAME.fullmatch(path.name):
        yield from _OWN_PATH.replace("NAME", path.name).splitlines()
    else:
        yield f"root={shlex.quote(str(TEMPLATES.parent))}"
    yield from _SOURCE.splitlines()
    kind = asked.engine if asked.task is Task.PRETRAIN else asked.task.value
    relayout = ["--allow-relayout"] if asked.allow_relayout else []
    if relayout:
        yield from _ABOUT_RELAYOUT.splitlines()
    words = shlex.join(["-t", kind, "-c", asked.recipe, *relayout, *asked.more])
    yield f'run_job "${{container[@]}}" bash "$root/jobs/{asked.script}" {words} "$@"'


_HEAD = """#
#   sbatch FILE [options and key=value settings of the run]
#
# Submit the same line again to resume the run from its last checkpoint. Modules or a container: slurm/common.sh in the
# repository says how.

"""

_ABOUT_LOG = """\
# Slurm makes no folders, and a job that cannot open its log fails without a word: this one is in the folder from which
# sbatch is called. A requeued job goes on with the same log.
"""

_ABOUT_RELAYOUT = """\
# All GPUs of the job are used. Where the stages and micro-batches of the recipe do not fit them, others are taken.
"""

_ABOUT_SIGNAL = """\
# {when} before the time limit the run saves, ends, and the job is requeued (docs/cluster.md). A job with a shorter
# limit is signalled at once: give --signal=B:USR1@60 with it.
"""

_PLAIN_NAME = re.compile(r"[A-Za-z0-9._-]+")
"""A file name that can stand in a script as it is."""

_OWN_PATH = r"""# Slurm runs a copy of this file; scontrol knows the path of the original.
original=""
if [[ -n ${SLURM_JOB_ID:-} ]]; then
    original=$(scontrol show job "$SLURM_JOB_ID" 2> /dev/null | sed -n 's/^ *Command=//p' || true)
fi
for root in "$(dirname "${BASH_SOURCE[0]}")/.." \
    "${original%%/slurm/NAME*}" "${SLURM_SUBMIT_DIR:-$PWD}"; do
    [[ ! -f $root/slurm/common.sh ]] || break
done
"""

_SOURCE = """if [[ ! -f $root/slurm/common.sh ]]; then
    echo "error: cannot find slurm/common.sh; call sbatch in the folder of the repository" >&2
    exit 2
fi
source "$root/slurm/common.sh"
"""
