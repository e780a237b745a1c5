"""The parts of a report about what the run is made of: data, model, hardware, checkpoints, attempts, recipe."""

from collections.abc import Iterator
from fractions import Fraction

from megazh.model.counts import parameter_counts
from megazh.run.attempt import Attempt
from megazh.training.checkpoint_list import CheckpointManifest
from megazh.training.recipe_text import as_yaml
from megazh.training.report.gather import REQUIRED, Gathered, Setting, median, settings
from megazh.training.report.html import Html, code, element, facts, folded, html, table
from megazh.writing import size_text

_HASH_LETTERS = 12


def data_parts(found: Gathered) -> Iterator[Html]:
    """The corpora with their shares, the tokenizer, and the fingerprint of the data."""
    if (info := found.info) is None:
        return
    parts = info.data or {}
    rows = []
    for corpus in info.corpora:
        share = parts.get(f"corpora.{corpus.name}.share")
        rows.append(
            (
                corpus.name,
                f"{corpus.tokens:,}",
                f"{corpus.training_documents:,}",
                f"{corpus.validation_documents:,}",
                "" if share is None else _percent(share),
                code(corpus.prefix),
                code(corpus.sha256[:_HASH_LETTERS]),
            )
        )
    head = ["corpus", "tokens", "training documents", "validation documents", "share", "index", "SHA-256 of .bin"]
    yield table(head, rows, " nnnn")
    tokenizer = info.tokenizer
    yield facts(
        [
            ("mixture", code(info.mixture)),
            ("tokenizer", f"{tokenizer.kind}, {tokenizer.vocab_size:,} ids"),
            ("fingerprint of the tokenizer", code(tokenizer.fingerprint[:_HASH_LETTERS])),
        ]
    )
    if parts:
        named = [(name, code(value)) for name, value in parts.items()]
        yield folded("fingerprint of the data", table(["part", "value"], named))


def _percent(share: str) -> str:
    try:
        return f"{float(Fraction(share)):.1%}"
    except (ValueError, ZeroDivisionError):
        return share


def hardware_parts(found: Gathered) -> Iterator[Html]:
    """Size of the model, layout, devices, and what a step takes."""
    rows: list[tuple[str, object]] = []
    if recipe := found.recipe:
        counts, model = parameter_counts(recipe.model), recipe.model
        rows += [
            ("parameters", f"{counts.total:,}"),
            ("shape", f"{model.num_hidden_layers} layers x {model.hidden_size}, {model.vocab_size:,} ids"),
            ("tokens per step", ", ".join(f"{size * recipe.batch.seq_len:,}" for size in recipe.course.sizes())),
            ("FLOPs per token", f"{recipe.flops_per_token.total:.4g}"),
        ]
    newest = next((each for each in reversed(found.checkpoints.values()) if isinstance(each, CheckpointManifest)), None)
    if newest:
        rows.append(("layout", f"{_layout(newest)}, {newest.precision}"))
    if found.info:
        rows.append(("engine", found.info.engine))
        attempts = found.info.attempts
        rows += [("devices", line) for line in (attempts[-1].devices if attempts else [])]
    history = found.history
    if (rate := median(history, "tokens_per_second_per_gpu")) is not None:
        rows.append(("tokens per second and GPU (median)", f"{rate:,.0f}"))
    if (seconds := median(history, "step_seconds")) is not None:
        waiting = median(history, "data_seconds") or 0.0
        rows.append(("seconds per step (median)", f"{seconds:.3f}, of which {waiting:.4f} wait for samples"))
    yield facts(rows) if rows else Html()


def _layout(manifest: CheckpointManifest) -> str:
    return f"{manifest.stages} stages x {manifest.replicas} replicas"


def checkpoints_parts(found: Gathered) -> Iterator[Html]:
    """The checkpoints that are kept."""
    losses = {record["step"]: record["loss"] for record in found.history.validations}
    rows: list[tuple[object, ...]] = []
    for name, manifest in found.checkpoints.items():
        if isinstance(manifest, str):
            rows.append((code(name), "", "", "", "", element("span", f"damaged: {manifest}", class_="problem")))
            continue
        loss = f"{losses[manifest.step]:.4f}" if manifest.step in losses else ""
        is_last = manifest.complete and (found.recipe is None or manifest.step >= found.recipe.course.steps)
        state = "complete: the run's last step" if is_last else "whole"
        size = size_text(manifest.bytes)
        rows.append((code(name), f"{manifest.tokens:,}", size, loss, _layout(manifest), state))
    if rows:
        yield table(["checkpoint", "tokens", "size", "validation loss", "layout", "state"], rows, " nnn")
    else:
        yield element("p", "None is there.")


def attempts_parts(found: Gathered) -> Iterator[Html]:
    """The starts of the run, and how each ended."""
    attempts = found.info.attempts if found.info else []
    rows = []
    for number, each in enumerate(attempts, 1):
        commit = f"{each.commit[:_HASH_LETTERS]}{' + changes' if each.changed else ''}" if each.commit else ""
        versions = ", ".join(f"{name} {version}" for name, version in each.versions.items())
        call = Html(f"{code(each.command)}<br>{element('small', f'in {each.folder}; {versions}')}")
        devices = Html("<br>".join(map(html, each.devices)))
        rows.append((number, each.started.replace("T", " "), each.host, devices, code(commit), call, ended(each)))
    if rows:
        yield table(["", "started", "host", "devices", "commit", "command", "end"], rows, "n")


def ended(attempt: Attempt) -> str:
    """How an attempt ended; empty while it runs, and where a version did not record it."""
    if attempt.ended is None:
        return attempt.reason or ""
    return f"{attempt.reason}, exit code {attempt.exit_code}, at {attempt.ended.replace('T', ' ')}"


def recipe_parts(found: Gathered) -> Iterator[Html]:
    """The keys of the recipe; those with another value than the default come first in their sections."""
    if (recipe := found.recipe) is None:
        return
    yield element("p", "Keys with another value than the default; the others are folded below each section.")
    sections = []
    for section, keys in settings(recipe).items():
        changed = [(code(each.key), _with_default(each)) for each in keys if each.changed]
        default = [(code(each.key), code(as_yaml(each.value))) for each in keys if not each.changed]
        parts = [table([], changed)] if changed else []
        parts += [folded(f"defaults ({len(default)})", table([], default))] if default else []
        sections.append(element("div", element("h3", section), *parts))
    yield element("div", *sections, class_="columns")


def _with_default(setting: Setting) -> Html:
    value = element("b", code(as_yaml(setting.value)))
    if setting.default is REQUIRED:
        return value
    return Html(f"{value} {element('small', f'default: {as_yaml(setting.default)}')}")
