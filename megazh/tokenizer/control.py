"""Control tokens: which tokens text must never give, and how an encoder is kept from giving them.

Text is always ordinary text. Where a library would turn the text of a control token into its id (an added word that is
not `"special"`, a token that stands in a vocabulary of whole words, dropout or sampling besides), the encoder gets a
copy of the tokenizer in which the control tokens cannot be reached; no other id changes.
"""

import hashlib
import re
from collections.abc import Collection, Iterable
from typing import Any

END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "<|end▁of▁sentence|>", "<eos>", "</s>", "[EOS]", "[SEP]")
"""End-of-document tokens that are found without `--eod`, the first one before the others."""
PAD_TOKENS = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>")
_OTHERS = (
    "<s>",
    "<bos>",
    "<unk>",
    "<mask>",
    "<|unk|>",
    "<|im_start|>",
    "<|im_end|>",
    "[CLS]",
    "[UNK]",
    "[MASK]",
    "[BOS]",
)
KNOWN = frozenset((*END_TOKENS, *PAD_TOKENS, *_OTHERS))
"""Control tokens that are known by name, also where a vocabulary holds them like words."""

_BRACKETS = re.compile(r"(?!<0x[0-9A-Fa-f]{2}>)<[^<>\s]+>|\[[^\[\]\s]+\]|<[|｜].*[|｜]>")


def looks_like_control(token: str) -> bool:
    """Whether a token is written as control tokens are: in angle or square brackets."""
    return token in KNOWN or _BRACKETS.fullmatch(token) is not None


def needs_plain_copy(settings: dict[str, Any], hidden: Collection[str]) -> bool:
    """Whether the libraries, given the `tokenizer.json` as it is, could take an id of `hidden` from text, or draw.

    They take special tokens as text, but not other added words, nor words of the model's own vocabulary.
    """
    model = settings["model"]
    if _draws(model) or any(
        token["content"] in hidden and not token.get("special") for token in settings.get("added_tokens") or []
    ):
        return True
    vocab = model["vocab"]
    if isinstance(vocab, list):
        return any(piece in hidden for piece, _ in vocab)
    inside = {token for token in hidden if token in vocab}
    if not inside or not is_bpe(model):
        return bool(inside)
    if model.get("ignore_merges") or any(len(token) == 1 for token in inside):
        return True
    return any(merged in inside for _, _, merged in _merges(model))


def plain_copy(settings: dict[str, Any], hidden: Collection[str]) -> dict[str, Any]:
    """A copy of a `tokenizer.json` that encodes as the original does, but never gives an id of `hidden`, nor draws.

    Ids stay as they are: hidden tokens keep their places in the vocabulary under names that no text has.
    """
    model = {key: value for key, value in settings["model"].items() if key not in ("dropout", "alpha", "nbest_size")}
    if is_bpe(model):
        model["dropout"] = None
    renamed = {token: _hidden_name(token) for token in hidden}
    vocab = model["vocab"]
    if isinstance(vocab, list):
        model["vocab"] = [[renamed.get(piece, piece), score] for piece, score in vocab]
    else:
        model["vocab"] = {renamed.get(token, token): number for token, number in vocab.items()}
    if model.get("unk_token") in renamed and model["unk_token"] in vocab:
        model["unk_token"] = renamed[model["unk_token"]]
    if "merges" in model:
        gone = {token for token in hidden if token in vocab}
        model["merges"] = [
            [first, second] for first, second, merged in _merges(model) if gone.isdisjoint((first, second, merged))
        ]
    added = [token for token in settings.get("added_tokens") or [] if token["content"] not in renamed]
    return {
        **settings,
        "model": model,
        "added_tokens": added,
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }


def is_bpe(model: dict[str, Any]) -> bool:
    """Whether the model of a `tokenizer.json` is BPE; old files do not name its type."""
    return bool(model["type"] == "BPE") if "type" in model else "merges" in model


def _draws(model: dict[str, Any]) -> bool:
    """Whether the model draws at random: BPE dropout, Unigram sampling."""
    return bool(model.get("dropout") or model.get("alpha") or model.get("nbest_size"))


def drawing_settings(model: dict[str, Any]) -> list[str]:
    """Settings of the model that draw at random, as `name value`."""
    return [f"{name} {model[name]}" for name in ("dropout", "alpha", "nbest_size") if model.get(name)]


def _merges(model: dict[str, Any]) -> Iterable[tuple[str, str, str]]:
    """The merges of a BPE, written as "a b" or as ["a", "b"], each with the token that it makes."""
    prefix = model.get("continuing_subword_prefix") or ""
    for pair in model.get("merges") or []:
        first, second = pair.split(" ", 1) if isinstance(pair, str) else pair
        yield first, second, first + second.removeprefix(prefix)


def _hidden_name(token: str) -> str:
    return f"\U0010fffd{hashlib.sha256(token.encode()).hexdigest()}\U0010fffd"


def read_model(data: bytes) -> Any:
    """The `ModelProto` in a SentencePiece model; its `pieces` have `piece`, `score` and `type`."""
    from sentencepiece import sentencepiece_model_pb2

    made: Any = sentencepiece_model_pb2  # its classes exist only at run time
    return made.ModelProto.FromString(data)


def plain_model(data: bytes, hidden: Collection[str]) -> bytes:
    """A copy of a SentencePiece model in which the pieces `hidden` are control pieces, which no text gives."""
    model = read_model(data)
    for piece in model.pieces:
        if piece.piece in hidden:
            piece.type = piece.CONTROL
    written: bytes = model.SerializeToString()
    return written
