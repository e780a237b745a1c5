"""`megazh pretrain`: train a model from a recipe; without one, the demo."""

import argparse
import glob
import os
import re
import sys
from pathlib import Path

from megazh.cli.options import Subparsers, add_command, add_encoding, add_launch, encoding
from megazh.errors import UsageError

EXAMPLES = """examples:
  bash jobs/run_pretrain.sh -t ds_pp                              the demo: made-up stories, minutes, also without a GPU
  bash jobs/run_pretrain.sh -t ds_pp -i my_corpus.jsonl           the same on your own text
  bash jobs/run_pretrain.sh -t ds_pp -g 1,2,3,4,5,6               0.5B on six GPUs (recipe qwen0.5b_6x3090)
  bash jobs/run_pretrain.sh -t ds_pp -g 0-5 -p 1 tokens=10B       one stage, six replicas, another length
  bash jobs/run_pretrain.sh -t ds_pp -c minillm_1.4b -r runs/big  another recipe, another run folder
  bash jobs/run_pretrain.sh -t ds_pp -c qwen0.5b_6x3090 -g 0-5 --dry-run
  bash jobs/run_pretrain.sh -t hf -g 0-5 -p 1                     the same recipe through Hugging Face's Trainer

Without -c, the recipe is 'qwen0.5b_6x3090' if -g is given without -i, else 'demo'. key=value settings override any
key of the recipe: 'megazh recipe show NAME' prints them all with their meaning. The same command again resumes an
interrupted run from its last checkpoint."""


def add_to(commands: Subparsers) -> None:
    """Add `pretrain`."""
    parser = add_command(commands, "pretrain", "train a model through a pipeline of stages", EXAMPLES)
    parser.add_argument(
        "-t",
        "--type",
        choices=["ds_pp", "hf"],
        default="ds_pp",
        help="engine; ds_pp: DeepSpeed's pipeline, the default and faster; hf: Hugging Face's Trainer (docs/routes.md)",
    )
    add_launch(parser)
    parser.add_argument(
        "-i",
        "--input",
        nargs="+",
        metavar="FILE",
        help="your own text: .jsonl, .csv, .txt, .parquet, folders, quoted globs",
    )
    parser.add_argument("--text-key", default="text", metavar="KEY", help="with -i: key of the text (default: text)")
    add_encoding(parser, "with -i: ")
    parser.add_argument(
        "--text-documents",
        choices=["file", "blank-lines"],
        help="with -i: where a document ends in plain text (default: blank-lines for few files)",
    )
    parser.usage = "%(prog)s [options] [key=value ...]"
    parser.set_defaults(
        settings=[], call=_pretrain, outlives_output=True, keeps_log=True, scheduled=True, continues=True
    )


def _pretrain(options: argparse.Namespace) -> None:
    from megazh.cluster.start import start
    from megazh.corpus.options import TextDocuments
    from megazh.training.job import Launcher, Request

    inputs, settings = apart(options.input, options.settings)
    code = start(
        Request(
            engine=options.type,
            recipe=options.config,
            gpus=options.gpus,
            num_gpus=options.num_gpus,
            stages=options.stages,
            hostfile=options.hostfile,
            launcher=Launcher(options.launcher),
            run=options.run,
            inputs=inputs,
            text_key=options.text_key,
            text_documents=TextDocuments(options.text_documents) if options.text_documents else None,
            encoding=encoding(options),
            device=options.device,
            allow_relayout=options.allow_relayout,
            dry_run=options.dry_run,
            settings=settings,
        )
    )
    if code:
        sys.exit(code)


def apart(inputs: list[str] | None, settings: list[str]) -> tuple[list[str] | None, list[str]]:
    """Split `-i a.jsonl steps=5` into inputs and settings.

    A word with `=` is a setting if no file matches it and what stands before the `=` is a key of the recipe, or so
    near to one that the setting's own error names that key.

    Raises:
        UsageError: a word with `=` is neither a file nor a setting.
    """
    if inputs is None:
        return None, settings
    taken = [text for text in inputs if "=" in text and not os.path.lexists(text) and _is_setting(text)]
    return [text for text in inputs if text not in taken], [*taken, *settings]


def _is_setting(text: str) -> bool:
    from megazh.corpus.formats import by_suffix
    from megazh.corpus.listing import expand
    from megazh.settings import resolve_key
    from megazh.training.recipe import Recipe

    if glob.has_magic(text) and expand(text):
        return False
    key, _, value = text.removeprefix("--").partition("=")
    try:
        resolve_key(key, Recipe)
    except UsageError as error:
        if re.search(r"[/*?\[]", key):
            return False  # a path or glob, whose own error names it
        looks_like_a_file = by_suffix(Path(value))[0] is not None or glob.has_magic(value)
        if "unknown key" in str(error) and ("did you mean" not in str(error) or looks_like_a_file):
            raise UsageError(f"-i {text}: no such file or folder, nor a setting: {error}") from None
    return True
