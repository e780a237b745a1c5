"""YAML configuration: values that are read, and the messages for those that are refused."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from megazh.config import Config, choice, from_mapping, load_yaml
from megazh.errors import UsageError


class Corpus(Config):
    name: str
    weight: float = 1.0


class Validation(Config):
    fraction: float
    salt: str = "x"


class Plan(Config):
    seed: int
    rate: float = 1.0
    validation: Validation | None = None
    corpora: list[Corpus] = Field(default_factory=list)
    by_name: dict[str, Corpus] = Field(default_factory=dict)
    either: Corpus | Validation | None = None


def refused(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "plan.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError) as caught:
        load_yaml(path, Plan)
    message = str(caught.value)
    assert "\n" not in message, message
    assert message.startswith(str(path))
    return message


def loaded(tmp_path: Path, text: str) -> Plan:
    path = tmp_path / "plan.yaml"
    path.write_text(text, encoding="utf-8")
    return load_yaml(path, Plan)


def test_values_arrive(tmp_path: Path) -> None:
    plan = loaded(tmp_path, "seed: 7\nvalidation: {fraction: 0.1}\ncorpora:\n- {name: 维基, weight: 2}\n")
    assert (plan.seed, plan.validation, plan.corpora) == (7, Validation(fraction=0.1), [Corpus(name="维基", weight=2)])


@pytest.mark.parametrize(
    ("written", "number"),
    [("5e-4", 5e-4), ("1e9", 1e9), ("2.5E3", 2500.0), ("-1.e+2", -100.0), ("0.25", 0.25), ("3", 3.0)],
)
def test_numbers_with_an_exponent_are_numbers(tmp_path: Path, written: str, number: float) -> None:
    assert loaded(tmp_path, f"seed: 1\nrate: {written}\n").rate == number


@pytest.mark.parametrize("written", ["010", "1:30", "0b11"])
def test_a_number_in_a_form_that_misleads_is_refused(tmp_path: Path, written: str) -> None:
    message = refused(tmp_path, f"seed: {written}\n")
    assert message.endswith(f"key 'seed': Input should be a valid integer, found '{written}'")


@pytest.mark.parametrize(("written", "number"), [("0", 0), ("-7", -7), ("1_000", 1000), ("0x1f", 31)])
def test_whole_numbers(tmp_path: Path, written: str, number: int) -> None:
    assert loaded(tmp_path, f"seed: {written}\n").seed == number


def test_a_quoted_number_stays_text(tmp_path: Path) -> None:
    assert loaded(tmp_path, "seed: 1\nvalidation: {fraction: 1.0, salt: '5e-4'}\n").validation.salt == "5e-4"


@pytest.mark.parametrize(
    ("text", "unknown", "nearest"),
    [
        ("sede: 1\nseed: 1\n", "sede", "seed"),
        ("seed: 1\nvalidation: {fraction: 0.1, slat: a}\n", "validation.slat", "validation.salt"),
        ("seed: 1\ncorpora:\n- {name: a}\n- {name: b, wieght: 3}\n", "corpora[1].wieght", "corpora[1].weight"),
        ("seed: 1\nby_name: {wiki: {name: a, wieght: 3}}\n", "by_name.wiki.wieght", "by_name.wiki.weight"),
    ],
)
def test_unknown_key_names_the_nearest(tmp_path: Path, text: str, unknown: str, nearest: str) -> None:
    message = refused(tmp_path, text)
    assert f"'{unknown}'" in message
    assert f"'{nearest}'" in message


def test_unknown_key_in_a_choice_of_models_is_refused_in_one_line(tmp_path: Path) -> None:
    assert "wieght" in refused(tmp_path, "seed: 1\neither: {name: a, wieght: 3}\n")


def test_unknown_key_near_nothing_lists_the_known_ones(tmp_path: Path) -> None:
    message = refused(tmp_path, "seed: 1\nzzzzqqq: 1\n")
    assert "seed" in message
    assert "corpora" in message


def test_a_dotted_key_is_said_to_belong_inside_of_its_section(tmp_path: Path) -> None:
    message = refused(tmp_path, "seed: 1\nvalidation.salt: a\n")
    assert message.endswith("key 'validation.salt': in a file, write 'salt' inside of 'validation:'")


@pytest.mark.parametrize("text", ["seed: 1\nseed: 2\n", "seed: 1\nvalidation: {fraction: 0.1, fraction: 0.2}\n"])
def test_duplicate_key_is_named_with_its_line(tmp_path: Path, text: str) -> None:
    message = refused(tmp_path, text)
    assert "twice" in message
    assert "plan.yaml:2" in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("seed: '1'\n", ["'seed'", "'1'"]),
        ("seed: 1.5\n", ["'seed'", "1.5"]),
        ("seed: true\n", ["'seed'", "True"]),
        ("seed: 1\nrate: fast\n", ["'rate'", "'fast'"]),
        ("seed: 1\ncorpora: {name: a}\n", ["'corpora'"]),
        ("seed: 1\ncorpora: [{name: 5}]\n", ["'corpora[0].name'", "5"]),
        ("rate: 1\n", ["'seed'", "missing"]),
        ("seed: 1\nvalidation: {salt: a}\n", ["'validation.fraction'", "missing"]),
    ],
)
def test_wrong_type_or_missing_key_is_named(tmp_path: Path, text: str, parts: list[str]) -> None:
    message = refused(tmp_path, text)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- a\n- b\n",
        "just text\n",
        "seed: [1\n",
        "seed: 1\n\tx: 2\n",
        "seed: 1\n---\nseed: 2\n",
        "seed: \x01\n",
        "seed: 2026-13-45\n",
        "? [a, b]\n: 1\n",
        "1: 2\nseed: 1\n",
        b"seed: \xff\xfe\n",
    ],
)
def test_what_is_no_such_mapping_is_refused_in_one_line(tmp_path: Path, text: str | bytes) -> None:
    refused(tmp_path, text)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.yaml: no such file"):
        load_yaml(tmp_path / "nowhere.yaml", Plan)


def test_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        load_yaml(tmp_path, Plan)


def test_nothing_changes_after_loading() -> None:
    plan = from_mapping({"seed": 1}, Plan, "here")
    with pytest.raises(ValueError, match="frozen"):
        plan.seed = 2  # type: ignore[misc]


class Colour(StrEnum):
    RED = "red"
    GREEN = "green"


class Picture(Config):
    colour: Annotated[Colour, choice(Colour)]
    other: Annotated[Colour | None, choice(Colour)] = None


def test_choices_are_written_as_text_and_named_where_wrong() -> None:
    assert from_mapping({"colour": "red"}, Picture, "here") == Picture(colour=Colour.RED)
    assert from_mapping({"colour": "red", "other": "green"}, Picture, "here").other is Colour.GREEN
    for values in ({"colour": "blue"}, {"colour": "red", "other": "blue"}):
        with pytest.raises(UsageError, match=r"here: key '(colour|other)': expected one of red, green, found 'blue'"):
            from_mapping(values, Picture, "here")
    with pytest.raises(UsageError, match="'colour'"):
        from_mapping({"colour": 5}, Picture, "here")
