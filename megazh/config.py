"""Typed configuration: YAML files into frozen models, where an unknown key is an error that names the nearest one."""

import difflib
import re
from collections.abc import Iterator, Sequence
from enum import StrEnum
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from megazh.errors import UsageError


class Config(BaseModel):
    """Base of every configuration model: unknown keys refused, no silent conversion, nothing changed later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


_SCALES = {"k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}


def parse_amount(text: str) -> int:
    """A whole number that may have a unit: `1500000`, `1.5M`, `30B`. Raises ValueError for anything else."""
    scale = _SCALES.get(text[-1:].lower(), 1)
    try:
        number = Fraction(text[:-1] if scale > 1 else text) * scale
    except (ValueError, ZeroDivisionError):
        number = Fraction(0)
    if number < 1 or number.denominator != 1:
        raise ValueError(f"expected a number such as 1500000, 500M or 30B, found {text!r}")
    return int(number)


def choice(kind: type[StrEnum]) -> BeforeValidator:
    """Lets a key of the enumeration `kind` be written as its text; for `Annotated[Kind, choice(Kind)]`."""

    def member(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value not in list(kind):
            raise ValueError(f"expected one of {', '.join(kind)}")
        return kind(value)

    return BeforeValidator(member)


ConfigType = TypeVar("ConfigType", bound=Config)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error and `5e-4` is a number (YAML 1.1 calls it text)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def load_yaml(path: Path | str, model: type[ConfigType]) -> ConfigType:
    """Read a YAML file into `model`.

    Raises:
        UsageError: the file is missing, is no YAML mapping, or does not fit the model; one line that names
            the file, the key, what was expected and, for an unknown key, the nearest known one.
    """
    return from_mapping(read_mapping(path), model, str(path))


def read_mapping(path: Path | str) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UsageError as `load_yaml` does."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    try:
        values = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UsageError(f"{path}{where}: not valid YAML: {problem}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected a mapping of keys to values, found {type(values).__name__}")
    return values


def read_layers(
    path: Path | str, alternatives: Sequence[tuple[str, str]] = (), inside: Sequence[Path] = ()
) -> dict[str, Any]:
    """The mapping in a YAML file on top of those that its key `include` names.

    `include: base.yaml`, or a list of such, relative to the file. What is included first is overridden by what comes
    later and by the file itself, key by key, also inside of nested mappings.

    Args:
        path: the file.
        alternatives: pairs of keys of which one is wanted: a file that gives one drops the other from those below.
        inside: the files that are being read because they include this one.

    Raises:
        UsageError: as `load_yaml`, and for a file that includes itself.
    """
    path = Path(path)
    if path.resolve() in inside:
        raise UsageError(f"{path}: includes itself, by way of {', '.join(file.name for file in inside)}")
    values = read_mapping(path)
    include = values.pop("include", [])
    names = [include] if isinstance(include, str) else include
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{path}: key 'include': expected the name of a file or a list of such, found {include!r}")
    merged: dict[str, Any] = {}
    for name in names:
        merged = _merged(merged, read_layers(path.parent / name, alternatives, [*inside, path.resolve()]))
    for one, other in [*alternatives, *((other, one) for one, other in alternatives)]:
        if one in values and other not in values:
            merged.pop(other, None)
    return _merged(merged, values)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merged(below[key], value) for key, value in above.items() if _nested(below.get(key), value)}
    return {**below, **above, **both}


def _nested(below: Any, above: Any) -> bool:
    return isinstance(below, dict) and isinstance(above, dict)


def override(values: dict[str, Any], settings: Sequence[str], model: type[BaseModel]) -> dict[str, Any]:
    """`values` with `key=value` settings applied; `a.b=value` reaches into nested mappings, values are YAML.

    Raises:
        UsageError: no `=`, not valid YAML, or a key that `model` does not know, with the nearest that it does.
    """
    known = list(_dotted_keys(model))
    for setting in settings:
        key, equals, text = setting.removeprefix("--").partition("=")
        if not equals:
            raise UsageError(f"'{setting}': expected key=value, such as {known[-1]}=...")
        if key not in known:
            leaf = [name for name in known if name.rpartition(".")[2] == key]
            near = leaf or difflib.get_close_matches(key, known, n=1)
            raise UsageError(f"unknown key '{key}'" + (f"; did you mean '{near[0]}'?" if near else ""))
        try:
            value = yaml.load(text, Loader=_Loader)
        except (yaml.YAMLError, ValueError):
            raise UsageError(f"'{setting}': the value is not valid YAML") from None
        for part in reversed(key.split(".")):
            value = {part: value}
        values = _merged(values, value)
    return values


def _dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        inner = _model_in(field.annotation)
        if inner is not None:
            yield from _dotted_keys(inner, f"{prefix}{name}.")


def from_mapping(values: dict[str, Any], model: type[ConfigType], where: str) -> ConfigType:
    """Validate a mapping against `model`; `where` names it in errors. Raises UsageError as `load_yaml` does."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"{where}: {_describe(error.errors()[0], model)}") from None


def _describe(error: ErrorDetails, model: type[BaseModel]) -> str:
    location = error["loc"]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    if error["type"] == "extra_forbidden":
        known = _keys_beside(model, location)
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        if near:
            return f"unknown key '{key}'; did you mean '{near[0]}'?"
        return f"unknown key '{key}'" + (f"; known keys: {', '.join(known)}" if known else "")
    if error["type"] == "missing":
        return f"key '{key}' is missing"
    message = error["msg"].removeprefix("Value error, ")
    found = "" if isinstance(error["input"], dict | list) else f", found {error['input']!r}"
    return f"key '{key}': {message}{found}" if key else message


def _keys_beside(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys that are known at the place of the last element of `location`; none where that cannot be told."""
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        if part not in model.model_fields:  # a key of a dictionary, or the name of a choice
            continue
        inner = _model_in(model.model_fields[part].annotation)
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _model_in(argument)
        if found is not None:
            return found
    return None
