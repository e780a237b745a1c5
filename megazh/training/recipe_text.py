"""A whole recipe as text: YAML with every key, its docstring, its value, and where the value was written."""

import textwrap
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megazh.config import nested_model
from megazh.settings import Settings
from megazh.training.recipe import MAY_CHANGE, Recipe, read_recipe

_WIDTH = 110
_ORIGIN_COLUMN = 44


def recipe_text(path: Path | str, assignments: Sequence[str] = ()) -> Iterator[str]:
    """Yield the lines of a recipe with all its keys; together they are a recipe file of the same meaning.

    Args:
        path: the recipe's file.
        assignments: `key=value` settings on top.

    Raises:
        UsageError: the recipe cannot be read.
    """
    recipe, settings = read_recipe(path, assignments)
    yield "# " + " ".join(f"{path} {' '.join(assignments)}".split())
    for name, field in Recipe.model_fields.items():
        section: BaseModel = getattr(recipe, name)
        yield ""
        yield from _comment(field.description or "", indent=0)
        yield f"{name}:"
        yield from _keys(section, name, settings, indent=2)


def _keys(section: BaseModel, dotted: str, settings: Settings, indent: int) -> Iterator[str]:
    """The keys of a section, and below a key that holds a mapping of keys, those."""
    lead = " " * indent
    for key, field in type(section).model_fields.items():
        yield from _comment(_meaning(field), indent)
        value = getattr(section, key)
        if isinstance(value, BaseModel):
            yield f"{lead}{key}:"
            yield from _keys(value, f"{dotted}.{key}", settings, indent + 2)
            continue
        inner = nested_model(field.annotation)
        for name, below in inner.model_fields.items() if inner else ():
            yield from _comment(f"{key}.{name}: {_meaning(below)}", indent)
        line = f"{lead}{key}: {as_yaml(value)}"
        yield f"{line:<{_ORIGIN_COLUMN}}  # {settings.origin(f'{dotted}.{key}') or 'default'}"


def _meaning(field: FieldInfo) -> str:
    choices = _choices(field.annotation)
    words = [field.description or ""]
    if choices:
        words.append(f"One of {', '.join(choices)}.")
    words += [f"({MAY_CHANGE.capitalize()}.)"] if MAY_CHANGE in field.metadata else []
    return " ".join(words)


def _choices(annotation: Any) -> list[str]:
    """The words that a key may hold, where it is an enumeration."""
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        return [member.value for member in annotation]
    found: list[str] = []
    if str in get_args(annotation):  # any other word as well
        return found
    for argument in get_args(annotation):
        found += [argument] if isinstance(argument, str) else _choices(argument)
    return found


def _comment(text: str, indent: int) -> list[str]:
    lead = f"{' ' * indent}# "
    words = " ".join(text.replace("`", "").split())
    return textwrap.wrap(words, _WIDTH, initial_indent=lead, subsequent_indent=lead)


def as_yaml(value: Any) -> str:
    """The value of a key in YAML, on one line."""
    if isinstance(value, StrEnum):
        value = value.value
    if isinstance(value, list):
        value = [each.value if isinstance(each, StrEnum) else each for each in value]
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")
