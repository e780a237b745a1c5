"""Answers of a model to questions with one right answer each."""

from collections.abc import Sequence
from dataclasses import dataclass

from megazh.conversation.conversation import Conversation
from megazh.conversation.encode import encode, stop_id
from megazh.conversation.template import Template
from megazh.model.generate import generate_batch
from megazh.model.sampling import SamplingOptions
from megazh.progress import Progress
from megazh.training.text_model import TextModel

_GREEDY = SamplingOptions(temperature=0)
_BATCH = 32  # conversations


@dataclass(frozen=True)
class Answer:
    """An answer of a model."""

    conversation: Conversation
    """Ends with the right answer."""
    text: str
    """The model's own one."""

    @property
    def is_right(self) -> bool:
        """Whether both have the same text."""
        return self.text == self.conversation.turns[-1].text


def answer_all(
    model: TextModel, template: Template, conversations: Sequence[Conversation], max_tokens: int
) -> list[Answer]:
    """Answer the last question of each conversation, by the most likely token each time.

    Args:
        model: the model.
        template: its chat template, or for a model without one, the template that it will be trained with.
        conversations: each ends with the right answer.
        max_tokens: largest number of tokens of an answer; a longer one is wrong.
    """
    tokenizer, found = model.tokenizer, dict[int, Answer]()
    ends = model.end_ids | {stop_id(template, tokenizer)}
    prompts = [
        encode(Conversation(each.turns[:-1]), template, tokenizer, for_answer=True).ids.tolist()
        for each in conversations
    ]
    by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    with Progress("answers", len(prompts), unit="questions") as progress:
        for begin in range(0, len(prompts), _BATCH):
            batch = by_length[begin : begin + _BATCH]
            texts = generate_batch(
                model.model,
                [prompts[number] for number in batch],
                max_tokens,
                _GREEDY,
                tokenizer.vocab_size,
                ends,
                [0] * len(batch),
            )
            for number, ids in zip(batch, texts, strict=True):
                found[number] = Answer(conversations[number], tokenizer.decode(ids))
            progress.advance(len(batch))
    return [found[number] for number in range(len(prompts))]
