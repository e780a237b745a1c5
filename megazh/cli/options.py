"""Command-line options that several commands share, and the types of their values."""

import argparse
from typing import Any

from megazh.config import parse_amount
from megazh.corpus.pieces import ReadOptions, TextDocuments
from megazh.corpus.sources import Format

Subparsers = Any  # argparse has no public name for what add_subparsers returns


def add_command(below: Subparsers, name: str, what: str, examples: str) -> argparse.ArgumentParser:
    """A command with its one-line description and examples under `--help`."""
    return below.add_parser(
        name, help=what, description=what, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def count(text: str) -> int:
    """A whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text}")
    return number


def amount(text: str) -> int:
    """A number of tokens or bytes: 1500000, 1.5M, 30B."""
    try:
        return parse_amount(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def share(text: str) -> float:
    """A share between 0 and 1, or a percentage."""
    try:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"expected a share between 0 and 1, or a percentage, found {text}")
    return number


def add_reading(parser: argparse.ArgumentParser) -> None:
    """The options that say what to read and where its documents are."""
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        action="extend",
        metavar="FILE",
        help="files, folders or quoted globs: .jsonl .json .txt (also .gz .zst), .parquet, .arrow",
    )
    parser.add_argument("--format", choices=[format.value for format in Format], help="where suffixes do not tell")
    parser.add_argument(
        "--text-key", default="text", metavar="KEY", help="the key or column of the text; a.b is nested (default: text)"
    )
    parser.add_argument(
        "--text-documents",
        choices=[kind.value for kind in TextDocuments],
        default=TextDocuments.FILE.value,
        help="plain text: a document is a file, or ends at a blank line (default: file)",
    )
    parser.add_argument(
        "--max-document-bytes",
        type=count,
        default=ReadOptions.max_document_bytes,
        metavar="N",
        help="reject longer documents (default: 64 MB)",
    )


def reading(options: argparse.Namespace) -> ReadOptions:
    """What `add_reading` added, as the library takes it."""
    return ReadOptions(options.text_key, TextDocuments(options.text_documents), options.max_document_bytes)


def standalone(what: str, examples: str) -> argparse.ArgumentParser:
    """The parser of a tool that is one command."""
    return argparse.ArgumentParser(
        description=what, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_shape(parser: argparse.ArgumentParser) -> None:
    """The options that say what a sample looks like."""
    parser.add_argument("--seq-len", type=count, default=1024, metavar="N", help="tokens a sample (default: 1024)")
    parser.add_argument(
        "--max-docs", type=count, metavar="N", help="segments a sample, padding included (default: seq-len / 8)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="instead of the manifest's")
