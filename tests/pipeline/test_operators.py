"""DeepSpeed without a compiler."""

import os
import sys
from pathlib import Path

import pytest
from processes import run_command

RANK = """
import os
from megazh.pipeline.operators import use_no_compiled_operators
use_no_compiled_operators()
import deepspeed, torch
deepspeed.init_distributed("gloo")
sums = torch.ones(3) * (1 + int(os.environ["RANK"]))
deepspeed.comm.all_reduce(sums)
print(sums.tolist())
torch.distributed.destroy_process_group()
"""
LAUNCH = "import sys; from pathlib import Path; from megazh.cluster.launch import run_local; "


@pytest.mark.slow
def test_ranks_reduce_without_a_compiler(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    run = LAUNCH + "sys.exit(run_local([sys.argv[1]], 2, {}, None, Path('logs')))"
    # What would be compiled would go to this folder; and no compiler is found.
    environment = {
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        "PATH": "/nowhere",
        "CXX": "/nowhere/c++",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    finished = run_command([sys.executable, "-c", run, tmp_path / "rank.py"], 120, environment, tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[-1] == "[3.0, 3.0, 3.0]"
    assert (tmp_path / "logs" / "rank_1.log").read_text().splitlines()[-1] == "[3.0, 3.0, 3.0]"
    assert not (tmp_path / "extensions").exists()
