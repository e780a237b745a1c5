"""Weights that a run is to begin with: they are there, of the same model, and of the same tokenizer."""

import json
import shutil
from pathlib import Path

import pytest
from cases import make_case
from made_runs import make_run, write_recipe
from tokenizer_kinds import index_with

from megazh.errors import DataError, SeveralErrors, UsageError
from megazh.run.folder import RunFolder
from megazh.training.checks.data import vocabulary
from megazh.training.checks.initial import initial_checkpoint
from megazh.training.export import ExportOptions, export_to_hf
from megazh.training.imported import import_folder
from megazh.training.model_source import find_model


@pytest.fixture
def trained(tmp_path: Path, stories: Path) -> RunFolder:
    """A run that is done."""
    return make_run(tmp_path / "trained", write_recipe(tmp_path / "trained.yaml", stories))


def found(tmp_path: Path, stories: Path | None, wanted: Path, *settings: str) -> list[str]:
    """The lines of the check for a new run."""
    return list(initial_checkpoint(make_case(tmp_path, stories, [f"initial_checkpoint={wanted}", *settings])))


def test_a_checkpoint_a_hugging_face_folder_and_an_import(tmp_path: Path, stories: Path, trained: RunFolder) -> None:
    checkpoint = trained.checkpoints / "step_00000006"
    export_to_hf(find_model(checkpoint), tmp_path / "hf", ExportOptions())
    import_folder(tmp_path / "hf", tmp_path / "imported")
    for path in (checkpoint, tmp_path / "hf", tmp_path / "imported"):
        assert found(tmp_path, stories, path) == [], path
        assert found(tmp_path, None, path) == [], "the data is still to be made"
    with pytest.raises(UsageError, match=r"a run; name one of its checkpoints: .*/step_00000006"):
        found(tmp_path, stories, trained.path)


def test_nothing_and_something_damaged(tmp_path: Path, stories: Path, trained: RunFolder) -> None:
    with pytest.raises(UsageError, match="nowhere: no run"):
        found(tmp_path, stories, tmp_path / "nowhere")
    export_to_hf(find_model(trained.path), tmp_path / "hf", ExportOptions())
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match=r"model.safetensors: not a file of tensors"):
        found(tmp_path, stories, tmp_path / "hf")
    (trained.checkpoints / "step_00000006" / "weights" / "norm.safetensors").unlink()
    with pytest.raises(DataError, match=r"norm.safetensors: missing"):
        found(tmp_path, stories, trained.checkpoints / "step_00000006")


def test_another_model(tmp_path: Path, stories: Path, trained: RunFolder) -> None:
    checkpoint = trained.checkpoints / "step_00000006"
    with pytest.raises(SeveralErrors) as refusal:
        found(tmp_path, stories, checkpoint, "hidden_size=64", "model.parallel_residual=true", "residual_dropout=0.1")
    first, second, third = str(refusal.value).splitlines()
    assert f"model.hidden_size=64: the weights of {checkpoint} have 32; set model.hidden_size=32" in first
    assert "hidden_size is set on the command line" in first
    assert "model.head_dim=16" in second
    assert "model.parallel_residual=True" in third


def test_weights_with_low_rank_pairs_are_to_be_merged_first(tmp_path: Path, stories: Path) -> None:
    recipe = write_recipe(tmp_path / "lora.yaml", stories, lora={"rank": 2}, initial_checkpoint="base")
    checkpoint = make_run(tmp_path / "lora", recipe).checkpoints / "step_00000006"
    with pytest.raises(UsageError, match=rf"low-rank pairs .* with 'megazh export {checkpoint} --to hf OUT'"):
        found(tmp_path, stories, checkpoint)
    export_to_hf(find_model(checkpoint), tmp_path / "hf", ExportOptions())
    assert found(tmp_path, stories, tmp_path / "hf") == []


def test_positions_that_the_weights_do_not_know(tmp_path: Path, stories: Path, trained: RunFolder) -> None:
    checkpoint = trained.checkpoints / "step_00000006"
    (line,) = found(tmp_path, stories, checkpoint, "rope_theta=1e6")
    assert line.startswith(f"warning: {checkpoint}: the weights were trained with positions of theta 10000, and this")
    assert "and this run has theta 1e+06" in line
    assert "rope_theta is set on the command line" in line
    (line,) = found(tmp_path, stories, checkpoint, "seq_len=64")
    assert f"{checkpoint}: the weights were trained on 32 tokens at a time, and batch.seq_len=64" in line
    assert "set model.rope_scaling to linear, yarn or theta, or to none" in line
    assert found(tmp_path, stories, checkpoint, "seq_len=64", "rope_scaling=none") == []
    assert found(tmp_path, stories, checkpoint, "seq_len=16", "rope_scaling=yarn") == [], "nothing to extend"
    (line,) = found(tmp_path, stories, checkpoint, "seq_len=80", "rope_scaling=yarn")
    said = "positions of 32 tokens (theta 10000) are extended to 80 (theta 10000, yarn scaling by 3)"
    assert line == f"{checkpoint}: {said}"
    (line,) = found(tmp_path, stories, checkpoint, "seq_len=64", "rope_scaling=theta")
    assert "extended to 64 (theta 25198.4)" in line  # 10000 * 2^(8 / 6)


def test_another_tokenizer(tmp_path: Path, stories: Path, trained: RunFolder) -> None:
    export_to_hf(find_model(trained.path), tmp_path / "hf", ExportOptions())
    path = tmp_path / "hf" / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["merges"].pop()
    path.write_text(json.dumps(values))
    (line,) = found(tmp_path, stories, tmp_path / "hf")
    assert line.startswith(f"WARNING: {tmp_path / 'hf'} has another tokenizer than {stories}")
    path.unlink()
    (line,) = found(tmp_path, stories, tmp_path / "hf")
    assert "its tokenizer is not compared with that of the data: " in line
    moved = tmp_path / "moved"
    shutil.copytree(trained.checkpoints / "step_00000006", moved)
    (line,) = found(tmp_path, stories, moved)
    assert "its tokenizer is not compared" in line


def test_data_with_more_ids_than_the_weights_have_rows(tmp_path: Path, stories: Path) -> None:
    """Neither check sends the user to the other one's error."""
    recipe = write_recipe(tmp_path / "small.yaml", stories, model={"vocab_size": 256})
    checkpoint = make_run(tmp_path / "small", recipe).checkpoints / "step_00000006"
    with pytest.raises(UsageError, match="have 256; the tokenizer of the data has 400 ids: make the data with the tok"):
        found(tmp_path, stories, checkpoint)
    with pytest.raises(
        UsageError, match=r"the model has 256 rows: make the data with the tokenizer of .*step_00000006"
    ):
        list(vocabulary(make_case(tmp_path, stories, [f"initial_checkpoint={checkpoint}", "vocab_size=256"])))


def test_the_same_tokenizer_in_another_format(tmp_path: Path) -> None:
    """Data of a SentencePiece model, and weights from the folder that a run of it was exported to."""
    prefix = index_with(tmp_path, "SentencePiece BPE")
    model = {"vocab_size": 512}
    run = make_run(tmp_path / "trained", write_recipe(tmp_path / "trained.yaml", prefix, model=model))
    export_to_hf(find_model(run.path), tmp_path / "hf", ExportOptions())
    case = make_case(tmp_path, prefix, [f"initial_checkpoint={tmp_path / 'hf'}"], model=model)
    assert list(initial_checkpoint(case)) == []
