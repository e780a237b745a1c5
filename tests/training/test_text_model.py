"""A model opened from its run folder: the checkpoint that is loaded, and the text that is written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from made_runs import add_checkpoint, make_run, write_recipe

from megazh.errors import DataError, UsageError
from megazh.model.sampling import SamplingOptions
from megazh.run.folder import RunFolder
from megazh.training.checkpoint_list import DIGEST, MANIFEST, list_checkpoints
from megazh.training.recipe import run_recipe
from megazh.training.text_model import TextModel, open_model

GREEDY = SamplingOptions(temperature=0.0)
PROMPT = "从前，有一只小兔子。"


@pytest.fixture
def run(stories: Path, tmp_path: Path) -> RunFolder:
    """A run with a checkpoint of step 6; the model has ten times as many rows as the tokenizer has ids."""
    recipe = write_recipe(tmp_path / "mini.yaml", stories, model={"vocab_size": 4096})
    return make_run(tmp_path / "run", recipe)


def written(model: TextModel, options: SamplingOptions = GREEDY, count: int = 40, seed: int = 0, **more: bool) -> str:
    return "".join(model.stream(PROMPT, count, options, seed, **more))


def test_the_newest_checkpoint_or_the_one_that_is_named(run: RunFolder) -> None:
    add_checkpoint(run, run_recipe(run), 12)
    (run.checkpoints / ".step_00000013.unfinished").mkdir()
    newest, named, older = (open_model(run.path, name) for name in (None, "step_00000012", "step_00000006"))
    assert torch.equal(newest.model.embedding.weight, named.model.embedding.weight)
    assert not torch.equal(newest.model.embedding.weight, older.model.embedding.weight)


def test_neither_data_nor_recipe_is_needed(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = written(open_model(run.path))
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(run.path, tmp_path / "elsewhere" / "moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = Path(moved) / "config.yaml"
    config.write_text(config.read_text().replace("manifest: ", "manifest: /nowhere"))
    assert written(open_model(Path("moved"))) == before


def test_the_cache_changes_nothing(run: RunFolder) -> None:
    model = open_model(run.path)
    assert written(model) == written(model, cached=False) != ""
    drawn = SamplingOptions(1.0, 50, 0.9)
    assert written(model, drawn, seed=3) == written(model, drawn, seed=3, cached=False)


def test_the_same_seed_the_same_text(run: RunFolder) -> None:
    drawn = SamplingOptions(1.0)
    one, other = open_model(run.path), open_model(run.path)
    assert written(one, drawn, seed=1) == written(other, drawn, seed=1) != written(other, drawn, seed=2)


def test_rows_behind_the_tokenizer_are_never_drawn_and_text_stays_text(run: RunFolder) -> None:
    """An untrained model draws tokens that are parts of characters."""
    model = open_model(run.path)
    assert model.model.embedding.weight.shape[0] == 4096
    assert model.tokenizer.vocab_size == 400
    with torch.no_grad():  # a head that prefers the rows that belong to no token
        model.model.embedding.weight[400:] *= 100
    text = written(model, SamplingOptions(2.0), 100, stop_at_end=False)
    assert len(text) > 20
    assert text.encode().decode() == text


def test_pieces_put_together_are_the_text(run: RunFolder) -> None:
    model = open_model(run.path)
    drawn = SamplingOptions(1.0)
    pieces = list(model.stream(PROMPT, 30, drawn, 5, stop_at_end=False))
    assert len(pieces) == 31, "one per token, and the bytes that were held back"
    assert "".join(pieces) == written(model, drawn, 30, 5, stop_at_end=False)


def test_the_end_of_a_document_ends_the_text_unless_it_is_ignored(run: RunFolder) -> None:
    model = open_model(run.path)
    ids = model.tokenizer.encode(PROMPT)

    def prefers_the_end(tokens: torch.Tensor, attend: object) -> torch.Tensor:
        return torch.ones(*tokens.shape, 32)

    model.model.forward = prefers_the_end  # type: ignore[method-assign,assignment]
    with torch.no_grad():
        model.model.embedding.weight[:] = 0.0
        model.model.embedding.weight[model.tokenizer.eod_id] = 1.0
    assert ids
    assert written(model) == ""
    assert len(list(model.stream(PROMPT, 7, GREEDY, 0, stop_at_end=False))) == 8


def test_a_prompt_of_more_tokens_than_a_sample_gets_a_warning(run: RunFolder) -> None:
    model = open_model(run.path)
    seq_len = run_recipe(run).batch.seq_len
    assert model.trained_length == seq_len
    long = PROMPT * seq_len
    assert model.warning(PROMPT) is None
    found = model.warning(long)
    assert found is not None
    assert f"the prompt has {len(model.tokenizer.encode(long)):,} tokens" in found
    assert f"trained on {seq_len:,} at a time" in found


def test_no_run_no_checkpoint_no_such_checkpoint(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere: no run "):
        open_model(tmp_path / "nowhere")
    add_checkpoint(run, run_recipe(run), 12)
    with pytest.raises(UsageError, match=r"no checkpoint 'step_7'; there are step_00000006, step_00000012$"):
        open_model(run.path, "step_7")
    with pytest.raises(UsageError, match=r"no checkpoint '\.\./checkpoints/step_00000006'"):
        open_model(run.path, "../checkpoints/step_00000006")
    shutil.rmtree(run.checkpoints)
    with pytest.raises(UsageError, match=f"^{run.path}: holds no checkpoint yet$"):
        open_model(run.path)


def test_a_gpu_that_is_not_there(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="--device cuda: torch can use no GPU here"):
        open_model(run.path, device="cuda")


def test_damaged_files_are_named(run: RunFolder) -> None:
    path = run.checkpoints / "step_00000006" / "weights" / "blocks.0.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match=rf"{path}: {len(content) - 1} bytes instead of {len(content)}"):
        open_model(run.path)
    path.unlink()
    with pytest.raises(DataError, match=rf"{path}: missing"):
        open_model(run.path)


def test_the_newest_that_is_whole_is_taken(run: RunFolder) -> None:
    later = add_checkpoint(run, run_recipe(run), 7)
    (later / MANIFEST).unlink()
    assert open_model(run.path, device="cpu")
    with pytest.raises(DataError, match="missing or damaged"):
        open_model(run.path, later.name, device="cpu")


def test_a_checkpoint_of_another_run_is_refused(run: RunFolder) -> None:
    (path,) = list_checkpoints(run.checkpoints)
    values = json.loads((path / MANIFEST).read_text())
    del values[DIGEST]
    (path / MANIFEST).write_text(json.dumps({**values, "run_id": run.info().run_id}))
    assert open_model(run.path, device="cpu")
    (path / MANIFEST).write_text(json.dumps({**values, "run_id": "another"}))
    with pytest.raises(DataError, match=rf"^{path}: belongs to another run \(its run_id is another, that of this run "):
        open_model(run.path, device="cpu")
