"""`megazh recipe`: list, show and check, from any folder."""

from pathlib import Path

import pytest
from made_runs import write_recipe

from megazh.cli import main
from megazh.training.recipe import load_recipe
from megazh.training.recipe_files import recipe_names, recipe_path, recipe_title

ROOT = Path(__file__).parents[2]


def recipe(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `megazh recipe WORDS`."""
    with pytest.raises(SystemExit) as ended:
        main(["recipe", *map(str, words)])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.fixture(params=["checkout", "elsewhere"], autouse=True)
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: once the checkout, once another one."""
    path = ROOT if request.param == "checkout" else tmp_path
    monkeypatch.chdir(path)
    return path


def test_list_names_every_recipe_with_its_title(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = recipe(capsys, "list")
    assert (code, err) == (0, "")
    lines = [line.split(maxsplit=1) for line in out.splitlines()]
    assert lines == [[name, recipe_title(name)] for name in recipe_names()]
    assert "demo" in recipe_names()
    assert not any(name.startswith("_") for name, _ in lines)


def test_show_prints_the_whole_recipe_with_origins(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    code, out, err = recipe(capsys, "show", "demo", "learning_rate=3e-4", "--steps=20")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    where = "jobs/recipes" if folder == ROOT else f"{ROOT}/jobs/recipes"
    assert lines[0] == f"# {where}/demo.yaml learning_rate=3e-4 --steps=20"
    origins = {line.split(":")[0].strip(): line.rpartition("# ")[2] for line in lines if line.startswith("  ")}
    for name, line in (("demo", "  seq_len: 256"), ("_demo", "  hidden_size: 128")):  # the second is included
        number = (ROOT / f"jobs/recipes/{name}.yaml").read_text().splitlines().index(line) + 1
        assert origins[line.split(":")[0].strip()] == f"{where}/{name}.yaml:{number}"
    assert origins["learning_rate"] == origins["steps"] == "command line"
    assert origins["seed"] == "default"
    saved = tmp_path / "saved.yaml"
    saved.write_text(out, encoding="utf-8")
    assert load_recipe(saved) == load_recipe(recipe_path("demo"), ["learning_rate=3e-4", "steps=20"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("warmup=400", "schedule.warmup=400: longer than the run of 6"),
        ("global_batch_size=7", "global_batch_size 7 does not divide by"),
        ("stage_bounds=[0,1,2,4]", "stage_bounds [0, 1, 2, 4] cut into 3 stages, and there are 2"),
    ],
)
def test_check_refuses_what_a_run_would(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, setting: str, message: str
) -> None:
    own = write_recipe(tmp_path / "own.yaml")
    code, out, err = recipe(capsys, "check", own, setting)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {own}: {message}")


def test_check_accepts_every_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    own = write_recipe(tmp_path / "own.yaml")
    code, out, err = recipe(capsys, "check", own, *recipe_names())
    assert (code, err) == (0, "")
    assert [line.split(":")[0] for line in out.splitlines()] == [
        str(path) for path in (own, *map(recipe_path, recipe_names()))
    ]
    assert f"{own}: a recipe of 6 steps x 256 tokens\n" in out


@pytest.mark.parametrize(
    ("text", "line", "parts"),
    [
        ("schedule:\n  stepz: 3\n", 12, ["unknown key 'schedule.stepz'", "'schedule.steps'"]),
        ("schedule:\n  steps: many\n", 12, ["'schedule.steps'", "'many'"]),
        ("schedule: {steps: 3}\nwarmup: 2\n", 12, ["unknown key 'warmup'", "'schedule.warmup'"]),
        ("schedule: {steps: 3}\nbatch: {}\n", 12, ["'batch' is given twice"]),
        ("schedule: {steps: 3}\nparallel: {kernels: fast}\n", 12, ["'parallel.kernels'", "auto, torch", "'fast'"]),
    ],
)
@pytest.mark.parametrize("command", ["check", "show"])
def test_a_wrong_file_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str, text: str, line: int, parts: list[str]
) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        "model:\n  vocab_size: 64\n  hidden_size: 32\n  num_hidden_layers: 2\n  num_attention_heads: 4\n"
        "  intermediate_size: 8\ndata: {manifest: m.yaml}\n"
        "batch: {seq_len: 16, micro_batch_size: 2, global_batch_size: 8}\noptimizer: {learning_rate: 1e-3}\n"
        f"# A comment.\n{text}"
    )
    code, out, err = recipe(capsys, command, path)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {path}:{line}: ")
    assert all(part in err for part in parts), err
    assert err.count("\n") == 1


def test_what_is_not_there_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for word, part in [("nowhere", "recipe 'nowhere': not in "), ("nowhere.yaml", "nowhere.yaml: no such file")]:
        for command in ("check", "show"):
            code, out, err = recipe(capsys, command, word)
            assert (code, out, err.count("\n")) == (2, "", 1)
            assert err.startswith(f"error: {part}")
