"""Layers of settings: YAML files that include one another and `key=value` on top, each value with its origin.

The values are those of a configuration model (`megazh.config`); `from_mapping` validates them in the end.
"""

import difflib
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from megazh.config import Loader, dotted_fields, keys_beside, nested_model, read_mapping, unknown_key
from megazh.errors import Collector, UsageError

COMMAND_LINE = "command line"
"""Origin of a `key=value` setting."""


@dataclass(frozen=True)
class Settings:
    """Values as they were written, nested as the model is, and where each was written."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    """`FILE:LINE` or "command line" of each dotted key; may name keys that a later layer replaced."""

    def origin(self, key: str) -> str | None:
        """The place where the value of a dotted key was written; None where it was not."""
        value: Any = self.values
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                return None
            value = value[part]
        return self.origins.get(key)

    def value(self, key: str) -> Any:
        """The value of a dotted key that was written, see `origin`."""
        value: Any = self.values
        for part in key.split("."):
            value = value[part]
        return value

    @property
    def on_command_line(self) -> set[str]:
        """Dotted keys whose values are the command line's."""
        return {key for key, place in self.origins.items() if place == COMMAND_LINE and self.origin(key)}

    def with_places(self, message: str) -> str:
        """A message, followed by the places where the keys were written that it names.

        A key is named by its dotted name, by `name=`, or by a last name of several words such as `micro_batch_size`.
        """
        named = {}
        for key in self.origins:
            section, _, name = key.rpartition(".")
            forms = [rf"\b{re.escape(key)}\b", rf"(?<![\w.-]){name}="]
            forms += [rf"(?<![\w.=]){name}\b"] if "_" in name else []
            place = self.origin(key) if section else None
            if place and place not in message and re.search("|".join(forms), message):
                named[name] = f"on the {place}" if place == COMMAND_LINE else f"in {place}"
        if not named:
            return message
        return f"{message} ({', '.join(f'{name} is set {place}' for name, place in named.items())})"


@dataclass(frozen=True)
class Synonym:
    """Another name of a key in a `key=value` setting; an annotation of its field."""

    name: str


def read_layers(
    path: Path | str,
    alternatives: Sequence[tuple[str, str]] = (),
    sections: Collection[str] = (),
    inside: Sequence[Path] = (),
    library: Path | None = None,
) -> Settings:
    """Read a YAML file on top of those that its key `include` names.

    `include: base.yaml`, or a list of files, relative to the including file, or else in the library. Files included
    later override earlier ones, and the file itself overrides all of them, key by key, also inside nested mappings.

    Args:
        path: the file.
        alternatives: pairs of dotted keys of which a recipe needs one: a layer that gives one drops the other from
            the layers below.
        sections: keys that hold a mapping; one that is written without any keys below it changes nothing.
        inside: the files that include this one, outermost first.
        library: the folder of files that can be included from anywhere by their names.

    Raises:
        UsageError: as `read_mapping`, and for a file that includes itself or one that is not there; an error in an
            included file says which file includes it.
    """
    path = Path(path)
    values, lines = read_mapping(path)
    if path.resolve() in inside:
        raise UsageError(f"{path}: includes itself, by way of {', '.join(file.name for file in inside)}")
    values = {key: value for key, value in values.items() if value is not None or key not in sections}
    include = values.pop("include", [])
    names = [include] if isinstance(include, str) else include
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{path}: key 'include': expected the name of a file or a list of such, found {include!r}")
    below = Settings()
    for name in names:
        here = f"{path}:{lines['include']}"
        file = _included(name, path, library, here)
        try:
            included = read_layers(file, alternatives, sections, [*inside, path.resolve()], library)
        except UsageError as error:
            raise UsageError(f"{error} (included by {here})") from None
        below = _stacked(below, included, alternatives)
    return _stacked(below, Settings(values, {key: f"{path}:{line}" for key, line in lines.items()}), alternatives)


def _included(name: str, path: Path, library: Path | None, here: str) -> Path:
    """The file that an include names: beside the including file, else in the library."""
    folders = [path.parent, *([library] if library else [])]
    found = [folder / name for folder in folders if "\0" not in name and (folder / name).is_file()]
    # In a file that is named like the one that it includes, the library's is meant.
    others = [file for file in found if file.resolve() != path.resolve()]
    if found:
        return (others or found)[0]
    where = " or ".join(str(folder) for folder in dict.fromkeys(folders))
    there = {file.name for folder in folders for file in folder.glob("*.y*ml") if file.resolve() != path.resolve()}
    near = difflib.get_close_matches(name if Path(name).suffix else f"{name}.yaml", sorted(there), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UsageError(f"{here}: include {name!r}: no such file in {where}{hint}")


def override(
    settings: Settings, assignments: Sequence[str], model: type[BaseModel], alternatives: Sequence[tuple[str, str]] = ()
) -> Settings:
    """Apply `key=value` settings; values are YAML, and a unique last name is enough for a key.

    `learning_rate=3e-4` is `optimizer.learning_rate=3e-4` where no other section has a key of that name.

    Args:
        settings: the layers below.
        assignments: `key=value` or `--key=value`, later ones winning.
        model: the model whose keys are meant.
        alternatives: as in `read_layers`. If both keys of a pair are on the command line, both are kept, and the
            recipe's own check refuses them.

    Raises:
        MegazhError: no `=`, not valid YAML, or a key that is unknown, ambiguous or a section; names the candidates.
            Several such settings are refused together.
    """
    above, found = Settings(), Collector()
    for text in assignments:
        with found.collecting():
            above = _stacked(above, _assigned(text, model))
    found.raise_all()
    return _stacked(settings, above, alternatives)


def _assigned(text: str, model: type[BaseModel]) -> Settings:
    """A layer of one `key=value` setting."""
    written, equals, value_text = text.removeprefix("--").partition("=")
    if not equals:
        raise UsageError(f"'{text}': expected key=value, such as {[name for name, _ in dotted_fields(model)][-1]}=...")
    key = resolve_key(written, model)
    try:
        value = yaml.load(value_text, Loader=Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UsageError(f"'{text}': the value is not valid YAML") from None
    section = _section(key, model)
    if section is not None and not (isinstance(value, dict) and _has_names(value)):
        others = [name for name, _ in dotted_fields(model) if name.endswith(f".{key}")]
        keys = ", ".join([f"{key}.{name}" for name in section.model_fields] + others)
        raise UsageError(f"'{text}': '{key}' is a section; give one of its keys: {keys}")
    return Settings(_nested(key, value), dict.fromkeys((key, *_keys_in(value, key)), COMMAND_LINE))


def resolve_key(key: str, model: type[BaseModel]) -> str:
    """The dotted key that `key` means: itself, the only one that ends in it, or the one that it is a synonym of.

    Raises:
        UsageError: no key ends in it, or several do; names the candidates.
    """
    known = [name for name, _ in dotted_fields(model)]
    if key in known:
        return key
    for name, each in dotted_fields(model):
        if any(isinstance(mark, Synonym) and mark.name == key for mark in each.metadata):
            return name
    candidates = [name for name in known if key and name.endswith(f".{key}")]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise UsageError(f"key '{key}' is ambiguous: give one of {', '.join(candidates)}")
    raise UsageError(unknown_key(key, model, keys_beside(model, tuple(key.split(".")))))


def _section(key: str, model: type[BaseModel]) -> type[BaseModel] | None:
    """The model of a key that is a whole section; None for a plain value or an optional mapping."""
    annotation = dict(dotted_fields(model))[key].annotation
    return annotation if isinstance(annotation, type) and nested_model(annotation) is annotation else None


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _has_names(values: dict[Any, Any]) -> bool:
    """Whether all keys of a mapping are text."""
    return all(isinstance(key, str) for key in values)


def _keys_in(value: Any, prefix: str) -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield f"{prefix}.{name}"
            yield from _keys_in(inner, f"{prefix}.{name}")


def _stacked(below: Settings, above: Settings, alternatives: Sequence[tuple[str, str]] = ()) -> Settings:
    """One layer on top of another."""
    values = below.values
    for one, other in [*alternatives, *((other, one) for one, other in alternatives)]:
        if _has(above.values, one) and not _has(above.values, other):
            values = _without(values, other)
    return Settings(_merged(values, above.values), {**below.origins, **above.origins})


def _has(values: Any, key: str) -> bool:
    first, _, rest = key.partition(".")
    return isinstance(values, dict) and first in values and (not rest or _has(values[first], rest))


def _without(values: dict[str, Any], key: str) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    if not _has(values, key):
        return values
    if rest:
        return {**values, first: _without(values[first], rest)}
    return {name: value for name, value in values.items() if name != first}


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge mappings by key; those with a key that is no text, such as `{0: 128, 2B: 256}`, are values of their own."""
    if not _has_names(below) and not _has_names(above):
        return above
    both = {
        key: _merged(below[key], value)
        for key, value in above.items()
        if isinstance(value, dict) and isinstance(below.get(key), dict)
    }
    return {**below, **above, **both}
