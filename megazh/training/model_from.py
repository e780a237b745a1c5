"""The key `from` of a recipe's section `model`: the shape of a model that exists."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megazh.errors import Collector, UsageError
from megazh.model.config import ModelConfig
from megazh.settings import COMMAND_LINE, Settings
from megazh.training.model_source import read_shape
from megazh.training.rope_choice import with_rope_choice

FREE = {"residual_dropout", "attention_dropout", "initializer_range", "scale_residual_init"}
"""Keys that may differ from those that weights were trained with."""
COMPUTED_WITH = {"norm_eps"}
"""Keys that change what trained weights compute, and that one may want to change all the same."""
POSITIONS = {"rope_theta", "rope_scaling"}
"""Keys of rotary positions, which one may want to change for longer texts."""

_KEY = "model.from"


def split_from(assignments: list[str]) -> tuple[str | None, list[str]]:
    """The value of the last `model.from=FOLDER` among `key=value` settings, and the other settings."""
    found = [text for text in assignments if text.removeprefix("--").startswith(f"{_KEY}=")]
    return (found[-1].partition("=")[2] if found else None), [text for text in assignments if text not in found]


def with_model(settings: Settings, on_command_line: str | None) -> Settings:
    """Fill the section `model` from the folder that its key `from` names, if it has that key, and write out its choice
    of rotary positions (see `with_rope_choice`).

    The folder is a Hugging Face folder, an imported folder, a checkpoint or a run, relative to the current folder. Keys
    that stand beside `from` override those of the folder where they are in `FREE` or `COMPUTED_WITH`.

    Args:
        settings: the settings of a recipe.
        on_command_line: the folder, where the command line names it.

    Raises:
        UsageError: another key contradicts the folder, or there is no model in it.
        DataError: a file in it is damaged, or its model cannot be computed.
    """
    section = settings.values.get("model", {})
    if not isinstance(section, dict) or ("from" not in section and on_command_line is None):
        return with_rope_choice(settings, None)
    beside = {key: value for key, value in section.items() if key != "from"}
    folder = on_command_line or section["from"]
    origin = COMMAND_LINE if on_command_line else settings.origin(_KEY)
    if not isinstance(folder, str) or not folder:
        raise UsageError(f"{origin}: {_KEY}: expected the path of a folder, found {folder!r}")
    there, _ = read_shape(Path(folder))
    model = _written(there)
    found = Collector()
    for key, value in beside.items():
        if key in model and key not in FREE | COMPUTED_WITH | POSITIONS and value != model[key]:
            where = settings.origin(f"model.{key}")
            found.add(
                UsageError(f"{where}: model.{key}={value}, and {_KEY}={folder} has {model[key]}; leave one of them out")
            )
    found.raise_all()
    shape = there.model_dump(mode="json", exclude_none=True)
    # rope_scaling has an origin where somebody chose it.
    origins = {f"model.{key}": folder for key in shape if key not in {*beside, "rope_scaling"}}
    filled = Settings({**settings.values, "model": {**shape, **beside}}, {**settings.origins, **origins})
    return with_rope_choice(filled, Path(folder))


def differences(one: ModelConfig, other: ModelConfig) -> Iterator[tuple[str, Any, Any]]:
    """The keys in which two models differ, with both values; defaults that follow from other keys count as written."""
    second = _written(other)
    for key, value in _written(one).items():
        if value != second[key]:
            yield key, value, second[key]


def _written(model: ModelConfig) -> dict[str, Any]:
    """All keys of a model with their values."""
    values = model.model_dump(mode="json")
    return {**values, "num_key_value_heads": model.kv_heads, "head_dim": model.head_size}
