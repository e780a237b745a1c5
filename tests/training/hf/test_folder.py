"""The files beside the weights of a checkpoint: where texts end, of a base model and of one that chats."""

import json
from pathlib import Path

import pytest
from made_runs import write_recipe
from textdata import tokenizer_path

from megazh.tokenizer import load_tokenizer
from megazh.training.hf.folder import write_folder
from megazh.training.recipe import load_recipe


@pytest.mark.parametrize(
    ("chat_end", "pieces"), [(None, ["<|endoftext|>"]), ("<|im_end|>", ["<|im_end|>", "<|endoftext|>"])]
)
def test_texts_end_at_the_end_of_an_answer_as_well(tmp_path: Path, chat_end: str | None, pieces: list[str]) -> None:
    tokenizer = load_tokenizer(tokenizer_path())
    write_folder(tmp_path, load_recipe(write_recipe(tmp_path / "mini.yaml")), tokenizer, "float32", chat_end)
    for name in ("config.json", "generation_config.json"):
        ends = json.loads((tmp_path / name).read_text())["eos_token_id"]
        assert [tokenizer.piece(each) for each in (ends if isinstance(ends, list) else [ends])] == pieces
