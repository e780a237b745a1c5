"""Training of a byte-level BPE tokenizer."""

from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path

from megazh.corpus.options import ReadOptions
from megazh.corpus.pieces import cut, piece_size, piece_sources
from megazh.corpus.reader import read_piece
from megazh.corpus.sources import Source
from megazh.errors import DataError, UsageError
from megazh.files import write_atomic
from megazh.progress import Progress
from megazh.tokenizer.qwen import CONTROL_TOKENS, QWEN_REGEX

PAD = "<|pad|>"


class Digits(StrEnum):
    """How a run of digits is split before BPE merges."""

    SINGLE = "single"
    """One token per digit, as in Qwen's regex."""
    TRIPLES = "triples"
    """Up to three digits per token, as in cl100k."""


def train_tokenizer(
    sources: Sequence[Source],
    options: ReadOptions,
    output: Path,
    vocab_size: int,
    digits: Digits = Digits.SINGLE,
    max_bytes: int | None = None,
) -> int:
    """Train a byte-level BPE with NFC and Qwen's regex, and write it to `output`, a `tokenizer.json`.

    `<|pad|>`, `<|endoftext|>`, `<|im_start|>` and `<|im_end|>` are ids 0 to 3; the 256 bytes follow.

    Args:
        sources: training text.
        options: how documents in `sources` are found.
        output: path of the `tokenizer.json`; replaced if it exists.
        vocab_size: number of ids, control tokens included.
        digits: how runs of digits are split.
        max_bytes: stop reading after this many bytes of text; by default, all text is read.

    Returns:
        The number of ids: fewer than `vocab_size` if the text has too few different words.

    Raises:
        UsageError: `vocab_size` is too small for the 256 bytes and the control tokens.
        DataError: the sources hold no text, or one is damaged.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    specials = [PAD, *CONTROL_TOKENS]
    minimum = 256 + len(specials)
    if vocab_size < minimum:
        raise UsageError(
            f"--vocab-size {vocab_size}: 256 bytes and {len(specials)} control tokens need at least {minimum}"
        )
    regex = QWEN_REGEX if digits is Digits.SINGLE else QWEN_REGEX.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    seen = 0

    def texts() -> Iterator[list[str]]:
        nonlocal seen
        with Progress("reading", sum(source.size for source in sources)) as progress:
            for piece in cut(sources, options, piece_size(sources)):
                for batch in read_piece(piece_sources(sources, piece, options), piece, options):
                    seen += sum(len(text.encode()) for text in batch.texts)
                    yield batch.texts
                    if max_bytes is not None and seen >= max_bytes:
                        return
                progress.advance(piece.weight)

    tokenizer.train_from_iterator(texts(), trainer)
    if not seen:
        raise DataError("the input holds no text to train a tokenizer on")
    write_atomic(output, tokenizer.to_str(pretty=False).encode())
    return tokenizer.get_vocab_size()
