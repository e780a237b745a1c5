"""Every command of the README runs, in its order, in a copy of the repository; the Chinese README has the same."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import run_command
from textdata import json_lines, texts

ROOT = Path(__file__).resolve().parent.parent


def _blocks(name: str) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def _without_comments(block: str) -> list[str]:
    return [line for line in block.splitlines() if line and not line.startswith("#")]


def test_both_readmes_give_the_same_commands() -> None:
    english, chinese = _blocks("README.md"), _blocks("README.zh.md")
    assert len(english) == 2
    assert [_without_comments(block) for block in english] == [_without_comments(block) for block in chinese]


@pytest.mark.slow
@pytest.mark.mpi
def test_the_commands_of_the_readme_run(tmp_path: Path) -> None:
    copy = tmp_path / "megazh"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for file in tracked.splitlines():
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        (copy / file).write_bytes((ROOT / file).read_bytes())
    (copy / ".venv").symlink_to(sys.prefix)
    (copy / "raw").mkdir()
    (copy / "raw" / "corpus.jsonl").write_bytes(json_lines(texts(8000)))
    script = tmp_path / "readme.sh"
    script.write_text("set -euo pipefail\n" + "\n".join(_blocks("README.md")), encoding="utf-8")
    done = run_command(["bash", str(script)], cwd=copy, timeout=240, env={"MEGAZH_PYTHON": sys.executable})
    assert done.returncode == 0, done.stderr
    digests = {(copy / "data_index" / f"{name}.bin").read_bytes() for name in ("raw", "raw2", "raw3")}
    assert len(digests) == 1, "alone, with workers and under mpirun: the same bytes"
    assert (copy / "sample.png").read_bytes().startswith(b"\x89PNG")
    assert "hashes, bounds, ids and document ends are right" in done.stdout
