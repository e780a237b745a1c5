"""Whether a recipe works by itself and on its devices: length, layout, dtypes, memory."""

from collections.abc import Iterator
from importlib.metadata import version

from megazh.errors import Collector, UsageError
from megazh.pipeline.costs import costs_by_flops
from megazh.pipeline.precision import Dtype, check_deepspeed_version, check_engine
from megazh.training.checkpoint_list import newest_good
from megazh.training.job import Case
from megazh.training.optimizers.choose import check_optimizer
from megazh.training.recipe import Device
from megazh.training.stages import (
    ASSUMED_CARD_GIB,
    MemoryLimit,
    check_memory,
    fitting_bounds,
    memory_limit,
    work_of,
)


def length(case: Case) -> Iterator[str]:
    """Warm-up and decay fit into the run. Warns of batches and lengths of segments that begin behind its end, and of
    samples that are longer than the context."""
    course, schedule = case.recipe.course, case.recipe.schedule
    _ = course.schedule
    tokens, context = case.recipe.evaluation.sample_tokens, case.recipe.batch.seq_len
    if tokens >= context and case.settings.origin("evaluation.sample_tokens"):
        yield (
            f"warning: sample_tokens={tokens}: with its prompt, a sample has more tokens than the {context:,} that the "
            f"model is trained on; set less than {context:,}"
        )
    for key, numbers in (("batch", schedule.batch), ("length", schedule.length)):
        for tokens, number in (numbers or {}).items():
            if course.batches.steps_for(tokens) >= course.steps:
                yield (
                    f"warning: schedule.{key}: {number} from {tokens:,} tokens on never begins: the run ends at "
                    f"{course.total_tokens:,} tokens"
                )


def layout(case: Case) -> Iterator[str]:
    """Ranks, stages, replicas and the batch go together."""
    _ = case.job.layout
    yield from ()


def dtypes(case: Case) -> Iterator[str]:
    """The engine has these dtypes, and the device has them and the optimizer."""
    precision, recipe, device = case.recipe.precision.on(case.devices.device), case.recipe, case.devices.device
    found = Collector()
    with found.collecting():
        check_deepspeed_version(version("deepspeed"))
    with found.collecting():
        check_engine(precision, recipe.parallel.zero_stage)
    with found.collecting():
        check_optimizer(recipe.optimizer, device)
    if recipe.model.attention_dropout and device is Device.CUDA and precision.compute is not Dtype.FP32:
        found.add(
            UsageError(
                f"model.attention_dropout={recipe.model.attention_dropout}: flash attention on CUDA in "
                f"{precision.compute} has no dropout; set it to 0 (model.residual_dropout works), or "
                "precision.dtype=fp32"
            )
        )
    found.raise_all()
    yield from ()


def memory(case: Case) -> Iterator[str]:
    """Each stage fits `memory_limit_gib`, or the card. A card that is not known is compared with an RTX 3090."""
    job = case.job
    limit = memory_limit(job.recipe, job.devices.memory)
    assumed = limit is None and job.device is Device.CUDA and not case.planned
    if assumed:
        limit = MemoryLimit.of_card(ASSUMED_CARD_GIB * 2**30)
    if limit is None:
        return
    work = work_of(job.recipe, job.layout, job.precision)
    newest = newest_good(job.run.checkpoints)
    try:
        if newest and newest[1].stages == job.layout.stages and job.recipe.parallel.stage_bounds is None:
            check_memory(work, newest[1].bounds, limit)
        else:
            fitting_bounds(job.recipe, work, costs_by_flops(work), limit)
    except UsageError as error:
        if not assumed:
            raise
        yield f"warning: {error}; the memory of the run's GPUs is not known here: this is an RTX 3090's"
