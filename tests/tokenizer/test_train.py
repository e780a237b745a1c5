"""Training of a tokenizer: ids, vocabulary size, and the same bytes each time."""

import json
from pathlib import Path

import pytest
from textdata import is_one_line_error, json_lines, megazh, texts, tokenizer_path, write_parquet

from megazh.corpus.options import ReadOptions
from megazh.corpus.sources import find_sources
from megazh.errors import UsageError
from megazh.tokenizer import load_tokenizer
from megazh.tokenizer.train import Digits, train_tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    path.write_bytes(json_lines([*texts(300), *[f"{number} 年 {number * 7919}" for number in range(1000, 1500)]]))
    return path


def train(corpus: Path, output: Path, size: int = 400, **options: object) -> int:
    return train_tokenizer(find_sources([str(corpus)]), ReadOptions(), output, size, **options)


def test_size_is_exact_and_control_tokens_are_ids_of_their_own() -> None:
    settings = json.loads(tokenizer_path().read_text(encoding="utf-8"))
    ids = settings["model"]["vocab"]
    assert sorted(ids.values()) == list(range(1500))
    assert [ids[token] for token in ("<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [0, 1, 2, 3]
    assert all(token["special"] for token in settings["added_tokens"])
    assert len({number for token, number in ids.items() if len(token) == 1}) >= 256


def test_every_byte_can_be_encoded() -> None:
    tokenizer = load_tokenizer(tokenizer_path())
    text = "".join(map(chr, [*range(0x2000), *range(0x1F000, 0x1F200)]))
    assert len(tokenizer.encode(text)) > 1000
    assert tokenizer.decode(tokenizer.encode("𪚥\x00\u0fff")) == "𪚥\x00\u0fff"


def test_same_bytes_twice_even_from_another_process(corpus: Path, tmp_path: Path) -> None:
    train(corpus, tmp_path / "a.json")
    train(corpus, tmp_path / "b.json")
    code, out, err = megazh(
        "tokenizer", "train", "--input", corpus, "--vocab-size", 400, "--output", tmp_path / "c.json"
    )
    assert (code, err) == (0, "")
    assert "400 ids" in out
    first, second, third = ((tmp_path / name).read_bytes() for name in ("a.json", "b.json", "c.json"))
    assert first == second == third


def test_digits_singly_or_in_threes(corpus: Path, tmp_path: Path) -> None:
    train(corpus, tmp_path / "one.json", 900)
    train(corpus, tmp_path / "three.json", 900, digits=Digits.TRIPLES)
    one, three = load_tokenizer(tmp_path / "one.json"), load_tokenizer(tmp_path / "three.json")
    assert [one.piece(number) for number in one.encode("1234567")] == list("1234567")
    assert max(len(three.piece(number)) for number in range(900) if three.piece(number).isdigit()) in (2, 3)
    assert len(three.encode("1001 1002")) < len(one.encode("1001 1002"))
    assert one.fingerprint != three.fingerprint


def test_smaller_than_the_bytes_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--vocab-size 259"):
        train(corpus, tmp_path / "a.json", 259)
    assert not (tmp_path / "a.json").exists()


def test_refused_size_and_needed_size_do_not_contradict_each_other(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        train(corpus, tmp_path / "a.json", 259)
    needed = int(str(caught.value).split("need ")[1].split()[-1])
    assert train(corpus, tmp_path / "a.json", needed) == needed


def test_text_with_little_to_learn_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(["ab ab ab"]))
    output = tmp_path / "new" / "tokenizer.json"
    code, out, _ = megazh(
        "tokenizer", "train", "--input", tmp_path / "a.jsonl", "--vocab-size", 5000, "--output", output
    )
    assert code == 0
    assert "fewer than 5,000" in out
    assert load_tokenizer(output).vocab_size < 300


def test_first_bytes_only(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(["aaaa bbbb " * 200_000, "zyzyzy " * 500_000]))
    train(tmp_path / "a.jsonl", tmp_path / "a.json", 300, max_bytes=1000)
    vocabulary = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert "aaaa" in vocabulary
    assert "zyzyzy" not in vocabulary


@pytest.mark.parametrize("case", ["no text", "damaged input", "folder", "suffix"])
def test_what_cannot_work_is_one_line(tmp_path: Path, case: str) -> None:
    source, output = tmp_path / "a.jsonl", tmp_path / "out.json"
    source.write_bytes(json_lines(["", ""]) if case == "no text" else json_lines(texts(10)))
    if case == "damaged input":
        source = write_parquet(tmp_path / "a.parquet", texts(500), 100)
        data = bytearray(source.read_bytes())
        data[300:600] = bytes(300)
        source.write_bytes(data)
    if case == "folder":
        output = tmp_path
    if case == "suffix":
        output = tmp_path / "out.bpe"
    code, out, err = megazh("tokenizer", "train", "--input", source, "--vocab-size", 300, "--output", output)
    assert code == (2 if case in ("folder", "suffix") else 3), err
    assert out == ""
    assert is_one_line_error(err), err
    assert not (tmp_path / "out.json").exists()
