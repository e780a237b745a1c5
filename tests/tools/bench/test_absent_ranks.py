"""The backend whose other ranks are absent: every output is written, whatever lay in its memory before."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

TOOLS = Path(__file__).parents[3] / "tools" / "bench"
RANK, RANKS, SEQ_LEN = 1, 3, 4


@pytest.fixture(autouse=True)
def _joined(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process as rank 1 of 3."""
    monkeypatch.syspath_prepend(str(TOOLS))
    from absent_ranks import join

    join(RANK, RANKS, SEQ_LEN)
    yield
    dist.destroy_process_group()


def unwritten(*shape: int) -> torch.Tensor:
    return torch.full(shape, float("nan"))


def test_reductions_give_what_this_rank_has() -> None:
    whole = torch.arange(6.0)
    shard = unwritten(2)
    dist.reduce_scatter_tensor(shard, whole)
    assert shard.tolist() == [2, 3]
    dist.reduce_scatter(shard, [whole[:2] + 10, whole[2:4] + 10, whole[4:] + 10])
    assert shard.tolist() == [12, 13]
    for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX):
        dist.all_reduce(whole, op)
    dist.broadcast(whole, 0)
    assert whole.tolist() == list(range(6))
    dist.barrier()


def test_a_shard_may_be_part_of_the_tensor_that_is_reduced_or_gathered() -> None:
    flat = torch.arange(6.0)
    own = flat[2:4]
    dist.reduce_scatter_tensor(own, flat)
    assert flat.tolist() == list(range(6))
    dist.all_gather_into_tensor(flat, own)
    assert flat.tolist() == [2, 3, 2, 3, 2, 3]


def test_gathers_give_copies_of_what_this_rank_has() -> None:
    places = [unwritten(2) for _ in range(RANKS)]
    dist.all_gather(places, torch.ones(2))
    assert [place.tolist() for place in places] == [[1, 1]] * RANKS
    found: list[object] = [None] * RANKS
    dist.all_gather_object(found, {"rank": RANK})
    assert found == [{"rank": RANK}] * RANKS


def test_the_neighbours_send_finite_states_and_one_document_a_row() -> None:
    pair = dist.new_group([0, RANK])
    states, document_map = unwritten(2, SEQ_LEN, 8), torch.full((2, SEQ_LEN + 3), -1, dtype=torch.int32)
    for tensor in (states, document_map):
        dist.irecv(tensor, 0, pair).wait()
        dist.isend(tensor, 0, pair).wait()
    assert states.isfinite().all()
    assert states.std() > 0
    assert document_map.tolist() == [[0, 1, 2, 3, 0, 4, 4]] * 2


def test_torch_s_older_names_of_the_operations_are_known() -> None:
    group = dist.group.WORLD
    shard, gathered = unwritten(2), unwritten(6)
    group._reduce_scatter_base(shard, torch.arange(6.0), None)
    group._allgather_base(gathered, shard, None)
    assert gathered.tolist() == [2, 3, 2, 3, 2, 3]


def test_what_is_not_made_up_is_an_error() -> None:
    with pytest.raises(RuntimeError):
        dist.all_to_all_single(unwritten(3), torch.ones(3))
