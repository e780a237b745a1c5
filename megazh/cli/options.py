"""Command-line options of several commands, and the types of their values.

Modules that are slow to import are imported in the functions that need them, so that `--help` is quick.
"""

import argparse
import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megazh.corpus.formats import Format
from megazh.errors import UsageError, WriteError

if TYPE_CHECKING:
    from megazh.corpus.options import ReadOptions
    from megazh.model.sampling import SamplingOptions
    from megazh.tokenizer.tokenizer import RankKind

_SEEDS = 1 << 32
_WRONG_PATH = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)
Subparsers = Any  # argparse has no public name for what add_subparsers returns


def add_command(below: Subparsers, name: str, what: str, examples: str) -> argparse.ArgumentParser:
    """Add a command below `below`, with a one-line description and examples for `--help`; returns its parser."""
    return below.add_parser(
        name, help=what, description=what, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def count(text: str) -> int:
    """Parse a whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text}")
    return number


def run_folder(path: Path) -> Path:
    """The folder of a run as the user gave it. Raises UsageError where it is a file, such as its config.yaml."""
    if path.is_file():
        raise UsageError(f"{path}: a file, not the folder of a run; give the folder: {path.parent}")
    return path


@contextlib.contextmanager
def writing_output(option: str, path: Path) -> Iterator[None]:
    """Write in the block the file that a user named with an option; its folder has to be there.

    Raises:
        UsageError: the path is a folder, or in none, or nothing may be written there.
    """
    if path.is_dir():
        raise UsageError(f"{option} {path}: a folder; name a file in it")
    if not path.parent.is_dir():
        raise UsageError(f"{option} {path}: {path.parent} is no folder; make it first, or give another file")
    try:
        yield
    except WriteError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in _WRONG_PATH:
            raise UsageError(f"{option} {error}") from None
        raise


def amount(text: str) -> int:
    """Parse a number of tokens or bytes: 1500000, 1.5M, 30B."""
    from megazh.config import parse_amount

    try:
        return parse_amount(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def share(text: str) -> float:
    """Parse a share between 0 and 1, or a percentage."""
    try:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"expected a share between 0 and 1, or a percentage, found {text}")
    return number


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Add the options for input files and for the documents in them."""
    from megazh.corpus.options import ReadOptions, TextDocuments

    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        action="extend",
        metavar="FILE",
        help="files, folders or quoted globs: .jsonl .json .csv .tsv .txt .md (also .gz .bz2 .xz .zst) .parquet .arrow",
    )
    parser.add_argument(
        "--format", choices=[format.value for format in Format], help="format of all files (default: by suffix)"
    )
    parser.add_argument(
        "--text-key", default="text", metavar="KEY", help="key or column of the text; a.b is nested (default: text)"
    )
    add_encoding(parser)
    parser.add_argument(
        "--text-documents",
        choices=[end.value for end in TextDocuments],
        default=TextDocuments.FILE.value,
        help="plain text: a document is a whole file, or ends at a blank line (default: file)",
    )
    parser.add_argument(
        "--max-document-bytes",
        type=count,
        default=ReadOptions.max_document_bytes,
        metavar="N",
        help="reject longer documents (default: 64 MB)",
    )


def add_encoding(parser: argparse.ArgumentParser, when: str = "") -> None:
    """Add the option for the encoding of text; `when` begins its help."""
    parser.add_argument(
        "--encoding",
        metavar="NAME",
        help=f"{when}encoding of text, JSON and CSV: gb18030, big5, utf-16 ... (default: utf-8)",
    )


def encoding(options: argparse.Namespace) -> str | None:
    """The value of the option that `add_encoding` adds, as Python names it; None for UTF-8."""
    from megazh.corpus.encodings import normal_encoding

    return normal_encoding(options.encoding) if options.encoding is not None else None


def reading(options: argparse.Namespace) -> "ReadOptions":
    """The values of the options that `add_reading` adds."""
    from megazh.corpus.options import ReadOptions, TextDocuments

    documents = TextDocuments(options.text_documents)
    return ReadOptions(options.text_key, documents, options.max_document_bytes, encoding(options))


def add_tokenizer_kind(parser: argparse.ArgumentParser) -> None:
    """Add the option that says what a rank file belongs to."""
    parser.add_argument(
        "--tokenizer-kind",
        choices=["qwen"],
        help="a rank file (*.tiktoken) that is not Qwen's own: it has Qwen's regex and control tokens",
    )


def tokenizer_kind(options: argparse.Namespace) -> "RankKind | None":
    """The value of the option that `add_tokenizer_kind` adds."""
    from megazh.tokenizer.tokenizer import RankKind

    return RankKind(options.tokenizer_kind) if options.tokenizer_kind else None


def add_launch(parser: argparse.ArgumentParser) -> None:
    """Add the options for recipe, run folder and devices of a run."""
    parser.add_argument("-c", "--config", metavar="RECIPE", help="a name in jobs/recipes/, or the path of a .yaml file")
    parser.add_argument("-g", "--gpus", metavar="IDS", help="GPU ids as nvidia-smi numbers them: 1,2,3 or 0-5")
    parser.add_argument("-n", "--num-gpus", type=count, metavar="N", help="number of GPUs (on the CPU: ranks)")
    parser.add_argument("-p", "--stages", type=count, metavar="N", help="pipeline stages; replicas = GPUs / stages")
    parser.add_argument(
        "-H", "--hostfile", type=Path, metavar="FILE", help="hosts and their slots, as DeepSpeed reads it"
    )
    parser.add_argument(
        "--launcher",
        choices=["auto", "local", "srun", "deepspeed", "mpirun"],
        default="auto",
        help="what starts the ranks (default: auto: deepspeed for several hosts of -H, srun in a Slurm job with a task "
        "per rank or several nodes, else local)",
    )
    parser.add_argument(
        "-r", "--run", type=Path, metavar="RUN", help="run folder (default: runs/RECIPE, or runs/INPUT)"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if torch can use a GPU")
    parser.add_argument(
        "--allow-relayout",
        action="store_true",
        help="with fewer or more GPUs than -n, the recipe or the run's last start has, go on with other stages and "
        "micro-batches that fit; the global batch stays",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print layout, stages, memory and command; start nothing"
    )


def standalone(what: str, examples: str) -> argparse.ArgumentParser:
    """Parser of a tool with a single command."""
    return argparse.ArgumentParser(
        description=what, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_shape(parser: argparse.ArgumentParser) -> None:
    """Add the options for the shape of a sample and for the seed."""
    parser.add_argument("--seq-len", type=count, default=1024, metavar="N", help="tokens per sample (default: 1024)")
    parser.add_argument(
        "--max-docs",
        type=count,
        metavar="N",
        help="most segments per sample, padding included (default: seq-len / 8, at least 16)",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="seed (default: the manifest's)")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the options for sampling tokens."""
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0: greedy (default: 0.8)")
    parser.add_argument(
        "--top-k", type=int, default=50, metavar="K", help="draw among the K most likely tokens; 0: all (default: 50)"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=0.95,
        metavar="P",
        help="draw among the most likely tokens of this total probability (default: 0.95)",
    )
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1 repeats less (default: 1)"
    )
    parser.add_argument(
        "--additive-penalty",
        type=float,
        default=0.0,
        metavar="A",
        help="lower the logit of each token by A where it occurred; fades by --penalty-decay a token (default: 0)",
    )
    parser.add_argument(
        "--penalty-decay", type=float, default=0.98, metavar="D", help="see --additive-penalty (default: 0.98)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed, the same text (default: 0)")


def sampling(options: argparse.Namespace) -> "SamplingOptions":
    """The values of the options that `add_sampling` adds, but for the seed, which is checked here, too."""
    from megazh.model.sampling import SamplingOptions

    if not 0 <= options.seed < _SEEDS:
        raise UsageError(f"--seed {options.seed}: expected a number from 0 to {_SEEDS - 1}")
    return SamplingOptions(
        options.temperature,
        options.top_k,
        options.top_p,
        options.repetition_penalty,
        options.additive_penalty,
        options.penalty_decay,
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the options for the device of a model that writes text."""
    parser.add_argument("--no-graphs", action="store_true", help="on CUDA, launch each kernel by itself (slower)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is a GPU")
