"""`generation_config.json` of a Hugging Face folder: where texts end, and how tokens are drawn by default."""

import json
from pathlib import Path
from typing import Any

from megazh.errors import DataError, UsageError
from megazh.exchange.hf_config import CONFIG
from megazh.tokenizer import Tokenizer

GENERATION = "generation_config.json"


def generation_config(tokenizer: Tokenizer, chat_end: str | None = None) -> dict[str, Any]:
    """The values of `generation_config.json`, with the defaults of `megazh sample` for drawing.

    Texts end at the end-of-document token. Those of a chat model end at the token that ends a turn as well, which comes
    first then, since some programs read one id only.

    Args:
        tokenizer: the tokenizer of the model.
        chat_end: control token that ends a turn, such as `<|im_end|>`; None for a base model.

    Raises:
        UsageError: the tokenizer has no such control token.
    """
    end: int | list[int] = tokenizer.eod_id
    if chat_end is not None:
        turn = tokenizer.control_id(chat_end)
        if turn is None:
            raise UsageError(f"{tokenizer.path}: has no control token {chat_end!r}, which would end a turn of a chat")
        if turn != tokenizer.eod_id:
            end = [turn, tokenizer.eod_id]
    return {
        "eos_token_id": end,
        "pad_token_id": tokenizer.eod_id if tokenizer.pad_id is None else tokenizer.pad_id,
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 50,
        "top_p": 0.95,
    }


def end_ids(folder: Path) -> frozenset[int] | None:
    """Token ids at which the texts of a model end, by its generation_config.json, else by its config.json.

    Returns:
        The ids; None where neither file has any.

    Raises:
        DataError: a file is damaged, or `eos_token_id` is no id and no list of ids.
    """
    for path in (folder / GENERATION, folder / CONFIG):
        try:
            value = json.loads(path.read_bytes()).get("eos_token_id")
        except FileNotFoundError:
            continue
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise DataError(f"{path}: damaged: {error}") from None
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(each) is int and each >= 0 for each in ids):
            raise DataError(f"{path}: eos_token_id: expected an id or a list of ids, found {value!r}")
        if ids:
            return frozenset(ids)
    return None
