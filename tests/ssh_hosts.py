"""Hosts of a network of their own on this machine: network namespaces with real sshd, reached by real ssh and pdsh."""

import contextlib
import getpass
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

from processes import Finished, Running, run_command, start_command, wait_until

_START_SECONDS = 20.0
_TOOLS = {"sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh", "ip": "iproute2", "nsenter": "util-linux"}
_ORDINARY_USER = ["--user", "--map-current-user", "--keep-caps"]

# The network: a bridge that each host joins. Descriptor 9 names the bridge's namespace to the hosts.
_NETWORK = """
folder=$1 host=$2; shift 2
ip link add net0 type bridge && ip link set net0 up || exit
exec 9< /proc/self/ns/net
number=0
for name; do
    number=$((number + 1))
    unshare --net --mount --uts --pid --fork --kill-child --mount-proc bash -c "$host" bash "$folder" "$name" $number &
done
wait
"""

# A host: its own address, name, /etc/hosts, /etc/ssh, /run and /dev/shm, and sshd. As on Debian, its own name stands
# for a loopback address.
_HOST = """
folder=$1 name=$2 number=$3
ip link add eth0 type veth peer name "to$number" netns /proc/self/fd/9 &&
    nsenter --net=/proc/self/fd/9 ip link set "to$number" master net0 up && exec 9<&- &&
    ip link set lo up && ip address add "10.90.0.$number/24" dev eth0 && ip link set eth0 up &&
    hostname "$name" && { echo "127.0.0.1 localhost"; echo "127.0.1.1 $name"; cat "$folder/names"; } \
        > "$folder/$name.hosts" &&
    mount --bind "$folder/$name.hosts" /etc/hosts && mount --bind "$folder/ssh" /etc/ssh &&
    mount -t tmpfs none /run && mkdir -m 755 /run/sshd && mount -t tmpfs -o mode=1777 none /dev/shm || exit
[ $(id -u) != 0 ] || mount --bind "$folder/shadow" /etc/shadow || exit
[ ! -d ~/.ssh ] || mount -t tmpfs none ~/.ssh || exit
"$(command -v sshd)" -D -e &
wait
"""

_SSHD = """
AuthorizedKeysFile /etc/ssh/key.pub
HostKey /etc/ssh/key
PermitRootLogin yes
PasswordAuthentication no
StrictModes no
UsePAM no
UseDNS no
PidFile none
MaxStartups 100
"""
_SSH = "IdentityFile /etc/ssh/key\nStrictHostKeyChecking yes\nGlobalKnownHostsFile /etc/ssh/ssh_known_hosts\n"


def why_unavailable() -> str:
    """Reason why no hosts can be made here; empty if they can."""
    missing = [package for tool, package in _TOOLS.items() if shutil.which(tool, path=_path()) is None]
    if missing:
        return f"hosts need {', '.join(missing)} (Debian: apt-get install {' '.join(missing)})"
    namespaces = ["--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc"]
    script = "ip link add net0 type bridge && ip link add one type veth peer name two && mount -t tmpfs none /run"
    tried = subprocess.run(
        ["unshare", *_user(), *namespaces, "sh", "-c", script], capture_output=True, text=True, env=_environment()
    )
    return f"namespaces with a network are refused: {tried.stderr.strip()}" if tried.returncode else ""


class SshHosts:
    """Hosts that run until the `with` block ends; also when this process is killed, none of their processes stays.

    Each has a name, an address 10.90.0.N, processes and shared memory of its own, and sshd with a key made for them.
    They share the disk, as hosts with a network file system do; `run(host, "mount", ...)` changes what one of them
    sees. The network, /etc and ~/.ssh of this machine are not touched.

    Args:
        names: names of the hosts.

    Attributes:
        folder: folder with the keys and /etc/hosts of the hosts, and `log`; removed at the end.
    """

    def __init__(self, *names: str) -> None:
        self.names = names
        self.folder = Path(tempfile.mkdtemp(prefix="hosts-"))
        self._processes: dict[str, int] = {}
        self._network: subprocess.Popen[bytes] | None = None

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

    def hostfile(self, path: Path, slots: int, names: Sequence[str] = ()) -> Path:
        """Write a hostfile with `slots` for each of the hosts `names`; default: for all."""
        path.write_text("".join(f"{name} slots={slots}\n" for name in names or self.names))
        return path

    def run(self, host: str, *args: str | Path, timeout: float = 60.0, cwd: Path | None = None) -> Finished:
        """Run a command on a host, with the rights to mount and to change its network."""
        return run_command(self._entered(host, args, cwd), timeout, _environment())

    @contextlib.contextmanager
    def start(
        self,
        host: str,
        args: Sequence[str | Path],
        env: Mapping[str, str | None] | None = None,
        cwd: Path | None = None,
    ) -> Iterator[Running]:
        """Start a command on a host, as a person at its terminal does; see `processes.start_command` and `signal`."""
        with start_command(self._entered(host, args, cwd), {**_environment(), **(env or {})}) as running:
            yield running

    def signal(self, running: Running, number: signal.Signals) -> None:
        """Send a signal to the command that `start` has started."""
        children = Path(f"/proc/{running.process.pid}/task/{running.process.pid}/children")
        for child in children.read_text().split():
            os.kill(int(child), number)

    def processes(self, host: str, words: str) -> list[int]:
        """Ids, on this machine, of the processes of a host that have `words` in their command line."""
        namespace = os.readlink(f"/proc/{self._processes[host]}/ns/pid")
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):  # it has ended meanwhile, or belongs to another user
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if words in command and os.readlink(entry / "ns" / "pid") == namespace:
                        found.append(int(entry.name))
        return sorted(found)

    def stop(self) -> None:
        """Kill all processes of all hosts, and remove the folder."""
        if self._network is not None:
            self._network.kill()  # its child, process 1 of all hosts, dies with it
            self._network.wait()
        for process in self._processes.values():
            wait_until(lambda process=process: not Path(f"/proc/{process}").exists(), 10, f"process {process} ends")
        self._processes.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _configure(self) -> None:
        ssh = self.folder / "ssh"
        ssh.mkdir()
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", ssh / "key"], check=True)
        (ssh / "sshd_config").write_text(_SSHD)
        (ssh / "ssh_config").write_text(_SSH)
        addresses = {name: f"10.90.0.{number}" for number, name in enumerate(self.names, 1)}
        key = (ssh / "key.pub").read_text()
        (ssh / "ssh_known_hosts").write_text("".join(f"{name},{where} {key}" for name, where in addresses.items()))
        (self.folder / "names").write_text("".join(f"{where} {name}\n" for name, where in addresses.items()))
        # sshd lets nobody in whose account is locked, as root's may be here.
        (self.folder / "shadow").write_text(f"{getpass.getuser()}:*:20000:0:99999:7:::\nsshd:*:20000:0:99999:7:::\n")

    def _start(self) -> None:
        unshare = ["unshare", *_user(), "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = ["setpriv", "--pdeathsig", "KILL", *unshare, "bash", "-c", _NETWORK, "bash"]
        with open(self.folder / "log", "ab") as log:
            self._network = subprocess.Popen(
                [*command, str(self.folder), _HOST, *self.names],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        for name in self.names:
            self._processes[name] = wait_until(
                lambda name=name: self._first_process(name), _START_SECONDS, f"{name} runs"
            )
        for name in self.names:
            wait_until(lambda name=name: self._listens(name), _START_SECONDS, f"{name} answers")

    def _first_process(self, name: str) -> int:
        """Process 1 of a host, as this machine numbers it; 0: not yet there."""
        assert self._network is not None
        if self._network.poll() is not None:
            raise AssertionError(f"no hosts: {(self.folder / 'log').read_text()}")
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
                if words[:2] == [b"bash", b"-c"] and words[4:6] == [str(self.folder).encode(), name.encode()]:
                    return int(entry.name)
        return 0

    def _listens(self, name: str) -> bool:
        return "LISTEN" in self.run(name, "ss", "-Hltn", "sport = 22").stdout

    def _entered(self, host: str, args: Sequence[str | Path], cwd: Path | None) -> list[str | Path]:
        """A command, to be run on a host."""
        user = ["--user", "--preserve-credentials"] if _user() else []
        enter = ["nsenter", "--target", str(self._processes[host]), *user, "--mount", "--uts", "--net", "--pid"]
        return [*enter, "env", "-C", cwd or Path.cwd(), *args]


def _user() -> list[str]:
    """Options of unshare by which an ordinary user may make namespaces."""
    return [] if os.geteuid() == 0 else _ORDINARY_USER


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": _path()}
