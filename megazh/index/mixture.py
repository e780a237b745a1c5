"""The mixture: training samples of several corpora by number, and the samples kept for validation."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megazh.errors import DataError, MegazhError, UsageError
from megazh.index.choices import Cut
from megazh.index.fingerprint import Fingerprint, fingerprint_of
from megazh.index.manifest import CorpusEntry, OnExhausted, exact, manifest_at
from megazh.index.metadata import Metadata, TemplateInfo
from megazh.index.order import Blend, permuted, permuted_all, select_side, stream_key
from megazh.index.packing import Packing, SampleTable, default_max_docs
from megazh.index.reader import IndexedDataset
from megazh.index.samples import CorpusSamples, Int32s, Sample, SampleShape, pack_documents

Int64s = npt.NDArray[np.int64]


@dataclass
class Corpus:
    """One corpus of a mixture: its index, and its training and validation sides."""

    entry: CorpusEntry
    prefix: Path
    index: IndexedDataset
    metadata: Metadata
    training: Int64s
    """(documents,) numbers of the training documents."""
    validation: Int64s
    """(documents,) numbers of the validation documents."""

    def tokens(self, documents: Int64s) -> int:
        """Number of tokens of the given documents."""
        return int((self.index.starts[documents + 1] - self.index.starts[documents]).sum())


class Mixture:
    """Samples of a manifest's corpora, by number.

    Training sample n depends on the manifest, the seed and n alone, not on the length of the run. Each corpus is
    packed once; every epoch goes through the same samples, in an order of its own.

    Args:
        manifest: path of a manifest, or PREFIX of a single index.
        seq_len: tokens per sample.
        packing: method of packing.
        max_docs: largest number of segments per sample; default `packing.default_max_docs`.
        seed: replaces the manifest's seed.
        running_positions: see `SampleShape`.
        shortest_cut: see `SampleShape`; decides the width of document maps, and no sample.

    Raises:
        UsageError: a key, a path or a size cannot work; corpora have different tokenizers; one side is too small.
        DataError: an index is damaged or has changed. The message names the corpus.
    """

    def __init__(
        self,
        manifest: Path | str,
        seq_len: int,
        packing: Packing = Packing.BEST_FIT,
        max_docs: int | None = None,
        seed: int | None = None,
        running_positions: bool = False,
        shortest_cut: int | None = None,
    ) -> None:
        if seq_len < 2:
            raise UsageError(f"seq_len {seq_len}: expected at least 2")
        if max_docs is not None and max_docs < 2:
            raise UsageError(f"max_docs {max_docs}: expected at least 2 (a document and padding)")
        self.path = Path(manifest)
        self.manifest = manifest_at(self.path)
        self.seed = self.manifest.seed if seed is None else seed
        self.shape = SampleShape(
            seq_len, packing, max_docs or default_max_docs(seq_len), running_positions, shortest_cut
        )
        self.corpora = [self._open(entry) for entry in self.manifest.corpora]
        self._check_tokenizers()
        self.template = self._template()
        """Chat template of the conversations among its documents; None where all are plain text."""
        self._check_sides()
        tokenizer = self.corpora[0].metadata.tokenizer
        self.padding_id = tokenizer.eod_id if tokenizer.pad_id is None else tokenizer.pad_id
        """Token id of padding."""
        self._samples = [self._pack(corpus, corpus.training, "training") for corpus in self.corpora]
        for corpus, samples in zip(self.corpora, self._samples, strict=True):
            if len(samples) == 0:
                if samples.table.untrained[0]:
                    raise UsageError(
                        f"corpus '{corpus.entry.name}': {corpus.prefix}.mask trains no token; leave it out"
                    )
                raise UsageError(
                    f"corpus '{corpus.entry.name}': no full sample of {seq_len} tokens; lower seq_len, or leave it out"
                )
        self._epochs: dict[int, tuple[int, np.uint64]] = {}  # by corpus: latest epoch and its key
        self.blend = Blend([self._amount(number) for number in range(len(self.corpora))])

    def _open(self, entry: CorpusEntry) -> Corpus:
        prefix = self.path.parent / entry.prefix
        try:
            index = IndexedDataset(prefix)
            metadata = index.metadata
            if metadata is None:
                raise DataError(
                    f"{prefix}.json: missing; a mixture needs its tokenizer and hashes: for an index of Megatron-LM, "
                    f"'megazh index adopt {prefix} --tokenizer TOK' makes it"
                )
            if entry.sha256 not in (None, metadata.files.bin.sha256):
                found = metadata.files.bin.sha256
                raise DataError(f"{prefix}.bin: expected sha256 {entry.sha256} from the manifest, found {found}")
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

    def _template(self) -> TemplateInfo | None:
        chats = [corpus for corpus in self.corpora if corpus.metadata.template is not None]
        for corpus in chats[1:]:
            if corpus.metadata.template != chats[0].metadata.template:
                raise UsageError(
                    f"corpus '{corpus.entry.name}': its chat template differs from that of corpus "
                    f"'{chats[0].entry.name}'; convert both with the same --template"
                )
        return chats[0].metadata.template if chats else None

    def _check_sides(self) -> None:
        seq_len = self.shape.seq_len
        for corpus in self.corpora:
            tokens = corpus.tokens(corpus.training)
            if tokens < seq_len:
                raise UsageError(
                    f"corpus '{corpus.entry.name}': {tokens} tokens for training, less than one sample of {seq_len}; "
                    "lower seq_len, or leave the corpus out"
                )
        validation = self.manifest.validation
        if validation and validation.fraction and not any(len(corpus.validation) for corpus in self.corpora):
            documents = sum(len(corpus.index) for corpus in self.corpora)
            raise UsageError(
                f"{self.path}: the validation side is empty: a fraction of {validation.fraction} chose none of "
                f"{documents} documents; give a larger fraction, or another salt"
            )

    def _pack(self, corpus: Corpus, documents: Int64s, side: str) -> CorpusSamples:
        seed = f"{self.seed}/{corpus.entry.name}/{side}"
        table = pack_documents(corpus.index, documents, self.shape, seed, keep_tail=side == "validation")
        return CorpusSamples(corpus.index, self.shape, self.padding_id, table)

    def _amount(self, number: int) -> Fraction:
        """Exact weight, or number of tokens, to which the share of a corpus is proportional."""
        entry = self.corpora[number].entry
        if entry.weight is not None:
            return exact(entry.weight)
        if entry.tokens is not None:
            return Fraction(entry.tokens)
        assert entry.epochs is not None
        return exact(entry.epochs) * len(self._samples[number]) * self.shape.seq_len

    @property
    def planned_tokens(self) -> int | None:
        """Sum of the corpora's amounts in tokens; None if the manifest gives weights."""
        if self.corpora[0].entry.weight is not None:
            return None
        return round(sum(self._amount(number) for number in range(len(self.corpora))))

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Named parts that decide what sample n is; see `megazh.index.fingerprint`."""
        return fingerprint_of(self)

    def epoch_samples(self, corpus: int) -> int:
        """Number of training samples in one epoch of `corpus`."""
        return len(self._samples[corpus])

    def table(self, corpus: int) -> SampleTable:
        """The pieces of documents in the training samples of `corpus`."""
        return self._samples[corpus].table

    def drawn(self, corpus: int, samples: int) -> int:
        """Number of samples from `corpus` among the first `samples` training samples."""
        return self.blend.count(corpus, samples)

    @cached_property
    def end(self) -> int | None:
        """Number of samples after which the mixture ends; None if it never ends."""
        ends = [
            self._last_before(number, self._until_exhausted(number))
            for number, corpus in enumerate(self.corpora)
            if (corpus.entry.on_exhausted or self.manifest.on_exhausted) is OnExhausted.STOP
        ]
        return min(ends) if ends else None

    def _until_exhausted(self, corpus: int) -> int:
        """Number of samples after which `corpus` is exhausted: those of its `epochs`, or of one epoch."""
        epochs = self.corpora[corpus].entry.epochs
        return round(exact(epochs or 1) * len(self._samples[corpus]))

    def _last_before(self, corpus: int, limit: int) -> int:
        """Largest number of samples of the mixture with at most `limit` samples from `corpus`."""
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
        """Number of samples of the mixture after which `corpus` begins its second epoch."""
        return self._last_before(corpus, len(self._samples[corpus]))

    def locate(self, number: int) -> tuple[int, int, int]:
        """(corpus, epoch, row of the corpus's sample table) of training sample `number`.

        Raises:
            IndexError: `number` is negative, or not below the end of the mixture.
        """
        self._check_number(number)
        corpus, before = self.blend.locate(number)
        size = len(self._samples[corpus])
        epoch, place = divmod(before, size)
        return corpus, epoch, int(permuted(place, size, self._epoch_key(corpus, epoch)))

    def _check_number(self, number: int) -> None:
        if number < 0:
            raise IndexError(f"training sample {number}: expected a number of at least 0")
        if self.end is not None and number >= self.end:
            raise IndexError(f"training sample {number}: a corpus is exhausted after {self.end} samples of the mixture")

    def _epoch_key(self, corpus: int, epoch: int) -> np.uint64:
        latest = self._epochs.get(corpus)  # read only once: another thread may replace it by that of another epoch
        if latest is None or latest[0] != epoch:
            latest = (epoch, stream_key("epoch", self.seed, self.corpora[corpus].entry.name, epoch))
            self._epochs[corpus] = latest
        return latest[1]

    def _rows(self, numbers: Sequence[int]) -> list[tuple[CorpusSamples, Int64s, Int64s]]:
        """By corpus and epoch: places in `numbers`, and for each the row of the sample table, as `locate` has it."""
        if not len(numbers):
            return []
        self._check_number(min(numbers))
        self._check_number(max(numbers))
        found = []
        for corpus, places, before in self.blend.by_corpus(np.array(numbers, np.int64)):
            samples = self._samples[corpus]
            epochs, positions = np.divmod(before, len(samples))
            for epoch in np.unique(epochs):
                own = epochs == epoch
                rows = permuted_all(positions[own], len(samples), self._epoch_key(corpus, int(epoch)))
                found.append((samples, places[own], rows))
        return found

    def valid_labels(self, number: int) -> int:
        """Number of labels of training sample `number` that are not -100, found without reading its tokens."""
        return self.count_labels([number])

    def count_labels(self, numbers: Sequence[int], cut: Cut | None = None) -> int:
        """Number of labels of training samples `numbers` that are not -100, found without reading their tokens.

        `cut`: the cuts that are made of them.
        """
        found = 0
        for samples, _, rows in self._rows(numbers):
            found += int(samples.table.valid_labels[rows].sum())
            if cut is not None and not cut.keeps_labels:
                found -= samples.labels_at_cuts(rows, cut.length)
        return found

    def sample(self, number: int) -> Sample:
        """Training sample `number`."""
        return _only(self.batch([number]))

    def batch(self, numbers: Sequence[int]) -> Sample:
        """Training samples `numbers` as one batch: arrays as in `Sample`, with a leading batch dimension."""
        return _batch(self._rows(numbers), len(numbers), self.shape)

    def gather(
        self, numbers: Sequence[int], tokens: Int32s, labels: Int32s, document_map: Int32s, cut: Cut | None = None
    ) -> None:
        """Write training samples `numbers` and these numbers to arrays as `CorpusSamples.gather` has them."""
        document_map[:, -2:] = np.array(numbers, np.int64)[:, None].view(np.int32)
        for samples, places, rows in self._rows(numbers):
            samples.gather(rows, places, tokens, labels, document_map, cut)

    @cached_property
    def validation(self) -> "ValidationSamples":
        """The validation samples.

        Raises:
            UsageError: the manifest keeps no documents for validation.
        """
        if not self.manifest.validation or not self.manifest.validation.fraction:
            raise UsageError(f"{self.path}: keeps no documents for validation; add 'validation: {{fraction: 0.01}}'")
        kept = [corpus for corpus in self.corpora if len(corpus.validation)]
        packed = [self._pack(corpus, corpus.validation, "validation") for corpus in kept]
        samples = ValidationSamples(packed, self.shape, [corpus.entry.name for corpus in kept])
        if not len(samples):
            raise UsageError(f"{self.path}: masks train no token of the validation side; give a larger fraction")
        return samples


class ValidationSamples:
    """All validation samples, each once, corpus after corpus; the last sample of a corpus may be padded."""

    def __init__(self, corpora: list[CorpusSamples], shape: SampleShape, names: list[str]) -> None:
        self._corpora, self._shape = corpora, shape
        self.names = names
        """Names of the corpora, in the order of their samples."""
        self._ends = np.cumsum([len(samples) for samples in corpora])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _locate(self, number: int) -> tuple[int, int]:
        if not 0 <= number < len(self):
            raise IndexError(f"validation sample {number} of {len(self)}")
        corpus = int(np.searchsorted(self._ends, number, "right"))
        return corpus, number - (int(self._ends[corpus - 1]) if corpus else 0)

    def valid_labels(self, number: int) -> int:
        """Number of labels of validation sample `number` that are not -100, found without reading its tokens."""
        corpus, row = self._locate(number)
        return int(self._corpora[corpus].table.valid_labels[row])

    def corpus_of(self, number: int) -> int:
        """Number of the corpus, in `names`, that validation sample `number` is from."""
        return self._locate(number)[0]

    def index_of(self, number: int) -> IndexedDataset:
        """Index that validation sample `number` is from."""
        return self._corpora[self.corpus_of(number)].index

    def sample(self, number: int) -> Sample:
        """Validation sample `number`."""
        return _only(self.batch([number]))

    def batch(self, numbers: Sequence[int]) -> Sample:
        """Validation samples `numbers` as one batch: arrays as in `Sample`, with a leading batch dimension."""
        located = np.array([self._locate(number) for number in numbers], np.int64).reshape(-1, 2)
        corpora, rows = located[:, 0], located[:, 1].copy()
        parts = []
        for corpus in np.unique(corpora):
            places = np.flatnonzero(corpora == corpus)
            parts.append((self._corpora[corpus], places, rows[places]))
        return _batch(parts, len(numbers), self._shape)


def _batch(parts: list[tuple[CorpusSamples, Int64s, Int64s]], count: int, shape: SampleShape) -> Sample:
    """A batch of `count` samples: of each corpus, which rows of the batch get which rows of its sample table."""
    tokens, labels = np.empty((2, count, shape.seq_len), np.int32)
    document_map = np.empty((count, shape.document_map_size), np.int32)
    for samples, places, rows in parts:
        samples.gather(rows, places, tokens, labels, document_map)
    return Sample(tokens, labels, document_map[:, : shape.seq_len], document_map[:, shape.seq_len : -2])


def _only(batch: Sample) -> Sample:
    """The only sample of a batch of one."""
    return Sample(batch.tokens[0], batch.labels[0], batch.position_ids[0], batch.cu_seqlens[0])
