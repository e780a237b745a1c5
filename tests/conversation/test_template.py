"""Chat templates: the text that transformers renders, in segments of which the trained ones are known."""

import time
from pathlib import Path

import pytest
from textdata import tokenizer_path
from transformers import PreTrainedTokenizerFast

from megazh.conversation.conversation import Conversation, Role, Turn
from megazh.conversation.faults import RowError
from megazh.conversation.template import BUILT_IN, CHATML, HUMAN_ASSISTANT, Template, load_template
from megazh.errors import UsageError

TRIMMING = CHATML.replace("message['content']", "(message['content'] | trim)")


def talk(*texts: str, system: str = "") -> Conversation:
    """Turns of user and assistant in turn, after an optional system turn."""
    turns = [Turn((Role.USER, Role.ASSISTANT)[at % 2], text) for at, text in enumerate(texts)]
    return Conversation((*([Turn(Role.SYSTEM, system)] if system else []), *turns))


TALKS = [
    talk("你好", "你好！"),
    talk("一", "二", "三\n\n四", "  五 <|im_end|>", system="<|endoftext|> 只说数字。"),
    talk("\n前", "后\n"),
]


def trained_text(template: Template, conversation: Conversation) -> list[str]:
    """The runs of trained text."""
    runs: list[str] = []
    before = False
    for segment in template.segments(conversation):
        if segment.trained:
            runs[len(runs) - before :] = [(runs[-1] if before else "") + segment.text]
        before = segment.trained
    return runs


@pytest.mark.parametrize("conversation", TALKS)
@pytest.mark.parametrize("jinja", [CHATML, HUMAN_ASSISTANT, TRIMMING], ids=["chatml", "human-assistant", "trimming"])
def test_segments_join_to_the_text_of_transformers(jinja: str, conversation: Conversation) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_path()), eos_token="<|endoftext|>")
    template = Template(jinja)
    for turns, for_answer in ((conversation.turns, False), (conversation.turns[:-1], True)):
        messages = [{"role": turn.role.value, "content": turn.text} for turn in turns]
        expected = theirs.apply_chat_template(
            messages, chat_template=jinja, tokenize=False, add_generation_prompt=for_answer
        )
        found = template.segments(Conversation(turns), for_answer)
        assert "".join(segment.text for segment in found) == expected


def test_human_assistant_is_the_text_of_the_seed() -> None:
    assert Template(HUMAN_ASSISTANT).render(talk("x", "y")) == "Human:\nx\nAssistant:\ny\n<|endoftext|>"


def test_answers_are_trained_with_their_end_token_and_nothing_else() -> None:
    conversation = talk("一", "二", "三", "四", system="数")
    assert trained_text(Template(CHATML), conversation) == ["二<|im_end|>", "四<|im_end|>"]
    assert trained_text(Template(HUMAN_ASSISTANT), conversation) == ["二\n<|endoftext|>", "四\n<|endoftext|>"]
    assert [Template(jinja).stop for jinja in (CHATML, HUMAN_ASSISTANT)] == ["<|im_end|>", "<|endoftext|>"]


def test_an_answer_may_be_left_untrained() -> None:
    first, second = talk("一", "二").turns, talk("三", "四").turns
    conversation = Conversation((first[0], Turn(Role.ASSISTANT, "二", trained=False), *second))
    assert trained_text(Template(CHATML), conversation) == ["四<|im_end|>"]


def test_control_tokens_are_those_of_the_template_only() -> None:
    found = Template(CHATML).segments(talk("<|im_end|>\n<|im_start|>assistant", "<|endoftext|>"))
    assert [segment.special for segment in found if segment.special] == ["<|im_start|>", "<|im_end|>"] * 2


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_prompt_of_a_chat_is_the_beginning_of_the_training_text(name: str) -> None:
    template = load_template(name)
    for conversation in TALKS:
        prompt = template.segments(Conversation(conversation.turns[:-1]), for_answer=True)
        whole = template.segments(conversation)[: len(prompt)]
        assert [(s.text, s.special) for s in prompt] == [(s.text, s.special) for s in whole]


def test_the_tag_generation_is_rendered_as_transformers_does() -> None:
    jinja = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    template = Template(jinja, eos_token="</s>")
    assert template.render(talk("a", "b")) == "<|user|>a<|assistant|>b</s>"
    assert trained_text(template, talk("a", "b")) == ["b</s>"]


@pytest.mark.parametrize(
    ("jinja", "message"),
    [
        ("{% for %}", "not a jinja template"),
        (CHATML.replace("<|im_end|>", ""), "no end token after an answer"),
        (CHATML.replace("add_generation_prompt", "false"), "does not begin an answer"),
        ("{{ messages[0]['content'] }}", "leaves out"),
        (CHATML.replace("message['content']", "(message['content'] | replace('问', '答'))"), "changes the text"),
        ("{{ raise_exception('no') }}", "no"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        (
            "{{ raise_exception('not\n  so') }}",
            "not so, in a conversation of two questions and two answers; correct it",
        ),
        (f"{{{{ {'(' * 3000}1{')' * 3000} }}}}", "not a jinja template: maximum recursion depth"),
        ("{% for at in range(99999) %}{{ 'x' * 99999 }}{% endfor %}", "writes more than 1,048,576 characters"),
    ],
)
def test_a_template_that_cannot_be_trained_with_is_refused(jinja: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Template(jinja)


def test_a_template_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megazh.conversation.template._SECONDS", 0.2)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(UsageError, match=r"does not end within 0\.2 s"):
        Template(loop + CHATML)
    Template(CHATML)  # the next one has its own time
    time.sleep(0.3)


def test_a_template_without_place_for_a_system_turn_says_so() -> None:
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML
    template = Template(no_system)
    assert "no place for a system turn" in template.warnings[0]
    with pytest.raises(RowError, match="no system turn"):
        template.segments(talk("a", "b", system="c"))
    assert not Template(CHATML).warnings


def test_a_template_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "my.jinja").write_text(CHATML, encoding="utf-8")
    assert load_template(str(tmp_path / "my.jinja")).jinja == CHATML
    (tmp_path / "marked.jinja").write_text(CHATML, encoding="utf-8-sig")
    assert load_template(str(tmp_path / "marked.jinja")).jinja == CHATML
    with pytest.raises(UsageError, match="neither chatml, human-assistant nor a file"):
        load_template("chatmI")
