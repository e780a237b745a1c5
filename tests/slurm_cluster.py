"""A private Slurm cluster on this machine: two nodes with simulated CPUs and GPUs, without munge, systemd or root."""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

from processes import Finished, kill_marked

_START_SECONDS = 20.0
_STOP_SECONDS = 10.0
# Each node runs in a namespace with its own host name, so that `hostname` prints the node's name and jobs can resolve
# the names of all nodes.
_NODE_IN_NAMESPACE = 'mount --bind "$1" /etc/hosts && hostname "$2" && exec setpriv --pdeathsig KILL slurmd -D -N "$2"'


def why_unavailable() -> str:
    """Reason why no cluster can be started here; empty if one can."""
    missing = [name for name in ("slurmctld", "slurmd", "srun", "sbatch") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} missing (Debian: apt-get install slurm-wlm)"
    return ""


class SlurmCluster:
    """A cluster that runs until the `with` block ends.

    Its daemons listen on the loopback address only, since `auth/none` trusts every caller. Memory and CPUs are booked
    but not enforced. GPUs are links to /dev/null: a job gets CUDA_VISIBLE_DEVICES, but no device. Jobs of the partition
    `urgent` preempt those of the default one, which are requeued.

    Args:
        nodes: number of nodes; they are named n1, n2 and so on.
        gpus: GPUs per node, of type 3090.
        cpus: CPUs per node; an even number.

    Attributes:
        folder: folder of slurm.conf, logs and state; removed at the end.
        env: environment variables that commands need to find the cluster.
    """

    def __init__(self, nodes: int = 2, gpus: int = 7, cpus: int = 48) -> None:
        # Not below pytest's folder: slurmd's sockets lie here, and their paths may have 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self._gpus, self._cpus = gpus, cpus
        self._conf = self.folder / "slurm.conf"
        self.env = {"SLURM_CONF": str(self._conf)}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        try:
            self._configure()
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, *args: str | Path, timeout: float = 60.0, cwd: Path | None = None) -> Finished:
        """Run a command that finds the cluster: srun, sbatch, squeue, a script that calls them.

        Not by `run_command`, which marks processes by a variable and kills all that have it in the end: sbatch hands
        its environment on to the job. What a command leaves behind is killed when the cluster stops.
        """
        words, environment = [str(arg) for arg in args], {**os.environ, **self.env}
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, env=environment, cwd=cwd
        )
        return Finished(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))

    def wait_job(self, job: str, timeout: float = 60.0) -> str:
        """Wait until a job has ended; returns its state, such as COMPLETED or FAILED."""
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
        return self.wait_job_state(job, *ended, timeout=timeout)

    def wait_job_state(self, job: str, *states: str, timeout: float = 60.0) -> str:
        """Wait until a job is in one of the states; returns it."""
        deadline = time.monotonic() + timeout
        state = ""
        while time.monotonic() < deadline:
            # `sbatch --wait` would look only every ten seconds.
            state = self.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").stdout.strip()
            if state in states:
                return state
            time.sleep(0.2)
        raise AssertionError(f"job {job} is {state or 'unknown'} after {timeout} s")

    def stop(self) -> None:
        """Cancel all jobs, end the daemons and all that they started, and remove the folder."""
        with contextlib.suppress(Exception):
            if self._daemons and all(daemon.poll() is None for daemon in self._daemons):
                self._cancel_all()
        for daemon in self._daemons:
            daemon.terminate()
        deadline = time.monotonic() + _STOP_SECONDS
        for daemon in self._daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(max(deadline - time.monotonic(), 0.1))
            if daemon.poll() is None:
                daemon.send_signal(signal.SIGKILL)
                daemon.wait()
        self._daemons.clear()
        kill_marked(f"SLURM_CONF={self._conf}")
        shutil.rmtree(self.folder, ignore_errors=True)

    def _cancel_all(self) -> None:
        self.run("scancel", "--user", getpass.getuser(), timeout=10)
        deadline = time.monotonic() + _STOP_SECONDS
        while self.run("squeue", "-h", timeout=10).stdout and time.monotonic() < deadline:
            time.sleep(0.1)

    def _configure(self) -> None:
        folder, user, names = self.folder, getpass.getuser(), f"n[1-{len(self.nodes)}]"
        for name in ("log", "state", "dev"):
            (folder / name).mkdir()
        for node in self.nodes:
            (folder / "spool" / node).mkdir(parents=True)
            (folder / "tmp" / node).mkdir(parents=True)
        for number in range(self._gpus):
            # Slurm requires a device file per GPU, and takes the GPU's index from the number in the name.
            (folder / "dev" / f"nvidia{number}").symlink_to("/dev/null")
        hosts = Path("/etc/hosts").read_text() if Path("/etc/hosts").exists() else "127.0.0.1 localhost\n"
        (folder / "hosts").write_text(f"{hosts.rstrip()}\n127.0.0.1 {' '.join(self.nodes)}\n")
        controller, *ports = _free_ports(1 + len(self.nodes))
        settings = {
            "ClusterName": "test",
            "SlurmctldHost": "localhost",
            "SlurmctldPort": controller,
            "SlurmUser": user,
            "SlurmdUser": user,
            "AuthType": "auth/none",
            "CredType": "cred/none",
            "AuthInfo": "cred_expire=5",  # a requeued job waits this long; the default is two minutes
            "CommunicationParameters": "NoCtldInAddrAny,NoInAddrAny",
            "StateSaveLocation": folder / "state",
            "SlurmdSpoolDir": folder / "spool" / "%n",
            "TmpFS": folder / "tmp" / "%n",
            "SlurmctldPidFile": folder / "slurmctld.pid",
            "SlurmdPidFile": folder / "slurmd.%n.pid",
            "SlurmctldLogFile": folder / "log" / "slurmctld",
            "SlurmdLogFile": folder / "log" / "slurmd.%n",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "AccountingStorageType": "accounting_storage/none",
            "JobCompType": "jobcomp/none",
            "MailProg": "/bin/true",
            "MpiDefault": "pmi2",
            "ReturnToService": 2,
            "KillWait": 5,
            "SlurmdParameters": "config_overrides",  # trust the numbers of CPUs and memory below
            "SchedulerType": "sched/backfill",
            "SchedulerParameters": "batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core_Memory",
            "DefMemPerCPU": 100,
            "GresTypes": "gpu",
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
        }
        lines = [f"{key}={value}" for key, value in settings.items()]
        for node, port in zip(self.nodes, ports, strict=True):
            lines.append(
                f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={self._cpus} Boards=1 "
                f"SocketsPerBoard=2 CoresPerSocket={self._cpus // 2} ThreadsPerCore=1 RealMemory=250000 "
                f"Gres=gpu:3090:{self._gpus}"
            )
        common = f"Nodes={names} MaxTime=7-00:00:00 State=UP"
        lines.append(f"PartitionName=gpu {common} Default=YES PriorityTier=1")
        lines.append(f"PartitionName=urgent {common} PriorityTier=2")
        self._conf.write_text("\n".join(lines) + "\n")
        last = self._gpus - 1
        (folder / "gres.conf").write_text(
            f"NodeName={names} Name=gpu Type=3090 File={folder}/dev/nvidia[0-{last}]\n" if self._gpus else ""
        )

    def _start(self) -> None:
        # The daemons get SIGKILL when this process dies, so that a killed test run leaves none behind.
        dying_along = ["setpriv", "--pdeathsig", "KILL"]
        self._spawn([*dying_along, "slurmctld", "-D", "-c", "-i"])
        namespace = _namespace()
        for node in self.nodes:
            if namespace:
                hosts = str(self.folder / "hosts")
                self._spawn([*namespace, "bash", "-c", _NODE_IN_NAMESPACE, "bash", hosts, node])
            else:
                self._spawn([*dying_along, "slurmd", "-D", "-N", node])
        deadline = time.monotonic() + _START_SECONDS
        states: list[str] = []
        while time.monotonic() < deadline:
            states = self.run("sinfo", "-h", "-N", "-p", "gpu", "-o", "%T", timeout=30).stdout.split()
            if states == ["idle"] * len(self.nodes):
                return
            time.sleep(0.1)
        logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted((self.folder / "log").iterdir()))
        raise AssertionError(f"the nodes are {states} after {_START_SECONDS} s\n{logs}")

    def _spawn(self, args: list[str]) -> None:
        with open(self.folder / "log" / "output", "ab") as log:
            self._daemons.append(
                subprocess.Popen(
                    args,
                    env={**os.environ, **self.env},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )


def _namespace() -> list[str]:
    """Command prefix that gives a node its own host name and hosts file; empty if the kernel refuses it."""
    for options in (["--mount", "--uts"], ["--user", "--map-current-user", "--keep-caps", "--mount", "--uts"]):
        command = ["unshare", *options]
        if subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    return []


def _free_ports(count: int) -> list[int]:
    """Ports on the loopback address that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
