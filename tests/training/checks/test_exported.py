"""A tokenizer or a model that cannot be exported is warned of before training, not found out after it."""

from pathlib import Path
from typing import Any

from cases import make_case
from tokenizer_kinds import index_with

from megazh.training.checks import exported


def warned(folder: Path, prefix: Path, **model: Any) -> list[str]:
    return list(exported.tokenizer(make_case(folder, prefix, model={"vocab_size": 2048, **model})))


def test_qwens_family_takes_qwens_tokenizers_alone(tmp_path: Path) -> None:
    prefix = index_with(tmp_path, "BPE with bytes")
    assert warned(tmp_path, prefix) == []
    (line,) = warned(tmp_path, prefix, qkv_bias=True)
    assert line.startswith("warning: megazh export will refuse what comes of this run: ")
    assert "use a model with model.qkv_bias=false" in line
    assert warned(tmp_path, index_with(tmp_path, "byte-level BPE"), qkv_bias=True) == []


def test_sentencepiece(tmp_path: Path) -> None:
    assert warned(tmp_path, index_with(tmp_path, "SentencePiece BPE")) == []
    (line,) = warned(tmp_path, index_with(tmp_path, "SentencePiece Unigram"))
    assert "cannot be written as a tokenizer.json with the same ids" in line


def test_what_no_family_can_express_is_told_elsewhere(tmp_path: Path) -> None:
    assert warned(tmp_path, index_with(tmp_path, "SentencePiece Unigram"), norm="layernorm") == []


def test_a_model_that_no_family_can_express(tmp_path: Path) -> None:
    assert list(exported.model(make_case(tmp_path))) == []
    (line,) = exported.model(make_case(tmp_path, None, ["norm=layernorm", "mlp=gelu"]))
    assert line.startswith("warning: megazh export will refuse this model: ")
    assert "model.norm=layernorm (only rmsnorm); model.mlp=gelu" in line
    assert "norm is set on the command line" in line
