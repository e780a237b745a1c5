"""The mixture: the order of samples, refused manifests, and processes that start together without a race."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from indexes import random_documents, set_template, write_index

from megazh.errors import DataError, UsageError
from megazh.index.mixture import Mixture
from megazh.index.order import stream_key
from megazh.index.packing import Packing

SEQ = 64


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAZH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_index(tmp_path / "a", random_documents(1, 400))
    write_index(tmp_path / "b", random_documents(2, 150))
    return tmp_path


def _manifest(folder: Path, corpora: str, head: str = "seed: 3") -> Path:
    path = folder / "mix.yaml"
    path.write_text(f"{head}\ncorpora:\n{corpora}")
    return path


TWO = "  - {name: a, prefix: a, weight: 0.75}\n  - {name: b, prefix: b, weight: 0.25}\n"


def test_the_template_of_the_conversations_among_the_documents(folder: Path) -> None:
    manifest = _manifest(folder, TWO)
    assert Mixture(manifest, SEQ).template is None
    set_template(folder / "b", "one")
    template = Mixture(manifest, SEQ).template
    assert template is not None
    assert (template.jinja, template.stop) == ("one", "<|im_end|>")
    set_template(folder / "a", "other")
    with pytest.raises(UsageError, match="corpus 'b': its chat template differs from that of corpus 'a'; convert both"):
        Mixture(manifest, SEQ)


@pytest.mark.parametrize("packing", list(Packing))
def test_each_epoch_gives_every_sample_once_in_its_own_order(folder: Path, packing: Packing) -> None:
    mixture = Mixture(_manifest(folder, TWO), SEQ, packing)
    size = mixture.epoch_samples(1)
    rows: dict[int, list[int]] = {}
    number = 0
    while len(rows.get(2, [])) < size:
        corpus, epoch, row = mixture.locate(number)
        if corpus == 1:
            rows.setdefault(epoch, []).append(row)
        number += 1
    for epoch in range(3):
        assert sorted(rows[epoch]) == list(range(size)), "no sample is skipped or repeated at the end of an epoch"
    assert rows[0] != rows[1] != rows[2]


def test_the_total_never_enters(folder: Path) -> None:
    """Equal numbers give equal samples: in any order of requests, from a new object, and without the cache."""
    path = _manifest(folder, TWO)
    first = Mixture(path, SEQ)
    numbers = [0, 1, 2, 500, 10**9, 7, 10**15]
    samples = [first.sample(number) for number in numbers]
    shutil.rmtree(folder / "cache")
    again = Mixture(path, SEQ)
    for number, expected in reversed(list(zip(numbers, samples, strict=True))):
        for found, array in zip(again.sample(number), expected, strict=True):
            np.testing.assert_array_equal(found, array)
    batch = again.batch(numbers)
    for at, expected in enumerate(samples):
        np.testing.assert_array_equal(batch.tokens[at], expected.tokens)
        np.testing.assert_array_equal(batch.cu_seqlens[at], expected.cu_seqlens)


def test_a_batch_holds_the_samples_that_locate_names(folder: Path) -> None:
    """Also across corpora and epochs, in any order of numbers, and with some more than once."""
    mixture = Mixture(_manifest(folder, TWO), SEQ)
    numbers = [700, *range(0, 3 * mixture.wraps_at(1), 7), 5, 5, 10**9, 10**15]
    assert len({mixture.locate(number)[:2] for number in numbers}) > 6
    batch = mixture.batch(numbers)
    for at, number in enumerate(numbers):
        corpus, _, row = mixture.locate(number)
        one = np.empty((1, SEQ), np.int32), np.empty((1, SEQ), np.int32)
        document_map = np.empty((1, mixture.shape.document_map_size), np.int32)
        mixture._samples[corpus].gather(np.array([row]), np.array([0]), *one, document_map)
        assert np.array_equal(batch.tokens[at], one[0][0])
        assert np.array_equal(batch.labels[at], one[1][0])
        assert np.array_equal(np.concatenate((batch.position_ids[at], batch.cu_seqlens[at])), document_map[0, :-2])
    assert mixture.count_labels(numbers) == int((batch.labels != -100).sum())
    assert mixture.count_labels([]) == 0


def test_seed_and_name_decide_the_order(folder: Path) -> None:
    path = _manifest(folder, TWO)
    orders = [[Mixture(path, SEQ, seed=seed).locate(number) for number in range(50)] for seed in (3, 4)]
    assert orders[0] == [Mixture(path, SEQ).locate(number) for number in range(50)]
    assert orders[0] != orders[1]


def test_valid_labels_are_known_without_the_tokens(folder: Path) -> None:
    for packing in Packing:
        mixture = Mixture(_manifest(folder, TWO), SEQ, packing)
        for number in range(300):
            assert mixture.valid_labels(number) == int((mixture.sample(number).labels != -100).sum())


def test_shares_from_tokens_and_epochs(folder: Path) -> None:
    corpora = "  - {name: a, prefix: a, tokens: 30k}\n  - {name: b, prefix: b, tokens: 10000}\n"
    mixture = Mixture(_manifest(folder, corpora), SEQ)
    assert mixture.blend.share(0) == 0.75
    assert mixture.planned_tokens == 40_000
    corpora = "  - {name: a, prefix: a, epochs: 1}\n  - {name: b, prefix: b, epochs: 2.5}\n"
    mixture = Mixture(_manifest(folder, corpora), SEQ)
    planned = mixture.planned_tokens // SEQ
    assert abs(mixture.drawn(0, planned) / mixture.epoch_samples(0) - 1) < 0.1
    assert abs(mixture.drawn(1, planned) / mixture.epoch_samples(1) - 2.5) < 0.1


def test_a_corpus_can_end_the_mixture(folder: Path) -> None:
    mixture = Mixture(_manifest(folder, TWO, "on_exhausted: stop"), SEQ)
    counts = Counter(mixture.locate(number)[0] for number in range(mixture.end))
    exhausted = [corpus for corpus in (0, 1) if counts[corpus] == mixture.epoch_samples(corpus)]
    assert exhausted, "one corpus is used up exactly"
    assert all(counts[corpus] <= mixture.epoch_samples(corpus) for corpus in (0, 1))
    with pytest.raises(IndexError, match=f"exhausted after {mixture.end} samples"):
        mixture.locate(mixture.end)
    for numbers in (range(mixture.end - 2, mixture.end + 1), [mixture.end, 0]):
        with pytest.raises(IndexError, match=f"exhausted after {mixture.end} samples"):
            mixture.batch(numbers)
    with pytest.raises(IndexError, match="at least 0"):
        mixture.batch([3, -1])
    only_b = TWO.replace("weight: 0.25}", "weight: 0.25, on_exhausted: stop}")
    assert Mixture(_manifest(folder, only_b), SEQ).end == mixture.wraps_at(1)
    assert Mixture(_manifest(folder, TWO), SEQ).end is None


def test_the_same_text_is_on_the_same_side_in_every_corpus(tmp_path: Path) -> None:
    documents = random_documents(5, 500)
    write_index(tmp_path / "a", documents)
    write_index(tmp_path / "b", documents[::-3])
    head = "validation: {fraction: 0.2, salt: s}"
    path = _manifest(tmp_path, TWO, head)
    mixture = Mixture(path, SEQ)
    kept: list[set[tuple[int, ...]]] = []
    for corpus in mixture.corpora:
        sides = [{tuple(corpus.index[d].tolist()) for d in side} for side in (corpus.training, corpus.validation)]
        assert not sides[0] & sides[1]
        assert len(corpus.training) + len(corpus.validation) == len(corpus.index)
        kept.append(sides[1])
    assert 60 < len(kept[0]) < 140
    assert kept[1] <= kept[0]
    other = Mixture(_manifest(tmp_path, TWO, head.replace("salt: s", "salt: t")), SEQ)
    assert other.corpora[0].validation.tolist() != mixture.corpora[0].validation.tolist()


def test_validation_goes_through_every_kept_token_once(folder: Path) -> None:
    for packing in Packing:
        mixture = Mixture(_manifest(folder, TWO, "validation: {fraction: 0.1}"), SEQ, packing)
        samples = mixture.validation
        batch = samples.batch(range(len(samples)))
        found = Counter(batch.tokens[batch.tokens != 0].tolist())
        expected: Counter[int] = Counter()
        for corpus in mixture.corpora:
            for document in corpus.validation:
                expected.update(corpus.index[int(document)].tolist())
        assert found == expected
        assert sum(samples.valid_labels(n) for n in range(len(samples))) == int((batch.labels != -100).sum())


def test_an_index_alone_is_a_mixture(folder: Path) -> None:
    mixture = Mixture(folder / "a", SEQ)
    assert sorted(mixture.locate(n)[2] for n in range(mixture.epoch_samples(0))) == list(
        range(mixture.epoch_samples(0))
    )


@pytest.mark.parametrize(
    ("corpora", "head", "message"),
    [
        (
            "  - {name: a, prefix: a, wieght: 1}\n",
            "",
            "unknown key 'corpora[0].wieght'; did you mean 'corpora[0].weight'",
        ),
        (TWO, "sead: 3", "unknown key 'sead'; did you mean 'seed'"),
        ("  - {name: a, prefix: a}\n", "", "expected one of weight, tokens, epochs"),
        ("  - {name: a, prefix: a, weight: 1, epochs: 2}\n", "", "expected one of weight, tokens, epochs"),
        ("  - {name: a, prefix: a, weight: 0}\n", "", "greater than 0"),
        ("  - {name: a, prefix: a, weight: .nan}\n", "", "finite"),
        ("  - {name: a, prefix: a, tokens: 3X}\n", "", "expected a number such as"),
        (TWO.replace("name: b", "name: a"), "", "'a' is given twice"),
        (TWO.replace("weight: 0.25", "epochs: 1"), "", "give all of them weights"),
        (TWO, "on_exhausted: panic", "on_exhausted"),
        (TWO, "validation: {fraction: 1.5}", "less than 1"),
        ("  - {name: c, prefix: nowhere, weight: 1}\n", "", "corpus 'c': "),
        (TWO, "validation: {fraction: 0.0000001}", "validation side is empty"),
    ],
)
def test_manifests_that_cannot_work(folder: Path, corpora: str, head: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        Mixture(_manifest(folder, corpora, head), SEQ)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_tokenizers_that_differ_are_refused_by_name(folder: Path) -> None:
    (folder / "b.idx").unlink()
    write_index(folder / "b", random_documents(2, 150), fingerprint="e" * 64)
    with pytest.raises(UsageError, match=r"corpus 'b': tokenizer eeee.* of corpus 'a'"):
        Mixture(_manifest(folder, TWO), SEQ)


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".docs"])
def test_changed_files_are_refused_by_name(folder: Path, suffix: str) -> None:
    path = _manifest(folder, TWO)
    Mixture(path, SEQ)
    file = folder / f"b{suffix}"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"corpus 'b': .*b\{suffix}"):
        Mixture(path, SEQ)


def test_a_pinned_hash_is_held(folder: Path) -> None:
    digest = Mixture(folder / "a", SEQ).corpora[0].metadata.files.bin.sha256
    pinned = "  - {name: a, prefix: a, weight: 1, sha256: %s}\n"
    Mixture(_manifest(folder, pinned % digest), SEQ)
    with pytest.raises(DataError, match=r"corpus 'a': .*expected sha256 0000"):
        Mixture(_manifest(folder, pinned % ("0000abcd" * 8)), SEQ)


def test_a_corpus_smaller_than_a_sample_says_so(tmp_path: Path) -> None:
    write_index(tmp_path / "a", random_documents(1, 100))
    write_index(tmp_path / "b", [[2, 3, 1]])
    for packing in Packing:
        with pytest.raises(UsageError, match="corpus 'b': 3 tokens for training, less than one sample of 64"):
            Mixture(_manifest(tmp_path, TWO), SEQ, packing)


def test_validation_is_asked_for_in_vain(folder: Path) -> None:
    with pytest.raises(UsageError, match="keeps no documents for validation"):
        _ = Mixture(_manifest(folder, TWO), SEQ).validation


def test_without_a_writable_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _manifest(folder, TWO)
    expected = Mixture(path, SEQ).sample(5).tokens
    blocked = folder / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("MEGAZH_CACHE", str(blocked / "cache"))
    np.testing.assert_array_equal(Mixture(path, SEQ).sample(5).tokens, expected)


START = """
import sys
from megazh.index.mixture import Mixture
print(Mixture(sys.argv[1], 64).batch(range(40)).tokens.sum())
"""


def _start(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", START, str(path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def test_processes_that_start_together_agree(folder: Path) -> None:
    path = _manifest(folder, TWO)
    processes = [_start(path) for _ in range(4)]
    try:
        printed = {process.communicate(timeout=120)[0] for process in processes}
    finally:
        for process in processes:
            process.kill()
    assert len(printed) == 1
    assert printed.pop().strip().isdigit()
    built = [entry for entry in (folder / "cache" / "samples").iterdir() if entry.is_dir()]
    assert len(built) == 2, "one table per corpus, no temporary files left"


def test_a_builder_that_dies_holding_the_lock_blocks_nobody(folder: Path) -> None:
    path = _manifest(folder, TWO)
    hold = (
        "import sys, time\nfrom pathlib import Path\nimport megazh.index.samples as s\n"
        "def pack(*a):\n    Path(sys.argv[2]).touch()\n    time.sleep(600)\n"
        "s._pack = pack\nfrom megazh.index.mixture import Mixture\nMixture(sys.argv[1], 64)\n"
    )
    mark = folder / "packing"
    holder = subprocess.Popen([sys.executable, "-c", hold, str(path), str(mark)], start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not mark.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert mark.exists()
        waiting = _start(path)
        time.sleep(1)
        os.killpg(holder.pid, signal.SIGKILL)
        assert waiting.communicate(timeout=60)[0].strip().isdigit()
    finally:
        holder.kill()
        holder.wait()


def test_threads_in_different_epochs_do_not_disturb_one_another(folder: Path) -> None:
    """Loader threads request samples on both sides of the end of an epoch; one is interrupted at the worst moment."""
    mixture = Mixture(folder / "b", SEQ)
    size = mixture.epoch_samples(0)
    expected = [mixture.locate(number) for number in range(size)]

    class OtherThreadComesBetween(dict[int, tuple[int, np.uint64]]):
        """After each lookup of the latest epoch, lets another thread go to the next epoch before the result is used."""

        other = False

        def get(self, corpus: int, default: object = None) -> object:  # type: ignore[override]
            found = super().get(corpus, default)
            if not self.other:
                self.other = True
                thread = threading.Thread(target=mixture.locate, args=(size,))
                thread.start()
                thread.join()
                self.other = False
            return found

    mixture._epochs = OtherThreadComesBetween()
    for number in range(size):
        mixture._epochs[0] = (0, stream_key("epoch", mixture.seed, "b", 0))
        assert mixture.locate(number) == expected[number]
