"""Whether the tokenizer of a run can stand in the Hugging Face folder that its model would be exported as."""

from __future__ import annotations

from collections.abc import Iterator

from megazh.errors import UsageError
from megazh.exchange.families import Family, choose_family, inexpressible
from megazh.exchange.tokenizer_files import tokenizer_settings
from megazh.index.metadata import load_tokenizer_of
from megazh.tokenizer.encoders import TokenizerFormat
from megazh.training.checks.data import needed_facts
from megazh.training.job import Case


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
