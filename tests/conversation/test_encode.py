"""Conversations as ids: exact masks at boundaries, and control tokens that only the template makes."""

import json
from pathlib import Path

import pytest
from textdata import tokenizer_path

from megazh.conversation.conversation import Conversation, Role, Turn
from megazh.conversation.encode import encode, template_for
from megazh.errors import UsageError
from megazh.tokenizer import Tokenizer, load_tokenizer
from megazh.tokenizer.qwen import QWEN_REGEX, byte_alphabet

QWEN = Path(__file__).parents[3] / "shared/data/tokenizers/qwen.tiktoken"


def merging(folder: Path, controls: tuple[str, ...] = ("<|endoftext|>",)) -> Path:
    """A byte-level BPE that merges `:`, `\\n` and `\\n`, as Qwen's does."""
    alphabet = [byte_alphabet()[byte] for byte in range(256)]
    line = byte_alphabet()[ord("\n")]
    merges = [[":", line], [f":{line}", line]]
    vocab = {text: number for number, text in enumerate([*alphabet, *map("".join, merges)])}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": QWEN_REGEX}, "behavior": "Isolated", "invert": False}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    settings = {
        "version": "1.0",
        "added_tokens": [{"id": len(vocab) + at, "content": text, **plain} for at, text in enumerate(controls)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return path


def turns(*texts: str) -> Conversation:
    """Turns of user and assistant in turn."""
    return Conversation(tuple(Turn((Role.USER, Role.ASSISTANT)[at % 2], text) for at, text in enumerate(texts)))


def check_boundary(tokenizer: Tokenizer) -> None:
    """Check the mask where the prompt would merge with the answer."""
    whole = "Human:\n问\nAssistant:\n\n好\n"
    prompt = whole[: whole.index("\n好")]
    joined = tokenizer.encode(whole)
    assert joined[: len(tokenizer.encode(prompt))] != tokenizer.encode(prompt), "the case that a prefix gets wrong"
    template = template_for(tokenizer, "human-assistant")
    found = encode(turns("问", "\n好"), template, tokenizer)
    assert tokenizer.decode(found.ids.tolist()) == f"{whole}<|endoftext|>"
    assert tokenizer.decode(found.ids[found.trained].tolist()) == "\n好\n<|endoftext|>"
    asked = encode(turns("问"), template, tokenizer, for_answer=True)
    assert asked.ids.tolist() == found.ids[~found.trained].tolist() == found.ids[: len(asked)].tolist()


def test_the_mask_is_exact_where_a_prompt_and_its_answer_would_merge(tmp_path: Path) -> None:
    check_boundary(load_tokenizer(merging(tmp_path)))


@pytest.mark.skipif(not QWEN.is_file(), reason="Qwen's ranks are not beside the checkout")
def test_the_mask_is_exact_with_qwens_ranks() -> None:
    check_boundary(load_tokenizer(QWEN))


def test_chatml_with_an_own_tokenizer() -> None:
    tokenizer = load_tokenizer(tokenizer_path())
    template = template_for(tokenizer)
    found = encode(turns("一<|im_end|>", "<|im_start|>二", "三", "四"), template, tokenizer)
    start, end = (
        next(n for n in tokenizer.control_ids if tokenizer.piece(n) == text) for text in ("<|im_start|>", "<|im_end|>")
    )
    assert [found.ids.tolist().count(each) for each in (start, end)] == [4, 4], "none from the text of turns"
    assert tokenizer.decode(found.ids[found.trained].tolist()) == "<|im_start|>二<|im_end|>四<|im_end|>"
    text = "<|im_start|>user\n一<|im_end|><|im_end|>\n<|im_start|>assistant\n<|im_start|>二<|im_end|>\n"
    assert tokenizer.decode(found.ids.tolist()).startswith(text)
    for length in (1, 3):
        texts = ("一<|im_end|>", "<|im_start|>二", "三")[:length]
        asked = encode(turns(*texts), template, tokenizer, for_answer=True)
        assert asked.ids.tolist() == found.ids[: len(asked)].tolist()
        assert found.trained[len(asked)]
        assert not found.trained[len(asked) - 1]


def test_a_tokenizer_without_the_templates_control_tokens_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(merging(tmp_path))
    with pytest.raises(UsageError, match=r"no control token <\|im_start\|>, <\|im_end\|>; take .* human-assistant"):
        template_for(tokenizer, "chatml")
