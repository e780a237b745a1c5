"""The hosts that tests make: reached by ssh and pdsh, apart from this machine, and gone when a test run is killed."""

import signal
import socket
import sys
from pathlib import Path

import pytest
from processes import start_command, wait_until
from ssh_hosts import SshHosts, why_unavailable

pytestmark = [pytest.mark.ranks, pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable())]

_HOLD = """
import pathlib, sys, time
from ssh_hosts import SshHosts
with SshHosts("a", "b") as hosts:
    numbers = [hosts.processes(name, "sshd")[0] for name in hosts.names]
    pathlib.Path(sys.argv[1]).write_text(" ".join(map(str, numbers)))
    time.sleep(60)
"""


def test_hosts_reach_each_other_and_not_this_machine() -> None:
    names = Path("/etc/hosts").read_bytes()
    with SshHosts("node1", "node2") as hosts:
        said = hosts.run("node1", "ssh", "-o", "PasswordAuthentication=no", "node2", "hostname; hostname -I")
        assert (said.returncode, said.stdout.split()) == (0, ["node2", "10.90.0.2"]), said.stderr
        pdsh = ["env", "PDSH_RCMD_TYPE=ssh", "pdsh", "-S", "-N", "-w", "node1,node2", "echo %n $(hostname); exit 3"]
        said = hosts.run("node2", *pdsh)
        assert (said.returncode, sorted(said.stdout.splitlines())) == (3, ["0 node1", "1 node2"]), said.stderr
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            assert hosts.run("node1", "bash", "-c", f"exec 3<>/dev/tcp/127.0.0.1/{port}").returncode != 0
        with hosts.start("node1", ["sleep", "50"]) as running:
            assert wait_until(lambda: hosts.processes("node1", "sleep 50"), 10, "sleep runs")
            assert not hosts.processes("node2", "sleep 50")
            hosts.signal(running, signal.SIGTERM)
            assert running.wait(10).returncode == -signal.SIGTERM
    assert (names, socket.gethostname() in hosts.names) == (Path("/etc/hosts").read_bytes(), False)
    assert not hosts.folder.exists()


def test_nothing_stays_of_a_killed_test_run(tmp_path: Path) -> None:
    output = tmp_path / "processes"
    environment = {"PYTHONPATH": str(Path(__file__).parent), "TMPDIR": str(tmp_path)}
    with start_command([sys.executable, "-c", _HOLD, output], environment) as running:
        processes = wait_until(lambda: output.exists() and output.read_text().split(), 30, "hosts run")
        assert len(processes) == 2
        assert all(Path("/proc", process).exists() for process in processes)
        running.process.kill()
        running.process.wait()
        for process in processes:
            wait_until(lambda process=process: not Path("/proc", process).exists(), 10, f"process {process} ends")
