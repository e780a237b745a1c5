"""A state that was written in one layout and is read in another is the same, number for number."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pieces import KINDS, SHAPES, MadeOptimizer, in_layout, whole_state, write_checkpoint

from megazh.errors import DataError
from megazh.pipeline.state import MASTER, WEIGHT, Piece
from megazh.training.checkpoint_list import read_manifest
from megazh.training.checkpoint_read import find_damage, load_checkpoint

LAYOUTS = [(1, 1), (1, 2), (1, 3), (2, 1), (3, 1), (2, 2), (3, 2)]


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    dist.destroy_process_group()


def load(optimizer: MadeOptimizer, path: Path, weights_only: bool = False) -> list[str]:
    """Load a checkpoint into a rank; returns the lines that were printed."""
    lines: list[str] = []
    load_checkpoint(optimizer, path, read_manifest(path), lines.append, weights_only)
    return lines


@pytest.mark.parametrize("written", LAYOUTS)
def test_any_layout_is_read_in_any_other(tmp_path: Path, written: tuple[int, int]) -> None:
    state = whole_state(3)
    optimizers = in_layout(state, *written)
    for optimizer in optimizers:
        optimizer.updates = 17
    path = write_checkpoint(tmp_path, optimizers, 2)
    assert find_damage(path, read_manifest(path)) == ""
    for layout in LAYOUTS:
        for optimizer in in_layout(state, *layout):
            optimizer.clear()
            assert optimizer.wrong()
            assert load(optimizer, path) == []
            assert optimizer.wrong() == []
            assert optimizer.updates == 17


def test_another_optimizer_starts_clean_and_says_so(tmp_path: Path) -> None:
    state = whole_state(3)
    path = write_checkpoint(tmp_path, in_layout(state, 1, 2), 2)
    (optimizer,) = in_layout(state, 1, 1)
    optimizer.name, optimizer.updates = "muon", 5
    optimizer.clear()
    (line,) = load(optimizer, path)
    assert line == (
        "step_00000002: was saved with the optimizer adamw: weights are taken from it, and the state of muon starts "
        "clean"
    )
    assert_weights_alone(optimizer)


def test_a_state_that_is_missing_starts_clean_as_a_whole(tmp_path: Path) -> None:
    state = whole_state(3)
    path = write_checkpoint(tmp_path, in_layout(state, 1, 1), 2)

    class Another(MadeOptimizer):
        def pieces_to_load(self) -> list[Piece]:
            return [
                replace(piece, kind="momentum") if piece.kind == "exp_avg" else piece
                for piece in super().pieces_to_load()
            ]

    optimizer = Another(state)
    optimizer.clear()
    (line,) = load(optimizer, path)
    assert "has no momentum of embedding.weight: weights are taken" in line
    assert_weights_alone(optimizer)


def test_weights_alone(tmp_path: Path) -> None:
    state = whole_state(3)
    path = write_checkpoint(tmp_path, in_layout(state, 2, 1), 2)
    (optimizer,) = in_layout(state, 1, 1)
    optimizer.updates = 5
    optimizer.clear()
    assert load(optimizer, path, weights_only=True) == []
    assert_weights_alone(optimizer)


def assert_weights_alone(optimizer: MadeOptimizer) -> None:
    """Weights and masters are those of the whole state, and all else is zero."""
    assert {name.split(" of ")[0] for name in optimizer.wrong()} == {*KINDS, "absmax"} - {MASTER}
    assert all(not values.any() for (_, kind), values in optimizer.memory.items() if kind not in (WEIGHT, MASTER))
    assert optimizer.updates == 0


def test_masters_and_weights_stand_in_for_one_another(tmp_path: Path) -> None:
    """A bf16 checkpoint in an fp32 run, which has no masters, and the other way."""
    state = whole_state(3)
    path = write_checkpoint(tmp_path, in_layout(state, 1, 2), 2)
    name = "blocks.1.mlp.up_proj.weight"
    weight = torch.zeros(30)

    class Fp32(MadeOptimizer):
        def pieces_to_load(self) -> list[Piece]:
            return [Piece(name, WEIGHT, (5, 6), 0, 30, weight)]

    load(Fp32(state), path)
    assert torch.equal(weight, state[name, MASTER])

    class OfWeights(MadeOptimizer):
        def pieces_to_save(self) -> list[Piece]:
            return [Piece(name, WEIGHT, (5, 6), 0, 30, state[name, MASTER])]

        def pieces_to_load(self) -> list[Piece]:
            return [Piece(name, MASTER, (5, 6), 7, 20, master), Piece(name, WEIGHT, (5, 6), 0, 30, rounded)]

    master, rounded = torch.zeros(13), torch.zeros(30, dtype=torch.bfloat16)
    path = write_checkpoint(tmp_path, [OfWeights(state)], 4)
    load(OfWeights(state), path)
    assert torch.equal(master, state[name, MASTER][7:20])
    assert torch.equal(rounded, state[name, WEIGHT])


def test_a_shape_that_does_not_fit_names_the_parameter(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, in_layout(whole_state(3), 1, 1), 2)
    shapes = {**SHAPES, "blocks.1.mlp.up_proj.weight": (9, 6)}
    optimizer = MadeOptimizer(whole_state(3, shapes), shapes=shapes)
    with pytest.raises(DataError, match=r"blocks.1.mlp.up_proj.weight has shape \[5, 6\] in it, and \[9, 6\] in this"):
        load(optimizer, path)
    shapes = {**SHAPES, "blocks.2.mlp.up_proj.weight": (5, 6)}
    optimizer = MadeOptimizer(whole_state(3, shapes), shapes=shapes)
    with pytest.raises(DataError, match=r"holds no weight of blocks.2.mlp.up_proj.weight: it is of another model"):
        load(optimizer, path, weights_only=True)


def test_a_flipped_bit_is_found_in_every_file(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, in_layout(whole_state(3), 1, 2), 2)
    manifest = read_manifest(path)
    for entry in manifest.files:
        file = path / entry.name
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        assert find_damage(path, manifest) == f"{file}: its content has changed since it was written"
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    assert find_damage(path, manifest) == ""
