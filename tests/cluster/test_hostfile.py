"""Hostfiles: the hosts in them, and the lines that are refused."""

import socket
from pathlib import Path

import pytest

from megazh.cluster.hostfile import Host, is_this_machine, read_hostfile
from megazh.errors import UsageError

HOSTFILES = Path(__file__).parents[2] / "hostfiles"


def test_the_one_that_comes_along_is_this_machine() -> None:
    hosts = read_hostfile(HOSTFILES / "local_6x3090")
    assert hosts == [Host("localhost", 6)]
    assert is_this_machine(hosts)


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu1 slots=6\ngpu2\n", ":2: expected a line such as 'gpu1 slots=6', found 'gpu2'"),
        ("gpu1 slots=six\n", ":1: expected a line"),
        ("gpu1 slots=6 slots=7\n", ":1: expected a line"),
        ("gpu1 slots=0\n", ":1: gpu1 has slots=0"),
        ("gpu1 slots=1\n\ngpu1 slots=1\n", ":3: gpu1 is named twice"),
        ("# nobody\n", ": no host in it"),
    ],
)
def test_what_is_no_hostfile_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        read_hostfile(path)
    assert f"{path}{message}" in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"-H .*/nowhere: no such file"):
        read_hostfile(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="cannot be read"):
        read_hostfile(tmp_path)
