"""Check that the hosts of a job can be reached by ssh, and have what its ranks need, before anything is started."""

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import megazh
from megazh.errors import Collector, UsageError
from megazh.training.job import Host, Job

_SECONDS = 60.0
_CONNECT_SECONDS = 15
_PACKAGES = ("torch", "deepspeed")

# Runs on each host; prints one line of JSON.
_LOOK = """
import json, os, sys
from importlib.metadata import version
from importlib.util import find_spec
folder, config, *packages = sys.argv[1:]
sys.path.insert(0, folder)
spec = find_spec("megazh")
found = {"python": sys.version.split()[0], "megazh": spec and spec.origin, "run": os.path.isfile(config)}
for name in packages:
    try:
        found[name] = version(name)
    except Exception:
        found[name] = None
print("megazh-host " + json.dumps(found))
"""


def check_hosts(job: Job, hosts: Sequence[Host]) -> None:
    """Look at all hosts at once, by ssh.

    Raises:
        UsageError: a host cannot be reached, has another Python, PyTorch or DeepSpeed, or does not see this folder or
            the run folder; with the remedy.
    """
    found = Collector()
    with ThreadPoolExecutor(min(len(hosts), 64)) as pool:
        for error in pool.map(lambda host: _look(job, host.name), hosts):
            if error:
                found.add(UsageError(error))
    found.raise_all()


def _look(job: Job, host: str) -> str:
    """What is wrong with a host; empty if nothing is."""
    origin = Path(str(megazh.__file__))
    words = [sys.executable, "-P", "-c", _LOOK, str(origin.parents[1]), str(job.run.config.absolute()), *_PACKAGES]
    ssh = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_SECONDS}", host, shlex.join(words)]
    try:
        done = subprocess.run(ssh, stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS)
    except FileNotFoundError:
        return "ssh is not installed (Debian, Ubuntu: apt-get install openssh-client)"
    except subprocess.TimeoutExpired:
        return f"{host}: Python did not start there within {_SECONDS:.0f} s; try `ssh {host} {sys.executable} -V`"
    errors = [line.strip() for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
    words_of_it = f" ({errors[-1][:200]})" if errors else ""
    if done.returncode == 255:
        return f"{host}: cannot be reached by ssh{words_of_it}; `ssh {host} true` has to work without a password"
    if done.returncode in (126, 127):
        return (
            f"{host}: has no {sys.executable}; make the same environment there under the same path, or share the disk"
        )
    lines = [line for line in done.stdout.decode(errors="replace").splitlines() if line.startswith("megazh-host ")]
    try:
        seen = json.loads(lines[-1].partition(" ")[2])
        return _differs(job, host, {str(name): str(value) for name, value in seen.items()}, origin)
    except (IndexError, ValueError, AttributeError):
        return f"{host}: {sys.executable} does not run there{words_of_it}; make the same environment there"


def _differs(job: Job, host: str, seen: dict[str, str], origin: Path) -> str:
    """In what a host differs from this one; empty if in nothing."""
    here = sys.version.split()[0]
    # Bytecode and pickles of another minor version are not ours; a patch more or less is.
    if seen.get("python", "").split(".")[:2] != here.split(".")[:2]:
        python = f"{sys.executable} is Python {seen.get('python')}"
        return f"{host}: {python}, here it is {here}; make the same environment there"
    if seen.get("megazh") != str(origin):
        return f"{host}: does not have {origin.parent}; copy this folder there under the same path, or share the disk"
    for name in _PACKAGES:
        if seen.get(name) != version(name):
            return (
                f"{host}: {name} is {seen.get(name)}, here it is {version(name)}; make the same environment there "
                "(jobs/setup.sh)"
            )
    if seen.get("run") != "True":
        return (
            f"{host}: does not see {job.run.config.absolute()}; the run folder has to be on a disk that all hosts "
            "share (-r RUN)"
        )
    return ""
