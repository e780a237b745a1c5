"""Whether what comes of a run could be exported as a Hugging Face folder: better known before the training."""

from __future__ import annotations

from collections.abc import Iterator

from megazh.errors import UsageError
from megazh.exchange.families import Family, choose_family, inexpressible
from megazh.exchange.tokenizer_files import tokenizer_settings
from megazh.index.metadata import load_tokenizer_of
from megazh.tokenizer.encoders import TokenizerFormat
from megazh.training.checks.data import needed_facts
from megazh.training.job import Case


def model(case: Case) -> Iterator[str]:
    """A family of Hugging Face models can express the model."""
    if reasons := inexpressible(case.recipe.model):
        yield case.settings.with_places(
            "warning: megazh export will refuse this model: no family of Hugging Face models can express "
            f"{'; '.join(reasons)}"
        )


def tokenizer(case: Case) -> Iterator[str]:
    """Its tokenizer can be exported with the model, so that others can use what comes of the run."""
    found = needed_facts(case)
    if found is None or inexpressible(case.recipe.model):
        return
    family, corpus = choose_family(case.recipe.model), found.corpora[0]
    kind = corpus.metadata.tokenizer.kind
    always = [TokenizerFormat.QWEN_RANKS, *([] if family is Family.QWEN2 else [TokenizerFormat.HUGGING_FACE])]
    if kind in always:
        return  # it need not be loaded, which takes a second for Qwen's
    try:
        tokenizer_settings(load_tokenizer_of(corpus.prefix, corpus.metadata), family)
    except UsageError as error:
        yield f"warning: megazh export will refuse what comes of this run: {error}"
