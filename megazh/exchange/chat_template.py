"""The chat template of a Hugging Face folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megazh.errors import DataError
from megazh.exchange.tokenizer_files import TEMPLATE, TOKENIZER_CONFIG
from megazh.files import write_atomic

_DEFAULT = "default"
"""Name of the template that is used, where there are several."""


@dataclass(frozen=True)
class HfTemplate:
    """A template, and what it calls the end and the begin of a text."""

    jinja: str
    eos_token: str | None
    """None where `tokenizer_config.json` names none."""
    bos_token: str | None
    """None where `tokenizer_config.json` names none."""


def read_chat_template(folder: Path) -> HfTemplate | None:
    """The template in `chat_template.jinja`, else in `tokenizer_config.json`; None where neither has one.

    transformers reads both, in this order, and of several templates by name the one called `default`.

    Raises:
        DataError: a file is damaged.
    """
    config = _config(folder / TOKENIZER_CONFIG)
    eos, bos = (_text(config.get(name)) for name in ("eos_token", "bos_token"))
    jinja = config.get("chat_template")
    if isinstance(jinja, list):
        named = {each.get("name"): each.get("template") for each in jinja if isinstance(each, dict)}
        jinja = named.get(_DEFAULT)
    file = folder / TEMPLATE
    try:
        jinja = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        file = folder / TOKENIZER_CONFIG
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: damaged: {error}") from None
    if jinja is None:
        return None
    for name, value in (("chat_template", jinja), ("eos_token", eos), ("bos_token", bos)):
        if value is not None and not isinstance(value, str):
            raise DataError(f"{file}: {name}: expected text, found {value!r}")
    return HfTemplate(jinja, eos, bos)


def write_chat_template(folder: Path, jinja: str) -> None:
    """Make a template that of a folder whose other files stay as they are. Raises DataError or WriteError."""
    write_atomic(folder / TEMPLATE, jinja.encode())
    config = {**_config(folder / TOKENIZER_CONFIG), "chat_template": jinja}
    write_atomic(folder / TOKENIZER_CONFIG, (json.dumps(config, ensure_ascii=False, indent=2) + "\n").encode())


def _text(token: Any) -> Any:
    """The text of a token, which may be written as an object."""
    return token.get("content") if isinstance(token, dict) else token


def _config(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
        if not isinstance(values, dict):
            raise ValueError("not an object")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: damaged: {error}") from None
    return values
