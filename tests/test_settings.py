"""Layers of settings: files that include one another, `key=value` on top, and the place of each value."""

from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from megazh.config import Config, from_mapping
from megazh.errors import SeveralErrors, UsageError
from megazh.settings import COMMAND_LINE, Settings, Synonym, override, read_layers


class Corpus(Config):
    name: str
    weight: float = 1.0


class Validation(Config):
    fraction: float
    salt: str = "x"


class Optimizer(Config):
    rate: float = 1.0
    decay: float = 0.0


class Schedule(Config):
    rate: float = 1.0


class Plan(Config):
    seed: int
    validation: Validation | None = None
    corpora: list[Corpus] = Field(default_factory=list)
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()


def layered(folder: Path, **files: str) -> dict[str, Any]:
    """Write files NAME.yaml and read the layers of `top`."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return read_layers(folder / "top.yaml").values


def test_a_mapping_from_numbers_is_replaced_as_a_whole(tmp_path: Path) -> None:
    base = "schedule:\n  batch: {0: 16, 2B: 32}\n  rate: 0.5\n"
    found = layered(tmp_path, base=base, top="include: base.yaml\nschedule: {batch: {0: 8, 1B: 24}}\n")
    assert found == {"schedule": {"batch": {0: 8, "1B": 24}, "rate": 0.5}}


def test_a_number_given_twice_as_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"top\.yaml:1: not valid YAML: key '0' is given twice"):
        layered(tmp_path, top="batch: {0: 8, 0: 24}\n")


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
        ({"top": "seed: 1\ninclude: nowhere.yaml\n"}, r"top\.yaml:2: include 'nowhere\.yaml': no such file in "),
        ({"top": 'include: "a\\0b"\n'}, r"top\.yaml:1: include 'a\\x00b': no such file"),
        ({"top": "include: .\n"}, r"top\.yaml:1: include '\.': no such file"),
        ({"top": "seed: &a {b: *a}\n"}, r"top\.yaml: not valid YAML: .*contains itself"),
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
        (
            ["seed=5", "decay=5e-4", "schedule.rate=2.0"],
            {
                "seed": 5,
                "validation": {"fraction": 0.1},
                "optimizer": {"decay": 5e-4},
                "schedule": {"rate": 2.0},
            },
        ),
        (["--seed=5"], {"seed": 5, "validation": {"fraction": 0.1}}),
        (["seed=5", "seed=6"], {"seed": 6, "validation": {"fraction": 0.1}}),
        (["validation.salt=a=b"], {"seed": 1, "validation": {"fraction": 0.1, "salt": "a=b"}}),
        (["validation.salt='7'"], {"seed": 1, "validation": {"fraction": 0.1, "salt": "7"}}),
        (["salt=b"], {"seed": 1, "validation": {"fraction": 0.1, "salt": "b"}}),
        (["validation=null"], {"seed": 1, "validation": None}),
        (["validation=null", "validation.fraction=0.5"], {"seed": 1, "validation": {"fraction": 0.5}}),
        (["corpora=[{name: 维基}]"], {"seed": 1, "validation": {"fraction": 0.1}, "corpora": [{"name": "维基"}]}),
    ],
)
def test_settings_are_yaml_and_reach_inside(settings: list[str], expected: dict[str, Any]) -> None:
    values = {"seed": 1, "validation": {"fraction": 0.1}}
    assert override(Settings(values), settings, Plan).values == expected
    assert values == {"seed": 1, "validation": {"fraction": 0.1}}, "the given mapping is not changed"


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("sede=1", ["'sede'", "'seed'"]),
        ("validation.slat=1", ["'validation.slat'", "'validation.salt'"]),
        ("validaton.fraction=1", ["'validaton.fraction'", "'validation.fraction'"]),
        ("zzzzqqq=1", ["'zzzzqqq'", "seed", "optimizer"]),
        ("rate=1", ["'rate' is ambiguous", "optimizer.rate, schedule.rate"]),
        ("schedul.rate=1", ["'schedul.rate'", "'optimizer.rate' or 'schedule.rate'"]),
        ("optimizer=1", ["'optimizer=1': 'optimizer' is a section", "optimizer.rate, optimizer.decay"]),
        ("=1", ["''"]),
        ("seed", ["'seed'", "key=value"]),
        ("seed 5", ["'seed 5'", "key=value"]),
        ("seed=[1", ["'seed=[1'", "YAML"]),
        ("validation={salt: a, salt: b}", ["validation=", "YAML"]),
    ],
)
def test_settings_that_cannot_work_name_the_nearest_key(setting: str, parts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        override(Settings({"seed": 1}), [setting], Plan)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_each_value_knows_where_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("# base\nseed: 1\nvalidation:\n  fraction: 0.1\n  salt: a\n")
    top = tmp_path / "top.yaml"
    top.write_text("include: base.yaml\nvalidation: {salt: b}\n")
    settings = override(read_layers(top), ["decay=0.5", "schedule={rate: 3.0}"], Plan)
    origins = {
        "seed": f"{tmp_path}/base.yaml:2",
        "validation.fraction": f"{tmp_path}/base.yaml:4",
        "validation.salt": f"{top}:2",
        "optimizer.decay": COMMAND_LINE,
        "schedule.rate": COMMAND_LINE,
        "optimizer.rate": None,
        "corpora": None,
    }
    assert {key: settings.origin(key) for key in origins} == origins
    cleared = override(settings, ["validation=null"], Plan)
    assert (cleared.origin("validation"), cleared.origin("validation.salt")) == (COMMAND_LINE, None)


def test_an_error_names_the_place_of_the_value(tmp_path: Path) -> None:
    path = tmp_path / "top.yaml"
    path.write_text("seed: 1\n\noptimizer:\n  rate: fast\n")
    settings = read_layers(path)
    with pytest.raises(UsageError, match=r"top\.yaml:4: key 'optimizer\.rate': .*'fast'"):
        from_mapping(settings.values, Plan, str(path), settings.origins)
    settings = override(settings, ["optimizer.rate=slow"], Plan)
    with pytest.raises(UsageError, match=r"^command line: key 'optimizer\.rate': .*'slow'"):
        from_mapping(settings.values, Plan, str(path), settings.origins)


def test_of_two_alternatives_the_later_layer_drops_the_other(tmp_path: Path) -> None:
    pair = [("optimizer.rate", "schedule.rate")]
    (tmp_path / "base.yaml").write_text("seed: 1\noptimizer: {rate: 2.0, decay: 0.1}\n")
    (tmp_path / "top.yaml").write_text("include: base.yaml\nschedule: {rate: 3.0}\n")
    settings = read_layers(tmp_path / "top.yaml", pair)
    assert settings.values == {"seed": 1, "optimizer": {"decay": 0.1}, "schedule": {"rate": 3.0}}
    settings = override(settings, ["optimizer.rate=4.0"], Plan, pair)
    assert settings.values == {"seed": 1, "optimizer": {"decay": 0.1, "rate": 4.0}, "schedule": {}}
    both = override(settings, ["optimizer.rate=4.0", "schedule.rate=5.0"], Plan, pair)
    assert both.values["schedule"] == {"rate": 5.0}
    assert both.values["optimizer"]["rate"] == 4.0


def test_a_file_of_the_library_is_included_from_anywhere_by_its_name(tmp_path: Path) -> None:
    library, own = tmp_path / "library", tmp_path / "own"
    library.mkdir()
    own.mkdir()
    (library / "_shared.yaml").write_text("include: deeper.yaml\nseed: 1\n")
    (library / "deeper.yaml").write_text("rate: 3.0\n")
    (own / "top.yaml").write_text("include: _shared.yaml\n")
    assert read_layers(own / "top.yaml", library=library).values == {"rate": 3.0, "seed": 1}
    (own / "_shared.yaml").write_text("seed: 5\n")
    assert read_layers(own / "top.yaml", library=library).values == {"seed": 5}, "a file beside it comes first"
    (own / "_shared.yaml").write_text("include: _shared.yaml\nseed: 6\n")
    found = read_layers(own / "top.yaml", library=library).values
    assert found == {"rate": 3.0, "seed": 6}, "a file that is named like one of the library builds on that one"


def test_an_include_that_is_not_there_says_who_includes_it_where_it_was_looked_for_and_what_is_near(
    tmp_path: Path,
) -> None:
    library = tmp_path / "library"
    library.mkdir()
    (library / "_shared.yaml").touch()
    (tmp_path / "middle.yaml").write_text("seed: 1\ninclude: _share\n")
    (tmp_path / "top.yaml").write_text("include: middle.yaml\n")
    with pytest.raises(UsageError) as refusal:
        read_layers(tmp_path / "top.yaml", library=library)
    assert str(refusal.value) == (
        f"{tmp_path}/middle.yaml:2: include '_share': no such file in {tmp_path} or {library}; did you mean "
        f"'_shared.yaml'? (included by {tmp_path}/top.yaml:1)"
    )


@pytest.mark.parametrize("text", ["seed: [1\n", "- a\n", "include: 5\n"])
def test_an_error_in_an_included_file_says_who_includes_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "below.yaml").write_text(text)
    (tmp_path / "top.yaml").write_text("seed: 1\n\ninclude: [below.yaml]\n")
    with pytest.raises(UsageError, match=r"below\.yaml.*\(included by .*top\.yaml:3\)$") as refusal:
        read_layers(tmp_path / "top.yaml")
    assert "\n" not in str(refusal.value)


def test_a_synonym_means_its_key() -> None:
    class Run(Config):
        steps: Annotated[int, Synonym("max_steps")] = 1

    assert override(Settings(), ["max_steps=5"], Run).values == {"steps": 5}
    assert override(Settings(), ["max_steps=5", "steps=6"], Run).values == {"steps": 6}


def test_settings_that_cannot_be_are_refused_together() -> None:
    with pytest.raises(SeveralErrors) as refusal:
        override(Settings({"seed": 1}), ["sede=1", "validation.fraction=0.1", "rate=2", "seed"], Plan)
    found = [str(error) for error in refusal.value.errors]
    for line, beginning in zip(
        found, ["unknown key 'sede'", "key 'rate' is ambiguous", "'seed': expected"], strict=True
    ):
        assert line.startswith(beginning)


def test_a_message_is_followed_by_the_places_of_the_keys_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "top.yaml").write_text("validation:\n  fraction: 0.1\noptimizer: {rate: 1.0}\nseed: 1\n")
    settings = override(read_layers(tmp_path / "top.yaml"), ["optimizer.decay=0.5"], Plan)
    place = f"{tmp_path}/top.yaml"
    for message, places in {
        "validation.fraction: too large": f"fraction is set in {place}:2",
        "set fraction=0.2": f"fraction is set in {place}:2",
        "optimizer.decay and optimizer.rate": f"rate is set in {place}:3, decay is set on the command line",
    }.items():
        assert settings.with_places(message) == f"{message} ({places})"
    for message in ("a fraction of nothing", "the rate of decay", "schedule.rate=2", "fractions=3"):
        assert settings.with_places(message) == message
