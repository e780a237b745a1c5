"""`megazh finetune`: its options, and what reaches the library."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from megazh.cli import main
from megazh.cluster import finetune as library
from megazh.cluster.finetune import OwnData
from megazh.training.job import Request, Task

Call = tuple[Request, OwnData | None, float | None]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The arguments of `finetune`, which is replaced and starts nothing."""
    found: list[Call] = []

    def finetune(*arguments: Any) -> int:
        found.append(arguments)
        return 5

    monkeypatch.setattr(library, "finetune", finetune)
    return found


def finetune(capsys: pytest.CaptureFixture[str], line: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `megazh finetune LINE`."""
    with pytest.raises(SystemExit) as ended:
        main(["finetune", *shlex.split(line)])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.mark.parametrize(
    ("line", "request_", "own", "epochs"),
    [
        ("", {}, None, None),
        (
            "-t long_context -g 1,2 steps=3",
            {"task": Task.LONG_CONTEXT, "gpus": "1,2", "settings": ["steps=3"]},
            None,
            None,
        ),
        ("-c x --epochs 2.5 --dry-run", {"recipe": "x", "dry_run": True}, None, 2.5),
        (
            "-i a.jsonl b.yaml:x seed=4 -r runs/y",
            {"run": Path("runs/y"), "settings": ["seed=4"]},
            (["a.jsonl", "b.yaml:x"],),
            None,
        ),
        ("-i a.json --template t.jinja --encoding GBK", {}, (["a.json"], "t.jinja", "gb18030"), None),
    ],
)
def test_options(
    capsys: pytest.CaptureFixture[str],
    calls: list[Call],
    line: str,
    request_: dict[str, Any],
    own: tuple[Any, ...] | None,
    epochs: float | None,
) -> None:
    assert finetune(capsys, line) == (5, "", "")
    assert calls == [(Request(**{"task": Task.NORMAL, **request_}), OwnData(*own) if own else None, epochs)]


@pytest.mark.parametrize("line", ["--epochs 0", "--epochs inf", "-t pretrain"])
def test_refused(capsys: pytest.CaptureFixture[str], calls: list[Call], line: str) -> None:
    code, _, err = finetune(capsys, line)
    assert (code, calls) == (2, [])
    assert err.splitlines()[-1].startswith("megazh finetune: error: argument ")


def test_a_template_without_data_is_not_ignored(capsys: pytest.CaptureFixture[str], calls: list[Call]) -> None:
    code, _, err = finetune(capsys, "-t normal --template human-assistant")
    assert (code, calls) == (2, [])
    assert err.startswith("error: --template human-assistant: goes with -i; converted data has its template already")
