"""A chat: prompts are prefixes of what is trained, answers join the history, old turns go where the context is full."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from chats import TOKENIZER, chat_model

from megazh.conversation.conversation import Conversation, Role, Turn
from megazh.conversation.encode import encode
from megazh.conversation.template import BUILT_IN
from megazh.errors import UsageError
from megazh.finetune.chat import Answer, Chat, ChatModel, ChatOptions, End
from megazh.model.generate import cached_forward, generate
from megazh.model.sampling import SamplingOptions
from megazh.tokenizer.stream import decode_whole

GREEDY = ChatOptions(SamplingOptions(temperature=0.0), max_tokens=12)
TEMPLATES = sorted(BUILT_IN)


def scripted(answers: Sequence[str], context: int = 96, template: str = "chatml") -> tuple[ChatModel, list[list[int]]]:
    """A model that gives these answers one after another, and the prompts that it gets."""
    model, prompts, left = chat_model(template, context), [], iter(answers)

    def tokens(prompt: list[int], count: int, options: ChatOptions) -> Iterator[int]:
        prompts.append(prompt)
        yield from TOKENIZER.encode(next(left))[:count]

    model.tokens = tokens  # type: ignore[method-assign,assignment]
    return model, prompts


def said(answer: Answer) -> str:
    """The text of an answer."""
    text = "".join(answer)
    assert text == answer.text
    return text


def conversation(chat: Chat) -> Conversation:
    """All turns of a chat."""
    return Conversation(tuple(Turn(Role(each["role"]), each["content"]) for each in chat.messages()))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("system", [None, "你是<|im_end|>助手。"])
def test_prompts_are_prefixes_of_the_training_ids(template: str, system: str | None) -> None:
    answers = ["答一\n", " 二<|im_start|>", "三🙂"]
    model, prompts = scripted(answers, 512, template)
    chat = Chat(model, system)
    for number, answer in enumerate(answers):
        assert said(chat.ask(f"问{number}\n<|endoftext|>", GREEDY)) == answer
        trained = encode(conversation(chat), model.template, TOKENIZER)
        prompt = prompts[-1]
        assert prompt == trained.ids[: len(prompt)].tolist()
        rest = trained.trained[len(prompt) :]
        assert rest[0], "the answer comes next"
        assert TOKENIZER.decode(trained.ids[len(prompt) :][rest].tolist()).startswith(answer)


def test_answers_are_what_the_model_says_without_a_cache_of_the_turns_before() -> None:
    model = chat_model(context=512)
    chat = Chat(model)
    options = ChatOptions(SamplingOptions(1.0, repetition_penalty=1.2, additive_penalty=0.5), 12, seed=5)
    for number in range(3):
        turns = [Turn(Role(each["role"]), each["content"]) for each in chat.messages()]
        prompt = model.prompt([*turns, Turn(Role.USER, f"问{number}")])
        forward = cached_forward(model._model, 200)
        ids = list(generate(forward, prompt, 12, options.sampling, TOKENIZER.vocab_size, model.stop_ids, 5 + number))
        answer = chat.ask(f"问{number}", options)
        assert said(answer) == decode_whole(TOKENIZER, ids)
        assert answer.tokens == len(ids)
        assert answer.end is (End.MAX_TOKENS if len(ids) == 12 else End.STOP)


def test_only_what_is_new_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, counts = chat_model(context=512), []
    inner = model._model.forward

    def counted(tokens, attend):  # type: ignore[no-untyped-def]
        counts.append(tokens.shape[1])
        return inner(tokens, attend)

    monkeypatch.setattr(model._model, "forward", counted)
    chat = Chat(model)
    said(chat.ask("问" * 30, GREEDY))
    assert counts[0] > 30
    counts.clear()
    said(chat.retry(GREEDY))
    assert counts[0] == 1, "the same prompt: its last token alone"
    counts.clear()
    said(chat.ask("二", GREEDY))
    assert counts[0] < 30


def test_the_end_token_of_the_template_and_the_end_of_a_document_end_answers() -> None:
    pieces = {TOKENIZER.piece(each) for each in chat_model().stop_ids}
    assert pieces == {"<|im_end|>", "<|endoftext|>"}
    assert {TOKENIZER.piece(each) for each in chat_model("human-assistant").stop_ids} == {"<|endoftext|>"}


def test_penalties_do_not_touch_the_end_of_an_answer() -> None:
    import torch

    stop = 3
    values = torch.zeros(8)
    values[stop] = 5.0
    options = SamplingOptions(0.0, repetition_penalty=9.0, additive_penalty=9.0)
    assert list(generate(lambda tokens: values.clone(), [stop, 1, stop], 4, options, 8, {stop}, 0)) == []


def test_the_oldest_turns_go_where_the_context_is_full() -> None:
    model, prompts = scripted(["答" * 10] * 8, 96)
    chat, gone = Chat(model, "系统"), []
    for number in range(8):
        answer = chat.ask(f"第{number}问", GREEDY)
        said(answer)
        gone.append(answer.forgotten)
        assert len(prompts[-1]) + GREEDY.max_tokens <= 96
    text = TOKENIZER.decode(prompts[-1])
    assert sum(gone) > 4
    assert all(each % 2 == 0 for each in gone), "questions go with their answers"
    assert "系统" in text
    assert "第7问" in text
    assert "第0问" not in text
    assert len(chat.messages()) == 17, "all turns are kept for the user"
    chat.reset()
    assert chat.messages() == [{"role": "system", "content": "系统"}]


def test_a_message_that_is_too_long_is_refused_and_the_history_stays() -> None:
    model, _ = scripted(["答"], 64)
    chat = Chat(model)
    said(chat.ask("问", GREEDY))
    before = chat.messages()
    with pytest.raises(UsageError, match=r"the message has \d+ tokens .* takes 64 at a time: give a shorter one"):
        chat.ask("字" * 80, GREEDY)
    with pytest.raises(UsageError, match="the system turn has"):
        chat.set_system("字" * 80)
    assert chat.messages() == before


def test_an_answer_ends_where_the_context_does() -> None:
    model, _ = scripted(["答" * 200], 64)
    answer = Chat(model).ask("问", ChatOptions(GREEDY.sampling, 500))
    said(answer)
    assert answer.end is End.CONTEXT


def test_an_interrupted_answer_stays_as_far_as_it_came() -> None:
    model, prompts = scripted(["一二三四五六", "好"])
    chat = Chat(model)
    answer = chat.ask("问", GREEDY)
    for piece in answer:
        if "二" in piece:
            answer.interrupt()
    assert answer.end is End.INTERRUPTED
    assert answer.text.startswith("一二")
    assert "六" not in answer.text
    assert chat.messages()[-1] == {"role": "assistant", "content": answer.text}
    said(chat.ask("再问", GREEDY))
    assert f"{answer.text}<|im_end|>" in TOKENIZER.decode(prompts[-1])


def test_an_answer_that_nobody_reads_to_its_end_joins_the_history() -> None:
    model, _ = scripted(["一二三四五六"])
    chat = Chat(model)
    pieces = iter(chat.ask("问", GREEDY))
    first = next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert chat.messages() == [{"role": "user", "content": "问"}, {"role": "assistant", "content": first}]


def test_an_empty_answer_leaves_the_history_with_its_question() -> None:
    model, _ = scripted(["", "答"])
    chat = Chat(model)
    answer = chat.ask("问", GREEDY)
    assert said(answer) == ""
    assert (answer.end, chat.messages()) == (End.STOP, [])
    said(chat.retry(GREEDY))
    assert [each["content"] for each in chat.messages()] == ["问", "答"]


def test_retry_replaces_the_last_answer() -> None:
    model, prompts = scripted(["一", "二", "三"])
    chat = Chat(model)
    with pytest.raises(UsageError, match="nothing was asked yet"):
        chat.retry(GREEDY)
    said(chat.ask("问一", GREEDY))
    said(chat.ask("问二", GREEDY))
    assert said(chat.retry(GREEDY)) == "三"
    assert [each["content"] for each in chat.messages()] == ["问一", "一", "问二", "三"]
    assert prompts[1] == prompts[2]


def test_a_retry_has_another_seed() -> None:
    chat = Chat(chat_model())
    options = ChatOptions(SamplingOptions(1.0), 12)
    first = said(chat.ask("问", options))
    assert said(chat.retry(options)) != first
    assert said(Chat(chat_model()).ask("问", options)) == first


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda chat: chat.ask(" \n", GREEDY), "the message is empty"),
        (lambda chat: chat.ask("\udce4", GREEDY), "the message is not valid UTF-8"),
        (lambda chat: chat.set_system(""), "the system turn is empty"),
    ],
)
def test_refused(call: Callable[[Chat], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call(Chat(chat_model()))


def test_a_template_without_a_place_for_a_system_turn(tmp_path: Path) -> None:
    path = tmp_path / "no_system.jinja"
    path.write_text(
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ message['role'] + ':' + message['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    with pytest.raises(UsageError, match="no system"):
        Chat(chat_model(str(path)), "系统")


def test_characters_come_whole() -> None:
    model, _ = scripted(["🙂龘é"])
    pieces = list(Chat(model).ask("问", GREEDY))
    assert "".join(pieces) == "🙂龘é"
    assert "\ufffd" not in "".join(pieces)
    assert any(not each for each in pieces), "some tokens are parts of characters"
