"""A SentencePiece model as a `tokenizer.json`, for the models of which both give the same ids."""

from collections.abc import Iterator
from typing import Any

from megazh.errors import UsageError
from megazh.tokenizer.base import SPACE, Tokenizer
from megazh.tokenizer.control import plain_model, read_model
from megazh.tokenizer.sentencepiece_model import FRONT_TOKENS

_BPE = 2  # trainer_spec.model_type


def sentencepiece_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Contents of a `tokenizer.json` that encodes as a SentencePiece model does.

    SentencePiece merges the two neighbours whose joint piece has the best score; a list of merges in the order of these
    scores does the same. The method and the normalizer are those of `LlamaConverter` in transformers.

    Raises:
        UsageError: the model has something for which the two libraries give other ids; the message names it.
    """
    source = tokenizer.encoders
    model = read_model(plain_model(source.path.read_bytes(), source.hidden or ()))
    if reasons := list(_inexact(model)):
        raise UsageError(
            f"{source.path}: cannot be written as a tokenizer.json with the same ids: it has {', '.join(reasons)}; "
            "train on the tokenizer.json that its makers publish instead"
        )
    names = [piece.piece for piece in model.pieces]
    front = [token.replace("<", "<front_") if token in names else token for token in FRONT_TOKENS[: source.shift]]
    unknown = model.trainer_spec.unk_piece
    vocab = {name: number for number, name in enumerate([*front, *names])}
    named = {tokenizer.eod_id, tokenizer.pad_id, tokenizer.unk_id}
    decoders: list[dict[str, Any]] = [_replace(SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    normalizers = [_replace(" ", SPACE)]
    if model.normalizer_spec.add_dummy_prefix:
        normalizers.insert(0, {"type": "Prepend", "prepend": SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(number, name) for name, number in vocab.items() if number in named],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": model.trainer_spec.byte_fallback,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": _merges(model),
        },
    }


def added_token(number: int, content: str) -> dict[str, Any]:
    """An entry of `added_tokens` for a control token."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": content, **plain, "special": True}


def _inexact(model: Any) -> Iterator[str]:
    """What in a model has no equal in a `tokenizer.json`."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type != _BPE:
        yield "no BPE merges (a Unigram model breaks ties between equally likely splits in another way)"
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        yield "a normalization of its own"
    if not normalizer.escape_whitespaces or trainer.treat_whitespace_as_suffix:
        yield "spaces that are not written as ▁ before a word"
    if any(piece.type in (piece.USER_DEFINED, piece.UNUSED) for piece in model.pieces):
        yield "user-defined or unused pieces"


def _merges(model: Any) -> list[list[str]]:
    """All ways to put an ordinary piece together from two others, the best score first."""
    ordinary = {piece.piece: piece.score for piece in model.pieces if piece.type == piece.NORMAL}
    ranked = [
        (-score, number, name[:at], name[at:])
        for number, (name, score) in enumerate(ordinary.items())
        for at in range(1, len(name))
        if name[:at] in ordinary and name[at:] in ordinary
    ]
    return [[first, second] for _, _, first, second in sorted(ranked)]


def _replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}
