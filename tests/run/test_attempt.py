"""What a run records of an attempt: the commit of a checkout, and nothing where there is none."""

import shutil
import subprocess
from pathlib import Path

import pytest

from megazh.run import attempt


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit_and_changes_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NAME": "a", "EMAIL": "a@b"}.items():
        for who in ("AUTHOR", "COMMITTER"):
            monkeypatch.setenv(f"GIT_{who}_{name}", value)
    file = tmp_path / "file"
    file.write_text("one")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-qm", "one"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    commit, changed = attempt._commit(tmp_path)
    assert commit is not None
    assert (len(commit), changed) == (40, False)
    (tmp_path / "untracked").write_text("data")
    assert attempt._commit(tmp_path) == (commit, False), "runs and data beside the code are no change"
    file.write_text("two")
    assert attempt._commit(tmp_path) == (commit, True)
    (tmp_path / "below").mkdir()
    assert attempt._commit(tmp_path / "below") == (None, None), "an installation inside of another checkout"


def test_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert attempt._commit(tmp_path) == (None, None)
    assert attempt.this_attempt({}).versions["megazh"]


def test_words_that_are_not_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.orig_argv", ["megazh", "\udcd6\udcd0", "中"])
    found = attempt.this_attempt({})
    assert "中" in found.command
    assert "\\udcd6" in found.model_dump_json()
