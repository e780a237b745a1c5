"""Own conversations of a run: converted once, and refused where they are others the next time."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from previews import TOKENIZER

from megazh.conversation.encode import template_for
from megazh.conversation.registry import DataSet
from megazh.errors import DataError, UsageError
from megazh.finetune.convert import Request
from megazh.finetune.fit import Fitting, Train
from megazh.finetune.own_data import prepare_conversations

FITTING = Fitting(template_for(TOKENIZER), TOKENIZER, max_tokens=64)


def nothing(_: str) -> None:
    """Say nothing."""


@pytest.fixture
def request_(tmp_path: Path) -> Request:
    """A request that was carried out."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"instruction": "{at}", "output": "好"}}\n' for at in range(40)))
    made = Request([DataSet("files", (str(rows),))], FITTING, tmp_path / "out", validation=0.2)
    assert prepare_conversations(made, nothing) == tmp_path / "out" / "mixture.yaml"
    return made


def test_the_same_again_changes_nothing(request_: Request) -> None:
    before = {path: path.read_bytes() for path in request_.output.iterdir()}
    said: list[str] = []
    prepare_conversations(request_, said.append)
    assert said == [f"data: converted already, from the same conversations: {request_.output}/mixture.yaml"]
    assert {path: path.read_bytes() for path in request_.output.iterdir()} == before


def test_a_file_that_broke_off_is_not_forgotten(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text("[" + '{"instruction": "问", "output": "好"}, ' * 40)
    made = Request([DataSet("files", (str(rows),))], FITTING, tmp_path / "out", validation=0)
    with pytest.raises(DataError, match="has the 40 conversations that could be read"):
        prepare_conversations(made, nothing)
    said: list[str] = []
    prepare_conversations(made, said.append)
    assert said[0].startswith(f"warning: {tmp_path}/out/files: a file was broken off when it was converted, and all ")


def _changed_file(made: Request) -> Request:
    path = Path(made.sets[0].inputs[0])
    path.write_text(path.read_text().replace("好", "坏"))
    return made


def _another_file(made: Request) -> Request:
    path = Path(made.sets[0].inputs[0])
    another = path.with_name("others.jsonl")
    another.write_bytes(path.read_bytes())
    return replace(made, sets=[DataSet("files", (str(another),))])


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (_changed_file, "rows.jsonl, which has changed since"),
        (_another_file, "files without others.jsonl"),
        (lambda made: replace(made, sets=[replace(made.sets[0], name="mine")]), "sets files, and this run has mine"),
        (
            lambda made: replace(made, sets=[replace(made.sets[0], limit=3)]),
            "another entry of 'files' in its registry",
        ),
        (
            lambda made: replace(made, fitting=Fitting(template_for(TOKENIZER, "human-assistant"), TOKENIZER)),
            "template chatml, not human-assistant",
        ),
        (
            lambda made: replace(made, fitting=Fitting(FITTING.template, TOKENIZER, max_tokens=99)),
            "max_tokens 64, not 99",
        ),
        (
            lambda made: replace(made, fitting=Fitting(FITTING.template, TOKENIZER, Train.LAST_TURN, 64)),
            "train all, not last_turn",
        ),
    ],
)
def test_something_else_is_refused(request_: Request, change: Callable[[Request], Request], found: str) -> None:
    with pytest.raises(UsageError) as refused:
        prepare_conversations(change(request_), nothing)
    assert str(refused.value) == (
        f"{request_.output}: was converted from other conversations ({found}); choose another run with -r, or remove "
        "the folder"
    )
