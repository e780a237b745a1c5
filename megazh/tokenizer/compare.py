"""Whether two tokenizers give every text the same ids, and if not, in what they differ."""

import json
from typing import Any

from megazh.tokenizer.encoders import TokenizerFormat
from megazh.tokenizer.tokenizer import Tokenizer


def tokenizer_difference(one: Tokenizer, other: Tokenizer) -> str:
    """The first difference that decides ids or their meaning, as `one's and other's`; "" if there is none.

    Tokenizers of equal fingerprints are equal. Those of a `tokenizer.json` are also compared in the form in which the
    library itself writes them: files of several of its versions give defaults or leave them out. Paths, the order of
    keys, and what only decoding or padding uses make no difference.
    """
    if one.fingerprint == other.fingerprint:
        return ""
    if (one.kind is TokenizerFormat.SENTENCEPIECE) != (other.kind is TokenizerFormat.SENTENCEPIECE):
        return f"{one.kind} and {other.kind}"
    if one.eod_id != other.eod_id:
        return f"end-of-document token {one.eod!r} ({one.eod_id}) and {other.eod!r} ({other.eod_id})"
    if one.kind is TokenizerFormat.SENTENCEPIECE:
        if one.front_tokens != other.front_tokens:
            return "one with --front-tokens, the other without"
        return f"two SentencePiece models, of {one.vocab_size:,} and {other.vocab_size:,} ids"
    return _json_difference(_canonical(one), _canonical(other))


def _canonical(tokenizer: Tokenizer) -> dict[str, Any]:
    from tokenizers import Tokenizer as HuggingFaceTokenizer

    text = tokenizer.encoders.file_text()
    return _without_offsets(json.loads(HuggingFaceTokenizer.from_str(text).to_str()))


def _without_offsets(value: Any) -> Any:
    """`value` without `trim_offsets`, which changes character offsets but no id."""
    if isinstance(value, dict):
        return {key: _without_offsets(inner) for key, inner in value.items() if key != "trim_offsets"}
    return [_without_offsets(inner) for inner in value] if isinstance(value, list) else value


def _json_difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    tokens = [{token["id"]: token for token in settings["added_tokens"]} for settings in (one, other)]
    for number in sorted(tokens[0].keys() | tokens[1].keys()):
        found = [each.get(number) for each in tokens]
        if found[0] != found[1]:
            return f"added token {number} is {_token(found[0])} and {_token(found[1])}"
    models = [settings["model"] for settings in (one, other)]
    vocabularies = [_vocabulary(model) for model in models]
    if vocabularies[0] != vocabularies[1]:
        sizes = [len(vocabulary) for vocabulary in vocabularies]
        if sizes[0] != sizes[1]:
            return f"vocabularies of {sizes[0]:,} and {sizes[1]:,} tokens"
        token = next(token for token, value in vocabularies[0].items() if vocabularies[1].get(token) != value)
        return (
            f"vocabularies in which {token!r} is {vocabularies[0][token]} and {vocabularies[1].get(token, 'missing')}"
        )
    for name in ("normalizer", "pre_tokenizer"):
        if one.get(name) != other.get(name):
            return f"different '{name}'"
    for name in sorted((models[0].keys() | models[1].keys()) - {"vocab"}):
        values = [model.get(name) or None for model in models]  # null, false and "" all stand for nothing
        if values[0] != values[1]:
            return f"different '{name}'"
    return ""


def _token(token: dict[str, Any] | None) -> str:
    if token is None:
        return "missing"
    flags = [name for name in ("special", "normalized", "lstrip", "rstrip", "single_word") if token.get(name)]
    return f"{token['content']!r} ({', '.join(flags) or 'no flags'})"


def _vocabulary(model: dict[str, Any]) -> dict[str, Any]:
    """Each token with its id, for Unigram with id and score."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        return vocabulary
    return {piece: (number, score) for number, (piece, score) in enumerate(vocabulary)}
