"""Greedy answers of a model."""

from collections.abc import Sequence

from megazh.evaluation.passkey import ANSWER_TOKENS, Answer
from megazh.model.generate import generate_batch
from megazh.model.sampling import SamplingOptions
from megazh.training.text_model import TextModel


def greedy_answers(model: TextModel, count: int = ANSWER_TOKENS) -> Answer:
    """Make a function that goes on from prompts by the most likely tokens, at most `count`; they share a batch."""
    greedy = SamplingOptions(temperature=0)

    def answer(prompts: Sequence[str]) -> list[str]:
        ids = [model.tokenizer.encode(prompt) for prompt in prompts]
        # A CUDA graph of a step takes longer to record than these few tokens without it.
        found = generate_batch(
            model.model, ids, count, greedy, model.tokenizer.vocab_size, model.end_ids, [0] * len(ids), graphs=False
        )
        return [model.tokenizer.decode(tokens) for tokens in found]

    return answer
