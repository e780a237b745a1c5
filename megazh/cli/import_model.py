"""`megazh import`: a Hugging Face folder as a checkpoint that runs can begin from."""

import argparse
from pathlib import Path

from megazh.cli.options import Subparsers, add_command

EXAMPLES = """examples:
  megazh import Qwen1.5-0.5B --to models/qwen
  megazh pretrain -c mine.yaml model.from=models/qwen checkpoint.initial_checkpoint=models/qwen
  megazh sample models/qwen '中国的首都是'
  megazh export models/qwen --to hf models/qwen_again

A recipe can also name the Hugging Face folder itself; an import has hashes, and was checked once and for all."""


def add_to(commands: Subparsers) -> None:
    """Add `import`."""
    what = "check a Hugging Face folder, and make a checkpoint of it that runs can begin from"
    parser = add_command(commands, "import", what, EXAMPLES)
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="folder of a Llama, Qwen2 or Mistral model, with safetensors"
    )
    parser.add_argument("--to", type=Path, required=True, metavar="OUT", dest="target", help="folder to make")
    parser.set_defaults(call=_import)


def _import(options: argparse.Namespace) -> None:
    from megazh.model.counts import parameter_counts
    from megazh.training.imported import import_folder

    folder = import_folder(options.folder, options.target)
    model = folder.model
    print(
        f"{options.target}: {parameter_counts(model).total:,} parameters of {options.folder}, "
        f"{model.num_hidden_layers} layers x {model.hidden_size}, trained on {folder.trained_length:,} tokens at a time"
    )
