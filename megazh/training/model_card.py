"""The README.md of an exported folder: the model, its data, its training, and what is left to fill in."""

from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from megazh import __version__
from megazh.exchange.families import Family
from megazh.index.metadata import TemplateInfo
from megazh.model.counts import parameter_counts
from megazh.pipeline.precision import Dtype
from megazh.run.folder import RunInfo
from megazh.run.metrics import METRICS, read_metrics
from megazh.training.model_source import ModelSource
from megazh.training.rope_choice import rope_text

MODEL_CARD = "README.md"

_SECTIONS = ("model", "batch", "optimizer", "schedule", "precision")
"""Sections of a recipe that say how a model was trained; the others hold paths and the layout."""


def model_card(source: ModelSource, family: Family, dtype: Dtype, name: str) -> str:
    """The model card of an exported model, in Markdown with the fields that Hugging Face's site reads on top.

    Args:
        source: the model. Data and losses are told where it belongs to a run.
        family: family that it is exported as.
        dtype: dtype of the weights in the folder.
        name: name of the folder.

    Raises:
        DataError: `run.json` or `metrics.jsonl` of the run is damaged.
    """
    info = source.run.info() if source.run is not None else None
    parts = [_head(source, family, dtype, name), _training(source)]
    if source.run is not None and (source.run.path / METRICS).is_file():
        parts.append(_losses(read_metrics(source.run.path), source.manifest.step))
    if info is not None:
        parts += [_data(info), _versions(info)]
    template = source.manifest.template
    loading = _loading(name) if template is None else _chatting(name, template)
    return "\n".join(line for part in [*parts, loading] for line in part)


def _head(source: ModelSource, family: Family, dtype: Dtype, name: str) -> Iterator[str]:
    model, counts = source.model, parameter_counts(source.model)
    bias = " with biases" if model.qkv_bias else ""
    tied = "one matrix for embedding and head" if model.tie_word_embeddings else "a head of its own"
    yield from ("---", "library_name: transformers", "pipeline_tag: text-generation", "---", "", f"# {name}", "")
    yield from (
        "*To fill in: what the model is for, who made it, and its limits.*",
        "",
        "**Licence:** *to fill in.*",
        "",
    )
    yield from ("## Model", "")
    rows = [
        ("parameters", f"{counts.total:,}, {dtype.value}"),
        ("family", f"{family.value} (`{family.architecture}`)"),
        ("layers", f"{model.num_hidden_layers} of width {model.hidden_size}, MLP {model.intermediate_size}"),
        ("attention", f"{model.num_attention_heads} heads of {model.head_size}, {model.kv_heads} for keys{bias}"),
        ("vocabulary", f"{model.vocab_size:,} rows, {tied}"),
        ("context", f"{source.trained_length:,} tokens, the length of the samples that it was last trained on"),
        ("positions", f"rotary, {rope_text(model)}"),
    ]
    if source.adapter is not None:
        lora = source.manifest.recipe["lora"]
        targets = ", ".join(lora["targets"])
        rows.append(("adapter", f"merged: rank {lora['rank']} on {targets}; what follows is about the base alone"))
    yield from _table(("", ""), rows)


def _training(source: ModelSource) -> Iterator[str]:
    manifest = source.manifest
    if not manifest.step:
        return  # weights that were imported, and not trained here
    recipe = {name: manifest.recipe[name] for name in _SECTIONS if name in manifest.recipe}
    lora = manifest.recipe.get("lora", {})
    if lora.get("rank") and source.adapter is None:
        recipe["lora"] = lora
    yield from ("## Training", "")
    yield f"{manifest.step:,} optimizer steps, {manifest.samples:,} samples, {manifest.tokens:,} tokens."
    yield from ("", "```yaml", yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).rstrip(), "```", "")


def _losses(records: Sequence[dict[str, Any]], step: int) -> Iterator[str]:
    """Losses up to the step of the checkpoint, in nats per token."""
    before = [record for record in records if record["step"] <= step]
    trained = [record for record in before if record["kind"] == "step"]
    validations = [record for record in before if record["kind"] == "validation"]
    if not trained and not validations:
        return
    yield from ("## Losses", "")
    rows = [(f"training, step {record['step']:,}", f"{record['loss']:.4f}", "") for record in _ends(trained)]
    rows += [
        (f"validation, step {record['step']:,}", f"{record['loss']:.4f}", _bits(record["bits_per_byte"]))
        for record in _ends(validations)
    ]
    yield from _table(("", "nats per token", "bits per byte"), rows)


def _ends(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first record and the last."""
    return [*records[:1], *records[1:][-1:]]


def _bits(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _data(info: RunInfo) -> Iterator[str]:
    yield from ("## Data", "", "*To fill in: where the text comes from, and its licences.*", "")
    rows = [
        (corpus.name, f"{corpus.tokens:,}", f"{corpus.training_documents:,}", f"{corpus.validation_documents:,}")
        for corpus in info.corpora
    ]
    yield from _table(("corpus", "tokens", "documents for training", "for validation"), rows)
    tokenizer = info.tokenizer
    yield f"Tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} ids, documents end with `{tokenizer.eod}`;"
    yield from (f"fingerprint {tokenizer.fingerprint}.", "")


def _versions(info: RunInfo) -> Iterator[str]:
    if not info.attempts:
        return
    newest = info.attempts[-1]
    versions = ", ".join(f"{name} {version}" for name, version in newest.versions.items())
    yield from ("## Versions", "", f"Trained with {versions}; exported with megazh {__version__}.")
    if newest.commit:
        yield f"Code: commit {newest.commit}{', with changes' if newest.changed else ''}."
    if newest.devices:
        yield f"Devices: {'; '.join(device.partition(': ')[2] for device in newest.devices)}."
    yield ""


def _loading(name: str) -> Iterator[str]:
    yield from _opening(name)
    yield 'inputs = tokenizer("从前，", return_tensors="pt")'
    yield "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=80)[0], skip_special_tokens=True))"
    yield from (
        "```",
        "",
        "The model was trained on text without a token in front of it; each document ends with one.",
        "",
    )


def _chatting(name: str, template: TemplateInfo) -> Iterator[str]:
    yield from _opening(name)
    yield 'messages = [{"role": "user", "content": "你好"}]'
    yield "inputs = tokenizer.apply_chat_template("
    yield '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True'
    yield ")"
    yield 'answer = model.generate(**inputs, max_new_tokens=80)[0, inputs["input_ids"].shape[1] :]'
    yield "print(tokenizer.decode(answer, skip_special_tokens=True))"
    yield from (
        "```",
        "",
        f"The model was trained on conversations in the template {template.name}; answers end with `{template.stop}`.",
        "",
    )


def _opening(name: str) -> Iterator[str]:
    yield from ("## How to load", "", "```python")
    yield from ("from transformers import AutoModelForCausalLM, AutoTokenizer", "")
    yield f'folder = "{name}"'
    yield "tokenizer = AutoTokenizer.from_pretrained(folder)"
    yield 'model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto")'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""
