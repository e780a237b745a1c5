"""Data against the recipe, from descriptions alone: epochs, unused rows, tokenizers, validation, what is missing."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from cases import make_case
from made_runs import make_run

from megazh.errors import DataError, MegazhError, UsageError
from megazh.index.manifest import load_manifest
from megazh.index.metadata import read_metadata
from megazh.training.checks import data
from megazh.training.job import Case, Request
from megazh.training.preflight import DATA, warnings_of
from megazh.training.recipe import read_recipe


@pytest.fixture
def manifest(stories: Path, tmp_path: Path) -> Path:
    """A copy of the data of 200 stories, of 400 ids."""
    shutil.copytree(stories.parent, tmp_path / "data")
    return tmp_path / "data" / stories.name


def rewritten(manifest: Path, **changes: Any) -> Path:
    """The manifest with keys replaced; None removes one."""
    values = {**yaml.safe_load(manifest.read_text()), **changes}
    manifest.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return manifest


def trained_tokens(manifest: Path) -> float:
    """Tokens of the training side, by the fraction."""
    metadata, validation = read_metadata(manifest.parent / "corpus"), load_manifest(manifest).validation
    assert metadata is not None
    assert validation is not None
    return metadata.tokens * (1 - validation.fraction)


def warned(tmp_path: Path, manifest: Path, *settings: str, **changes: Any) -> list[str]:
    """The warnings of the data's checks for the tiny recipe, with as many rows as the tokenizer has ids."""
    model = {"vocab_size": 400, **changes.pop("model", {})}
    return warnings_of(make_case(tmp_path, manifest, list(settings), model=model, **changes), DATA)


@pytest.mark.parametrize(
    ("epochs", "word"), [(3.9, ""), (4.1, "warning: "), (39.0, "warning: "), (41.0, "WARNING: "), (5600, "WARNING: ")]
)
def test_many_epochs_are_warned_of_and_very_many_loudly(
    tmp_path: Path, manifest: Path, epochs: float, word: str
) -> None:
    tokens = int(epochs * trained_tokens(manifest) / 256) * 256
    lines = warned(tmp_path, manifest, f"schedule.tokens={tokens}")
    assert len(lines) == bool(word)
    if word:
        assert lines[0].startswith(f"{word}corpus 'corpus': {tokens:,} tokens are {epochs:,.0f} epochs of its ")
        assert lines[0].endswith("for 4 (tokens is set on the command line)")
        remedy = lines[0].partition("schedule.tokens=")[2].split()[0]
        assert not warned(tmp_path, manifest, f"schedule.tokens={remedy}"), "the remedy helps"


def test_epochs_of_each_corpus_follow_its_share(tmp_path: Path, manifest: Path) -> None:
    both = [{"name": name, "prefix": "corpus", "weight": weight} for name, weight in (("a", 0.9), ("b", 0.1))]
    rewritten(manifest, corpora=both)
    steps = int(10 * trained_tokens(manifest) / 256)
    (line,) = warned(tmp_path, manifest, f"steps={steps}")
    assert line.startswith("warning: corpus 'a': ")
    assert " 9 epochs of its " in line
    case = make_case(tmp_path, manifest, [f"steps={steps}"])
    found = data.facts(case.recipe)
    assert found is not None
    assert found.epochs(case.recipe) == pytest.approx([9, 1], rel=0.01)


@pytest.mark.parametrize(("rows", "word"), [(400, ""), (420, ""), (448, "warning: "), (6400, "WARNING: ")])
def test_rows_that_no_id_uses_are_counted(tmp_path: Path, manifest: Path, rows: int, word: str) -> None:
    lines = warned(tmp_path, manifest, model={"vocab_size": rows})
    assert len(lines) == bool(word)
    if word:
        assert lines[0].startswith(f"{word}{rows - 400:,} of the model's {rows:,} rows are never used: ")
        assert "set model.vocab_size=448" in lines[0]
        assert f"mini.yaml:{vocabulary_line(tmp_path)}" in lines[0]


def vocabulary_line(folder: Path) -> int:
    """The line of `vocab_size` in the recipe."""
    lines = (folder / "mini.yaml").read_text().splitlines()
    return 1 + next(number for number, line in enumerate(lines) if "vocab_size" in line)


def test_a_model_with_too_few_rows_is_refused_and_says_where_they_were_written(tmp_path: Path, manifest: Path) -> None:
    with pytest.raises(UsageError, match=r"has ids up to 399, and the model has 64 rows: set model\.vocab_size=448"):
        warned(tmp_path, manifest, model={"vocab_size": 64})
    with pytest.raises(UsageError, match=r"\(vocab_size is set on the command line\)$"):
        warned(tmp_path, manifest, "vocab_size=64")


def test_two_tokenizers_in_one_mixture_are_refused(tmp_path: Path, manifest: Path) -> None:
    for file in manifest.parent.glob("corpus*"):
        shutil.copy(file, file.with_name(file.name.replace("corpus", "other")))
    description = manifest.parent / "other.json"
    values = json.loads(description.read_text())
    values["tokenizer"]["fingerprint"] = "0" * 64
    description.write_text(json.dumps(values))
    both = [{"name": name, "prefix": name, "weight": 1} for name in ("corpus", "other")]
    with pytest.raises(UsageError, match=r"different tokenizers: 'other' not that of 'corpus'; index all with the sam"):
        warned(tmp_path, rewritten(manifest, corpora=both))


@pytest.mark.parametrize(
    ("split", "words"),
    [
        (None, "keeps no documents for it"),
        ({"fraction": 0.0}, "keeps no documents for it"),
        ({"fraction": 1e-6, "salt": "x"}, "keeps a share of 1e-06 of 200 documents, likely none"),
    ],
)
def test_a_recipe_that_validates_needs_a_validation_side(
    tmp_path: Path, manifest: Path, split: dict[str, Any] | None, words: str
) -> None:
    rewritten(manifest, validation=split)
    (line,) = warned(tmp_path, manifest, validate_every=5)
    assert line.startswith("warning: nothing will be validated although evaluation.validate_every=5: ")
    assert words in line
    assert warned(tmp_path, manifest) == [], "the recipe does not validate"


def test_a_prefix_that_is_missing_in_a_manifest_is_named(tmp_path: Path, manifest: Path) -> None:
    entries = [{"name": name, "prefix": f"gone/{name}", "weight": 1} for name in ("a", "b")]
    with pytest.raises(MegazhError) as refusal:
        warned(tmp_path, rewritten(manifest, corpora=entries))
    first, second = str(refusal.value).split("\nerror: ")
    for line, name in ((first, "a"), (second, "b")):
        assert line.startswith(f"corpus '{name}': no index {manifest.parent}/gone/{name}.idx; a prefix is relative to ")
    (manifest.parent / "corpus.json").unlink()
    with pytest.raises(DataError, match=r"^corpus 'a': .*corpus\.json: missing; .* 'megazh index adopt .*/corpus --"):
        warned(tmp_path, rewritten(manifest, corpora=[{"name": "a", "prefix": "corpus", "weight": 1}]))


def missing(case: Case) -> str:
    """The line that refuses data that is not there; checks that a start would not make stories."""
    assert not data.makes_data(case)
    with pytest.raises(UsageError) as refusal:
        warnings_of(case, DATA)
    return str(refusal.value)


def test_a_misspelt_manifest_names_the_one_that_is_there(tmp_path: Path, manifest: Path) -> None:
    line = missing(make_case(tmp_path, manifest.with_name("mixtur.yaml")))
    assert f"did you mean {manifest}?" in line
    line = missing(make_case(tmp_path, manifest.with_name("corpsu")))
    assert f"did you mean {manifest.with_name('corpus')}?" in line
    assert "(there is no folder nowhere)" in missing(make_case(tmp_path, Path("nowhere/mixture.yaml")))


@pytest.mark.parametrize("name", ["data_index/mine.yaml", "data_index/mini/mixture.yaml", "data_index/raw", "x.yaml"])
def test_stories_are_not_made_for_a_manifest_of_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = [] if name == "data_index/mini/mixture.yaml" else [f"data.manifest={name}"]
    if not settings:
        Path(name).parent.mkdir(parents=True)
        (Path(name).parent / "mine.bin").touch()
    case = make_case(tmp_path, None, settings)
    assert f"data.manifest={name}: no such file" in missing(case)
    (tmp_path / "own.yaml").write_text(f"include: mini.yaml\ndata: {{manifest: {name}}}\n")
    recipe, written = read_recipe(tmp_path / "own.yaml")
    assert f"{tmp_path}/own.yaml:2" in missing(replace(case, recipe=recipe, settings=written))


def test_the_number_of_stories_may_be_given_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert data.makes_data(make_case(tmp_path, None, ["stories=30"]))
    assert data.makes_data(make_case(tmp_path, None, ["stories=30", "data.manifest=data_index/new/mixture.yaml"]))
    assert not data.makes_data(make_case(tmp_path, None, ["stories=30", "data.manifest=data_index/new.yaml"]))
    assert not data.makes_data(make_case(tmp_path, None, ["stories=null"]))


def test_stories_are_made_where_the_recipe_has_them_unless_something_else_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    case = make_case(tmp_path)
    assert data.makes_data(case)
    assert warnings_of(case, DATA) == []
    folder = Path("data_index/mini")
    folder.mkdir(parents=True)
    (folder / "prepare.lock").touch()
    assert data.makes_data(case), "left by a preparation"
    (folder / "notes.txt").touch()
    assert "data.manifest=data_index/mini/mixture.yaml: no such file" in missing(case)
    (folder / "prepared.json").touch()
    assert data.makes_data(case), "interrupted before"


def test_a_dry_run_and_a_plan_need_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    elsewhere = Path("data_index/elsewhere.yaml")
    assert warnings_of(make_case(tmp_path, elsewhere, planned=True), DATA) == []
    (line,) = warnings_of(make_case(tmp_path, elsewhere, request=Request(dry_run=True)), DATA)
    assert line.startswith("warning: data.manifest=data_index/elsewhere.yaml: no such file (there is no folder data_in")
    assert line.endswith("; a start will refuse that")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("corpus.idx", "a file of an index; give its PREFIX, data.manifest="),
        ("corpus.bin", "a file of an index; give its PREFIX, data.manifest="),
        ("corpus.json", "a file of an index; give its PREFIX, data.manifest="),
        ("corpus.yaml", "no such file, but an index of that name is there; give its PREFIX, data.manifest="),
        ("", "is a folder; give a manifest in it, such as "),
    ],
)
def test_what_is_near_to_a_prefix_says_what_to_give(tmp_path: Path, manifest: Path, name: str, words: str) -> None:
    assert words in missing(make_case(tmp_path, manifest.parent / name))
    assert warnings_of(make_case(tmp_path, manifest.with_name("corpus")), [data.manifest]) == []


def test_a_complete_run_needs_its_data_no_longer(tmp_path: Path, manifest: Path) -> None:
    case = make_case(tmp_path, manifest, steps=6)
    make_run(case.run.path, tmp_path / "mini.yaml")
    shutil.rmtree(manifest.parent)
    assert warnings_of(case, DATA) == []


def test_what_a_run_prints_of_its_data(tmp_path: Path, manifest: Path) -> None:
    case = make_case(tmp_path, manifest)
    head, corpus, vocabulary = data.describe_data(case.recipe)
    assert head == f"data        {manifest}"
    tokens = trained_tokens(manifest)
    assert corpus == f"            corpus: {tokens:,.0f} tokens to train on, {6 * 256 / tokens:.2f} epochs"
    assert vocabulary == "vocabulary  400 ids for 512 rows of the model, 112 of them never used"
