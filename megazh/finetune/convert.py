"""Conversations become indexes with masks of trained tokens, and a manifest with which to train on them."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson
import xxhash

from megazh.conversation.conversation import Conversation
from megazh.conversation.faults import RowError
from megazh.conversation.reading import Count, DataSets
from megazh.conversation.registry import DataSet
from megazh.conversation.rejects import Rejects
from megazh.corpus.formats import Format
from megazh.errors import Collector, DataError
from megazh.files import known_sha256, new_folder, remember_sha256, write_atomic
from megazh.finetune.conversion_folder import MANIFEST, check_folder, write_manifest
from megazh.finetune.fit import Drop, Fitted, Fitting
from megazh.finetune.noise import Noise
from megazh.index.metadata import Metadata, Options, Rejected, SourceInfo, TemplateInfo
from megazh.index.plan import signature, tokenizer_info
from megazh.index.writer import IndexWriter
from megazh.progress import Progress
from megazh.tokenizer.tokenizer import dtype_for

_TOGETHER = 256  # conversations that are written at once


@dataclass(frozen=True)
class Request:
    """What to convert, how, and where to."""

    sets: Sequence[DataSet]
    fitting: Fitting
    output: Path
    """The folder: one index a set, and `mixture.yaml`."""
    validation: float = 0.01
    """Share of conversations that the manifest keeps for validation."""
    seed: int = 0
    """Seed of the manifest."""
    format: Format | None = None
    """Format of all files; by default, each file's suffix decides."""
    encoding: str | None = None
    """Encoding of JSON and JSONL, as `megazh.corpus.encodings.normal_encoding` gives it."""
    overwrite: bool = False
    """Whether to replace the folder of an earlier conversion."""
    noise: Noise | None = None
    """Noise on the turns of the user; None: none."""
    copies: int = 1
    """Copies of each conversation, which differ in their noise: one for each epoch. All have the content hash of the
    conversation without noise, and so are on one side of the validation split."""


@dataclass
class Converted:
    """What became of a data set."""

    name: str
    weight: float
    rows: Count = field(default_factory=Count)
    conversations: int = 0
    """Number of conversations in the index."""
    tokens: int = 0
    trained: int = 0
    """Number of trained tokens."""
    longest: int = 0
    """Tokens of the longest conversation in the index."""
    cut: int = 0
    """Number of conversations whose last turns were left out."""
    unknown: int = 0
    """Number of conversations with characters that the tokenizer does not know."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Conversations that are not in the index, by reason."""
    hashes: list[npt.NDArray[np.uint64]] = field(default_factory=list)
    """Content hashes of the conversations, in the order of the index; each array is of some of them."""

    def describe(self, folder: Path) -> Iterator[str]:
        """Lines for the person at the terminal; `folder` has the index."""
        yield (
            f"{self.name}: {self.conversations:,} conversations, {self.tokens:,} tokens, {self.trained:,} of them "
            f"trained ({self.trained / self.tokens:.1%}), longest {self.longest:,}"
        )
        if self.cut:
            yield f"  cut at a turn: {self.cut:,}"
        if self.dropped:
            yield f"  dropped: {_by_reason(self.dropped)}"
        if self.rows.rejected:
            yield f"  rejected: {_by_reason(self.rows.rejected)}"
        if self.rows.trimmed:
            yield f"  left out of conversations: {_by_reason(self.rows.trimmed)}"
        if self.dropped or self.rows.rejected:
            yield f"  each with its reason: {folder / self.name}.rejected.jsonl"
        if self.unknown:
            yield f"  warning: {self.unknown:,} conversations have characters that the tokenizer does not know"


def convert(request: Request, say: Callable[[str], None]) -> Path:
    """Write an index with a mask for each data set, and a manifest of them; returns the path of the manifest.

    Each conversation is a document. Its content hash, which decides the validation split, is that of its roles and
    texts. The folder appears when all of it is complete; until then an earlier one stays. Of a damaged file, all whole
    rows before the damage are converted, and then the error is raised.

    Args:
        request: what to convert.
        say: called with each line for the person at the terminal: notes, then counts.

    Raises:
        UsageError: an input or the folder cannot work.
        DataError: a file is damaged or changed meanwhile, or a set gives no conversation to train on.
        BusyError: another process writes the folder.
        WriteError: the folder cannot be written; an earlier one stays.
    """
    check_folder(request.output, [each.name for each in request.sets], request.overwrite)
    errors, data = Collector(), list[DataSets]()
    for each in request.sets:
        with errors.collecting():
            data.append(DataSets([each], request.format, request.encoding))
    errors.raise_all()
    for note in (note for each in data for note in each.notes()):
        say(note)
    request.fitting.tokenizer.check()
    damaged, found, written = Collector(), list[Converted](), dict[str, str]()
    with (
        new_folder(request.output) as folder,
        Progress("converting", sum(each.size for each in data)) as progress,
    ):
        for data_set in data:
            converted, metadata = _Conversion(request, data_set, folder, progress, damaged).run()
            found.append(converted)
            written.update(
                (f"{converted.name}{suffix}", info.sha256) for suffix, info in metadata.files.by_suffix().items()
            )
        write_manifest(folder, found, request.validation, request.seed)
    for name, digest in written.items():
        remember_sha256(request.output / name, digest)
    for line in (line for each in found for line in each.describe(request.output)):
        say(line)
    total = sum(each.conversations for each in found)
    for error in damaged.errors:
        errors.add(DataError(f"{error}; {request.output} has the {total:,} conversations that could be read"))
    errors.raise_all()
    return request.output / MANIFEST


class _Conversion:
    """The conversion of one data set."""

    def __init__(self, request: Request, data: DataSets, folder: Path, progress: Progress, damaged: Collector) -> None:
        [data_set] = data.sets
        self._request, self._data, self._folder, self._progress = request, data, folder, progress
        self._damaged = damaged
        self._found = Converted(data_set.name, data_set.weight)
        self._prefix = folder / data_set.name
        self._text_bytes = 0
        self._waiting: list[tuple[int, Fitted]] = []
        """Content hash and tokens of conversations that are not written yet."""

    def run(self) -> tuple[Converted, Metadata]:
        found, tokenizer = self._found, self._request.fitting.tokenizer
        before = [signature(source) for source in self._data.sources]
        scratch = self._folder / ".unfinished"
        writer = IndexWriter(scratch, dtype_for(tokenizer.vocab_size), masked=True)
        with Rejects(Path(f"{self._prefix}.rejected.jsonl")) as rejects:
            error = self._read(writer, rejects)
            found.rows = self._data.counts[found.name]
            if not found.conversations:
                raise error or DataError(self._nothing(rejects))
            self._write(writer)
            rejects.commit()
        if error:
            self._damaged.add(error)
        elif [signature(source) for source in self._data.sources] != before:
            raise DataError(f"set '{found.name}': its files changed while they were read; run the command again")
        return found, self._commit(writer, scratch)

    def _read(self, writer: IndexWriter, rejects: Rejects) -> DataError | None:
        """Append all conversations; returns the error of damaged files."""
        found = self._found
        try:
            for sample in self._data.read(rejects, self._progress):
                for copy in range(self._request.copies):
                    try:
                        self._take(sample.conversation, copy)
                    except RowError as error:
                        found.dropped[error.fault.value] += 1
                        rejects.add(f"{sample.set}: {sample.file}", sample.row, error)
                if len(self._waiting) >= _TOGETHER:
                    self._write(writer)
        except DataError as error:
            found.dropped[Drop.BEHIND_A_BREAK.value] += 1  # PREFIX.json has it, for whoever trains on the rest
            rejects.add(found.name, 0, RowError(Drop.BEHIND_A_BREAK, str(error)))
            return error
        return None

    def _take(self, conversation: Conversation, copy: int) -> None:
        """Count a copy of a conversation, and keep it until it is written. Raises RowError if it gives no sample."""
        fitting, noise = self._request.fitting, self._request.noise
        fitted = fitting.fit(conversation)
        digest = _hash(fitted.conversation)
        if noise is not None and (noised := noise.on(conversation, digest, copy)) != conversation:
            fitted = fitting.fit(noised)
        self._waiting.append((digest, fitted))
        self._count(fitted)

    def _count(self, fitted: Fitted) -> None:
        found, encoded, unknown = self._found, fitted.encoded, self._request.fitting.tokenizer.unk_id
        self._text_bytes += sum(len(turn.text.encode()) for turn in fitted.conversation.turns)
        found.conversations += 1
        found.tokens += len(encoded)
        found.trained += int(np.count_nonzero(encoded.trained))
        found.longest = max(found.longest, len(encoded))
        found.cut += fitted.is_cut
        found.unknown += unknown is not None and bool((encoded.ids == unknown).any())
        self._progress.advance(0, len(encoded))

    def _write(self, writer: IndexWriter) -> None:
        """Append the conversations that wait."""
        if not self._waiting:
            return
        hashes = np.array([digest for digest, _ in self._waiting], np.uint64)
        encoded = [fitted.encoded for _, fitted in self._waiting]
        self._found.hashes.append(hashes)
        writer.append(
            np.concatenate([each.ids for each in encoded]).astype(writer.dtype),
            np.array([len(each) for each in encoded]),
            hashes,
            np.concatenate([each.trained for each in encoded]),
        )
        self._waiting.clear()

    def _nothing(self, rejects: Rejects) -> str:
        if not rejects.total:
            return f"set '{self._found.name}': no row in its files"
        return (
            f"set '{self._found.name}': no conversation to train on: {rejects.describe()}; the first: {rejects.first}"
            f"{self._found.rows.remedy}"
        )

    def _commit(self, writer: IndexWriter, scratch: Path) -> Metadata:
        found, request = self._found, self._request
        fitting = request.fitting
        info = tokenizer_info(fitting.tokenizer)
        reasons = Counter(found.rows.rejected) + found.dropped
        files = writer.finish()
        metadata = Metadata(
            tokenizer=info,
            template=TemplateInfo(
                name=Path(fitting.template.name).name, jinja=fitting.template.jinja, stop=fitting.template.stop
            ),
            dtype=writer.dtype.name,
            documents=writer.documents,
            tokens=writer.tokens,
            text_bytes=self._text_bytes,
            empty_documents=0,
            rejected=Rejected(total=reasons.total(), reasons=dict(sorted(reasons.items()))),
            token_length_histogram={str(edge): writer.histogram[edge] for edge in sorted(writer.histogram)},
            options=Options(
                format=request.format.value if request.format else None,
                text_key="",
                text_documents="",
                max_document_bytes=0,
                encoding=request.encoding,
                train=fitting.train.value,
                max_tokens=fitting.max_tokens,
                too_long=None if fitting.max_tokens is None else fitting.too_long.value,
                noise=None if request.noise is None else asdict(request.noise),
                copies=None if request.copies == 1 else request.copies,
                data_set=self._data.sets[0].fingerprint,
            ),
            sources=[
                SourceInfo(name=source.name, bytes=source.size, sha256=known_sha256(source.path))
                for source in self._data.sources
            ],
            files=files,
        )
        write_atomic(scratch / "index.json", metadata.to_bytes(), durable=False)
        write_atomic(scratch / "tokenizer", fitting.tokenizer.path.read_bytes(), durable=False)
        writer.commit(self._prefix, files, {".json": scratch / "index.json", info.file: scratch / "tokenizer"})
        shutil.rmtree(scratch)
        return metadata


def _hash(conversation: Conversation) -> int:
    return xxhash.xxh3_64_intdigest(orjson.dumps([[turn.role.value, turn.text] for turn in conversation.turns]))


def _by_reason(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())
