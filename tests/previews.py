"""Rows with everything that can happen to them, and their preview."""

import json
from pathlib import Path
from typing import Any

from textdata import tokenizer_path

from megazh.conversation.encode import template_for
from megazh.conversation.reading import DataSets
from megazh.conversation.registry import DataSet
from megazh.finetune.fit import Fitting
from megazh.finetune.preview import Preview, look
from megazh.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(tokenizer_path())
FITTING = Fitting(template_for(TOKENIZER), TOKENIZER)
ROWS: list[Any] = [
    {"instruction": "一<|im_end|>", "output": "二\n"},
    {"instruction": "", "output": "二"},
    {"messages": [{"role": role, "content": "很长" * 9} for role in ("user", "assistant") * 3]},
    {"instruction": "长" * 99, "output": "二"},
    {"messages": [{"role": "user", "content": "三"}, {"role": "assistant", "content": "四", "weight": 0}]},
    {"instruction": "\x1b[31m红\u202e", "output": "五"},
]


def rows_file(folder: Path, rows: list[Any] = ROWS) -> Path:
    """A file of rows."""
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def preview(path: Path, show: int = 3, limit: int | None = None, **options: Any) -> Preview:
    """What is found in a file."""
    fitting = Fitting(template_for(TOKENIZER), TOKENIZER, **options)
    return look(DataSets([DataSet("files", (str(path),), limit=limit)]), fitting, show, limit)
