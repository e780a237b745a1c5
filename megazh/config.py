"""Typed configuration: YAML files into frozen models, where an unknown key is an error that names the nearest one."""

import difflib
import re
from collections.abc import Iterator, Mapping
from enum import StrEnum
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from megazh.errors import UsageError


class Config(BaseModel):
    """Base of every configuration model: unknown keys refused, no silent conversion, frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


_SCALES = {"k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}


def parse_amount(text: str) -> int:
    """Read a whole number that may have a unit: `1500000`, `1.5M`, `30B`. Raises ValueError for anything else."""
    scale = _SCALES.get(text[-1:].lower(), 1)
    try:
        number = Fraction(text[:-1] if scale > 1 else text) * scale
    except (ValueError, ZeroDivisionError):
        number = Fraction(0)
    if number < 1 or number.denominator != 1:
        raise ValueError(f"expected a number such as 1500000, 500M or 30B, found {text!r}")
    return int(number)


def choice(members: type[StrEnum], *others: str) -> BeforeValidator:
    """Let a member of an enumeration be written as its text; for `Annotated[Members, choice(Members)]`.

    Args:
        members: the enumeration.
        others: further words that are allowed and stay text.
    """

    def member(value: Any) -> Any:
        if not isinstance(value, str) or value in others:
            return value
        if value not in list(members):
            raise ValueError(f"expected one of {', '.join([*others, *members])}")
        return members(value)

    return BeforeValidator(member)


ConfigType = TypeVar("ConfigType", bound=Config)


class Loader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error.

    As in YAML 1.2, `5e-4` is a number, which YAML 1.1 calls text; `010` and `1:30` are text, which YAML 1.1 calls 8 and
    90.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
            if isinstance(key, str | int):
                seen.add(key)
        return super().construct_mapping(node, deep)


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:int"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)
Loader.add_implicit_resolver(
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
    return from_mapping(read_mapping(path)[0], model, str(path))


def read_mapping(path: Path | str) -> tuple[dict[str, Any], dict[str, int]]:
    """Read the mapping in a YAML file, and the line of each of its keys, nested ones as `a.b`.

    Raises:
        UsageError: the file is missing, unreadable, or holds no YAML mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a name with a null byte
        raise UsageError(f"{path}: cannot be read: {error}") from None
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        values = None if node is None else loader.construct_document(node)
        lines = dict(_lines_of_keys(node)) if isinstance(node, yaml.MappingNode) else {}
    except RecursionError:
        raise UsageError(f"{path}: not valid YAML: nested too deeply, or a value that contains itself") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UsageError(f"{path}{where}: not valid YAML: {problem}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected a mapping of keys to values, found {type(values).__name__}")
    return values, lines


def _lines_of_keys(node: yaml.MappingNode, prefix: str = "") -> Iterator[tuple[str, int]]:
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        yield key, key_node.start_mark.line + 1
        if isinstance(value_node, yaml.MappingNode):
            yield from _lines_of_keys(value_node, f"{key}.")


def dotted_fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """All fields of a model and of the models nested in it, by dotted name; a nested model comes before its fields.

    Models inside of lists and dictionaries are left out: no dotted name reaches them.
    """
    for name, field in model.model_fields.items():
        yield prefix + name, field
        inner = None if get_origin(field.annotation) in (list, dict) else nested_model(field.annotation)
        if inner is not None:
            yield from dotted_fields(inner, f"{prefix}{name}.")


def nested_model(annotation: Any) -> type[BaseModel] | None:
    """The model in an annotation such as `Model`, `Model | None` or `list[Model]`; None where there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = nested_model(argument)
        if found is not None:
            return found
    return None


def from_mapping(
    values: dict[str, Any], model: type[ConfigType], where: str, origins: Mapping[str, str] | None = None
) -> ConfigType:
    """Validate a mapping against `model`.

    Args:
        values: keys and values, nested as the model is.
        model: the model that they should fit.
        where: the name of the source in errors.
        origins: the place where each dotted key was written, if known; stands in an error in place of `where`.

    Raises:
        UsageError: one line, as in `load_yaml`.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = _by_key(error.errors(), model)[0]
        raise UsageError(_located(first, model, where, origins)) from None


def all_errors(values: dict[str, Any], model: type[Config], where: str, origins: Mapping[str, str]) -> list[str]:
    """The errors of a mapping that does not fit `model`: a line for each key, as `from_mapping` has them."""
    try:
        model.model_validate(values)
    except ValidationError as error:
        return [_located(each, model, where, origins) for each in _by_key(error.errors(), model)]
    return []


def _by_key(errors: list[ErrorDetails], model: type[BaseModel]) -> list[ErrorDetails]:
    """The first error of each key, unknown keys first; missing ones go where an unknown key may be what was meant."""
    unknown = [each for each in errors if each["type"] == "extra_forbidden"]
    others = [each for each in errors if each["type"] not in ("extra_forbidden", "missing" if unknown else "")]
    found: dict[str, ErrorDetails] = {}
    known = _field_types(model)
    for each in [*unknown, *others]:
        words = [str(part) for part in each["loc"]]
        dotted = [".".join(words[:count]) for count in range(len(words), 0, -1)]
        # An annotation with alternatives, such as `Dtype | Literal["auto"]`, has an error for each of them.
        key = next((name for name in dotted if name in known), "")
        found.setdefault(".".join(words) if nested_model(known.get(key)) else key or ".".join(words), each)
    return list(found.values())


def _located(error: ErrorDetails, model: type[BaseModel], where: str, origins: Mapping[str, str] | None) -> str:
    return f"{_place(error, model, origins or {}) or where}: {_describe(error, model)}"


def _place(error: ErrorDetails, model: type[BaseModel], origins: Mapping[str, str]) -> str:
    """The place where the key of an error was written; of an error about several keys, the places of those it names."""
    key = ".".join(part for part in error["loc"] if isinstance(part, str))
    if error["type"] != "value_error" or (key and nested_model(_field_types(model).get(key)) is None):
        return origins.get(key, "")
    words = set(re.findall(r"\w+", error["msg"]))
    below = f"{key}." if key else ""
    named = [
        name
        for name, annotation in _field_types(model).items()
        if name.startswith(below) and name.rpartition(".")[2] in words and nested_model(annotation) is None
    ]
    return ", ".join(dict.fromkeys(origins[name] for name in named if name in origins)) or origins.get(key, "")


def _field_types(model: type[BaseModel]) -> dict[str, Any]:
    return {name: field.annotation for name, field in dotted_fields(model)}


def _describe(error: ErrorDetails, model: type[BaseModel]) -> str:
    location = error["loc"]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    if error["type"] == "extra_forbidden" and key in _field_types(model):  # as one word with a dot in it
        section, _, name = key.rpartition(".")
        return f"key '{key}': in a file, write '{name}' inside of '{section}:'"
    if error["type"] == "extra_forbidden":
        return unknown_key(key, model, keys_beside(model, location), isinstance(error["input"], dict))
    if error["type"] == "missing":
        return f"key '{key}' is missing"
    if error["type"] == "model_type":
        return f"key '{key}': expected a mapping of its keys, found {error['input']!r}"
    message = error["msg"].removeprefix("Value error, ")
    found = f", found {error['input']!r}"
    if isinstance(error["input"], dict | list) or message.endswith(found):
        found = ""
    return f"key '{key}': {message}{found}" if key else message


def unknown_key(key: str, model: type[BaseModel], beside: list[str], is_section: bool = False) -> str:
    """Message for a key that `model` lacks: names the same key elsewhere, else the nearest one.

    Args:
        key: the dotted key as it was given.
        model: the model at the root.
        beside: the keys known at that place; empty where they cannot be named.
        is_section: whether the key's value is a mapping; only then can a section be meant.
    """
    parent, dot, last = key.rpartition(".")
    fields = dict(dotted_fields(model))
    sections = set() if is_section else {name for name, field in fields.items() if _is_section(field)}
    known = [name for name in fields if name not in sections]
    near = [name for name in known if name.rpartition(".")[2] == last]
    names = [name for name in beside if f"{parent}{dot}{name}" not in sections]
    near = near or [f"{parent}{dot}{name}" for name in difflib.get_close_matches(last, names, n=1)]
    if not near:
        by_last = {name.rpartition(".")[2]: name for name in reversed(known)}
        near = [by_last[name] for name in difflib.get_close_matches(last.lower(), by_last, n=1)]
    near = near or [name for name in known if _abbreviates(last.lower(), name.rpartition(".")[2])]
    if near:
        candidates = "' or '".join(near)
        return f"unknown key '{key}'; did you mean '{candidates}'?"
    return f"unknown key '{key}'" + (f"; known keys: {', '.join(beside)}" if beside else "")


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and nested_model(field.annotation) is field.annotation


def _abbreviates(word: str, name: str) -> bool:
    """Whether a word is one of the words of a name, as `size` of `hidden_size`, or its initials, as `lr`."""
    words = name.split("_")
    return word in words or (len(words) > 1 and word == "".join(each[0] for each in words))


def keys_beside(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Keys known where the last element of `location` stands; empty where they cannot be named."""
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        if part not in model.model_fields:  # a key of a dictionary, or the name of a choice
            continue
        inner = nested_model(model.model_fields[part].annotation)
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)
