"""The work of a step: sizes, and the cases in which weight gradients are deferred."""

import dataclasses

import pytest
from decoders import small

from megazh.model.backend import Backend
from megazh.pipeline.precision import Dtype, Precision
from megazh.pipeline.work import Work

WORK = Work(small(), 2, 3, 64, 5, 7, Precision(Dtype.BF16, Dtype.FP32, Dtype.FP32), False, Backend.FUSED)


def test_tokens_are_those_of_a_micro_batch() -> None:
    assert WORK.tokens == 320


@pytest.mark.parametrize("backend", Backend)
def test_only_one_backend_has_kernels(backend: Backend) -> None:
    assert dataclasses.replace(WORK, backend=backend).fused == (backend is Backend.FUSED)


@pytest.mark.parametrize(
    ("changes", "deferred"),
    [
        ({}, True),
        ({"stages": 1}, False),
        ({"activation_checkpointing": True}, False),
    ],
)
def test_weight_gradients_wait_in_a_pipeline_only(changes: dict, deferred: bool) -> None:
    assert dataclasses.replace(WORK, **changes).defers_weight_gradients == deferred
