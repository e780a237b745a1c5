"""Indexing by several MPI ranks: the same bytes as with one process, and a clear end if ranks fail."""

import gzip
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from processes import Finished, Running, run_command, start_command, wait_until
from slurm_cluster import SlurmCluster
from textdata import json_lines, texts
from tokenizer_kinds import unigram

from megazh.errors import DataError, UsageError, WorkerError
from megazh.index.check import verify_index
from megazh.index.mpi import launched

TOOL = Path(__file__).parents[2] / "tools" / "index_dataset.py"
SUFFIXES = (".bin", ".idx", ".docs", ".json", ".rejected.jsonl")
BAD_LINES = {1000: b'{"text": "broken', 5000: b'{"body": "no text"}', 9000: b'{"text": "\\ud800"}'}


# Meaning of the launchers' variables


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4"}, (2, 4)),
        ({"PMI_RANK": "1", "PMI_SIZE": "3"}, (1, 3)),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "6", "SLURM_STEP_NUM_TASKS": "6"}, (5, 6)),
        # A step of one task in a job of six tasks.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "6", "SLURM_STEP_NUM_TASKS": "1"}, (0, 1)),
        # The batch shell of a job of six tasks: one process, although the variables look like rank 0 of 6.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}, (0, 1)),
        # Within a job, mpirun starts its daemons as a step; its own variables count.
        ({"PMI_RANK": "3", "PMI_SIZE": "4", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, (3, 4)),
        ({"PMI_RANK": "3"}, (0, 1)),
    ],
)
def test_launched_reads_rank_and_size(environment: dict[str, str], expected: tuple[int, int]) -> None:
    rank, size, launcher = launched(environment)
    assert (rank, size) == expected
    if size > 1:
        assert launcher


# The corpus, and the command line of the tool


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory, make_texts: Callable[..., list[str]]) -> dict[str, Path]:
    """The same 7 MB in three formats, large enough for several pieces, with a few bad records."""
    folder = tmp_path_factory.mktemp("corpora")
    texts = make_texts(12000, seed=1)
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts]
    for at, bad in BAD_LINES.items():
        lines[at] = bad
    data = b"\n".join(lines) + b"\n"
    paths = {"jsonl": folder / "a.jsonl", "gz": folder / "b.jsonl.gz", "parquet": folder / "c.parquet"}
    paths["jsonl"].write_bytes(data)
    paths["gz"].write_bytes(gzip.compress(data, 1))
    rows = [None if at in BAD_LINES else text for at, text in enumerate(texts)]
    pq.write_table(pa.table({"text": rows}), paths["parquet"], row_group_size=500)
    return paths


def command(corpus: Path, tokenizer: Path, output: Path, *options: str) -> list[str | Path]:
    """The command line of the tool."""
    return [sys.executable, TOOL, "--input", corpus, "--tokenizer", tokenizer, "--output", output, *options]


@pytest.fixture(scope="module")
def mpirun() -> Path:
    """The `mpirun` of the MPI library that mpi4py loads: the one beside the interpreter."""
    pytest.importorskip("mpi4py")
    path = Path(sys.executable).with_name("mpirun")
    if not path.exists():
        pytest.skip(f"no {path}: install the extra 'mpi' (bash jobs/setup.sh --mpi)")
    return path


@pytest.fixture(scope="module")
def alone(corpora: dict[str, Path], tokenizer_json: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each format, the index built by one process."""
    prefixes = {}
    for name, corpus in corpora.items():
        prefixes[name] = tmp_path_factory.mktemp("alone") / name
        finished = run_command(command(corpus, tokenizer_json, prefixes[name], "--workers", "1"))
        assert finished.returncode == 0, finished.stderr
        assert pieces(prefixes[name]) >= 4, "too few pieces for several ranks"
    return prefixes


def pieces(prefix: Path) -> int:
    """Number of pieces according to the log."""
    words = Path(f"{prefix}.log").read_text().split()
    return int(words[words.index("pieces") - 1])


def assert_same_index(found: Path, expected: Path) -> None:
    """Assert that both indexes are equal byte for byte."""
    for suffix in SUFFIXES:
        assert Path(f"{found}{suffix}").read_bytes() == Path(f"{expected}{suffix}").read_bytes(), suffix
    assert not Path(f"{found}.build").exists()


def error_lines(finished: Finished) -> list[str]:
    """The error lines on stderr."""
    assert "Traceback" not in finished.stderr
    return [line for line in finished.stderr.splitlines() if line.startswith("error: ")]


# mpirun


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", ["jsonl", "gz", "parquet"])
def test_ranks_give_the_bytes_of_one_process(
    mpirun: Path,
    ranks: int,
    name: str,
    corpora: dict[str, Path],
    alone: dict[str, Path],
    tokenizer_json: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path / "index"
    finished = run_command([mpirun, "-n", str(ranks), *command(corpora[name], tokenizer_json, output)])
    assert finished.returncode == 0, finished.stderr
    assert_same_index(output, alone[name])
    assert f"built with {ranks} workers" in Path(f"{output}.log").read_text()
    assert finished.stdout.count("documents  ") == 1, "only rank 0 prints the summary"


@pytest.mark.mpi
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_job_and_the_next_run_completes_it(
    mpirun: Path,
    victim: int,
    corpora: dict[str, Path],
    alone: dict[str, Path],
    tokenizer_json: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path / "index"
    build = Path(f"{output}.build")
    line = command(corpora["jsonl"], tokenizer_json, output)
    with start_command([mpirun, "-n", "2", *line]) as running:
        # Rank 1 is stopped before it can finish its tasks, so that the job stays unfinished as long as necessary.
        wait_until((build / "ranks" / "rank-1").exists, 30, "rank 1 at work")
        halted = rank_pid(running, 1)
        os.kill(halted, signal.SIGSTOP)
        wait_until(lambda: list(build.glob("*.piece")), 30, "a finished piece")
        os.kill(rank_pid(running, victim), signal.SIGKILL)
        if victim != 1:
            os.kill(halted, signal.SIGCONT)
        begin = time.monotonic()
        finished = running.wait(30)
        assert time.monotonic() - begin < 20
        assert finished.returncode != 0
        wait_until(lambda: not running.descendants(), 10, "the end of all ranks")
    assert not Path(f"{output}.idx").exists()
    again = run_command([*line, "--workers", "1"])
    assert again.returncode == 0, again.stderr
    assert "pieces were there from before" in again.stdout
    assert_same_index(output, alone["jsonl"])


def rank_pid(running: Running, rank: int) -> int:
    """The process id of a rank."""
    for pid in running.descendants():
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if b"PMI_RANK=%d" % rank in variables:
            return pid
    raise AssertionError(f"no rank {rank} among {running.descendants()}")


@pytest.mark.mpi
def test_a_missing_tokenizer_is_told_once(mpirun: Path, corpora: dict[str, Path], tmp_path: Path) -> None:
    missing = tmp_path / "nowhere" / "tokenizer.json"
    finished = run_command([mpirun, "-n", "2", *command(corpora["jsonl"], missing, tmp_path / "index")])
    assert finished.returncode == UsageError.exit_code
    (line,) = error_lines(finished)
    assert str(missing) in line
    assert not Path(f"{tmp_path}/index.idx").exists()


@pytest.mark.mpi
def test_too_many_bad_lines_are_told_once(mpirun: Path, tokenizer_json: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "bad.jsonl"
    corpus.write_text('{"text": "好"}\n{"text": \n' * 20000)
    finished = run_command([mpirun, "-n", "2", *command(corpus, tokenizer_json, tmp_path / "index")])
    assert finished.returncode == DataError.exit_code
    (line,) = error_lines(finished)
    assert "bad.jsonl line 2" in line
    assert "--max-bad" in line
    assert not Path(f"{tmp_path}/index.idx").exists()


@pytest.mark.mpi
def test_ranks_keep_control_tokens_text_and_lost_text_is_told_once(mpirun: Path, tmp_path: Path) -> None:
    tokenizer = unigram(tmp_path, with_bytes=False)  # the end token is a word of its vocabulary
    corpus = tmp_path / "text.jsonl"
    corpus.write_bytes(json_lines([*texts(300, 4), "a </s> b", "</s>", "一\n二\n三\n"] * 3))
    output = tmp_path / "index"
    finished = run_command([mpirun, "-n", "2", *command(corpus, tokenizer, output)])
    assert finished.returncode == DataError.exit_code, finished.stderr
    (line,) = error_lines(finished)
    assert "--max-lost" in line
    finished = run_command([mpirun, "-n", "2", *command(corpus, tokenizer, output, "--max-lost", "100%")])
    assert finished.returncode == 0, finished.stderr
    assert "909 documents" in verify_index(str(output))


@pytest.mark.mpi
def test_ranks_and_workers_exclude_each_other(
    mpirun: Path, corpora: dict[str, Path], tokenizer_json: Path, tmp_path: Path
) -> None:
    line = command(corpora["jsonl"], tokenizer_json, tmp_path / "index", "--workers", "2")
    finished = run_command([mpirun, "-n", "2", *line])
    assert finished.returncode == UsageError.exit_code
    assert "--workers" in error_lines(finished)[0]
    assert not any(tmp_path.iterdir())


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("damaged.jsonl.gz", b"\x1f\x8b\x08 this is no stream", "damaged.jsonl.gz"),
        ("empty.jsonl", b"", "no document"),
    ],
)
def test_bad_input_ends_all_ranks(
    mpirun: Path, name: str, text: bytes, named: str, tokenizer_json: Path, tmp_path: Path
) -> None:
    corpus = tmp_path / name
    corpus.write_bytes(text)
    finished = run_command([mpirun, "-n", "2", *command(corpus, tokenizer_json, tmp_path / "index")])
    assert finished.returncode == DataError.exit_code
    (line,) = error_lines(finished)
    assert named in line


@pytest.mark.mpi
def test_a_full_disk_ends_all_ranks(
    mpirun: Path, corpora: dict[str, Path], alone: dict[str, Path], tokenizer_json: Path, tmp_path: Path
) -> None:
    output = tmp_path / "index"
    line = command(corpora["jsonl"], tokenizer_json, output)
    # A limit on file size simulates a full disk: large enough for pieces, too small for the index.
    limit = Path(f"{alone['jsonl']}.bin").stat().st_size // 2
    with start_command([mpirun, "-n", "2", *line]) as running:
        wait_until(Path(f"{output}.build/ranks/rank-1").exists, 30, "rank 1 at work")
        for rank in (0, 1):  # not from the start: MPI's shared memory counts as a file
            resource.prlimit(rank_pid(running, rank), resource.RLIMIT_FSIZE, (limit, limit))
        finished = running.wait(60)
    assert finished.returncode == WorkerError.exit_code
    assert len(error_lines(finished)) == 1
    assert not Path(f"{output}.idx").exists()
    again = run_command([mpirun, "-n", "2", *line])
    assert again.returncode == 0, again.stderr
    assert_same_index(output, alone["jsonl"])


# srun: the nodes share /tmp with this process

# About one start in a hundred, Slurm's pmi2 plugin cuts a line of MPICH's in two, and MPICH aborts in MPI_Init, before
# any code of this project runs. Such a start is repeated.
_PMI_LOST_A_LINE = "mpi/pmi2: value not properly terminated in client request"


@pytest.mark.slurm
@pytest.mark.mpi
@pytest.mark.parametrize("nodes", [1, 2])
def test_srun_gives_the_bytes_of_one_process(
    mpirun: Path,
    nodes: int,
    slurm: SlurmCluster,
    corpora: dict[str, Path],
    alone: dict[str, Path],
    tokenizer_json: Path,
    tmp_path: Path,
) -> None:
    line = command(corpora["jsonl"], tokenizer_json, tmp_path / "index")
    for _ in range(3):
        finished = slurm.run("srun", "--mpi=pmi2", "--kill-on-bad-exit", "-N", str(nodes), "-n", "2", *line)
        if _PMI_LOST_A_LINE not in finished.stderr:
            break
    assert finished.returncode == 0, finished.stderr
    assert_same_index(tmp_path / "index", alone["jsonl"])
    assert "built with 2 workers" in (tmp_path / "index.log").read_text()


@pytest.mark.slurm
@pytest.mark.mpi
def test_srun_without_pmi_is_refused(
    mpirun: Path, slurm: SlurmCluster, corpora: dict[str, Path], tokenizer_json: Path, tmp_path: Path
) -> None:
    """MPI then sees each task as a world of one rank, and each would build the whole index."""
    line = command(corpora["jsonl"], tokenizer_json, tmp_path / "index")
    finished = slurm.run("srun", "--mpi=none", "-n", "2", *line)
    assert finished.returncode == UsageError.exit_code
    assert "started 2 ranks, MPI sees 1" in error_lines(finished)[0]
    assert not any(tmp_path.iterdir())


@pytest.mark.slurm
@pytest.mark.mpi
def test_the_batch_shell_of_a_job_is_one_process(
    slurm: SlurmCluster, corpora: dict[str, Path], alone: dict[str, Path], tokenizer_json: Path, tmp_path: Path
) -> None:
    script = tmp_path / "job.sh"
    words = " ".join(map(str, command(corpora["jsonl"], tokenizer_json, tmp_path / "index")))
    script.write_text(f"#!/bin/bash\ntest $SLURM_NTASKS = 2 || exit 99\n{words}\n")
    job = slurm.run("sbatch", "--parsable", "-n", "2", "-o", str(tmp_path / "job.log"), script).stdout.strip()
    assert slurm.wait_job(job) == "COMPLETED", (tmp_path / "job.log").read_text()
    assert_same_index(tmp_path / "index", alone["jsonl"])
    assert "built with 1 workers" in (tmp_path / "index.log").read_text()
