"""Fixtures of all tests: a private cache folder, a small corpus, a small tokenizer, a Slurm cluster."""

import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, why_unavailable

# Run Triton's kernels on the CPU, in Triton's interpreter, so that their results (not their speed) are tested on every
# machine. Triton reads the variable when it is imported, so it is set before any test imports Triton. Tests on a GPU,
# by `-m gpu`, compile them.
INTERPRETED = "TRITON_INTERPRET"
os.environ[INTERPRETED] = "1"


def pytest_configure(config: pytest.Config) -> None:
    """Let Triton compile its kernels where the tests on a GPU alone are run."""
    if config.option.markexpr == "gpu":
        del os.environ[INTERPRETED]


_COMMON = (
    "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说产种面而方后多定行学法所民得经十三之进着等"
    "部度家电力里如水化高自二理起小物现实加量都两体制机当使点从业本去把性好应开它合还因由其些然前外天政四日那社义事平形相全表间样与关各重新线"
)
_ENGLISH = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were all her she there would their we him been has when who will no more if out so up said what its about"
)
_RARE = ["Ünïcödé", "e\u0301", "🙂", "龘", "3.14", "2024年", "\u3000", "don't", "A\tB", "\r\n", "العربية", "\U00020000"]


@pytest.fixture(autouse=True, scope="session")
def _private_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep caches out of the user's home, and hide the launcher that the tests themselves may run under."""
    # A background job ignores SIGINT, and under nohup SIGHUP as well; its children would inherit that.
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGAZH_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("PATH", f"{os.environ['PATH']}{os.pathsep}/usr/sbin")  # where Debian puts slurmctld
        for name in list(os.environ):
            if name.startswith(("SLURM_", "PMI_", "PMIX_", "OMPI_")):
                patch.delenv(name)
        yield


def make_texts(count: int, seed: int = 0, words: int = 120) -> list[str]:
    """Made-up documents in Chinese and English, of about `words` words each; equal arguments give equal documents."""
    choose = random.Random(seed)
    chinese = ["".join(choose.choices(_COMMON, k=choose.choice((1, 2, 2, 3, 4)))) for _ in range(600)]
    english = _ENGLISH.split()
    texts = []
    for _ in range(count):
        if choose.random() < 0.75:
            lexicon, gap, stops = chinese, "", "，。；！？"
        else:
            lexicon, gap, stops = english, " ", ",.;!?"
        sentences = []
        for _ in range(max(1, round(words / 12 * choose.uniform(0.2, 1.8)))):
            sentence = choose.choices(lexicon, k=choose.randint(4, 20))
            if choose.random() < 0.1:
                sentence.insert(0, choose.choice(_RARE))
            sentences.append(gap.join(sentence) + choose.choice(stops) + gap)
        texts.append("".join(sentences))
    return texts


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """Write one document per line, under the key `text`; returns the path."""
    with open(path, "w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return path


@pytest.fixture(scope="session", name="make_texts")
def _make_texts() -> Callable[..., list[str]]:
    """The function `make_texts(count, seed=0, words=120)`."""
    return make_texts


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 300 documents, Chinese and English."""
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", make_texts(300))


@pytest.fixture(scope="session")
def tokenizer_json(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json of 1,000 ids, trained on `corpus`."""
    from megazh.corpus.options import ReadOptions
    from megazh.corpus.sources import find_sources
    from megazh.tokenizer.train import train_tokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    assert train_tokenizer(find_sources([str(corpus)]), ReadOptions(), path, 1000).ids == 1000
    return path


@pytest.fixture(scope="session")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of 200 made-up stories, indexed with a tokenizer of 400 ids."""
    from megazh.index.prepare import prepare

    return prepare(tmp_path_factory.mktemp("stories"), 400, 1, None, story_count=200, say=lambda line: None)


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """A running Slurm cluster of two nodes with seven simulated RTX 3090s each."""
    if reason := why_unavailable():
        pytest.skip(reason)
    with SlurmCluster() as cluster:
        yield cluster
