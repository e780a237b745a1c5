"""Registries: LLaMA-Factory's shape, and the refusal of what cannot be read."""

import json
from pathlib import Path
from typing import Any

import pytest

from megazh.conversation.forms import Columns, Form, Layout
from megazh.conversation.registry import DataSet, registered_sets, sets_of
from megazh.conversation.turns import Tags
from megazh.errors import UsageError

CHINESE = """\
alpaca_zh:
  file_name: raw/alpaca.json
  num_samples: 20
dialogs:
  file_name: dialogs/*.parquet
  formatting: sharegpt
  weight: 2
  columns: {messages: dialog, system: persona}
  tags: {role_tag: who, content_tag: text, user_tag: Q, assistant_tag: A}
"""


def info(folder: Path, **entries: Any) -> Path:
    """A `dataset_info.json` with some entries."""
    path = folder / "dataset_info.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def test_a_registry_in_yaml(tmp_path: Path) -> None:
    path = tmp_path / "chinese.yaml"
    path.write_text(CHINESE)
    alpaca, dialogs = registered_sets(path)
    assert alpaca == DataSet("alpaca_zh", (f"{tmp_path}/raw/alpaca.json",), limit=20, origin=f"{path}: set 'alpaca_zh'")
    assert (dialogs.inputs, dialogs.weight, dialogs.limit) == ((f"{tmp_path}/dialogs/*.parquet",), 2.0, None)
    assert dialogs.layout == Layout(
        Form.SHAREGPT,
        Columns(messages=("dialog",), system="persona"),
        Tags(
            keys=(("who", "text"),),
            user=frozenset({"Q"}),
            assistant=frozenset({"A"}),
            system=frozenset({"system"}),
            tool=frozenset({"observation", "function_call"}),
        ),
    )


def test_entries_of_llama_factory(tmp_path: Path) -> None:
    path = info(
        tmp_path,
        identity={"file_name": "identity.json"},
        remote={"hf_hub_url": "someone/data"},
        openai={"file_name": "b.jsonl", "formatting": "openai", "columns": {"messages": "messages"}},
        renamed={"file_name": "c.json", "columns": {"prompt": "q", "response": "a"}},
    )
    identity, renamed, openai = registered_sets(path, ["identity", "renamed", "openai"])
    assert identity.layout == Layout()
    assert renamed.layout == Layout(columns=Columns(prompt="q", response="a"))
    assert openai.layout.tags.keys == (("role", "content"),)
    assert [each.name for each in sets_of([f"{path}:identity", "raw/*.json", "more"])] == ["identity", "files"]
    assert sets_of(["raw/*.json", "more"]) == [DataSet("files", ("raw/*.json", "more"))]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"hf_hub_url": "a/b", "file_name": "x"}, "key 'hf_hub_url': data is read from local files only: download"),
        ({"file_name": "x", "split": "train"}, "key 'split': it belongs to data sets on a hub: remove it"),
        ({"file_name": "x", "columns": {"images": "i"}}, "key 'columns.images': only text is trained on"),
        ({"file_name": "x", "ranking": True}, "key 'ranking': it is preference data"),
        ({"file_name": "x", "formating": "alpaca"}, "unknown key 'formating'; did you mean 'formatting'?"),
        ({"file_name": "x", "columns": {"reponse": "a"}}, "'columns.reponse'; did you mean 'columns.response'?"),
        ({"file_name": "x", "formatting": "csv"}, "key 'formatting': expected one of alpaca, sharegpt, openai"),
        ({"file_name": "x", "num_samples": 0}, "key 'num_samples': Input should be greater than 0"),
        ({"file_name": "x", "weight": -1.0}, "key 'weight'"),
        ({"columns": {}}, "key 'file_name' is missing"),
        ({"file_name": "x", "formatting": "alpaca", "columns": {"messages": "m"}}, "'columns.messages': not used"),
        ({"file_name": "x", "formatting": "sharegpt", "columns": {"prompt": "m"}}, "'columns.prompt': not used"),
        ({"file_name": "x", "formatting": "alpaca", "tags": {}}, "key 'tags': not used with formatting: alpaca"),
        ("x.json", "expected a mapping with file_name, found str"),
    ],
)
def test_refused_entries(tmp_path: Path, entry: Any, message: str) -> None:
    path = info(tmp_path, bad=entry)
    with pytest.raises(UsageError) as raised:
        registered_sets(path)
    assert str(raised.value).startswith(f"{path}: set 'bad': ")
    assert message in str(raised.value)


def test_an_error_in_yaml_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "sets.yaml"
    path.write_text(CHINESE.replace("weight: 2", "weight: much"))
    with pytest.raises(UsageError, match=r"sets.yaml:7: set 'dialogs': key 'weight'"):
        registered_sets(path)


def test_names_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "number.yaml").write_text("2024: {file_name: x}\n")
    with pytest.raises(UsageError, match=r"number.yaml: set 2024: expected text as its name; put it in quotes"):
        sets_of([str(tmp_path / "number.yaml")])
    path = info(tmp_path, alpaca={"file_name": "x"})
    with pytest.raises(UsageError, match="no set 'alpacca'; did you mean 'alpaca'"):
        registered_sets(path, ["alpacca"])
    with pytest.raises(UsageError, match="two sets named 'alpaca'"):
        sets_of([str(path), f"{path}:alpaca"])
    with pytest.raises(UsageError, match="no such file"):
        sets_of([str(tmp_path / "none.yaml")])
    path.write_text("{")
    with pytest.raises(UsageError, match=r"dataset_info\.json: cannot be read"):
        sets_of([str(path)])
