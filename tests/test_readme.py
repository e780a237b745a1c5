"""Every command of the README runs, in its order, in a copy of the repository; the Chinese README has the same."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from exported_chats import compare
from processes import Finished, run_command
from textdata import json_lines, texts

from megazh.conversation.forms import conversation_of
from megazh.finetune.demo import ANSWER_TOKENS, LONG, SHORT

ROOT = Path(__file__).resolve().parent.parent


def _blocks(name: str) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def _without_comments(block: str) -> list[str]:
    return [line for line in block.splitlines() if line and not line.startswith("#")]


def test_both_readmes_give_the_same_commands() -> None:
    english, chinese = _blocks("README.md"), _blocks("README.zh.md")
    assert len(english) == 7
    assert [_without_comments(block) for block in english] == [_without_comments(block) for block in chinese]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """A copy of the repository in which the commands of the README ran, and how they ended."""
    tmp_path = tmp_path_factory.mktemp("readme")
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
    done = run_command(["bash", str(script)], cwd=copy, timeout=1900, env={"MEGAZH_PYTHON": sys.executable})
    assert done.returncode == 0, done.stderr
    return copy, done


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.timeout(2000)  # the demos train for some minutes each
def test_the_commands_of_the_readme_run(ran: tuple[Path, Finished]) -> None:
    copy, done = ran
    out = done.stdout
    digests = {(copy / "data_index" / f"{name}.bin").read_bytes() for name in ("raw", "raw2", "raw3")}
    assert len(digests) == 1, "alone, with workers and under mpirun: the same bytes"
    assert (copy / "sample.png").read_bytes().startswith(b"\x89PNG")
    assert (copy / "runs" / "demo" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "bits per byte" in (copy / "runs" / "demo" / "bits.svg").read_text(encoding="utf-8")
    assert "<svg" in (copy / "runs" / "demo" / "report.html").read_text(encoding="utf-8")
    losses = [
        json.loads(line)["loss"]
        for line in (copy / "runs" / "demo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        if json.loads(line)["kind"] == "validation"
    ]
    assert losses[0] > 7, "an untrained model of 2,048 ids: ln 2048 = 7.6"
    assert losses[-1] < 1, "the stories are learned"
    assert "18 layers" in out, "the plan"
    before, after, long_before, long_after = (
        int(right) for right in re.findall(r"^(?:before|after) +(\d+) of \d+ questions", out, re.MULTILINE)
    )
    assert (before, after > 100) == (0, True), "of 200"
    assert long_after > long_before + 10, "of 100"
    assert "the answer is empty" not in done.stderr
    assert "hashes, boundaries, ids, document ends are right" in out


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.timeout(2000)
def test_the_demo_after_its_long_stage_is_the_same_in_transformers(ran: tuple[Path, Finished], tmp_path: Path) -> None:
    """Questions of both stages, the second one longer than the first stage has positions."""
    asked = [conversation_of(kind.make(kind.trained)).conversation for kind in (SHORT, LONG)]
    answers = compare(ran[0] / "runs" / "demo-long", tmp_path / "hf", asked, ANSWER_TOKENS)
    assert all(answers), "the end of an answer is not all that it learned"
