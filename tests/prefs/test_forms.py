"""Templates, and the two forms of TRL's rows."""

import pytest

from megazh.conversation.conversation import Role, Turn
from megazh.conversation.faults import RowError
from megazh.errors import UsageError
from megazh.prefs.forms import Form, Template, trl_row
from megazh.prefs.messages import PairFault
from megazh.prefs.rows import Preference, Prompt


@pytest.mark.parametrize(
    ("template", "prompt", "text"),
    [
        (None, Prompt("写诗"), "写诗\n"),
        (None, Prompt("翻译", "hello"), "翻译\nhello\n"),
        ("问：{instruction}\n{input}\n答：", Prompt("写诗"), "问：写诗\n答："),
        ("问：{instruction}（{input}）", Prompt("写诗"), "问：写诗（）"),
        ("{input}\n{instruction}", Prompt("{input}是什么？", "{instruction}"), "{instruction}\n{input}是什么？"),
        ("问：{instruction}\n", Prompt("已经是全部", is_whole=True), "已经是全部"),
    ],
)
def test_text_of_a_prompt(template: str | None, prompt: Prompt, text: str) -> None:
    assert (Template(template) if template else Template())(prompt) == text


def test_a_template_needs_the_instruction() -> None:
    with pytest.raises(UsageError, match="lacks"):
        Template("{input}")


def test_plain_text_has_no_room_for_earlier_messages() -> None:
    pair = Preference(Prompt("问", before=(Turn(Role.SYSTEM, "短"),)), "好", "坏")
    with pytest.raises(RowError) as raised:
        trl_row(pair, Form.TEXT, Template())
    assert raised.value.fault is PairFault.SEVERAL_MESSAGES
    assert trl_row(pair, Form.MESSAGES, Template()) == {
        "prompt": [{"role": "system", "content": "短"}, {"role": "user", "content": "问"}],
        "chosen": [{"role": "assistant", "content": "好"}],
        "rejected": [{"role": "assistant", "content": "坏"}],
    }
