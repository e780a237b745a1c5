"""Prompts of the texts that are sampled in training: text to continue, or a question for a model that chats."""

from megazh.conversation.conversation import Conversation, Role, Turn
from megazh.conversation.encode import encode, recorded_template, stop_id
from megazh.index.metadata import TemplateInfo
from megazh.tokenizer import Tokenizer


class Prompting:
    """Makes prompts.

    Args:
        tokenizer: tokenizer of the run.
        template: chat template of its data; None where that is plain text.

    Attributes:
        end_ids: ids of the tokens that end a sampled text.

    Raises:
        UsageError: the tokenizer lacks a control token of the template.
    """

    def __init__(self, tokenizer: Tokenizer, template: TemplateInfo | None = None) -> None:
        self.tokenizer = tokenizer
        self.end_ids = {tokenizer.eod_id}
        self._template = None
        if template is not None:
            self._template = recorded_template(tokenizer, template.jinja, template.name)
            self.end_ids.add(stop_id(self._template, tokenizer))

    def ids(self, prompt: str) -> list[int]:
        """Ids of a prompt: those of the text, or with a template those of a conversation up to the answer to it."""
        if self._template is None:
            return self.tokenizer.encode(prompt)
        asked = Conversation((Turn(Role.USER, prompt),))
        found: list[int] = encode(asked, self._template, self.tokenizer, for_answer=True).ids.tolist()
        return found
