"""Tokenizer files: two versions of transformers load them and give the ids of megazh; what cannot be written so."""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from byte_fallback import write_byte_fallback_json
from textdata import CHATGLM_MODEL, texts
from tokenizer_kinds import KINDS, added, byte_level, train_sentencepiece
from transformers_peer import VERSIONS, ask

from megazh.errors import DataError, UsageError
from megazh.exchange import tokenizer_files
from megazh.exchange.families import Family
from megazh.exchange.odd_strings import odd_strings
from megazh.exchange.tokenizer_files import exported_fingerprint, tokenizer_settings, write_tokenizer_files
from megazh.tokenizer import Tokenizer, load_tokenizer
from megazh.tokenizer.encoders import encode_each
from megazh.tokenizer.tokenizer import RankKind

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
QWENS = ("byte-level BPE", "rank file", "extras")
"""Kinds that a qwen2 folder can hold."""
REFUSED = ("SentencePiece Unigram", "SentencePiece Unigram with bytes")


def with_extras(folder: Path) -> Path:
    """A tokenizer.json that puts tokens around a text, cuts it, pads, drops merges at random, and has added words."""

    def change(settings: dict[str, Any]) -> None:
        end = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
        text = {"Sequence": {"id": "A", "type_id": 0}}
        around = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [1], "tokens": ["<|endoftext|>"]}}
        settings["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [end, text, end],
            "pair": [end, text, end],
            "special_tokens": around,
        }
        settings["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        settings["model"]["dropout"] = 0.5
        settings["added_tokens"] += [added(1500, "今天天气", False), added(1501, "<tool>", False)]

    return byte_level(folder, change)


MADE: dict[str, Callable[[Path], Path]] = {
    **{kind: make for kind, make in KINDS.items() if kind not in REFUSED},
    "extras": with_extras,
}


def load(kind: str, folder: Path) -> Tokenizer:
    return load_tokenizer(MADE[kind](folder), ranks=RankKind.QWEN if kind == "rank file" else None)


def written(tokenizer: Tokenizer, folder: Path, family: Family = Family.LLAMA, **options: Any) -> Path:
    """A folder with tokenizer files, and as much of a config.json as AutoTokenizer needs."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": family, "vocab_size": tokenizer.vocab_size}))
    write_tokenizer_files(tokenizer, folder, family, 4096, **options)
    return folder


def special(folder: Path) -> list[str]:
    found = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    return [token["content"] for token in found if token["special"]]


def strange(tokenizer: Tokenizer) -> list[str]:
    """Texts without control tokens, other ones than those of the check at the writing."""
    control = [*map(tokenizer.piece, tokenizer.control_ids), "<unk>"]
    return [*odd_strings(tokenizer, 200, control, seed=1), *(text for text in texts(50) if "<|" not in text)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, Family], tuple[Path, Tokenizer]]:
    """A folder of each kind of tokenizer and family."""
    root, found = tmp_path_factory.mktemp("folders"), {}
    for number, kind in enumerate(MADE):
        (root / f"{number}").mkdir()
        tokenizer = load(kind, root / f"{number}")
        families = list(Family) if kind in QWENS else [Family.LLAMA]
        for family in families:
            path = written(tokenizer, root / f"{number}-{family}", family, chat_template=TEMPLATE)
            found[kind, family] = (path, tokenizer)
    return found


@pytest.fixture(scope="module")
def answers(
    folders: dict[tuple[str, Family], tuple[Path, Tokenizer]],
) -> Iterator[Callable[[str], dict[tuple[str, Family, bool], dict[str, Any]]]]:
    """What a version of transformers makes of the folders: also with its slow class, in 4.46."""

    @functools.cache
    def of(version: str) -> dict[tuple[str, Family, bool], dict[str, Any]]:
        asked = [(*key, True) for key in folders]
        if version == "4.46":
            asked += [(kind, Family.QWEN2, False) for kind in QWENS]
        questions = []
        for kind, family, fast in asked:
            path, tokenizer = folders[kind, family]
            words = [*strange(tokenizer), f"a{tokenizer.eod}b"]
            questions.append({"what": "ids", "folder": str(path), "texts": words, "fast": fast})
        return dict(zip(asked, ask(version, questions), strict=True))

    return of  # type: ignore[return-value]


@pytest.mark.parametrize("version", VERSIONS)
def test_transformers_gives_the_same_ids(
    folders: dict[tuple[str, Family], tuple[Path, Tokenizer]], answers: Callable[..., Any], version: str
) -> None:
    for (kind, family, fast), found in answers(version).items():
        tokenizer = folders[kind, family][1]
        expected = encode_each(tokenizer.encoders.reference(), strange(tokenizer))
        name = f"{kind} in {family}, {found['class']}"
        assert found["ids"][:-1] == expected, name
        assert ("Qwen2" in found["class"]) == (family is Family.QWEN2), name
        assert fast or not found["class"].endswith("Fast")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_control_token_in_a_text_gives_its_id_there_and_is_left_out_of_text(
    folders: dict[tuple[str, Family], tuple[Path, Tokenizer]], answers: Callable[..., Any], version: str
) -> None:
    for (kind, family, _), found in answers(version).items():
        tokenizer = folders[kind, family][1]
        assert tokenizer.eod_id in found["ids"][-1], kind
        assert tokenizer.eod_id not in tokenizer.encode(f"a{tokenizer.eod}b"), kind
        assert tokenizer.eod not in found["texts"][-1], kind


@pytest.mark.parametrize("version", VERSIONS)
def test_named_tokens_template_and_length(
    folders: dict[tuple[str, Family], tuple[Path, Tokenizer]], answers: Callable[..., Any], version: str
) -> None:
    for (kind, family, _), found in answers(version).items():
        tokenizer = folders[kind, family][1]
        pad = tokenizer.eod_id if tokenizer.pad_id is None else tokenizer.pad_id
        assert (found["eos"], found["pad"], found["length"]) == (tokenizer.eod_id, pad, tokenizer.tokens), kind
        assert (found["template"], found["max_length"]) == (TEMPLATE, 4096), kind
        assert found["made"] == ["attention_mask", "input_ids"], "what a model takes"


def test_the_files(folders: dict[tuple[str, Family], tuple[Path, Tokenizer]]) -> None:
    """Old versions of tokenizers read merges only as strings; vocab.json and merges.txt are those of Qwen's class."""
    path, tokenizer = folders["byte-level BPE", Family.QWEN2]
    names = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}
    assert {each.name for each in path.iterdir()} == {*names, "config.json", "vocab.json", "merges.txt"}
    settings = json.loads((path / "tokenizer.json").read_text())
    assert all(isinstance(pair, str) for pair in settings["model"]["merges"])
    assert json.loads((path / "vocab.json").read_text()) == settings["model"]["vocab"]
    assert (path / "merges.txt").read_text().splitlines() == ["#version: 0.2", *settings["model"]["merges"]]
    assert (path / "chat_template.jinja").read_text() == TEMPLATE
    assert json.loads((path / "special_tokens_map.json").read_text())["eos_token"] == tokenizer.eod
    other = folders["BPE with bytes", Family.LLAMA][0]
    assert {each.name for each in other.iterdir()} == {*names, "config.json"}


def test_without_a_template_there_is_none(tmp_path: Path) -> None:
    path = written(load("byte-level BPE", tmp_path), tmp_path / "out")
    assert "chat_template" not in json.loads((path / "tokenizer_config.json").read_text())
    assert not (path / "chat_template.jinja").exists()


def test_megazh_reads_what_it_wrote(folders: dict[tuple[str, Family], tuple[Path, Tokenizer]]) -> None:
    for (kind, _), (path, tokenizer) in folders.items():
        again = load_tokenizer(path)
        again.check()
        assert (again.eod_id, again.tokens) == (tokenizer.eod_id, tokenizer.tokens), kind
        words = strange(tokenizer)
        assert [*map(again.encode, words)] == [*map(tokenizer.encode, words)], kind


def test_an_exported_tokenizer_is_known_as_the_same(
    folders: dict[tuple[str, Family], tuple[Path, Tokenizer]],
) -> None:
    """Also where a SentencePiece model has become a tokenizer.json, or the end token was no added token before."""
    found = {kind: exported_fingerprint(tokenizer) for (kind, _), (_, tokenizer) in folders.items()}
    for (kind, _), (path, _) in folders.items():
        assert exported_fingerprint(load_tokenizer(path)) == found[kind], kind
    assert len(set(found.values())) == len(found)


def test_tokens_in_front_of_sentencepiece(tmp_path: Path) -> None:
    """The model's own <unk> keeps its name, which the front token of that name, never given, then cannot have."""
    tokenizer = load_tokenizer(train_sentencepiece(tmp_path), front_tokens=True)
    path = written(tokenizer, tmp_path / "out")
    assert special(path) == ["<pad>", "<eos>", "<unk>"]
    settings = json.loads((path / "tokenizer.json").read_text())
    assert list(settings["model"]["vocab"])[:5] == ["<pad>", "<bos>", "<eos>", "<front_unk>", "<unk>"]
    assert load_tokenizer(path).eod_id == tokenizer.eod_id == 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "no BPE merges"),
        ({"normalization_rule_name": "nmt_nfkc"}, "a normalization of its own"),
        ({"remove_extra_whitespaces": True}, "a normalization of its own"),
        ({"user_defined_symbols": ["天气"]}, "user-defined or unused pieces"),
        ({"treat_whitespace_as_suffix": True}, "spaces that are not written as"),
    ],
)
def test_sentencepiece_models_whose_ids_would_differ_are_refused(
    tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    tokenizer = load_tokenizer(train_sentencepiece(tmp_path, **options))
    with pytest.raises(UsageError, match=rf"small\.model: cannot be written as a tokenizer\.json .*: it has {reason}"):
        written(tokenizer, tmp_path / "out")


@pytest.mark.parametrize("kind", [kind for kind in MADE if kind not in QWENS])
def test_a_qwen2_folder_holds_qwens_way_of_splitting_alone(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UsageError, match="its ids would change in a folder of the qwen2 family"):
        tokenizer_settings(load(kind, tmp_path), Family.QWEN2)


def test_digits_in_triples_are_not_qwens(tmp_path: Path) -> None:
    def change(settings: dict[str, Any]) -> None:
        split = settings["pre_tokenizer"]["pretokenizers"][0]
        split["pattern"]["Regex"] = split["pattern"]["Regex"].replace(r"|\p{N}|", r"|\p{N}{1,3}|")

    tokenizer = load_tokenizer(byte_level(tmp_path, change))
    with pytest.raises(UsageError, match="Qwen's normalization and regex, which are not those of this one"):
        tokenizer_settings(tokenizer, Family.QWEN2)
    assert written(tokenizer, tmp_path / "out", Family.MISTRAL)


def test_a_written_tokenizer_of_other_ids_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(write_byte_fallback_json(tmp_path / "tokenizer.json"))
    settings = tokenizer_settings(tokenizer, Family.LLAMA)
    settings["model"]["vocab"] = {**settings["model"]["vocab"], "x": 266, "▁▁": 265}
    monkeypatch.setattr(tokenizer_files, "tokenizer_settings", lambda *_: settings)
    with pytest.raises(DataError, match=r"out/tokenizer\.json: gives other ids than .*/tokenizer\.json: "):
        written(tokenizer, tmp_path / "out")


def test_a_mistral_folder_of_many_ids_says_that_its_regex_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5 takes it for one of Mistral's own of which the regex is wrong, and warns."""
    tokenizer = load("byte-level BPE", tmp_path)
    for name, limit, expected in (("few", 1500, None), ("many", 1499, False)):
        monkeypatch.setattr(tokenizer_files, "_LONG", limit)
        path = written(tokenizer, tmp_path / name, Family.MISTRAL)
        assert json.loads((path / "tokenizer_config.json").read_text()).get("fix_mistral_regex") is expected


def test_chatglms_own_model(tmp_path: Path) -> None:
    if not CHATGLM_MODEL.exists():
        pytest.skip(f"{CHATGLM_MODEL} is not here")
    tokenizer = load_tokenizer(CHATGLM_MODEL)
    again = load_tokenizer(written(tokenizer, tmp_path / "out"))
    found = odd_strings(tokenizer, 20_000, ["<", "[PAD]"], seed=2)
    assert encode_each(again.encoders.reference(), found) == encode_each(tokenizer.encoders.reference(), found)


def test_odd_strings_are_the_same_each_time_and_hold_no_control_token(tmp_path: Path) -> None:
    tokenizer = load("byte-level BPE", tmp_path)
    found = odd_strings(tokenizer, 300, ["<|", "天"])
    assert found == odd_strings(tokenizer, 300, ["<|", "天"]) != odd_strings(tokenizer, 300, ["<|", "天"], seed=1)
    assert len(found) == 300
    assert not any("天" in text or "<|" in text for text in found)
