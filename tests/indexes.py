"""Small indexes without a tokenizer, for tests of the code that reads indexes."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

from megazh.conversation.template import CHATML
from megazh.index.metadata import Metadata, Options, Rejected, TokenizerInfo
from megazh.index.writer import IndexWriter

EOD = 1
VOCAB = 1000


def write_index(
    prefix: Path,
    documents: Sequence[Sequence[int]],
    fingerprint: str = "f" * 64,
    dtype: type = np.uint16,
    masks: Sequence[Sequence[bool]] | None = None,
) -> Path:
    """Write `documents` (ids, the end id included) as an index with a description; hashes are of the ids.

    `masks`: for each document, whether each of its tokens is trained.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(f"{prefix}.build")
    writer = IndexWriter(folder, dtype, masked=masks is not None)
    for number, document in enumerate(documents):
        tokens = np.array(document, dtype)
        digest = xxhash.xxh3_64_intdigest(np.array(document, np.int64).tobytes())
        trained = None if masks is None else np.array(masks[number], np.bool_)
        writer.append(tokens, np.array([len(tokens)]), np.array([digest], np.uint64), trained)
    files = writer.finish()
    metadata = Metadata(
        tokenizer=TokenizerInfo(
            kind="tokenizer.json",
            fingerprint=fingerprint,
            vocab_size=VOCAB,
            eod="<|endoftext|>",
            eod_id=EOD,
            pad_id=0,
            front_tokens=False,
            file=".tokenizer.json",
            sha256="0" * 64,
        ),
        dtype=np.dtype(dtype).name,
        documents=writer.documents,
        tokens=writer.tokens,
        text_bytes=3 * writer.tokens,
        empty_documents=0,
        rejected=Rejected(total=0, reasons={}),
        token_length_histogram={str(edge): count for edge, count in sorted(writer.histogram.items())},
        options=Options(format=None, text_key="text", text_documents="file", max_document_bytes=64_000_000),
        sources=[],
        files=files,
    )
    (folder / "index.json").write_bytes(metadata.to_bytes())
    writer.commit(prefix, files, {".json": folder / "index.json"})
    folder.rmdir()
    return prefix


def random_masks(seed: int, documents: Sequence[Sequence[int]]) -> list[list[bool]]:
    """Masks of runs of trained tokens, as answers are; the first token of a document is not trained."""
    random = np.random.default_rng(seed)
    masks = []
    for document in documents:
        trained = np.repeat(random.random(len(document)) < 0.4, random.integers(1, 12, len(document)))
        masks.append([False, *trained[: len(document) - 1].tolist()])
    return masks


def random_documents(seed: int, count: int, longest: int = 60) -> list[list[int]]:
    """Documents of 2 to `longest` random ids. The last id of each is the end id, which occurs nowhere else."""
    random = np.random.default_rng(seed)
    return [[*random.integers(EOD + 1, VOCAB, random.integers(1, longest)).tolist(), EOD] for _ in range(count)]


def set_template(prefix: Path, jinja: str = CHATML) -> None:
    """Record a chat template in the description of an index."""
    path = Path(f"{prefix}.json")
    template = {"name": "chatml", "jinja": jinja, "stop": "<|im_end|>"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "template": template}))
