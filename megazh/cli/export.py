"""`megazh export`: a trained model as a Hugging Face folder."""

import argparse
import sys
from pathlib import Path

from megazh.cli.options import Subparsers, add_command, amount

EXAMPLES = """examples:
  megazh export runs/demo --to hf models/demo
  megazh export runs/demo --to hf models/demo --step 1000 --dtype fp32
  megazh export runs/demo --to hf models/demo --shard-size 2GB --force

transformers, vLLM, TRL and LLaMA-Factory load the folder; docs/exchange.md says what is in it."""


def add_to(commands: Subparsers) -> None:
    """Add `export`."""
    parser = add_command(commands, "export", "write a trained model as a Hugging Face folder", EXAMPLES)
    parser.add_argument(
        "source", type=Path, metavar="RUN", help="run folder, folder of one checkpoint, or imported folder"
    )
    parser.add_argument("target", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--to", choices=["hf"], default="hf", help="format of the folder (default: hf)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, metavar="N", help="the checkpoint of step N (default: the newest whole one)")
    which.add_argument("--checkpoint", metavar="NAME", help="name of a checkpoint in RUN/checkpoints, or its path")
    parser.add_argument(
        "--dtype",
        choices=["bf16", "fp32"],
        help="dtype of the weights; fp32 takes the fp32 masters (default: the dtype that the model computes in)",
    )
    parser.add_argument(
        "--shard-size", type=size, default="5GB", metavar="SIZE", help="largest size of a file (default: 5GB)"
    )
    parser.add_argument(
        "--family",
        choices=["llama", "qwen2", "mistral"],
        help="model family (default: as imported, else the first that fits)",
    )
    parser.add_argument("--force", action="store_true", help="replace the folder of an earlier export")
    parser.set_defaults(call=_export)


def size(text: str) -> int:
    """Parse a number of bytes: 500MB, 5GB, 5G."""
    return amount(text[:-1] if text[-1:].lower() == "b" and text[-2:-1].isalpha() else text)


def _export(options: argparse.Namespace) -> None:
    from megazh.exchange.families import Family
    from megazh.pipeline.precision import Dtype
    from megazh.training.checkpoint_list import checkpoint_path
    from megazh.training.export import ExportOptions, export_to_hf
    from megazh.training.model_source import find_model
    from megazh.writing import size_text

    wanted = options.checkpoint if options.step is None else checkpoint_path(Path(), options.step).name
    source = find_model(options.source, wanted)
    choices = ExportOptions(
        options.dtype and Dtype(options.dtype), options.shard_size, options.family and Family(options.family),
        options.force,
    )  # fmt: skip
    done = export_to_hf(source, options.target, choices)
    files = "1 file" if done.files == 1 else f"{done.files} files"
    if source.run is None and source.hf_files is None:
        print(f"warning: {source.path} lies in no run folder: the export has no tokenizer", file=sys.stderr)
    print(
        f"{options.target}: {done.parameters:,} parameters of {source.path} as {done.family}, {done.dtype}, "
        f"{size_text(done.bytes)} in {files}"
    )
