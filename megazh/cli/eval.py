"""`megazh eval`: what a trained model can do with long texts."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megazh.cli.options import Subparsers, add_command, count
from megazh.errors import UsageError

if TYPE_CHECKING:
    from megazh.training.text_model import TextModel

PASSKEY = """examples:
  megazh eval passkey runs/longlora
  megazh eval passkey models/Qwen1.5-0.5B --lengths 1024 2048 --depths 10 50 90 --languages zh --tries 10
  megazh eval passkey runs/longlora --filler novel.txt --json passkey.json

Each prompt hides five digits in filler and ends with the question for them; the greedy answer is right where its first
number is these digits. The same seed asks the same questions."""

POSITION = """examples:
  megazh eval position-loss runs/longlora data_index/books
  megazh eval position-loss runs/longlora books.jsonl --limit 50 --json losses.json
  megazh eval position-loss runs/demo-long stories.txt --bounds 128 256 512

Documents that are shorter than the last bound are left out, so that all ranges are of the same documents. A model that
makes use of a long context has a lower loss in later ranges."""


def add_to(commands: Subparsers) -> None:
    """Add `eval passkey` and `eval position-loss`."""
    parser = commands.add_parser("eval", help="what a trained model can do with long texts")
    below = parser.add_subparsers(metavar="WHAT", required=True)
    passkey = add_command(below, "passkey", "find five digits that are hidden in a long text", PASSKEY)
    _add_model(passkey)
    numbers: dict[str, Any] = {"nargs": "+", "metavar": "N"}
    passkey.add_argument(
        "--lengths",
        type=count,
        default=[1024, 2048, 4096, 8192],
        help="tokens (default: 1024 2048 4096 8192)",
        **numbers,
    )
    passkey.add_argument(
        "--depths",
        type=_percent,
        default=[0, 25, 50, 75, 100],
        help="percent of the filler in front of the digits (default: 0 25 50 75 100)",
        **numbers,
    )
    passkey.add_argument("--languages", nargs="+", choices=["zh", "en"], default=["zh", "en"], help="default: zh en")
    passkey.add_argument("--tries", type=count, default=4, metavar="N", help="questions of each kind (default: 4)")
    passkey.add_argument("--seed", type=int, default=0, metavar="N", help="seed of digits and filler (default: 0)")
    passkey.add_argument(
        "--filler", type=Path, metavar="FILE", help="text to hide them in (default: made-up sentences)"
    )
    passkey.set_defaults(call=_passkey)
    position = add_command(below, "position-loss", "loss by the position of a token in its document", POSITION)
    _add_model(position)
    position.add_argument("data", metavar="DATA", help="PREFIX of an index, or a file or folder of text")
    position.add_argument(
        "--bounds",
        type=count,
        default=[2048, 4096, 8192],
        help="ends of the ranges (default: 2048 4096 8192)",
        **numbers,
    )
    position.add_argument("--limit", type=count, metavar="N", help="take the first N documents (default: all)")
    position.add_argument("--text-key", default="text", metavar="KEY", help="key or column of the text (default: text)")
    position.set_defaults(call=_position_loss)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="run, checkpoint, imported or Hugging Face folder")
    parser.add_argument(
        "--checkpoint", metavar="NAME", help="one of RUN/checkpoints, or its path (default: the newest)"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is a GPU")
    parser.add_argument("--batch-size", type=count, default=1, metavar="N", help="texts at a time (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")


def _percent(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 100:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 100, found {text}")
    return number


def _passkey(options: argparse.Namespace) -> None:
    from megazh.evaluation.answers import greedy_answers
    from megazh.evaluation.filler import Language, filler_of, made_up
    from megazh.evaluation.passkey import as_json, ask, questions, table
    from megazh.training.text_model import open_model

    _check_json(options)
    filler = filler_of(options.filler) if options.filler else made_up
    model = open_model(options.model, options.checkpoint, options.device)
    languages = [Language(name) for name in dict.fromkeys(options.languages)]
    lengths, depths = list(dict.fromkeys(options.lengths)), sorted(set(options.depths))
    asked = questions(model.tokenizer.encode, languages, lengths, depths, options.tries, options.seed, filler)
    total = sum(lengths) * len(languages) * len(depths) * options.tries
    answered = ask(asked, total, greedy_answers(model), options.batch_size)
    _head(options, model)
    for line in table(answered):
        print(line)
    _write_json(options, model, {"seed": options.seed, "tries": options.tries, "questions": as_json(answered)})


def _position_loss(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    from megazh.evaluation.long_documents import long_documents
    from megazh.evaluation.position_loss import position_losses
    from megazh.training.text_model import open_model

    _check_json(options)
    bounds = sorted(set(options.bounds))
    if bounds[0] < 2:
        raise UsageError(f"--bounds {bounds[0]}: the first token has no loss; give at least 2")
    model = open_model(options.model, options.checkpoint, options.device)
    documents = long_documents(options.data, model.tokenizer, bounds[-1], options.limit, options.text_key)
    found = position_losses(model.model, documents.ids, bounds, options.batch_size)
    _head(options, model)
    print(f"{options.data}: {len(documents.ids):,} of {documents.read:,} documents have {bounds[-1]:,} tokens or more")
    print(f"{'positions':>16}{'tokens':>14}{'nats per token':>17}")
    for each in found:
        print(f"{f'{each.begin:,}-{each.end:,}':>16}{each.tokens:>14,}{each.loss:>17.4f}")
    figures = {"data": options.data, "documents": len(documents.ids), "documents_read": documents.read}
    _write_json(options, model, {**figures, "ranges": [asdict(each) for each in found]})


def _head(options: argparse.Namespace, model: "TextModel") -> None:
    """Print which model it is, and the context that it was trained on."""
    print(f"{options.model}: trained on {model.trained_length:,} tokens at a time")


def _check_json(options: argparse.Namespace) -> None:
    """Raises UsageError, before hours of work, where the figures could not be written, or would replace the data."""
    from megazh.writing import check_writable

    path, start = options.json, f"--json {options.json}"
    if path is None:
        return
    if path.exists() and path.suffix.lower() != ".json":
        raise UsageError(f"{start}: exists, and is no .json file; give another name for the figures")
    check_writable(path.parent, "give another file", start)


def _write_json(options: argparse.Namespace, model: "TextModel", figures: dict[str, Any]) -> None:
    from megazh.files import write_atomic

    if options.json is None:
        return
    values = {"model": str(options.model), "trained_length": model.trained_length, **figures}
    write_atomic(options.json, (json.dumps(values, ensure_ascii=False, indent=1) + "\n").encode())
