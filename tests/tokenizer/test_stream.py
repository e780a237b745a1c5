"""Streamed text: only whole characters, joined equal to the text of all ids, at a bounded cost per token."""

import random
from collections.abc import Sequence

import pytest
import sentencepiece
from byte_fallback import PIECES, write_byte_fallback_json
from textdata import texts, tokenizer_path

from megazh.tokenizer import Tokenizer, load_tokenizer
from megazh.tokenizer.stream import TextStream, decode_whole

BROKEN = "\ufffd"


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return load_tokenizer(tokenizer_path())


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """SentencePiece model that begins a text with a space mark and writes rare characters as bytes."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text.txt").write_text("\n".join(text.replace("\n", " ") for text in texts(300)), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "small"),
        vocab_size=450,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return load_tokenizer(folder / "small.model")


@pytest.fixture(scope="module")
def fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_byte_fallback_json(tmp_path_factory.mktemp("fallback") / "tokenizer.json"))


def streamed(tokenizer: Tokenizer, ids: Sequence[int], before: Sequence[int] = ()) -> list[str]:
    """Text returned for each id, then the text returned at the end."""
    stream = TextStream(tokenizer, list(before))
    return [*(stream.put(token_id) for token_id in ids), stream.end()]


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """Ids of `data` in tokens of one byte each."""
    by_byte = {tokenizer.token_bytes(number): number for number in reversed(range(tokenizer.vocab_size))}
    return [by_byte[bytes([byte])] for byte in data]


def is_valid(tokenizer: Tokenizer, ids: Sequence[int]) -> bool:
    return BROKEN not in tokenizer.decode(ids)


TEXTS = [*texts(15, 3), "👩‍👩‍👧🇨🇳 𠮷野家 漢字", "龘" * 50, "  two  spaces ", "a", "", "\n\n", "é e\u0301 ½"]


@pytest.mark.parametrize("name", ["byte_level", "pieces"])
def test_text_comes_whole_and_without_a_broken_character(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        parts = streamed(tokenizer, ids)
        assert "".join(parts) == tokenizer.decode(ids)
        assert not any(BROKEN in part for part in parts)
        assert parts[-1] == "", "nothing is held back behind a whole character"


def test_characters_that_are_cut_into_bytes(byte_level: Tokenizer, pieces: Tokenizer, fallback: Tokenizer) -> None:
    text = "漢字🙂龘𪚥é" * 20
    for tokenizer in (byte_level, pieces, fallback):
        parts = streamed(tokenizer, byte_ids(tokenizer, text.encode()))
        assert "".join(parts) == text
        assert not any(BROKEN in part for part in parts)
        assert parts[:8] == ["", "", "漢", "", "", "字", "", ""], "each character as soon as it is complete"


def test_random_ids_never_break_a_character_and_lose_nothing(byte_level: Tokenizer) -> None:
    """Random tokens of whole and partial characters: U+FFFD comes out only when no later token can complete it."""
    draw = random.Random(5)
    (mark,) = byte_ids(byte_level, b"!")
    for length in [3] * 100 + [40] * 20 + [300] * 3:
        ids = [draw.randrange(byte_level.vocab_size) for _ in range(length)]
        parts = streamed(byte_level, ids)
        assert "".join(parts) == decode_whole(byte_level, ids)
        for at in range(0, length, 10):
            returned = "".join(parts[: at + 1])
            assert byte_level.decode([*ids[: at + 1], mark]).startswith(returned), "never changed afterwards"


@pytest.mark.parametrize("name", ["byte_level", "pieces"])
def test_random_bytes(name: str, request: pytest.FixtureRequest) -> None:
    """Random lead bytes, continuation bytes and letters, and long runs of each."""
    tokenizer: Tokenizer = request.getfixturevalue(name)
    draw = random.Random(6)
    fragments = [b"\x80", b"\xbf", b"\xe4", b"\xf0\x9f", b"\xff", b"a", "漢".encode(), "漢".encode()[:2], "🙂".encode()]
    for length in [4] * 100 + [30] * 30 + [200] * 4:
        ids = byte_ids(tokenizer, b"".join(draw.choice(fragments) for _ in range(length)))
        assert "".join(streamed(tokenizer, ids)) == decode_whole(tokenizer, ids)
    for fragment in fragments:
        ids = byte_ids(tokenizer, fragment * 100)
        assert "".join(streamed(tokenizer, ids)) == decode_whole(tokenizer, ids)


def test_a_replacement_character_that_is_text(byte_level: Tokenizer) -> None:
    ids = byte_ids(byte_level, f"a{BROKEN}b{BROKEN}{BROKEN}漢{BROKEN}".encode())
    assert "".join(streamed(byte_level, ids)) == f"a{BROKEN}b{BROKEN}{BROKEN}漢{BROKEN}"


@pytest.mark.parametrize("name", ["byte_level", "pieces", "fallback"])
def test_a_last_character_that_is_cut_is_left_out_and_nothing_else(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    before = byte_ids(tokenizer, f"ab漢{BROKEN}".encode())
    for character in ("é", "字", "🙂"):
        data = character.encode()
        for cut in range(1, len(data)):
            ids = [*before, *byte_ids(tokenizer, data[:cut])]
            assert decode_whole(tokenizer, ids) == "".join(streamed(tokenizer, ids)) == f"ab漢{BROKEN}"
        ids = [*before, *byte_ids(tokenizer, data)]
        assert decode_whole(tokenizer, ids) == "".join(streamed(tokenizer, ids)) == f"ab漢{BROKEN}{character}"
    for wrong in (b"\x80", b"\xff", b"\xe0\x80", b"\xf4\x90", b"\xf5\x80"):  # beginnings of no character
        ids = byte_ids(tokenizer, wrong)
        assert decode_whole(tokenizer, ids) == "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)
    assert decode_whole(tokenizer, []) == ""


def test_a_token_of_a_whole_and_a_cut_character(byte_level: Tokenizer) -> None:
    """Byte-level tokens may hold both: then the token stays, and what is not whole goes."""
    mixed = []
    for number in range(byte_level.vocab_size):
        data = byte_level.token_bytes(number)
        for cut in (1, 2, 3):
            whole = data[:-cut].decode(errors="ignore")
            if whole and whole.encode() == data[:-cut] and 0xE0 <= data[-cut] <= 0xEF and cut < 3:
                mixed.append((number, whole))
    assert mixed, "the tokenizer has such tokens"
    for number, whole in mixed:
        assert decode_whole(byte_level, [number]) == whole != byte_level.decode([number])


def test_garbage_does_not_hold_text_back_for_ever(byte_level: Tokenizer) -> None:
    stream = TextStream(byte_level)
    (continuation,) = byte_ids(byte_level, b"\x80")
    returned = "".join(stream.put(continuation) for _ in range(100))
    assert len(returned) > 90


def test_control_tokens_are_written_out(byte_level: Tokenizer, pieces: Tokenizer) -> None:
    for tokenizer in (byte_level, pieces):
        ids = [*tokenizer.encode("今天"), tokenizer.eod_id, *tokenizer.encode("天气")]
        parts = streamed(tokenizer, ids)
        assert "".join(parts) == tokenizer.decode(ids)
        assert tokenizer.eod in parts


@pytest.mark.parametrize("name", ["byte_level", "pieces", "fallback"])
def test_what_stands_before_is_not_repeated_and_keeps_the_space(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    draw = random.Random(8)
    for _ in range(60):
        if name == "fallback":
            ids = [draw.randrange(259, tokenizer.vocab_size) for _ in range(draw.randrange(2, 60))]
        else:
            ids = tokenizer.encode(draw.choice(texts(50, 9, 120)))
        cut = draw.randrange(len(ids) + 1)
        if not is_valid(tokenizer, ids[:cut]):
            continue
        found = tokenizer.decode(ids[:cut]) + "".join(streamed(tokenizer, ids[cut:], ids[:cut]))
        assert found == tokenizer.decode(ids)


def test_a_space_between_prompt_and_answer(pieces: Tokenizer, fallback: Tokenizer) -> None:
    hello = 259 + PIECES.index("▁hello")
    assert streamed(fallback, [hello, hello]) == ["hello", " hello", ""]
    assert streamed(fallback, [hello, hello], [hello]) == [" hello", " hello", ""]
    prompt, answer = pieces.encode("the quick"), pieces.encode("brown fox")
    assert "".join(streamed(pieces, answer)) == "brown fox"
    assert "".join(streamed(pieces, answer, prompt)) == " brown fox"


def test_a_character_begun_before_is_told(byte_level: Tokenizer, pieces: Tokenizer) -> None:
    for tokenizer in (byte_level, pieces):
        ids = byte_ids(tokenizer, "a漢字".encode())
        assert "".join(streamed(tokenizer, ids[3:], ids[:3])) == "漢字"


@pytest.mark.parametrize("what", ["text", "bytes", "garbage", "words"])
@pytest.mark.parametrize("name", ["byte_level", "pieces"])
def test_each_token_costs_the_same(
    name: str, what: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of ids decoded for a token is bounded, however many came before."""
    tokenizer: Tokenizer = request.getfixturevalue(name)
    ids = {
        "text": lambda: tokenizer.encode("".join(texts(100, 4))),
        "bytes": lambda: byte_ids(tokenizer, "龘🙂".encode() * 200),
        "garbage": lambda: byte_ids(tokenizer, b"\x80\xe4" * 700),
        "words": lambda: tokenizer.encode("the quick brown fox " * 200),
    }[what]()
    stream = TextStream(tokenizer)
    decoded = [0]
    plain = tokenizer.decode

    def counting(some: Sequence[int]) -> str:
        decoded[0] += len(some)
        return plain(some)

    monkeypatch.setattr(tokenizer, "decode", counting)
    costs = []
    parts = []
    for token_id in ids:
        decoded[0] = 0
        parts.append(stream.put(token_id))
        costs.append(decoded[0])
    assert len(ids) > 600
    assert max(costs) < 1000
    assert sum(costs) < 60 * len(ids)
    assert "".join(parts) + stream.end() == decode_whole(tokenizer, ids)
