"""The chain of jobs as commands: what is refused before anything is submitted, and which stage reads what."""

from pathlib import Path
from typing import Any

import pytest

from megazh.cli import main
from megazh.cluster.slurm.chain import Stage, Wanted, make_chain
from megazh.cluster.slurm.submit import submit
from megazh.errors import UsageError

RECIPES = {Stage.PRETRAIN: "demo", Stage.SFT: "demo_sft", Stage.LONGLORA: "demo_long"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with data in it."""
    for name in ("a.jsonl", "tok.json", "chat.jsonl"):
        (tmp_path / name).write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def wanted(**more: Any) -> Wanted:
    """A chain from text, with small recipes."""
    values: dict[str, Any] = {"text": ["*.jsonl"], "tokenizer": Path("tok.json"), "conversations": ["chat.jsonl"]}
    values |= {"long_conversations": ["chat.jsonl"], "recipes": RECIPES, **more}
    return Wanted(**values)


def test_stages_that_are_left_out_are_passed_over() -> None:
    chain = make_chain(wanted(without=frozenset({Stage.SFT}), name="n"))
    assert [(link.stage, link.needs) for link in chain.links] == [
        (Stage.INDEX, None),
        (Stage.PRETRAIN, Stage.INDEX),
        (Stage.LONGLORA, Stage.PRETRAIN),
        (Stage.EVALUATE, Stage.LONGLORA),
    ]
    assert "checkpoint.initial_checkpoint=runs/n" in chain.links[2].arguments


def test_without_a_name_runs_are_named_by_their_recipes() -> None:
    chain = make_chain(wanted())
    assert [str(link.result) for link in chain.links[1:4]] == ["runs/demo", "runs/demo_sft", "runs/demo_long"]
    assert chain.state == Path("runs/demo.chain.json")


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ({"text": ["nowhere/*"]}, "--text nowhere/*: no such file or folder, and no glob that matches one"),
        ({"text": ["a\nb"]}, "has a line break"),
        ({"tokenizer": None}, "--tokenizer: missing, and --text needs it"),
        ({"tokenizer": Path("nowhere")}, "--tokenizer nowhere: no such file or folder"),
        ({"conversations": ["nowhere.jsonl"]}, "--conversations nowhere.jsonl: no such file"),
        ({"long_conversations": []}, "data_index/demo-long/mixture.yaml: no such file, and longlora reads it; give "),
        ({"name": "a b"}, "--name 'a b': expected letters"),
        ({"name": "../x"}, "--name '../x': expected letters"),
        ({"sbatch": ["dependency=afterok:1"]}, "the chain itself decides on --dependency"),
        ({"sbatch": ["-p"]}, "expected a long option of sbatch"),
        ({"sbatch": ["comment=a\nb"]}, "has a line break"),
        ({"sbatch": ["position-loss:time=5"]}, "position-loss: that stage is left out"),
        ({"more": ["steps=5"]}, "--add steps=5: expected STAGE:WORD, with a stage out of index, pretrain"),
        ({"more": ["sft:stepz=5"]}, "unknown key 'stepz'"),
        ({"recipes": {**RECIPES, Stage.SFT: "nowhere"}}, "recipe 'nowhere': not in"),
        ({"recipes": {**RECIPES, Stage.SFT: "demo"}}, "runs/demo: the run folder of two stages"),
        ({"base": "x"}, "--base and --text exclude each other"),
        ({"base": "x", "text": []}, "x: no run"),
        ({"without": frozenset({Stage.INDEX})}, "--text is there for the index, which is left out"),
        ({"without": frozenset(Stage), "text": []}, "every stage is left out"),
        ({"without": frozenset({Stage.PRETRAIN, Stage.SFT, Stage.LONGLORA})}, "nothing to evaluate"),
    ],
)
def test_refusals_before_anything_is_submitted(folder: Path, more: dict[str, Any], part: str) -> None:
    with pytest.raises(UsageError) as refused:
        make_chain(wanted(**more))
    assert part in str(refused.value)
    assert not (folder / "runs").exists()


def test_a_stage_whose_input_is_not_there() -> None:
    with pytest.raises(UsageError, match=r"runs/demo: not complete, .*begin with --from pretrain, or name a model"):
        submit(make_chain(wanted()), Stage.SFT, dry_run=True)


def test_without_slurm_it_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(folder))
    words = ["--text", "a.jsonl", "--tokenizer", "tok.json", "--without", "sft", "longlora", "--pretrain", "demo"]
    with pytest.raises(SystemExit) as ended:
        main(["slurm", "submit", *words])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: no Slurm on this machine: sbatch is not in PATH")
    with pytest.raises(SystemExit) as ended:
        main(["slurm", "submit", *words, "--dry-run"])
    assert not ended.value.code
    assert "--dependency=afterok:JOB_OF_INDEX --kill-on-invalid-dep=yes" in capsys.readouterr().out
