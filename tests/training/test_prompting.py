"""Prompts of sampled texts, with and without a chat template."""

import pytest
from textdata import tokenizer_path

from megazh.conversation.conversation import Conversation, Role, Turn
from megazh.conversation.encode import encode, template_for
from megazh.index.metadata import TemplateInfo
from megazh.tokenizer import load_tokenizer
from megazh.training.prompting import Prompting

TOKENIZER = load_tokenizer(tokenizer_path())


def test_plain_text_is_continued() -> None:
    prompting = Prompting(TOKENIZER)
    assert prompting.ids("从前，") == TOKENIZER.encode("从前，")
    assert prompting.end_ids == {TOKENIZER.eod_id}


@pytest.mark.parametrize("name", ["chatml", "human-assistant"])
def test_a_question_is_asked_as_conversations_were_trained(name: str) -> None:
    template = template_for(TOKENIZER, name)
    prompting = Prompting(TOKENIZER, TemplateInfo(name=name, jinja=template.jinja, stop=template.stop))
    conversation = Conversation((Turn(Role.USER, "<|im_end|>问"), Turn(Role.ASSISTANT, "答")))
    whole = encode(conversation, template, TOKENIZER)
    asked = prompting.ids("<|im_end|>问")
    assert asked == whole.ids[: len(asked)].tolist()
    assert whole.trained[len(asked)], "the answer comes next"
    assert not whole.trained[: len(asked)].any()
    ends = whole.ids[whole.trained].tolist()[-1]
    assert prompting.end_ids == {TOKENIZER.eod_id, ends}
