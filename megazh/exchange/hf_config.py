"""`config.json` of a Hugging Face folder: written so that transformers 4.46.3, 5.x and vLLM read it alike, and read.

It is written in the form of transformers 4: rope_theta, rope_scaling and torch_dtype at the top. transformers 5 reads
that, and saves `rope_parameters` and `dtype`, of which transformers 4 reads nothing: it then takes a rope_theta of
10000 without a word. Both forms are read here.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megazh.config import from_mapping
from megazh.errors import DataError, UsageError
from megazh.exchange.families import Family
from megazh.model.config import ModelConfig, RopeScalingMethod

CONFIG = "config.json"

_SHAPE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
)  # fmt: skip
_NO_EFFECT = {
    "_attn_implementation", "_name_or_path", "architectures", "attn_implementation", "bos_token_id", "dtype",
    "eos_token_id", "max_position_embeddings", "max_window_layers", "model_type", "pad_token_id", "sliding_window",
    "tokenizer_class", "torch_dtype", "transformers_version", "unk_token_id", "use_cache",
}  # fmt: skip
"""Keys that change nothing in what a model computes, or that are looked at by themselves."""
_ONLY: dict[str, Any] = {
    "attention_bias": False,
    "hidden_act": "silu",
    "is_decoder": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "pretraining_tp": 1,
    "rope_interleaved": False,
    "use_mrope": False,
    "use_sliding_window": False,
}
"""Keys of which a `Decoder` computes one value only."""
_YARN = ("original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor")
_ROPE_ONLY: dict[str, Any] = {"partial_rotary_factor": 1.0, "truncate": True, "mscale": None, "mscale_all_dim": None}
"""Keys beside those of a scaling of which a `Decoder` computes one value only."""


def hf_config(
    model: ModelConfig,
    family: Family,
    trained_length: int,
    dtype: str,
    eos_id: int | list[int] | None,
    pad_id: int | None,
    bos_id: int | None = None,
) -> dict[str, Any]:
    """The values of `config.json` for a model that the family can express (see `choose_family`).

    `max_position_embeddings` is the trained length. With yarn it is the length before the scaling, from which
    transformers 4.46.3 takes the ramp of the frequencies; 5.x and vLLM take the same from `rope_scaling`.

    Args:
        model: the model.
        family: its family.
        trained_length: tokens per sample that it was last trained on.
        dtype: torch's name of the dtype of the weights, such as `bfloat16`.
        eos_id: token id at which texts end.
        pad_id: token id for padding.
        bos_id: token id at which texts begin, if any.
    """
    scaling = model.rope_scaling
    yarn = scaling is not None and scaling.type is RopeScalingMethod.YARN
    values: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.value,
        **{name: getattr(model, name) for name in _SHAPE},
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": _scaling_of(model),
        "max_position_embeddings": scaling.original_max_position_embeddings if scaling and yarn else trained_length,
        "tie_word_embeddings": model.tie_word_embeddings,
        "attention_dropout": model.attention_dropout,
        "initializer_range": model.initializer_range,
        "use_cache": True,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "torch_dtype": dtype,
    }
    if family is Family.LLAMA:
        return {**values, "attention_bias": False, "mlp_bias": False}
    if family is Family.MISTRAL:
        return {**values, "sliding_window": None}
    del values["head_dim"]  # transformers 4.46.3 knows none for qwen2
    window = {"use_sliding_window": False, "sliding_window": None, "max_window_layers": model.num_hidden_layers}
    return {**values, **window}


def _scaling_of(model: ModelConfig) -> dict[str, Any] | None:
    """`rope_scaling` as transformers 4 has it; yarn's only where it is yarn."""
    scaling = model.rope_scaling
    if scaling is None:
        return None
    values: dict[str, Any] = {"rope_type": scaling.type.value, "factor": float(scaling.factor)}
    if scaling.type is RopeScalingMethod.YARN:
        values |= {name: getattr(scaling, name) for name in _YARN if getattr(scaling, name) is not None}
    return values


def read_hf_config(folder: Path) -> dict[str, Any]:
    """The values of the `config.json` of a folder. Raises DataError where there is none, or it holds no object."""
    path = folder / CONFIG
    try:
        values = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{folder}: no Hugging Face folder: {CONFIG} is missing; give the folder that holds it beside the weights "
            "(runs and checkpoints are used as they are, without an import)"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: expected an object, found {type(values).__name__}")
    return values


def trained_length(values: Mapping[str, Any], source: str) -> int:
    """Tokens that the model of a `config.json` was trained on at a time. Raises DataError where it does not say."""
    length = values.get("max_position_embeddings")
    if type(length) is not int or length < 1:
        raise DataError(f"{source}: max_position_embeddings: expected a whole number of at least 1, found {length!r}")
    scaling = model_config(values, source).rope_scaling
    original = scaling and scaling.original_max_position_embeddings
    if scaling is None or scaling.type is not RopeScalingMethod.YARN or length != original:
        return length
    return int(original * scaling.factor)


def model_config(values: Mapping[str, Any], source: str) -> ModelConfig:
    """The model that a `config.json` describes, in the form of transformers 4 or of 5.

    Args:
        values: its values.
        source: its name in errors.

    Raises:
        DataError: it is of another family, a key is missing or of another type, or the model computes what a `Decoder`
            cannot; names every such key. Keys that are not known are refused, since they may change the computation.
    """
    known = [family.value for family in Family]
    if values.get("model_type") not in known:
        raise DataError(
            f"{source}: model_type is {values.get('model_type')!r}: only {', '.join(known)} can be imported"
        )
    family = Family(values["model_type"])
    faults = [f"has no {name}" for name in (*_SHAPE, *_needed(family)) if values.get(name) is None]
    faults += [*_unlike(values, _ONLY), *_sliding(values)]
    layers = values.get("layer_types")
    if layers is not None and (not isinstance(layers, list) or any(each != "full_attention" for each in layers)):
        faults.append("layer_types: only full_attention can be computed")
    rope = _rope(values, faults)
    taken = {
        *_SHAPE, *_NO_EFFECT, *_ONLY, *_RENAMED,
        "head_dim", "layer_types", "rope_parameters", "rope_scaling", "rope_theta", "tie_word_embeddings",
    }  # fmt: skip
    unknown = [key for key in values if key not in taken and values[key] is not None]
    if unknown:
        faults.append(f"keys that megazh does not know, and that may change the computation: {', '.join(unknown)}")
    if faults:
        raise DataError(f"{source}: {'; '.join(faults)}")
    shape = {name: values[name] for name in _SHAPE}
    shape |= {ours: values[theirs] for theirs, ours in _RENAMED.items() if values.get(theirs) is not None}
    shape |= {"qkv_bias": family is Family.QWEN2, "tie_word_embeddings": values.get("tie_word_embeddings", False)}
    try:
        model = from_mapping({**shape, **rope, "head_dim": values.get("head_dim")}, ModelConfig, source)
    except UsageError as error:
        raise DataError(str(error)) from None
    if family is Family.QWEN2 and model.attention_width != model.hidden_size:
        raise DataError(f"{source}: head_dim {model.head_size}: in qwen2 the heads fill hidden_size")
    fills = model.attention_width == model.hidden_size
    return model.model_copy(update={"head_dim": None}) if fills else model


_RENAMED = {
    "num_key_value_heads": "num_key_value_heads",
    "rms_norm_eps": "norm_eps",
    "attention_dropout": "attention_dropout",
    "initializer_range": "initializer_range",
}
"""Further keys of a `config.json` that a `ModelConfig` has, by its names for them; their defaults are the same."""


def _needed(family: Family) -> tuple[str, ...]:
    """Keys whose defaults in transformers are those of one model of the family, and not of this one."""
    return () if family is Family.LLAMA else ("num_key_value_heads",)


def _unlike(values: Mapping[str, Any], only: Mapping[str, Any], where: str = "") -> list[str]:
    """The keys that have another value than the only one that can be computed; null stands for it."""
    return [
        f"{where}{key}={values[key]!r} cannot be computed (only {value!r})"
        for key, value in only.items()
        if values.get(key) is not None and values[key] != value
    ]


def _sliding(values: Mapping[str, Any]) -> list[str]:
    """Mistral's window counts wherever it is shorter than the context; the others' with use_sliding_window alone."""
    window, length = values.get("sliding_window", 4096), values.get("max_position_embeddings")
    if values["model_type"] != Family.MISTRAL.value or window is None:
        return []
    if type(window) is type(length) is int and window >= length:
        return []
    return [f"sliding_window={window!r} is shorter than max_position_embeddings={length!r}: it cannot be computed"]


def _scaling_alone(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The scaling in `rope_parameters` or `rope_scaling`, in the same form for both."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    rest = {key: value for key, value in rope.items() if key not in ("rope_type", "type", "rope_theta")}
    return {"rope_type": kind, **{key: value for key, value in rest.items() if value is not None}}


def _rope(values: Mapping[str, Any], faults: list[str]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of a `ModelConfig`; adds to `faults` what it cannot have."""
    new, old = values.get("rope_parameters"), values.get("rope_scaling")
    if not all(isinstance(each, dict | None) for each in (new, old)):
        faults.append("rope_parameters and rope_scaling: expected an object or null")
        return {}
    if new and old and _scaling_alone(new) != _scaling_alone(old):  # transformers 5 merges them, others take one
        faults.append("rope_parameters and rope_scaling contradict each other")
    given = dict(new or old or {})
    where = "rope_parameters." if new else "rope_scaling."
    thetas = [each for each in (given.pop("rope_theta", None), values.get("rope_theta")) if each is not None]
    if len(thetas) == 2 and thetas[0] != thetas[1]:
        faults.append(f"rope_theta={thetas[1]!r} and {where}rope_theta={thetas[0]!r} contradict each other")
    rope: dict[str, Any] = {"rope_theta": thetas[0]} if thetas else {}
    kinds = {given.pop(name) for name in ("rope_type", "type") if isinstance(given.get(name), str)} or {"default"}
    faults += _unlike(given, _ROPE_ONLY, where)
    rest = {key: value for key, value in given.items() if key not in _ROPE_ONLY and value is not None}
    if kinds == {"default"}:
        if rest:
            faults.append(f"{where}{next(iter(rest))} without a rope_type")
        return rope
    if len(kinds) > 1 or not kinds <= set(RopeScalingMethod):
        faults.append(f"{where}rope_type={'/'.join(sorted(kinds))}: only {', '.join(RopeScalingMethod)} are known")
        return rope
    kind = kinds.pop()
    own = {"factor", *(_YARN if kind == RopeScalingMethod.YARN else ("original_max_position_embeddings",))}
    faults += [f"{where}{key} is not known" for key in rest if key not in own]
    if values["model_type"] == Family.MISTRAL.value:
        faults.append(f"{where}rope_type={kind}: transformers 4.46.3 ignores it for mistral, and later versions do not")
    if kind == RopeScalingMethod.YARN:
        rest.setdefault("original_max_position_embeddings", values.get("max_position_embeddings"))
    return {**rope, "rope_scaling": {"type": kind, **{key: rest[key] for key in rest if key in own}}}
