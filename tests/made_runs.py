"""A tiny recipe file, and run folders made without training, whose checkpoints hold the weights of untrained models."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from recipes import in_sections

from megazh.index.metadata import TemplateInfo
from megazh.model.decoder import Decoder
from megazh.pipeline.precision import Dtype
from megazh.pipeline.state import WEIGHT, Piece
from megazh.run.folder import RunFolder
from megazh.run.metrics import Metrics, StepRecord
from megazh.training.checkpoint_list import CheckpointManifest, checkpoint_path
from megazh.training.checkpoint_write import HostCopy
from megazh.training.recipe import Recipe, load_recipe
from megazh.training.saver import write_manifest

RECIPE: dict[str, Any] = {
    "model": {
        "vocab_size": 512,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    },
    "data": {"manifest": "data_index/mini/mixture.yaml", "stories": 200},
    "seq_len": 32,
    "micro_batch_size": 2,
    "global_batch_size": 8,
    "steps": 6,
    "learning_rate": 1e-2,
    "warmup": 0.1,
    "dtype": "auto",
    "num_gpus": 2,
    "pipe_parallel_size": 2,
    "checkpoint_every": 0,
    "validate_every": 0,
    "validation_samples": 4,
    "sample_tokens": 8,
}


def write_recipe(path: Path, manifest: Path | None = None, **changes: Any) -> Path:
    """Write the tiny recipe to `path`, for the data of `manifest` or else for stories that the run makes itself."""
    values = {**RECIPE, **changes, "model": {**RECIPE["model"], **changes.get("model", {})}}
    if manifest is not None:
        values["data"] = {"manifest": str(manifest)}
    path.write_text(yaml.safe_dump(in_sections(values), allow_unicode=True))
    return path


def make_run(
    path: Path,
    recipe: Path,
    step: int = 6,
    dtype: torch.dtype = torch.float32,
    template: TemplateInfo | None = None,
) -> RunFolder:
    """Make the run folder `path` of one stage, with a checkpoint of `step` that lacks only the optimizer state."""
    run, values = RunFolder(path), load_recipe(recipe)
    run.begin(values.to_yaml(), values.open_mixture())
    add_checkpoint(run, values, step, dtype, template)
    return run


def unpadded(model: Decoder) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a model, without rows that only pad them."""
    for name, weight in model.named_parameters():
        yield name, weight.detach()[: getattr(weight, "rows", len(weight))]


def add_checkpoint(
    run: RunFolder,
    recipe: Recipe,
    step: int,
    dtype: torch.dtype = torch.float32,
    template: TemplateInfo | None = None,
) -> Path:
    """Save a checkpoint of initial weights, different ones for each step; returns its path."""
    model = Decoder(recipe.model, seed=step, lora=recipe.low_rank).to(dtype)
    pieces = [
        Piece(name, WEIGHT, tuple(weight.shape), 0, weight.numel(), weight.reshape(-1))
        for name, weight in unpadded(model)
    ]
    path = checkpoint_path(run.checkpoints, step)
    copy = HostCopy(pieces, rank=0)
    copy.take()
    written = copy.write(path)
    samples = step * recipe.batch.global_batch_size
    manifest = CheckpointManifest(
        run_id=run.info().run_id,
        step=step,
        samples=samples,
        tokens=samples * recipe.batch.seq_len,
        stages=1,
        replicas=1,
        bounds=[0, recipe.model.num_hidden_layers + 2],
        precision=Dtype(str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")),
        optimizer="adamw",
        updates=step,
        recipe=recipe.model_dump(mode="json", exclude_none=True),
        data=run.info().data or {},
        versions={},
        template=template,
        complete=step >= recipe.course.steps,
        files=written.files,
        tensors=written.tensors,
    )
    write_manifest(path, manifest)
    return path


def write_metrics(run: RunFolder, steps: int, seconds: float = 0.5, eta_seconds: float = 0) -> None:
    """Write the metrics of a run of `steps` steps: losses 4, 3.5, 3 and so on, two validations, three samples."""
    with Metrics(run.path, 0, quiet=False) as metrics:
        metrics.validation(0, 0, 5.0, 4.0, 4)
        for step in range(1, steps + 1):
            metrics.step(
                StepRecord(
                    step=step,
                    steps=steps,
                    tokens=step * 256,
                    loss=4.5 - step / 2,
                    learning_rate=1e-3,
                    grad_norm=1.0,
                    step_seconds=seconds,
                    tokens_per_second=1.0,
                    tokens_per_second_per_gpu=1.0,
                    mfu=None,
                    memory_bytes=None,
                    memory_reserved=None,
                    data_seconds=0.0,
                    skipped=False,
                    eta_seconds=eta_seconds,
                )
            )
        metrics.validation(steps, steps * 256, 2.5, 2.0, 4)
        for number, text in enumerate(["一", "二\n二", "三"]):
            metrics.sample(steps, f"问{number}", text)
