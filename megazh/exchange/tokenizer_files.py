"""Tokenizer files of a Hugging Face folder, written so that transformers 4.46.3 and 5.x give the ids of megazh.

They are written by hand, since what transformers 5 saves names a class (`TokenizersBackend`) that transformers 4 does
not know. Two differences to the tokenizer that a model was trained with are meant: nothing is put before or behind a
text, and a control token in a text gives its id, where megazh takes text as text.
"""

import json
from pathlib import Path
from typing import Any

from megazh.errors import DataError, UsageError
from megazh.exchange.families import Family
from megazh.exchange.odd_strings import odd_strings
from megazh.exchange.sentencepiece_json import added_token, sentencepiece_json
from megazh.files import write_atomic
from megazh.tokenizer import Tokenizer
from megazh.tokenizer.control import is_bpe
from megazh.tokenizer.encoders import TokenizerFormat, encode_each
from megazh.tokenizer.hugging_face import JsonTokenizer
from megazh.tokenizer.qwen import QWEN_REGEX

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
VOCAB, MERGES, SPECIAL = "vocab.json", "merges.txt", "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"

OTHERS = "additional_special_tokens"

CHECKED, CHECKED_CONVERTED = 2_000, 20_000
"""Odd strings on which the ids of the written file are compared; more where it was converted to another method."""
_LONG = 100_000  # ids above which transformers 5 takes the tokenizer of a mistral model for a damaged one


def write_tokenizer_files(
    tokenizer: Tokenizer, folder: Path, family: Family, model_max_length: int, chat_template: str | None = None
) -> None:
    """Write the tokenizer files of a model into its folder, and check that they give the same ids.

    Args:
        tokenizer: the tokenizer that the model was trained with.
        folder: the folder, which must exist.
        family: family of the model, which decides the class that reads the files.
        model_max_length: tokens that the model takes at a time.
        chat_template: Jinja template of conversations, where the model has one.

    Raises:
        UsageError: as `tokenizer_settings`.
        DataError: the written tokenizer gives other ids than `tokenizer`.
        WriteError: a file cannot be written.
    """
    settings = tokenizer_settings(tokenizer, family)
    special = _special_tokens(tokenizer, settings)
    text = json.dumps(settings, ensure_ascii=False)
    write_atomic(folder / TOKENIZER, text.encode())
    if _is_qwens(settings):
        model = settings["model"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        _write_json(folder / VOCAB, model["vocab"], indent=None)
        write_atomic(folder / MERGES, "\n".join(["#version: 0.2", *merges, ""]).encode())
    config = _config(settings, special, family, model_max_length)
    if chat_template is not None:
        config["chat_template"] = chat_template
        write_atomic(folder / TEMPLATE, chat_template.encode())
    _write_json(folder / TOKENIZER_CONFIG, config)
    _write_json(folder / SPECIAL, special)
    _check_ids(tokenizer, folder / TOKENIZER, special)


def tokenizer_settings(tokenizer: Tokenizer, family: Family) -> dict[str, Any]:
    """Contents of the `tokenizer.json` that `write_tokenizer_files` writes.

    Raises:
        UsageError: no `tokenizer.json` gives the same ids (see `sentencepiece_json`), or transformers 5 reads it as
            something else in a model of this family.
    """
    if tokenizer.kind is TokenizerFormat.SENTENCEPIECE:
        settings = sentencepiece_json(tokenizer)
    else:
        settings = _as_encoded(json.loads(tokenizer.encoders.file_text()), tokenizer)
    if family is Family.QWEN2 and not _is_qwens(settings):
        raise UsageError(
            f"{tokenizer.path}: its ids would change in a folder of the {family} family: transformers 5 reads all "
            "tokenizers there with Qwen's normalization and regex, which are not those of this one; use a model with "
            "model.qkv_bias=false, which is exported as llama"
        )
    return settings


def exported_fingerprint(tokenizer: Tokenizer) -> str:
    """Fingerprint of the `tokenizer.json` that a tokenizer is exported as; its own where it cannot be exported.

    Tokenizers for which it is equal give the same ids, though their files may have different formats.
    """
    try:
        settings = tokenizer_settings(tokenizer, Family.LLAMA)
        return JsonTokenizer(tokenizer.path, TokenizerFormat.HUGGING_FACE, settings, tokenizer.eod).fingerprint
    except UsageError:
        return tokenizer.fingerprint


def _as_encoded(settings: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """A `tokenizer.json` reduced to what megazh encodes with: nothing cut, padded, put around a text, or drawn."""
    model = {key: value for key, value in settings["model"].items() if key not in ("dropout", "alpha", "nbest_size")}
    if is_bpe(model):
        model |= {"type": "BPE", "dropout": None}
        pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
        if not any(" " in part for pair in pairs for part in pair):
            model["merges"] = [" ".join(pair) for pair in pairs]  # versions of tokenizers below 0.20 read only these
    control = tokenizer.control_ids
    added = [
        {**token, "special": bool(token.get("special")) or token["id"] in control}
        for token in settings.get("added_tokens") or []
    ]
    missing = {tokenizer.eod_id, tokenizer.pad_id} - {token["id"] for token in added}
    added += [added_token(number, token) for token, number in _ids(model).items() if number in missing]
    around = settings.get("post_processor")
    return {
        **settings,
        "model": model,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "post_processor": around if around and around["type"] == "ByteLevel" else None,
        "truncation": None,
        "padding": None,
    }


def _ids(model: dict[str, Any]) -> dict[str, int]:
    vocab = model["vocab"]
    return {piece: number for number, (piece, _) in enumerate(vocab)} if isinstance(vocab, list) else vocab


def _is_qwens(settings: dict[str, Any]) -> bool:
    """Whether a tokenizer is what transformers' `Qwen2Tokenizer` makes of a vocabulary and its merges."""
    model, before = settings["model"], settings.get("pre_tokenizer") or {}
    if not is_bpe(model) or (settings.get("normalizer") or {}).get("type") != "NFC":
        return False
    odd = ("unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback", "ignore_merges")
    if any(model.get(name) for name in odd) or any(token.get("normalized") for token in settings["added_tokens"]):
        return False
    steps = before.get("pretokenizers") or []
    if len(steps) != 2 or steps[0]["type"] != "Split" or steps[1]["type"] != "ByteLevel":
        return False
    split = {"pattern": {"Regex": QWEN_REGEX}, "behavior": "Isolated", "invert": False}
    level = {"add_prefix_space": False, "use_regex": False}
    return split.items() <= steps[0].items() and level.items() <= steps[1].items()


def _special_tokens(tokenizer: Tokenizer, settings: dict[str, Any]) -> dict[str, Any]:
    """The named control tokens, as in `special_tokens_map.json`."""
    named = {token["id"]: token["content"] for token in settings["added_tokens"] if token["special"]}
    eos = named[tokenizer.eod_id]
    special: dict[str, Any] = {
        "eos_token": eos,
        "pad_token": eos if tokenizer.pad_id is None else named[tokenizer.pad_id],
    }
    written = {number: token for token, number in _ids(settings["model"]).items()} | named
    if tokenizer.unk_id is not None:
        special["unk_token"] = written[tokenizer.unk_id]
    others = [content for content in named.values() if content not in special.values()]
    return {**special, OTHERS: others}


def _config(settings: dict[str, Any], special: dict[str, Any], family: Family, length: int) -> dict[str, Any]:
    """Contents of `tokenizer_config.json`."""
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    config = {
        # transformers 5 takes Qwen's class for each tokenizer of a qwen2 model, whatever is written here.
        "tokenizer_class": "Qwen2Tokenizer" if family is Family.QWEN2 else "PreTrainedTokenizerFast",
        "model_max_length": length,
        "bos_token": None,
        **special,
        "added_tokens_decoder": {
            str(token["id"]): {flag: token.get(flag, False) for flag in flags} for token in settings["added_tokens"]
        },
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # what `generate` takes
    }
    if family is Family.QWEN2:
        config["add_prefix_space"] = False
    if family is Family.MISTRAL and len(_ids(settings["model"])) > _LONG:
        config["fix_mistral_regex"] = False  # otherwise transformers 5 warns that ids would be wrong
    return config


def _check_ids(tokenizer: Tokenizer, path: Path, special: dict[str, Any]) -> None:
    """Compare the ids of a written file, as transformers would ask for them, with those of the tokenizer."""
    from tokenizers import Tokenizer as Library

    control = [tokenizer.piece(token_id) for token_id in tokenizer.control_ids]
    control += [*(token for name, token in special.items() if name != OTHERS), *special[OTHERS]]
    count = CHECKED_CONVERTED if tokenizer.kind is TokenizerFormat.SENTENCEPIECE else CHECKED
    texts = odd_strings(tokenizer, count, control)
    expected = encode_each(tokenizer.encoders.reference(), texts)
    library = Library.from_file(str(path))
    for text, ids, found in zip(texts, expected, library.encode_batch(texts), strict=True):
        if found.ids != ids:
            raise DataError(
                f"{path}: gives other ids than {tokenizer.path}: {text!r} is {found.ids[:20]} instead of {ids[:20]}; "
                "this is a fault of megazh, or of the installed version of tokenizers: please report it"
            )


def _write_json(path: Path, values: dict[str, Any], indent: int | None = 2) -> None:
    write_atomic(path, (json.dumps(values, ensure_ascii=False, indent=indent) + "\n").encode())
