"""Passkey questions: their length, where the digits stand, and right answers of a made-up model, counted."""

import itertools
import random
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from decoders import small

from megazh.errors import DataError, UsageError
from megazh.evaluation.answers import greedy_answers
from megazh.evaluation.filler import Language, filler_of, made_up
from megazh.evaluation.passkey import ANSWER_TOKENS, Answered, Question, as_json, ask, question, questions, table
from megazh.model.decoder import Decoder
from megazh.tokenizer import load_tokenizer
from megazh.training.text_model import TextModel

ZH, EN = Language.CHINESE, Language.ENGLISH


def letters(text: str) -> list[int]:
    """A tokenizer with a token for each character."""
    return [ord(letter) for letter in text]


def pairs(text: str) -> list[int]:
    """A tokenizer of pairs of characters, so that sentences together have fewer tokens than each by itself."""
    return [0] * -(-len(text) // 2)


@pytest.mark.parametrize("encode", [letters, pairs])
@pytest.mark.parametrize("language", list(Language))
@pytest.mark.parametrize("length", [400, 1024, 4096])
def test_length_and_depth(encode: object, language: Language, length: int) -> None:
    encode = letters if encode is letters else pairs
    for depth in (0, 30, 100):
        found = question(encode, language, length, depth, 7, 0)
        assert found.tokens == len(encode(found.prompt))
        assert length - 120 < found.tokens + ANSWER_TOKENS <= length, "short of it by a sentence at most"
        assert re.findall(r"\d+", found.prompt) == [found.key, found.key], "filler has no digits"
        assert len(found.key) == 5
        begin, end = found.prompt.index("\n") + 1, found.prompt.rindex("\n")
        place = (found.prompt.index(found.key) - begin) / (end - begin)
        assert place == pytest.approx(depth / 100, abs=0.25 if length == 400 else 0.06)
    assert found.prompt.endswith("密码是" if language is ZH else "The pass key is")


def test_a_seed_gives_the_same_questions() -> None:
    def made(seed: int) -> list[Question]:
        return list(questions(letters, [ZH, EN], [900, 600], [0, 100], 2, seed))

    assert made(1) == made(1)
    keys = [each.key for each in made(1)]
    assert len(set(keys)) == len(keys) == 16
    assert set(keys).isdisjoint(each.key for each in made(2))
    assert [each.length for each in made(1)] == [600] * 8 + [900] * 8


def test_too_short() -> None:
    with pytest.raises(
        UsageError, match=r"--lengths 100: the question alone has 2\d\d tokens, and .*; give 2\d\d or more"
    ):
        question(letters, EN, 100, 0, 0, 0)


def answered(answer: str, key: str = "12345") -> Answered:
    return Answered(Question(ZH, 100, 0, key, "", 1), answer)


def test_the_first_number_counts_and_has_to_be_whole() -> None:
    assert all(answered(text).right for text in ("12345。", " 12345", "：12345，99999", "12345是密码"))
    assert not any(
        answered(text).right for text in ("", "一二三四五", "123456", "1234", "99999 12345", "012345", "１２３４５")
    )


def test_the_table_counts_right_answers() -> None:
    """A model that finds Chinese keys of short texts, English keys at the end, and nothing else."""
    batches: list[int] = []

    def answer(prompts: Sequence[str]) -> list[str]:
        batches.append(len(prompts))
        return [_found(prompt) for prompt in prompts]

    def _found(prompt: str) -> str:
        key = re.findall(r"\d+", prompt)[0]
        at_end = prompt.index(key) > 0.9 * len(prompt) - 150
        return f" {key}." if ("密码" in prompt and len(prompt) < 700) or ("pass key" in prompt and at_end) else " 00000"

    asked = questions(letters, [ZH, EN], [600, 1200], [0, 100], 3, 0)
    found = ask(asked, 3 * 2 * 2 * 1800, answer, batch_size=5)
    assert batches == [5, 5, 5, 5, 4]
    assert [line.split() for line in table(found)] == [
        ["zh,", "depth", "0", "%", "100", "%", "all"],
        ["600", "3/3", "3/3", "6/6"],
        ["1,200", "0/3", "0/3", "0/6"],
        ["en,", "depth", "0", "%", "100", "%", "all"],
        ["600", "0/3", "3/3", "3/6"],
        ["1,200", "0/3", "3/3", "3/6"],
    ]
    first = as_json(found)[0]
    assert first == {
        "language": "zh", "length": 600, "depth": 0, "key": first["key"], "tokens": first["tokens"],
        "answer": f" {first['key']}.", "right": True,
    }  # fmt: skip


def test_filler_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "novel.txt"
    path.write_text("第一句。第二句！\n\nThe third. 甲\n" + "长" * 500)
    found = list(itertools.islice(filler_of(path)(ZH, random.Random(0)), 7))
    at = found.index("第一句。")
    assert found[at : at + 3] == ["第一句。", "第二句！", "The third."], (
        "in order; what is too short or long is left out"
    )
    assert set(found) == {"第一句。", "第二句！", "The third."}
    assert "第二句！" in question(letters, ZH, 300, 50, 0, 0, filler_of(path)).prompt
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="is not UTF-8"):
        filler_of(path)
    path.write_text("甲\n")
    with pytest.raises(DataError, match="no sentence"):
        filler_of(path)
    with pytest.raises(UsageError, match="cannot be read"):
        filler_of(tmp_path / "none")


def test_made_up_sentences() -> None:
    for language in Language:
        sentences = list(itertools.islice(made_up(language, random.Random(3)), 200))
        assert len(set(sentences)) > 150
        assert not any(re.search(r"\d", sentence) for sentence in sentences)


def test_a_model_answers_greedily(tokenizer_json: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_json)
    torch.manual_seed(1)
    model = TextModel(Decoder(small(vocab_size=1000), seed=3).eval(), tokenizer, 64)
    prompts = ["从前有一座山。", "密码是12345。密码是", "一"]
    together, alone = greedy_answers(model, 8)(prompts), [greedy_answers(model, 8)([each])[0] for each in prompts]
    assert together == alone
    assert any(together)
