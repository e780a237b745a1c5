"""`megazh merge`: a base with an adapter merged into it, as a Hugging Face folder."""

import argparse
from pathlib import Path

from megazh.cli.export import add_options_of_folder, write_folder
from megazh.cli.options import Subparsers, add_command

EXAMPLES = """examples:
  megazh export runs/lora --to adapter models/lora
  megazh merge models/qwen models/lora models/merged
  megazh merge runs/base models/lora/adapter_model.safetensors models/merged --dtype fp32

The base is the one that the adapter was trained on, as a checkpoint or as a folder; another one is refused."""


def add_to(commands: Subparsers) -> None:
    """Add `merge`."""
    what = "write a base with an adapter merged into it as a Hugging Face folder"
    parser = add_command(commands, "merge", what, EXAMPLES)
    parser.add_argument(
        "base", type=Path, metavar="BASE", help="run folder, folder of one checkpoint, imported or Hugging Face folder"
    )
    parser.add_argument(
        "adapter", type=Path, metavar="ADAPTER", help="folder of 'megazh export --to adapter', or its file"
    )
    parser.add_argument("target", type=Path, metavar="OUT", help="folder to make")
    add_options_of_folder(parser)
    parser.set_defaults(call=_merge)


def _merge(options: argparse.Namespace) -> None:
    from megazh.training.adapter import with_adapter
    from megazh.training.model_source import find_model

    merged = with_adapter(find_model(options.base), options.adapter)
    write_folder(merged, options, f"{merged.path} with {options.adapter}")
