"""Adoption of indexes that other tools wrote, by a writer of the documented format that shares no code with megazh."""

import hashlib
import itertools
import json
import signal
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from processes import start_command, wait_until
from textdata import ROOT, index_bytes, is_one_line_error, json_lines, megazh, texts, tokenizer_path

from megazh.errors import DataError, MegazhError, UsageError
from megazh.index.adopt import adopt_index
from megazh.index.build import Request, build_index
from megazh.index.check import inspect_index, verify_index
from megazh.index.merge import merge_indexes
from megazh.index.mixture import Mixture
from megazh.index.pools import InlinePool
from megazh.index.reader import IndexedDataset
from megazh.tokenizer import load_tokenizer

EOD, VOCAB = 1, 1500
_TYPES = {"H": 8, "i": 4, "q": 5, "f": 7, "d": 6}  # struct's letters and Megatron's codes


def write_megatron(prefix: Path, documents: Sequence[Sequence[Sequence[int]]], letter: str = "H") -> Path:
    """Write documents, each a list of sequences of ids, as Megatron-LM's MMapIndexedDatasetBuilder does."""
    sequences = list(itertools.chain.from_iterable(documents))
    lengths = [len(sequence) for sequence in sequences]
    pointers = [0, *itertools.accumulate(length * struct.calcsize(letter) for length in lengths)][:-1]
    boundaries = [0, *itertools.accumulate(map(len, documents))]
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{prefix}.bin", "wb") as file:
        for sequence in sequences:
            file.write(struct.pack(f"<{len(sequence)}{letter}", *sequence))
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, _TYPES[letter]))
        file.write(struct.pack("<QQ", len(sequences), len(boundaries)))
        file.write(struct.pack(f"<{len(lengths)}i", *lengths))
        file.write(struct.pack(f"<{len(pointers)}q", *pointers))
        file.write(struct.pack(f"<{len(boundaries)}q", *boundaries))
    return prefix


def encoded(documents: Sequence[str]) -> list[list[int]]:
    tokenizer = load_tokenizer(tokenizer_path())
    return [[*tokenizer.encode(text), EOD] for text in documents]


def in_one(documents: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
    return [[ids] for ids in documents]


def in_three(documents: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
    """Each document as sequences, as with --split-sentences; some of them are empty."""
    return [[ids[: len(ids) // 3], ids[len(ids) // 3 : len(ids) // 2], ids[len(ids) // 2 :]] for ids in documents]


def digests(*paths: Path | str) -> list[str]:
    return [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths]


def plain(count: int) -> list[str]:
    """Texts that NFC does not change, so that the decoded documents are the original ones."""
    return [f"{number} 今天天气不错，模型训练。the quick brown fox" for number in range(count)]


def build(documents: Sequence[str], prefix: Path) -> None:
    prefix.with_suffix(".jsonl").write_bytes(json_lines(documents))
    request = Request([str(prefix.with_suffix(".jsonl"))], prefix, tokenizer_path())
    build_index(request, InlinePool(), lambda line: pytest.fail(line))


@pytest.mark.parametrize("letter", ["H", "i", "q"])
@pytest.mark.parametrize("split", [in_one, in_three])
def test_adopted_index_has_the_contents_of_a_build(
    tmp_path: Path, letter: str, split: Callable[[Sequence[Sequence[int]]], list[list[Sequence[int]]]]
) -> None:
    documents = plain(50)
    prefix = write_megatron(tmp_path / "theirs", split(encoded(documents)), letter)
    before = digests(f"{prefix}.bin", f"{prefix}.idx")
    code, out, err = megazh("index", "adopt", prefix, "--tokenizer", tokenizer_path())
    assert (code, err) == (0, "")
    assert "50 documents" in out
    assert digests(f"{prefix}.bin", f"{prefix}.idx") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "theirs.bin", "theirs.docs", "theirs.idx", "theirs.json", "theirs.tokenizer.json"
    ]  # fmt: skip
    build(documents, tmp_path / "ours")
    theirs, ours = json.loads(Path(f"{prefix}.json").read_bytes()), json.loads((tmp_path / "ours.json").read_bytes())
    for key in ("tokenizer", "documents", "tokens", "text_bytes", "token_length_histogram"):
        assert theirs[key] == ours[key]
    assert Path(f"{prefix}.docs").read_bytes() == (tmp_path / "ours.docs").read_bytes()
    if split is in_one and letter == "H":
        assert Path(f"{prefix}.bin").read_bytes() == (tmp_path / "ours.bin").read_bytes()
    assert "are right" in verify_index(str(prefix))
    assert any("今天天气不错" in line for line in inspect_index(str(prefix), 0))


def test_adopted_index_is_mixed_and_merged_with_a_built_one(tmp_path: Path) -> None:
    """Also one that holds ids in 32 bits where a build takes 16."""
    documents = plain(60)
    adopt_index(str(write_megatron(tmp_path / "theirs", in_three(encoded(documents[:40])), "i")), tokenizer_path())
    build(documents[40:], tmp_path / "ours")
    build(documents, tmp_path / "whole")
    merge_indexes([str(tmp_path / "theirs"), str(tmp_path / "ours")], tmp_path / "merged")
    merged, whole = index_bytes(tmp_path / "merged"), index_bytes(tmp_path / "whole")
    for suffix in (".bin", ".idx", ".docs"):
        assert merged[suffix] == whole[suffix]
    assert "are right" in verify_index(str(tmp_path / "merged"))
    (tmp_path / "mix.yaml").write_text(
        "validation: {fraction: 0.2}\ncorpora:\n  - {name: a, prefix: theirs, weight: 1}\n"
        "  - {name: b, prefix: ours, weight: 1}\n"
    )
    mixture = Mixture(tmp_path / "mix.yaml", 64)
    assert {mixture.locate(number)[0] for number in range(8)} == {0, 1}
    assert len(mixture.validation)
    tokens = mixture.sample(0).tokens
    assert tokens.max() < VOCAB


def test_control_tokens_within_a_document_are_kept(tmp_path: Path) -> None:
    """Chats hold <|im_start|> and <|im_end|> as control tokens; only the end of the document must be unique."""
    prefix = write_megatron(tmp_path / "chat", in_one([[2, 300, 3, EOD], [2, 301, 3, EOD]]))
    adopt_index(str(prefix), tokenizer_path())
    assert "are right" in verify_index(str(prefix))
    assert len(set(IndexedDataset(prefix).document_hashes().tolist())) == 2


def test_another_end_token_is_taken_on_request(tmp_path: Path) -> None:
    prefix = write_megatron(tmp_path / "a", in_one([[300, 3], [301, 302, 3]]))
    with pytest.raises(DataError, match=r"ends with 3 '<\|im_end\|>'.*--eod"):
        adopt_index(str(prefix), tokenizer_path())
    assert adopt_index(str(prefix), tokenizer_path(), "<|im_end|>").tokenizer.eod_id == 3


GOOD = [[300, 301, EOD], [302, EOD]]


@pytest.mark.parametrize(
    ("documents", "letter", "parts"),
    [
        ([[300, EOD], [1600, EOD]], "i", ("token 2 is id 1,600", "has 1,500 ids", "another tokenizer")),
        ([[300, EOD], [151_700, EOD]], "i", ("token 2 is id 151,700", "1,500 ids")),
        ([[300, EOD], [-1, EOD]], "i", ("token 2 is id -1",)),
        ([[300, EOD], [301, 302]], "H", ("document 1 ends with 302", "1 of 2 documents", "--append-eod")),
        ([[300, EOD], []], "H", ("document 1 is empty",)),
        ([[300, EOD], [301, EOD, 302, EOD]], "H", ("document 1 has", "as its token 1", "control token")),
        ([], "H", ("holds no documents",)),
    ],
)
def test_what_does_not_fit_the_tokenizer_is_named_and_nothing_written(
    tmp_path: Path, documents: list[list[int]], letter: str, parts: tuple[str, ...]
) -> None:
    prefix = write_megatron(tmp_path / "a", in_one(documents), letter)
    with pytest.raises(DataError) as caught:
        adopt_index(str(prefix), tokenizer_path())
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


@pytest.mark.parametrize(
    ("case", "kind", "parts"),
    [
        ("float32", DataError, ("a.idx", "(float32)", "no token ids")),
        ("float64", DataError, ("a.idx", "(float64)", "no token ids")),
        ("truncated bin", DataError, ("a.bin", "truncated", "again")),
        ("truncated idx", DataError, ("a.idx", "truncated", "again")),
        ("no idx", UsageError, ("a.idx: missing", "again")),
        ("not an index", DataError, ("a.idx", "not a Megatron index", "give the PREFIX")),
        ("suffix", UsageError, ("give the prefix without .bin",)),
        ("nothing there", UsageError, ("no index there", "megazh index build")),
        ("multimodal", UsageError, ("multimodal",)),
        ("ours already", UsageError, ("has its description already", "verify")),
        ("no tokenizer", UsageError, ("no such file",)),
        ("in the way", UsageError, ("a.tokenizer.json", "in the way")),
    ],
)
def test_what_cannot_be_adopted_is_one_line(
    tmp_path: Path, case: str, kind: type[MegazhError], parts: tuple[str, ...]
) -> None:
    prefix = write_megatron(tmp_path / "a", in_one(GOOD), {"float32": "f", "float64": "d"}.get(case, "H"))
    tokenizer = tokenizer_path()
    binary, index = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    if case == "truncated bin":
        binary.write_bytes(binary.read_bytes()[:-2])
    elif case == "truncated idx":
        index.write_bytes(index.read_bytes()[:-9])
    elif case == "no idx":
        index.unlink()
    elif case == "not an index":
        index.write_bytes(b"PK\x03\x04" + bytes(100))
    elif case == "suffix":
        prefix = binary
    elif case == "nothing there":
        prefix = tmp_path / "other"
    elif case == "multimodal":
        index.write_bytes(index.read_bytes() + bytes(2))
    elif case == "ours already":
        adopt_index(str(prefix), tokenizer)
    elif case == "no tokenizer":
        tokenizer = tmp_path / "no.json"
    elif case == "in the way":
        Path(f"{prefix}.tokenizer.json").write_text("mine")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(kind) as caught:
        adopt_index(str(prefix), tokenizer)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_errors_have_their_exit_codes(tmp_path: Path) -> None:
    prefix = write_megatron(tmp_path / "a", in_one([[300, EOD], [151_700, EOD]]), "i")
    code, out, err = megazh("index", "adopt", prefix, "--tokenizer", tokenizer_path())
    assert (code, out) == (3, "")
    assert is_one_line_error(err, "151,700", tokenizer_path())


@pytest.mark.parametrize("file", [".tokenizer.json", ".docs", ".json"])
def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    from megazh.index import adopt

    def failing(path: Path, data: bytes) -> None:
        if path.name == f"a{file}":
            raise OSError(28, "No space left on device", str(path))
        path.write_bytes(data)

    prefix = write_megatron(tmp_path / "a", in_one(GOOD))
    monkeypatch.setattr(adopt, "write_atomic", failing)
    with pytest.raises(OSError, match="No space left"):
        adopt_index(str(prefix), tokenizer_path())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_adoption_leaves_an_index_that_can_be_adopted(tmp_path: Path, number: int) -> None:
    prefix = write_megatron(tmp_path / "a", in_one(encoded(texts(2000, most=300)) * 4))
    words = ["index", "adopt", str(prefix), "--tokenizer", str(tokenizer_path())]
    with start_command([sys.executable, "-m", "megazh", *words], cwd=ROOT) as running:
        wait_until(lambda: Path(f"{prefix}.build", "lock").exists(), 60, "the start of the adoption")
        running.process.send_signal(number)
        finished = running.wait(30)
    assert finished.returncode == (130 if number == signal.SIGINT else -number)
    assert not Path(f"{prefix}.json").exists()
    metadata = adopt_index(str(prefix), tokenizer_path())
    assert metadata.documents == 8000
    assert not Path(f"{prefix}.build").exists()


def test_megatron_itself_reads_what_the_writer_wrote(tmp_path: Path) -> None:
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    documents = in_three(encoded(plain(5)))
    dataset = megatron.IndexedDataset(str(write_megatron(tmp_path / "a", documents)))
    assert dataset.document_indices.tolist() == [0, 3, 6, 9, 12, 15]
    assert [np.asarray(dataset[number]).tolist() for number in range(3)] == [list(part) for part in documents[0]]
