"""A chat model of a run, and the folder that it is exported to, asked the same by megazh and by transformers."""

from pathlib import Path

import numpy as np
import torch
from decoders import alone, logits
from transformers_peer import ask

from megazh.conversation.conversation import Conversation
from megazh.finetune.chat import ChatModel, ChatOptions
from megazh.model.sampling import SamplingOptions
from megazh.training.chat_template import find_template
from megazh.training.export import ExportOptions, export_to_hf
from megazh.training.model_source import find_model
from megazh.training.text_model import open_source

_TOLERANCE = 1e-3  # of logits, which are up to about 20


def compare(run: Path, folder: Path, conversations: list[Conversation], count: int) -> list[str]:
    """Export a run, and assert that transformers has its prompts, its logits and its greedy answers.

    Args:
        run: the run folder; its model computes in fp32.
        folder: the folder to make.
        conversations: each ends with an answer, in whose place one is asked for.
        count: largest number of tokens of an answer.

    Returns:
        The answers.
    """
    export_to_hf(find_model(run), folder, ExportOptions())
    source = find_model(run)
    model = ChatModel(open_source(source, "cpu"), find_template(source))
    decoder, options = open_source(source, "cpu").model, ChatOptions(SamplingOptions(temperature=0.0))
    answers = []
    for number, conversation in enumerate(conversations):
        turns = conversation.turns[:-1]
        prompt = model.prompt(turns)
        own = list(model.tokens(prompt, count, options))
        ids, output = [*prompt, *own], folder.with_name(f"{folder.name}-{number}.npy")
        messages = [{"role": turn.role.value, "content": turn.text} for turn in turns]
        asked = {"what": "chatted", "messages": messages, "count": count}
        fed = {"what": "logits", "tokens": [ids], "prefill": len(prompt), "output": str(output)}
        chatted, computed = ask("installed", [{**each, "folder": str(folder)} for each in (asked, fed)])
        assert chatted["prompt"] == chatted["direct"] == prompt
        assert [each for each in chatted["answer"] if each not in model.stop_ids] == own
        assert computed["dtype"] == "torch.float32"
        with torch.no_grad():
            found = logits(decoder, torch.tensor([ids]), *alone(len(ids)))
        for theirs in torch.from_numpy(np.load(output)):  # all at once, and with a cache
            assert theirs.std() > 0.5, "small logits would hide a wrong rotation"
            assert (found - theirs).abs().max() < _TOLERANCE
        answers.append(model.tokenizer.decode(own))
    return answers
