"""The key `rope_scaling` of a recipe as a choice: how a trained model goes on at a longer length."""

import math
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from megazh.errors import UsageError
from megazh.model.config import ModelConfig, RopeScaling, RopeScalingMethod
from megazh.settings import Settings
from megazh.training.model_source import read_shape

KEY = "model.rope_scaling"
AUTO = "auto"
"""Word for the factor that follows from seq_len and the context of the model."""
_WEIGHTS = "checkpoint.initial_checkpoint"


class RopeChoice(StrEnum):
    """Rotary positions of a model that is trained on at a longer length."""

    NONE = "none"
    """Those of the model in `from`, or without a scaling: it has to learn the positions that it never met."""
    LINEAR = "linear"
    """Positions divided by the factor (arXiv 2306.15595)."""
    YARN = "yarn"
    """Low frequencies divided by the factor, attention sharpened (arXiv 2309.00071)."""
    THETA = "theta"
    """A larger rope_theta: theta factor^(d / (d - 2)), d the rotated dimensions of a head (NTK-aware interpolation,
    arXiv 2309.00071, section 3.1)."""


def context_length(model: ModelConfig, trained_length: int) -> int:
    """Longest text in tokens that the positions of a model are made for.

    Args:
        model: the model.
        trained_length: tokens per sample that it was last trained on; less than the context where a model of long texts
            was fine-tuned on short ones.
    """
    scaling = model.rope_scaling
    if scaling is None or scaling.original_max_position_embeddings is None:
        return trained_length
    return max(trained_length, int(scaling.factor * scaling.original_max_position_embeddings))


def rotations(model: ModelConfig) -> tuple[float, dict[str, Any] | None]:
    """What decides the rotary positions of a model: equal for models that rotate alike."""
    scaling = model.rope_scaling
    unused = {"original_max_position_embeddings"} if scaling and scaling.type is RopeScalingMethod.LINEAR else set()
    return model.rope_theta, scaling.model_dump(mode="json", exclude=unused) if scaling else None


def rope_text(model: ModelConfig) -> str:
    """Rotary positions of a model in words, such as `theta 1e+06, yarn scaling by 4`."""
    scaling = model.rope_scaling
    return f"theta {model.rope_theta:g}" + (f", {scaling.type} scaling by {scaling.factor:g}" if scaling else "")


def raised_theta(model: ModelConfig, factor: float) -> float:
    """`rope_theta` of a model for texts that are longer by a factor: its lowest frequency is divided by the factor.

    Raises:
        UsageError: the model rotates two dimensions of a head, whose only frequency no theta changes.
    """
    dim = model.rotary_dim
    if dim == 2:
        raise UsageError(f"rope_scaling=theta: of {dim} rotated dimensions, theta changes no frequency; take linear")
    return model.rope_theta * factor ** (dim / (dim - 2))


def with_rope_choice(settings: Settings, folder: Path | None) -> Settings:
    """Settings in which a choice of positions is written out as `rope_theta` and `rope_scaling`.

    A choice is one of `RopeChoice`, or a mapping of `type`, `factor` and yarn's own keys with `factor: auto`, or with
    `type: theta`. `auto` is seq_len / context, rounded up, where the context is that of the model in
    `checkpoint.initial_checkpoint`, else of the one in `model.from`. A factor that `auto` gives comes on top of a
    scaling of the same type that the model has already: both are multiplied. At a factor of 1 positions stay.

    Args:
        settings: the settings of a recipe.
        folder: the folder of `model.from`, if any.

    Raises:
        UsageError: there is no such choice, no model to start from, or one with another scaling.
        DataError: a file of the model is damaged.
    """
    model = settings.values.get("model")
    if not isinstance(model, dict):
        return settings
    origin = settings.origin(KEY)
    try:
        chosen = _chosen(model.get("rope_scaling"))
        rope = chosen and _written_out(settings, model, folder, *chosen)
    except UsageError as error:
        raise UsageError(f"{origin}: {KEY}: {error}") from None
    if not rope:
        return settings
    origins = {f"model.{key}": origin for key in rope if origin}
    return Settings({**settings.values, "model": {**model, **rope}}, {**settings.origins, **origins})


def _chosen(given: Any) -> tuple[RopeChoice, float | None, dict[str, Any]] | None:
    """The choice in a value of the key, its factor (None: auto) and yarn's own keys; None for a plain scaling."""
    if isinstance(given, str):
        if given not in list(RopeChoice):
            raise UsageError(
                f"expected one of {', '.join(RopeChoice)}, or a mapping of type and factor; found {given!r}"
            )
        return RopeChoice(given), None, {}
    if not isinstance(given, Mapping) or given.get("type") not in list(RopeChoice):
        return None
    choice, factor = RopeChoice(given["type"]), given.get("factor", AUTO)
    if choice in list(RopeScalingMethod) and given.get("factor") != AUTO:
        return None
    own = {key: value for key, value in given.items() if key not in ("type", "factor")}
    if choice is not RopeChoice.YARN and own:
        raise UsageError(f"{choice} takes no {', '.join(own)}")
    if "original_max_position_embeddings" in own:
        raise UsageError("with factor: auto, original_max_position_embeddings follows from the model; leave it out")
    if factor == AUTO or choice is RopeChoice.NONE:
        return choice, None, own
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not 1 <= factor < math.inf:
        raise UsageError(f"factor: expected auto or a number of at least 1, found {factor!r}")
    return choice, float(factor), own


def _written_out(
    settings: Settings,
    model: Mapping[str, Any],
    folder: Path | None,
    choice: RopeChoice,
    factor: float | None,
    own: Mapping[str, Any],
) -> dict[str, Any]:
    """`rope_scaling` and perhaps `rope_theta` for a section `model`."""
    if choice is RopeChoice.NONE and folder is None:
        return {"rope_scaling": None}
    weights = _value(settings, _WEIGHTS)
    source = Path(weights) if isinstance(weights, str) and choice is not RopeChoice.NONE else folder
    if source is None:
        raise UsageError(
            f"{choice} goes on from a trained model; set {_WEIGHTS} or model.from, or give all keys of rope_scaling as "
            "numbers"
        )
    there, trained = read_shape(source)
    context, length = context_length(there, trained), _value(settings, "batch.seq_len")
    if factor is None:  # a seq_len that is none is an error of its own
        factor = float(-(-length // context)) if type(length) is int and length > 0 else 1.0
    rope, theta = _rope(there, context, choice, factor, own), model.get("rope_theta")
    if choice is RopeChoice.THETA and theta is not None and theta not in (there.rope_theta, rope.get("rope_theta")):
        raise UsageError(f"theta sets model.rope_theta, which is {theta}; leave one of them out")
    return rope


def _value(settings: Settings, key: str) -> Any:
    """The value of a key in a section; None where there is none."""
    section, _, name = key.partition(".")
    values = settings.values.get(section)
    return values.get(name) if isinstance(values, dict) else None


def _rope(
    model: ModelConfig, context: int, choice: RopeChoice, factor: float, own: Mapping[str, Any]
) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of a model whose context grows by a factor."""
    before = model.rope_scaling
    written = before.model_dump(mode="json", exclude_none=True) if before else None
    if choice is RopeChoice.NONE or factor <= 1:
        return {"rope_scaling": written}
    if choice is RopeChoice.THETA:
        if before is not None and before.type is RopeScalingMethod.YARN:
            raise UsageError(_already(before, choice))
        return {"rope_theta": raised_theta(model, factor), "rope_scaling": written}
    if before is not None and (before.type.value != choice.value or before.attention_factor is not None):
        raise UsageError(_already(before, choice))
    original = before.original_max_position_embeddings if before else context
    scaling = {
        "type": choice.value,
        "factor": factor * (before.factor if before else 1.0),
        "original_max_position_embeddings": original,
    }
    ramp = {key: written[key] for key in ("beta_fast", "beta_slow")} if written and choice is RopeChoice.YARN else {}
    return {"rope_scaling": {**scaling, **ramp, **own}}


def _already(before: RopeScaling, choice: RopeChoice) -> str:
    own = f" and attention_factor {before.attention_factor:g}" if before.attention_factor is not None else ""
    return (
        f"the model has {before.type} scaling by {before.factor:g}{own} already, and {choice} cannot go on from it; "
        f"take {before.type} or none, or give the keys of rope_scaling as numbers"
    )
