"""The checks before anything starts: from a request on the command line to a `Job` that launchers can run.

They start no process and write nothing but the cache: `checked_mixture` packs the samples.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from megazh.corpus.options import TextDocuments
from megazh.errors import UsageError
from megazh.pipeline.precision import Dtype, Precision, check_deepspeed_version, check_engine
from megazh.run.folder import ANOTHER_RUN, RunFolder
from megazh.training.checkpoint_list import list_checkpoints, read_manifest
from megazh.training.layout import Layout, make_layout
from megazh.training.learning_rate import warmup_steps
from megazh.training.recipe import Device, Recipe, Resume, fixed_keys_that_differ, read_recipe, run_recipe
from megazh.training.recipe_files import recipe_path

if TYPE_CHECKING:
    from megazh.index.mixture import Mixture

DEMO, BIG = "demo", "qwen0.5b_6x3090"


@dataclass(frozen=True)
class Request:
    """What the command line requests; see `megazh pretrain --help`."""

    engine: str = "ds_pp"
    recipe: str | None = None
    gpus: str | None = None
    """GPU ids such as `1,2,3` or `0-5`."""
    num_gpus: int | None = None
    stages: int | None = None
    hostfile: Path | None = None
    run: Path | None = None
    inputs: list[str] | None = None
    """The user's own text, in place of the recipe's data."""
    text_key: str = "text"
    text_documents: TextDocuments | None = None
    encoding: str | None = None
    """Encoding of the text, as `megazh.corpus.encodings.normal_encoding` gives it; None for UTF-8."""
    device: str | None = None
    dry_run: bool = False
    settings: list[str] = field(default_factory=list)
    """`key=value` settings on top of the recipe."""


@dataclass(frozen=True)
class Devices:
    """The devices that a run computes on."""

    device: Device
    """CPU or CUDA."""
    ranks: int
    """Number of ranks, one per GPU."""
    ids: tuple[str, ...] | None
    """CUDA_VISIBLE_DEVICES of the ranks: numbers as nvidia-smi counts them, or UUIDs; None on the CPU."""
    note: str = ""
    """A line to print where the choice may surprise; else empty."""


@dataclass(frozen=True)
class Job:
    """A run that passed its checks: what a launcher starts."""

    run: RunFolder
    recipe: Recipe
    """The recipe, with the layout that is about to run in its section `parallel`."""
    layout: Layout
    devices: Devices
    data_folder: Path
    """Folder in which data is prepared where it has to be made first."""
    hostfile: Path | None = None
    """Hosts of the ranks; None: this machine."""
    notes: tuple[str, ...] = ()
    """Lines to print before the start."""

    @property
    def device(self) -> Device:
        """Device type of the run."""
        return self.devices.device

    @property
    def precision(self) -> Precision:
        """The dtypes of the run."""
        return self.recipe.precision.on(self.device)

    @property
    def arguments(self) -> list[str]:
        """The arguments of `megazh` in each rank."""
        return ["rank", str(self.run.path.resolve())]

    @property
    def labels(self) -> list[str]:
        """Names of the ranks in messages, such as `rank 1 (stage 1)`."""
        return [f"rank {rank} (stage {rank // self.layout.replicas})" for rank in range(self.layout.ranks)]

    @property
    def environment(self) -> dict[str, str]:
        """Variables that each rank needs besides those of its launcher."""
        python_path = str(Path(__file__).resolve().parents[2])
        return {
            "PYTHONPATH": os.pathsep.join(filter(None, (python_path, os.environ.get("PYTHONPATH")))),
            # torch warns that NCCL guesses a rank's device, although each rank has set its own.
            "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        }


def requested_recipe(request: Request) -> tuple[Recipe, Path, Path]:
    """The recipe of a request, its run folder, and the folder in which its data is prepared if it has to be made.

    Raises:
        UsageError: the recipe or its settings cannot work.
    """
    path = recipe_path(request.recipe or (DEMO if request.gpus is None or request.inputs else BIG))
    recipe, settings = read_recipe(path, request.settings)
    if request.inputs is None:
        return recipe, request.run or Path("runs") / path.stem, Path(recipe.data.manifest).parent
    if not request.inputs:
        raise UsageError("-i: expected files or folders of text")
    if settings.origin("data.manifest") == "command line":
        raise UsageError("-i makes a manifest of its own, and data.manifest names another; give one of them")
    folder = Path("data_index") / (request.run.name if request.run else _name_of(request.inputs[0]))
    data = recipe.data.model_copy(update={"manifest": str(folder / "mixture.yaml"), "stories": None})
    return recipe.model_copy(update={"data": data}), request.run or Path("runs") / folder.name, folder


def _name_of(text: str) -> str:
    """`books` of `books.jsonl.gz`, `books/` and `books/*.txt`."""
    for part in reversed(Path(text).parts):
        name = part.split(".")[0]
        if name and not any(wild in part for wild in "*?[") and part not in ("..", "/"):
            return name
    return "text"


def make_job(request: Request, recipe: Recipe, run: Path, data_folder: Path, devices: Devices) -> Job:
    """Check a recipe on these devices, and lay it out.

    Raises:
        UsageError: the layout, the dtypes or the length cannot work.
    """
    stages, note = _stages(request, devices, recipe)
    layout = make_layout(recipe, devices.ranks, stages)
    check_deepspeed_version(version("deepspeed"))
    _check_precision(recipe, layout, devices.device)
    warmup_steps(recipe.total_steps, recipe.schedule.warmup)
    parallel = recipe.parallel.model_copy(
        update={"num_gpus": layout.ranks, "pipe_parallel_size": layout.stages, "device": devices.device}
    )
    notes = tuple(line for line in (note, devices.note) if line)
    recipe = _with_dtypes(recipe.model_copy(update={"parallel": parallel}), devices.device)
    return Job(RunFolder(run), recipe, layout, devices, data_folder, notes=notes)


def _with_dtypes(recipe: Recipe, device: Device) -> Recipe:
    """The recipe with the dtypes that it has on a device written out."""
    dtypes = recipe.precision.on(device)
    update = {
        "dtype": dtypes.compute, "grad_accum_dtype": dtypes.accumulation, "communication_dtype": dtypes.communication,
    }  # fmt: skip
    return recipe.model_copy(update={"precision": recipe.precision.model_copy(update=update)})


def check_recipe(recipe: Recipe) -> None:
    """Check that a recipe works on the GPUs that it names itself (without `num_gpus`: one per stage).

    Raises:
        UsageError: the batch, the stages or the warm-up cannot work.
    """
    stages = recipe.parallel.pipe_parallel_size
    make_layout(recipe, recipe.parallel.num_gpus or stages, stages)
    warmup_steps(recipe.total_steps, recipe.schedule.warmup)


def _stages(request: Request, devices: Devices, recipe: Recipe) -> tuple[int, str]:
    """Number of pipeline stages: the request's, else the recipe's.

    If none of -g, -n and -H was given and the GPUs do not divide by the recipe's stages, it is 1, with a note.
    """
    if request.stages is not None:
        return request.stages, ""
    wanted = recipe.parallel.pipe_parallel_size
    chosen = request.gpus is not None or request.num_gpus is not None or request.hostfile is not None
    if not chosen and devices.ranks % wanted:
        unit = "GPU" if devices.ranks == 1 else "GPUs"
        return 1, f"{devices.ranks} {unit} here, and the recipe has {wanted} pipeline stages: using one"
    return wanted, ""


def _check_precision(recipe: Recipe, layout: Layout, device: Device) -> None:
    """Raises UsageError for dtypes that DeepSpeed gets wrong, or that the device lacks."""
    precision, model = recipe.precision.on(device), recipe.model
    check_engine(layout.stages, precision, recipe.parallel.zero_stage, model.tie_word_embeddings)
    if model.attention_dropout and device is Device.CUDA and precision.compute is not Dtype.FP32:
        raise UsageError(
            f"model.attention_dropout={model.attention_dropout}: flash attention on CUDA in {precision.compute} has no "
            "dropout; set it to 0 (model.residual_dropout works), or precision.dtype=fp32"
        )
    if precision.compute is Dtype.FP16 and device is Device.CPU and not _cpu_has_fp16():
        raise UsageError("precision.dtype=fp16: DeepSpeed has no fp16 on this CPU; set precision.dtype=fp32 or bf16")


def _cpu_has_fp16() -> bool:
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    return CPU_Accelerator().is_fp16_supported()


def check_resume(job: Job) -> None:
    """Check that a run that exists already may be resumed as this job.

    Raises:
        UsageError: another layout, dtype, cut, model or seed; names what differs and both values.
    """
    run, recipe, layout = job.run, job.recipe, job.layout
    checkpoints = list_checkpoints(run.checkpoints)
    if recipe.checkpoint.resume is Resume.NEVER and (checkpoints or run.exists):
        raise UsageError(f"{run.path}: holds a run already, and resume=never; give another folder with -r")
    if checkpoints:
        saved = read_manifest(checkpoints[-1])
        if (saved.stages, saved.replicas) != (layout.stages, layout.replicas):
            raise UsageError(
                f"{checkpoints[-1]}: was saved by {saved.stages} stages x {saved.replicas} replicas, and this is "
                f"{layout.stages} x {layout.replicas}; resume with "
                f"-n {saved.stages * saved.replicas} -p {saved.stages}, or start another run with -r"
            )
        if saved.precision != job.precision.compute:
            raise UsageError(
                f"{checkpoints[-1]}: was saved in {saved.precision}, and this is {job.precision.compute} "
                "(precision.dtype=auto follows the device); resume in the same, or start another run with -r"
            )
        if recipe.parallel.stage_bounds not in (None, saved.bounds):
            raise UsageError(
                f"{checkpoints[-1]}: was saved with stage_bounds {saved.bounds}, and this run requests "
                f"{recipe.parallel.stage_bounds}; leave stage_bounds out, or start another run with -r"
            )
    if run.exists:
        for key, old, new in fixed_keys_that_differ(_with_dtypes(run_recipe(run), job.device), recipe):
            raise UsageError(f"{run.path}: the run was begun with {key}={old}, and this one has {new}; {ANOTHER_RUN}")


def is_complete(job: Job) -> bool:
    """Whether the run has a checkpoint of its last step."""
    checkpoints = list_checkpoints(job.run.checkpoints)
    return bool(checkpoints) and read_manifest(checkpoints[-1]).step >= job.recipe.total_steps


def checked_mixture(recipe: Recipe) -> Mixture:
    """Open the data of a recipe, and check that the model, the prompts and the length of the run fit it.

    Raises:
        UsageError: no manifest, ids above the vocabulary, a prompt without a token, or a mixture that ends too early.
        DataError: an index is damaged.
    """
    from megazh.index.metadata import load_tokenizer_of

    manifest = Path(recipe.data.manifest)
    if not manifest.exists() and not Path(f"{manifest}.idx").exists():
        prefix = manifest.with_suffix("")
        raise UsageError(
            f"data.manifest {manifest}: no such file; make an index with 'python tools/index_dataset.py --input TEXT "
            f"--tokenizer TOKENIZER --output {prefix}' and give data.manifest={prefix} (docs/data.md: The mixture)"
        )
    mixture = recipe.open_mixture()
    ids, rows = mixture.corpora[0].metadata.tokenizer.vocab_size, recipe.model.vocab_size
    if ids > rows:
        raise UsageError(
            f"the tokenizer of {manifest} has ids up to {ids - 1}, and the model has {rows} rows: set "
            f"model.vocab_size={-(-ids // 64) * 64}, or index with the recipe's tokenizer"
        )
    tokenizer = load_tokenizer_of(mixture.corpora[0].prefix, mixture.corpora[0].metadata)
    for prompt in recipe.evaluation.sample_prompts:
        if not tokenizer.encode(prompt):
            raise UsageError(f"sample_prompts: {prompt!r} has no token to continue from; give at least one character")
    batch = recipe.batch.global_batch_size
    needed = recipe.total_steps * batch
    if mixture.end is not None and needed > mixture.end:
        steps = mixture.end // batch
        raise UsageError(
            f"the run takes {needed:,} samples, and {manifest} ends after {mixture.end:,} (on_exhausted: stop); set "
            f"{f'steps={steps}, or ' if steps else ''}on_exhausted: wrap"
        )
    return mixture
