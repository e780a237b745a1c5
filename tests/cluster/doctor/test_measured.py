"""Measured links in the cache, for plans."""

from pathlib import Path

import pytest

from megazh.cluster.doctor import measured
from megazh.cluster.doctor.report import Found, Pair, Report
from megazh.errors import UsageError

LINK = Pair(first="GPU 0", second="GPU 1", send_gb_s=6.25, all_reduce_gb_s=5.0)
FASTER = Pair(first="GPU 0", second="GPU 2", send_gb_s=12.0, all_reduce_gb_s=9.0)
NETWORK = Pair(first="a", second="b", send_gb_s=1.1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test alone."""
    monkeypatch.setattr(measured, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr("socket.gethostname", lambda: "a")
    return tmp_path


def report(host: str, *pairs: Pair) -> Report:
    """A report with these links."""
    found = Found()
    found.pairs += pairs
    return found.report(host, 1.0)


def test_the_slowest_pair_counts_and_hosts_do_not_mix() -> None:
    measured.keep([report("a", LINK, FASTER), report("b", FASTER)], [NETWORK])
    assert measured.measured(True)[:2] == (6.25, 1.1)
    assert measured.measured(host="b")[:2] == (12.0, 1.1)
    measured.keep([report("a")], [])
    assert measured.measured(True)[:2] == (6.25, 1.1), "an examination that measures nothing forgets nothing"


def test_what_is_missing_or_damaged_is_refused(cache: Path) -> None:
    with pytest.raises(UsageError, match="run 'megazh doctor' here first"):
        measured.measured()
    measured.keep([report("a", LINK)], [])
    assert measured.measured().gpus == 6.25
    with pytest.raises(UsageError, match="--hostfile"):
        measured.measured(between_hosts=True)
    (note,) = (cache / "doctor").iterdir()
    for damaged in ("", "[]", "{}", note.read_text().replace("6.25", '"fast"')):
        note.write_text(damaged)
        with pytest.raises(UsageError, match="no links between GPUs"):
            measured.measured()
