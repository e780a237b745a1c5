"""`megazh tokenizer`: train a tokenizer, and show what a tokenizer does to a text."""

import argparse
import sys
import time
from pathlib import Path

from megazh.cli.options import (
    Subparsers,
    add_command,
    add_reading,
    add_tokenizer_kind,
    amount,
    count,
    reading,
    tokenizer_kind,
)
from megazh.errors import INTERRUPTED, UsageError
from megazh.writing import check_writable

TRAIN_EXAMPLES = """example:
  megazh tokenizer train --input corpus.jsonl --vocab-size 8000 --output tok/tokenizer.json

<|pad|>, <|endoftext|>, <|im_start|> and <|im_end|> become ids 0 to 3; the 256 bytes follow, then the
learnt tokens. FILE.training, beside the tokenizer, records what it was trained on."""


def add_to(commands: Subparsers) -> None:
    """Add `tokenizer` and its commands."""
    from megazh.tokenizer.train import SAMPLE_BYTES, Digits

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
    train.add_argument(
        "--sample",
        type=_sample,
        default=SAMPLE_BYTES,
        metavar="SIZE|all",
        help="bytes of input to learn from, spread evenly over all of it, such as 200M (default: 64M); compressed "
        "files are read as a whole all the same. More takes time in proportion, and teaches little",
    )
    train.add_argument("--restart", action="store_true", help="replace an existing tokenizer")
    train.set_defaults(call=_train, outlives_output=True)
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
    add_tokenizer_kind(show)
    show.set_defaults(call=_show)


def _sample(text: str) -> int | None:
    """Parse an amount of at least 1, or `all`, which is None."""
    if text == "all":
        return None
    size = amount(text)
    if size < 1:
        raise argparse.ArgumentTypeError(f"expected a size such as 200M, or all, found {text}")
    return size


def _train(options: argparse.Namespace) -> None:
    from megazh.corpus.formats import Format
    from megazh.corpus.sources import list_inputs
    from megazh.progress import duration
    from megazh.tokenizer.train import Digits, describe_training, train_tokenizer, trained_already

    output, wanted, digits = options.output, options.vocab_size, Digits(options.digits)
    if output.is_dir():
        raise UsageError(f"--output {output}: is a folder; give a file, such as {output}/tokenizer.json")
    if output.suffix != ".json":
        raise UsageError(f"--output {output}: expected a name that ends in .json")
    listing = list_inputs(options.input, Format(options.format) if options.format else None, reading(options))
    for line in listing.notes():
        print(line, file=sys.stderr, flush=True)
    sources = listing.sources
    training = describe_training(sources, reading(options), wanted, digits, options.sample)
    if not options.restart and trained_already(output, training):
        print(f"{output}: complete already, from the same input; nothing to do")
        return
    check_writable(output.parent, "choose another --output", f"--output {output}")
    begin = time.monotonic()
    try:
        trained = train_tokenizer(sources, reading(options), output, wanted, digits, options.sample, training)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    short = "" if trained.ids == wanted else f" (fewer than {wanted:,}: the text has too few distinct words)"
    print(f"{output}: {trained.ids:,} ids{short}, in {duration(time.monotonic() - begin)}")
    sample = trained.sample
    of = "all there is" if sample.everything else f"a sample of {sample.input_bytes / 1e6:,.1f} MB of input"
    files = "1 file" if len(sources) == 1 else f"{len(sources):,} files"
    print(f"learnt from {sample.text_bytes / 1e6:,.1f} MB of text, {of} in {files}")


def _show(options: argparse.Namespace) -> None:
    from megazh.tokenizer import load_tokenizer
    from megazh.tokenizer.show import show_tokenizer

    tokenizer = load_tokenizer(options.tokenizer, options.eod, options.front_tokens, tokenizer_kind(options))
    tokenizer.check()
    for line in show_tokenizer(tokenizer, options.file, options.text, options.pieces):
        print(line)
