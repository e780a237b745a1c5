"""From the command line to ranks: refusals before anything starts, defaults, and the ranks that are started."""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from made_runs import RECIPE, make_run, write_metrics, write_recipe

from megazh.cli import main
from megazh.cluster import gpus
from megazh.cluster.cuda import Torch
from megazh.cluster.launchers import local
from megazh.cluster.start import start
from megazh.demo.stories import write_stories
from megazh.errors import INTERRUPTED, REQUEUE, BusyError, DataError, MegazhError, SeveralErrors, Stopped, UsageError
from megazh.files import locked
from megazh.index.prepare import prepare
from megazh.run.folder import RunFolder
from megazh.training.job import Request
from megazh.training.recipe import run_recipe

STOPPED = 5


class Launches(list[dict[str, Any]]):
    """A stand-in for `run_ranks` that records its arguments and starts nothing."""

    def __call__(
        self,
        arguments: Sequence[str],
        ranks: int,
        env: dict[str, str],
        gpu_ids: Sequence[str] | None,
        logs: Path,
        labels: Sequence[str],
        hang_seconds: float,
        at_end: Callable[[int, str], None],
    ) -> int:
        self.append({"arguments": arguments, "ranks": ranks, "gpu_ids": gpu_ids, "logs": logs, "labels": labels})
        return STOPPED


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Launches:
    """Work in an empty folder, on a machine without a GPU, with a launcher that only records."""
    found = Launches()
    monkeypatch.setattr(local, "run_ranks", found)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    machine(monkeypatch, 0)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return found


def machine(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Simulate a torch that can use `count` GPUs, or for 0 one that is built without CUDA."""
    found = Torch("2.13.0", "13.0", count) if count else Torch("2.13.0+cpu", None, 0)
    monkeypatch.setattr(gpus, "describe_torch", lambda: found)
    monkeypatch.setattr(gpus, "nvidia_card", lambda: "/dev/nvidia0" if count else "")


@pytest.fixture(scope="module")
def manifest(stories: Path) -> Path:
    """Data of 200 stories, with a tokenizer of 400 ids."""
    return stories


@pytest.fixture
def recipe(manifest: Path, tmp_path: Path) -> str:
    """The tiny recipe on this data."""
    return str(write_recipe(tmp_path / "mini.yaml", manifest))


def files_of_runs() -> dict[Path, bytes]:
    """The contents of all files in run folders, except locks."""
    files = [path for path in Path("runs").rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: path.read_bytes() for path in files}


def refused(request: Request, launches: Launches, error: type[MegazhError] = UsageError) -> str:
    """The one line that refuses a request; checks that nothing was started, and no run begun."""
    there = files_of_runs()
    with pytest.raises(error) as refusal:
        start(request)
    assert files_of_runs() == there
    assert launches == []
    line = str(refusal.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"recipe": "nowhere"}, ["recipe 'nowhere'", "demo, ", "qwen0.5b_6x3090"]),
        ({"recipe": "nowhere.yaml"}, ["nowhere.yaml: no such file"]),
        ({"settings": ["learnin_rate=1"]}, ["unknown key 'learnin_rate'; did you mean 'optimizer.learning_rate'?"]),
        ({"settings": ["model.vocab=1"]}, ["unknown key 'model.vocab'; did you mean 'model.vocab_size'?"]),
        ({"gpus": "0"}, ["-g 0: this torch (2.13.0+cpu) is built without CUDA", "--device cpu"]),
        ({"num_gpus": 6, "stages": 4}, ["6 GPUs do not divide into 4 pipeline stages; -p may be 1, 2, 3"]),
        ({"num_gpus": 6, "stages": 6}, ["6 pipeline stages for 4 parts (embedding, 2 layers, head)", "1, 2, 3"]),
        (
            {"settings": ["global_batch_size=7"]},
            ["global_batch_size 7 does not divide by micro_batch_size 2 x 1 replicas = 2", "set micro_batch_size=1"],
        ),
        (
            {"settings": ["gradient_accumulation_steps=3"]},
            ["2 x gradient_accumulation_steps 3 x 1 replicas = 6, and global_batch_size is 8", "=6, or ", "=4"],
        ),
        ({"settings": ["data.manifest=other/mine.yaml"]}, ["other/mine.yaml: no such file", "--output other/mine'"]),
        ({"settings": ["zero_stage=0"]}, ["zero_stage=0", "set zero_stage=1"]),
        ({"settings": ["zero_stage=2"]}, ["zero_stage=2", "set zero_stage=1"]),
        (
            {"settings": ["dtype=fp16"], "device": "cpu"},
            ["precision.dtype=fp16", "loss scale", "set precision.dtype=bf16, or fp32"],
        ),
        ({"settings": ["warmup=7"]}, ["schedule.warmup=7: longer than the run of 6"]),
        ({"settings": ["seq_len=1000000"]}, ["tokens for training, less than one sample of 1000000"]),
        ({"hostfile": Path("nowhere")}, ["-H nowhere: no such file"]),
        ({"inputs": []}, ["-i: expected files or folders"]),
        ({"inputs": ["x.txt"], "settings": ["data.manifest=y"]}, ["-i makes a manifest of its own", "data.manifest"]),
        ({"settings": ['sample_prompts=["从前", ""]']}, ["sample_prompts: ''", "at least one character"]),
        ({"inputs": ["nowhere.jsonl"]}, ["nowhere.jsonl"]),
    ],
)
def test_what_cannot_work_is_refused(
    launches: Launches,
    recipe: str,
    changes: dict[str, Any],
    parts: list[str],
) -> None:
    line = refused(Request(**{"recipe": recipe, **changes}), launches)
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"gpus": "1,2,3,4,5,6"}, ["-g 1,2,3,4,5,6: no GPU 6; there are 0, 1, 2, 3, 4, 5"]),
        ({"gpus": "0,1", "num_gpus": 3}, ["-n 3, but -g 0,1 lists 2 GPUs"]),
        ({"gpus": "0,0"}, ["-g 0,0: 0 is listed twice"]),
        ({"gpus": "0", "device": "cpu"}, ["-g 0 and --device cpu contradict each other"]),
        ({"num_gpus": 7}, ["-n 7: there are 6 GPUs"]),
        ({"gpus": "0"}, ["1 GPUs do not divide into 2 pipeline stages; -p may be 1"]),
    ],
)
def test_gpus_that_cannot_be_taken_are_refused(
    launches: Launches, recipe: str, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], parts: list[str]
) -> None:
    machine(monkeypatch, 6)
    line = refused(Request(recipe=recipe, **changes), launches)
    for part in parts:
        assert part in line


def test_a_hostfile_that_is_none_is_refused(launches: Launches, recipe: str) -> None:
    Path("hosts").write_text("gpu1 slots=6\n<html>\n")
    line = refused(Request(recipe=recipe, hostfile=Path("hosts")), launches)
    assert line == "hosts:2: expected a line such as 'gpu1 slots=6', found '<html>'"


def test_a_count_that_is_not_the_hosts_is_refused(launches: Launches, recipe: str) -> None:
    Path("hosts").write_text("gpu1 slots=6\ngpu2 slots=6\n")
    line = refused(Request(recipe=recipe, hostfile=Path("hosts"), num_gpus=4), launches)
    assert line == "-n 4, but the hosts of -H hosts give 12 GPUs; leave -n out"


def test_a_recipe_that_includes_itself_is_refused(launches: Launches) -> None:
    Path("a.yaml").write_text("include: b.yaml\n")
    Path("b.yaml").write_text("include: a.yaml\n")
    assert "a.yaml: includes itself, by way of a.yaml, b.yaml" in refused(Request(recipe="a.yaml"), launches)


def test_ids_above_the_vocabulary_are_refused_with_a_size_that_does(launches: Launches, recipe: str) -> None:
    line = refused(Request(recipe=recipe, settings=["model.vocab_size=64"]), launches)
    assert "has ids up to 399, and the model has 64 rows: set model.vocab_size=448" in line
    assert start(Request(recipe=recipe, settings=["model.vocab_size=448"])) == STOPPED


def test_data_that_ends_before_the_run_is_refused_with_a_length_that_does(
    launches: Launches, recipe: str, manifest: Path, tmp_path: Path
) -> None:
    shutil.copytree(manifest.parent, tmp_path / "data")
    values = {**yaml.safe_load(manifest.read_text()), "on_exhausted": "stop"}
    stopping = tmp_path / "data" / manifest.name
    stopping.write_text(yaml.safe_dump(values))
    data = f"data.manifest={stopping}"
    line = refused(Request(recipe=recipe, settings=[data, "steps=100000"]), launches)
    assert "the run takes 800,000 samples, and" in line
    steps = line.partition("set ")[2].partition(",")[0]
    refused(Request(recipe=recipe, settings=[data, f"steps={int(steps.removeprefix('steps=')) + 1}"]), launches)
    assert start(Request(recipe=recipe, settings=[data, steps])) == STOPPED
    batch = "global_batch_size=80000"
    line = refused(Request(recipe=recipe, settings=[data, batch, "steps=1"], run=Path("runs/other")), Launches())
    assert line.endswith("(on_exhausted: stop); set on_exhausted: wrap")


def test_a_second_job_in_the_same_folder_is_refused(launches: Launches, recipe: str) -> None:
    run = RunFolder(Path("runs/mini"))
    with locked(run.lock):
        line = refused(Request(recipe=recipe), launches, BusyError)
    assert line.startswith("runs/mini: another job is training in this folder")
    assert start(Request(recipe=recipe)) == STOPPED


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"settings": ["resume=never"]}, ["runs/mini: holds a run already, and resume=never", "-r"]),
        ({"settings": ["model.hidden_size=64"]}, ["begun with model.hidden_size=32, and this one has 64", "-r"]),
        ({"settings": ["seed=7"]}, ["begun with schedule.seed=42, and this one has 7", "-r"]),
        ({"settings": ["data.packing=concat"]}, ["begun with data.packing=best_fit, and this one has concat", "-r"]),
        ({"settings": ["dtype=bf16"], "device": "cpu"}, ["was saved in fp32, and this is bf16", "-r"]),
    ],
)
@pytest.mark.parametrize("length", [["steps=6"], ["steps=12", "allow_bend=true"]], ids=["complete", "to go on"])
def test_a_run_does_not_go_on_as_another_one(
    launches: Launches, recipe: str, changes: dict[str, Any], parts: list[str], length: list[str]
) -> None:
    make_run(Path("runs/mini"), Path(recipe))
    options = {"num_gpus": 1, "stages": 1, **changes, "settings": [*length, *changes.get("settings", [])]}
    line = refused(Request(recipe=recipe, **options), launches)
    for part in parts:
        assert part in line


def test_a_run_goes_on_in_another_layout(launches: Launches, recipe: str) -> None:
    make_run(Path("runs/mini"), Path(recipe))
    for ranks, stages, settings in ((2, 2, []), (2, 2, ["stage_bounds=[0, 1, 4]"]), (2, 1, []), (1, 1, [])):
        request = Request(
            recipe=recipe, num_gpus=ranks, stages=stages, settings=["steps=12", "allow_bend=true", *settings]
        )
        assert start(request) == STOPPED


@pytest.mark.parametrize(
    ("outcome", "code", "reason"),
    [
        (lambda: 0, 5, "error: .*: the ranks ended before the run was complete; run the same command again"),
        (lambda: throw(UsageError("srun has started several")), 2, "error: srun has started several"),
        (lambda: throw(KeyboardInterrupt()), 130, "interrupted before the ranks began"),
        (lambda: throw(Stopped()), 75, "interrupted before the ranks began"),
    ],
)
def test_an_attempt_whose_ranks_record_no_end_has_one(
    recipe: str, monkeypatch: pytest.MonkeyPatch, outcome: Callable[[], int], code: int, reason: str
) -> None:
    monkeypatch.setattr(local, "run_ranks", lambda *arguments: outcome())
    with pytest.raises((MegazhError, KeyboardInterrupt)):
        start(Request(recipe=recipe))
    (attempt,) = RunFolder(Path("runs/mini")).info().attempts
    assert attempt.exit_code == code
    assert re.fullmatch(reason, attempt.reason or "")


def throw(error: BaseException) -> int:
    """Raise an error."""
    raise error


def test_attention_dropout_is_refused_on_gpus(launches: Launches, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 2)
    line = refused(Request(recipe=recipe, settings=["dtype=bf16", "model.attention_dropout=0.1"]), launches)
    assert "model.attention_dropout=0.1: flash attention on CUDA in bf16 has no dropout" in line
    settings = ["dtype=fp32", "model.attention_dropout=0.1"]
    assert start(Request(recipe=recipe, settings=settings)) == STOPPED


def test_a_dry_run_refuses_what_the_run_would(launches: Launches, recipe: str) -> None:
    make_run(Path("runs/mini"), Path(recipe))
    line = refused(Request(recipe=recipe, num_gpus=1, stages=1, settings=["seed=9"], dry_run=True), launches)
    assert "the run was begun with schedule.seed=" in line


def test_dtypes_are_compared_as_they_are_not_as_they_are_written(launches: Launches, recipe: str) -> None:
    make_run(Path("runs/mini"), Path(recipe))
    settings = ["dtype=auto", "grad_accum_dtype=fp32", "communication_dtype=fp32"]
    assert start(Request(recipe=recipe, num_gpus=1, stages=1, settings=settings, dry_run=True)) == 0
    line = refused(Request(recipe=recipe, num_gpus=1, stages=1, settings=["communication_dtype=bf16"]), launches)
    assert "precision.communication_dtype=fp32, and this one has bf16" in line


def test_a_run_does_not_go_on_with_other_data(launches: Launches, recipe: str, tmp_path: Path) -> None:
    make_run(Path("runs/mini"), Path(recipe))
    other = prepare(tmp_path / "other", 400, 2, None, story_count=150, say=lambda line: None)
    settings = ["steps=12", "allow_bend=true", f"data.manifest={other}"]
    line = refused(Request(recipe=recipe, num_gpus=1, stages=1, settings=settings), launches)
    assert "runs/mini: the run was begun with another tokenizer" in line


def test_what_is_started(launches: Launches, recipe: str) -> None:
    assert start(Request(recipe=recipe, num_gpus=4, settings=["steps=9"])) == STOPPED
    (launched,) = launches
    run = Path("runs/mini")
    assert launched["arguments"] == [
        "-m", "megazh", "rank", str(run.resolve())
    ]  # fmt: skip
    assert (launched["ranks"], launched["gpu_ids"], launched["logs"]) == (4, None, run / "logs")
    assert launched["labels"] == [f"rank {rank} (stage {stage})" for rank, stage in enumerate([0, 0, 1, 1])]
    assert run_recipe(RunFolder(run)).course.steps == 9


def test_chosen_gpus_reach_the_ranks_in_order(launches: Launches, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 7)
    assert start(Request(recipe=recipe, gpus="6,1,2,3,4,5", settings=["global_batch_size=12"])) == STOPPED
    (launched,) = launches
    assert (launched["ranks"], launched["gpu_ids"]) == (6, ("6", "1", "2", "3", "4", "5"))
    parallel = run_recipe(RunFolder(Path("runs/mini"))).parallel
    assert (parallel.num_gpus, parallel.pipe_parallel_size, parallel.device) == (6, 2, "cuda")
    assert launched["labels"][2:4] == ["rank 2 (stage 0)", "rank 3 (stage 1)"]


def test_with_gpus_and_no_recipe_it_is_the_half_billion(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(monkeypatch, 7)
    assert start(Request(gpus="1,2,3,4,5,6", dry_run=True)) == 0
    out = capsys.readouterr().out
    for line in (
        "run         runs/qwen0.5b_6x3090",
        "layout      6 GPUs = 2 stages x 3 replicas, bf16",
        "batch       8 x 32 micro-batches x 3 replicas x 1024 = 786,432 tokens per step",
        "GPUs        1,2,3,4,5,6",
    ):
        assert line in out.splitlines()


@pytest.mark.parametrize(
    ("count", "layout", "note"),
    [
        (0, "2 CPU processes = 2 stages x 1 replicas, fp32", "computing on the CPU: "),
        (1, "1 GPUs = 1 stages x 1 replicas, bf16", "1 GPU here, and the recipe has 2 pipeline stages: using one\n"),
        (6, "2 GPUs = 2 stages x 1 replicas, bf16", ""),
    ],
)
def test_without_anything_it_is_the_demo(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], count: int, layout: str, note: str
) -> None:
    machine(monkeypatch, count)
    assert start(Request(dry_run=True)) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "run         runs/demo"
    assert f"layout      {layout}" in out.splitlines()
    assert err.startswith(note)
    assert bool(err) == bool(note)


def test_a_dry_run_shows_all_and_writes_nothing(
    launches: Launches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEGAZH_CACHE", str(tmp_path / "cache"))
    recipe = write_recipe(tmp_path / "mini.yaml")
    assert start(Request(recipe=str(recipe), run=Path("elsewhere/run"), dry_run=True)) == 0
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "here", recipe]
    assert launches == []
    lines = capsys.readouterr().out.splitlines()
    stages = [line.split() for line in lines if line.strip().startswith(("0 ", "1 "))]
    assert [" ".join(words[1:-4]) for words in stages] == ["embedding + 2 layers", "head"]
    assert sum(int(words[-4].replace(",", "")) for words in stages) == 512 * 32 * 2 + 32 + 2 * (4 * 32 * 32 + 64 * 97)
    assert all(words[-1] == "GiB" for words in stages)
    assert "data        data_index/mini/mixture.yaml (not there yet)" in lines
    path = tmp_path / "here" / "elsewhere" / "run"
    assert f"command     2 x python -m megazh rank {path}" in lines
    assert lines[-1] == "dry run: nothing was started"


@pytest.mark.parametrize("suffix", ["jsonl", "txt", "parquet"])
def test_own_text_names_the_data_and_the_run(
    launches: Launches, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    given, options = own_text(tmp_path, suffix), {}
    if suffix == "jsonl":
        options["text_key"] = "page.text"
    for _ in range(2):
        assert start(Request(recipe=recipe, inputs=[str(given)], **options)) == STOPPED
    run = RunFolder(Path("runs/novels"))
    assert run_recipe(run).data.manifest == "data_index/novels/mixture.yaml"
    assert run.info().corpora[0].tokens > 1000
    out = capsys.readouterr().out
    assert out.count("tokenizer: ") == 1
    assert "data: prepared already, from the same text: data_index/novels/mixture.yaml" in out
    assert [launched["arguments"][3] for launched in launches] == [str(Path("runs/novels").resolve())] * 2


def own_text(folder: Path, suffix: str) -> Path:
    """Write eighty stories as a file `novels.SUFFIX`, or for `txt` as a folder `novels` of files."""
    write_stories(folder / "stories.jsonl", 80, 3)
    texts = [json.loads(line)["text"] for line in (folder / "stories.jsonl").read_text().splitlines()]
    path = folder / "novels"
    if suffix == "txt":
        path.mkdir()
        for number in range(4):
            (path / f"{number}.txt").write_text("\n\n".join(texts[number::4]))
        return path
    path = path.with_suffix(f".{suffix}")
    if suffix == "parquet":
        pq.write_table(pa.table({"text": texts}), path)
    else:
        path.write_text("".join(json.dumps({"page": {"text": text}}) + "\n" for text in texts))
    return path


def test_other_text_of_the_same_name_is_refused(launches: Launches, recipe: str, tmp_path: Path) -> None:
    first = own_text(tmp_path, "parquet")
    assert start(Request(recipe=recipe, inputs=[str(first)])) == STOPPED
    (tmp_path / "other").mkdir()
    second = shutil.copy(first, tmp_path / "other")
    launches.clear()
    line = refused(Request(recipe=recipe, inputs=[str(second)]), launches)
    assert line.startswith("data_index/novels: was prepared from other input: ")
    assert line.endswith("choose another run name (-r), or give the same again")
    assert start(Request(recipe=recipe, inputs=[str(second)], run=Path("runs/again"))) == STOPPED
    assert run_recipe(RunFolder(Path("runs/again"))).data.manifest == "data_index/again/mixture.yaml"


@pytest.mark.parametrize(("code", "is_drawn"), [(REQUEUE, False), (INTERRUPTED, True)])
def test_a_scheduler_does_not_wait_for_a_plot(
    recipe: str, monkeypatch: pytest.MonkeyPatch, code: int, is_drawn: bool
) -> None:
    """It kills within seconds, and the exit code would be lost."""
    drawn: list[Path] = []
    monkeypatch.setattr(local, "run_ranks", lambda *arguments: code)
    monkeypatch.setattr("megazh.cluster.start.draw_within", lambda folder, seconds: drawn.append(folder))
    assert start(Request(recipe=recipe)) == code
    assert bool(drawn) == is_drawn


def test_a_complete_run_says_so_and_other_text_is_still_refused(
    launches: Launches, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = own_text(tmp_path, "jsonl")
    options = {"inputs": [str(given)], "text_key": "page.text", "num_gpus": 1, "stages": 1}
    options |= {"recipe": recipe, "settings": ["--steps=6", "resume=auto", "learning_rate=0.02"]}
    assert start(Request(**options)) == STOPPED
    run = RunFolder(Path("runs/novels"))
    shutil.move(make_run(Path("made"), Path(recipe)).checkpoints, run.checkpoints)
    path = next(run.checkpoints.iterdir()) / "manifest.json"
    own = {"run_id": run.info().run_id, "data": run.info().data, "sha256": None}
    path.write_text(json.dumps(json.loads(path.read_bytes()) | own))
    write_metrics(run, 6)
    launches.clear()
    before = files_of_runs()
    capsys.readouterr()
    assert start(Request(**options)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "runs/novels: complete, 6 steps" in lines
    assert launches == []
    assert files_of_runs() == {**before, run.plot: run.plot.read_bytes()}
    longer, anew = (shlex.split(line, comments=True) for line in lines[-2:])
    assert longer[-2:] == ["steps=12", "allow_bend=true"], "a cosine does not go on by itself"
    for command, expected in ((longer, ["runs/novels", "12"]), (anew, ["runs/novels-2", "6"])):
        assert command[0] == "bash"
        assert Path(command[1]).samefile(Path(__file__).parents[2] / "jobs" / "run_pretrain.sh")
        with pytest.raises(SystemExit) as ended:
            main(["pretrain", *command[2:], "--dry-run"])
        assert ended.value.code == 0
        shown = capsys.readouterr().out.splitlines()
        assert [shown[0].split()[1], shown[4].split()[1]] == expected
    # The printed command names the same input and key, so that nothing is prepared again.
    with pytest.raises(SystemExit) as ended:
        main(["pretrain", *longer[2:]])
    assert ended.value.code == STOPPED
    assert "prepared already" in capsys.readouterr().out
    (tmp_path / "other").mkdir()
    launches.clear()
    other = [str(shutil.copy(given, tmp_path / "other"))]
    assert "was prepared from other input" in refused(Request(**{**options, "inputs": other}), launches)


def test_a_complete_run_needs_its_data_no_longer(
    launches: Launches, tmp_path: Path, manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(manifest.parent, "data_index/mini")
    recipe = write_recipe(tmp_path / "mini.yaml")
    write_metrics(make_run(Path("runs/mini"), recipe), RECIPE["steps"])
    shutil.rmtree("data_index")
    assert start(Request(recipe=str(recipe), num_gpus=1, stages=1)) == 0
    assert "runs/mini: complete, 6 steps" in capsys.readouterr().out
    assert not Path("data_index").exists()
    assert launches == []


def test_a_complete_run_whose_last_checkpoint_is_damaged_is_not_called_complete(
    launches: Launches, tmp_path: Path, manifest: Path
) -> None:
    shutil.copytree(manifest.parent, "data_index/mini")
    recipe = write_recipe(tmp_path / "mini.yaml")
    run = make_run(Path("runs/mini"), recipe)
    path = next(run.checkpoints.glob("step_*/weights/norm.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    line = refused(Request(recipe=str(recipe), num_gpus=1, stages=1), launches, DataError)
    assert line.startswith(f"{path.parents[1]}: the content of weights/norm.safetensors has changed since it was ")
    assert "remove it, and the same command trains the steps since the one before it again" in line


@pytest.mark.parametrize("options", [{"num_gpus": 7}, {"gpus": "0-6"}])
def test_more_than_the_slots_of_this_machine_is_refused(
    launches: Launches, recipe: str, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    machine(monkeypatch, 8)
    Path("hosts").write_text("localhost slots=6\n")
    line = refused(Request(recipe=recipe, hostfile=Path("hosts"), **options), launches)
    assert "7 GPUs, and localhost has slots=6 in -H hosts; take fewer, or raise slots there" in line
    assert start(Request(recipe=recipe, hostfile=Path("hosts"), num_gpus=4)) == STOPPED


def test_a_gpu_recipe_is_refused_without_a_gpu_and_named_gpus_are_enough_for_a_dry_run(
    launches: Launches, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["dtype=bf16"]
    line = refused(Request(recipe=recipe, settings=settings), launches)
    assert line.startswith("no GPU to compute on: this torch (2.13.0+cpu) is built without CUDA; give --device cpu")
    assert line.endswith("(dtype is set on the command line)")
    assert start(Request(recipe=recipe, settings=settings, gpus="4,5", dry_run=True)) == 0
    out, err = capsys.readouterr()
    assert "layout      2 GPUs = 2 stages x 1 replicas, bf16" in out.splitlines()
    assert "GPUs        4,5" in out.splitlines()
    assert err.startswith("this machine has no GPU for torch; -g 4,5 is taken as given, for another machine\n")
    assert start(Request(recipe=recipe, settings=settings, device="cpu")) == STOPPED
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("time  ")]
    assert line.startswith("time        at least ")


def test_all_that_is_wrong_is_told_at_once(launches: Launches, recipe: str) -> None:
    Path("file").touch()
    request = Request(
        recipe=recipe, gpus="0,0", run=Path("file"), inputs=["nowhere"], settings=["warmup=99"], hostfile=Path("none")
    )
    with pytest.raises(SeveralErrors) as refusal:
        start(request)
    starts = ["-H none: no such file", "-g 0,0: 0 is listed twice", "-r file: ", "--input nowhere: ", "schedule.warmup"]
    for error, beginning in zip(refusal.value.errors, starts, strict=True):
        assert str(error).startswith(beginning)
    with pytest.raises(SeveralErrors) as refusal:
        start(Request(recipe=recipe, run=Path("file"), settings=["stepz=3", "rate=2"]))
    starts = ["unknown key 'stepz'", "unknown key 'rate'", "-r file: "]
    for error, beginning in zip(refusal.value.errors, starts, strict=True):
        assert str(error).startswith(beginning)
    assert launches == []


def test_a_misspelt_manifest_makes_no_stories_beside_the_users_data(
    launches: Launches, manifest: Path, tmp_path: Path
) -> None:
    """Neither a manifest nor a PREFIX that is not there makes the demo write into the folder of the user's data."""
    recipe = str(write_recipe(tmp_path / "stories.yaml"))
    shutil.copytree(manifest.parent, "data_index")
    before = sorted(Path().rglob("*"))
    for name in ("data_index/mixtur.yaml", "data_index/corpu", "data_index/other/mixture.yaml"):
        line = refused(Request(recipe=recipe, settings=[f"data.manifest={name}"]), launches)
        assert line.startswith(f"data.manifest={name}: no such file")
        assert sorted(Path().rglob("*")) == before
    settings = ["data.manifest=data_index/corpus"]
    assert start(Request(recipe=recipe, settings=settings)) == STOPPED, "a PREFIX that is there is read"
    assert not Path("data_index/mini").exists()


def test_a_complete_run_refuses_fewer_steps_and_names_settings_that_come_too_late(
    launches: Launches, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_metrics(make_run(Path("runs/mini"), Path(recipe)), RECIPE["steps"])
    line = refused(Request(recipe=recipe, num_gpus=1, stages=1, settings=["steps=4"]), launches)
    assert line.startswith("runs/mini: 6 of 6 steps are done, and this run is to have 4; give schedule.steps= at least")
    settings = ["learning_rate=1e-3", "kind=linear"]
    assert start(Request(recipe=recipe, num_gpus=1, stages=1, settings=settings)) == 0
    out, err = capsys.readouterr()
    assert "runs/mini: complete, 6 steps" in out
    late = next(line for line in err.splitlines() if line.endswith("not applied"))
    assert late.startswith("runs/mini: the run is complete and nothing is left to do: ")
    assert "optimizer.learning_rate=0.001" in late
    assert "schedule.kind=linear" in late
    assert launches == []


def test_a_resume_lists_what_changes(launches: Launches, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(Path("runs/mini"), Path(recipe))
    line = refused(Request(recipe=recipe, num_gpus=1, stages=1, settings=["steps=60"]), launches)
    assert "by cosine over 60 steps (cosine over 6 before)" in line
    request = Request(recipe=recipe, num_gpus=1, stages=1, settings=["steps=60", "allow_bend=true"])
    assert start(request) == STOPPED
    lines = capsys.readouterr().err.splitlines()
    assert "runs/mini: settings that changed since the last start:" in lines
    assert "  schedule.steps                   6 -> 60" in lines
    assert any("the learning rate changes at step 7" in line for line in lines)
