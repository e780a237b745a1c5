"""Which dtypes a run uses on a device, and which combinations are refused."""

from megazh.errors import UsageError
from megazh.pipeline.precision import Precision, check_engine
from megazh.training.layout import Layout
from megazh.training.recipe import PrecisionChoice, Recipe


def precision_on(recipe: Recipe, kind: str) -> Precision:
    """The precision of `recipe` on a device of this kind, `cpu` or `cuda`."""
    if recipe.precision is PrecisionChoice.AUTO:
        return Precision.BF16 if kind == "cuda" else Precision.FP32
    return Precision(recipe.precision.value)


def accumulation(recipe: Recipe, precision: Precision) -> Precision:
    """What gradients of micro-batches are summed in."""
    if recipe.grad_accum_dtype is not None:
        return Precision(recipe.grad_accum_dtype.value)
    return Precision.FP16 if precision is Precision.FP16 else Precision.FP32


def communication(recipe: Recipe, accumulated: Precision) -> Precision:
    """What gradients of replicas are summed in."""
    return Precision(recipe.communication_dtype.value) if recipe.communication_dtype is not None else accumulated


def check_precision(recipe: Recipe, layout: Layout, kind: str) -> None:
    """Refuse what cannot work on this device.

    Raises:
        UsageError: a combination that DeepSpeed gets wrong, or a dtype that the device has not.
    """
    precision = precision_on(recipe, kind)
    check_engine(
        layout.stages, precision, accumulation(recipe, precision), recipe.zero_stage, recipe.model.tie_word_embeddings
    )
    if recipe.model.attention_dropout and kind == "cuda" and precision is not Precision.FP32:
        raise UsageError(
            f"model.attention_dropout={recipe.model.attention_dropout}: flash attention on CUDA in {precision} has no "
            "dropout; set it to 0 (model.residual_dropout works), or precision=fp32"
        )
    if precision is Precision.FP16 and kind == "cpu" and not _cpu_has_fp16():
        raise UsageError("precision=fp16: DeepSpeed has no fp16 on this CPU; set precision=fp32 or bf16")


def _cpu_has_fp16() -> bool:
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    return CPU_Accelerator().is_fp16_supported()
