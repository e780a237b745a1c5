"""Launches ranks behind lifelines that run a script instead of training; see `test_remote.py` and `test_srun.py`.

`python remote_driver.py SETTINGS` starts guards as srun does, or by srun itself.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from recipes import make_recipe

from megazh.cluster.launchers import remote, srun, supervisor
from megazh.cluster.launchers.srun import Srun
from megazh.cluster.launchers.transport import Transport
from megazh.training.job import Devices, Host, Launcher, Request, make_job
from megazh.training.recipe import Device

settings = json.loads(sys.argv[1])
for name, seconds in settings["seconds"].items():
    setattr(srun if name == "_BUSY_SECONDS" else supervisor, name, seconds)
GUARD = """
import sys
from pathlib import Path
from megazh.cluster.launchers import guard
from megazh.errors import MegazhError
from megazh.training.job import Launcher
guard._arguments = lambda folder: ["-c", sys.argv[2]]
try:
    sys.exit(guard.guard(Path("run"), Launcher.SRUN, sys.argv[1]))
except MegazhError as error:
    sys.exit(f"error: {error}")
"""
STARTER = """
import os, subprocess, sys
places = [(0, 0), (0, 1), (1, 0)]  # node, and place on it
started = [
    subprocess.Popen(
        [sys.executable, "-c", *sys.argv[1:]], env=os.environ | {"SLURM_NODEID": str(node), "SLURM_LOCALID": str(place)}
    )
    for node, place in places
]
sys.exit(max(process.wait() for process in started))
"""


class Here(Transport):
    name = Launcher.SRUN

    def command(self, job, attempt):
        return [sys.executable, "-c", settings["starter"] or STARTER, GUARD, attempt, settings["script"]]


slots = settings["slots"]
recipe = make_recipe(micro_batch_size=1, global_batch_size=12, hang_minutes=settings["hang_minutes"])
job = make_job(Request(), recipe, Path("run"), Path("."), Devices(Device.CPU, sum(slots), None))
job = replace(job, launcher=Launcher.SRUN, hosts=tuple(Host(f"n{at}", count) for at, count in enumerate(slots, 1)))
job.run.end = lambda code, reason: Path("end.json").write_text(json.dumps([code, reason]))
job.run.control.mkdir(parents=True, exist_ok=True, mode=0o700)


class Real(Srun):
    """srun itself; its tasks run guards with the script of the test."""

    def command(self, job, attempt):
        words = super().command(job, attempt)
        return [*words[: words.index(sys.executable) + 1], "-c", GUARD, attempt, settings["script"]]


sys.exit(remote.launch(job, Real() if settings["slurm"] else Here()))
