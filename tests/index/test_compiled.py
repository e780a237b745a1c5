"""Compiled functions work with any cache: a full one, a damaged one, or none."""

import errno
from collections.abc import Callable
from pathlib import Path

import numba
import pytest
from numba.core.caching import CompileResultCacheImpl, IndexDataCacheFile

from megazh.index import compiled as module
from megazh.index.compiled import compiled


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for numba's cache."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "numba"))
    monkeypatch.setenv("MEGAZH_WARNED", "")
    return tmp_path / "numba"


def doubled() -> Callable[[int], int]:
    """A new compiled function."""

    @compiled()
    def double(number: int) -> int:
        return 2 * number

    return double


def test_it_is_kept_for_the_next_process(cache: Path) -> None:
    assert doubled()(3) == 6
    assert len(list(cache.rglob("*.nbc"))) == 1
    again = doubled()
    assert again(4) == 8
    assert again.stats.cache_hits  # type: ignore[attr-defined]


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize("content", [b"", b"\x80", b"not a pickle"])
def test_a_damaged_cache_is_no_error(cache: Path, suffix: str, content: bytes) -> None:
    assert doubled()(3) == 6
    for path in cache.rglob(f"*.{suffix}"):
        path.write_bytes(content)
    assert doubled()(5) == 10


def test_a_full_disk_is_one_warning(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(IndexDataCacheFile, "save", full)
    assert [doubled()(3), doubled()(4)] == [6, 8]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {cache}/")
    assert "No space left on device; nothing is kept there: results are the same" in line


def test_without_a_place_it_is_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CompileResultCacheImpl, "_locator_classes", [])
    monkeypatch.setattr(module, "own_folder", lambda name: None)
    assert doubled()(3) == 6
