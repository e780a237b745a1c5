"""Training of a byte-level BPE tokenizer."""

import contextlib
import hashlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import orjson
from pydantic import ValidationError

from megazh.config import Config
from megazh.corpus.listing import printable
from megazh.corpus.options import ReadOptions
from megazh.corpus.sources import Source
from megazh.errors import DataError, UsageError, WorkerError
from megazh.files import write_atomic
from megazh.progress import Elapsed
from megazh.tokenizer.fit import write_message
from megazh.tokenizer.qwen import CONTROL_TOKENS, QWEN_REGEX
from megazh.tokenizer.sample import Sample, sample_texts

PAD = "<|pad|>"
SAMPLE_BYTES = 64_000_000
"""Input to learn from by default: twice as much gives tokens that hold 0.3 % more text, in twice the time."""
_LONGEST_WORD = 256
"""Characters after which a run of letters, signs or spaces is cut for the training.

The time for a merge grows with the length of the words that hold it. Ordinary text has no words as long as this.
"""
_TICK = 0.2  # seconds between two looks at the training process


class Digits(StrEnum):
    """How a run of digits is split before BPE merges."""

    SINGLE = "single"
    """One token per digit, as in Qwen's regex."""
    TRIPLES = "triples"
    """Up to three digits per token, as in cl100k."""


class Input(Config):
    """An input file, with size and modification time for noticing changes."""

    path: str
    format: str
    size: int
    mtime_ns: int


class Training(Config):
    """Everything that decides the bytes of a trained tokenizer."""

    method: int = 1
    """Version of the sampling and training."""
    vocab_size: int
    digits: str
    sample: int | None
    text_key: str
    text_documents: str
    max_document_bytes: int
    encoding: str | None
    inputs: list[Input]


class _Record(Config):
    """The contents of `OUTPUT.training`, written beside a trained tokenizer."""

    training: Training
    sha256: str
    """SHA-256 of the tokenizer."""


@dataclass(frozen=True)
class Trained:
    """Result of a training."""

    ids: int
    """Number of ids: fewer than were asked for if the text has too few different words."""
    sample: Sample
    """What it was trained on."""


def train_tokenizer(
    sources: Sequence[Source],
    options: ReadOptions,
    output: Path,
    vocab_size: int,
    digits: Digits = Digits.SINGLE,
    sample: int | None = SAMPLE_BYTES,
    record: Training | None = None,
) -> Trained:
    """Train a byte-level BPE with NFC and Qwen's regex, and write it to `output`, a `tokenizer.json`.

    `<|pad|>`, `<|endoftext|>`, `<|im_start|>` and `<|im_end|>` are ids 0 to 3; the 256 bytes follow. Equal arguments
    and files give equal bytes, on any number of cores. The merges are computed in a process of its own, which is
    killed if this one is interrupted.

    Args:
        sources: training text.
        options: how documents in `sources` are found.
        output: path of the `tokenizer.json`; replaced at the end if it exists.
        vocab_size: number of ids, control tokens included.
        digits: how runs of digits are split.
        sample: bytes of input to learn from, spread evenly over all sources (`sample_texts`); None for all.
        record: written to `record_path(output)`, for `trained_already`.

    Raises:
        UsageError: `vocab_size` is too small for the 256 bytes and the control tokens.
        DataError: the sources hold no text, or one is damaged.
        WorkerError: the process that computes the merges died.
    """
    control_tokens = [PAD, *CONTROL_TOKENS]
    minimum = 256 + len(control_tokens)
    if vocab_size < minimum:
        raise UsageError(
            f"--vocab-size {vocab_size}: 256 bytes and {len(control_tokens)} control tokens need at least {minimum}"
        )
    read, texts = sample_texts(sources, options, sample)
    settings = {
        "vocab_size": vocab_size,
        "control_tokens": control_tokens,
        "regex": QWEN_REGEX if digits is Digits.SINGLE else QWEN_REGEX.replace(r"|\p{N}|", r"|\p{N}{1,3}|"),
        "longest_word": _LONGEST_WORD,
    }
    answer = _fit(settings, texts)
    if not read.text_bytes:
        raise DataError("the input holds no text to train a tokenizer on")
    data = answer["tokenizer"].encode()
    if record is not None:  # first: if the tokenizer does not follow, the record fits no file
        content = _Record(training=record, sha256=hashlib.sha256(data).hexdigest()).model_dump_json(indent=1)
        write_atomic(record_path(output), f"{content}\n".encode())
    write_atomic(output, data)
    return Trained(answer["ids"], read)


def describe_training(
    sources: Sequence[Source], options: ReadOptions, vocab_size: int, digits: Digits, sample: int | None
) -> Training:
    """What decides the result of `train_tokenizer` with these arguments."""
    return Training(
        vocab_size=vocab_size,
        digits=digits.value,
        sample=sample,
        text_key=options.text_key,
        text_documents=options.text_documents.value,
        max_document_bytes=options.max_document_bytes,
        encoding=options.encoding,
        inputs=[_input(source) for source in sources],
    )


def _input(source: Source) -> Input:
    status = source.path.stat()
    return Input(
        path=printable(str(source.path)), format=source.format.value, size=status.st_size, mtime_ns=status.st_mtime_ns
    )


def trained_already(output: Path, training: Training) -> bool:
    """Whether `output` is the result of this very training.

    Raises:
        UsageError: `output` is another file; the message says how it differs.
    """
    if not output.exists():
        return False
    remedy = "--restart replaces it (it stays until the new one is complete), or choose another --output"
    try:
        record = _Record.model_validate_json(record_path(output).read_bytes())
    except (FileNotFoundError, ValidationError):
        raise UsageError(f"{output}: a tokenizer of unknown origin is there; {remedy}") from None
    if hashlib.sha256(output.read_bytes()).hexdigest() != record.sha256:
        raise UsageError(f"{output}: a tokenizer that was changed after its training is there; {remedy}")
    for key in Training.model_fields:
        was, now = getattr(record.training, key), getattr(training, key)
        if was != now:
            how = f"{key} {was}, not {now}" if key != "inputs" else f"other input ({_changed(was, now)})"
            raise UsageError(f"{output}: a tokenizer trained with {how} is there; {remedy}")
    return True


def _changed(before: list[Input], now: list[Input]) -> str:
    """The first input in which two lists differ."""
    old, new = ({file.path: file for file in files} for files in (before, now))
    path = next(path for path in sorted(old.keys() | new.keys()) if old.get(path) != new.get(path))
    return f"{path} {'is new' if path not in old else 'is not given now' if path not in new else 'has changed since'}"


def record_path(output: Path) -> Path:
    """Path of the record of the training of `output`."""
    return Path(f"{output}.training")


def _fit(settings: dict[str, Any], texts: Iterator[list[str]]) -> dict[str, Any]:
    """The answer of the process in `fit.py`, to which the texts are passed on while they are read."""
    # Another session: Ctrl-C at the terminal reaches only this process. An encoder may have switched off the
    # library's threads for this process; RAYON_NUM_THREADS still limits them.
    process = subprocess.Popen(
        [sys.executable, "-P", str(Path(__file__).with_name("fit.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "true"},
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with contextlib.suppress(BrokenPipeError):  # it has ended early: its answer says why, if it could give one
            write_message(process.stdin, settings)
            for batch in texts:
                if batch:
                    write_message(process.stdin, batch)
            write_message(process.stdin, [])
            process.stdin.flush()
        with Elapsed("merging") as elapsed:
            while not select.select([process.stdout], [], [], _TICK)[0]:
                elapsed.tick()
        raw = process.stdout.read()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    try:
        answer = orjson.loads(raw)
    except json.JSONDecodeError:
        raise WorkerError(
            "the process that trains the tokenizer died (killed, or out of memory?); nothing was written: run the "
            "command again, with a smaller --sample if memory is short"
        ) from None
    if "error" in answer:
        raise DataError(f"the tokenizer cannot be trained on this text: {answer['error']}")
    return answer
