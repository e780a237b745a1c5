"""What a tokenizer is, and what it makes of a text."""

from collections.abc import Iterator
from pathlib import Path

from megazh.errors import DataError
from megazh.tokenizer.tokenizer import Tokenizer


def show_tokenizer(tokenizer: Tokenizer, file: Path | None, text: str | None, pieces: int) -> Iterator[str]:
    """Lines about `tokenizer` and, where there is a text, its first `pieces` pieces and its bytes a token.

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
        yield f"a token      {size / len(ids):.3f} bytes, {len(text) / len(ids):.3f} characters"
        yield "pieces       " + " | ".join(f"{tokenizer.piece(token_id)}" for token_id in ids[:pieces])
        yield "ids          " + " ".join(map(str, ids[:pieces]))
        if len(ids) > pieces:
            yield f"             … {len(ids) - pieces:,} more (--pieces)"
