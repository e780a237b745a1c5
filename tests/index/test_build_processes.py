"""Building an index with real processes: equal bytes for any number, kills, full disks, two builds at once."""

import json
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from textdata import (
    QWEN_RANKS,
    SHARED,
    finish,
    gz,
    index_bytes,
    is_one_line_error,
    json_lines,
    kill_group,
    megazh,
    running,
    start_megazh,
    texts,
    tokenizer_path,
    write_arrow,
    write_parquet,
    zst,
)

from megazh.errors import UsageError
from megazh.index.reader import IndexedDataset
from megazh.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow  # all together


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of every format, most of them long enough for several pieces, with some bad lines."""
    folder = tmp_path_factory.mktemp("mixed")
    documents = texts(9000, 21)
    lines = json_lines(documents).splitlines(keepends=True)
    for number in range(0, 9000, 997):
        lines[number] = [b"broken\n", b'{"text": "\xff"}\n', b'{"text": ""}\n', b"\n"][number // 997 % 4]
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"".join(lines))
    (folder / "b.jsonl.gz").write_bytes(gz(b"".join(lines[:6000]), 5))
    (folder / "c.jsonl.zst").write_bytes(zst(b"".join(lines[3000:]), 5))
    rows: list[str | None] = [None if number % 2500 == 9 else text for number, text in enumerate(documents)]
    write_parquet(folder / "d.parquet", rows, 700)
    write_arrow(folder / "e.arrow", rows[:5000], rows=700)
    write_arrow(folder / "f.arrow", rows[5000:], stream=True, rows=700)
    (folder / "g.txt").write_text("\n\n".join(documents[:50]), encoding="utf-8")
    (folder / "h.txt.gz").write_bytes(gz("\n\n".join(documents[50:100]).encode(), 2))
    (folder / "i.txt").write_bytes(b"\xfe\xfe")  # no encoding has this
    return folder


def arguments(source: Path, output: Path, *more: object) -> tuple[object, ...]:
    return ("index", "build", "--input", source, "--tokenizer", tokenizer_path(), "--output", output, *more)


@pytest.fixture(scope="module")
def whole(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The index of `mixed`, built by one process."""
    prefix = tmp_path_factory.mktemp("whole") / "x"
    code, _, err = megazh(*arguments(mixed, prefix, "--workers", 1, "--max-bad", "1%"))
    assert (code, err) == (0, "")
    return index_bytes(prefix)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Input of about 24 pieces: enough time to interfere with the build."""
    path = tmp_path_factory.mktemp("large") / "large.jsonl"
    once = json_lines(texts(6000, 22))
    with open(path, "wb") as file:
        for number in range(24 * 2**20 // len(once)):
            file.write(json_lines([f"round {number}"]) + once)
    return path


@pytest.fixture(scope="module")
def large_whole(large: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    prefix = tmp_path_factory.mktemp("whole") / "x"
    assert megazh(*arguments(large, prefix, "--workers", 2))[0] == 0
    return index_bytes(prefix)


def wait_until(condition: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.002)


def pieces(prefix: Path) -> list[Path]:
    return list(Path(f"{prefix}.build").glob("*.piece"))


def children(pid: int) -> Iterator[int]:
    """Ids of the worker processes of a build, which are its only children."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        yield from map(int, (task / "children").read_text().split())


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def resumed(out: str) -> int:
    """Number of kept pieces according to the summary."""
    lines = [line.split() for line in out.splitlines() if line.startswith("resumed")]
    return int(lines[0][1].replace(",", "")) if lines else 0


@pytest.mark.parametrize("workers", [2, 3])
def test_worker_processes_give_the_same_bytes(
    mixed: Path, whole: dict[str, bytes], tmp_path: Path, workers: int
) -> None:
    code, out, err = megazh(*arguments(mixed, tmp_path / "x", "--workers", workers, "--max-bad", "1%"))
    assert (code, err) == (0, "")
    assert index_bytes(tmp_path / "x") == whole
    assert f"built with {workers} workers" in (tmp_path / "x.log").read_text(encoding="utf-8")
    assert "checked against the reference" in out


def test_the_mixed_corpus_is_what_it_should_be(whole: dict[str, bytes]) -> None:
    entries = [json.loads(line) for line in whole[".rejected.jsonl"].splitlines()]
    by_file = {
        name: [e["line"] for e in entries if e["file"] == name] for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst")
    }
    bad = [number + 1 for number in range(0, 9000, 997) if number // 997 % 4 < 2]
    assert by_file["a.jsonl"] == bad
    assert by_file["b.jsonl.gz"] == [number for number in bad if number <= 6000]
    assert by_file["c.jsonl.zst"] == [number - 3000 for number in bad if number > 3000]
    assert [(e["file"], e["line"]) for e in entries if e["file"][0] in "def"] == [
        ("d.parquet", 10),
        ("d.parquet", 2510),
        ("d.parquet", 5010),
        ("d.parquet", 7510),
        ("e.arrow", 10),
        ("e.arrow", 2510),
        ("f.arrow", 10),
        ("f.arrow", 2510),
    ]
    assert json.loads(whole[".json"])["dtype"] == "uint16"


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_build_goes_on_with_what_was_finished(
    large: Path, large_whole: dict[str, bytes], tmp_path: Path, workers: int
) -> None:
    kept = 0
    for least in (2, 9):
        with running(*arguments(large, tmp_path / "x", "--workers", workers)) as process:
            wait_until(lambda least=least: len(pieces(tmp_path / "x")) >= least or process.poll() is not None)
            assert process.poll() is None, "was done before it could be killed"
        assert not (tmp_path / "x.idx").exists()
        assert len(pieces(tmp_path / "x")) >= max(kept, least)
        kept = len(pieces(tmp_path / "x"))
    code, out, err = megazh(*arguments(large, tmp_path / "x", "--workers", 3 - workers))
    assert (code, err) == (0, "")
    assert resumed(out) == kept
    assert index_bytes(tmp_path / "x") == large_whole
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"x.{end}" for end in ("bin", "idx", "docs", "json", "log", "tokenizer.json")
    )


def test_second_build_of_the_same_prefix_is_refused(large: Path, large_whole: dict[str, bytes], tmp_path: Path) -> None:
    process = start_megazh(*arguments(large, tmp_path / "x", "--workers", 1))
    try:
        wait_until(lambda: len(pieces(tmp_path / "x")) > 1)
        os.killpg(process.pid, signal.SIGSTOP)
        code, out, err = megazh(*arguments(large, tmp_path / "x", "--restart"))
        assert (code, out) == (4, "")
        assert is_one_line_error(err, tmp_path / "x", f"process {process.pid}")
        os.killpg(process.pid, signal.SIGCONT)
        assert finish(process)[0] == 0
    finally:
        kill_group(process)
    assert index_bytes(tmp_path / "x") == large_whole


def test_killed_worker_ends_the_build_and_the_next_run_goes_on(
    large: Path, large_whole: dict[str, bytes], tmp_path: Path
) -> None:
    process = start_megazh(*arguments(large, tmp_path / "x", "--workers", 2))
    wait_until(lambda: len(pieces(tmp_path / "x")) > 1)
    os.kill(next(children(process.pid)), signal.SIGKILL)
    code, out, err = finish(process)
    assert (code, out) == (5, "")
    assert is_one_line_error(err, "worker", "run the command again"), err
    assert not (tmp_path / "x.idx").exists()
    code, out, _ = megazh(*arguments(large, tmp_path / "x", "--workers", 2))
    assert code == 0
    assert resumed(out) > 1
    assert index_bytes(tmp_path / "x") == large_whole


def test_workers_vanish_with_a_killed_parent(large: Path, tmp_path: Path) -> None:
    process = start_megazh(*arguments(large, tmp_path / "x", "--workers", 2))
    try:
        wait_until(lambda: len(pieces(tmp_path / "x")) > 1)
        workers = list(children(process.pid))
        assert len(workers) == 2
        os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: not any(map(is_alive, workers)), 15)
    finally:
        kill_group(process)
        process.communicate()


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_is_one_line_and_the_next_run_goes_on(
    large: Path, large_whole: dict[str, bytes], tmp_path: Path, workers: int
) -> None:
    process = start_megazh(*arguments(large, tmp_path / "x", "--workers", workers))
    wait_until(lambda: len(pieces(tmp_path / "x")) > 2)
    os.killpg(process.pid, signal.SIGINT)
    code, out, err = finish(process)
    assert (code, out) == (130, "")
    assert len(err.strip().splitlines()) == 1, err
    assert "run the same command again" in err
    code, out, _ = megazh(*arguments(large, tmp_path / "x", "--workers", workers))
    assert code == 0
    assert resumed(out) > 2
    assert index_bytes(tmp_path / "x") == large_whole


@pytest.mark.parametrize("pause", [0.0, 0.15, 0.3])
def test_ctrl_c_while_workers_start_is_one_line(large: Path, tmp_path: Path, pause: float) -> None:
    process = start_megazh(*arguments(large, tmp_path / "x", "--workers", 2))
    wait_until(lambda: (tmp_path / "x.build" / "tokenizer.json").exists())
    time.sleep(pause)
    os.killpg(process.pid, signal.SIGINT)
    code, _, err = finish(process)
    assert len(err.strip().splitlines()) == 1, err
    assert code == 130


@pytest.mark.parametrize("workers", [1, 2])
def test_full_disk_is_one_line_and_the_next_run_goes_on(
    large: Path, large_whole: dict[str, bytes], tmp_path: Path, workers: int
) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6 << 20, 6 << 20))

    code, out, err = megazh(*arguments(large, tmp_path / "x", "--workers", workers), preexec_fn=limit)
    assert (code, out) == (5, ""), err
    assert is_one_line_error(err, tmp_path / "x.build" / "index.bin", "needed, 'ulimit -f' allows 6.3 MB"), err
    assert "finished pieces are kept" in err
    assert not list((tmp_path / "x.build").glob("index.*")), "the unfinished index leaves its space free"
    assert not (tmp_path / "x.idx").exists()
    kept = len(pieces(tmp_path / "x"))
    assert kept > 3
    code, out, _ = megazh(*arguments(large, tmp_path / "x", "--workers", workers))
    assert code == 0
    assert resumed(out) == kept
    assert index_bytes(tmp_path / "x") == large_whole


def test_disk_too_full_for_a_piece(large: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    for workers in (1, 2):
        code, _, err = megazh(*arguments(large, tmp_path / "x", "--workers", workers), preexec_fn=limit)
        assert code == 5, err
        assert is_one_line_error(err, tmp_path / "x.build", ".piece: cannot be written: File too large"), err
        assert not list(tmp_path.iterdir()), "nothing is kept of a build without a finished piece"


FAKE = '''
"""The real fastokens, except that it gives wrong ids for documents that contain MARK."""
import importlib.util, sys
from pathlib import Path
here = Path(__file__).resolve().parent.parent
for folder in sys.path:
    if folder and Path(folder).resolve() != here and (Path(folder) / "fastokens" / "__init__.py").exists():
        found = Path(folder) / "fastokens"
        break
spec = importlib.util.spec_from_file_location(
    "fastokens", found / "__init__.py", submodule_search_locations=[str(found)]
)
module = importlib.util.module_from_spec(spec)
sys.modules["fastokens"] = module
spec.loader.exec_module(module)
Real = module.Tokenizer

class Tokenizer:
    def __init__(self, real):
        self._real = real

    @classmethod
    def from_json_str(cls, text):
        return cls(Real.from_json_str(text))

    def no_truncation(self):
        self._real.no_truncation()

    def encode_batch_flat(self, texts, **options):
        ids, offsets = self._real.encode_batch_flat(texts, **options)
        if any("MARK" in text for text in texts):
            ids = bytes(ids).replace((300).to_bytes(4, "little"), (301).to_bytes(4, "little"))
        return ids, offsets

module.Tokenizer = Tokenizer
'''


def test_pieces_of_a_wrong_encoder_that_are_still_under_way_are_not_taken(tmp_path: Path) -> None:
    """The encoder is found wrong on one piece while another worker encodes the next one."""
    (tmp_path / "fake" / "fastokens").mkdir(parents=True)
    (tmp_path / "fake" / "fastokens" / "__init__.py").write_text(FAKE, encoding="utf-8")
    tokenizer = load_tokenizer(tokenizer_path())
    word = tokenizer.decode([300])
    assert tokenizer.encode(word) == [300]
    filling = ["text " * 130_000] * 2  # a piece ends after these
    documents = [*filling, *[f"{word} MARK", *filling] * 7, "end"]
    (tmp_path / "a.jsonl").write_bytes(json_lines(documents))
    path = os.pathsep.join([str(tmp_path / "fake"), os.environ.get("PYTHONPATH", "")])
    code, _, err = megazh(*arguments(tmp_path / "a.jsonl", tmp_path / "x", "--workers", 2), env={"PYTHONPATH": path})
    assert code == 0, err
    index = IndexedDataset(tmp_path / "x")
    right = {text: tokenizer.encode(text) for text in set(documents)}
    wrong = [number for number, text in enumerate(documents) if index[number].tolist()[:-1] != right[text]]
    assert not wrong, f"wrong ids in documents {wrong} of {len(documents)}; {err}"
    assert len(err.splitlines()) == 1
    assert err.startswith("warning: fastokens differs from tokenizers")


def test_killed_rebuild_leaves_the_old_index_the_new_one_or_none(
    mixed: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    prefix = tmp_path / "x"
    new = megazh(*arguments(mixed, tmp_path / "new", "--max-bad", "1%", "--eod", "<|im_end|>", "--workers", 1))
    assert new[0] == 0
    possible = [whole, index_bytes(tmp_path / "new")]
    for number in range(4):
        if number % 2 == 0:
            for suffix, content in whole.items():
                Path(f"{prefix}{suffix}").write_bytes(content)
        with running(
            *arguments(mixed, prefix, "--max-bad", "1%", "--eod", "<|im_end|>", "--workers", 1, "--restart")
        ) as process:
            wait_until(lambda: Path(f"{prefix}.build").exists())
            wait_until(lambda number=number: len(pieces(prefix)) >= 5 * number or process.poll() is not None)
            time.sleep(0.02 * number)
        try:
            IndexedDataset(prefix)
        except UsageError:
            continue
        found = index_bytes(prefix)
        assert any(
            all(found[suffix] == each[suffix] for suffix in (".bin", ".idx", ".docs", ".json")) for each in possible
        )


@pytest.mark.skipif(
    not (QWEN_RANKS.exists() and (SHARED / "data/pretrain").exists()), reason="no sample data beside the project"
)
def test_real_text_with_qwens_tokenizer(tmp_path: Path) -> None:
    sources = [SHARED / "data/pretrain" / name for name in ("english.jsonl", "classical_orig.txt")]
    for workers in (1, 2):
        code, out, err = megazh(
            *("index", "build", "--input", *sources, "--tokenizer", QWEN_RANKS, "--output", tmp_path / f"x{workers}"),
            *("--workers", workers),
        )
        assert (code, err) == (0, ""), err
        assert "int32" in out
        assert "fastokens" in out
    assert index_bytes(tmp_path / "x1") == index_bytes(tmp_path / "x2")
    assert megazh("index", "verify", tmp_path / "x1")[0] == 0
