"""The mixture: training sample number n of several corpora, and the samples kept for validation."""

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megazh.errors import DataError, MegazhError, UsageError
from megazh.index.manifest import CorpusEntry, Manifest, OnExhausted, exact, load_manifest
from megazh.index.metadata import Metadata
from megazh.index.order import Blend, permuted, select_side, stream_key
from megazh.index.packing import Packing, SampleTable, default_max_docs
from megazh.index.reader import IndexedDataset
from megazh.index.samples import CorpusSamples, Sample, SampleShape, pack_documents

Int64s = npt.NDArray[np.int64]


@dataclass
class Corpus:
    """One corpus of a mixture: its index, and its two sides."""

    entry: CorpusEntry
    prefix: Path
    index: IndexedDataset
    metadata: Metadata
    training: Int64s
    """(documents,) numbers of the documents for training."""
    validation: Int64s
    """(documents,) numbers of the documents kept for validation."""

    def tokens(self, documents: Int64s) -> int:
        """Tokens of some of its documents."""
        return int((self.index.starts[documents + 1] - self.index.starts[documents]).sum())


class Mixture:
    """Samples of a manifest's corpora, by number.

    Training sample n is a function of the manifest, the seed and n; how many samples a run takes never enters.
    Each corpus is packed once; each of its epochs goes through the same samples in an order of its own.

    Args:
        manifest: the path of a manifest, or of a single index (its PREFIX).
        seq_len: tokens a sample.
        packing: how documents are packed.
        max_docs: segments a sample; default `packing.default_max_docs`.
        seed: instead of the manifest's.
        running_positions: see `SampleShape`.

    Raises:
        UsageError: a key, a path or a size cannot work; corpora have different tokenizers; a side is too small.
        DataError: an index is damaged or has changed. Messages name the corpus.
    """

    def __init__(
        self,
        manifest: Path | str,
        seq_len: int,
        packing: Packing = Packing.BEST_FIT,
        max_docs: int | None = None,
        seed: int | None = None,
        running_positions: bool = False,
    ) -> None:
        self._arguments = (manifest, seq_len, packing, max_docs, seed, running_positions)
        if seq_len < 2:
            raise UsageError(f"seq_len {seq_len}: expected at least 2")
        if max_docs is not None and max_docs < 2:
            raise UsageError(f"max_docs {max_docs}: expected at least 2 (a document and padding)")
        self.path = Path(manifest)
        self.manifest = _manifest_at(self.path)
        self.seed = self.manifest.seed if seed is None else seed
        self.shape = SampleShape(seq_len, packing, max_docs or default_max_docs(seq_len), running_positions)
        self.corpora = [self._open(entry) for entry in self.manifest.corpora]
        self._check_tokenizers()
        self._check_sides()
        tokenizer = self.corpora[0].metadata.tokenizer
        self._padding_id = tokenizer.eod_id if tokenizer.pad_id is None else tokenizer.pad_id
        self._samples = [self._pack(corpus, corpus.training, "training") for corpus in self.corpora]
        for corpus, samples in zip(self.corpora, self._samples, strict=True):
            if len(samples) == 0:
                raise UsageError(f"corpus '{corpus.entry.name}': no full sample of {seq_len} tokens")
        self._epochs: dict[int, tuple[int, np.uint64]] = {}  # the key of each corpus's latest epoch
        self.blend = Blend([self._amount(number) for number in range(len(self.corpora))])

    def __reduce__(self) -> tuple[Any, ...]:
        return Mixture, self._arguments  # loader processes open the files themselves

    def _open(self, entry: CorpusEntry) -> Corpus:
        prefix = self.path.parent / entry.prefix
        try:
            index = IndexedDataset(prefix)
            metadata = index.metadata
            if metadata is None:
                raise DataError(f"{prefix}.json: missing; the mixture needs to know the tokenizer and the hashes")
            if entry.sha256 not in (None, metadata.files.bin.sha256):
                found = metadata.files.bin.sha256
                raise DataError(f"{prefix}.bin: expected sha256 {entry.sha256} by the manifest, found {found}")
            hashes = index.document_hashes()
        except MegazhError as error:
            raise type(error)(f"corpus '{entry.name}': {error}") from None
        validation = self.manifest.validation
        salt = stream_key("validation", validation.salt if validation else "")
        limit = np.uint64(int(exact(validation.fraction) * 2**64) if validation else 0)
        sides = [select_side(hashes, salt, limit, side) for side in (False, True)]
        return Corpus(entry, prefix, index, metadata, *sides)

    def _check_tokenizers(self) -> None:
        first = self.corpora[0]
        for corpus in self.corpora[1:]:
            if corpus.metadata.tokenizer.fingerprint != first.metadata.tokenizer.fingerprint:
                raise UsageError(
                    f"corpus '{corpus.entry.name}': tokenizer {corpus.metadata.tokenizer.fingerprint[:16]}… differs "
                    f"from {first.metadata.tokenizer.fingerprint[:16]}… of corpus '{first.entry.name}'; index both "
                    "with the same tokenizer"
                )

    def _check_sides(self) -> None:
        seq_len = self.shape.seq_len
        for corpus in self.corpora:
            tokens = corpus.tokens(corpus.training)
            if tokens < seq_len:
                raise UsageError(
                    f"corpus '{corpus.entry.name}': {tokens} tokens for training, less than one sample of {seq_len}"
                )
        validation = self.manifest.validation
        if validation and validation.fraction and not any(len(corpus.validation) for corpus in self.corpora):
            documents = sum(len(corpus.index) for corpus in self.corpora)
            raise UsageError(
                f"{self.path}: the validation side is empty: a fraction of {validation.fraction} of {documents} "
                "documents chose none; give a larger fraction, or another salt"
            )

    def _pack(self, corpus: Corpus, documents: Int64s, side: str) -> CorpusSamples:
        seed = f"{self.seed}/{corpus.entry.name}/{side}"
        table = pack_documents(corpus.index, documents, self.shape, seed, keep_tail=side == "validation")
        return CorpusSamples(corpus.index, self.shape, self._padding_id, table)

    def _amount(self, number: int) -> Fraction:
        """What the share of a corpus is in proportion to."""
        entry = self.corpora[number].entry
        if entry.weight is not None:
            return exact(entry.weight)
        if entry.tokens is not None:
            return Fraction(entry.tokens)
        assert entry.epochs is not None
        return exact(entry.epochs) * len(self._samples[number]) * self.shape.seq_len

    @property
    def planned_tokens(self) -> int | None:
        """The sum of the corpora's `tokens` and `epochs`; None where the manifest gives weights."""
        if self.corpora[0].entry.weight is not None:
            return None
        return round(sum(self._amount(number) for number in range(len(self.corpora))))

    def epoch_samples(self, corpus: int) -> int:
        """Training samples in an epoch of `corpus`."""
        return len(self._samples[corpus])

    def table(self, corpus: int) -> SampleTable:
        """Which pieces of documents make up the training samples of `corpus`."""
        return self._samples[corpus].table

    def drawn(self, corpus: int, samples: int) -> int:
        """How many of the first `samples` samples come from `corpus`."""
        return self.blend.count(corpus, samples)

    @cached_property
    def end(self) -> int | None:
        """The number of samples after which the mixture stops; None where it goes on for ever."""
        ends = [
            self._last_before(number, self._until_exhausted(number))
            for number, corpus in enumerate(self.corpora)
            if (corpus.entry.on_exhausted or self.manifest.on_exhausted) is OnExhausted.STOP
        ]
        return min(ends) if ends else None

    def _until_exhausted(self, corpus: int) -> int:
        """Samples that `corpus` gives before it stops: the epochs asked for, or one."""
        epochs = self.corpora[corpus].entry.epochs
        return round(exact(epochs or 1) * len(self._samples[corpus]))

    def _last_before(self, corpus: int, limit: int) -> int:
        """The largest number of samples of which at most `limit` come from `corpus`."""
        low, high = 0, 1
        while self.blend.count(corpus, high) <= limit:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            if self.blend.count(corpus, middle) <= limit:
                low = middle
            else:
                high = middle
        return low

    def wraps_at(self, corpus: int) -> int:
        """The number of samples after which `corpus` begins its second epoch."""
        return self._last_before(corpus, len(self._samples[corpus]))

    def locate(self, number: int) -> tuple[int, int, int]:
        """(corpus, epoch, row among the corpus's packed samples) of training sample `number`.

        Raises:
            IndexError: `number` is negative, or at or behind the mixture's end.
        """
        if number < 0:
            raise IndexError(f"training sample {number}: expected a number of at least 0")
        if self.end is not None and number >= self.end:
            raise IndexError(f"training sample {number}: a corpus is exhausted after {self.end} samples of the mixture")
        corpus, before = self.blend.locate(number)
        size = len(self._samples[corpus])
        epoch, place = divmod(before, size)
        latest = self._epochs.get(corpus)  # read once: another thread may be in another epoch
        if latest is None or latest[0] != epoch:
            latest = (epoch, stream_key("epoch", self.seed, self.corpora[corpus].entry.name, epoch))
            self._epochs[corpus] = latest
        return corpus, epoch, int(permuted(place, size, latest[1]))

    def valid_labels(self, number: int) -> int:
        """How many labels of training sample `number` are not -100, without reading its tokens."""
        corpus, _, row = self.locate(number)
        return int(self._samples[corpus].table.valid_labels[row])

    def sample(self, number: int) -> Sample:
        """Training sample `number`."""
        return _only(self.batch([number]))

    def batch(self, numbers: list[int] | range) -> Sample:
        """Training samples `numbers` with a leading dimension, in that order."""
        located = [self.locate(number) for number in numbers]
        return _gather_batch([(corpus, row) for corpus, _, row in located], self._samples, self.shape)

    @cached_property
    def validation(self) -> "ValidationSamples":
        """The samples kept for validation.

        Raises:
            UsageError: the manifest keeps no documents.
        """
        if not self.manifest.validation or not self.manifest.validation.fraction:
            raise UsageError(f"{self.path}: keeps no documents for validation; add 'validation: {{fraction: 0.01}}'")
        kept = [corpus for corpus in self.corpora if len(corpus.validation)]
        return ValidationSamples([self._pack(corpus, corpus.validation, "validation") for corpus in kept], self.shape)


class ValidationSamples:
    """All samples kept for validation, each once, corpus after corpus; the last of a corpus may be padded."""

    def __init__(self, corpora: list[CorpusSamples], shape: SampleShape) -> None:
        self._corpora, self._shape = corpora, shape
        self._ends = np.cumsum([len(samples) for samples in corpora])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _locate(self, number: int) -> tuple[int, int]:
        if not 0 <= number < len(self):
            raise IndexError(f"validation sample {number} of {len(self)}")
        corpus = int(np.searchsorted(self._ends, number, "right"))
        return corpus, number - (int(self._ends[corpus - 1]) if corpus else 0)

    def valid_labels(self, number: int) -> int:
        """How many labels of sample `number` are not -100, without reading its tokens."""
        corpus, row = self._locate(number)
        return int(self._corpora[corpus].table.valid_labels[row])

    def sample(self, number: int) -> Sample:
        """Validation sample `number`."""
        return _only(self.batch([number]))

    def batch(self, numbers: list[int] | range) -> Sample:
        """Validation samples `numbers` with a leading dimension, in that order."""
        return _gather_batch([self._locate(number) for number in numbers], self._corpora, self._shape)


def _gather_batch(places: list[tuple[int, int]], corpora: list[CorpusSamples], shape: SampleShape) -> Sample:
    """The samples at `places`, each (corpus, row), as one batch."""
    count = len(places)
    ids = np.empty((3, count, shape.seq_len), np.int32)
    cu_seqlens = np.empty((count, shape.max_docs + 1), np.int32)
    rows = np.array([row for _, row in places], np.int64)
    used = {corpus for corpus, _ in places}
    if len(used) == 1:
        corpora[used.pop()].gather(rows, np.arange(count), ids, cu_seqlens)
    else:
        corpus_of = np.array([corpus for corpus, _ in places])
        for corpus in used:
            at = np.flatnonzero(corpus_of == corpus)
            corpora[corpus].gather(rows[at], at, ids, cu_seqlens)
    return Sample(ids[0], ids[1], ids[2], cu_seqlens)


def _only(batch: Sample) -> Sample:
    """The sample of a batch of one."""
    return Sample(batch.tokens[0], batch.labels[0], batch.position_ids[0], batch.cu_seqlens[0])


def _manifest_at(path: Path) -> Manifest:
    """The manifest at `path`, or one with the index at this prefix alone."""
    if path.suffix not in (".yaml", ".yml") and Path(f"{path}.idx").exists():
        return Manifest(corpora=[CorpusEntry(name=path.name, prefix=path.name, weight=1.0)])
    return load_manifest(path)
