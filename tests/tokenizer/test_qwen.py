"""Conversion of a rank file to an equivalent `tokenizer.json`: every encoder gives the same ids on any text."""

import base64
import json
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import tiktoken
from textdata import QWEN_RANKS, json_encoders, ranks_of, tokenizer_path, write_ranks

from megazh.errors import DataError
from megazh.tokenizer import load_tokenizer, qwen
from megazh.tokenizer.encoders import (
    PROBES,
    Encoder,
    EncoderSource,
    HuggingFaceEncoder,
    TiktokenEncoder,
    TokenizerFormat,
    encode_each,
)
from megazh.tokenizer.tokenizer import RankKind

needs_qwen = pytest.mark.skipif(not QWEN_RANKS.exists(), reason="Qwen's rank file is not beside the project")
REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_SPANS = [
    (0x20, 0x7E),
    (0x00, 0x20),
    (0x7F, 0xA0),
    (0xA1, 0x17F),
    (0x300, 0x36F),
    (0x370, 0x3FF),
    (0x400, 0x4FF),
    (0x590, 0x6FF),
    (0x900, 0x97F),
    (0xE00, 0xE7F),
    (0x1100, 0x11FF),
    (0x1E00, 0x1EFF),
    (0x2000, 0x206F),
    (0x2100, 0x218F),
    (0x3000, 0x303F),
    (0x3040, 0x30FF),
    (0x4E00, 0x5200),
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3),
    (0xF900, 0xFAFF),
    (0xFB00, 0xFB06),
    (0xFE00, 0xFE0F),
    (0xFF00, 0xFFEF),
    (0x1D400, 0x1D7FF),
    (0x1F1E6, 0x1F1FF),
    (0x1F300, 0x1FAFF),
    (0x20000, 0x2A6DF),
    (0x2F800, 0x2FA1F),
    (0xE0000, 0xE01EF),
    (0x10FF00, 0x10FFFF),
]
_WHOLE = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|pad|>",
    "</s>",
    "👩‍👩‍👧‍👦",
    "e\u0301\u0327",
    "\u1112\u1161\u11ab",
    "\u212b",
    "'LL",
    "'ſ",
    "İ's",
    "\r\n\r\n",
    "\u00a0 \u00a0",
    "\u2028",
    "１２３",
    "²³½",
    "今天天气",
    "hello world",
    "\ufeff",
    "q\u0307\u0323",
    "\u0f73\u0f75",
]


def odd_strings(count: int, seed: int) -> list[str]:
    """`count` strings of characters from one to four Unicode ranges; then `_WHOLE`, `PROBES` and long runs."""
    draw = random.Random(seed)

    def character(span: tuple[int, int]) -> str:
        return chr(draw.randint(*span))

    found = []
    for _ in range(count):
        spans = draw.sample(_SPANS, draw.randint(1, 4))
        parts = []
        for _ in range(draw.randint(1, 14)):
            choice = draw.random()
            if choice < 0.12:
                parts.append(draw.choice(_WHOLE))
            elif choice < 0.2:
                parts.append(character(draw.choice(spans)) * draw.randint(2, 40))
            else:
                parts += [character(draw.choice(spans)) for _ in range(draw.randint(1, 6))]
        found.append("".join(parts))
    runs = [character(span) * length for span in _SPANS for length in (300, 5000)]
    return [*found, *_WHOLE, *PROBES, *runs]


def by_definition(ranks: dict[bytes, int]) -> Callable[[str], list[int]]:
    """Encoder by definition: tiktoken's `encode_ordinary` on the NFC form of a text."""
    encoding = tiktoken.Encoding("definition", pat_str=REGEX, mergeable_ranks=ranks, special_tokens={})
    return lambda text: encoding.encode_ordinary(unicodedata.normalize("NFC", text))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ranks(tmp_path_factory.mktemp("ranks") / "small.tiktoken", ranks_of(tokenizer_path()))


def assert_same_ids(encoder: Encoder, strings: list[str], expected: list[list[int]]) -> None:
    wrong = [
        (text[:60], ids[:20], right[:20])
        for text, ids, right in zip(strings, encode_each(encoder, strings), expected, strict=True)
        if ids != right
    ]
    assert not wrong, f"{encoder.name}: {len(wrong)} of {len(strings)} differ, first: {wrong[0]}"


def test_every_encoder_gives_tiktokens_ids_on_20_000_odd_strings(small: Path) -> None:
    ranks = qwen.read_ranks(small)
    strings = odd_strings(20_000, seed=1)
    definition = by_definition(ranks)
    expected = [definition(text) for text in strings]
    text = qwen.tokenizer_json(small)
    for encoder in (
        TiktokenEncoder(ranks),
        json_encoders(text)[0],
        HuggingFaceEncoder(text),
    ):
        assert_same_ids(encoder, strings, expected)


@needs_qwen
@pytest.mark.slow
def test_every_encoder_gives_qwens_ids_on_20_000_odd_strings() -> None:
    ranks = qwen.read_ranks(QWEN_RANKS)
    strings = odd_strings(20_000, seed=2)
    definition = by_definition(ranks)
    expected = [definition(text) for text in strings]
    text = qwen.tokenizer_json(QWEN_RANKS)
    source = EncoderSource(TokenizerFormat.QWEN_RANKS, QWEN_RANKS)
    fast = source.fast()
    assert fast is not None
    assert (source.reference().name, fast.name) == ("tiktoken", "fastokens")
    assert_same_ids(source.reference(), strings, expected)
    assert_same_ids(fast, strings, expected)
    assert_same_ids(HuggingFaceEncoder(text), strings[-3000:], expected[-3000:])


def test_long_s_after_an_apostrophe_is_a_contraction_to_every_encoder() -> None:
    """Qwen's regex ignores case in contractions, so there `s` also matches U+017F."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    for token in ("ſ", "ſo"):
        ranks[token.encode()] = len(ranks)
    assert by_definition(ranks)("'ſo") == [39, 256, 111]
    text = json.dumps(qwen.fast_tokenizer(ranks))
    for encoder in (
        TiktokenEncoder(ranks),
        HuggingFaceEncoder(text),
        json_encoders(text)[0],
    ):
        assert encode_each(encoder, ["'ſo"]) == [[39, 256, 111]], encoder.name


@needs_qwen
def test_qwens_numbers() -> None:
    tokenizer = load_tokenizer(QWEN_RANKS)
    assert tokenizer.vocab_size == 151_646
    assert (tokenizer.eod, tokenizer.eod_id) == ("<|endoftext|>", 151_643)
    settings = json.loads(qwen.tokenizer_json(QWEN_RANKS))
    assert [(token["content"], token["id"]) for token in settings["added_tokens"]] == [
        ("<|endoftext|>", 151_643),
        ("<|im_start|>", 151_644),
        ("<|im_end|>", 151_645),
    ]
    assert len(settings["model"]["merges"]) == 151_387
    assert tokenizer.encode("<|endoftext|>") == [27, 91, 8691, 723, 427, 91, 29]
    assert tokenizer.decode(tokenizer.encode("今天天气不错 👍🏽")) == "今天天气不错 👍🏽"


@needs_qwen
def test_qwens_fingerprint_is_that_of_its_tokenizer_json(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(qwen.tokenizer_json(QWEN_RANKS), encoding="utf-8")
    assert load_tokenizer(path).fingerprint == load_tokenizer(QWEN_RANKS).fingerprint


def test_control_tokens_follow_the_ranks_and_never_come_from_text(small: Path) -> None:
    ranks = qwen.read_ranks(small)
    tokenizer = load_tokenizer(small, ranks=RankKind.QWEN)
    assert tokenizer.vocab_size == len(ranks) + 3
    assert (tokenizer.eod, tokenizer.eod_id) == ("<|endoftext|>", len(ranks))
    text = qwen.tokenizer_json(small)
    literal = ["<|endoftext|>", "a<|im_start|>b<|im_end|>\n", " <|endoftext|> " * 50]
    for encoder in (
        TiktokenEncoder(ranks),
        json_encoders(text)[0],
        HuggingFaceEncoder(text),
    ):
        for written, ids in zip(literal, encode_each(encoder, literal), strict=True):
            assert max(ids) < len(ranks), encoder.name
            assert tokenizer.decode(ids) == written


def test_every_merge_is_found(small: Path) -> None:
    ranks = qwen.read_ranks(small)
    settings = qwen.fast_tokenizer(ranks)
    assert len(settings["model"]["merges"]) == len(ranks) - 256
    original = json.loads(tokenizer_path().read_text(encoding="utf-8"))["model"]["merges"]
    assert settings["model"]["merges"] == [pair if isinstance(pair, list) else pair.split(" ") for pair in original]


def test_text_is_normalised_first(small: Path) -> None:
    tokenizer = load_tokenizer(small, ranks=RankKind.QWEN)
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")
    assert tokenizer.encode("\u212b") == tokenizer.encode("\u00c5")


def test_regex_is_qwens() -> None:
    assert qwen.QWEN_REGEX == REGEX


def test_empty_lines_and_line_ends_do_not_matter(small: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.tiktoken"
    other.write_bytes(small.read_bytes().replace(b"\n", b"\r\n") + b"\n\n")
    assert qwen.read_ranks(other) == qwen.read_ranks(small)


@pytest.mark.parametrize(
    ("line", "broken"),
    [
        (3, b"not base64! 2"),
        (5, b"QQ=="),
        (10, b"QQ== x"),
        (12, b"QQ== 5 6"),
        (300, b'{"json": 1}'),
    ],
)
def test_damaged_line_is_refused_by_number(small: Path, tmp_path: Path, line: int, broken: bytes) -> None:
    lines = small.read_bytes().splitlines()
    lines[line - 1] = broken
    path = tmp_path / "damaged.tiktoken"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match=rf"damaged\.tiktoken:{line}: expected 'base64 rank'") as caught:
        qwen.read_ranks(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["gap", "twice", "no byte", "half a line", "empty", "binary", "other text"])
def test_rank_file_that_is_not_whole_is_refused(small: Path, tmp_path: Path, damage: str) -> None:
    lines = small.read_bytes().splitlines(keepends=True)
    ranks = qwen.read_ranks(small)
    contents = {
        "gap": b"".join(lines[:400] + lines[401:]),
        "twice": b"".join([*lines, lines[7].split()[0], b" %d\n" % len(lines)]),
        "no byte": b"".join(
            base64.b64encode(token) + b" %d\n" % rank
            for rank, token in enumerate(token for token in ranks if token != b"\x00")
        ),
        "half a line": b"".join(lines)[: -len(lines[-1]) // 2],
        "empty": b"",
        "binary": bytes(range(256)) * 4,
        "other text": b"<!DOCTYPE html>\n<html></html>\n",
    }
    path = tmp_path / "damaged.tiktoken"
    path.write_bytes(contents[damage])
    with pytest.raises(DataError, match=r"damaged\.tiktoken") as caught:
        qwen.read_ranks(path)
    assert "\n" not in str(caught.value)


def test_token_that_no_merge_makes_is_refused_or_encoded_as_tiktoken_does(small: Path, tmp_path: Path) -> None:
    ranks = qwen.read_ranks(small)
    ranks["鑫龘犇".encode()] = len(ranks)
    path = write_ranks(tmp_path / "odd.tiktoken", ranks)
    try:
        text = qwen.tokenizer_json(path)
    except DataError:
        return
    assert encode_each(json_encoders(text)[0], ["鑫龘犇"]) == [by_definition(ranks)("鑫龘犇")]


def test_conversion_is_cached_and_a_damaged_cache_is_made_anew(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGAZH_CACHE", str(tmp_path / "cache"))
    text = qwen.tokenizer_json(small)
    (cached,) = (tmp_path / "cache" / "tokenizers").glob("*.json")
    with monkeypatch.context() as patch:
        patch.setattr(qwen, "fast_tokenizer", lambda _: pytest.fail("was not cached"))
        assert qwen.tokenizer_json(small) == text
    cached.write_bytes(cached.read_bytes()[:-100])
    assert qwen.tokenizer_json(small) == text
    assert text.encode() in cached.read_bytes()


def test_unwritable_cache_is_no_error(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "blocked").write_bytes(b"")
    monkeypatch.setenv("MEGAZH_CACHE", str(tmp_path / "blocked" / "below"))
    assert json.loads(qwen.tokenizer_json(small))["normalizer"] == {"type": "NFC"}
