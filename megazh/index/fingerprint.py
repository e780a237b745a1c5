"""The fingerprint of a mixture: named parts that together decide what training sample n is.

Two mixtures with equal fingerprints give the same samples under the same numbers, wherever their files lie.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from megazh.index.manifest import OnExhausted, exact

if TYPE_CHECKING:
    from megazh.index.mixture import Mixture

RULES = 1
"""Version of the rules by which samples follow from the parts (split, packing, order, blend); a change of these rules
that gives other samples for the same parts raises it."""

Fingerprint = dict[str, str]
"""Value of each part by its name, such as `seed` or `corpora.laws.weight`. Numbers are exact."""

_AMOUNTS = ("weight", "tokens", "epochs")
_WRITTEN = (*_AMOUNTS, "on_exhausted")
"""Parts of a corpus that decide samples only through its share and through the end of the mixture."""
_SHOWN_DIGITS = 16
_SHOWN_PARTS = 4


def fingerprint_of(mixture: "Mixture") -> Fingerprint:
    """The fingerprint of an open mixture, whose files have been checked against their recorded hashes."""
    shape, manifest = mixture.shape, mixture.manifest
    parts = {
        "rules": str(RULES),
        "seed": str(mixture.seed),
        "seq_len": str(shape.seq_len),
        "packing": shape.packing.value,
        "max_docs": str(shape.max_docs),
        "running_positions": str(shape.running_positions).lower(),
        "padding_id": str(mixture.padding_id),
        "tokenizer": mixture.corpora[0].metadata.tokenizer.fingerprint,
        "validation.fraction": "0",
        "ends_after": "never" if mixture.end is None else f"{mixture.end} samples",
        "corpora": ", ".join(corpus.entry.name for corpus in mixture.corpora),
    }
    if manifest.validation and manifest.validation.fraction:
        parts["validation.fraction"] = str(manifest.validation.fraction)
        parts["validation.salt"] = str(manifest.validation.salt)
    for number, corpus in enumerate(mixture.corpora):
        entry, name = corpus.entry, f"corpora.{corpus.entry.name}"
        for amount in _AMOUNTS:
            if (value := getattr(entry, amount)) is not None:
                parts[f"{name}.{amount}"] = str(exact(value)) if exact(value).denominator == 1 else str(value)
        parts[f"{name}.share"] = str(mixture.blend.share(number))
        parts[f"{name}.on_exhausted"] = OnExhausted(entry.on_exhausted or manifest.on_exhausted).value
        for suffix, file in corpus.metadata.files.by_suffix().items():
            parts[f"{name}{suffix}"] = file.sha256
    return parts


def digest_of(parts: Mapping[str, str]) -> str:
    """SHA-256 over the parts of a fingerprint that decide samples, as hex; equal exactly if none of these differs."""
    deciding = {name: value for name, value in parts.items() if not _is_written(name)}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Parts that differ: (name, value before, value now), `none` where one side lacks a part; empty if none differs.

    Amounts and stop rules count through what follows from them, the shares and the end: weights of 9 and 1 equal 0.9
    and 0.1. Where shares or end differ, the amounts and rules are named, since they are what the user wrote.
    """
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    follows = [name for name in changed if _follows(name)]
    if not follows:
        changed = [name for name in changed if not _is_written(name)]
    elif len(changed) > len(follows):  # something that was written explains them
        changed = [name for name in changed if name not in follows]
    return [(name, before.get(name, "none"), now.get(name, "none")) for name in changed]


def describe_differences(found: list[tuple[str, str, str]]) -> str:
    """`corpora.a.weight 0.9 -> 0.1, seed 1 -> 2`: the first of them, hashes shortened, and how many more there are."""
    shown = [f"{name} {_short(before)} -> {_short(now)}" for name, before, now in found[:_SHOWN_PARTS]]
    more = len(found) - len(shown)
    return ", ".join(shown) + (f", and {more} more" if more else "")


def renamed_corpora(found: list[tuple[str, str, str]]) -> Iterator[tuple[str, str]]:
    """Corpora whose files are those of a corpus of another name: (name before, name now)."""
    before = {value: name for name, value, now in found if now == "none" and name.endswith(".bin")}
    for name, was, now in found:
        if was == "none" and name.endswith(".bin") and now in before:
            yield before[now].split(".", 1)[1].removesuffix(".bin"), name.split(".", 1)[1].removesuffix(".bin")


def _is_written(name: str) -> bool:
    return name.startswith("corpora.") and name.rsplit(".", 1)[1] in _WRITTEN


def _follows(name: str) -> bool:
    return name == "ends_after" or (name.startswith("corpora.") and name.endswith(".share"))


def _short(value: str) -> str:
    return f"{value[:_SHOWN_DIGITS]}…" if len(value) == 64 and set(value) <= set("0123456789abcdef") else value
