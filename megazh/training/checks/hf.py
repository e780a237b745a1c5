"""Whether a recipe works with `-t hf`: packages, keys that Hugging Face's Trainer cannot honour, and memory."""

import importlib.util
from collections.abc import Iterator
from importlib.metadata import version

from megazh.errors import Collector, UsageError
from megazh.exchange.families import choose_family
from megazh.model.backend import Backend
from megazh.pipeline.memory import stage_memory
from megazh.pipeline.precision import Dtype, Precision, check_deepspeed_version
from megazh.training.job import Case
from megazh.training.recipe import OptimizerName, Recipe, Spike
from megazh.training.stages import ASSUMED_CARD_GIB, MemoryLimit, memory_limit, work_of

PACKAGES = ("transformers", "accelerate")

NO_OFFLOAD = (
    "nothing is offloaded to host memory: models of up to 1.5B parameters, which this is made for, fit cards of 24 to "
    "80 GB with their state sharded, and every step would wait for the PCIe bus"
)


def packages(case: Case) -> Iterator[str]:
    """The packages of the extra `hf` are installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"-t hf: {' and '.join(missing)} not installed; run 'bash jobs/setup.sh --hf', or pip install 'megazh[hf]'"
        )
    yield from ()


def keys(case: Case) -> Iterator[str]:
    """All settings that decide the result can be honoured; each that cannot is refused by name."""
    found, recipe = Collector(), case.recipe
    with found.collecting():
        check_deepspeed_version(version("deepspeed"))
    with found.collecting():
        choose_family(recipe.model)
    precision = recipe.precision.on(case.devices.device)
    stages = case.request.stages or recipe.parallel.pipe_parallel_size
    for fault in (*_faults(recipe, stages), *_dtype_faults(recipe, precision, case.devices.ranks)):
        found.add(UsageError(fault))
    found.raise_all()
    yield from ()


def _faults(recipe: Recipe, stages: int) -> Iterator[str]:
    model, optimizer, parallel = recipe.model, recipe.optimizer, recipe.parallel
    if stages > 1:
        yield f"pipe_parallel_size={stages}: -t hf has replicas only; give -p 1, or -t ds_pp"
    if recipe.attention_group is not None:
        yield "attention.pattern=s2: -t hf has full attention only; set attention.pattern=full, or give -t ds_pp"
    if len(sizes := recipe.course.sizes()) > 1:
        yield (
            f"schedule.batch: steps of {', '.join(map(str, sizes))} samples, and -t hf has one size for all; leave "
            "schedule.batch out, or give -t ds_pp"
        )
    if parallel.stage_bounds is not None:
        yield f"stage_bounds={parallel.stage_bounds}: -t hf has no stages; leave stage_bounds out, or give -t ds_pp"
    if parallel.zero_stage > 2:
        yield (
            f"zero_stage={parallel.zero_stage}: it gathers each layer's weights again and again, to save memory that "
            "models of up to 1.5B parameters do not need on cards of 24 to 80 GB; set zero_stage=1 or 2"
        )
    if optimizer.name is not OptimizerName.ADAMW:
        yield f"optimizer.name={optimizer.name}: -t hf has adamw only; set optimizer.name=adamw, or give -t ds_pp"
    if optimizer.z_loss:
        yield f"optimizer.z_loss={optimizer.z_loss:g}: -t hf has none; set z_loss=0, or give -t ds_pp"
    if recipe.noise.neftune_alpha:
        yield (
            f"noise.neftune_alpha={recipe.noise.neftune_alpha:g}: -t hf adds no noise; set it to 0, or give -t ds_pp"
        )
    if recipe.guard.spike not in (None, Spike.IGNORE):
        yield (
            f"guard.spike={recipe.guard.spike}: with -t hf, the loss of a step is known after its update only; leave "
            "guard.spike out, or give -t ds_pp"
        )
    if recipe.lora.rank:
        yield f"lora.rank={recipe.lora.rank}: -t hf trains all weights; leave lora out, or give -t ds_pp"
    for key in ("residual_dropout", "attention_dropout"):
        if rate := getattr(model, key):
            yield f"model.{key}={rate:g}: -t hf trains without dropout; set {key}=0, or give -t ds_pp"


def _dtype_faults(recipe: Recipe, precision: Precision, ranks: int) -> Iterator[str]:
    if precision.compute is Dtype.FP16:
        yield "precision.dtype=fp16: small gradients vanish in it; set precision.dtype=bf16, or fp32"
    if precision.accumulation is not Dtype.FP32:
        yield (
            f"grad_accum_dtype={precision.accumulation}: gradients are always summed in fp32; leave grad_accum_dtype "
            "out, or set fp32"
        )
    if precision.communication is Dtype.FP16:
        yield "communication_dtype=fp16: small gradients vanish in it; set communication_dtype=bf16, or fp32"
    if precision.communication is Dtype.BF16 and ranks > 1 and not recipe.parallel.zero_stage:
        yield "communication_dtype=bf16: with zero_stage=0, gradients travel in fp32; set zero_stage=1, or fp32"


def memory(case: Case) -> Iterator[str]:
    """An estimate of what a rank needs, where that is more than it has: the Trainer's own use is not known exactly."""
    job = case.job
    limit = memory_limit(job.recipe, job.devices.memory)
    if limit is None and job.devices.ids is not None:
        limit = MemoryLimit.of_card(ASSUMED_CARD_GIB * 2**30)
    if limit is None:
        return
    work = work_of(job.recipe, job.layout, job.precision, Backend.VARLEN)
    needed = stage_memory(work, 0, 0, job.recipe.model.num_hidden_layers + 2)
    # Weights are fp32 where nothing is sharded, and replicas hold all of the optimizer's state.
    total = needed.total
    if job.layout.ranks > 1 and not job.recipe.parallel.zero_stage:
        total += needed.optimizer * (job.layout.replicas - 1)
    if total > limit.bytes:
        yield (
            f"warning: about {total / 2**30:.3g} GiB a GPU are needed, and there are {limit.bytes / 2**30:.3g} "
            f"({limit.source}); take a smaller micro_batch_size, or activation_checkpointing=true"
        )


def describe_engine(recipe: Recipe, ranks: int) -> str:
    """How the ranks train together, and in which form."""
    stage = recipe.parallel.zero_stage
    how = "one process" if ranks == 1 else f"ZeRO-{stage} of DeepSpeed" if stage else "DDP"
    return f"Hugging Face Trainer (transformers {version('transformers')}), {how}, {choose_family(recipe.model)}"
