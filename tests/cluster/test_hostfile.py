"""Hostfiles: the hosts in them, and the lines that are refused."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from megazh.cluster.hostfile import Host, is_this_machine, read_hostfile
from megazh.errors import UsageError

HOSTFILES = Path(__file__).parents[2] / "hostfiles"


def test_the_one_that_comes_along_is_this_machine() -> None:
    hosts = read_hostfile(HOSTFILES / "local_6x3090")
    assert hosts == [Host("localhost", 6)]
    assert is_this_machine(hosts)
    assert read_hostfile(HOSTFILES / "two_nodes") == [Host("gpu1", 6), Host("gpu2", 6)]


def test_comments_and_blank_lines_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# the lab\n\n  gpu1   slots=6  # new\ngpu2\tslots=4\n")
    hosts = read_hostfile(path)
    assert hosts == [Host("gpu1", 6), Host("gpu2", 4)]
    assert not is_this_machine(hosts)
    assert not is_this_machine(hosts[:1])


def test_this_machine_has_a_name() -> None:
    assert is_this_machine([Host(socket.gethostname(), 2)])
    assert not is_this_machine([Host("localhost", 2), Host("gpu2", 2)])


# What this reader and DeepSpeed's own find in a file: hosts, or a part of the refusal's line.
CASES: list[tuple[bytes, dict[str, int] | str]] = [
    (b"gpu1 slots=6\n", {"gpu1": 6}),
    (b"gpu1 slots=6\ngpu2 slots=4", {"gpu1": 6, "gpu2": 4}),
    (b"gpu1\t slots=6\t\n\n  gpu2\tslots=4   \n", {"gpu1": 6, "gpu2": 4}),
    (b"gpu1 slots=6\r\ngpu2 slots=4\r\n", {"gpu1": 6, "gpu2": 4}),
    (b"gpu1 slots=6\rgpu2 slots=4\r", {"gpu1": 6, "gpu2": 4}),
    (b"# the lab\n#\n  # two\ngpu1 slots=6 # new\ngpu2 slots=4#old\n", {"gpu1": 6, "gpu2": 4}),
    ("# 实验室\n".encode() + b"gpu-1.lab_a slots=06\n10.0.0.2 slots=1\n", {"gpu-1.lab_a": 6, "10.0.0.2": 1}),
    (b"GPU1 slots=1024\n", {"GPU1": 1024}),
    (b"gpu2 slots=1\ngpu1 slots=1\n", {"gpu2": 1, "gpu1": 1}),
    (b"", ": no host in it"),
    (b"# nobody\n\n", ": no host in it"),
    (b"gpu1 slots=6\ngpu2\n", ":2: expected a line such as 'gpu1 slots=6', found 'gpu2'"),
    (b"gpu1 slots=six\n", ":1: expected a line"),
    (b"gpu1 slots=6 slots=7\n", ":1: expected a line"),
    (b"gpu1 slots=6 max_slots=8\n", ":1: expected a line"),
    (b"gpu1 " * 5000 + b"\n", ":1: expected a line"),
    (b"gpu1 slots=6x\n", ":1: expected a line"),
    (b"gpu1 slots=6.5\n", ":1: expected a line"),
    (b"gpu1 slots=+3\n", ":1: expected a line"),
    (b"gpu1 slots=-3\n", ":1: expected a line"),
    (b"gpu1 slots = 3\n", ":1: expected a line"),
    (b"gpu1 Slots=3\n", ":1: expected a line"),
    (b"gpu1:6\n", ":1: expected a line"),
    (b"slots=6\n", ":1: expected a line"),
    (b"gpu1 gpu2 slots=6\n", ":1: expected a line"),
    ("gpu1 slots=６\n".encode(), ":1: expected a line"),
    ("gpu1\xa0slots=6\n".encode(), ":1: expected a line"),
    (b"gpu1 slots=6\x0cgpu2 slots=4\n", ":1: expected a line"),
    ("gpu1 slots=6\x85gpu2 slots=4\n".encode(), ":1: expected a line"),
    (b"gpu1#a slots=6\n", ":1: expected a line"),
    (b"gpu1 slots=0\n", ":1: gpu1 has slots=0"),
    (b"gpu1 slots=1025\n", ":1: gpu1 has slots=1025"),
    (b"gpu1 slots=" + b"9" * 99 + b"\n", ":1: gpu1 has slots=99999999999999999999;"),
    (b"gpu1 slots=1\n\ngpu1 slots=1\n", ":3: gpu1 is named twice"),
    (b"gpu1 slots=1\nGPU1 slots=1\n", ":2: GPU1 is named twice"),
    (b"fd00::1 slots=6\n", ":1: 'fd00::1' is not a host name; pdsh takes no IPv6 address"),
    (b"gpu1:22 slots=6\n", ":1: 'gpu1:22' is not a host name"),
    (b"me@gpu1 slots=6\n", ":1: 'me@gpu1' is not a host name; set `User`"),
    (b"gpu[1-2] slots=6\n", ":1: 'gpu[1-2]' is not a host name; give each host a line"),
    (b"gpu1,gpu2 slots=6\n", ":1: 'gpu1,gpu2' is not a host name"),
    (b"-oProxyCommand=id slots=6\n", ":1: '-oProxyCommand=id' is not a host name"),
    (b"^hosts slots=6\n", ":1: '^hosts' is not a host name"),
    (b"$(id) slots=6\n", ":1: '$(id)' is not a host name"),
    ("节点1 slots=6\n".encode(), ":1: '节点1' is not a host name"),
    ("\ufeffgpu1 slots=6\n".encode(), ":1: begins with a byte order mark"),
    ("gpu1 slots=6\n".encode("utf-16"), ":1: not UTF-8 text"),
    ("gpu1 slots=6\ngpu2 slots=6 # größer\n".encode("latin-1"), ":2: not UTF-8 text"),
    (b"\x00 slots=6\n", ":1: '\\x00' is not a host name"),
]


@pytest.fixture(scope="module")
def fetch_hostfile() -> Callable[[str], dict[str, int] | None]:
    """DeepSpeed's own reader."""
    from deepspeed.launcher.runner import fetch_hostfile

    return cast(Callable[[str], dict[str, int] | None], fetch_hostfile)


@pytest.mark.parametrize(("data", "expected"), CASES)
def test_deepspeed_reads_the_same_hosts_or_the_line_is_refused(
    tmp_path: Path, data: bytes, expected: dict[str, int] | str, fetch_hostfile: Callable[[str], dict[str, int] | None]
) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(data)
    if isinstance(expected, str):
        with pytest.raises(UsageError) as error:
            read_hostfile(path)
        assert f"{path}{expected}" in str(error.value)
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 1000
    else:
        hosts = read_hostfile(path)
        assert hosts == [Host(name, slots) for name, slots in expected.items()]
        theirs = fetch_hostfile(str(path))
        assert theirs is not None
        assert list(theirs.items()) == hosts


def test_deepspeed_reads_those_that_come_along(fetch_hostfile: Callable[[str], dict[str, int] | None]) -> None:
    for path in HOSTFILES.iterdir():
        theirs = fetch_hostfile(str(path))
        assert theirs is not None
        assert read_hostfile(path) == list(theirs.items())


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"-H .*/nowhere: no such file"):
        read_hostfile(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="cannot be read"):
        read_hostfile(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match="not a regular file"):
        read_hostfile(tmp_path / "fifo")
