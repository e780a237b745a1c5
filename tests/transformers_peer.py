"""Loads folders with transformers and answers what it makes of them: imported for the installed version, or run as a
script for another one: `transformers_peer.py QUESTIONS ANSWERS`, both JSON files. Imports nothing of megazh.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

VERSIONS = ("installed", "4.46")
_OLD = Path(sys.prefix) / "transformers-4.46"
_TIMEOUT = 300
os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: no folder needs anything else


def ask(version: str, folder: Path, questions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers of a version of transformers, in one process; skips the test where the version is not installed.

    Args:
        version: one of `VERSIONS`.
        folder: an empty folder for files.
        questions: each with `what`, the name of a function below, and its arguments.
    """
    pytest.importorskip("transformers")
    if version == "installed":
        return [answer(question) for question in questions]
    if not _OLD.is_dir():
        pytest.skip(f"transformers {version} is not installed: {_OLD} is missing (jobs/setup.sh --dev makes it)")
    asked, answered = folder / "questions.json", folder / "answers.json"
    asked.write_text(json.dumps(questions))
    done = subprocess.run(
        [sys.executable, __file__, asked, answered],
        env={**os.environ, "PYTHONPATH": str(_OLD)},
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[dict[str, Any]] = json.loads(answered.read_text())
    return found


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """The answer to one question."""
    arguments = {name: value for name, value in question.items() if name != "what"}
    found: dict[str, Any] = {"ids": ids}[question["what"]](**arguments)
    return found


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


def main() -> None:
    """Answer the questions of a file."""
    import transformers

    assert transformers.__version__.startswith("4.46."), transformers.__version__
    questions = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([answer(question) for question in questions]))


if __name__ == "__main__":
    main()
