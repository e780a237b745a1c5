"""Whether the weights that a run is to begin with fit its model and its data."""

from collections.abc import Iterator
from pathlib import Path

from megazh.errors import Collector, UsageError
from megazh.exchange.tokenizer_files import exported_fingerprint
from megazh.index.metadata import TokenizerInfo, load_tokenizer_of
from megazh.model.lora_config import PART
from megazh.tokenizer import Tokenizer, load_tokenizer
from megazh.training.checkpoint_list import list_checkpoints
from megazh.training.checks.data import needed_facts
from megazh.training.job import Case
from megazh.training.model_from import COMPUTED_WITH, FREE, POSITIONS, differences
from megazh.training.model_source import ModelSource, find_model
from megazh.training.rope_choice import KEY, context_length, rope_text, rotations


def initial_checkpoint(case: Case) -> Iterator[str]:
    """`checkpoint.initial_checkpoint` is there, and has the model and the tokenizer of the run."""
    wanted = case.recipe.checkpoint.initial_checkpoint
    if wanted is None or list_checkpoints(case.run.checkpoints):
        return
    try:
        source = find_model(Path(wanted))
    except UsageError as error:
        raise UsageError(f"{error}; train it first, or name another with checkpoint.initial_checkpoint") from None
    if source.path != Path(wanted):
        raise UsageError(f"checkpoint.initial_checkpoint={wanted}: a run; name one of its checkpoints: {source.path}")
    if any(PART in entry.parameter for entry in source.manifest.tensors):
        raise UsageError(
            f"checkpoint.initial_checkpoint={wanted}: holds low-rank pairs of a LoRA run beside its weights; merge "
            f"them with 'megazh export {wanted} --to hf OUT', and name OUT"
        )
    yield from _positions(case, source)
    found = Collector()
    for key, there, here in differences(source.model, case.recipe.model):
        if key in COMPUTED_WITH:
            yield case.settings.with_places(
                f"warning: the weights of {wanted} were trained with model.{key}={there}, and this run has {here}"
            )
        elif key not in FREE | POSITIONS:
            remedy = f"set model.{key}={there}"
            if key == "vocab_size" and (data := needed_facts(case)) is not None:
                ids = max(corpus.metadata.tokenizer.vocab_size for corpus in data.corpora)
                if ids > there:
                    remedy = f"the tokenizer of the data has {ids} ids: make the data with the tokenizer of the weights"
            message = f"model.{key}={here}: the weights of {wanted} have {there}; {remedy}"
            found.add(UsageError(case.settings.with_places(message)))
    found.raise_all()
    yield from _tokenizer(case, source)


def _positions(case: Case, source: ModelSource) -> Iterator[str]:
    """A line where positions are others than those that the weights were trained with, or go beyond them."""
    wanted, model, length = case.recipe.checkpoint.initial_checkpoint, case.recipe.model, case.recipe.batch.seq_len
    context = context_length(source.model, source.trained_length)
    there, here = rope_text(source.model), rope_text(model)
    same = rotations(source.model) == rotations(model)
    if not same and length > context:
        yield f"{wanted}: positions of {context:,} tokens ({there}) are extended to {length:,} ({here})"
    elif not same:
        yield case.settings.with_places(
            f"warning: {wanted}: the weights were trained with positions of {there}, and this run has {here} "
            "(model.rope_theta, model.rope_scaling)"
        )
    elif length > context and case.settings.origin(KEY) is None:
        yield case.settings.with_places(
            f"warning: {wanted}: the weights were trained on {context:,} tokens at a time, and batch.seq_len={length} "
            "has positions that they never met; set model.rope_scaling to linear, yarn or theta, or to none if the run "
            "is long enough to learn them"
        )


def _tokenizer(case: Case, source: ModelSource) -> Iterator[str]:
    """A line where the ids of the data mean other tokens than those that the weights were trained on."""
    data = needed_facts(case)
    if data is None:
        return
    corpus = data.corpora[0]
    info = corpus.metadata.tokenizer
    try:
        known = _loaded(source, info)
    except UsageError as error:
        yield f"warning: {source.path}: its tokenizer is not compared with that of the data: {error}"
        return
    if known.fingerprint == info.fingerprint:
        return
    if exported_fingerprint(known) != exported_fingerprint(load_tokenizer_of(corpus.prefix, corpus.metadata)):
        yield (
            f"WARNING: {source.path} has another tokenizer than {case.recipe.data.manifest}: ids of the data mean "
            "other tokens than its weights were trained on; index the data with its tokenizer"
        )


def _loaded(source: ModelSource, info: TokenizerInfo) -> Tokenizer:
    if source.hf_files is None:
        return source.tokenizer()
    return load_tokenizer(source.hf_files, info.eod)
