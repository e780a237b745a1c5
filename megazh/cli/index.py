"""`megazh index`: build, inspect, verify, merge and adopt indexes."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megazh.cli.options import (
    Subparsers,
    add_command,
    add_reading,
    add_tokenizer_kind,
    count,
    reading,
    share,
    tokenizer_kind,
)
from megazh.errors import INTERRUPTED, MegazhError, UsageError, WorkerError

if TYPE_CHECKING:  # slow to import: the functions below import what they need
    from megazh.index.build import Request, Summary
    from megazh.index.metadata import Metadata
    from megazh.index.parts import Part

BUILD_EXAMPLES = """examples:
  megazh index build --input 'raw/*.jsonl.zst' --tokenizer qwen.tiktoken --output data_index/wiki
  megazh index build --input books/ --text-documents blank-lines --tokenizer tok/ --output data_index/books
  megazh index build --input a.parquet b.parquet --text-key content.text --tokenizer tok/ --output data_index/web
  mpirun -n 8 megazh index build ...        (or srun --mpi=pmi2 -n 8 megazh index build ...)

Run the same command again to continue an interrupted build. Beside OUTPUT.bin and OUTPUT.idx, the index has
OUTPUT.json (description), OUTPUT.docs (content hashes), a copy of the tokenizer, OUTPUT.log and, if records were
rejected, OUTPUT.rejected.jsonl."""


ADOPT_EXAMPLES = """examples:
  megazh index adopt megatron/wiki_text_document --tokenizer qwen.tiktoken
  megazh index adopt old/books --tokenizer tok/ --eod '</s>'

PREFIX.bin and PREFIX.idx are read and checked, never changed: every id in the vocabulary, the end-of-document token
at the end of each document. PREFIX.json, PREFIX.docs and a copy of the tokenizer are written beside them."""


def add_to(commands: Subparsers) -> None:
    """Add `index` and its commands."""
    parser = commands.add_parser("index", help="build, inspect, verify, merge and adopt indexes of tokens")
    below = parser.add_subparsers(metavar="COMMAND", required=True)
    build = add_command(below, "build", "tokenise text into PREFIX.bin and PREFIX.idx", BUILD_EXAMPLES)
    add_build_options(build)
    inspect = add_command(
        below,
        "inspect",
        "show what is in an index",
        "examples:\n  megazh index inspect data_index/wiki\n  megazh index inspect data_index/wiki --document 17",
    )
    inspect.add_argument("prefix", metavar="PREFIX")
    inspect.add_argument("--document", type=int, metavar="N", help="also show document N (from 0; -1 is the last)")
    inspect.add_argument("--tokens", type=count, default=200, metavar="N", help="show N of its tokens (default: 200)")
    inspect.set_defaults(call=_inspect)
    verify = add_command(
        below,
        "verify",
        "read all of an index and check it: hashes, boundaries, ids below the vocabulary size, document ends",
        "example:\n  megazh index verify data_index/wiki",
    )
    verify.add_argument("prefix", metavar="PREFIX", nargs="+")
    verify.set_defaults(call=_verify)
    merge = add_command(
        below,
        "merge",
        "merge indexes of the same tokenizer, in the given order",
        "example:\n  megazh index merge data_index/a data_index/b --output data_index/ab",
    )
    merge.add_argument("prefix", metavar="PREFIX", nargs="+")
    merge.add_argument("--output", required=True, metavar="PREFIX")
    merge.set_defaults(call=_merge, outlives_output=True)
    adopt = add_command(below, "adopt", "make an index of Megatron-LM or datatrove usable, as it is", ADOPT_EXAMPLES)
    adopt.add_argument("prefix", metavar="PREFIX")
    add_tokenizer(adopt)
    adopt.set_defaults(call=_adopt, outlives_output=True)


def add_build_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `megazh index build`."""
    add_reading(parser)
    add_tokenizer(parser)
    parser.add_argument("--output", required=True, type=Path, metavar="PREFIX", help="where to write the index")
    parser.add_argument(
        "--max-lost",
        type=share,
        default=0.01,
        metavar="SHARE",
        help="largest share of characters to accept that the tokenizer has no token for (default: 1%%)",
    )
    parser.add_argument(
        "--max-bad",
        type=share,
        default=0.001,
        metavar="SHARE",
        help="largest share of bad records to accept, such as 0.001 or 0.1%% (default: 0.1%%)",
    )
    parser.add_argument(
        "--workers",
        type=_workers,
        metavar="N|auto",
        help="worker processes; auto, the default: one for each 8 MB of text, at most one per core (the text of "
        "compressed and Parquet files is taken for four times their size)",
    )
    parser.add_argument(
        "--part",
        type=_part,
        metavar="I/N",
        help="index part I of N of the files, into PREFIX.part-I-of-N; 'megazh index merge' joins the parts",
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="discard the finished pieces of an interrupted build, and replace a complete index",
    )
    parser.set_defaults(call=build, outlives_output=True, continues=True)


def add_tokenizer(parser: argparse.ArgumentParser) -> None:
    """Add the options that say with which tokenizer ids are made."""
    parser.add_argument(
        "--tokenizer",
        required=True,
        type=Path,
        metavar="TOK",
        help="tokenizer.json or its folder, qwen.tiktoken, or a SentencePiece .model",
    )
    parser.add_argument("--eod", metavar="TOKEN", help="end-of-document token (default: the tokenizer's)")
    parser.add_argument(
        "--front-tokens",
        action="store_true",
        help="SentencePiece: put <pad> <bos> <eos> <unk> (ids 0 to 3) in front of the model's ids",
    )
    add_tokenizer_kind(parser)


def _workers(text: str) -> int | None:
    return None if text == "auto" else count(text)


def _part(text: str) -> "Part":
    from megazh.index.parts import parse_part

    try:
        return parse_part(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def build(options: argparse.Namespace) -> None:
    """Build an index: in this process, with worker processes, or as one of several MPI ranks."""
    from megazh.corpus.formats import Format
    from megazh.index import mpi
    from megazh.index.build import Request, build_index, check_request
    from megazh.index.pools import ProcessPool

    request = Request(
        inputs=options.input,
        output=options.part.prefix(options.output) if options.part else options.output,
        tokenizer=options.tokenizer,
        eod=options.eod,
        front_tokens=options.front_tokens,
        format=Format(options.format) if options.format else None,
        read=reading(options),
        max_bad=options.max_bad,
        max_lost=options.max_lost,
        ranks=tokenizer_kind(options),
        restart=options.restart,
        part=options.part,
    )
    world = mpi.join_world()
    if world is None:
        pool = ProcessPool(options.workers)
        try:
            _print_summary(build_index(request, pool, _print_notice), request)
        finally:
            pool.close()
        return

    def check() -> None:
        if options.workers is not None:
            raise UsageError("--workers and MPI ranks exclude each other: the ranks are the workers")
        check_request(request)

    mpi.agree(world, check)
    if world.rank > 0:
        mpi.serve(world, request.folder)
    ranks = mpi.MpiPool(world, request.folder)
    try:
        summary = build_index(request, ranks, _print_notice)
    except WorkerError as error:
        _print_notice(f"error: {error}")
        mpi.abort(world, error.exit_code)
    except MegazhError as error:
        ranks.close(error.exit_code)
        raise
    except KeyboardInterrupt:
        _print_notice("interrupted; finished pieces are kept: run the same command again to continue")
        mpi.abort(world, INTERRUPTED)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        mpi.abort(world, 1)
    ranks.close()
    _print_summary(summary, request)


def _print_notice(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _print_summary(summary: "Summary", request: "Request") -> None:
    from megazh.progress import duration

    data = summary.metadata
    if summary.already_complete:
        print(f"{request.output}: complete already, from the same input; nothing to do")
        return
    size = sum(source.bytes for source in data.sources)
    workers = "1 process" if summary.workers == 1 else f"{summary.workers} workers"
    rows: list[tuple[str, Any]] = [
        ("index", f"{request.output}.bin, .idx ({data.dtype})"),
        ("documents", f"{data.documents:,}"),
        ("tokens", f"{data.tokens:,}"),
        ("text", f"{data.text_bytes:,} bytes, {data.text_bytes / max(data.tokens - data.documents, 1):.2f} per token"),
        ("empty", f"{data.empty_documents:,} documents without text, left out"),
        ("rejected", _rejected(summary, request)),
        ("time", f"{duration(summary.seconds)}, {size / 1e6 / summary.seconds:.1f} MB/s of input, {workers}"),
        ("encoder", f"{summary.encoder}, {summary.samples_checked} documents checked against the reference"),
        ("lost", _lost(data)),
        ("decoded", summary.round_trip.describe()),
    ]
    if summary.pieces_kept:
        rows.append(("resumed", f"{summary.pieces_kept} of {summary.pieces} pieces were there from before"))
    for name, value in rows:
        print(f"{name:<10} {value}")


def _lost(data: "Metadata") -> str:
    found = data.coverage
    if found is None or not found.lost_characters:
        return "0 characters"
    return (
        f"{found.lost_characters:,} of {found.characters:,} characters ({found.share:.3%}) have no token; "
        f"{found.unknown_tokens:,} unknown tokens"
    )


def _rejected(summary: "Summary", request: "Request") -> str:
    rejected = summary.metadata.rejected
    if not rejected.total:
        return "0"
    reasons = ", ".join(f"{reason} {number}" for reason, number in rejected.reasons.items())
    return f"{rejected.total:,} ({reasons}): {request.output}.rejected.jsonl"


def _inspect(options: argparse.Namespace) -> None:
    from megazh.index.check import inspect_index

    for line in inspect_index(options.prefix, options.document, options.tokens):
        print(line)


def _verify(options: argparse.Namespace) -> None:
    from megazh.index.check import verify_index

    for prefix in options.prefix:
        print(f"{prefix}: {verify_index(prefix)}")


def _merge(options: argparse.Namespace) -> None:
    from megazh.index.merge import merge_indexes

    metadata = merge_indexes(options.prefix, Path(options.output))
    print(f"{options.output}: {metadata.documents:,} documents, {metadata.tokens:,} tokens")


def _adopt(options: argparse.Namespace) -> None:
    from megazh.index.adopt import adopt_index

    ranks = tokenizer_kind(options)
    metadata = adopt_index(options.prefix, options.tokenizer, options.eod, options.front_tokens, ranks)
    print(f"{options.prefix}: {metadata.documents:,} documents, {metadata.tokens:,} tokens of {metadata.dtype}")
    print(f"written beside it: .json, .docs and {metadata.tokenizer.file}; use it like an index of megazh")
