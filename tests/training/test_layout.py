"""Ranks, stages, replicas and micro-batches: they add up, and the remedies in refusals work."""

import itertools
import re
from typing import Any

import pytest
from recipes import make_recipe

from megazh.errors import UsageError
from megazh.training.layout import Layout, make_layout


def refused(*arguments: object, **changes: object) -> str:
    with pytest.raises(UsageError) as caught:
        make_layout(make_recipe(**changes), *arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_numbers_add_up() -> None:
    recipe = make_recipe(micro_batch_size=2, global_batch_size=24, pipe_parallel_size=2)
    assert make_layout(recipe, 6) == Layout(ranks=6, stages=2, replicas=3, micro_batch_size=2, micro_batches=4)
    assert make_layout(recipe, 6, 1) == Layout(ranks=6, stages=1, replicas=6, micro_batch_size=2, micro_batches=2)
    assert make_layout(recipe, 3, 3) == Layout(ranks=3, stages=3, replicas=1, micro_batch_size=2, micro_batches=12)


@pytest.mark.parametrize(
    ("ranks", "stages", "fitting"),
    [(6, 4, "1, 2, 3, 6"), (7, 2, "1, 7"), (4, 3, "1, 2, 4"), (1, 2, "1"), (12, 5, "1, 2, 3, 4, 6")],
)
def test_stages_that_do_not_divide_list_those_that_do(ranks: int, stages: int, fitting: str) -> None:
    message = refused(ranks, stages, model={"num_hidden_layers": 5}, global_batch_size=5040, micro_batch_size=1)
    assert f"{ranks} GPUs do not divide into {stages} pipeline stages" in message
    assert message.endswith(f"-p may be {fitting}")
    recipe = make_recipe(model={"num_hidden_layers": 5}, global_batch_size=5040, micro_batch_size=1)
    for count in fitting.split(", "):
        assert make_layout(recipe, ranks, int(count)).stages == int(count)


def test_more_stages_than_parts() -> None:
    message = refused(6, 6, global_batch_size=12)
    assert message == "6 pipeline stages for 4 parts (embedding, 2 layers, head); -p may be 1, 2, 3"


def test_every_remedy_for_a_batch_that_does_not_add_up_works() -> None:
    """Each setting that a refusal names is accepted when it is tried."""
    refusals = 0
    for size, replicas, batch, given in itertools.product(
        (1, 2, 3, 8), (1, 2, 3, 5), (1, 6, 7, 8, 24), (None, 1, 3, 4)
    ):
        changes = {"micro_batch_size": size, "global_batch_size": batch, "gradient_accumulation_steps": given}
        try:
            layout = make_layout(make_recipe(**changes), replicas)
        except UsageError as error:
            refusals += 1
            message = str(error)
            assert "\n" not in message
            assert all(re.search(rf"\b{number}\b", message) for number in (size, batch, replicas)), message
            remedies = re.findall(r"(micro_batch_size|global_batch_size|gradient_accumulation_steps)=(\d+)", message)
            assert remedies, message
            for key, value in remedies:
                accepted = make_layout(make_recipe(**{**changes, key: int(value)}), replicas)
                assert accepted.micro_batches >= 1, message
        else:
            assert layout.micro_batch_size * layout.micro_batches * layout.replicas == batch
            assert given in (None, layout.micro_batches)
    assert refusals > 50


def test_remedies_by_name() -> None:
    assert "set micro_batch_size=4" in refused(2, micro_batch_size=5, global_batch_size=8)
    assert "set global_batch_size=9" in refused(3, micro_batch_size=3, global_batch_size=8)
    message = refused(2, micro_batch_size=2, global_batch_size=24, gradient_accumulation_steps=4)
    assert "2 x gradient_accumulation_steps 4 x 2 replicas = 16, and global_batch_size is 24" in message
    assert "set global_batch_size=16, or gradient_accumulation_steps=6" in message


def test_each_size_of_a_course_must_divide() -> None:
    def layout(sizes: dict[int | str, int], ranks: int = 2, **changes: Any) -> Layout:
        return make_layout(make_recipe(global_batch_size=sizes[0], **{"schedule.batch": sizes}, **changes), ranks)

    found = layout({0: 8, 256: 24, 640: 16})
    assert (found.micro_batches, [found.micro_batches_of(size) for size in (8, 24, 16)]) == (6, [2, 6, 4])
    with pytest.raises(UsageError) as refusal:
        layout({0: 8, 256: 18})
    assert str(refusal.value) == (
        "schedule.batch: 18 samples do not divide by micro_batch_size 2 x 2 replicas = 4; give 16 in their place, or "
        "set micro_batch_size=1"
    )
    with pytest.raises(UsageError, match="9 samples do not divide by micro_batch_size 1 x 2 replicas = 2; give 8 in"):
        layout({0: 8, 256: 9}, micro_batch_size=1)
    assert layout({0: 8, "1M": 9}).micro_batches == 2, "the run does not reach it"


def test_gradient_accumulation_that_agrees_is_accepted() -> None:
    recipe = make_recipe(micro_batch_size=2, global_batch_size=24, gradient_accumulation_steps=4)
    assert make_layout(recipe, 3).micro_batches == 4


def test_bounds_by_hand_must_be_for_so_many_stages() -> None:
    message = refused(2, 2, stage_bounds=[0, 1, 2, 4])
    assert "stage_bounds [0, 1, 2, 4] cut into 3 stages, and there are 2" in message
    assert make_layout(make_recipe(stage_bounds=[0, 1, 4]), 2, 2).stages == 2
