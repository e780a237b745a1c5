"""`megazh slurm`: submit a chain of jobs, write an sbatch file, look at the job of a run."""

import argparse
import re
import shlex
import sys
import time
from pathlib import Path

from megazh.cli.ctl import failure_as_json
from megazh.cli.options import Subparsers, add_command, count, run_folder, writing_output
from megazh.errors import UsageError

SUBMIT = """examples:
  bash jobs/submit_all.sh --text 'raw/*' --tokenizer qwen.tiktoken \\
    --conversations raw/alpaca_zh.jsonl --long-conversations raw/long.jsonl --dry-run
  bash jobs/submit_all.sh --text 'raw/*' --tokenizer qwen.tiktoken --without sft longlora --name laws
  bash jobs/submit_all.sh --base models/Qwen1.5-0.5B --conversations raw/alpaca_zh.jsonl --without longlora
  bash jobs/submit_all.sh ... --sbatch partition=gpu account=lab pretrain:time=3-00:00:00
  bash jobs/submit_all.sh ... --add pretrain:tokens=10B sft:--epochs=2
  bash jobs/submit_all.sh ... --from sft            runs and jobs before it are there
  bash jobs/submit_all.sh ... --again               what failed once more, and what waited for it

Stages: index, pretrain, sft, longlora, evaluate, position-loss (with --long-documents). Each is a job with the file of
slurm/ for it, after the job whose result it reads; where that fails, the rest is cancelled. The same command again
submits nothing twice: runs/NAME.chain.json has the jobs. Paths are relative to the current folder."""

STATUS = """examples:
  megazh slurm status runs/qwen0.5b_6x3090
  megazh slurm status runs/qwen0.5b_6x3090 --json
  megazh slurm status runs/mine --job 4711

State of the job, nodes, time left; step, speed and the time that the run still takes; whether that is before the time
limit and, if not, how often the job has to start again."""

RENDER = """examples:
  megazh slurm render qwen0.5b_6x3090 --nodes 2 --gpus 6 --time 2-00:00:00
  megazh slurm render mine.yaml --partition gpu --account lab --gpu-type rtx3090 --output mine.sh
  megazh slurm render sft_qwen0.5b_6x3090 --task normal --time 12:00:00 --output sft.sh --run -i raw/alpaca_zh.jsonl

Without --output the file is printed. Where there is Slurm, sbatch --test-only checks it first. sbatch FILE submits it,
from the folder that holds the data."""

_STAGES = ("index", "pretrain", "sft", "longlora", "evaluate", "position-loss")


def add_to(commands: Subparsers) -> None:
    """Add `slurm` and its commands."""
    parser = commands.add_parser(
        "slurm", help="jobs of Slurm: submit a chain, write an sbatch file, look at the job of a run"
    )
    below = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_submit(below)
    _add_render(below)
    status = add_command(below, "status", "the job of a run, and whether the run ends before its time limit", STATUS)
    status.add_argument("run", type=Path, metavar="RUN", help="run folder; it may not be there yet")
    status.add_argument("--job", metavar="N", help="number of its job (default: as run or chain have recorded it)")
    status.add_argument("--json", action="store_true", help="print a JSON object on one line")
    status.set_defaults(call=_status)


def _add_submit(below: Subparsers) -> None:
    parser = add_command(below, "submit", "submit index, pretrain, SFT, LongLoRA and evaluation as a chain", SUBMIT)
    parser.add_argument(
        "--text", nargs="+", action="extend", default=[], metavar="FILE", help="text: files, folders, quoted globs"
    )
    parser.add_argument("--tokenizer", type=Path, metavar="TOK", help="tokenizer of the index, see megazh index build")
    parser.add_argument(
        "--base", metavar="MODEL", help="begin with a run or a Hugging Face folder in place of text and pretraining"
    )
    parser.add_argument(
        "--conversations",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="for SFT, see megazh finetune -i (default: the data of the recipe)",
    )
    parser.add_argument(
        "--long-conversations", nargs="+", action="extend", default=[], metavar="FILE", help="for LongLoRA, likewise"
    )
    parser.add_argument("--long-documents", metavar="DATA", help="index or text for megazh eval position-loss")
    for stage in _STAGES[1:4]:
        parser.add_argument(f"--{stage}", metavar="RECIPE", help=f"recipe of {stage}")
    parser.add_argument(
        "--name", metavar="NAME", help="name of index, jobs and run folders (default: runs are named by their recipes)"
    )
    parser.add_argument("--from", dest="begin", choices=_STAGES, help="first stage to submit")
    parser.add_argument(
        "--without", nargs="+", action="extend", default=[], choices=_STAGES, help="stages to leave out"
    )
    parser.add_argument(
        "--sbatch",
        nargs="+",
        action="extend",
        default=[],
        metavar="[STAGE:]OPTION",
        help="options of sbatch, for all stages or for one",
    )
    parser.add_argument(
        "--add",
        nargs="+",
        action="extend",
        default=[],
        metavar="STAGE:WORD",
        help="further options or key=value settings of a stage",
    )
    parser.add_argument(
        "--again",
        nargs="*",
        action="extend",
        choices=_STAGES,
        metavar="STAGE",
        help="submit again: these stages or, without names, those whose jobs have failed",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands; submit nothing")
    parser.set_defaults(call=_submit)


def _add_render(below: Subparsers) -> None:
    parser = add_command(below, "render", "write an sbatch file for a run", RENDER)
    parser.add_argument("recipe", metavar="RECIPE", help="a name in jobs/recipes/, or the path of a .yaml file")
    parser.add_argument("--task", choices=["pretrain", "normal", "long_context"], help="default: pretrain")
    parser.add_argument("--engine", choices=["ds_pp", "hf"], help="of pretraining (default: ds_pp)")
    parser.add_argument("--nodes", type=count, metavar="N", help="default: 1")
    parser.add_argument("--gpus", type=count, metavar="N", help="GPUs per node (default: 6)")
    parser.add_argument("--gpu-type", metavar="TYPE", help="as sinfo -o %%G lists it (default: any)")
    parser.add_argument("--time", metavar="TIME", help="H:MM:SS, D-HH:MM:SS or minutes (default: 2-00:00:00)")
    parser.add_argument("--lead", type=count, metavar="SECONDS", help="save so long before the limit (default: 600)")
    parser.add_argument("--cpus", type=count, metavar="N", help="CPUs per GPU (default: 2)")
    parser.add_argument("--memory", metavar="SIZE", help="memory per node (default: 96G)")
    for name in ("partition", "account", "qos"):
        parser.add_argument(f"--{name}", metavar="NAME", help="as sbatch takes it (default: the cluster's)")
    parser.add_argument(
        "--allow-relayout", action="store_true", help="let the run take another layout where the recipe's does not fit"
    )
    parser.add_argument("--name", metavar="NAME", help="name of the job and its log (default: that of the recipe)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="file to write (default: print it)")
    parser.add_argument("--force", action="store_true", help="replace FILE")
    parser.add_argument(
        "--run",
        dest="more",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="WORD",
        help="the rest of the line: options and key=value settings of the run",
    )
    parser.set_defaults(call=_render)


def _submit(options: argparse.Namespace) -> None:
    from megazh.cluster.slurm.chain import TRAINING, Stage, Wanted, make_chain
    from megazh.cluster.slurm.submit import submit

    recipes = dict(Wanted().recipes)
    for stage in TRAINING:
        recipes[stage] = getattr(options, stage) or recipes[stage]
    chain = make_chain(
        Wanted(
            text=options.text,
            tokenizer=options.tokenizer,
            conversations=options.conversations,
            long_conversations=options.long_conversations,
            long_documents=options.long_documents,
            recipes=recipes,
            name=options.name,
            base=options.base,
            without=frozenset(map(Stage, options.without)),
            sbatch=options.sbatch,
            more=options.add,
        )
    )
    again = None if options.again is None else [Stage(name) for name in options.again]
    submit(chain, Stage(options.begin) if options.begin else None, again, options.dry_run)


def _render(options: argparse.Namespace) -> None:
    from megazh.cluster.slurm.render import Description, check_by_slurm, check_run, render
    from megazh.config import from_mapping
    from megazh.files import write_atomic

    values = {name: value for name in Description.model_fields if (value := getattr(options, name)) is not None}
    values["name"] = options.name or re.sub(r"\.ya?ml$", "", Path(options.recipe).name)
    values["more"] = tuple(options.more)
    asked = from_mapping(values, Description, "render")
    check_run(asked)
    path: Path | None = options.output
    if path is not None and path.exists() and not options.force:
        raise UsageError(f"--output {path}: is there already; give another file, or --force")
    text = render(asked, path)
    print(check_by_slurm(text), file=sys.stderr)
    if path is None:
        print(text, end="")
        return
    with writing_output("--output", path):
        write_atomic(path, text.encode(), mode=0o755)
    print(f"{path}: submit it with: {shlex.join(['sbatch', str(path)])}")


def _status(options: argparse.Namespace) -> None:
    with failure_as_json(options):
        from megazh.cluster.slurm.status import slurm_status
        from megazh.run.folder import RunFolder

        found = slurm_status(RunFolder(run_folder(options.run)), time.time(), options.job)
        for line in [found.to_json()] if options.json else found.lines(time.time()):
            print(line)
