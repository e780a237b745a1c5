"""The fingerprint of a mixture: it changes exactly where some training sample changes, and names what did."""

import shutil
from pathlib import Path

import pytest
import yaml
from indexes import random_documents, write_index

from megazh.index.fingerprint import describe_differences, differences, digest_of, renamed_corpora
from megazh.index.mixture import Mixture
from megazh.index.packing import Packing

SEQ = 64
MANIFEST = {
    "seed": 3,
    "validation": {"fraction": 0.2, "salt": "v1"},
    "corpora": [{"name": "a", "prefix": "a", "weight": 0.9}, {"name": "b", "prefix": "b", "weight": 0.1}],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEGAZH_CACHE", str(tmp_path / "cache"))
    write_index(tmp_path / "a", random_documents(1, 120))
    write_index(tmp_path / "b", random_documents(2, 90))
    return tmp_path


def mixture(folder: Path, seq_len: int = SEQ, packing: Packing = Packing.BEST_FIT, **changes: object) -> Mixture:
    """The mixture of the manifest above with other top-level keys; None leaves a key out."""
    values = {key: value for key, value in {**MANIFEST, **changes}.items() if value is not None}
    path = folder / "mix.yaml"
    path.write_text(yaml.safe_dump(values))
    return Mixture(path, seq_len, packing)


def corpora(first: dict[str, object], second: dict[str, object]) -> list[dict[str, object]]:
    return [{"name": "a", "prefix": "a", **first}, {"name": "b", "prefix": "b", **second}]


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"seed": 4}, "seed 3 -> 4"),
        ({"validation": {"fraction": 0.2, "salt": "v2"}}, "validation.salt v1 -> v2"),
        ({"validation": {"fraction": 0.21, "salt": "v1"}}, "validation.fraction 0.2 -> 0.21"),
        ({"validation": None}, "validation.fraction 0.2 -> 0, validation.salt v1 -> none"),
        ({"on_exhausted": "stop"}, "corpora.a.on_exhausted wrap -> stop, corpora.b.on_exhausted wrap -> stop"),
        ({"corpora": MANIFEST["corpora"][::-1]}, "corpora a, b -> b, a"),  # type: ignore[index]
        (
            {"corpora": corpora({"weight": 0.1}, {"weight": 0.9})},
            "corpora.a.weight 0.9 -> 0.1, corpora.b.weight 0.1 -> 0.9",
        ),
        ({"corpora": corpora({"weight": 0.9}, {"weight": 0.1000001})}, "corpora.b.weight 0.1 -> 0.1000001"),
        (
            {"corpora": corpora({"tokens": 3000}, {"tokens": 1000})},
            "corpora.a.weight 0.9 -> none, corpora.b.weight 0.1 -> none, corpora.a.tokens none -> 3000, "
            "corpora.b.tokens none -> 1000",
        ),
        (
            {"corpora": corpora({"weight": 0.9}, {"weight": 0.1, "on_exhausted": "stop"})},
            "corpora.b.on_exhausted wrap -> stop",
        ),
        ({"seq_len": 32}, "seq_len 64 -> 32"),
        ({"packing": Packing.CONCAT}, "packing best_fit -> concat"),
    ],
)
def test_what_changes_samples_is_named_with_both_values(folder: Path, changes: dict, shown: str) -> None:
    before, now = mixture(folder).fingerprint, mixture(folder, **changes).fingerprint
    assert describe_differences(differences(before, now)).startswith(shown)
    assert digest_of(before) != digest_of(now)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"corpora": corpora({"weight": 9}, {"weight": 1.0})},
        {"corpora": corpora({"tokens": 9000}, {"tokens": 1000})},
        {"on_exhausted": "wrap"},
        {"corpora": corpora({"weight": 0.9, "on_exhausted": "wrap"}, {"weight": 0.1})},
    ],
)
def test_what_changes_no_sample_is_equal(folder: Path, changes: dict) -> None:
    before, now = mixture(folder), mixture(folder, **changes)
    assert differences(before.fingerprint, now.fingerprint) == []
    assert digest_of(before.fingerprint) == digest_of(now.fingerprint)
    assert [before.locate(number) for number in range(50)] == [now.locate(number) for number in range(50)]


def test_epochs_count_where_the_mixture_ends_by_them(folder: Path) -> None:
    def one(epochs: int, rule: str) -> dict[str, str]:
        entry = {"name": "a", "prefix": "a", "epochs": epochs}
        return mixture(folder, corpora=[entry], on_exhausted=rule).fingerprint

    assert differences(one(1, "wrap"), one(3, "wrap")) == []
    assert differences(one(1, "stop"), one(3, "stop")) == [("corpora.a.epochs", "1", "3")]


def test_another_place_is_the_same_and_another_text_is_not(folder: Path, tmp_path: Path) -> None:
    before = mixture(folder).fingerprint
    moved = tmp_path / "moved" / "deep"
    moved.mkdir(parents=True)
    for path in folder.glob("[ab].*"):
        shutil.copy(path, moved)
    assert mixture(moved).fingerprint == before
    write_index(moved / "b", random_documents(3, 90))
    found = differences(before, mixture(moved).fingerprint)
    assert {name for name, _, _ in found} == {f"corpora.b.{suffix}" for suffix in ("idx", "bin", "docs")}
    assert describe_differences(found).count("…") == 6, "hashes are shortened"


def test_a_single_index_equals_a_manifest_that_names_it_so(folder: Path) -> None:
    alone = Mixture(folder / "a", SEQ).fingerprint
    entry = {"name": "a", "prefix": "a", "weight": 0.5}
    assert differences(alone, mixture(folder, seed=0, validation=None, corpora=[entry]).fingerprint) == []
    for path in folder.glob("a.*"):
        shutil.copy(path, path.with_name(path.name.replace("a.", "c.", 1)))
    found = differences(alone, Mixture(folder / "c", SEQ).fingerprint)
    assert found[0] == ("corpora", "a", "c")
    assert list(renamed_corpora(found)) == [("a", "c")]
