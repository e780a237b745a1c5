"""A recipe as text: every key once, with its meaning and the place of its value; and the text is the same recipe."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from megazh.errors import UsageError
from megazh.index.choices import Packing
from megazh.pipeline.precision import Dtype
from megazh.training.recipe import Recipe, load_recipe
from megazh.training.recipe import keys as recipe_keys
from megazh.training.recipe_files import recipe_names, recipe_path
from megazh.training.recipe_text import recipe_text

ROOT = Path(__file__).parents[2]
KEY = re.compile(r" +(?P<key>\w+): (?P<value>.*?) +# (?P<origin>\S.*)")


class Entry(NamedTuple):
    """A key in the text: the comment above it, its value, and the origin behind it."""

    key: str
    comment: str
    value: str
    origin: str


def entries(lines: Iterable[str]) -> list[Entry]:
    """The keys in the text, by dotted name, in order; a section is an entry without value and origin."""
    found: list[Entry] = []
    above: list[str] = []  # the section, and a key that holds keys
    comment: list[str] = []
    for line in lines:
        if line.lstrip().startswith("# "):
            comment.append(line.strip().removeprefix("# "))
            continue
        above = above[: (len(line) - len(line.lstrip())) // 2]
        if match := KEY.fullmatch(line):
            dotted = ".".join([*above, match["key"]])
            found.append(Entry(dotted, " ".join(comment), match["value"], match["origin"]))
        elif line:
            above = [*above, line.strip().removesuffix(":")]
            found.append(Entry(".".join(above), " ".join(comment), "", ""))
        comment = []
    return found


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Origins are relative to the current folder."""
    monkeypatch.chdir(ROOT)


def shown(name: str, *assignments: str) -> dict[str, Entry]:
    """The entries of a recipe that comes with megazh, by key."""
    return {entry.key: entry for entry in entries(recipe_text(recipe_path(name), assignments))}


@pytest.mark.parametrize("name", recipe_names())
def test_every_key_is_there_once_with_its_docstring(name: str) -> None:
    found = entries(recipe_text(recipe_path(name)))
    fields = dict(recipe_keys())
    # The keys of rope_scaling stand below it where it is set, and are part of its value where it is not.
    expected = [key for key in fields if not key.startswith("model.rope_scaling")]
    assert [entry.key for entry in found if not entry.key.startswith("model.rope_scaling")] == expected
    for entry in found:
        description = " ".join((fields[entry.key].description or "").replace("`", "").split())
        assert description, entry.key
        assert description in entry.comment, entry.key


def test_keys_inside_of_a_key_have_their_own_docstring_and_origin(tmp_path: Path) -> None:
    path = tmp_path / "long.yaml"
    path.write_text(
        f"include: {recipe_path('demo').resolve()}\nmodel:\n  rope_scaling:\n    type: linear\n    factor: 2.0\n"
    )
    lines = list(recipe_text(path, ["factor=8"]))
    start = lines.index("  rope_scaling:")
    assert re.fullmatch(rf"    type: linear +# {path}:4", lines[start + 2])
    assert re.fullmatch(r"    factor: 8\.0 +# command line", lines[start + 4])
    assert "Ratio of the new context length" in lines[start + 3]
    saved = tmp_path / "saved.yaml"
    saved.write_text("\n".join(lines), encoding="utf-8")
    assert load_recipe(saved) == load_recipe(path, ["factor=8"])


def test_a_comment_names_the_choices_and_whether_the_key_may_change_on_resume() -> None:
    found = shown("demo")
    assert found["precision.dtype"].comment.endswith(f"One of {', '.join([*Dtype, 'auto'])}.")
    assert found["data.packing"].comment.endswith(f"One of {', '.join(Packing)}.")
    assert found["parallel.device"].comment.endswith("One of auto, cpu, cuda. (May change on resume.)")
    assert found["schedule.steps"].comment.endswith("(May change on resume.)")
    assert "One of" not in found["checkpoint.resume"].comment, "any path as well"
    assert "may change" not in found["schedule.seed"].comment.lower()


def test_every_value_has_its_origin() -> None:
    found = shown("qwen0.5b_6x3090", "learning_rate=3e-4", "--schedule.steps=20")
    recipes = ROOT / "jobs" / "recipes"
    for key, file, line in [
        ("batch.micro_batch_size", "qwen0.5b_6x3090.yaml", "  micro_batch_size: 8"),
        ("batch.seq_len", "_pretrain.yaml", "  seq_len: 1024"),
        ("model.hidden_size", "_qwen1.5_0.5b.yaml", "  hidden_size: 1024"),
    ]:
        number = (recipes / file).read_text().splitlines().index(line) + 1
        assert found[key].origin == f"jobs/recipes/{file}:{number}"
        assert found[key].value == line.partition(": ")[2]
    for key, value in [("optimizer.learning_rate", 3e-4), ("schedule.steps", 20)]:
        assert (yaml.safe_load(found[key].value), found[key].origin) == (value, "command line")
    for key, value in [("schedule.tokens", None), ("schedule.seed", 42), ("parallel.kernels", "auto")]:
        assert (yaml.safe_load(found[key].value), found[key].origin) == (value, "default")


@pytest.mark.parametrize("name", recipe_names())
def test_saved_to_a_file_it_is_the_same_recipe(name: str, tmp_path: Path) -> None:
    settings = ["stage_bounds=[0, 2, 5]", "model.rope_scaling={type: linear, factor: 2}", 'sample_prompts=["a: #b"]']
    for assignments in ([], settings if name == "demo" else ["steps=7"]):
        path = tmp_path / "saved.yaml"
        path.write_text("\n".join(recipe_text(recipe_path(name), assignments)), encoding="utf-8")
        saved: Recipe = load_recipe(path)
        assert saved == load_recipe(recipe_path(name), assignments)
        assert saved.model_fields_set == set(Recipe.model_fields)


def test_a_setting_that_cannot_work_is_refused() -> None:
    with pytest.raises(UsageError, match=r"unknown key 'stepz'; did you mean 'schedule\.steps'\?"):
        list(recipe_text(recipe_path("demo"), ["stepz=3"]))
