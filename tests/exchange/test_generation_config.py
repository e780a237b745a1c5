"""generation_config.json: where texts of a base model and of a chat model end."""

import json
from pathlib import Path
from typing import Any

import pytest
from textdata import tokenizer_path

from megazh.errors import DataError, UsageError
from megazh.exchange.generation_config import end_ids, generation_config
from megazh.tokenizer import load_tokenizer


def test_a_base_model_ends_with_the_document_and_a_chat_model_with_the_turn_as_well() -> None:
    tokenizer = load_tokenizer(tokenizer_path())
    assert tokenizer.pad_id == 0
    base, chat = generation_config(tokenizer), generation_config(tokenizer, "<|im_end|>")
    assert (base["eos_token_id"], base["pad_token_id"]) == (tokenizer.eod_id, 0)
    assert chat == {**base, "eos_token_id": [3, tokenizer.eod_id]}


def test_a_token_that_is_no_control_token_ends_no_turn() -> None:
    tokenizer = load_tokenizer(tokenizer_path())
    for token in ("<|end|>", "a"):
        with pytest.raises(UsageError, match="has no control token"):
            generation_config(tokenizer, token)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": 7}, {"eos_token_id": 5}, {7}),
        ({"eos_token_id": [7, 5]}, {"eos_token_id": 5}, {7, 5}),
        ({"eos_token_id": None}, {"eos_token_id": 5}, {5}),
        (None, {"eos_token_id": [5]}, {5}),
        (None, {}, None),
        (None, None, None),
    ],
)
def test_where_texts_end(
    tmp_path: Path, generation: dict[str, Any] | None, config: dict[str, Any] | None, expected: set[int] | None
) -> None:
    for name, values in (("generation_config.json", generation), ("config.json", config)):
        if values is not None:
            (tmp_path / name).write_text(json.dumps(values))
    assert end_ids(tmp_path) == expected


@pytest.mark.parametrize("content", ['{"eos_token_id": "</s>"}', '{"eos_token_id": [-1]}', "[]", '{"eos_', "7"])
def test_a_file_that_names_no_ids(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(DataError, match=r"generation_config\.json: (eos_token_id: expected an id|damaged: )"):
        end_ids(tmp_path)
