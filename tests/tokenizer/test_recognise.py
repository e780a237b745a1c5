"""Files that are given as tokenizers and are none, or not the ones that they are taken for: each is named."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import tokenizer_kinds as kinds
from textdata import QWEN_RANKS, gz, is_one_line_error, megazh, ranks_of, tokenizer_path, write_ranks, zst

from megazh.errors import DataError, UsageError
from megazh.tokenizer import load_tokenizer, qwen
from megazh.tokenizer.encoders import TokenizerFormat
from megazh.tokenizer.tokenizer import RankKind

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 7031645\n"
SAFETENSORS = (
    (64).to_bytes(8, "little") + b'{"weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}     ' + b"\0" * 4
)


def zipped(folder: Path) -> bytes:
    with zipfile.ZipFile(folder / "some.zip", "w") as archive:
        archive.write(tokenizer_path(), "tokenizer.json")
    return (folder / "some.zip").read_bytes()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "qwen.tiktoken"])
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (LFS, r"is a Git LFS pointer.*git lfs pull"),
        (SAFETENSORS, r"is a safetensors file \(weights\)"),
        (b"<!doctype html>\n<html></html>", "is a web page"),
        (b"\n <html lang='en'>", "is a web page"),
        (b'<?xml version="1.0"?><Error/>', "is a web page"),
        (b"", "is empty"),
        (b"\x80\x04\x95", "is a Python pickle, which is never read"),
        (b"GGUF\x03\0\0\0", "is a GGUF model"),
        ("{}".encode("utf-16"), "is UTF-16 text"),
        (gz(b"{}"), "is gzip-compressed"),
        (zst(b"{}"), "is zstd-compressed"),
    ],
)
def test_what_is_something_else_is_named(name: str, content: bytes, what: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(DataError, match=what) as caught:
            load_tokenizer(path)
        assert "\n" not in str(caught.value)
        assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "tok.zip"])
def test_a_zip_archive_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(zipped(tmp_path))
    with pytest.raises(DataError, match="is a zip archive"):
        load_tokenizer(tmp_path / name)


def test_a_byte_order_mark_is_named_with_the_command_that_removes_it(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"\xef\xbb\xbf" + tokenizer_path().read_bytes())
    code, _, err = megazh("tokenizer", "show", path, "--text", "x")
    assert code == 3
    assert is_one_line_error(err, path, "begins with a byte order mark (BOM)", "sed -i")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (
            {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "x"},
            "is a tokenizer_config.json, which has no vocabulary",
        ),
        ({"model_type": "qwen2", "vocab_size": 5}, r"is the config\.json of a model"),
        ({"a": 0, "b": 1}, r"is a vocab\.json \(words and ids\)"),
        (["a", "b"], r"not a Hugging Face tokenizer\.json"),
        ({"model": None}, r"not a Hugging Face tokenizer\.json"),
    ],
)
def test_other_json_files_of_a_model_are_named(content: Any, what: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match=what):
        load_tokenizer(path)


def test_a_tokenizer_json_that_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(tokenizer_path().read_bytes()[:-500])
    with pytest.raises(DataError, match="truncated or damaged"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("names", "what"),
    [
        ([], "it is empty"),
        (["vocab.json", "merges.txt"], r"vocab\.json and merges\.txt are a slow tokenizer.*save_pretrained"),
        (["vocab.txt"], r"vocab\.txt is a slow tokenizer"),
        (["tokenizer_config.json"], r"tokenizer_config\.json only describes a tokenizer: download tokenizer\.json"),
        (["model.safetensors", "README.md"], r"it holds README\.md, model\.safetensors"),
    ],
)
def test_a_folder_without_a_tokenizer_says_what_it_holds(names: list[str], what: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(UsageError, match=rf"holds no tokenizer\.json, \*\.tiktoken or \*\.model; {what}"):
        load_tokenizer(tmp_path)


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"/dev/null: not a regular file"):
        load_tokenizer("/dev/null")
    with pytest.raises(UsageError, match="no such file"):
        load_tokenizer(tmp_path / "nowhere" / "tokenizer.json")


# Rank files


def many_ranks(path: Path, count: int) -> Path:
    """A rank file with `count` ranks: the 256 bytes, then made-up tokens."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    for number in range(256, count):
        ranks[b"t%d" % number] = number
    return write_ranks(path, ranks)


@pytest.mark.parametrize(
    ("name", "count", "model"),
    [
        ("tokenizer.model", 128_000, "Llama 3"),
        ("cl100k_base.tiktoken", 100_256, r"cl100k_base \(GPT-4\)"),
        ("o200k_base.tiktoken", 199_998, r"o200k_base \(GPT-4o\)"),
    ],
)
def test_another_models_rank_file_is_named(name: str, count: int, model: str, tmp_path: Path) -> None:
    path = many_ranks(tmp_path / name, count)
    with pytest.raises(DataError, match=rf"a rank file with as many ranks \({count:,}\) as {model}.*use that model's"):
        load_tokenizer(path)


def test_a_rank_file_of_unknown_kind_is_refused_until_its_kind_is_named(tmp_path: Path) -> None:
    path = kinds.small_ranks(tmp_path)
    count = len(ranks_of(tokenizer_path()))
    code, _, err = megazh("tokenizer", "show", path)
    assert code == 3
    assert is_one_line_error(err, path, f"{count:,} ranks (Qwen's has 151,643: cut off?)", "--tokenizer-kind qwen")
    code, out, err = megazh("tokenizer", "show", path, "--tokenizer-kind", "qwen")
    assert (code, err) == (0, "")
    assert f"end          {count} <|endoftext|>" in out
    model = path.rename(tmp_path / "tokenizer.model")  # its format is that of its content
    assert load_tokenizer(model, ranks=RankKind.QWEN).kind is TokenizerFormat.QWEN_RANKS


def test_the_kind_is_for_rank_files_alone() -> None:
    with pytest.raises(UsageError, match=r"--tokenizer-kind qwen is for rank files"):
        load_tokenizer(tokenizer_path(), ranks=RankKind.QWEN)


@pytest.mark.skipif(not QWEN_RANKS.exists(), reason="Qwen's rank file is not beside the project")
def test_qwens_own_file_needs_no_kind_and_any_other_does(tmp_path: Path) -> None:
    qwen.check_qwens(QWEN_RANKS)
    lines = QWEN_RANKS.read_bytes().splitlines(keepends=True)
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(b"\r\n".join(line.strip() for line in lines) + b"\r\n\r\n")
    qwen.check_qwens(path)  # other line ends are no other ranks
    path.write_bytes(b"".join(lines[:150_000]))
    with pytest.raises(DataError, match=r"150,000 ranks \(Qwen's has 151,643: cut off\?\)"):
        qwen.check_qwens(path)
    first, last = lines[-2].split()[0], lines[-1].split()[0]
    path.write_bytes(b"".join([*lines[:-2], last + b" 151641\n", first + b" 151642\n"]))
    with pytest.raises(DataError, match=r"151,643 ranks \(as many as Qwen's, but with other content\)"):
        qwen.check_qwens(path)


# Ids


def refused(path: Path, *parts: object) -> None:
    """Check that `tokenizer show` refuses the file in one line with all `parts`."""
    code, _, err = megazh("tokenizer", "show", path)
    assert code == 3, err
    assert is_one_line_error(err, path, *parts)


def test_added_tokens_behind_a_gap_are_refused_with_both_numbers(tmp_path: Path) -> None:
    """The library numbers them from the end of the vocabulary on, whatever the file says."""

    def move(settings: dict[str, Any]) -> None:
        settings["added_tokens"].append(kinds.added(1600, "<|new|>"))

    refused(kinds.byte_level(tmp_path, move), "'<|new|>' has id 1600 in the file, but 1500 in the library `tokenizers`")


@pytest.mark.parametrize("number", [2**31, 2**32, -1, 1.5, "7", None])
def test_ids_that_cannot_be_stored_are_refused(number: Any, tmp_path: Path) -> None:
    def change(settings: dict[str, Any]) -> None:
        settings["model"]["vocab"]["今天天气不错"] = number

    with pytest.raises(DataError, match=r"'今天天气不错': expected an id from 0 to 2147483647, found"):
        load_tokenizer(kinds.byte_level(tmp_path, change))


def test_two_tokens_of_one_id_and_two_ids_of_one_token_are_refused(tmp_path: Path) -> None:
    def twice(settings: dict[str, Any]) -> None:
        settings["model"]["vocab"]["<<<"] = 77

    with pytest.raises(DataError, match=r"id 77 has two tokens, .* and '<<<'"):
        load_tokenizer(kinds.byte_level(tmp_path, twice))

    def other(settings: dict[str, Any]) -> None:
        settings["added_tokens"].append(kinds.added(1500, "<|im_end|>"))

    with pytest.raises(DataError, match=r"'<\|im_end\|>' has two ids, 3 and 1500"):
        load_tokenizer(kinds.byte_level(tmp_path, other))


def test_an_added_token_with_the_id_of_another_word(tmp_path: Path) -> None:
    def rename(settings: dict[str, Any]) -> None:
        settings["added_tokens"][1]["content"] = "<|stop|>"  # the vocabulary still has <|endoftext|> as id 1

    with pytest.raises(DataError, match=r"id 1 has two tokens, '<\|endoftext\|>' and '<\|stop\|>'"):
        load_tokenizer(kinds.byte_level(tmp_path, rename))


def test_tokenizer_config_with_other_ids_is_refused(tmp_path: Path) -> None:
    path = kinds.byte_level(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    listed = {"1": {"content": "<|endoftext|>"}, "3": {"content": "<|im_end|>"}}
    config.write_text(json.dumps({"added_tokens_decoder": listed}), encoding="utf-8")
    load_tokenizer(path).check()
    listed["1500"] = listed.pop("3")
    config.write_text(json.dumps({"added_tokens_decoder": listed}), encoding="utf-8")
    refused(path, "'<|im_end|>' has id 3, but tokenizer_config.json beside it says 1500")


def test_holes_among_the_ids_are_counted(tmp_path: Path) -> None:
    def hole(settings: dict[str, Any]) -> None:
        settings["model"]["vocab"]["今天天气不错"] = 1600

    code, out, err = megazh("tokenizer", "show", kinds.byte_level(tmp_path, hole))
    assert (code, err) == (0, "")
    assert "vocabulary   1,601 ids, 100 of them without a token" in out
