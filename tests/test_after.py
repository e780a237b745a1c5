"""Every command of docs/after.md runs on a tiny model; what needs a package that is not there is skipped by name."""

import json
import os
import re
import shutil
import socket
import sys
from pathlib import Path

import pytest
from made_runs import make_run, write_recipe
from processes import Finished, run_command

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "after.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.slow


def section_of(heading: str) -> str:
    """The part of the page below a heading."""
    return PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def script(heading: str) -> str:
    """The commands below a heading of the page."""
    found = re.findall(r"^```bash\n(.*?)^```", section_of(heading), re.MULTILINE | re.DOTALL)
    return "set -euo pipefail\n" + "".join(found)


def run_script(text: str, folder: Path) -> Finished:
    """Run commands of the page in a folder, with this megazh and this Python first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    python_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {"PATH": path, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    finished = run_command(["bash", "-c", text], 240, environment, folder)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, stories: Path) -> Path:
    """A folder with an untrained run, after the commands of the first two sections."""
    folder = tmp_path_factory.mktemp("after")
    recipe = write_recipe(folder / "mini.yaml", stories, seq_len=256, model={"num_key_value_heads": 2})
    make_run(folder / "runs" / "demo", recipe)
    run_script(script("The folder") + script("Preference data"), folder)
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_no_command_of_the_page_is_left_out() -> None:
    run = ("The folder", "Preference data", "DPO with TRL", "LLaMA-Factory", "A server")
    assert PAGE.count("```bash\n") == sum(section_of(name).count("```bash\n") for name in run)


def test_preference_rows(folder: Path) -> None:
    assert [row["prompt"] for row in rows(folder / "prefs.jsonl")] == [
        "写一句话\n春天\n",
        "写一句话\n秋天\n",
        "早上好！\n",
    ]
    assert [row["reason"] for row in rows(folder / "prefs.rejected.jsonl")] == ["empty answer"]
    own = rows(folder / "own.jsonl")
    assert own
    assert all(row["chosen"] != row["rejected"] for row in own)


def test_five_steps_of_dpo(folder: Path) -> None:
    pytest.importorskip("trl")
    finished = run_script(script("DPO with TRL"), folder)
    losses = [float(loss) for loss in re.findall(r"'loss': '?([0-9.]+)", finished.stdout + finished.stderr)]
    assert len(losses) == 5
    assert losses[0] == pytest.approx(0.6931, abs=1e-4), "model and reference are the same"
    assert losses != [losses[0]] * 5
    assert "not a prefix" not in finished.stderr, "no token reaches from a prompt into an answer"
    assert (folder / "exported" / "demo-dpo" / "model.safetensors").exists()


def test_the_entry_for_llama_factory_names_columns_that_are_there(folder: Path) -> None:
    run_script(script("LLaMA-Factory").split("HF_HUB_OFFLINE")[0], folder)
    entry = json.loads((folder / "data" / "dataset_info.json").read_text(encoding="utf-8"))["prefs"]
    assert set(entry["columns"].values()) <= rows(folder / "data" / entry["file_name"])[0].keys()


def test_llama_factory(folder: Path) -> None:
    pytest.importorskip("llamafactory", reason="LLaMA-Factory wants an older transformers: no environment holds both")
    run_script(script("LLaMA-Factory"), folder)
    assert (folder / "exported" / "demo-lf" / "model.safetensors").exists()


def test_a_server_answers_and_ends(folder: Path) -> None:
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason=f"transformers serve needs {package}")
    if not shutil.which("curl"):
        pytest.skip("no curl")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    text = script("A server")
    assert text.count("port=8000") == 1
    finished = run_script(text.replace("port=8000", f"port={port}"), folder)
    decode = json.JSONDecoder().raw_decode
    starts = [match.start() for match in re.finditer(r'\{"id":', finished.stdout)]
    kinds = {answer["object"]: answer["choices"][0] for answer, _ in (decode(finished.stdout, at) for at in starts)}
    assert kinds["text_completion"]["text"]
    assert kinds["chat.completion"]["message"]["content"]
