"""Description of a tokenizer, and of the tokens that it makes of a text."""

from collections.abc import Iterator
from pathlib import Path

from megazh.errors import DataError
from megazh.tokenizer.base import Tokenizer
from megazh.tokenizer.round_trip import RoundTrip


def _token(tokenizer: Tokenizer, token_id: int | None) -> str:
    return "none" if token_id is None else f"{token_id} {tokenizer.piece(token_id)}"


def _decoded(trip: RoundTrip) -> str:
    if trip.differ:
        return f"not to the text: {trip.example}"
    return "to the text as the tokenizer normalizes it" if trip.normalized else "to the text, letter for letter"


def _control(tokenizer: Tokenizer) -> str:
    """The control tokens, which text never gives."""
    ids = sorted(tokenizer.control_ids)
    some = ", ".join(tokenizer.piece(token_id) for token_id in ids[:8])
    return f"{len(ids):,}: {some}{', …' if len(ids) > 8 else ''}"


def show_tokenizer(tokenizer: Tokenizer, file: Path | None, text: str | None, pieces: int) -> Iterator[str]:
    """Lines that describe `tokenizer` and, given a text, its bytes per token and its first `pieces` tokens.

    Args:
        file: a UTF-8 text file, read in place of `text`.

    Raises:
        DataError: the file cannot be read as UTF-8 text.
    """
    yield f"tokenizer    {tokenizer.path} ({tokenizer.kind.value})"
    yield f"fingerprint  {tokenizer.fingerprint}"
    holes = tokenizer.vocab_size - tokenizer.tokens
    yield f"vocabulary   {tokenizer.vocab_size:,} ids" + (f", {holes:,} of them without a token" if holes else "")
    yield f"end          {tokenizer.eod_id} {tokenizer.eod}"
    yield f"padding      {_token(tokenizer, tokenizer.pad_id)}"
    yield f"unknown      {_token(tokenizer, tokenizer.unk_id)}"
    yield f"control      {_control(tokenizer)}"
    yield from tokenizer.notices
    if file is not None:
        try:
            text = file.read_bytes().decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: cannot be read as UTF-8 text: {error}") from None
    if text is None:
        return
    ids = tokenizer.encode(text)
    trip = RoundTrip()
    trip.add(text, ids, tokenizer)
    size = len(text.encode())
    yield f"text         {size:,} bytes, {len(text):,} characters, {len(ids):,} tokens"
    yield f"decoded      {_decoded(trip)}"
    if ids:
        yield f"per token    {size / len(ids):.3f} bytes, {len(text) / len(ids):.3f} characters"
        yield "pieces       " + " | ".join(f"{tokenizer.piece(token_id)}" for token_id in ids[:pieces])
        yield "ids          " + " ".join(map(str, ids[:pieces]))
        if len(ids) > pieces:
            yield f"             … {len(ids) - pieces:,} more (--pieces)"
