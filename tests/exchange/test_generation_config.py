"""generation_config.json: where texts of a base model and of a chat model end."""

import pytest
from textdata import tokenizer_path

from megazh.errors import UsageError
from megazh.exchange.generation_config import generation_config
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
