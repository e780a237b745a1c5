"""Registries of data sets for fine-tuning: YAML files, or a `dataset_info.json`, in the shape of LLaMA-Factory.

A registry maps names to entries, whose keys are those of LLaMA-Factory's `data/README.md`, and `weight`. Files are
local; keys for data on a hub are refused. For instance, `data_index/sft/chinese.yaml`:

    alpaca_zh:
      file_name: ../../raw/alpaca_zh.jsonl.zst    # file, folder or glob, relative to the folder of the registry
      num_samples: 20000                          # only the first 20,000 rows that can be used
    dialogs:
      file_name: dialogs/*.parquet
      formatting: sharegpt
      weight: 2.0
      columns: {messages: dialog, system: persona}
      tags: {role_tag: who, content_tag: text, user_tag: Q, assistant_tag: A}
"""

import difflib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from megazh.config import Config, choice, from_mapping, read_mapping
from megazh.conversation.forms import ANY_LAYOUT, Columns, Form, Layout
from megazh.conversation.turns import DEFAULT_TAGS, Tags
from megazh.errors import UsageError

_HUB = "data is read from local files only: download the data set, and give its file as file_name"
_PICTURES = "only text is trained on: leave the set out"
_PAIRS = "it is preference data, which `megazh prefs convert` reads: leave the set out"
_REFUSED = {
    **dict.fromkeys(("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name"), _HUB),
    **dict.fromkeys(("subset", "folder", "revision", "split"), "it belongs to data sets on a hub: remove it"),
    "file_sha1": "files are not compared with a hash here: remove it",
    **dict.fromkeys(("columns.images", "columns.videos", "columns.audios"), _PICTURES),
    **dict.fromkeys(("columns.chosen", "columns.rejected", "columns.kto_tag"), _PAIRS),
}


class Formatting(StrEnum):
    """Form of the rows of a set."""

    ALPACA = "alpaca"
    SHAREGPT = "sharegpt"
    OPENAI = "openai"
    """As sharegpt, with the tags of OpenAI's messages."""


class ColumnNames(Config):
    """Keys of a row, by what they hold."""

    prompt: str = "instruction"
    query: str = "input"
    response: str = "output"
    history: str = "history"
    messages: str | None = None
    """Key of the list of turns; by default `messages` or `conversations`, whichever a row has."""
    system: str = "system"
    tools: str = "tools"


class TagNames(Config):
    """Keys and roles of turns."""

    role_tag: str = "from"
    content_tag: str = "value"
    user_tag: str = "human"
    assistant_tag: str = "gpt"
    observation_tag: str = "observation"
    function_tag: str = "function_call"
    system_tag: str = "system"


class Entry(Config):
    """An entry of a registry."""

    file_name: str
    """File, folder or glob, relative to the folder of the registry."""
    formatting: Annotated[Formatting | None, choice(Formatting)] = None
    """Form of the rows; by default, their keys decide."""
    columns: ColumnNames = ColumnNames()
    tags: TagNames | None = None
    """By default, the names that ShareGPT and OpenAI use."""
    num_samples: Annotated[int, Field(gt=0)] | None = None
    """Number of conversations; the first ones are taken, not random ones as in LLaMA-Factory."""
    weight: Annotated[float, Field(gt=0, strict=False, allow_inf_nan=False)] = 1.0
    """Weight of the set in a mixture, relative to the others."""
    ranking: bool = False
    """Whether the set is preference data, which is refused."""


@dataclass(frozen=True)
class DataSet:
    """A data set: where its files are, and how its rows are written."""

    name: str
    inputs: tuple[str, ...]
    """Files, folders and globs."""
    layout: Layout = ANY_LAYOUT
    weight: float = 1.0
    """Weight in a mixture, relative to the other sets."""
    limit: int | None = None
    """Largest number of conversations; None for all."""
    origin: str = ""
    """Place of its registry entry, for errors."""

    @property
    def fingerprint(self) -> str:
        """SHA-256, as hex, of all that its registry entry says, but for its name and its files."""
        values = [asdict(self.layout), self.weight, self.limit]
        return hashlib.sha256(json.dumps(values, default=sorted).encode()).hexdigest()


def sets_of(inputs: Sequence[str]) -> list[DataSet]:
    """The data sets that a user names.

    Args:
        inputs: registries (`*.yaml`, `*.yml`, `dataset_info.json`), all of their sets or, as `FILE:NAME,NAME`, some;
            and files, folders and globs of rows, which together are the set `files`.

    Raises:
        UsageError: a registry is missing, broken or lacks a name, or two sets have one name.
    """
    found: list[DataSet] = []
    plain: list[str] = []
    for given in inputs:
        path, colon, names = given.rpartition(":")
        if colon and _is_registry(path):
            found += registered_sets(Path(path), names.split(","))
        elif _is_registry(given):
            found += registered_sets(Path(given))
        else:
            plain.append(given)
    if plain:
        found.append(DataSet("files", tuple(plain)))
    seen: dict[str, DataSet] = {}
    for each in found:
        if each.name in seen:
            raise UsageError(
                f"two sets named '{each.name}': {seen[each.name].origin or 'the files given'} and "
                f"{each.origin or 'the files given'}; rename one"
            )
        seen[each.name] = each
    return found


def registered_sets(path: Path, names: Sequence[str] | None = None) -> list[DataSet]:
    """Sets of a registry, in the order of `names`; by default all, in the order of the file.

    Only the entries of these sets are checked, so that one set of a `dataset_info.json` with entries for a hub can be
    read.

    Raises:
        UsageError: the file is missing or broken, has no set of a name, or an entry has an unknown key (the nearest
            known one is named) or one for data on a hub.
    """
    entries, lines = _read_json(path) if path.suffix == ".json" else read_mapping(path)
    for name in names or ():
        if name not in entries:
            near = difflib.get_close_matches(name, map(str, entries), n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known sets: {', '.join(map(str, list(entries)[:8]))}"
            raise UsageError(f"{path}: no set '{name}'; {hint}")
    for name in entries:
        if not isinstance(name, str):
            raise UsageError(f"{path}: set {name!r}: expected text as its name; put it in quotes")
    return [_data_set(path, name, entries[name], lines) for name in (entries if names is None else names)]


def _data_set(path: Path, name: str, values: Any, lines: dict[str, int]) -> DataSet:
    where = f"{path}: set '{name}'"
    if not isinstance(values, dict):
        raise UsageError(f"{where}: expected a mapping with file_name, found {type(values).__name__}")
    _refuse(where, values)
    prefix = f"{name}."
    origins = {
        key.removeprefix(prefix): f"{path}:{line}: set '{name}'"
        for key, line in lines.items()
        if key.startswith(prefix)
    }
    entry = from_mapping(values, Entry, where, origins)
    if entry.ranking:
        raise UsageError(f"{where}: key 'ranking': {_PAIRS}")
    _check_used(where, entry)
    columns = Columns(**entry.columns.model_dump(exclude={"messages"}))
    if entry.columns.messages is not None:
        columns = replace(columns, messages=(entry.columns.messages,))
    form = None if entry.formatting is None else _form(entry.formatting)
    layout = Layout(form, columns, _tags(entry))
    # As text, since a path would lose what a glob means at its end, such as `**`.
    target = str(path.parent / entry.file_name)
    return DataSet(name, (target,), layout, entry.weight, entry.num_samples, where)


def _refuse(where: str, values: dict[str, Any]) -> None:
    columns = values.get("columns")
    keys = [*values, *(f"columns.{key}" for key in (columns if isinstance(columns, dict) else ()))]
    for key in keys:
        if key in _REFUSED:
            raise UsageError(f"{where}: key '{key}': {_REFUSED[key]}")


def _check_used(where: str, entry: Entry) -> None:
    """Raises UsageError for a key that the form of the set has no use for."""
    if entry.formatting is None:
        return
    is_alpaca = entry.formatting is Formatting.ALPACA
    unused = {"messages"} if is_alpaca else {"prompt", "query", "response", "history"}
    for key in sorted(entry.columns.model_fields_set & unused):
        raise UsageError(f"{where}: key 'columns.{key}': not used with formatting: {entry.formatting}; remove it")
    if is_alpaca and entry.tags is not None:
        raise UsageError(f"{where}: key 'tags': not used with formatting: {entry.formatting}; remove it")


def _form(formatting: Formatting) -> Form:
    return Form.ALPACA if formatting is Formatting.ALPACA else Form.SHAREGPT


def _tags(entry: Entry) -> Tags:
    tags = entry.tags
    if tags is None:
        return Tags(keys=(("role", "content"),)) if entry.formatting is Formatting.OPENAI else DEFAULT_TAGS
    return Tags(
        keys=((tags.role_tag, tags.content_tag),),
        user=frozenset({tags.user_tag}),
        assistant=frozenset({tags.assistant_tag}),
        system=frozenset({tags.system_tag}),
        tool=frozenset({tags.observation_tag, tags.function_tag}),
    )


def _is_registry(path: str) -> bool:
    return path.endswith((".yaml", ".yml")) or Path(path).name == "dataset_info.json"


def _read_json(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The object in a JSON file; there are no lines of its keys."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: expected an object of data sets, found {type(value).__name__}")
    return value, {}
