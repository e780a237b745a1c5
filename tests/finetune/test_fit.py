"""Conversations fitted into samples: which answers are trained, what is cut and what is dropped."""

import pytest
from textdata import tokenizer_path

from megazh.conversation.conversation import Conversation, Role, Turn
from megazh.conversation.encode import template_for
from megazh.conversation.faults import RowError
from megazh.errors import UsageError
from megazh.finetune.fit import Drop, Fitting, TooLong, Train
from megazh.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(tokenizer_path())
TEMPLATE = template_for(TOKENIZER)


def turns(*texts: str) -> Conversation:
    """Turns of user and assistant in turn, after a system turn."""
    spoken = [Turn((Role.USER, Role.ASSISTANT)[at % 2], text) for at, text in enumerate(texts)]
    return Conversation((Turn(Role.SYSTEM, "答"), *spoken))


def trained_text(conversation: Conversation, **options: object) -> str:
    """Text of the trained tokens."""
    encoded = Fitting(TEMPLATE, TOKENIZER, **options).fit(conversation).encoded  # type: ignore[arg-type]
    return TOKENIZER.decode(encoded.ids[encoded.trained].tolist())


def test_all_answers_or_the_last_one() -> None:
    conversation = turns("一", "二", "三", "四")
    assert trained_text(conversation) == "二<|im_end|>四<|im_end|>"
    assert trained_text(conversation, train=Train.LAST_TURN) == "四<|im_end|>"


def test_an_answer_of_weight_0_is_never_trained() -> None:
    first, last = Turn(Role.ASSISTANT, "二", trained=False), Turn(Role.ASSISTANT, "四")
    asked = Turn(Role.USER, "问")
    assert trained_text(Conversation((asked, first, asked, last))) == "四<|im_end|>"
    for train in Train:
        with pytest.raises(RowError) as refused:
            trained_text(Conversation((asked, first)), train=train)
        assert refused.value.fault is Drop.NOTHING_TRAINED


@pytest.mark.parametrize("train", Train)
def test_a_long_conversation_ends_with_the_last_answer_that_is_whole(train: Train) -> None:
    texts = [f"{'问' if at % 2 == 0 else '答'}{at}" for at in range(20)]
    lengths = [len(Fitting(TEMPLATE, TOKENIZER).fit(turns(*texts[:count])).encoded) for count in range(2, 21, 2)]
    for limit in range(lengths[0], lengths[-1] + 1):
        fitted = Fitting(TEMPLATE, TOKENIZER, train, max_tokens=limit).fit(turns(*texts))
        left = max(at for at, length in enumerate(lengths, start=1) if length <= limit)
        assert fitted.conversation.turns[-1].text == texts[2 * left - 1]
        assert (len(fitted.encoded), fitted.is_cut) == (lengths[left - 1], left < len(lengths))
        assert sum(turn.trained for turn in fitted.conversation.turns if turn.role is Role.ASSISTANT) == (
            left if train is Train.ALL else 1
        )


@pytest.mark.parametrize(("too_long", "limit"), [(TooLong.CUT, 9), (TooLong.DROP, 40)])
def test_too_long_conversations_are_dropped(too_long: TooLong, limit: int) -> None:
    texts = ["问题" * 9, "答案" * 9]
    with pytest.raises(RowError, match=f"tokens, and at most {limit} are taken") as refused:
        Fitting(TEMPLATE, TOKENIZER, max_tokens=limit, too_long=too_long).fit(turns(*texts, *texts))
    assert refused.value.fault is Drop.TOO_LONG


def test_a_limit_below_2_is_refused() -> None:
    with pytest.raises(UsageError, match="--max-tokens 1: expected at least 2"):
        Fitting(TEMPLATE, TOKENIZER, max_tokens=1)
