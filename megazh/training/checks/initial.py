"""Whether the weights that a run is to begin with fit its model and its data."""

from collections.abc import Iterator
from pathlib import Path

from megazh.errors import Collector, UsageError
from megazh.exchange.tokenizer_files import exported_fingerprint
from megazh.index.metadata import TokenizerInfo, load_tokenizer_of
from megazh.tokenizer import Tokenizer, load_tokenizer
from megazh.training.checkpoint_list import list_checkpoints
from megazh.training.checks.data import needed_facts
from megazh.training.job import Case
from megazh.training.model_from import COMPUTED_WITH, FREE, differences
from megazh.training.model_source import ModelSource, find_model


def initial_checkpoint(case: Case) -> Iterator[str]:
    """`checkpoint.initial_checkpoint` is there, and has the model and the tokenizer of the run."""
    wanted = case.recipe.checkpoint.initial_checkpoint
    if wanted is None or list_checkpoints(case.run.checkpoints):
        return
    source = find_model(Path(wanted))
    if source.path != Path(wanted):
        raise UsageError(f"checkpoint.initial_checkpoint={wanted}: a run; name one of its checkpoints: {source.path}")
    found = Collector()
    for key, there, here in differences(source.model, case.recipe.model):
        if key in COMPUTED_WITH:
            yield case.settings.with_places(
                f"warning: the weights of {wanted} were trained with model.{key}={there}, and this run has {here}"
            )
        elif key not in FREE:
            message = f"model.{key}={here}: the weights of {wanted} have {there}; set model.{key}={there}"
            found.add(UsageError(case.settings.with_places(message)))
    found.raise_all()
    yield from _tokenizer(case, source)


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
