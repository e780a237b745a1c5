"""`megazh sft`: data for supervised fine-tuning."""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megazh.cli.options import Subparsers, add_command, add_encoding, count, encoding, share
from megazh.errors import UsageError

if TYPE_CHECKING:
    from megazh.finetune.fit import Fitting

PREVIEW_EXAMPLES = """examples:
  megazh sft preview raw/alpaca_zh.jsonl.zst --tokenizer qwen.tiktoken
  megazh sft preview data_index/sft/chinese.yaml --tokenizer tok/ --max-tokens 2048 --too-long cut
  megazh sft preview raw/*.parquet --tokenizer tok/ --template human-assistant -n 20 --html preview.html

Shows conversations as the tokens that a model is trained on. Reads 10,000 conversations of each set: --limit."""


CONVERT_EXAMPLES = """examples:
  megazh sft convert raw/alpaca_zh.jsonl.zst --tokenizer qwen.tiktoken --max-tokens 2048 -o data_index/alpaca_zh
  megazh sft convert data_index/sft/chinese.yaml --tokenizer tok/ --max-tokens 2048 -o data_index/chinese
  megazh sft convert raw/*.parquet --tokenizer tok/ --template human-assistant --train last_turn -o data_index/chat

FOLDER gets an index for each set, with a mask of the trained tokens, and mixture.yaml, the manifest of all of them:
train with data.manifest=FOLDER/mixture.yaml. Rows that are rejected and conversations that are dropped are in
SET.rejected.jsonl, each with its reason."""


def add_to(commands: Subparsers) -> None:
    """Add `sft` and its commands."""
    parser = commands.add_parser("sft", help="data for supervised fine-tuning: convert it, look at it")
    below = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_convert(below)
    _add_preview(below)


def _add_data(parser: argparse.ArgumentParser) -> None:
    """Add the options for data sets and for what is trained of them."""
    parser.add_argument(
        "input",
        nargs="+",
        metavar="INPUT",
        help="registries (FILE.yaml, or FILE.yaml:SET,SET; dataset_info.json), files, folders or quoted globs: "
        ".json .jsonl (also .gz .bz2 .xz .zst) .parquet .arrow",
    )
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="TOK", help="the tokenizer of the base model")
    parser.add_argument(
        "--template",
        default="chatml",
        metavar="NAME|FILE",
        help="chat template: chatml (default), human-assistant, or a jinja file",
    )
    parser.add_argument(
        "--train",
        choices=["all", "last_turn"],
        default="all",
        help="the answers that are trained: all (default), or the last one of each conversation",
    )
    parser.add_argument("--max-tokens", type=count, metavar="N", help="most tokens of a conversation (default: any)")
    parser.add_argument(
        "--too-long",
        choices=["cut", "drop"],
        default="cut",
        help="a longer conversation ends with the last answer that is whole (default), or is dropped",
    )
    parser.add_argument(
        "--format", choices=["jsonl", "json", "parquet", "arrow"], help="format of all files (default: by suffix)"
    )
    add_encoding(parser)


def _add_convert(below: Subparsers) -> None:
    convert = add_command(
        below,
        "convert",
        "make indexes with masks of trained tokens, and a manifest, from conversations",
        CONVERT_EXAMPLES,
    )
    _add_data(convert)
    convert.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="folder to make")
    convert.add_argument(
        "--validation",
        type=_validation,
        default=0.01,
        metavar="SHARE",
        help="share of the conversations to keep for validation, by their hash (default: 0.01; 0: none)",
    )
    convert.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the manifest and of noise (default: 0)"
    )
    convert.add_argument(
        "--noise",
        type=share,
        metavar="P",
        help="probability that letters of a question are dropped or repeated (default: none; 0.15 is usual)",
    )
    convert.add_argument(
        "--noise-drop",
        type=share,
        default=0.1,
        metavar="P",
        help="probability of a letter to be dropped (default: 0.1)",
    )
    convert.add_argument(
        "--noise-repeat",
        type=share,
        default=0.1,
        metavar="P",
        help="probability of a letter to come twice (default: 0.1)",
    )
    convert.add_argument(
        "--copies",
        type=count,
        default=1,
        metavar="N",
        help="copies of each conversation with noise of their own, one for each epoch (default: 1)",
    )
    convert.add_argument("--force", action="store_true", help="replace the folder of an earlier conversion")
    convert.set_defaults(call=_convert, outlives_output=True)


def _add_preview(below: Subparsers) -> None:
    preview = add_command(
        below, "preview", "show conversations with their trained tokens, and counts", PREVIEW_EXAMPLES
    )
    _add_data(preview)
    preview.add_argument(
        "-n", "--show", type=_number, default=3, metavar="N", help="conversations to show (default: 3)"
    )
    preview.add_argument(
        "--limit", type=_limit, default=10_000, metavar="N|all", help="conversations to read of each set"
    )
    preview.add_argument("--html", type=Path, metavar="FILE", help="write a page instead of lines")
    preview.add_argument(
        "--color", choices=["auto", "always", "never"], default="auto", help="default: colours on a terminal"
    )
    preview.set_defaults(call=_preview)


def _validation(text: str) -> float:
    found = share(text)
    if found == 1:
        raise argparse.ArgumentTypeError(f"expected a share below 1, found {text}")
    return found


def _convert(options: argparse.Namespace) -> None:
    from megazh.conversation.registry import sets_of
    from megazh.corpus.formats import Format
    from megazh.finetune.convert import Request, convert
    from megazh.finetune.noise import Noise

    if options.copies > 1 and options.noise is None:
        raise UsageError(f"--copies {options.copies}: all would be equal; give --noise, or leave it out")
    for name in ("noise_drop", "noise_repeat"):
        if options.noise is None and getattr(options, name) != getattr(Noise(), name.removeprefix("noise_")):
            raise UsageError(
                f"--{name.replace('_', '-')}: has no effect without --noise; give --noise, or leave it out"
            )
    noise = (
        None if options.noise is None else Noise(options.noise, options.noise_drop, options.noise_repeat, options.seed)
    )
    sets, fitting = sets_of(options.input), _fitting(options)
    for warning in fitting.template.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    request = Request(
        sets=sets,
        fitting=fitting,
        output=options.output,
        validation=options.validation,
        seed=options.seed,
        format=Format(options.format) if options.format else None,
        encoding=encoding(options),
        overwrite=options.force,
        noise=noise,
        copies=options.copies,
    )
    manifest = convert(request, print)
    print(f"train on it with data.manifest={manifest}")


def _fitting(options: argparse.Namespace) -> "Fitting":
    from megazh.conversation.encode import template_for
    from megazh.finetune.fit import Fitting, TooLong, Train
    from megazh.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer)
    return Fitting(
        template_for(tokenizer, options.template),
        tokenizer,
        Train(options.train),
        options.max_tokens,
        TooLong(options.too_long),
    )


def _limit(text: str) -> int | None:
    return None if text == "all" else count(text)


def _number(text: str) -> int:
    return 0 if text == "0" else count(text)


def _preview(options: argparse.Namespace) -> None:
    from megazh.conversation.reading import DataSets
    from megazh.conversation.registry import sets_of
    from megazh.corpus.formats import Format
    from megazh.finetune.preview import look
    from megazh.finetune.preview_html import write_html
    from megazh.finetune.preview_text import text_lines
    from megazh.writing import check_writable

    if options.html:
        if options.html.exists() and options.html.suffix.lower() not in (".html", ".htm"):
            raise UsageError(f"--html {options.html}: exists, and is no .html file; give another name for the page")
        check_writable(options.html.parent, "give another file with --html", f"--html {options.html}")
    limit = options.limit
    sets = [
        replace(each, limit=limit if each.limit is None else min(limit, each.limit)) if limit is not None else each
        for each in sets_of(options.input)
    ]
    data = DataSets(sets, Format(options.format) if options.format else None, encoding(options))
    for line in data.notes():
        print(line, file=sys.stderr)
    fitting = _fitting(options)
    found = look(data, fitting, options.show, limit)
    if options.html:
        write_html(options.html, found, fitting, f"Preview of {' '.join(options.input)}")
        print(f"{options.html}: {len(found.shown):,} conversations, counts of {len(found.lengths):,}")
    else:
        for line in text_lines(found, fitting, _colour(options.color), sys.stdout.encoding or "utf-8"):
            print(line)
    if found.damage:
        raise found.damage


def _colour(wanted: str) -> bool:
    return wanted == "always" or (wanted == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
