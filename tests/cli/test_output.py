"""What commands print: to pipes that close early, to outputs that are closed or full, on terminals without Chinese."""

import os
import shlex
import sys
from pathlib import Path

import pytest
from made_runs import make_run, write_recipe
from processes import Finished, run_command
from textdata import json_lines, texts, tokenizer_path

from megazh.errors import READER_GONE, WorkerError

ROOT = Path(__file__).parents[2]
ENCODINGS = ["gbk", "ascii"]


def shell(line: str, folder: Path, **environ: str) -> Finished:
    """Run `line` in bash, where `megazh` is this megazh; its exit code is written to the file `code`."""
    megazh = f'megazh() {{ {shlex.quote(sys.executable)} -P -m megazh "$@"; }}'
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    line = f"{megazh}\n{line}\necho ${{PIPESTATUS[0]}} > code"
    return run_command(["bash", "-c", line], 60, {"PYTHONPATH": path, **environ}, folder)


def code_of(folder: Path) -> int:
    """The exit code of the command."""
    return int((folder / "code").read_text())


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an index `x` of 50 Chinese documents."""
    folder = tmp_path_factory.mktemp("index")
    (folder / "a.jsonl").write_bytes(json_lines(texts(50)))
    finished = shell(f"megazh {BUILD} x", folder)
    assert code_of(folder) == 0, finished
    return folder


BUILD = f"index build --input a.jsonl --tokenizer {tokenizer_path()} --output"


@pytest.mark.parametrize(
    "line",
    ["recipe show demo | true", "plan demo | true", "--help | true", "index inspect x --document 0 | true"],
)
def test_a_command_ends_quietly_when_its_reader_has_gone(index: Path, line: str) -> None:
    finished = shell(f"megazh {line}", index)
    assert finished.stderr == ""
    assert code_of(index) == READER_GONE


def test_output_for_a_full_disk_is_an_error(tmp_path: Path) -> None:
    finished = shell("megazh recipe show demo > /dev/full", tmp_path)
    assert finished.stderr == "error: standard output: No space left on device\n"
    assert code_of(tmp_path) == WorkerError.exit_code


@pytest.mark.parametrize("ends", ["|& true", ">&- 2>&-", "> /dev/full"])
def test_a_build_goes_to_its_end(index: Path, tmp_path: Path, ends: str) -> None:
    (tmp_path / "a.jsonl").write_bytes((index / "a.jsonl").read_bytes())
    finished = shell(f"megazh {BUILD} y {ends}", tmp_path)
    assert (code_of(tmp_path), finished.stderr) == (0, "")
    assert (tmp_path / "y.bin").read_bytes() == (index / "x.bin").read_bytes()


def test_an_error_that_nobody_sees_has_its_code(tmp_path: Path) -> None:
    shell("megazh recipe show nothing 2>&-", tmp_path)
    assert code_of(tmp_path) == 2


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_no_command_stumbles_over_the_encoding_of_the_terminal(index: Path, encoding: str) -> None:
    lines = [
        "index inspect x --document 0",
        f"tokenizer show {tokenizer_path()} --text '今天🙂'",
        "index verify 索引",
    ]
    finished = shell("\n".join(f"megazh {line}" for line in lines), index, PYTHONIOENCODING=encoding)
    assert "Traceback" not in finished.stderr
    assert "documents" in finished.stdout
    raw = "今".encode(encoding, "replace").decode("utf-8", "replace")
    assert raw in finished.stdout


@pytest.mark.slow
def test_a_sample_on_a_terminal_without_chinese(stories: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", write_recipe(tmp_path / "mini.yaml", stories))
    line = f"megazh sample {run.path} -- -从前 --max-tokens 5"
    finished = shell(line, tmp_path, PYTHONIOENCODING="ascii")
    assert code_of(tmp_path) == 2, "behind -- all is text"
    line = f"megazh sample {run.path} --max-tokens 5"
    for text in ("-从前", "-- -从前", "'-从 前'", "-- -x"):
        finished = shell(f"{line} {text}", tmp_path, PYTHONIOENCODING="ascii")
        assert (code_of(tmp_path), "Traceback" in finished.stderr) == (0, False), finished
        assert finished.stdout.startswith(("-??", "-? ?", "-x"))
    shell(f"{line} 从前 | true", tmp_path)
    assert code_of(tmp_path) == READER_GONE
    finished = shell(f"{line} -x", tmp_path)
    assert code_of(tmp_path) == 2
    assert "'-x' looks like an option: text that begins with a dash goes to the end, behind --" in finished.stderr
