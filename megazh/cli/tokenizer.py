"""`megazh tokenizer`: train a tokenizer, and show what a tokenizer does to a text."""

import argparse
import sys
from pathlib import Path

from megazh.cli.options import Subparsers, add_command, add_reading, amount, count, reading
from megazh.errors import UsageError

TRAIN_EXAMPLES = """example:
  megazh tokenizer train --input corpus.jsonl --vocab-size 8000 --output tok/tokenizer.json

<|pad|>, <|endoftext|>, <|im_start|> and <|im_end|> become ids 0 to 3; the 256 bytes follow, then the
learnt tokens."""


def add_to(commands: Subparsers) -> None:
    """Add `tokenizer` and its commands."""
    from megazh.tokenizer.train import Digits

    parser = commands.add_parser("tokenizer", help="train a tokenizer, or show one")
    below = parser.add_subparsers(metavar="COMMAND", required=True)
    train = add_command(below, "train", "train a byte-level BPE with NFC and Qwen's regex", TRAIN_EXAMPLES)
    add_reading(train)
    train.add_argument("--vocab-size", type=count, required=True, metavar="N", help="total number of ids")
    train.add_argument("--output", type=Path, required=True, metavar="FILE", help="tokenizer.json to write")
    train.add_argument(
        "--digits",
        choices=[split.value for split in Digits],
        default=Digits.SINGLE.value,
        help="one token per digit (Qwen's regex, the default), or up to three digits together",
    )
    train.add_argument("--max-bytes", type=amount, metavar="N", help="learn from the first N bytes of text, such as 2G")
    train.set_defaults(call=_train)
    show = add_command(
        below,
        "show",
        "show a tokenizer, and how it splits a text: pieces, and bytes per token",
        "examples:\n  megazh tokenizer show qwen.tiktoken --text '今天天气不错'\n"
        "  megazh tokenizer show tok/ --file corpus.txt",
    )
    show.add_argument("tokenizer", type=Path, metavar="TOK")
    show.add_argument("--file", type=Path, help="file with the text, taken as one text")
    show.add_argument("--text", help="the text itself")
    show.add_argument("--pieces", type=count, default=100, metavar="N", help="show the first N pieces (default: 100)")
    show.add_argument("--eod", metavar="TOKEN", help="end-of-document token (default: the tokenizer's)")
    show.add_argument(
        "--front-tokens",
        action="store_true",
        help="SentencePiece: put <pad> <bos> <eos> <unk> (ids 0 to 3) in front of the model's ids",
    )
    show.set_defaults(call=_show)


def _train(options: argparse.Namespace) -> None:
    from megazh.corpus.formats import Format
    from megazh.corpus.sources import list_inputs
    from megazh.tokenizer.train import Digits, train_tokenizer

    if options.output.is_dir():
        raise UsageError(
            f"--output {options.output}: is a folder; give a file, such as {options.output}/tokenizer.json"
        )
    if options.output.suffix != ".json":
        raise UsageError(f"--output {options.output}: expected a name that ends in .json")
    listing = list_inputs(options.input, Format(options.format) if options.format else None, reading(options))
    for line in listing.notes():
        print(line, file=sys.stderr, flush=True)
    size = train_tokenizer(
        listing.sources, reading(options), options.output, options.vocab_size, Digits(options.digits), options.max_bytes
    )
    wanted = options.vocab_size
    short = "" if size == wanted else f" (fewer than {wanted:,}: the text has too few distinct words)"
    print(f"{options.output}: {size:,} ids{short}")


def _show(options: argparse.Namespace) -> None:
    from megazh.tokenizer import load_tokenizer
    from megazh.tokenizer.show import show_tokenizer

    tokenizer = load_tokenizer(options.tokenizer, options.eod, options.front_tokens)
    for line in show_tokenizer(tokenizer, options.file, options.text, options.pieces):
        print(line)
