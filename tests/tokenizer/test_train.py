"""Training of a tokenizer: ids, vocabulary size, and the same bytes each time."""

import json
import os
import random
import signal
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from processes import Running, start_command, wait_until
from textdata import ROOT, gz, is_one_line_error, json_lines, megazh, texts, tokenizer_path, write_parquet

from megazh.corpus.options import ReadOptions
from megazh.corpus.sources import find_sources
from megazh.errors import UsageError
from megazh.progress import Elapsed
from megazh.tokenizer import load_tokenizer
from megazh.tokenizer.train import (
    Digits,
    Training,
    describe_training,
    record_path,
    train_tokenizer,
    trained_already,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    path.write_bytes(json_lines([*texts(300), *[f"{number} 年 {number * 7919}" for number in range(1000, 1500)]]))
    return path


def train(corpus: Path, output: Path, size: int = 400, **options: object) -> int:
    return train_tokenizer(find_sources([str(corpus)]), ReadOptions(), output, size, **options).ids


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


def test_sampled_training_is_the_same_on_any_number_of_cores(tmp_path: Path) -> None:
    """Also with the library's threads switched off in the environment, and however often it is repeated."""
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts(3000, 3)))
    (tmp_path / "b.jsonl.gz").write_bytes(gz(json_lines(texts(3000, 4))))
    made = set()
    for number, environment in enumerate(
        ({"RAYON_NUM_THREADS": "1"}, {"RAYON_NUM_THREADS": "5"}, {"TOKENIZERS_PARALLELISM": "false"})
    ):
        output = tmp_path / str(number) / "tokenizer.json"
        code, out, err = megazh(*arguments(tmp_path / "[ab].jsonl*", output, 700, "--sample", "300k"), env=environment)
        assert (code, err) == (0, "")
        assert "learnt from 0.3 MB of text, a sample of" in out
        assert "in 2 files" in out
        made.add(output.read_bytes())
    assert len(made) == 1


def test_all_and_a_large_sample_learn_from_everything(corpus: Path, tmp_path: Path) -> None:
    train(corpus, tmp_path / "a.json", sample=None)
    train(corpus, tmp_path / "b.json", sample=10**9)
    train(corpus, tmp_path / "c.json", sample=10**4)
    made = [(tmp_path / f"{name}.json").read_bytes() for name in "abc"]
    assert made[0] == made[1] != made[2]


def test_long_words_are_cut_for_the_training_only(tmp_path: Path) -> None:
    """Unbroken text took minutes per 10 MB; the tokenizer still merges within words of any length."""
    draw = random.Random(1)
    words = [draw.choice(["天地玄黄", "宇宙洪荒", "日月盈昃", "辰宿列张"]) for _ in range(50_000)]
    begin = time.monotonic()
    for name, text in (("a", "".join(words)), ("b", " ".join(words))):
        (tmp_path / f"{name}.jsonl").write_bytes(json_lines([text]))
        train(tmp_path / f"{name}.jsonl", tmp_path / f"{name}.json", 320)
    assert time.monotonic() - begin < 30
    unbroken, broken = load_tokenizer(tmp_path / "a.json"), load_tokenizer(tmp_path / "b.json")
    text = "天地玄黄" * 1000
    assert len(broken.encode(text)) <= 2000
    assert len(unbroken.encode(text)) <= 2000
    settings = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert len(settings["pre_tokenizer"]["pretokenizers"]) == 2, "no cut of long words in the finished tokenizer"


def arguments(source: Path, output: Path, size: int = 400, *more: object) -> tuple[object, ...]:
    return ("tokenizer", "train", "--input", source, "--vocab-size", size, "--output", output, *more)


def test_existing_tokenizer_is_replaced_only_on_request(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "tokenizer.json"
    assert megazh(*arguments(corpus, output))[0] == 0
    first = output.read_bytes()
    code, out, err = megazh(*arguments(corpus, output))
    assert (code, err) == (0, "")
    assert "complete already, from the same input" in out
    code, out, err = megazh(*arguments(corpus, output, 401))
    assert (code, out) == (2, "")
    assert is_one_line_error(err, output, "vocab_size 400, not 401", "--restart")
    assert output.read_bytes() == first
    code, out, _ = megazh(*arguments(corpus, output, 401, "--restart"))
    assert (code, output.read_bytes() != first) == (0, True)
    assert "401 ids" in out


def test_a_tokenizer_of_another_training_is_named(corpus: Path, tmp_path: Path) -> None:
    output, other = tmp_path / "tokenizer.json", tmp_path / "b.jsonl"

    def training(source: Path = corpus, digits: Digits = Digits.SINGLE, sample: int | None = 10**6) -> Training:
        return describe_training(find_sources([str(source)]), ReadOptions(), 400, digits, sample)

    def refusal(training: Training) -> str:
        with pytest.raises(UsageError, match="--restart") as caught:
            trained_already(output, training)
        return str(caught.value)

    assert not trained_already(output, training())
    train_tokenizer(find_sources([str(corpus)]), ReadOptions(), output, 400, record=training())
    assert trained_already(output, training())
    assert "digits single, not triples" in refusal(training(digits=Digits.TRIPLES))
    assert "sample 1000000, not None" in refusal(training(sample=None))
    other.write_bytes(corpus.read_bytes())
    assert f"{corpus} is not given now" in refusal(training(other))
    os.utime(corpus, ns=(0, 0))
    assert f"{corpus} has changed since" in refusal(training())
    output.write_bytes(output.read_bytes() + b"\n")
    assert "changed after its training" in refusal(training())
    record_path(output).unlink()
    assert "unknown origin" in refusal(training())


@pytest.fixture
def slow_to_merge(tmp_path: Path) -> Path:
    """Text whose merges take many seconds, and whose reading takes none."""
    draw = random.Random(5)
    path = tmp_path / "slow.jsonl"
    path.write_bytes(json_lines(["".join(chr(draw.randrange(0x4E00, 0x9FA0)) for _ in range(1_500_000))]))
    return path


def merging(running: Running) -> bool:
    """Whether the process of the merges has read all texts: its time on the processor goes beyond the reading."""
    children = [pid for pid in running.descendants() if pid != running.process.pid]
    fields = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split() for pid in children]
    return any(int(each[11]) > 1.0 * os.sysconf("SC_CLK_TCK") for each in fields)


def start_training(*words: object) -> AbstractContextManager[Running]:
    return start_command([sys.executable, "-m", "megazh", *map(str, words)], cwd=ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_training_that_is_stopped_leaves_nothing(slow_to_merge: Path, tmp_path: Path, number: int) -> None:
    """The first needs an answer while the library computes merges, which hears no signals."""
    output = tmp_path / "out" / "tokenizer.json"
    output.parent.mkdir()
    output.write_text("{}")
    with start_training(*arguments(slow_to_merge, output, 30_000, "--restart")) as running:
        wait_until(lambda: merging(running), 60, "merges")
        begin = time.monotonic()
        running.process.send_signal(number)
        finished = running.wait(20)
        assert time.monotonic() - begin < 1.5
        assert finished.returncode == (130 if number == signal.SIGINT else -number)
        if number == signal.SIGINT:
            assert finished.stderr == "interrupted; nothing was written\n"
        wait_until(lambda: not running.descendants(), 5, "the end of the process that trains")
    assert output.read_text() == "{}"
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.slow
def test_killed_process_of_the_merges_is_one_line(slow_to_merge: Path, tmp_path: Path) -> None:
    with start_training(*arguments(slow_to_merge, tmp_path / "tokenizer.json", 30_000)) as running:
        wait_until(lambda: merging(running), 60, "merges")
        child = next(pid for pid in running.descendants() if pid != running.process.pid)
        os.kill(child, signal.SIGKILL)
        finished = running.wait(20)
    assert finished.returncode == 5
    assert is_one_line_error(finished.stderr, "died", "out of memory", "--sample")
    assert not (tmp_path / "tokenizer.json").exists()


def test_merging_shows_that_it_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr("megazh.progress.time.monotonic", lambda: now[0])
    with Elapsed("merging") as elapsed:
        for now[0] in (1, 29, 31, 60, 62):
            elapsed.tick()
    assert capsys.readouterr().err == "merging: 0:00:31 so far\nmerging: 0:01:02 so far\n"


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


def test_file_whose_name_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode("语料.jsonl".encode("gbk"))
    path.write_bytes(json_lines(texts(50)))
    code, _, err = megazh(
        "tokenizer", "train", "--input", tmp_path, "--vocab-size", 300, "--output", tmp_path / "t.json"
    )
    assert (code, err) == (0, ""), err
