"""`Tokenizer`, the class for every tokenizer file: fingerprint, control tokens, decoding, refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from byte_fallback import write_byte_fallback_json
from textdata import (
    CHATGLM_MODEL,
    is_one_line_error,
    json_encoders,
    json_lines,
    megazh,
    ranks_of,
    texts,
    tokenizer_path,
    write_ranks,
)
from tokenizers import Tokenizer as HuggingFaceTokenizer

from megazh.errors import DataError, MegazhError, UsageError
from megazh.tokenizer import Tokenizer, load_tokenizer, qwen
from megazh.tokenizer.encoders import FastokensEncoder, HuggingFaceEncoder, TokenizerFormat, encode_each
from megazh.tokenizer.tokenizer import RankKind, dtype_for

CONTROL = ("<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")


def settings() -> dict[str, Any]:
    return json.loads(tokenizer_path().read_text(encoding="utf-8"))


def variant(folder: Path, change: Callable[[dict[str, Any]], Any], name: str = "tokenizer.json") -> Path:
    """Write a copy of the small tokenizer after `change` has modified it."""
    changed = settings()
    change(changed)
    path = folder / name
    path.write_text(json.dumps(changed, ensure_ascii=False), encoding="utf-8")
    return path


def test_numbers_of_a_trained_tokenizer() -> None:
    tokenizer = load_tokenizer(tokenizer_path())
    assert (tokenizer.kind, tokenizer.vocab_size) == (TokenizerFormat.HUGGING_FACE, 1500)
    assert (tokenizer.eod, tokenizer.eod_id, tokenizer.pad_id) == ("<|endoftext|>", 1, 0)


def test_round_trip_of_normal_text() -> None:
    tokenizer = load_tokenizer(tokenizer_path())
    for text in ["今天 hello\r\n\n 漢字", "<|endoftext|> is text", "👩‍👩‍👧 𠮷", "\x00\x7f", ""]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([*tokenizer.encode("end"), 1, 0]) == "end<|endoftext|><|pad|>"


@pytest.mark.parametrize("literal", [*CONTROL, "a<|endoftext|>", "<|endoftext|><|endoftext|>", " <|im_end|>\n"])
def test_literal_control_tokens_stay_text_in_every_encoder(literal: str) -> None:
    written = tokenizer_path().read_text(encoding="utf-8")
    tokenizer = load_tokenizer(tokenizer_path())
    for encoder in json_encoders(written):
        (ids,) = encode_each(encoder, [literal])
        assert min(ids) > 3, encoder.name
        assert tokenizer.decode(ids) == literal


def test_offsets_tell_documents_apart() -> None:
    written = tokenizer_path().read_text(encoding="utf-8")
    strings = ["", "a", "", "bc 今天", ""]
    for encoder in json_encoders(written):
        ids, offsets = encoder.encode_batch(strings)
        assert (ids.dtype, offsets.dtype, len(offsets), offsets[0], offsets[-1]) == ("uint32", "int64", 6, 0, len(ids))
        assert encode_each(encoder, strings) == [encode_each(encoder, [text])[0] for text in strings]
        assert encode_each(encoder, [""]) == [[]]


def test_padding_and_truncation_settings_change_no_id(tmp_path: Path) -> None:
    def pad(changed: dict[str, Any]) -> None:
        changed["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        changed["padding"] = {
            "strategy": {"Fixed": 64},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<|pad|>",
        }

    path = variant(tmp_path, pad)
    plain = load_tokenizer(tokenizer_path())
    assert load_tokenizer(path).fingerprint == plain.fingerprint
    text = texts(1, 3)[0] * 5
    for encoder in (
        FastokensEncoder(path.read_text(), lambda: HuggingFaceEncoder(path.read_text())),
        HuggingFaceEncoder(path.read_text()),
    ):
        assert encode_each(encoder, [text, "a"]) == [plain.encode(text), plain.encode("a")]


def test_post_processor_adds_nothing(tmp_path: Path) -> None:
    template = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [1], "tokens": ["<|endoftext|>"]}},
    }
    path = variant(tmp_path, lambda changed: changed.update(post_processor=template))
    plain = load_tokenizer(tokenizer_path()).encode("今天 hello")
    for encoder in (
        FastokensEncoder(path.read_text(), lambda: HuggingFaceEncoder(path.read_text())),
        HuggingFaceEncoder(path.read_text()),
    ):
        assert encode_each(encoder, ["今天 hello"]) == [plain]


def test_fingerprint_of_a_rank_file_is_that_of_its_tokenizer_json(tmp_path: Path) -> None:
    ranks = write_ranks(tmp_path / "small.tiktoken", ranks_of(tokenizer_path()))
    written = tmp_path / "tokenizer.json"
    written.write_text(qwen.tokenizer_json(ranks), encoding="utf-8")
    expected = load_tokenizer(ranks, ranks=RankKind.QWEN).fingerprint
    assert load_tokenizer(written).fingerprint == expected
    saved = tmp_path / "saved.json"
    HuggingFaceTokenizer.from_file(str(written)).save(str(saved))
    assert saved.read_text(encoding="utf-8") != written.read_text(encoding="utf-8")
    assert load_tokenizer(saved).fingerprint == expected


def swap_merges(changed: dict[str, Any]) -> None:
    merges = changed["model"]["merges"]
    merges[10], merges[11] = merges[11], merges[10]


def other_regex(changed: dict[str, Any]) -> None:
    changed["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}{1,3}|\s+"


def rename_control_token(changed: dict[str, Any]) -> None:
    changed["added_tokens"][2]["content"] = "<|other|>"
    changed["model"]["vocab"]["<|other|>"] = changed["model"]["vocab"].pop("<|im_start|>")


@pytest.mark.parametrize(
    "change",
    [
        swap_merges,
        other_regex,
        lambda changed: changed.update(normalizer=None),
        lambda changed: changed.update(normalizer={"type": "NFKC"}),
        lambda changed: changed["model"].update(ignore_merges=True),
        rename_control_token,
        lambda changed: changed["model"]["merges"].pop(),
    ],
    ids=["merges", "regex", "no NFC", "NFKC", "ignore_merges", "control token", "merge less"],
)
def test_fingerprint_changes_with_whatever_decides_ids(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    assert load_tokenizer(variant(tmp_path, change)).fingerprint != load_tokenizer(tokenizer_path()).fingerprint


def test_fingerprint_changes_with_the_end_token() -> None:
    assert load_tokenizer(tokenizer_path(), "<|im_end|>").fingerprint != load_tokenizer(tokenizer_path()).fingerprint


def test_merges_written_as_strings_or_pairs_are_the_same(tmp_path: Path) -> None:
    def as_strings(changed: dict[str, Any]) -> None:
        changed["model"]["merges"] = [
            pair if isinstance(pair, str) else " ".join(pair) for pair in changed["model"]["merges"]
        ]

    assert load_tokenizer(variant(tmp_path, as_strings)).fingerprint == load_tokenizer(tokenizer_path()).fingerprint


def without_end(changed: dict[str, Any]) -> None:
    changed["added_tokens"][1]["content"] = "<|stop|>"
    changed["model"]["vocab"]["<|stop|>"] = changed["model"]["vocab"].pop("<|endoftext|>", 1)


@pytest.mark.parametrize("value", ["<|stop|>", {"content": "<|stop|>", "lstrip": False}])
def test_end_token_from_the_config_beside_it(tmp_path: Path, value: Any) -> None:
    path = variant(tmp_path, without_end)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": value}), encoding="utf-8")
    assert (load_tokenizer(path).eod, load_tokenizer(path).eod_id) == ("<|stop|>", 1)
    assert load_tokenizer(tmp_path).eod == "<|stop|>"


@pytest.mark.parametrize("config", [None, "{", "[]", '{"eos_token": null}', '{"eos_token": "<|nowhere|>"}'])
def test_no_end_token_is_refused_with_the_choices(tmp_path: Path, config: str | None) -> None:
    path = variant(tmp_path, without_end)
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(config, encoding="utf-8")
    with pytest.raises(UsageError, match=r"give --eod TOKEN; control tokens: <\|pad\|>, <\|stop\|>"):
        load_tokenizer(path)
    assert load_tokenizer(path, "<|im_end|>").eod_id == 3


def test_unknown_end_token_is_refused() -> None:
    with pytest.raises(UsageError, match=r"has no token '<\|nowhere\|>'.*--eod"):
        load_tokenizer(tokenizer_path(), "<|nowhere|>")


def test_folder_holds_one_of_the_kinds(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no tokenizer\.json, \*\.tiktoken or \*\.model"):
        load_tokenizer(tmp_path)
    write_ranks(tmp_path / "qwen.tiktoken", ranks_of(tokenizer_path()))
    assert load_tokenizer(tmp_path, ranks=RankKind.QWEN).kind is TokenizerFormat.QWEN_RANKS
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_path().read_bytes())
    assert load_tokenizer(tmp_path).kind is TokenizerFormat.HUGGING_FACE
    assert load_tokenizer(tmp_path).path == tmp_path / "tokenizer.json"


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("nowhere.json", None, UsageError),
        ("vocab.txt", b"a\nb\n", UsageError),
        ("a.json", b"", DataError),
        ("a.json", b"[]", DataError),
        ("a.json", b'{"model": {}}', DataError),
        ("a.json", b'{"model": {"vocab": {}}}', DataError),
        ("a.json", b'{"model": {"vocab": [1, 2]}}', DataError),
        ("a.json", b'{"added_tokens": [{}], "model": {"vocab": {"a": 0}}}', DataError),
        ("a.json", b"\xff\xfe", DataError),
        ("a.model", b"garbage", DataError),
        ("a.model", b"", DataError),
        ("a.tiktoken", b"garbage", DataError),
    ],
)
def test_what_is_no_tokenizer_is_refused(
    tmp_path: Path, name: str, content: bytes | None, error: type[MegazhError]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=name) as caught:
        load_tokenizer(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_tokenizer_that_the_library_cannot_read_is_refused_in_one_line(tmp_path: Path) -> None:
    path = variant(tmp_path, lambda changed: changed["model"].update(type="Unheard"))
    (tmp_path / "a.jsonl").write_bytes(json_lines(["x"]))
    code, _, err = megazh(
        "index", "build", "--input", tmp_path / "a.jsonl", "--tokenizer", path, "--output", tmp_path / "x"
    )
    assert code == 3, err
    assert err.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err
    code, _, err = megazh("tokenizer", "show", path, "--text", "x")
    assert code == 3, err
    assert is_one_line_error(err, path)


def test_front_tokens_are_for_sentencepiece_alone() -> None:
    with pytest.raises(UsageError, match="--front-tokens is for SentencePiece"):
        load_tokenizer(tokenizer_path(), front_tokens=True)


@pytest.mark.parametrize(
    ("vocabulary", "dtype"), [(1, "uint16"), (65_499, "uint16"), (65_500, "int32"), (151_646, "int32")]
)
def test_dtype_is_megatrons_choice(vocabulary: int, dtype: str) -> None:
    assert dtype_for(vocabulary).name == dtype


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text.txt").write_text("\n".join(text.replace("\n", " ") for text in texts(400)), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "small"),
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder / "small.model"


def test_sentencepiece_as_it_is(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.eod_id, tokenizer.pad_id) == (500, "</s>", 2, None)
    assert tokenizer.encode("今天 hello") == processor.encode("今天 hello")


def test_sentencepiece_with_front_tokens(model: Path) -> None:
    plain = load_tokenizer(model)
    tokenizer = load_tokenizer(model, front_tokens=True)
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.eod_id, tokenizer.pad_id) == (504, "<eos>", 2, 0)
    assert [tokenizer.piece(number) for number in range(5)] == ["<pad>", "<bos>", "<eos>", "<unk>", "<unk>"]
    assert tokenizer.encode("今天 hello") == [number + 4 for number in plain.encode("今天 hello")]
    assert tokenizer.fingerprint != plain.fingerprint
    assert tokenizer.encode("") == []


@pytest.mark.parametrize("front_tokens", [False, True])
def test_sentencepiece_round_trip(model: Path, front_tokens: bool) -> None:
    tokenizer = load_tokenizer(model, front_tokens=front_tokens)
    for text in [*texts(20, 8), "</s>", "a</s>b<s><unk><pad>", "龘𪚥", "", "two  spaces"]:
        ids = tokenizer.encode(text)
        assert tokenizer.eod_id not in ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*tokenizer.encode("end"), tokenizer.eod_id]) == "end" + tokenizer.eod


def test_sentencepiece_end_token_of_ones_own(model: Path) -> None:
    assert load_tokenizer(model, "<s>").eod_id == 1
    assert load_tokenizer(model, "<s>", front_tokens=True).eod_id == 5
    assert load_tokenizer(model, "<bos>", front_tokens=True).eod_id == 1
    with pytest.raises(UsageError, match="has no piece 'nowhere'"):
        load_tokenizer(model, "nowhere")


def test_sentencepiece_cut_off_is_refused(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.model"
    path.write_bytes(model.read_bytes()[:-1000])
    with pytest.raises(DataError, match=r"cut\.model: not a SentencePiece model"):
        load_tokenizer(path)


@pytest.mark.skipif(not CHATGLM_MODEL.exists(), reason="ChatGLM3's model is not beside the project")
@pytest.mark.parametrize(("front_tokens", "size"), [(False, 64_789), (True, 64_793)])
def test_chatglm3(front_tokens: bool, size: int) -> None:
    tokenizer = load_tokenizer(CHATGLM_MODEL, front_tokens=front_tokens)
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (size, 2)
    assert dtype_for(size).name == "uint16"
    for text in ["今天天气不错", "hello </s> world", "第一行\n第二行", "𠮷👍"]:
        ids = tokenizer.encode(text)
        assert tokenizer.eod_id not in ids
        assert tokenizer.decode(ids) == text


def show(tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.piece(number) for number in range(tokenizer.vocab_size)]


def test_pieces_are_readable_and_distinct(model: Path) -> None:
    for tokenizer in (load_tokenizer(tokenizer_path()), load_tokenizer(model)):
        pieces = show(tokenizer)
        assert not any(character in "".join(pieces) for character in "\n\r\x00\x1b")
        assert len(set(pieces)) > 0.99 * len(pieces)
    assert "no token" in load_tokenizer(tokenizer_path()).piece(1500)
    assert "no token" in load_tokenizer(model).piece(500)


def test_show_command_counts_bytes_a_token(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "今天 hello 今天".encode())
    code, out, err = megazh("tokenizer", "show", tokenizer_path(), "--file", path, "--pieces", 3)
    assert (code, err) == (0, "")
    ids = load_tokenizer(tokenizer_path()).encode("今天 hello 今天")
    assert f"19 bytes, 11 characters, {len(ids)} tokens" in out
    assert f"{19 / len(ids):.3f} bytes" in out
    assert "1,500" in out


def test_bytes_of_tokens_make_up_the_text(model: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_path())
    for text in [*texts(40, 11), "\x00\x7f", "👩‍👩‍👧 𠮷 <|endoftext|>"]:
        ids = tokenizer.encode(text)
        assert b"".join(tokenizer.token_bytes(number) for number in ids) == tokenizer.decode(ids).encode()
    for front_tokens in (False, True):
        tokenizer = load_tokenizer(model, front_tokens=front_tokens)
        for text in [*texts(40, 11), "龘𪚥 two  spaces"]:
            joined = b"".join(tokenizer.token_bytes(number) for number in tokenizer.encode(text))
            assert joined == b" " + text.encode(), "SentencePiece adds a space at the beginning of a text"


def test_bytes_of_tokens_with_byte_fallback(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_byte_fallback_json(tmp_path / "tokenizer.json"))
    assert tokenizer.token_bytes(3 + 0xE4) == b"\xe4"
    assert [tokenizer.token_bytes(number) for number in (260, 261, 266)] == [" 今天".encode(), "天".encode(), b"  "]


def test_every_byte_has_a_token(model: Path) -> None:
    for tokenizer in (load_tokenizer(tokenizer_path()), load_tokenizer(model)):
        found = {tokenizer.token_bytes(number) for number in range(tokenizer.vocab_size)}
        assert found >= {bytes([byte]) for byte in range(256)}


def test_control_tokens_and_unknown_ids_have_no_bytes(model: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_path())
    assert [tokenizer.token_bytes(number) for number in (0, 1, 2, 3, 1500, 9999)] == [b""] * 6
    assert tokenizer.token_bytes(4) != b""
    for front_tokens, control in ((False, (1, 2)), (True, (0, 1, 2, 3, 5, 6))):
        tokenizer = load_tokenizer(model, front_tokens=front_tokens)
        assert [tokenizer.token_bytes(number) for number in (*control, tokenizer.vocab_size)] == [b""] * (
            len(control) + 1
        )
