"""Loads folders with transformers and answers what it makes of them: the installed version, or another one.

The other one has a process of its own, which this file is as a script: a line of JSON with questions, a line with
answers. Nothing of megazh is imported.
"""

import atexit
import functools
import json
import os
import select
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest

VERSIONS = ("installed", "4.46")
_OLD = Path(sys.prefix) / "transformers-4.46"
_TIMEOUT = 300
os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: no folder needs anything else


def ask(version: str, questions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers of a version of transformers; skips the test where the version is not installed.

    Args:
        version: one of `VERSIONS`.
        questions: each with `what`, the name of a function below, and its arguments.
    """
    pytest.importorskip("transformers")
    if version == "installed":
        return [answer(question) for question in questions]
    if not _OLD.is_dir():
        pytest.skip(f"transformers {version} is not installed: {_OLD} is missing (jobs/setup.sh --dev makes it)")
    asked, answered = _other()
    asked.write(json.dumps(questions) + "\n")
    asked.flush()
    assert select.select([answered], [], [], _TIMEOUT)[0], f"transformers {version} did not answer in {_TIMEOUT} s"
    found = json.loads(answered.readline() or '"it has died"')
    assert isinstance(found, list), found
    return found


@functools.cache
def _other() -> tuple[IO[str], IO[str]]:
    """Input and output of the process with the other version, which is started once, since a start takes seconds."""
    process = subprocess.Popen(
        [sys.executable, __file__],
        env={**os.environ, "PYTHONPATH": str(_OLD)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    atexit.register(process.kill)
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """The answer to one question."""
    arguments = {name: value for name, value in question.items() if name != "what"}
    known: dict[str, Callable[..., dict[str, Any]]] = {
        "ids": ids, "logits": logits, "generated": generated, "chatted": chatted, "resaved": resaved, "made": made,
    }  # fmt: skip
    return known[question["what"]](**arguments)


def ids(folder: str, texts: list[str], fast: bool = True) -> dict[str, Any]:
    """What AutoTokenizer makes of a folder and of texts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=fast)
    made = tokenizer(texts)
    encoded = made["input_ids"]
    return {
        "made": sorted(made),
        "class": type(tokenizer).__name__,
        "ids": encoded,
        "texts": [tokenizer.decode(each, skip_special_tokens=True) for each in encoded],
        "eos": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
        "length": len(tokenizer),
        "max_length": tokenizer.model_max_length,
        "template": tokenizer.chat_template,
    }


def logits(folder: str, tokens: list[list[int]], prefill: int, output: str) -> dict[str, Any]:
    """Logits of rows of tokens, all at once and with a cache: `prefill` tokens, then one at a time.

    `output` gets both as an array (2, rows, seq, vocab).
    """
    import numpy as np
    import torch

    model, rows = _model(folder), torch.tensor(tokens)
    with torch.no_grad():
        whole = model(rows).logits
        step = model(rows[:, :prefill], use_cache=True)
        pieces = [step.logits]
        for at in range(prefill, rows.shape[1]):
            step = model(rows[:, at : at + 1], past_key_values=step.past_key_values, use_cache=True)
            pieces.append(step.logits)
    np.save(output, torch.stack((whole, torch.cat(pieces, 1))).float().numpy())
    return {"class": type(model).__name__, "dtype": str(whole.dtype)}


def generated(folder: str, prompt: str, count: int) -> dict[str, Any]:
    """The greedy continuation of a prompt, and what generation_config.json gave."""
    from transformers import AutoTokenizer

    model, tokenizer = _model(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    found = model.generate(**inputs, max_new_tokens=count, do_sample=False, temperature=None, top_p=None, top_k=None)
    config = model.generation_config
    return {
        "text": tokenizer.decode(found[0], skip_special_tokens=True),
        "tokens": found.shape[1] - inputs["input_ids"].shape[1],
        "eos": config.eos_token_id,
        "drawing": [config.do_sample, config.temperature, config.top_k, config.top_p],
    }


def chatted(folder: str, messages: list[dict[str, str]], count: int) -> dict[str, Any]:
    """The ids of a prompt by the folder's chat template, and the greedy answer to it."""
    import torch
    from transformers import AutoTokenizer

    model, tokenizer = _model(folder), AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    direct = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    inputs = torch.tensor([prompt])
    drawing = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    found = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=count, **drawing)
    answer = found[0, len(prompt) :].tolist()
    return {
        "prompt": prompt,
        "direct": list(direct if isinstance(direct, list) else direct["input_ids"]),
        "answer": answer,
        "text": tokenizer.decode(answer, skip_special_tokens=True),
        "eos": model.generation_config.eos_token_id,
    }


def resaved(folder: str, output: str) -> dict[str, Any]:
    """Load a folder and save it in the form of this version."""
    from transformers import AutoTokenizer

    _model(folder).save_pretrained(output)
    AutoTokenizer.from_pretrained(folder).save_pretrained(output)
    return {}


def made(model_type: str, config: dict[str, Any], output: str) -> dict[str, Any]:
    """Make a model with random weights, none of them small, and save it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape)
    model.save_pretrained(output)
    return {}


def _model(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto").eval()


def main() -> None:
    """Answer questions until stdin ends."""
    import transformers

    assert transformers.__version__.startswith("4.46."), transformers.__version__
    output, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    for line in sys.stdin:
        try:
            found: Any = [answer(question) for question in json.loads(line)]
        except Exception:
            found = traceback.format_exc()
        print(json.dumps(found), file=output, flush=True)


if __name__ == "__main__":
    main()
