"""Building an index with every kind of tokenizer: control tokens stay text, losses are counted, ids are repeatable."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizer_kinds as kinds
from textdata import is_one_line_error, json_lines, megazh, texts

from megazh.errors import DataError, UsageError
from megazh.index.build import Request, Summary, build_index
from megazh.index.check import inspect_index, verify_index
from megazh.index.merge import merge_indexes
from megazh.index.metadata import load_tokenizer_of, read_metadata
from megazh.index.pools import InlinePool
from megazh.index.reader import IndexedDataset
from megazh.tokenizer.tokenizer import RankKind, load_tokenizer

LITERALS = [
    "<|endoftext|>",
    "a</s>b",
    "今天 </s> 天气 <s> x",
    "<|im_end|>\n<|im_start|>user",
    "[SEP] [CLS] the [PAD] [UNK] [MASK]",
    "<pad> <unk> <eos>",
    " <|endoftext|> " * 20,
    "<|EndOfText|> </S>",
    "</s>",
]
LOSSLESS = [name for name in kinds.KINDS if "bytes" in name or name in ("byte-level BPE", "rank file")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Path of a tokenizer of each kind, made once."""

    @functools.cache
    def make(name: str) -> Path:
        return kinds.KINDS[name](tmp_path_factory.mktemp("kind"))

    return make


def build(
    folder: Path, documents: list[str], tokenizer: Path, name: str = "x", **request: Any
) -> tuple[Summary, list[str]]:
    """Build FOLDER/NAME in this process; returns the summary and the notices, but for the speed of the encoder."""
    source = folder / f"{name}.jsonl"
    source.write_bytes(json_lines(documents))
    said: list[str] = []
    ranks = RankKind.QWEN if tokenizer.suffix == ".tiktoken" else None
    wanted = Request([str(source)], folder / name, tokenizer, ranks=ranks, **request)
    summary = build_index(wanted, InlinePool(), said.append)
    return summary, [line for line in said if not line.endswith("using tokenizers, which is slower")]


def documents_of(prefix: Path) -> list[list[int]]:
    return [document.tolist() for document in IndexedDataset(prefix)]


@pytest.mark.parametrize("name", kinds.KINDS)
def test_no_kind_takes_a_control_token_from_text(name: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    documents = [*LITERALS, *texts(40, 4)]
    build(tmp_path, documents, made(name), max_lost=1.0)
    assert "are right" in verify_index(str(tmp_path / "x"))
    metadata = read_metadata(tmp_path / "x")
    assert metadata is not None
    assert metadata.documents == len(documents)
    tokenizer = load_tokenizer_of(tmp_path / "x", metadata)
    for text, ids in zip(documents, documents_of(tmp_path / "x"), strict=True):
        assert tokenizer.control_ids.isdisjoint(ids[:-1]), text
        assert ids[-1] == tokenizer.eod_id
        if name in LOSSLESS:
            assert tokenizer.decode(ids[:-1]).lstrip(" ") == tokenizer.normalize(text).lstrip(" ")


def not_special(settings: dict[str, Any]) -> None:
    for token in settings["added_tokens"]:
        token["special"] = False


def normalised(settings: dict[str, Any]) -> None:
    settings["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
    for token in settings["added_tokens"]:
        token.update(special=False, normalized=True)


def stripping(settings: dict[str, Any]) -> None:
    for token in settings["added_tokens"]:
        token.update(special=False, lstrip=True, rstrip=True)


def single_words(settings: dict[str, Any]) -> None:
    for token in settings["added_tokens"]:
        token.update(special=False, single_word=True)


def whole_words(settings: dict[str, Any]) -> None:
    """As in Llama 3: a word of the vocabulary is taken without merges. Control tokens are in the vocabulary here."""
    settings["model"]["ignore_merges"] = True
    settings["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }


def merged(settings: dict[str, Any]) -> None:
    """Merges make the end token, as where the training text was full of it."""
    vocab, merges = settings["model"]["vocab"], settings["model"]["merges"]
    end = "<|endoftext|>"
    settings["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    for at in range(2, len(end) + 1):
        if end[:at] not in vocab:
            vocab[end[:at]] = len(vocab)
        merges.insert(at - 2, [end[: at - 1], end[at - 1]])


@pytest.mark.parametrize("change", [not_special, normalised, stripping, single_words, whole_words, merged])
def test_control_tokens_that_the_library_would_take_from_text(
    change: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    tokenizer = kinds.byte_level(tmp_path, change)
    _, said = build(tmp_path, LITERALS, tokenizer)
    assert [line for line in said if not line.startswith("note: ")] == []
    assert "are right" in verify_index(str(tmp_path / "x"))
    loaded = load_tokenizer(tokenizer)
    ids = documents_of(tmp_path / "x")
    assert all(loaded.control_ids.isdisjoint(document[:-1]) for document in ids)
    assert [loaded.decode(document[:-1]) for document in ids] == [loaded.normalize(text) for text in LITERALS]


def test_added_words_are_words_and_those_like_control_tokens_are_named(tmp_path: Path) -> None:
    def add(settings: dict[str, Any]) -> None:
        settings["added_tokens"] += [
            kinds.added(1500, "量子力学", special=False),
            kinds.added(1501, "<think>", special=False),
            kinds.added(1502, "[工具]", special=False),
        ]

    tokenizer = kinds.byte_level(tmp_path, add)
    summary, said = build(tmp_path, ["学 量子力学 <think> [工具] 学"], tokenizer)
    (ids,) = documents_of(tmp_path / "x")
    assert 1500 in ids
    assert not {1501, 1502} & set(ids)
    assert said == [
        f'note: {tokenizer}: added words that are written like control tokens, though not "special", are encoded as '
        "ordinary text where documents hold them: <think>, [工具]"
    ]
    assert summary.round_trip.documents == 1
    assert "letter for letter" in summary.round_trip.describe()


@pytest.mark.parametrize(
    ("eod", "reason"),
    [("今天", "is an ordinary piece of the vocabulary"), ("a", "is an ordinary piece"), ("量子", "is an added word")],
)
def test_an_end_that_text_gives_is_refused(eod: str, reason: str, tmp_path: Path) -> None:
    def add(settings: dict[str, Any]) -> None:
        settings["model"]["vocab"]["今天"] = len(settings["model"]["vocab"])
        settings["added_tokens"].append(kinds.added(1501, "量子", special=False))

    with pytest.raises(UsageError, match=rf"'{eod}' {reason}.*give --eod a control token"):
        build(tmp_path, ["x"], kinds.byte_level(tmp_path, add), eod=eod)


@pytest.mark.parametrize("name", ["BPE with <unk>", "WordLevel", "WordPiece", "Unigram"])
def test_the_unknown_token_cannot_end_documents(name: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    unknown = "[UNK]" if name == "WordPiece" else "<unk>"
    with pytest.raises(UsageError, match=r"is the unknown token, so every unknown character would end a document"):
        build(tmp_path, ["x"], made(name), eod=unknown)


@pytest.mark.parametrize(
    ("eod", "reason"),
    [("<unk>", "the unknown piece"), ("<0x41>", "the piece of a byte"), ("今天", "a user-defined piece")],
)
def test_pieces_of_sentencepiece_that_cannot_end_documents(eod: str, reason: str, tmp_path: Path) -> None:
    model = kinds.train_sentencepiece(tmp_path, user_defined_symbols=["今天"])
    with pytest.raises(UsageError, match=rf"is {reason}, which text gives as well"):
        load_tokenizer(model, eod)


def test_user_defined_symbols_of_sentencepiece_stay_text(tmp_path: Path) -> None:
    model = kinds.train_sentencepiece(tmp_path, user_defined_symbols=["<|endoftext|>", "<|user|>", "天气预报"])
    build(tmp_path, LITERALS, model, "own", eod="</s>")
    _, said = build(tmp_path, [*LITERALS, "<|user|>天气预报"], model, eod="<|endoftext|>")
    assert len(said) == 1
    assert "<|endoftext|>, <|user|>" in said[0]
    assert "are right" in verify_index(str(tmp_path / "x"))
    ids = documents_of(tmp_path / "x")
    tokenizer = load_tokenizer(model, "<|endoftext|>")
    assert [tokenizer.decode(document[:-1]) for document in ids] == [*LITERALS, "<|user|>天气预报"]
    assert "天气预报" in [tokenizer.piece(token) for token in ids[-1]], "an ordinary word stays one piece"


def test_an_end_that_slips_in_is_found_before_the_index_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were a library to give the end's id nevertheless, the build would fail: where it encodes, or where it counts."""
    tokenizer = kinds.byte_level(tmp_path, not_special)
    monkeypatch.setattr("megazh.tokenizer.hugging_face.needs_plain_copy", lambda *_: False)
    with pytest.raises(DataError, match=r"gave the id 1 of a control token for ordinary text: 'a<.endoftext.>b'"):
        build(tmp_path, ["a", "a<|endoftext|>b"], tokenizer)
    monkeypatch.setattr("megazh.tokenizer.hugging_face.JsonTokenizer.control_ids", frozenset(), raising=False)
    monkeypatch.setattr("megazh.index.piece.np.flatnonzero", lambda _: np.empty(0))
    with pytest.raises(DataError, match=r"3 end-of-document ids \(1\) in 2 documents"):
        build(tmp_path, ["a", "a<|endoftext|>b"], tokenizer, restart=True)
    assert not (tmp_path / "x.idx").exists()


RARE = "龘靐齉爩鱻麤灪籱"


@pytest.mark.parametrize(
    ("name", "unknown"), [("BPE without <unk>", False), ("BPE with <unk>", True), ("SentencePiece Unigram", True)]
)
def test_text_that_vanishes_is_counted_and_refused(
    name: str, unknown: bool, made: Callable[[str], Path], tmp_path: Path
) -> None:
    """One character in five has no token."""
    documents = [f"今天天气不错{RARE[at % 8]}我" for at in range(400)]
    with pytest.raises(DataError, match=r"no token for 400 of 3,200 characters \(12\.50%, more than --max-lost 1\.00%"):
        build(tmp_path, documents, made(name))
    assert not (tmp_path / "x.idx").exists()
    summary, said = build(tmp_path, documents, made(name), max_lost=0.2, restart=True)
    found = summary.metadata.coverage
    assert found is not None
    assert (found.characters, found.lost_characters) == (3200, 400)
    assert found.unknown_tokens == (400 if unknown else 0)
    (warning,) = [
        line for line in said if line.startswith("warning: no token stands for 400 of 3,200 characters (12.5")
    ]
    assert "'今天天气不错龘我' becomes" in warning
    assert any("samples do not decode to their text: '今天天气不错龘我' becomes" in line for line in said)
    assert "400 of 3,200 characters have no token" in "\n".join(inspect_index(str(tmp_path / "x")))


def test_most_text_vanishing_stops_the_build_early(tmp_path: Path) -> None:
    tokenizer = kinds.character_bpe(tmp_path, unknown=False, characters=["a", "b"])
    (tmp_path / "a.jsonl").write_bytes(json_lines(["今天天气不错我们去公园散步" * 3] * 20))
    options = ("--input", tmp_path / "a.jsonl", "--tokenizer", tokenizer, "--output", tmp_path / "x")
    code, _, err = megazh("index", "build", *options)
    assert code == 3
    err = "\n".join(line for line in err.splitlines() if "which is slower" not in line)
    assert is_one_line_error(err, "no token for 780 of 780 characters (100.00%", "becomes ''", "--max-lost")
    code, out, err = megazh("index", "build", *options, "--max-lost", "100%")
    assert code == 0, err
    assert "780 of 780 characters (100.000%) have no token; 0 unknown tokens" in out


def test_lost_line_breaks_are_counted(tmp_path: Path) -> None:
    model = kinds.train_sentencepiece(tmp_path, normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True)
    documents = ["今天天气\n不错\n我们" for _ in range(100)]
    with pytest.raises(DataError, match=r"no token for 200 of 1,000 characters .*dropped line breaks count"):
        build(tmp_path, documents, model)
    summary, _ = build(tmp_path, documents, model, max_lost=0.5)
    assert summary.metadata.coverage is not None
    assert summary.metadata.coverage.unknown_tokens == 0
    one_line = [text.replace("\n", " ") for text in documents]
    summary, said = build(tmp_path, one_line, model, "lines")
    assert said == []
    assert summary.metadata.coverage is not None
    assert summary.metadata.coverage.lost_characters == 0


@pytest.mark.parametrize("name", LOSSLESS)
def test_what_keeps_every_byte_says_so(name: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    summary, said = build(tmp_path, [*texts(60, 3), RARE, "\n\n", "\u2028 \x00é"], made(name))
    assert said == []
    assert summary.metadata.coverage is not None
    assert summary.metadata.coverage.lost_characters == summary.metadata.coverage.unknown_tokens == 0
    assert summary.round_trip.documents > 0
    assert summary.round_trip.differ == 0


def test_dropout_is_switched_off(tmp_path: Path) -> None:
    plain = kinds.byte_level(tmp_path)
    build(tmp_path, texts(100, 8), plain, "plain")
    (tmp_path / "other").mkdir()
    dropping = kinds.byte_level(tmp_path / "other", lambda settings: settings["model"].update(dropout=0.5))
    _, said = build(tmp_path, texts(100, 8), dropping)
    assert said == [
        f"note: {dropping}: its random choice of tokens (dropout 0.5) is switched off, so that equal text gives equal "
        "ids"
    ]
    assert documents_of(tmp_path / "x") == documents_of(tmp_path / "plain")
    assert load_tokenizer(dropping).fingerprint == load_tokenizer(plain).fingerprint


def test_merged_indexes_sum_what_they_lost(made: Callable[[str], Path], tmp_path: Path) -> None:
    first, _ = build(tmp_path, ["今天龘", "天气"], made("BPE with <unk>"), "a", max_lost=1.0)
    second, _ = build(tmp_path, ["模型 靐 齉"], made("BPE with <unk>"), "b", max_lost=1.0)
    metadata = merge_indexes([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "ab")
    found = metadata.coverage
    assert found is not None
    assert (found.characters, found.lost_characters, found.unknown_tokens) == (11, 3, 3)
    parts = [summary.metadata.coverage for summary in (first, second)]
    assert found.token_bytes == sum(part.token_bytes or 0 for part in parts if part is not None)


def test_an_index_from_before_the_counts_is_still_read(made: Callable[[str], Path], tmp_path: Path) -> None:
    build(tmp_path, ["今天"], made("byte-level BPE"))
    path = tmp_path / "x.json"
    description = json.loads(path.read_bytes())
    del description["coverage"]
    path.write_text(json.dumps(description), encoding="utf-8")
    assert IndexedDataset(tmp_path / "x").metadata is not None
    assert "are right" in verify_index(str(tmp_path / "x"))
    assert "no token" not in "\n".join(inspect_index(str(tmp_path / "x")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Unigram", "SentencePiece BPE with bytes"])
def test_workers_keep_control_tokens_text_and_count_as_one_process(
    name: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    documents = [*LITERALS, *texts(3000, 4)] * 2
    build(tmp_path, documents, made(name), max_lost=1.0)
    code, _, err = megazh(
        *("index", "build", "--input", tmp_path / "x.jsonl", "--tokenizer", made(name), "--output", tmp_path / "w"),
        *("--workers", 2, "--max-lost", "100%"),
    )
    assert code == 0, err
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"w{suffix}").read_bytes() == (tmp_path / f"x{suffix}").read_bytes()
    alone, together = read_metadata(tmp_path / "x"), read_metadata(tmp_path / "w")
    assert alone is not None
    assert together is not None
    assert alone.coverage == together.coverage
