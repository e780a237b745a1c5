"""Noise on questions: its rates, what it leaves alone, and what it depends on."""

import re

import pytest

from megazh.conversation.conversation import Conversation, Role, Turn
from megazh.errors import UsageError
from megazh.finetune.noise import Noise

LETTERS = "写诗送给朋友春天来了花都开" * 20


def asked(text: str) -> Conversation:
    """A conversation in which the user says `text`."""
    return Conversation((Turn(Role.SYSTEM, LETTERS), Turn(Role.USER, text), Turn(Role.ASSISTANT, LETTERS)))


def noised(noise: Noise, text: str, number: int = 0, copy: int = 0) -> str:
    """The user's turn with noise."""
    before = asked(text)
    after = noise.on(before, number, copy)
    assert after.turns[::2] == before.turns[::2], "only the user's turns"
    return after.turns[1].text


def test_rates() -> None:
    noise = Noise(probability=0.3, drop=0.2, repeat=0.4)
    texts = [noised(noise, LETTERS, number) for number in range(1000)]
    dropped = [text for text in texts if len(text) < len(LETTERS)]
    repeated = [text for text in texts if len(text) > len(LETTERS)]
    for found, length in ((dropped, 0.8), (repeated, 1.4)):
        assert len(found) == pytest.approx(150, abs=35)
        assert sum(map(len, found)) / len(found) / len(LETTERS) == pytest.approx(length, abs=0.01)
    assert re.fullmatch("".join(f"{letter}{{1,2}}" for letter in LETTERS), repeated[0])


def test_it_depends_on_seed_conversation_and_copy_alone() -> None:
    noise = Noise(probability=1, drop=0.5, repeat=0.5)
    first = noised(noise, LETTERS)
    assert noised(noise, LETTERS) == first
    others = {
        noised(noise, LETTERS, number=1),
        noised(noise, LETTERS, copy=1),
        noised(Noise(1, 0.5, 0.5, seed=1), LETTERS),
    }
    assert len(others | {first}) == 4


@pytest.mark.parametrize(
    "kept",
    [
        "12,345.6",
        "一百零五",
        "```python\nprint(总和)\n```",
        "`变量`",
        "<|im_end|>",
        "    如果 x:\n",
        "https://example.com/a",
        "total_sum",
        "me@example.com",
        "f(x)=2",
        "，。！？\n\t ",
    ],
)
def test_code_numbers_and_special_strings_stay(kept: str) -> None:
    noise = Noise(probability=1, drop=1, repeat=1)
    for number in range(8):
        text = noised(noise, f"甲\n{kept}\n乙", number)
        assert text in (f"\n{kept}\n", f"甲甲\n{kept}\n乙乙"), text


def test_no_question_becomes_empty() -> None:
    noise = Noise(probability=1, drop=1, repeat=0)
    assert {noised(noise, "你好", number) for number in range(8)} == {"你好"}


def test_a_value_that_is_no_probability_is_refused() -> None:
    with pytest.raises(UsageError, match=r"noise: drop 1.5: expected a probability from 0 to 1"):
        Noise(drop=1.5)
