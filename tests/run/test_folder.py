"""A run folder: usable without the data, and not resumed with other data."""

import json
import os
import shlex
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipes import make_recipe

from megazh.errors import DataError, MegazhError, UsageError, WriteError
from megazh.index.prepare import prepare
from megazh.run.folder import DESCRIPTION, RunFolder
from megazh.tokenizer import load_tokenizer
from megazh.training.recipe import Recipe, run_recipe


def recipe_on(manifest: Path, **changes: Any) -> Recipe:
    """The small recipe for the data of this manifest."""
    data = {"manifest": str(manifest), **changes.pop("data", {})}
    return make_recipe(**{"seq_len": 64, "data": data, **changes, "model": {"vocab_size": 512}})


@pytest.fixture
def run(stories: Path, tmp_path: Path) -> RunFolder:
    """A run that has begun."""
    folder = RunFolder(tmp_path / "run")
    assert not folder.exists
    recipe = recipe_on(stories)
    folder.begin(recipe.to_yaml(), recipe.open_mixture())
    return folder


@pytest.fixture
def own_stories(stories: Path, tmp_path: Path) -> Path:
    """A copy of the data in another folder, which tests may change."""
    folder = tmp_path / "elsewhere"
    shutil.copytree(stories.parent, folder)
    return folder / stories.name


def again(run: RunFolder, recipe: Recipe) -> None:
    """Start the run again with this recipe."""
    run.begin(recipe.to_yaml(), recipe.open_mixture())


def test_it_holds_the_recipe_the_tokenizer_and_what_was_read(run: RunFolder, stories: Path) -> None:
    recipe, info = recipe_on(stories), run.info()
    assert run.exists
    assert run_recipe(run) == recipe
    (corpus,) = info.corpora
    counts = len(recipe.open_mixture().corpora[0].training), len(recipe.open_mixture().corpora[0].validation)
    assert (corpus.training_documents, corpus.validation_documents) == counts
    assert sum(counts) == 200
    assert (info.mixture, info.mixture_seed) == (str(stories), 1)
    text = "从前，小兔子住在森林里。"
    assert run.tokenizer().encode(text) == load_tokenizer(stories.parent / "tokenizer.json").encode(text)


def test_the_same_data_may_move(run: RunFolder, own_stories: Path) -> None:
    again(run, recipe_on(own_stories))
    assert run_recipe(run).data.manifest == str(own_stories)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 2}, "seed 1 -> 2"),
        ({"validation": {"fraction": 0.01, "salt": "other"}}, "validation.salt .* -> other"),
        ({"on_exhausted": "stop"}, r"corpora\.corpus\.on_exhausted wrap -> stop"),
    ],
)
def test_another_order_or_split_is_refused(
    run: RunFolder, own_stories: Path, change: dict[str, Any], named: str
) -> None:
    own_stories.write_text(yaml.safe_dump({**yaml.safe_load(own_stories.read_text()), **change}))
    with pytest.raises(UsageError, match=f"is not what the run was begun with: .*{named}.*; give the same again"):
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


def test_each_run_has_an_identity_that_it_keeps(run: RunFolder, stories: Path, tmp_path: Path) -> None:
    first = run.info().run_id
    assert len(first) == 16
    again(run, recipe_on(stories))
    assert run.info().run_id == first
    other = RunFolder(tmp_path / "other")
    again(other, recipe_on(stories))
    assert other.info().run_id not in ("", first)


def test_a_run_of_an_earlier_version_gets_an_identity_when_it_is_resumed(run: RunFolder, stories: Path) -> None:
    values = json.loads((run.path / DESCRIPTION).read_text())
    del values["run_id"]
    (run.path / DESCRIPTION).write_text(json.dumps(values))
    assert run.info().run_id == ""
    again(run, recipe_on(stories))
    assert len(run.info().run_id) == 16


@pytest.mark.parametrize("failing", ["tokenizer.json", DESCRIPTION])
def test_a_run_that_cannot_be_written_leaves_nothing_of_itself(stories: Path, tmp_path: Path, failing: str) -> None:
    (tmp_path / "run" / failing / "in the way").mkdir(parents=True)
    run = RunFolder(tmp_path / "run")
    with pytest.raises(WriteError, match=rf"^{run.path / failing}: cannot be written: "):
        again(run, recipe_on(stories))
    assert [path.name for path in run.path.iterdir()] == [failing]


def test_every_start_is_recorded(run: RunFolder, own_stories: Path) -> None:
    (first,) = run.info().attempts
    assert first.versions.keys() >= {"python", "megazh", "torch", "deepspeed"}
    assert (first.host, first.folder) == (socket.gethostname(), os.getcwd())
    assert shlex.split(first.command) == sys.orig_argv
    run.add_devices(["here: 2 x CPU"], {"cuda": "13.0"})
    again(run, recipe_on(own_stories))
    first, second = run.info().attempts
    assert (first.devices, first.versions["cuda"]) == (["here: 2 x CPU"], "13.0")
    assert second.devices == []
    assert first.started <= second.started


def test_each_attempt_ends_for_a_reason(run: RunFolder, stories: Path) -> None:
    run.end(75, "the time limit is near (SIGUSR1)")
    again(run, recipe_on(stories))
    again(run, recipe_on(stories))
    first, killed, running = run.info().attempts
    assert (first.exit_code, first.reason) == (75, "the time limit is near (SIGUSR1)")
    assert first.ended is not None
    assert first.started <= first.ended
    assert (killed.ended, killed.exit_code) == (None, None)
    assert killed.reason == "no end was recorded: killed, or the machine failed"
    assert (running.ended, running.reason, running.exit_code) == (None, None, None)
    run.end(0, "done")
    again(run, recipe_on(stories))
    assert [attempt.reason for attempt in run.info().attempts[:3]] == [first.reason, killed.reason, "done"]


def test_an_end_that_cannot_be_recorded_is_a_warning(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    (run.path / DESCRIPTION).write_text("{")
    run.end(0, "done")
    assert capsys.readouterr().err.startswith("warning: the end of this attempt is not recorded: ")


@pytest.mark.parametrize("change", [{"validation": {"fraction": 0.3}}, {"on_exhausted": "stop"}, None])
def test_a_run_that_recorded_no_fingerprint_goes_on_with_a_note(
    run: RunFolder, own_stories: Path, change: dict[str, Any] | None
) -> None:
    """What such a run recorded is compared; of the rest a line says that it cannot be."""
    path = run.path / DESCRIPTION
    values = json.loads(path.read_text())
    del values["data"], values["attempts"]
    path.write_text(json.dumps(values))
    if change is not None:
        own_stories.write_text(yaml.safe_dump({**yaml.safe_load(own_stories.read_text()), **change}))
    recipe = recipe_on(own_stories)
    if change is not None and "validation" in change:
        with pytest.raises(UsageError, match=r"corpora\.corpus\.training_documents \d+ -> \d+"):
            again(run, recipe)
        return
    (note,) = run.begin(recipe.to_yaml(), recipe.open_mixture())
    assert note.startswith(f"note: {run.path} was begun by a version that did not record weights")
    assert run.info().data == recipe.open_mixture().fingerprint
    assert run.begin(recipe.to_yaml(), recipe.open_mixture()) == []


def test_the_checkpoint_counts_as_well(run: RunFolder, stories: Path) -> None:
    recipe = recipe_on(stories)
    saved = {**recipe.open_mixture().fingerprint, "corpora.corpus.bin": "0" * 64}
    with pytest.raises(UsageError, match=r"corpora\.corpus\.bin 0000000000000000… -> "):
        run.begin(recipe.to_yaml(), recipe.open_mixture(), saved)


def test_a_change_that_is_allowed_is_shown_and_recorded(run: RunFolder, own_stories: Path) -> None:
    own_stories.write_text(yaml.safe_dump({**yaml.safe_load(own_stories.read_text()), "seed": 9}))
    recipe = recipe_on(own_stories)
    with pytest.raises(UsageError, match=r"seed 1 -> 9; .*or go on with the new data with data.allow_change=true$"):
        again(run, recipe)
    saved = run.info().data
    lines = run.begin(recipe.to_yaml(), recipe.open_mixture(), saved, allow_change=True)
    assert lines == [
        f"{run.path}: the data has changed, as data.allow_change=true allows:",
        f"  {'seed':<32} 1 -> 9",
    ]
    assert run.info().data == recipe.open_mixture().fingerprint
    assert run.check_data(recipe.open_mixture()) == [], "as a rank compares"
    with pytest.raises(UsageError, match="seed 1 -> 9"):
        run.check_data(recipe.open_mixture(), saved)
