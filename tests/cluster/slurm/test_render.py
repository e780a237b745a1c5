"""`megazh slurm render`: its files are those of slurm/, nothing gets into them unchecked, and Slurm takes them."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import SlurmCluster

from megazh.cli import main
from megazh.cluster.slurm.render import Description, render
from megazh.cluster.slurm.times import slurm_seconds
from megazh.config import from_mapping
from megazh.errors import UsageError
from megazh.training.job import Task

TEMPLATES = Path(__file__).parents[3] / "slurm"
BY_HAND = {
    "pretrain_6x3090": Description(name="pretrain", recipe="qwen0.5b_6x3090"),
    "pretrain_2nodes": Description(name="pretrain", recipe="qwen0.5b_6x3090", nodes=2, allow_relayout=True),
    "finetune_6x3090": Description(name="finetune", recipe="sft_qwen0.5b_6x3090", task=Task.NORMAL, time="1-00:00:00"),
    "longlora_6x3090": Description(
        name="longlora", recipe="longlora_qwen0.5b_6x3090", task=Task.LONG_CONTEXT, time="1-00:00:00"
    ),
}


def call(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `megazh slurm render WORDS`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["slurm", "render", *map(str, words)])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.mark.parametrize("name", BY_HAND)
def test_files_kept_by_hand_are_what_their_description_gives(name: str) -> None:
    """From the first line for sbatch on; the comment above it is each file's own."""
    path = TEMPLATES / f"{name}.sh"
    parts = [text[text.index("##SBATCH") :] for text in (path.read_text(), render(BY_HAND[name], path))]
    assert parts[0] == parts[1]


def test_all_values_are_in_the_file() -> None:
    asked = Description(
        name="big", recipe="mine.yaml", engine="hf", nodes=3, gpus=4, gpu_type="a100", time="30:00", lead=60, cpus=7,
        memory="300G", partition="gpu,long", account="lab-1", qos="high",
    )  # fmt: skip
    text = render(asked)
    directives = re.findall(r"^#SBATCH --(\S+)$", text, re.MULTILINE)
    assert directives == [
        "partition=gpu,long", "account=lab-1", "qos=high", "job-name=big", "time=30:00", "nodes=3",
        "ntasks-per-node=4", "gres=gpu:a100:4", "cpus-per-task=7", "mem=300G", "output=slurm-big-%j.out",
        "open-mode=append", "signal=B:USR1@60", "requeue",
    ]  # fmt: skip
    assert "##SBATCH" not in text
    assert 'jobs/run_pretrain.sh" -t hf -c mine.yaml "$@"\n' in text


@pytest.mark.parametrize("key", ["name", "gpu_type", "time", "memory", "partition", "account", "qos"])
@pytest.mark.parametrize("value", ["a\n#SBATCH --uid=0", "$(id)", "a b", "a;b", "`id`", "", "-x", "a\r", "a\x00", "١"])
def test_what_could_end_a_line_is_refused(key: str, value: str) -> None:
    values: dict[str, Any] = {"name": "n", "recipe": "demo", key: value}
    with pytest.raises(UsageError, match=f"key '{key}'"):
        from_mapping(values, Description, "render")


@pytest.mark.parametrize("key", ["recipe", "more"])
def test_words_of_the_command_are_one_line(key: str) -> None:
    values: dict[str, Any] = {"name": "n", "recipe": "demo", "more": ()}
    values[key] = "a\nb" if key == "recipe" else ("a\x1bb",)
    with pytest.raises(UsageError, match="character that is not printed"):
        from_mapping(values, Description, "render")


def test_odd_words_reach_the_run_as_they_are(tmp_path: Path) -> None:
    """The file is run by bash, in a copy of a repository whose scripts print their arguments."""
    words = ("it's", "$(touch evil)", "`touch evil`", 'a "b" c', "x;y&z|*", "\\", "中文 a")
    text = render(Description(name="n", recipe="my recipe's $x.yaml", more=words))
    for folder in ("jobs", "slurm"):
        (tmp_path / folder).mkdir()
    (tmp_path / "slurm" / "common.sh").write_text('container=(); run_job() { "$@"; }\n')
    (tmp_path / "jobs" / "run_pretrain.sh").write_text("printf '%s\\0' \"$@\"\n")
    text = re.sub(r"^root=.*$", f"root={shlex.quote(str(tmp_path))}", text, flags=re.MULTILINE)
    finished = subprocess.run(["bash", "-c", text, "file", "last"], capture_output=True, cwd=tmp_path, timeout=20)
    assert finished.returncode == 0, finished.stderr
    given = finished.stdout.decode().split("\0")[:-1]
    assert given == ["-t", "ds_pp", "-c", "my recipe's $x.yaml", *words, "last"]
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["qwen0.5b_6x3090", "--gpus", "7"], "7 GPUs do not divide into 2 pipeline stages"),
        (["qwen0.5b_6x3090", "--time", "10:00"], "--time 10:00: the run saves 600 s before the limit"),
        (
            ["qwen0.5b_6x3090", "--time", "soon"],
            "key 'time': expected minutes, H:MM:SS, D-HH or D-HH:MM:SS, found 'soon'",
        ),
        (["nowhere"], "recipe 'nowhere': not in"),
        (["qwen0.5b_6x3090", "--run", "stepz=3"], "unknown key 'stepz'"),
        (["qwen0.5b_6x3090", "--output", "FILE"], "is there already; give another file, or --force"),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], part: str) -> None:
    (tmp_path / "FILE").write_text("mine")
    code, out, err = call(capsys, *(tmp_path / word if word == "FILE" else word for word in words))
    assert (code, out) == (2, "")
    assert part in err
    assert (tmp_path / "FILE").read_text() == "mine"


def test_without_slurm_it_says_that_nothing_was_checked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, out, err = call(capsys, "qwen0.5b_6x3090", "--nodes", "2", "--time", "2-00:00:00")
    assert (code, err) == (0, "not checked by Slurm: there is no sbatch on this machine\n")
    assert out.startswith("#!/usr/bin/env bash\n# Pretrain by the recipe qwen0.5b_6x3090, ")


@pytest.mark.slurm
def test_slurm_checks_the_file_and_runs_it(
    slurm: SlurmCluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in slurm.env.items():
        monkeypatch.setenv(name, value)
    path = tmp_path / "it's mine.sh"
    code, out, err = call(capsys, "qwen0.5b_6x3090", "--output", path, "--gpu-type", "H100")
    assert (code, out) == (2, "")
    assert "sbatch --test-only refuses it: " in err
    assert not path.exists()
    code, out, err = call(
        capsys, "qwen0.5b_6x3090", "--gpu-type=3090", "--nodes=2", "--output", path, "--run", "-p", "3"
    )
    assert (code, out) == (0, f"{path}: submit it with: sbatch {shlex.quote(str(path))}\n"), err
    assert re.match(r"Job \d+ to start at ", err)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\n[[ $1 == - ]] && exec {sys.executable} "$@"\nprintf \'%s\\n\' "$@" > recorded\n')
    python.chmod(0o755)
    export = f"--export=ALL,MEGAZH_PYTHON={python}"
    job = slurm.run("sbatch", "--parsable", export, path, "steps=5", cwd=tmp_path).stdout.strip()
    assert slurm.wait_job(job) == "COMPLETED", (tmp_path / f"slurm-qwen0.5b_6x3090-{job}.out").read_text()
    words = (tmp_path / "recorded").read_text().splitlines()
    assert words[-7:] == ["-t", "ds_pp", "-c", "qwen0.5b_6x3090", "-p", "3", "steps=5"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800), ("30:15", 1815), ("2:30:00", 9000), ("1-12", 129_600), ("1-12:30", 131_400),
        ("2-00:00:01", 172_801), ("0:05", 5), ("", None), ("1-", None), ("-1", None), ("1:2:3:4", None),
        ("UNLIMITED", None), ("1h", None), ("1\n", None),
    ],
)  # fmt: skip
def test_durations(text: str, seconds: int | None) -> None:
    assert slurm_seconds(text) == seconds
