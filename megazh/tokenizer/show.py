"""Description of a tokenizer, and of the tokens that it makes of a text."""

from collections.abc import Iterator
from pathlib import Path

from megazh.errors import DataError
from megazh.tokenizer.tokenizer import Tokenizer


def show_tokenizer(tokenizer: Tokenizer, file: Path | None, text: str | None, pieces: int) -> Iterator[str]:
    """Lines that describe `tokenizer` and, given a text, its bytes per token and its first `pieces` tokens.

    Args:
        file: a UTF-8 text file, read in place of `text`.

    Raises:
        DataError: the file cannot be read as UTF-8 text.
    """
    pad = "none" if tokenizer.pad_id is None else f"{tokenizer.pad_id} {tokenizer.piece(tokenizer.pad_id)}"
    yield f"tokenizer    {tokenizer.path} ({tokenizer.kind.value})"
    yield f"fingerprint  {tokenizer.fingerprint}"
    yield f"vocabulary   {tokenizer.vocab_size:,}"
    yield f"end          {tokenizer.eod_id} {tokenizer.eod}"
    yield f"padding      {pad}"
    if file is not None:
        try:
            text = file.read_bytes().decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: cannot be read as UTF-8 text: {error}") from None
    if text is None:
        return
    ids = tokenizer.encode(text)
    size = len(text.encode())
    yield f"text         {size:,} bytes, {len(text):,} characters, {len(ids):,} tokens"
    if ids:
        yield f"per token    {size / len(ids):.3f} bytes, {len(text) / len(ids):.3f} characters"
        yield "pieces       " + " | ".join(f"{tokenizer.piece(token_id)}" for token_id in ids[:pieces])
        yield "ids          " + " ".join(map(str, ids[:pieces]))
        if len(ids) > pieces:
            yield f"             … {len(ids) - pieces:,} more (--pieces)"
