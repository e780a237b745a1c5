"""A run on a disk that is really full: a small file system of its own, which later gets room."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from processes import run_command
from recipes import in_sections

from megazh.errors import UsageError, WorkerError
from megazh.run.metrics import read_metrics

ROOT = Path(__file__).parents[2]
# In a namespace of its own, so that no right is needed to mount. Each start writes its exit code and its output.
SCRIPT = """
set -eu
mount -t tmpfs -o size=25m tmpfs disk
cd disk
for attempt in 1 2 3; do
    if [ $attempt = 3 ]; then # room for one more, which a save that was killed has taken
        mount -o remount,size=35m .
        mkdir -p run/checkpoints/.step_00000006.unfinished/weights
        head -c 50m /dev/zero > run/checkpoints/.step_00000006.unfinished/weights/left 2> ../ignored || true
    fi
    code=0
    "$@" > "../out.$attempt" 2> "../err.$attempt" || code=$?
    echo "$code" > "../code.$attempt"
    ls -A run/checkpoints > "../checkpoints.$attempt"
done
cp run/metrics.jsonl ..
"""
RECIPE = {
    "model": {
        "vocab_size": 512,
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 352,
    },
    "seq_len": 64,
    "micro_batch_size": 2,
    "global_batch_size": 4,
    "steps": 6,
    "learning_rate": 1e-3,
    "warmup": 2,
    "dtype": "bf16",
    "checkpoint_every": 2,
    "keep_last": 0,
    "validate_every": 0,
    "validation_samples": 2,
    "sample_every": 0,
    "sample_tokens": 2,
}


def can_mount() -> bool:
    """Whether this system lets its users mount file systems in namespaces of their own."""
    try:
        done = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True)
    except FileNotFoundError:
        return False
    return done.returncode == 0


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not can_mount(), reason="no file system can be mounted here")
def test_a_full_disk_is_one_line_leaves_nothing_unfinished_and_the_same_command_resumes(
    stories: Path, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(in_sections({**RECIPE, "data": {"manifest": str(stories)}})))
    command = [sys.executable, "-m", "megazh", "pretrain", "-c", tmp_path / "recipe.yaml", "-r", "run"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    words = ["unshare", "-rm", "bash", "-c", SCRIPT, "bash", *command, "--device", "cpu", "-n", "1", "-p", "1"]
    finished = run_command(words, 240, {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, tmp_path)
    assert finished.returncode == 0, finished
    codes, lines, checkpoints = [], [], []
    for attempt in "123":
        codes.append(int((tmp_path / f"code.{attempt}").read_text()))
        err = (tmp_path / f"err.{attempt}").read_text()
        lines.append([line for line in err.splitlines() if line.startswith("error: ")])
        checkpoints.append((tmp_path / f"checkpoints.{attempt}").read_text().split())
    assert codes == [WorkerError.exit_code, UsageError.exit_code, 0], lines
    (line,) = lines[0]
    assert "/disk/run/checkpoints/step_00000006: cannot be written: No space left on device (" in line
    assert " MB needed, " in line
    assert " free); earlier checkpoints are whole: make room on its disk, then run the same command again" in line
    (line,) = lines[1]
    assert "1 checkpoint of " in line, "now it is known before the start"
    whole = ["step_00000002", "step_00000004"]
    assert checkpoints == [whole, whole, [*whole, "step_00000006"]], "nothing unfinished is left"
    assert "resumed at step 4 of 6" in (tmp_path / "out.3").read_text()
    steps = [record["step"] for record in read_metrics(tmp_path) if record["kind"] == "step"]
    assert steps == [1, 2, 3, 4, 5, 6]
