"""`megazh sft`: data for supervised fine-tuning."""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from megazh.cli.options import Subparsers, add_command, add_encoding, count, encoding

PREVIEW_EXAMPLES = """examples:
  megazh sft preview raw/alpaca_zh.jsonl.zst --tokenizer qwen.tiktoken
  megazh sft preview data_index/sft/chinese.yaml --tokenizer tok/ --max-tokens 2048 --too-long cut
  megazh sft preview raw/*.parquet --tokenizer tok/ --template human-assistant -n 20 --html preview.html

Shows conversations as the tokens that a model is trained on. Reads 10,000 conversations of each set: --limit."""


def add_to(commands: Subparsers) -> None:
    """Add `sft` and its commands."""
    parser = commands.add_parser("sft", help="data for supervised fine-tuning: look at it")
    below = parser.add_subparsers(metavar="COMMAND", required=True)
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


def _limit(text: str) -> int | None:
    return None if text == "all" else count(text)


def _number(text: str) -> int:
    return 0 if text == "0" else count(text)


def _preview(options: argparse.Namespace) -> None:
    from megazh.conversation.encode import template_for
    from megazh.conversation.reading import DataSets
    from megazh.conversation.registry import sets_of
    from megazh.corpus.formats import Format
    from megazh.finetune.fit import Fitting, TooLong, Train
    from megazh.finetune.preview import look
    from megazh.finetune.preview_html import write_html
    from megazh.finetune.preview_text import text_lines
    from megazh.tokenizer import load_tokenizer
    from megazh.writing import check_writable

    if options.html:
        check_writable(options.html.parent, "give another file with --html", f"--html {options.html}")
    limit = options.limit
    sets = [
        replace(each, limit=limit if each.limit is None else min(limit, each.limit)) if limit is not None else each
        for each in sets_of(options.input)
    ]
    data = DataSets(sets, Format(options.format) if options.format else None, encoding(options))
    for line in data.notes():
        print(line, file=sys.stderr)
    tokenizer = load_tokenizer(options.tokenizer)
    fitting = Fitting(
        template_for(tokenizer, options.template),
        tokenizer,
        Train(options.train),
        options.max_tokens,
        TooLong(options.too_long),
    )
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
