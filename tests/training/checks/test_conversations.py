"""Conversations that are longer than a sample are warned of before a start."""

import json
from pathlib import Path

import pytest
from cases import make_case
from indexes import set_template, write_index

from megazh.training.checks import conversations
from megazh.training.preflight import DATA, warnings_of


@pytest.mark.parametrize(
    ("length", "limit", "warned"), [(40, None, True), (40, 100, True), (40, 32, False), (31, None, False)]
)
def test_long_conversations_are_warned_of(tmp_path: Path, length: int, limit: int | None, warned: bool) -> None:
    documents = [[5] * (length - 1) + [1], [6, 7, 1]]
    text = write_index(tmp_path / "text", documents)
    assert warnings_of(make_case(tmp_path, text, seq_len=32), [conversations.lengths]) == []
    prefix = write_index(tmp_path / "chat", documents, masks=[[False] + [True] * (len(d) - 1) for d in documents])
    set_template(prefix)
    description = Path(f"{prefix}.json")
    values = json.loads(description.read_bytes())
    values["options"]["max_tokens"] = limit
    description.write_text(json.dumps(values))
    lines = warnings_of(make_case(tmp_path, prefix, seq_len=32), [conversations.lengths])
    assert len(lines) == warned
    if warned:
        assert lines[0].startswith("warning: corpus 'chat': 1 conversations have 32 tokens or more, and what is longer")
        assert "convert them with --max-tokens 32" in lines[0]
    assert conversations.lengths in DATA
