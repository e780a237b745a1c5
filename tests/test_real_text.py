"""Real text in four file formats with bad lines added: one process, two workers and two ranks give the same bytes.

Skipped unless the project's sample data lies beside the checkout.
"""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from processes import run_command
from textdata import QWEN_RANKS, SHARED, gz, index_bytes, zst

from megazh.index.mixture import Mixture
from megazh.index.packing import Packing

PRETRAIN = SHARED / "data" / "pretrain"
MPIRUN = Path(sys.executable).parent / "mpirun"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PRETRAIN.is_dir(), reason="the sample data is not beside the checkout"),
]


_ADDED_LINES = (
    b'{"text": "cut off',
    b'{"txt": "another key"}',
    b'{"text": null}',
    b'{"text": ["a", "list"]}',
    b'{"text": "\xff\xfe"}',
    b'{"text": "\\ud83d"}',
    b"not JSON at all",
    b'{"text": ""}',
    b'{"text": "\xef\xbb\xbf"}',
    b"",
    b"   \r",
)


def _with_added_lines(path: Path) -> bytes:
    """The lines of a JSONL file with others in between: 7 bad lines, 2 empty documents, blank lines."""
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(_ADDED_LINES):
        lines.insert(number * len(lines) // len(_ADDED_LINES), line)
    return b"\xef\xbb\xbf" + b"\n".join(lines)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real") / "raw"
    folder.mkdir()
    (folder / "english.jsonl").write_bytes(_with_added_lines(PRETRAIN / "english.jsonl"))
    (folder / "lctt.jsonl.zst").write_bytes(zst(_with_added_lines(PRETRAIN / "lctt_tech_articles.jsonl"), frames=3))
    (folder / "poetry.jsonl.gz").write_bytes(gz((PRETRAIN / "tang_poetry.jsonl").read_bytes(), members=2))
    (folder / "d2l.jsonl").write_bytes((PRETRAIN / "d2l_zh.jsonl").read_bytes())
    (folder / "classical_modern.parquet").write_bytes((PRETRAIN / "classical_modern.parquet").read_bytes())
    (folder / "classical.txt").write_bytes((PRETRAIN / "classical_orig.txt").read_bytes().replace(b"\n", b"\r\n"))
    wiki = [json.loads(line)["text"] for line in (PRETRAIN / "zhwiki.jsonl").read_bytes().splitlines()]
    schema = pa.schema([("text", pa.string())])
    with pa.OSFile(str(folder / "wiki.arrow"), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for at in range(0, len(wiki), 100):
            writer.write_batch(pa.record_batch([wiki[at : at + 100]], schema))
    return folder


def _build(raw: Path, name: str, *launcher: str, workers: int | None = None) -> dict[str, bytes]:
    prefix = raw.parent / name
    command = [
        *launcher,
        sys.executable,
        "-m",
        "megazh",
        "index",
        "build",
        "--input",
        str(raw),
        "--output",
        str(prefix),
    ]
    command += ["--tokenizer", str(QWEN_RANKS), "--text-documents", "blank-lines"]
    command += ["--workers", str(workers)] if workers else []
    done = run_command(command, timeout=240)
    assert done.returncode == 0, done.stderr
    return index_bytes(prefix)


@pytest.mark.mpi
def test_three_ways_one_result_and_a_mixture_of_them(raw: Path) -> None:
    alone = _build(raw, "alone", workers=1)
    assert _build(raw, "workers", workers=2) == alone
    assert _build(raw, "ranks", str(MPIRUN), "-n", "2") == alone

    described = json.loads(alone[".json"])
    assert described["rejected"]["total"] == 14
    assert described["rejected"]["reasons"]["lone surrogate"] == 2
    assert described["empty_documents"] == 4
    rejected = [json.loads(line) for line in alone[".rejected.jsonl"].splitlines()]
    for entry in rejected:
        if entry["file"] == "english.jsonl":
            line = (raw / "english.jsonl").read_bytes().split(b"\n")[entry["line"] - 1]
            assert not line.startswith(b'{"text": "') or entry["reason"] in (
                "broken JSON",
                "invalid UTF-8",
                "lone surrogate",
            )
    verified = run_command([sys.executable, "-m", "megazh", "index", "verify", str(raw.parent / "alone")], timeout=60)
    assert "are right" in verified.stdout

    manifest = raw.parent / "mix.yaml"
    manifest.write_text(
        "validation: {fraction: 0.01}\ncorpora:\n"
        "  - {name: one, prefix: alone, weight: 0.5}\n  - {name: two, prefix: ranks, weight: 0.5}\n"
    )
    for packing in Packing:
        mixture = Mixture(manifest, 1024, packing)
        table = mixture.table(0)
        assert 1 - table.length.sum() / (len(table) * 1024) < 0.005
    stats = run_command([sys.executable, "-m", "megazh", "pack", "stats", str(manifest)], timeout=120)
    assert stats.returncode == 0, stats.stderr
    print(stats.stdout)
