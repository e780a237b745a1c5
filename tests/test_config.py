"""YAML configuration: what is refused, and how it is said."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from megazh.config import Config, choice, from_mapping, load_yaml, override, read_layers
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


def test_a_quoted_number_stays_text(tmp_path: Path) -> None:
    assert loaded(tmp_path, "seed: 1\nvalidation: {fraction: 1.0, salt: '5e-4'}\n").validation.salt == "5e-4"


@pytest.mark.parametrize(
    ("text", "unknown", "nearest"),
    [
        ("sede: 1\nseed: 1\n", "sede", "seed"),
        ("seed: 1\nvalidation: {fraction: 0.1, slat: a}\n", "validation.slat", "salt"),
        ("seed: 1\ncorpora:\n- {name: a}\n- {name: b, wieght: 3}\n", "corpora[1].wieght", "weight"),
        ("seed: 1\nby_name: {wiki: {name: a, wieght: 3}}\n", "by_name.wiki.wieght", "weight"),
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


def layered(folder: Path, **files: str) -> dict[str, Any]:
    """Write files NAME.yaml and read the layers of `top`."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return read_layers(folder / "top.yaml")


def test_include_is_overridden_key_by_key(tmp_path: Path) -> None:
    found = layered(
        tmp_path,
        base="seed: 1\nrate: 0.5\nvalidation: {fraction: 0.1, salt: a}\ncorpora: [{name: a}, {name: b}]\n",
        top="include: base.yaml\nseed: 2\nvalidation: {salt: b}\ncorpora: [{name: c}]\n",
    )
    assert found == {
        "seed": 2,
        "rate": 0.5,
        "validation": {"fraction": 0.1, "salt": "b"},
        "corpora": [{"name": "c"}],
    }


def test_of_several_includes_the_later_wins_and_the_file_itself_last(tmp_path: Path) -> None:
    found = layered(
        tmp_path,
        one="seed: 1\nrate: 1.0\nvalidation: {fraction: 0.1}\n",
        two="seed: 2\nvalidation: {salt: b}\n",
        top="include: [one.yaml, two.yaml]\nvalidation: {salt: c}\n",
    )
    assert found == {"seed": 2, "rate": 1.0, "validation": {"fraction": 0.1, "salt": "c"}}


def test_includes_of_includes_are_relative_to_their_own_file(tmp_path: Path) -> None:
    (tmp_path / "shared" / "deep").mkdir(parents=True)
    (tmp_path / "shared" / "deep" / "c.yaml").write_text("seed: 3\nrate: 3.0\n")
    (tmp_path / "shared" / "b.yaml").write_text("include: deep/c.yaml\nrate: 2.0\n")
    assert layered(tmp_path, top="include: shared/b.yaml\n") == {"seed": 3, "rate": 2.0}


def test_a_file_may_be_included_twice_but_not_by_itself(tmp_path: Path) -> None:
    both = {"one": "include: base.yaml\n", "two": "include: base.yaml\nrate: 2.0\n", "base": "seed: 1\nrate: 1.0\n"}
    assert layered(tmp_path, top="include: [one.yaml, two.yaml]\n", **both) == {"seed": 1, "rate": 2.0}
    for files in (
        {"top": "include: top.yaml\nseed: 1\n"},
        {"top": "include: one.yaml\n", "one": "include: two.yaml\n", "two": "include: ./../{}/one.yaml\n"},
    ):
        with pytest.raises(UsageError, match=r"(top|one)\.yaml: includes itself, by way of top\.yaml") as caught:
            layered(tmp_path, **{name: text.format(tmp_path.name) for name, text in files.items()})
        assert "\n" not in str(caught.value)


def test_no_include_and_an_empty_list_are_nothing(tmp_path: Path) -> None:
    assert layered(tmp_path, top="include: []\nseed: 1\n") == layered(tmp_path, top="seed: 1\n") == {"seed": 1}


def test_a_mapping_replaces_what_is_none_and_none_a_mapping(tmp_path: Path) -> None:
    assert layered(tmp_path, base="validation:\n", top="include: base.yaml\nvalidation: {salt: a}\n") == {
        "validation": {"salt": "a"}
    }
    assert layered(tmp_path, base="validation: {salt: a}\n", top="include: base.yaml\nvalidation:\n") == {
        "validation": None
    }


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"top": "include: nowhere.yaml\n"}, r"nowhere\.yaml: no such file"),
        ({"top": "include: 5\n"}, r"top\.yaml: key 'include': .* found 5"),
        ({"top": "include:\n"}, r"top\.yaml: key 'include'"),
        ({"top": "include: [one.yaml, {a: b}]\n"}, r"top\.yaml: key 'include'"),
        ({"top": "include: one.yaml\n", "one": "seed: 1\nseed: 2\n"}, r"one\.yaml:2: .*'seed' is given twice"),
        ({"top": "include: one.yaml\n", "one": "- 1\n"}, r"one\.yaml: expected a mapping"),
    ],
)
def test_includes_that_cannot_work_name_the_file(tmp_path: Path, files: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        layered(tmp_path, **files)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], {"seed": 1, "validation": {"fraction": 0.1}}),
        (["seed=5", "rate=5e-4"], {"seed": 5, "rate": 5e-4, "validation": {"fraction": 0.1}}),
        (["--seed=5"], {"seed": 5, "validation": {"fraction": 0.1}}),
        (["seed=5", "seed=6"], {"seed": 6, "validation": {"fraction": 0.1}}),
        (["validation.salt=a=b"], {"seed": 1, "validation": {"fraction": 0.1, "salt": "a=b"}}),
        (["validation.salt='7'"], {"seed": 1, "validation": {"fraction": 0.1, "salt": "7"}}),
        (["validation=null"], {"seed": 1, "validation": None}),
        (["validation=null", "validation.fraction=0.5"], {"seed": 1, "validation": {"fraction": 0.5}}),
        (["corpora=[{name: 维基}]"], {"seed": 1, "validation": {"fraction": 0.1}, "corpora": [{"name": "维基"}]}),
    ],
)
def test_settings_are_yaml_and_reach_inside(settings: list[str], expected: dict[str, Any]) -> None:
    values = {"seed": 1, "validation": {"fraction": 0.1}}
    assert override(values, settings, Plan) == expected
    assert values == {"seed": 1, "validation": {"fraction": 0.1}}, "what was given stays as it was"


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("sede=1", ["'sede'", "'seed'"]),
        ("validation.slat=1", ["'validation.slat'", "'validation.salt'"]),
        ("salt=1", ["'salt'", "'validation.salt'"]),
        ("validaton.fraction=1", ["'validaton.fraction'", "'validation.fraction'"]),
        ("zzzzqqq=1", ["'zzzzqqq'"]),
        ("=1", ["''"]),
        ("seed", ["'seed'", "key=value"]),
        ("seed 5", ["'seed 5'", "key=value"]),
        ("seed=[1", ["'seed=[1'", "YAML"]),
        ("validation={salt: a, salt: b}", ["validation=", "YAML"]),
    ],
)
def test_settings_that_cannot_work_name_the_nearest_key(setting: str, parts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        override({"seed": 1}, [setting], Plan)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


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
