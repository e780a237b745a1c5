"""Tables about mixtures and packing, for the person at the terminal."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megazh.errors import UsageError
from megazh.index.metadata import load_tokenizer_of
from megazh.index.mixture import Corpus, Mixture
from megazh.index.packing import Packing

_WARN_EPOCHS = 4
"""Limit on epochs: after about four, repeated text teaches clearly less (Muennighoff et al. 2023, arXiv 2305.16264)."""


def describe_mixture(mixture: Mixture, tokens: int | None) -> Iterator[str]:
    """Lines about a mixture for a run of `tokens` tokens: tokens, shares, epochs, start of each second epoch.

    Args:
        tokens: length of the run. None takes the sum of the manifest's amounts or, with weights, one epoch of the
            corpus that lasts longest.
    """
    seq_len = mixture.shape.seq_len
    planned = tokens or mixture.planned_tokens
    if planned is None:
        samples = max(mixture.wraps_at(number) for number in range(len(mixture.corpora)))
        why = "one epoch of every corpus"
    else:
        samples = -(-planned // seq_len)
        why = "from --tokens" if tokens else "the manifest's amounts"
    if mixture.end is not None and samples > mixture.end:
        samples, why = mixture.end, "until a corpus is exhausted"
    yield f"manifest     {mixture.path}, seed {mixture.seed}"
    yield f"tokenizer    {mixture.corpora[0].metadata.tokenizer.fingerprint}"
    shape = mixture.shape
    yield f"samples      {seq_len:,} tokens each, {shape.packing.value}, at most {shape.max_docs} segments"
    yield f"run          {samples * seq_len:,} tokens in {samples:,} samples ({why})"
    yield ""
    yield f"{'corpus':<20} {'share':>8} {'tokens':>16} {'drawn':>16} {'epochs':>8}  {'second epoch after':>18}"
    for number, corpus in enumerate(mixture.corpora):
        drawn = mixture.drawn(number, samples)
        epochs = drawn / mixture.epoch_samples(number)
        yield (
            f"{corpus.entry.name:<20} {float(mixture.blend.share(number)):>8.2%} "
            f"{corpus.tokens(corpus.training):>16,} {drawn * seq_len:>16,} {epochs:>8.3f}  "
            f"{mixture.wraps_at(number) * seq_len:>18,}"
        )
    yield ""
    yield from _sides(mixture)
    for number, corpus in enumerate(mixture.corpora):
        epochs = mixture.drawn(number, samples) / mixture.epoch_samples(number)
        if epochs > _WARN_EPOCHS:
            yield (
                f"warning: corpus '{corpus.entry.name}' is repeated {epochs:.1f} times; after {_WARN_EPOCHS} epochs, "
                "repeated text teaches little"
            )


def _sides(mixture: Mixture) -> Iterator[str]:
    yield f"{'corpus':<20} {'training':>24} {'validation':>24}  sha256 of the .bin"
    for corpus in mixture.corpora:
        yield (
            f"{corpus.entry.name:<20} {_side(corpus, training=True):>24} {_side(corpus, training=False):>24}  "
            f"{corpus.metadata.files.bin.sha256}"
        )
    if mixture.manifest.validation and mixture.manifest.validation.fraction:
        for corpus in mixture.corpora:
            if not len(corpus.validation):
                yield f"warning: corpus '{corpus.entry.name}' has no validation documents"


def _side(corpus: Corpus, training: bool) -> str:
    documents = corpus.training if training else corpus.validation
    return f"{len(documents):,} docs {corpus.tokens(documents):,} tok"


def describe_packing(
    path: Path, seq_len: int, packings: list[Packing], max_docs: int | None = None, seed: int | None = None
) -> Iterator[str]:
    """Lines about the packing of each corpus's training side: tokens in, out, dropped, padding, and documents cut.

    Labels are those that are not -100; `untrained` counts samples that were left out because a mask trains none.
    """
    heads = (
        "tokens in",
        "tokens out",
        "dropped",
        "padding",
        "padded",
        "samples",
        "documents",
        "cut",
        "fit, but cut",
        "labels",
        "untrained",
    )
    for packing in packings:
        mixture = Mixture(path, seq_len, packing, max_docs, seed)
        yield f"{packing.value}, {seq_len:,} tokens per sample, at most {mixture.shape.max_docs} segments"
        yield f"{'corpus':<20} " + " ".join(f"{head:>13}" for head in heads)
        for number, corpus in enumerate(mixture.corpora):
            table = mixture.table(number)
            tokens_in = corpus.tokens(corpus.training)
            tokens_out = int(np.sum(table.length))
            padding = len(table) * seq_len - tokens_out
            cut = np.unique(table.document[table.length < _lengths(corpus, table.document)])
            short = int(np.count_nonzero(_lengths(corpus, cut) <= seq_len))
            values = (
                f"{tokens_in:,}",
                f"{tokens_out:,}",
                f"{tokens_in - tokens_out:,}",
                f"{padding:,}",
                f"{padding / (len(table) * seq_len):.3%}",
                f"{len(table):,}",
                f"{len(corpus.training):,}",
                f"{len(cut):,}",
                f"{short:,}",
                f"{int(table.valid_labels.sum()):,}",
                f"{int(table.untrained[0]):,}",
            )
            yield f"{corpus.entry.name:<20} " + " ".join(f"{value:>13}" for value in values)
        yield ""


def _lengths(corpus: Corpus, documents: np.ndarray) -> np.ndarray:
    starts = corpus.index.starts
    return starts[documents + 1] - starts[documents]


def describe_sample(mixture: Mixture, number: int, text: bool = False) -> Iterator[str]:
    """Lines about training sample `number`: its pieces, their documents and, with `text`, their text.

    Raises:
        UsageError: there is no such sample.
    """
    try:
        corpus_number, epoch, row = mixture.locate(number)
    except IndexError as error:
        raise UsageError(str(error)) from None
    corpus, table = mixture.corpora[corpus_number], mixture.table(corpus_number)
    first, end = int(table.first_piece[row]), int(table.first_piece[row + 1])
    yield (
        f"sample {number}: corpus '{corpus.entry.name}', epoch {epoch}, row {row}: {end - first} pieces, "
        f"{mixture.valid_labels(number)} labels"
    )
    yield f"{'segment':>8} {'document':>12} {'of its tokens':>22} {'length':>8}"
    filled = 0
    tokenizer = load_tokenizer_of(corpus.prefix, corpus.metadata)
    for piece in range(first, end):
        document, offset, length = (int(a[piece]) for a in (table.document, table.offset, table.length))
        whole = int(_lengths(corpus, np.array([document]))[0])
        span = f"{offset:,} to {offset + length:,} of {whole:,}"
        yield f"{piece - first:>8} {document:>12,} {span:>22} {length:>8,}"
        if text:
            start = int(corpus.index.starts[document]) + offset
            yield tokenizer.decode(corpus.index.tokens[start : start + length].tolist())
        filled += length
    if filled < mixture.shape.seq_len:
        yield f"{end - first:>8} {'padding':>12} {'':>22} {mixture.shape.seq_len - filled:>8,}"
