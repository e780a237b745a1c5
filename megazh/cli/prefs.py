"""`megazh prefs`: preference data for DPO, from data sets or from a model's own answers."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megazh.cli.options import Subparsers, add_command, add_encoding, count, encoding

if TYPE_CHECKING:
    from megazh.corpus.formats import Format
    from megazh.prefs.forms import Template

CONVERT_EXAMPLES = r"""examples:
  megazh prefs convert raw/dpo_zh.json --to prefs.jsonl
  megazh prefs convert raw/*.parquet --form messages --to prefs.jsonl
  megazh prefs convert raw/pairs.jsonl.gz --template '问：{instruction}\n{input}\n答：' --to prefs.jsonl

Rows have instruction (and input), conversations (from, value), messages (role, content) or prompt, with chosen and
rejected, or with output: [chosen, rejected]. OUT has prompt, chosen and rejected, as TRL's trainers read them. Rows
that give none are written to OUT.rejected.jsonl with file, line and reason."""

GENERATE_EXAMPLES = r"""examples:
  megazh prefs generate runs/sft raw/alpaca_zh.json --to prefs.jsonl
  megazh prefs generate runs/sft raw/alpaca_zh.json --limit 2000 --temperature 1 --max-tokens 400 --to prefs.jsonl

Rows have instruction (and input) with output, or conversations or messages that end with an answer. OUT has the answer
of the data as chosen, and the model's own answer as rejected. The same seed gives the same answers. After an
interruption the same command continues after the last answer."""


def add_to(commands: Subparsers) -> None:
    """Add `prefs` and its commands."""
    parser = commands.add_parser("prefs", help="preference data for DPO: convert it, or generate it with a model")
    below = parser.add_subparsers(metavar="COMMAND", required=True)
    convert = add_command(below, "convert", "rewrite preference data as rows for TRL's trainers", CONVERT_EXAMPLES)
    _add_files(convert)
    convert.add_argument(
        "--form",
        choices=["text", "messages"],
        default="text",
        help="plain text, for a model without a chat template (default), or lists of messages",
    )
    convert.set_defaults(call=_convert, outlives_output=True)
    generate = add_command(
        below, "generate", "answer instructions with a model: its answers become the rejected side", GENERATE_EXAMPLES
    )
    generate.add_argument("model", type=Path, metavar="MODEL", help="run, checkpoint or Hugging Face folder")
    _add_files(generate)
    generate.add_argument("--checkpoint", metavar="NAME", help="a checkpoint of the run (default: the newest)")
    generate.add_argument("--limit", type=count, metavar="N", help="answer the first N rows only")
    generate.add_argument(
        "--max-tokens", type=count, default=256, metavar="N", help="most tokens of an answer (default: 256)"
    )
    generate.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0: greedy (default: 0.8)")
    generate.add_argument(
        "--top-p",
        type=float,
        default=0.95,
        metavar="P",
        help="draw among the most likely tokens of this total probability (default: 0.95)",
    )
    generate.add_argument(
        "--seed", type=int, default=0, metavar="N", help="the same seed, the same answers (default: 0)"
    )
    generate.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is a GPU")
    generate.set_defaults(call=_generate, outlives_output=True, continues=True)


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "input",
        nargs="+",
        metavar="INPUT",
        help="files, folders or quoted globs: .json .jsonl (also .gz .bz2 .xz .zst) .parquet .arrow",
    )
    parser.add_argument("--to", type=Path, required=True, metavar="OUT", help=".jsonl file to write")
    parser.add_argument("--force", action="store_true", help="replace OUT, and begin anew")
    parser.add_argument(
        "--template",
        metavar="TEXT",
        help=r"plain text of a prompt, with {instruction}, {input} and \n for a line break; a line that is just "
        r"{input} is left out where there is no input (default: '{instruction}\n{input}\n')",
    )
    parser.add_argument(
        "--format",
        choices=["jsonl", "json", "parquet", "arrow"],
        help="format of all files (default: by suffix)",
    )
    add_encoding(parser)


def _template(options: argparse.Namespace) -> "Template":
    from megazh.prefs.forms import Template

    return Template() if options.template is None else Template(options.template.replace("\\n", "\n"))


def _format(options: argparse.Namespace) -> "Format | None":
    from megazh.corpus.formats import Format

    return Format(options.format) if options.format else None


def _convert(options: argparse.Namespace) -> None:
    from megazh.prefs.convert import convert
    from megazh.prefs.forms import Form

    convert(
        options.input,
        options.to,
        print,
        Form(options.form),
        _template(options),
        _format(options),
        encoding(options),
        options.force,
    )


def _generate(options: argparse.Namespace) -> None:
    from megazh.model.sampling import SamplingOptions
    from megazh.prefs.generate import Request, generate

    generate(
        Request(
            model=options.model,
            checkpoint=options.checkpoint,
            device=options.device,
            inputs=options.input,
            output=options.to,
            template=_template(options),
            format=_format(options),
            encoding=encoding(options),
            sampling=SamplingOptions(temperature=options.temperature, top_p=options.top_p),
            max_tokens=options.max_tokens,
            seed=options.seed,
            limit=options.limit,
            overwrite=options.force,
        ),
        print,
    )
