"""Fine-tuning: own conversations, the length in epochs, and the way of the demo; nothing is trained here."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from made_runs import make_run, write_recipe

from megazh.cluster import finetune as tested
from megazh.cluster.finetune import OwnData, finetune
from megazh.errors import UsageError
from megazh.finetune.demo import SHORT
from megazh.index.manifest import load_manifest
from megazh.index.metadata import read_metadata
from megazh.training.job import Request, Task
from megazh.training.recipe import load_recipe
from megazh.training.recipe_files import recipe_path


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, stories: Path) -> list[Request]:
    """The requests that reach `start`; each leaves a complete run of untrained weights in its folder."""
    found: list[Request] = []

    def start(request: Request) -> int:
        found.append(request)
        if request.dry_run or request.recipe:
            return 0
        name = {Task.PRETRAIN: "demo", Task.NORMAL: "demo_sft", Task.LONG_CONTEXT: "demo_long"}[request.task]
        settings = [f"data.manifest={stories}"] if request.task is Task.PRETRAIN else []
        recipe = Path(f"{name}.yaml")
        recipe.write_text(load_recipe(recipe_path(name), [*settings, "steps=6", "vocab_size=512"]).to_yaml())
        make_run(request.run or Path("runs") / name, recipe)
        return 0

    monkeypatch.setattr(tested, "start", start)
    for task, stage in tested._STAGES.items():
        small = replace(SHORT, trained=60, tried=5)
        monkeypatch.setitem(tested._STAGES, task, replace(stage, questions=small))
    return found


@pytest.fixture
def base(tmp_path: Path, stories: Path) -> Path:
    """A tiny base model."""
    return make_run(tmp_path / "base", write_recipe(tmp_path / "base.yaml", stories)).path


@pytest.fixture
def rows() -> str:
    """A file of 300 conversations."""
    Path("talks.jsonl").write_text(
        "".join(json.dumps({"instruction": f"第{at}问", "output": "好"}) + "\n" for at in range(300))
    )
    return "talks.jsonl"


def tuned(tmp_path: Path, base: Path) -> Request:
    """A request for a run that begins from the base."""
    recipe = write_recipe(tmp_path / "tuned.yaml", tmp_path / "nowhere.yaml")
    return Request(task=Task.NORMAL, recipe=str(recipe), settings=[f"initial_checkpoint={base}"])


def test_own_conversations_are_converted_for_the_base(
    tmp_path: Path, base: Path, rows: str, started: list[Request]
) -> None:
    assert finetune(tuned(tmp_path, base), OwnData([rows])) == 0
    (request,) = started
    manifest, *_, steps = request.settings
    assert manifest == "data.manifest=data_index/talks/mixture.yaml"
    assert request.run == Path("runs/talks")
    (corpus,) = load_manifest(Path("data_index/talks/mixture.yaml")).corpora
    metadata = read_metadata(f"data_index/talks/{corpus.prefix}")
    assert metadata is not None
    assert (metadata.documents, metadata.options.max_tokens) == (300, 32)
    assert metadata.template is not None
    assert metadata.template.name == "chatml"
    # 8 samples of 32 tokens a step; 1 % of the conversations is for validation
    assert int(steps.removeprefix("schedule.steps=")) == round(3 * 0.99 * metadata.tokens / 256)


@pytest.mark.parametrize(
    ("settings", "epochs", "length"),
    [(["steps=4"], None, ["steps=4"]), (["schedule.tokens=1000"], None, ["schedule.tokens=1000"])],
)
def test_a_length_that_is_given_stays(
    tmp_path: Path,
    base: Path,
    rows: str,
    started: list[Request],
    settings: list[str],
    epochs: float | None,
    length: list[str],
) -> None:
    request = tuned(tmp_path, base)
    finetune(replace(request, settings=[*request.settings, *settings]), OwnData([rows]), epochs)
    assert started[0].settings[2:] == length


def test_two_lengths_are_refused(tmp_path: Path, base: Path, rows: str, started: list[Request]) -> None:
    request = tuned(tmp_path, base)
    with pytest.raises(UsageError, match="--epochs 2: steps or tokens are given, too; leave one of them out"):
        finetune(replace(request, settings=[*request.settings, "steps=3"]), OwnData([rows]), 2.0)
    assert started == []


def test_the_demo_does_not_ignore_epochs(started: list[Request]) -> None:
    with pytest.raises(UsageError, match="--epochs 2: the demo has a length of its own; set steps=N, or give -i or -c"):
        finetune(Request(task=Task.NORMAL), epochs=2.0)
    assert started == []


def test_without_a_base_there_is_no_tokenizer(tmp_path: Path, rows: str, started: list[Request]) -> None:
    request = replace(tuned(tmp_path, tmp_path), settings=[])
    with pytest.raises(UsageError, match=r"checkpoint.initial_checkpoint: missing; name the run"):
        finetune(request, OwnData([rows]))
    assert started == []


def test_a_base_that_is_not_there_is_named_with_the_remedy(tmp_path: Path, rows: str, started: list[Request]) -> None:
    request = replace(tuned(tmp_path, tmp_path), settings=["initial_checkpoint=runs/none"])
    with pytest.raises(UsageError, match=r"runs/none: no run .*; train it first, or name another with checkpoint.init"):
        finetune(request, OwnData([rows]))
    assert started == []


def test_the_demo_trains_what_is_missing_and_compares_answers(
    started: list[Request], capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(Request(task=Task.LONG_CONTEXT, settings=["seed=3"])) == 0
    assert [request.task for request in started] == [Task.PRETRAIN, Task.NORMAL, Task.LONG_CONTEXT]
    assert [request.settings for request in started] == [[], [], ["seed=3"]]
    assert [request.run for request in started[1:]] == [Path("runs/demo-sft"), Path("runs/demo-long")]
    out = capsys.readouterr().out
    for missing in ("runs/demo-sft", "runs/demo"):
        assert f"{missing}: the model that this starts from is not there yet; it is trained first\n" in out
    last = out.splitlines()[-2:]
    for line, when in zip(last, ("before", "after"), strict=True):
        assert line == f"{when:<12}0 of 5 questions that are not in the training data are answered right (0.0%)"
    started.clear()
    assert finetune(Request(task=Task.NORMAL)) == 0
    assert [request.task for request in started] == [Task.NORMAL], "the base is there"


def test_a_dry_run_of_the_demo_shows_the_first_run_that_is_missing(started: list[Request]) -> None:
    assert finetune(Request(task=Task.LONG_CONTEXT, dry_run=True)) == 0
    assert [request.task for request in started] == [Task.PRETRAIN]
    assert list(Path().iterdir()) == []


def test_a_setting_that_cannot_work_is_refused_before_a_base_is_trained(started: list[Request]) -> None:
    with pytest.raises(UsageError, match=r"steps=0|schedule.steps"):
        finetune(Request(task=Task.LONG_CONTEXT, settings=["steps=0"]))
    assert started == []


def test_a_dry_run_converts_nothing(
    tmp_path: Path, base: Path, rows: str, started: list[Request], capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(replace(tuned(tmp_path, base), dry_run=True), OwnData([rows])) == 0
    assert capsys.readouterr().out.startswith("data: a start converts -i into data_index/talks first; until then ")
    assert started[0].dry_run
    assert not Path("data_index").exists()
