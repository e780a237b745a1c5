"""`slurm/index_corpus.sh` on a private Slurm cluster: on two nodes by MPI, and as an array whose parts are merged."""

import sys
from pathlib import Path

import pytest
from conftest import make_texts, write_jsonl
from processes import wait_until
from slurm_cluster import SlurmCluster
from slurm_jobs import TEMPLATES, log, recorded, recorder, submit

from megazh.corpus.sources import find_sources
from megazh.errors import UsageError
from megazh.index.build import Request, build_index
from megazh.index.parts import Part, parse_part, sources_of
from megazh.index.pools import ProcessPool

INDEX = TEMPLATES / "index_corpus.sh"
SUFFIXES = (".bin", ".idx", ".docs")
SMALL = ("--ntasks-per-node=1", "--mem-per-cpu=100")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of five files of unequal sizes."""
    folder = tmp_path_factory.mktemp("texts") / "raw texts; $(touch evil)"
    folder.mkdir()
    for number, count in enumerate((300, 20, 150, 1, 60)):
        write_jsonl(folder / f"{number}.jsonl", make_texts(count, seed=number))
    return folder


@pytest.mark.slurm
@pytest.mark.mpi
def test_two_nodes_and_an_array_give_the_bytes_of_one_process(
    slurm: SlurmCluster, texts: Path, tokenizer_json: Path, tmp_path: Path
) -> None:
    options = ["--input", texts, "--tokenizer", tokenizer_json, "--output"]
    nodes = submit(slurm, tmp_path, "-N", "2", *SMALL, INDEX, *options, "index of/both")
    array = submit(slurm, tmp_path, "--array=3-4", *SMALL, INDEX, *options, "index of/all")
    after = f"--dependency=afterok:{array}", "--kill-on-invalid-dep=yes"
    merge = submit(slurm, tmp_path, *after, *SMALL, INDEX, "merge", "index of/all", "2")
    build_index(Request([str(texts)], tmp_path / "one", tokenizer_json), ProcessPool(1), print)
    assert slurm.wait_job(nodes) == "COMPLETED", log(tmp_path, nodes)
    assert "2 workers" in log(tmp_path, nodes)
    assert slurm.wait_job(merge) == "COMPLETED", log(tmp_path, merge)
    for suffix in SUFFIXES:
        one = (tmp_path / f"one{suffix}").read_bytes()
        assert (tmp_path / f"index of/both{suffix}").read_bytes() == one
        assert (tmp_path / f"index of/all{suffix}").read_bytes() == one
        assert len((tmp_path / f"index of/all.part-1-of-2{suffix}").read_bytes()) < len(one)


@pytest.mark.slurm
def test_a_build_at_its_time_limit_is_requeued(slurm: SlurmCluster, tmp_path: Path) -> None:
    python = recorder(tmp_path)
    text = python.read_text().replace(
        "trap 'touch signalled; exit 75' USR1", "[[ $3 != megazh.cluster* ]] || exec true"
    )
    python.write_text(text.replace("exec true", 'exec "$REAL_PYTHON" "$@"'))
    job = submit(slurm, tmp_path, *SMALL, INDEX, "wait", python=python, environ={"REAL_PYTHON": sys.executable})
    wait_until((tmp_path / "arguments").exists, 30, "the job has started")
    assert recorded(tmp_path)[2][1:] == [str(TEMPLATES.parent / "tools/index_dataset.py"), "wait"]
    assert slurm.run("scancel", "--batch", "--signal=USR1", job).returncode == 0
    wait_until(lambda: "Restarts=1" in slurm.run("scontrol", "show", "job", job).stdout, 20, "the job is requeued")
    assert f"requeueing Slurm job {job}" in log(tmp_path, job)
    slurm.run("scancel", job)


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_parts_are_consecutive_and_none_is_empty(texts: Path, parts: int) -> None:
    sources = find_sources([str(texts)])
    found = [sources_of(Part(number, parts), sources) for number in range(1, parts + 1)]
    assert [source for part in found for source in part] == sources
    assert all(found)
    if parts == 2:
        assert [len(part) for part in found] == [1, 4]


def test_parts_that_cannot_be(texts: Path) -> None:
    with pytest.raises(UsageError, match=r"--part 1/6: 5 files do not make 6 parts; take at most 5"):
        sources_of(Part(1, 6), find_sources([str(texts)]))
    for text in ("0/3", "4/3", "3", "3/", "a/b", "1/99999", "-1/2"):
        with pytest.raises(ValueError, match=r"expected a part|expected part/parts"):
            parse_part(text)
