"""`megazh export`: a trained model as a Hugging Face folder, or the adapter of a LoRA run."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megazh.cli.options import Subparsers, add_command, amount
from megazh.errors import UsageError

if TYPE_CHECKING:
    from megazh.training.model_source import ModelSource

EXAMPLES = """examples:
  megazh export runs/demo --to hf models/demo
  megazh export runs/demo --to hf models/demo --step 1000 --dtype fp32
  megazh export runs/demo --to hf models/demo --shard-size 2GB --force
  megazh export runs/lora --to adapter models/lora

transformers, vLLM, TRL and LLaMA-Factory load the folder; docs/exchange.md says what is in it. PEFT loads an adapter;
docs/finetuning.md says more. Of a LoRA run, --to hf has the low-rank pairs merged."""


def add_to(commands: Subparsers) -> None:
    """Add `export`."""
    what = "write a trained model as a Hugging Face folder, or the adapter of a LoRA run"
    parser = add_command(commands, "export", what, EXAMPLES)
    parser.add_argument(
        "source", type=Path, metavar="RUN", help="run folder, folder of one checkpoint, or imported folder"
    )
    parser.add_argument("target", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument(
        "--to", choices=["hf", "adapter"], default="hf", help="a whole model, or low-rank pairs alone (default: hf)"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, metavar="N", help="the checkpoint of step N (default: the newest whole one)")
    which.add_argument("--checkpoint", metavar="NAME", help="name of a checkpoint in RUN/checkpoints, or its path")
    add_options_of_folder(parser)
    parser.set_defaults(call=_export)


def add_options_of_folder(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how a Hugging Face folder is written."""
    parser.add_argument(
        "--dtype",
        choices=["bf16", "fp32"],
        help="dtype of the weights; fp32 takes the fp32 masters (default: the dtype that the model computes in)",
    )
    parser.add_argument(
        "--shard-size", type=size, metavar="SIZE", help="largest size of a file of a whole model (default: 5GB)"
    )
    parser.add_argument(
        "--family",
        choices=["llama", "qwen2", "mistral"],
        help="model family (default: as imported, else the first that fits)",
    )
    parser.add_argument("--force", action="store_true", help="replace the folder of an earlier export")


def size(text: str) -> int:
    """Parse a number of bytes: 500MB, 5GB, 5G."""
    return amount(text[:-1] if text[-1:].lower() == "b" and text[-2:-1].isalpha() else text)


def _export(options: argparse.Namespace) -> None:
    from megazh.training.checkpoint_list import checkpoint_path
    from megazh.training.model_source import find_model

    wanted = options.checkpoint if options.step is None else checkpoint_path(Path(), options.step).name
    source = find_model(options.source, wanted)
    if options.to == "adapter":
        _export_adapter(source, options)
    else:
        write_folder(source, options, str(source.path))


def write_folder(source: "ModelSource", options: argparse.Namespace, name: str) -> None:
    """Write a model as a Hugging Face folder by the options of `add_options_of_folder`, and print what was written."""
    from megazh.exchange.families import Family
    from megazh.pipeline.precision import Dtype
    from megazh.training.export import SHARD_BYTES, ExportOptions, export_to_hf
    from megazh.writing import size_text

    choices = ExportOptions(
        options.dtype and Dtype(options.dtype), options.shard_size or SHARD_BYTES,
        options.family and Family(options.family), options.force,
    )  # fmt: skip
    done = export_to_hf(source, options.target, choices)
    files = "1 file" if done.files == 1 else f"{done.files} files"
    if source.run is None and source.hf_files is None:
        print(f"warning: {source.path} lies in no run folder: the export has no tokenizer", file=sys.stderr)
    print(
        f"{options.target}: {done.parameters:,} parameters of {name} as {done.family}, {done.dtype}, "
        f"{size_text(done.bytes)} in {files}"
    )


def _export_adapter(source: "ModelSource", options: argparse.Namespace) -> None:
    from megazh.pipeline.precision import Dtype
    from megazh.training.adapter import export_adapter

    for name in ("shard_size", "family"):
        if getattr(options, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')}: has no meaning for an adapter; leave it out")
    info = export_adapter(source, options.target, options.dtype and Dtype(options.dtype), options.force)
    if info.model.rope_scaling is not None:
        scaling = info.model.rope_scaling.type
        print(
            f"warning: the run had model.rope_scaling={scaling}: 'megazh merge' keeps it, and PEFT takes what the "
            "base's config says",
            file=sys.stderr,
        )
    targets = ", ".join(info.lora.targets)
    whole = ", embedding and norms" if info.lora.train_embed_norm else ""
    print(f"{options.target}: rank {info.lora.rank} on {targets}{whole} of {source.path}, for {info.base}")
