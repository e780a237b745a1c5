"""Where recipes lie: found by name from any folder, or given by path."""

from pathlib import Path

import pytest

from megazh.errors import UsageError
from megazh.training import recipe_files
from megazh.training.recipe_files import recipe_names, recipe_path, recipe_title, recipes_folder

ROOT = Path(__file__).parents[2]
CHECKOUT = ROOT / "jobs" / "recipes"


def test_names_are_those_of_the_files_that_are_not_made_to_be_included() -> None:
    files = {path.stem for path in CHECKOUT.iterdir()}
    assert {"_pretrain", "demo"} < files
    assert recipe_names() == sorted(name for name in files if not name.startswith("_"))


def test_the_folder_is_relative_only_below_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert recipe_path("demo") == Path("jobs/recipes/demo.yaml")
    monkeypatch.chdir(ROOT / "jobs")
    assert recipe_path("demo") == Path("recipes/demo.yaml")
    for elsewhere in (tmp_path, ROOT / "megazh"):
        monkeypatch.chdir(elsewhere)
        assert recipes_folder() == CHECKOUT
        assert recipe_path("demo") == CHECKOUT / "demo.yaml"


def test_an_installed_wheel_has_its_own_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "megazh" / "recipes"
    installed.mkdir(parents=True)
    (installed / "mine.yaml").write_text("# Mine. Not theirs.\nmodel: {}\n")
    monkeypatch.setattr(recipe_files, "_CHECKOUT", tmp_path / "jobs" / "recipes")
    monkeypatch.setattr(recipe_files, "_INSTALLED", installed)
    assert recipe_names() == ["mine"]
    assert recipe_path("mine") == installed / "mine.yaml"
    assert recipe_title("mine") == "Mine."


def test_a_name_may_have_a_dot() -> None:
    assert recipe_path("minillm_1.4b") == recipes_folder() / "minillm_1.4b.yaml"


def test_a_path_is_taken_as_it_is() -> None:
    for name in ("some/where.yaml", "demo.yml", "/nowhere.yaml"):
        assert recipe_path(name) == Path(name)


@pytest.mark.parametrize("name", ["qwen", "", "jobs/recipes/demo"])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipe_path(name)
    message = str(caught.value)
    assert message.startswith(f"recipe '{name}': not in {recipes_folder()}; ")
    assert ", ".join(recipe_names()) in message
    assert "_pretrain" not in message
    assert "\n" not in message


def test_a_title_is_the_first_sentence_of_the_comment_on_top(tmp_path: Path) -> None:
    for text, title in [
        ("# 0.5B on six cards: two\n# stages. 8 x 32 samples.\nmodel: {}\n", "0.5B on six cards: two stages."),
        ("# No full stop\nmodel: {}\n# Another comment.\n", "No full stop"),
        ("model: {}\n# Not on top.\n", ""),
    ]:
        path = tmp_path / "own.yaml"
        path.write_text(text)
        assert recipe_title(str(path)) == title


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_a_title(name: str) -> None:
    assert recipe_title(name).endswith(".")
