"""`slurm/finetune_6x3090.sh` on a private Slurm cluster: its resources, and the command that it starts."""

import sys
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster

SCRIPT = Path(__file__).parents[1] / "slurm" / "finetune_6x3090.sh"
RECORDER = f"""#!/bin/bash
[[ $1 == - ]] && exec {sys.executable} "$@"
printf '%s\\n' "$CUDA_VISIBLE_DEVICES" "$@" > arguments
"""


@pytest.mark.slurm
def test_it_takes_six_gpus_and_later_options_count(slurm: SlurmCluster, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(RECORDER)
    python.chmod(0o755)
    more = ["-t", "long_context", "-c", "longlora_qwen0.5b_6x3090"]
    export = f"--export=ALL,MEGAZH_PYTHON={python}"
    submitted = slurm.run("sbatch", "--parsable", export, SCRIPT, *more, cwd=tmp_path)
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.strip()
    assert slurm.wait_job(job) == "COMPLETED", (tmp_path / f"slurm-finetune-{job}.out").read_text()
    visible, *arguments = (tmp_path / "arguments").read_text().splitlines()
    assert visible == "0,1,2,3,4,5"
    first = ["-t", "normal", "-c", "sft_qwen0.5b_6x3090"]
    assert arguments == ["-P", "-m", "megazh", "finetune", *first, *more]
