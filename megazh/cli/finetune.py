"""`megazh finetune`: fine-tune a trained model on conversations; without a recipe, GPUs or data, the demo."""

import argparse
import sys

from megazh.cli.options import Subparsers, add_command, add_encoding, add_launch, encoding
from megazh.cli.pretrain import apart
from megazh.errors import UsageError

EXAMPLES = """examples:
  bash jobs/run_finetune.sh -t normal                             the demo: questions about its stories, on a CPU
  bash jobs/run_finetune.sh -t long_context                       the demo goes on: conversations four times as long
  bash jobs/run_finetune.sh -t normal -g 1,2,3,4,5,6              0.5B on six GPUs (recipe sft_qwen0.5b_6x3090)
  bash jobs/run_finetune.sh -t normal -g 0-5 -i data_index/sft/chinese.yaml -c sft_qwen0.5b_6x3090
  bash jobs/run_finetune.sh -t long_context -g 0-5                8,192 tokens (recipe longlora_qwen0.5b_6x3090)
  bash jobs/run_finetune.sh -t normal -g 0-5 checkpoint.initial_checkpoint=runs/big -c mine.yaml --dry-run

Without -c, the recipe is the one above if -g is given without -i, else the demo's. The weights come from the run in
checkpoint.initial_checkpoint. key=value settings override any key of the recipe. The same command again resumes an
interrupted run from its last checkpoint."""


def add_to(commands: Subparsers) -> None:
    """Add `finetune`."""
    parser = add_command(commands, "finetune", "fine-tune a trained model on conversations", EXAMPLES)
    parser.add_argument(
        "-t",
        "--type",
        choices=["normal", "long_context"],
        default="normal",
        help="normal: supervised fine-tuning (default); long_context: the same behind it, with longer conversations",
    )
    add_launch(parser)
    parser.add_argument(
        "-i",
        "--input",
        nargs="+",
        metavar="FILE",
        help="your own conversations: .jsonl, .json, .parquet, registries, folders, quoted globs (docs/finetuning.md)",
    )
    parser.add_argument(
        "--template",
        default="chatml",
        metavar="NAME|FILE",
        help="with -i: chat template: chatml (default), human-assistant, or a jinja file",
    )
    add_encoding(parser, "with -i: ")
    parser.add_argument(
        "--epochs",
        type=_epochs,
        metavar="N",
        help="length of the run in passes over its data (default: 3 with -i, else as the recipe says)",
    )
    parser.usage = "%(prog)s [options] [key=value ...]"
    parser.set_defaults(
        settings=[], call=_finetune, outlives_output=True, keeps_log=True, scheduled=True, continues=True
    )


def _epochs(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text}")
    return number


def _finetune(options: argparse.Namespace) -> None:
    from megazh.cluster.finetune import OwnData, finetune
    from megazh.conversation.template import DEFAULT
    from megazh.training.job import Launcher, Request, Task

    inputs, settings = apart(options.input, options.settings)
    if not inputs and options.template != DEFAULT:
        raise UsageError(f"--template {options.template}: goes with -i; converted data has its template already")
    request = Request(
        task=Task(options.type),
        recipe=options.config,
        gpus=options.gpus,
        num_gpus=options.num_gpus,
        stages=options.stages,
        hostfile=options.hostfile,
        launcher=Launcher(options.launcher),
        run=options.run,
        device=options.device,
        allow_relayout=options.allow_relayout,
        dry_run=options.dry_run,
        settings=settings,
    )
    own = OwnData(inputs, options.template, encoding(options)) if inputs else None
    if code := finetune(request, own, options.epochs):
        sys.exit(code)
