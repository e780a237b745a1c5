"""The model card of an exported folder: figures of the run, what is left to fill in, and code that runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from decoders import decoder, small
from made_runs import add_checkpoint, make_run, write_metrics, write_recipe
from saved_models import save_model

from megazh.exchange.families import Family
from megazh.pipeline.precision import Dtype
from megazh.run.folder import RunFolder
from megazh.training.export import ExportOptions, export_to_hf
from megazh.training.model_card import model_card
from megazh.training.model_source import find_model
from megazh.training.recipe import run_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, stories: Path) -> RunFolder:
    """A run of six steps, with checkpoints of steps 2 and 6 and the losses of all."""
    folder = tmp_path_factory.mktemp("run")
    made = make_run(folder / "run", write_recipe(folder / "mini.yaml", stories))
    add_checkpoint(made, run_recipe(made), 2)
    write_metrics(made, 6)
    return made


def card(run: RunFolder, step: int) -> str:
    source = find_model(run.path, f"step_{step:08d}")
    return model_card(source, Family.LLAMA, Dtype.BF16, "mini")


def test_it_tells_of_model_training_data_and_losses(run: RunFolder) -> None:
    text, info = card(run, 6), run.info()
    assert "# mini" in text
    assert "| parameters | 37,024, bf16 |" in text
    assert "| family | llama (`LlamaForCausalLM`) |" in text
    assert "6 optimizer steps, 48 samples, 1,536 tokens." in text
    for corpus in info.corpora:
        assert f"| {corpus.name} | {corpus.tokens:,} | {corpus.training_documents:,} |" in text
    assert info.tokenizer.fingerprint in text
    assert "megazh" in text.partition("## Versions")[2]
    assert text.count("*To fill in") == 2
    assert "**Licence:** *to fill in.*" in text


def test_losses_and_steps_are_those_of_the_checkpoint(run: RunFolder) -> None:
    early, late = card(run, 2), card(run, 6)
    assert "| training, step 1 | 4.0000 |  |\n| training, step 2 | 3.5000 |  |\n" in early
    assert "| training, step 6 | 1.5000 |  |" in late
    assert "| validation, step 0 | 5.0000 | 4.0000 |\n| validation, step 6 | 2.5000 | 2.0000 |" in late
    assert "validation, step 6" not in early
    assert "2 optimizer steps" in early


def test_the_recipe_is_in_it_without_paths(run: RunFolder) -> None:
    text = card(run, 6)
    block = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert block
    values, recipe = yaml.safe_load(block[1]), run_recipe(run)
    assert values["schedule"]["steps"] == recipe.schedule.steps
    assert values["model"]["hidden_size"] == recipe.model.hidden_size
    assert values.keys() <= {"model", "batch", "optimizer", "schedule", "precision"}
    assert str(run.path.parent) not in text


def test_a_checkpoint_without_a_run_tells_less(tmp_path: Path) -> None:
    source = find_model(save_model(tmp_path, decoder(small())))
    text = model_card(source, Family.LLAMA, Dtype.FP32, "alone")
    assert "3 optimizer steps" in text
    assert "## Data" not in text
    assert "## Losses" not in text


def test_its_code_runs(run: RunFolder, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    export_to_hf(find_model(run.path), tmp_path / "mini", ExportOptions())
    text = (tmp_path / "mini" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code
    done = subprocess.run([sys.executable, "-c", code[1]], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("从前，")
