"""The folder of a run: enough to go on without the data, and no going on with something else."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipes import make_recipe

from megazh.errors import DataError, MegazhError, UsageError
from megazh.index.mixture import Mixture
from megazh.tokenizer import load_tokenizer
from megazh.training.prepare import prepare
from megazh.training.recipe import Recipe
from megazh.training.run_folder import CONFIG, DESCRIPTION, RunFolder


def recipe_on(manifest: Path, **changes: Any) -> Recipe:
    """The small recipe on this data."""
    data = {"manifest": str(manifest), **changes.pop("data", {})}
    return make_recipe(**{"seq_len": 64, "data": data, **changes, "model": {"vocab_size": 512}})


def mixture_of(recipe: Recipe) -> Mixture:
    """As `start` opens it."""
    return Mixture(recipe.data.manifest, recipe.seq_len, recipe.data.packing, recipe.data.max_docs)


@pytest.fixture
def run(stories: Path, tmp_path: Path) -> RunFolder:
    """A run that has begun."""
    folder = RunFolder(tmp_path / "run")
    assert not folder.exists
    recipe = recipe_on(stories)
    folder.begin(recipe, mixture_of(recipe))
    return folder


@pytest.fixture
def own_stories(stories: Path, tmp_path: Path) -> Path:
    """The same data elsewhere, to be changed."""
    folder = tmp_path / "elsewhere"
    shutil.copytree(stories.parent, folder)
    return folder / stories.name


def again(run: RunFolder, recipe: Recipe) -> None:
    """Go on with this recipe."""
    run.begin(recipe, mixture_of(recipe))


def test_it_holds_the_recipe_the_tokenizer_and_what_was_read(run: RunFolder, stories: Path) -> None:
    recipe, info = recipe_on(stories), run.info()
    assert run.exists
    assert run.recipe() == recipe
    (corpus,) = info.corpora
    counts = len(mixture_of(recipe).corpora[0].training), len(mixture_of(recipe).corpora[0].validation)
    assert (corpus.training_documents, corpus.validation_documents) == counts
    assert sum(counts) == 200
    assert (info.mixture, info.mixture_seed) == (str(stories), 1)
    text = "从前，小兔子住在森林里。"
    assert run.tokenizer().encode(text) == load_tokenizer(stories.parent / "tokenizer.json").encode(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 20},
        {"steps": None, "tokens": 4096},
        {"learning_rate": 1e-4, "warmup": 3.0, "min_lr_ratio": 0.5, "weight_decay": 0.0, "max_grad_norm": 0.0},
        {"micro_batch_size": 4, "activation_checkpointing": True, "pipe_parallel_size": 2},
        {"checkpoint_every": 3, "sample_prompts": ["小狗"], "stage_costs": "flops"},
        {"data": {"workers": 0, "stories": 7}},
    ],
)
def test_what_may_change_is_written_down(run: RunFolder, stories: Path, changes: dict[str, Any]) -> None:
    recipe = recipe_on(stories, **changes)
    again(run, recipe)
    assert run.recipe() == recipe != recipe_on(stories)


@pytest.mark.parametrize(
    ("changes", "key", "old", "new"),
    [
        ({"seed": 43}, "seed", 42, 43),
        ({"z_loss": 0.1}, "z_loss", 0.0, 0.1),
        ({"seq_len": 32}, "seq_len", 64, 32),
        ({"global_batch_size": 16}, "global_batch_size", 8, 16),
        ({"betas": [0.9, 0.99]}, "betas", [0.9, 0.95], [0.9, 0.99]),
        ({"precision": "fp32"}, "precision", "bf16", "fp32"),
        ({"data": {"packing": "concat"}}, "data.packing", "best_fit", "concat"),
        ({"data": {"workers": 1, "max_docs": 5}}, "data.max_docs", None, 5),
    ],
)
def test_what_decides_the_result_may_not_change(
    run: RunFolder, stories: Path, changes: dict[str, Any], key: str, old: object, new: object
) -> None:
    with pytest.raises(UsageError) as refusal:
        again(run, recipe_on(stories, **changes))
    assert str(refusal.value).startswith(f"{run.path}: the run was begun with {key}={old}, and this one has {new}; ")
    assert str(refusal.value).endswith("another folder with -r")
    assert run.recipe() == recipe_on(stories), "nothing was written"


def test_another_model_is_refused(run: RunFolder, stories: Path) -> None:
    recipe = recipe_on(stories)
    model = recipe.model.model_copy(update={"num_hidden_layers": 3, "qkv_bias": True})
    with pytest.raises(UsageError, match=r"model\.num_hidden_layers=2, and this one has 3"):
        again(run, recipe.model_copy(update={"model": model}))


def test_the_same_data_may_move(run: RunFolder, own_stories: Path) -> None:
    again(run, recipe_on(own_stories))
    assert run.recipe().data.manifest == str(own_stories)


def test_data_that_moves_does_not_hide_another_packing(run: RunFolder, own_stories: Path) -> None:
    with pytest.raises(UsageError, match=r"data\.packing=best_fit, and this one has concat"):
        again(run, recipe_on(own_stories, data={"packing": "concat"}))


@pytest.mark.parametrize("change", [{"seed": 2}, {"validation": {"fraction": 0.3, "salt": "other"}}])
def test_another_order_or_split_is_refused(run: RunFolder, own_stories: Path, change: dict[str, Any]) -> None:
    own_stories.write_text(yaml.safe_dump({**yaml.safe_load(own_stories.read_text()), **change}))
    with pytest.raises(UsageError, match="is not what the run was begun with"):
        again(run, recipe_on(own_stories))


def test_another_corpus_is_refused(run: RunFolder, tmp_path: Path) -> None:
    other = prepare(tmp_path / "other", 400, 2, None, story_count=150, say=lambda line: None)
    with pytest.raises(UsageError, match="the run was begun with another tokenizer"):
        again(run, recipe_on(other))


def test_the_tokenizer_serves_without_the_data_but_not_changed(run: RunFolder, stories: Path) -> None:
    copy = run.path / "tokenizer.json"
    assert copy.read_bytes() == (stories.parent / "tokenizer.json").read_bytes()
    copy.write_bytes(copy.read_bytes().replace(b"1", b"2", 1))
    with pytest.raises(DataError, match=f"{copy}: wrong content"):
        run.tokenizer()
    copy.unlink()
    with pytest.raises(DataError, match=f"{copy}: missing"):
        run.tokenizer()


@pytest.mark.parametrize("damaged", [None, "", "[]", "{}", '{"format_version": 1, "corpora": 3}'])
def test_a_damaged_description_is_named(run: RunFolder, damaged: str | None) -> None:
    path = run.path / DESCRIPTION
    path.unlink() if damaged is None else path.write_text(damaged)
    with pytest.raises(DataError) as refusal:
        run.info()
    assert str(path) in str(refusal.value)


def test_a_description_of_a_later_format_is_refused(run: RunFolder) -> None:
    path = run.path / DESCRIPTION
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 2}))
    with pytest.raises(MegazhError, match="format_version"):
        run.info()


def test_a_folder_without_a_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{tmp_path}: not the folder of a run: {CONFIG} is missing"):
        RunFolder(tmp_path).recipe()
