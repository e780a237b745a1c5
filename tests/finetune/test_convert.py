"""Conversations become indexes with masks: tokens and masks, what is left out, damage, weights and the folder."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from indexes import write_index
from textdata import QWEN_RANKS, SHARED, is_one_line_error, megazh, tokenizer_path

from megazh.conversation.encode import template_for
from megazh.conversation.registry import sets_of
from megazh.errors import DataError, UsageError
from megazh.finetune.convert import Request
from megazh.finetune.convert import convert as convert_sets
from megazh.finetune.fit import Fitting, TooLong, Train
from megazh.finetune.noise import Noise
from megazh.index.check import verify_index
from megazh.index.mask import unpack
from megazh.index.mixture import Mixture
from megazh.index.reader import IndexedDataset
from megazh.tokenizer import Tokenizer, load_tokenizer

TOKENIZER = load_tokenizer(tokenizer_path())
END = TOKENIZER.eod_id
ALPACA_ZH = SHARED / "data" / "sft" / "alpaca_zh_24k.jsonl.zst"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAZH_CACHE", str(tmp_path / "cache"))


def row(question: str, answer: str, *more: str) -> dict[str, Any]:
    """A row of questions and answers in turn."""
    texts = (question, answer, *more)
    return {"messages": [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]}


def rows(count: int) -> list[dict[str, Any]]:
    """Rows that all differ."""
    return [row(f"问题{number}", f"答案{number}") for number in range(count)]


def write_rows(path: Path, found: list[Any]) -> Path:
    """Write JSON Lines."""
    path.write_text("".join(f"{json.dumps(each, ensure_ascii=False)}\n" for each in found), encoding="utf-8")
    return path


def convert(
    given: Path, output: Path, template: str = "chatml", tokenizer: Tokenizer = TOKENIZER, **options: Any
) -> list[str]:
    """Convert with options of `Fitting` and of `Request`; returns the lines for the person at the terminal."""
    fit = {key: options.pop(key) for key in ("train", "max_tokens", "too_long") if key in options}
    fitting, lines = Fitting(template_for(tokenizer, template), tokenizer, **fit), list[str]()
    assert convert_sets(Request(sets_of([str(given)]), fitting, output, **options), lines.append).exists()
    return lines


def command(*arguments: object) -> tuple[int, str, str]:
    """Run `megazh sft convert`."""
    return megazh("sft", "convert", *arguments, "--tokenizer", tokenizer_path())


def documents(prefix: Path) -> list[tuple[str, str]]:
    """Text of each document, and of its trained tokens."""
    index = IndexedDataset(prefix)
    trained = unpack(index.mask, 0, len(index.tokens))
    found = []
    for number in range(len(index)):
        ids, mask = index[number], trained[index.starts[number] : index.starts[number + 1]]
        found.append((TOKENIZER.decode(ids.tolist()), TOKENIZER.decode(ids[mask].tolist())))
    return found


def rejected(prefix: Path) -> list[tuple[int, str]]:
    """Line and reason of each row that is not in an index."""
    lines = Path(f"{prefix}.rejected.jsonl").read_text(encoding="utf-8").splitlines()
    return [(each["line"], each["reason"]) for each in map(json.loads, lines)]


def test_answers_are_trained_with_their_end_and_the_end_of_a_document_is_not(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [row("一", "二", "三", "四"), row("五", "六"), row("七", "八")])
    code, out, err = command(path, "-o", tmp_path / "sft", "--validation", "30%")
    assert (code, err) == (0, "")
    first, *_ = documents(tmp_path / "sft" / "files")
    assert first == (
        "<|im_start|>user\n一<|im_end|>\n<|im_start|>assistant\n二<|im_end|>\n"
        "<|im_start|>user\n三<|im_end|>\n<|im_start|>assistant\n四<|im_end|>\n<|endoftext|>",
        "二<|im_end|>四<|im_end|>",
    )
    assert "files: 3 conversations" in out
    assert out.splitlines()[-1] == f"train on it with data.manifest={tmp_path}/sft/mixture.yaml"
    assert sorted(each.name for each in (tmp_path / "sft").iterdir()) == [
        *(f"files.{end}" for end in ("bin", "docs", "idx", "json", "mask", "tokenizer.json")),
        "mixture.yaml",
    ]
    template = json.loads((tmp_path / "sft" / "files.json").read_bytes())["template"]
    assert (template["name"], template["stop"]) == ("chatml", "<|im_end|>")
    assert "<|im_start|>" in template["jinja"]
    assert verify_index(str(tmp_path / "sft" / "files")).endswith("mask are right")


def test_a_template_that_ends_with_the_end_of_a_document_gets_no_other(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [row("一", "二", "三", "四"), row("五", "六")])
    convert(path, tmp_path / "sft", "human-assistant", train=Train.LAST_TURN, validation=0)
    assert documents(tmp_path / "sft" / "files") == [
        ("Human:\n一\nAssistant:\n二\n<|endoftext|>Human:\n三\nAssistant:\n四\n<|endoftext|>", "四\n<|endoftext|>"),
        ("Human:\n五\nAssistant:\n六\n<|endoftext|>", "六\n<|endoftext|>"),
    ]
    assert verify_index(str(tmp_path / "sft" / "files")).startswith("2 documents")
    assert "validation" not in yaml.safe_load((tmp_path / "sft" / "mixture.yaml").read_bytes())


def test_special_strings_in_texts_are_no_control_tokens(tmp_path: Path) -> None:
    text = "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
    path = write_rows(tmp_path / "a.jsonl", [row(text, text), row("一", "二")])
    convert(path, tmp_path / "sft", validation=0)
    index = IndexedDataset(tmp_path / "sft" / "files")
    for document in range(2):
        assert np.isin(index[document], sorted(TOKENIZER.control_ids)).sum() == 5, "two a turn, and the end"
    assert documents(tmp_path / "sft" / "files")[0][1] == f"{text}<|im_end|>"


def test_broken_rows_are_named_and_the_rest_is_converted(tmp_path: Path) -> None:
    two_users = {"messages": [{"role": "user", "content": text} for text in "一二"]}
    long = row("长" * 200_000, "短")
    unanswered = row("一", "")
    untrained = row("一", "二")
    untrained["messages"][1]["weight"] = 0
    bad = [two_users, unanswered, long, untrained, {"text": "x"}, 7, row("一", "二", "三", "四" * 300)]
    path = write_rows(tmp_path / "a.jsonl", [*rows(20), *bad])
    lines = convert(path, tmp_path / "sft", max_tokens=256)
    prefix = tmp_path / "sft" / "files"
    assert rejected(prefix) == [
        (21, "two turns of one role running"),
        (22, "empty answer"),
        (23, "too long"),
        (24, "nothing to train"),
        (25, "missing key"),
        (26, "not an object"),
    ]
    assert documents(prefix)[-1] == (
        "<|im_start|>user\n一<|im_end|>\n<|im_start|>assistant\n二<|im_end|>\n<|endoftext|>",
        "二<|im_end|>",
    )
    assert lines[0].startswith("files: 21 conversations, ")
    assert lines[1:] == [
        "  cut at a turn: 1",
        "  dropped: 1 too long, 1 nothing to train",
        "  rejected: 1 two turns of one role running, 1 empty answer, 1 missing key, 1 not an object",
        f"  each with its reason: {prefix}.rejected.jsonl",
    ]
    data = IndexedDataset(prefix).metadata
    assert data is not None
    assert data.rejected.total == 6
    assert (data.options.max_tokens, data.options.too_long, data.options.train) == (256, "cut", "all")
    assert int(np.diff(IndexedDataset(prefix).starts).max()) <= 256
    lines = convert(path, tmp_path / "dropped", max_tokens=256, too_long=TooLong.DROP)
    assert lines[0].startswith("files: 20 conversations, ")
    assert lines[1] == "  dropped: 2 too long, 1 nothing to train"


def test_rows_before_a_break_are_converted_and_the_break_is_named(tmp_path: Path) -> None:
    whole = json.dumps(rows(300), ensure_ascii=False)
    path = tmp_path / "a.json"
    path.write_text(whole[: len(whole) * 2 // 3], encoding="utf-8")
    code, out, err = command(path, "-o", tmp_path / "sft")
    count = len(documents(tmp_path / "sft" / "files"))
    assert 150 < count < 300
    assert code != 0
    assert is_one_line_error(err)
    assert str(path) in err
    assert err.rstrip().endswith(f"{tmp_path}/sft has the {count} conversations that could be read")
    assert f"files: {count} conversations" in out


def test_sets_of_a_registry_have_an_index_each_and_weights_by_size(tmp_path: Path) -> None:
    write_rows(tmp_path / "large.jsonl", rows(300))
    write_rows(tmp_path / "small.jsonl", rows(100))
    registry = tmp_path / "sets.yaml"
    registry.write_text(
        "large: {file_name: large.jsonl}\nsmall: {file_name: small.jsonl, weight: 2, num_samples: 80}\n"
    )
    convert(registry, tmp_path / "sft", validation=0.1, seed=5)
    manifest = tmp_path / "sft" / "mixture.yaml"
    values = yaml.safe_load(manifest.read_bytes())
    tokens = [len(IndexedDataset(tmp_path / "sft" / name).tokens) for name in ("large", "small")]
    weights = [each["weight"] for each in values["corpora"]]
    assert weights[1] / weights[0] == pytest.approx(2 * tokens[1] / tokens[0], rel=1e-4)
    assert (values["seed"], values["validation"]["fraction"]) == (5, 0.1)
    mixture = Mixture(manifest, 64)
    sides = [
        {mixture.corpora[number].index.document_hashes()[document] for document in side}
        for number in range(2)
        for side in (mixture.corpora[number].training, mixture.corpora[number].validation)
    ]
    assert sides[2] < sides[0], "the small set is the beginning of the large one: equal texts are on the same side"
    assert sides[3] < sides[1]


def test_few_conversations_still_have_a_validation_side(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", rows(30))
    convert(path, tmp_path / "sft")
    [corpus] = Mixture(tmp_path / "sft" / "mixture.yaml", 16).corpora
    assert 0 < len(corpus.validation) < 30
    with pytest.raises(DataError, match=r"--validation 0\.01 keeps none of the 1 conversations, or all of them"):
        convert(write_rows(tmp_path / "b.jsonl", rows(1)), tmp_path / "one")
    assert not (tmp_path / "one").exists()


def test_nothing_to_train_on_is_an_error_that_names_the_set(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "x"}] * 3)
    with pytest.raises(DataError, match="set 'files': no conversation to train on: 3 missing key; the first: files: a"):
        convert(path, tmp_path / "sft")
    assert {each.name for each in tmp_path.iterdir()} <= {"a.jsonl", "cache"}


def test_a_tokenizer_without_the_control_tokens_of_a_template_is_refused(tmp_path: Path) -> None:
    values = json.loads(tokenizer_path().read_bytes())
    values["added_tokens"] = [each for each in values["added_tokens"] if not each["content"].startswith("<|im_")]
    values["model"]["vocab"] = {
        piece: number for piece, number in values["model"]["vocab"].items() if not piece.startswith("<|im_")
    }
    other = tmp_path / "tokenizer.json"
    other.write_text(json.dumps(values), encoding="utf-8")
    path = write_rows(tmp_path / "a.jsonl", rows(30))
    tokenizer = load_tokenizer(other)
    expected = r"no control token <\|im_start\|>, <\|im_end\|>; take the template human-assistant"
    with pytest.raises(UsageError, match=expected):
        convert(path, tmp_path / "sft", tokenizer=tokenizer)
    convert(path, tmp_path / "sft", "human-assistant", tokenizer)


def test_a_folder_is_replaced_only_if_it_is_a_conversion_and_only_by_a_whole_one(tmp_path: Path) -> None:
    path, folder = write_rows(tmp_path / "a.jsonl", rows(30)), tmp_path / "sft"
    convert(path, folder)
    before = {each.name: each.read_bytes() for each in folder.iterdir()}
    with pytest.raises(UsageError, match=r"holds files\.bin already; give another folder, or replace it with --force"):
        convert(path, folder)
    with pytest.raises(DataError):
        convert(write_rows(tmp_path / "bad.jsonl", [{"text": "x"}]), folder, overwrite=True)
    assert {each.name: each.read_bytes() for each in folder.iterdir()} == before
    convert(write_rows(tmp_path / "b.jsonl", rows(40)), folder, overwrite=True)
    assert len(documents(folder / "files")) == 40
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds notes\.txt, and no conversion alone"):
        convert(path, folder, overwrite=True)
    assert len(documents(folder / "files")) == 40


def test_replay_of_plain_text_is_one_more_corpus(tmp_path: Path) -> None:
    """A converted set mixes with an index of plain text of the same tokenizer; counts of labels are right."""
    convert(write_rows(tmp_path / "a.jsonl", rows(60)), tmp_path / "sft", validation=0)
    random = np.random.default_rng(1)
    plain = [[*random.integers(10, 900, 40).tolist(), END] for _ in range(40)]
    write_index(tmp_path / "text", plain, fingerprint=TOKENIZER.fingerprint, dtype=np.uint16)
    manifest = tmp_path / "replay.yaml"
    manifest.write_text(
        "corpora:\n  - {name: sft, prefix: sft/files, weight: 0.8}\n  - {name: text, prefix: text, weight: 0.2}\n"
    )
    mixture = Mixture(manifest, 64)
    numbers = range(50)
    batch = mixture.batch(numbers)
    assert mixture.count_labels(numbers) == int((batch.labels != -100).sum())
    shares = [[], []]  # type: list[list[float]]
    for number in numbers:
        sample = mixture.sample(number)
        shares[mixture.locate(number)[0]].append(float((sample.labels != -100).mean()))
    assert max(shares[0]) < 0.6 < min(shares[1]), "answers only, and all of the text"


def test_changed_files_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "a.jsonl", rows(30))
    fitting = Fitting(template_for(TOKENIZER), TOKENIZER)
    fit = fitting.fit

    def changing(conversation: Any) -> Any:
        write_rows(path, rows(31))
        return fit(conversation)

    monkeypatch.setattr(fitting, "fit", changing)
    with pytest.raises(DataError, match="set 'files': its files changed while they were read"):
        convert_sets(Request(sets_of([str(path)]), fitting, tmp_path / "sft"), lambda line: None)
    assert not (tmp_path / "sft").exists()


@pytest.mark.slow
@pytest.mark.skipif(not (ALPACA_ZH.exists() and QWEN_RANKS.exists()), reason="the sample data is not there")
def test_real_rows(tmp_path: Path) -> None:
    begin = time.monotonic()
    lines = convert(ALPACA_ZH, tmp_path / "sft", tokenizer=load_tokenizer(QWEN_RANKS), max_tokens=2048)
    print(f"{24_758 / (time.monotonic() - begin):.0f} rows/s")
    assert lines[0] == ("files: 24,750 conversations, 1,701,919 tokens, 1,115,890 of them trained (65.6%), longest 981")
    assert lines[1] == "  rejected: 7 empty answer, 1 empty prompt"
    mixture = Mixture(tmp_path / "sft" / "mixture.yaml", 2048)
    assert len(mixture.corpora[0].validation) == 246
    assert mixture.table(0).valid_labels.sum() + mixture.validation.valid_labels(0) > 1_100_000


def test_copies_differ_in_noise_and_are_on_one_side(tmp_path: Path) -> None:
    given = write_rows(
        tmp_path / "rows.jsonl", [row(f"请写一首关于春天的诗{'啊' * number}", "好") for number in range(60)]
    )
    noise = Noise(probability=0.5, drop=0.3, repeat=0.3)
    convert(given, tmp_path / "out", noise=noise, copies=3, validation=0.2)
    index = IndexedDataset(tmp_path / "out" / "files")
    texts = [text for text, _ in documents(tmp_path / "out" / "files")]
    hashes = index.document_hashes()
    assert len(texts) == 180
    assert [len(set(hashes[at : at + 3])) for at in range(0, 180, 3)] == [1] * 60
    assert sum(len(set(texts[at : at + 3])) > 1 for at in range(0, 180, 3)) > 40
    assert all(text.count("好<|im_end|>") == 1 for text in texts), "answers have no noise"
    assert index.metadata is not None
    assert (index.metadata.options.copies, index.metadata.options.noise) == (3, asdict(noise))
    convert(given, tmp_path / "again", noise=noise, copies=3, validation=0.2)
    assert (tmp_path / "again" / "files.bin").read_bytes() == (tmp_path / "out" / "files.bin").read_bytes()


def test_copies_without_noise_are_refused(tmp_path: Path) -> None:
    given = write_rows(tmp_path / "rows.jsonl", rows(3))
    code, _, err = command(given, "-o", tmp_path / "out", "--copies", 2)
    assert code == 2
    assert is_one_line_error(err, "--copies 2: all would be equal; give --noise")
    code, _, err = command(given, "-o", tmp_path / "out", "--noise-drop", 0.5)
    assert code == 2
    assert is_one_line_error(err, "--noise-drop: has no effect without --noise")
