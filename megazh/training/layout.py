"""How ranks, stages, replicas and micro-batches go together, or why they do not."""

from dataclasses import dataclass

from megazh.errors import UsageError
from megazh.training.recipe import Recipe


@dataclass(frozen=True)
class Layout:
    """Arrangement of a run's ranks; ranks = stages * replicas."""

    ranks: int
    stages: int
    replicas: int
    micro_batch_size: int
    micro_batches: int
    """Micro-batches per replica in the largest optimizer step (gradient accumulation steps)."""

    def micro_batches_of(self, samples: int) -> int:
        """Micro-batches per replica in a step of so many samples."""
        return samples // (self.micro_batch_size * self.replicas)


def make_layout(recipe: Recipe, ranks: int, stages: int | None = None) -> Layout:
    """Lay out a recipe on a number of ranks.

    Args:
        recipe: the recipe.
        ranks: number of ranks, one per GPU.
        stages: number of pipeline stages, if not the recipe's.

    Raises:
        UsageError: ranks do not divide by stages, there are more stages than parts of the model, or the batch does
            not add up; with the numbers and with values that would work.
    """
    stages = stages or recipe.parallel.pipe_parallel_size
    parts = recipe.model.num_hidden_layers + 2
    fitting = ", ".join(str(count) for count in range(1, ranks + 1) if ranks % count == 0 and count <= parts)
    if ranks % stages:
        raise UsageError(f"{ranks} GPUs do not divide into {stages} pipeline stages; -p may be {fitting}")
    if stages > parts:
        raise UsageError(
            f"{stages} pipeline stages for {parts} parts (embedding, {parts - 2} layers, head); -p may be {fitting}"
        )
    replicas = ranks // stages
    size, total = recipe.batch.micro_batch_size, recipe.batch.global_batch_size
    micro_batches, rest = divmod(total, size * replicas)
    sizes = recipe.course.sizes()
    given = recipe.batch.gradient_accumulation_steps
    if given is not None and size * given * replicas != total:
        other = "" if rest else f", or gradient_accumulation_steps={micro_batches}"
        raise UsageError(
            f"the batch does not add up: micro_batch_size {size} x gradient_accumulation_steps {given} x {replicas} "
            f"replicas = {size * given * replicas}, and global_batch_size is {total}; set "
            f"global_batch_size={size * given * replicas}{other}"
        )
    if rest:
        raise UsageError(
            f"global_batch_size {total} does not divide by micro_batch_size {size} x {replicas} replicas = "
            f"{size * replicas}; {_remedy(total, size, replicas)}"
        )
    for samples in sizes:
        if samples % (size * replicas):
            raise UsageError(
                f"schedule.batch: {samples} samples do not divide by micro_batch_size {size} x {replicas} replicas = "
                f"{size * replicas}; {_remedy_of_sizes(samples, sizes, size, replicas)}"
            )
    bounds = recipe.parallel.stage_bounds
    if bounds is not None and len(bounds) != stages + 1:
        raise UsageError(f"stage_bounds {bounds} cut into {len(bounds) - 1} stages, and there are {stages}")
    return Layout(ranks, stages, replicas, size, max(sizes) // (size * replicas))


def _remedy_of_sizes(samples: int, sizes: list[int], size: int, replicas: int) -> str:
    near = max(1, round(samples / (size * replicas))) * size * replicas
    fitting = [count for count in range(1, size) if not any(each % (count * replicas) for each in sizes)]
    return f"give {near} in their place" + (f", or set micro_batch_size={fitting[-1]}" if fitting else "")


def _remedy(batch: int, size: int, replicas: int) -> str:
    sizes = [count for count in range(1, size + 1) if batch % (count * replicas) == 0]
    if sizes:
        return f"set micro_batch_size={sizes[-1]}, or another global_batch_size"
    near = max(1, round(batch / (size * replicas))) * size * replicas
    return f"set global_batch_size={near}, or use another number of GPUs or stages"
