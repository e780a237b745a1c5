"""A made-up training state as pieces, in any layout: what `Saver` and `load_checkpoint` take for an optimizer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megazh.pipeline.sharded_optimizer import layer_of
from megazh.pipeline.state import MASTER, WEIGHT, Piece
from megazh.training.checkpoint_list import CheckpointManifest, checkpoint_path
from megazh.training.checkpoint_write import HostCopy, merged
from megazh.training.saver import write_manifest

SHAPES = {
    "embedding.weight": (10, 6),
    "blocks.0.attention.qkv_proj.weight": (7, 6),
    "blocks.0.mlp.up_proj.weight": (5, 6),
    "blocks.1.attention.qkv_proj.weight": (7, 6),
    "blocks.1.mlp.up_proj.weight": (5, 6),
    "norm.weight": (6,),
    "head.weight": (10, 6),
}
"""Shapes of the parameters, in the order of the layers."""
KINDS = (MASTER, "exp_avg", "exp_avg_sq")
BLOCK = 4
"""Elements per number of the block-wise state `absmax`."""


def whole_state(seed: int, shapes: dict[str, tuple[int, ...]] | None = None) -> dict[tuple[str, str], torch.Tensor]:
    """Flat tensors of all parameters by (parameter, kind): bf16 weights, fp32 masters and two fp32 states."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in (shapes or SHAPES).items():
        size = math.prod(shape)
        for kind in KINDS:
            found[name, kind] = torch.randn(size, generator=generator)
        found[name, WEIGHT] = found[name, MASTER].bfloat16()
        found[name, "absmax"] = torch.randn(-(-size // BLOCK), generator=generator)
    return found


@dataclass
class MadeOptimizer:
    """The state of one rank: its stage's weights, and its shard of the rest. Shards are cut by element."""

    state: dict[tuple[str, str], torch.Tensor]
    stage: int = 0
    stages: int = 1
    replica: int = 0
    replicas: int = 1
    name: str = "adamw"
    updates: int = 0
    shapes: dict[str, tuple[int, ...]] = field(default_factory=lambda: SHAPES)

    def __post_init__(self) -> None:
        layers = list(dict.fromkeys(map(layer_of, self.shapes)))
        here = [layer for number, layer in enumerate(layers) if number * self.stages // len(layers) == self.stage]
        self.own = [name for name in self.shapes if layer_of(name) in here]
        self.memory = {key: values.clone() for key, values in self.state.items() if key[0] in self.own}

    def pieces_to_save(self) -> list[Piece]:
        """Every replica has the weights of some layers, and its shard of the rest."""
        layers = list(dict.fromkeys(map(layer_of, self.own)))
        weights = [
            self._piece(name, WEIGHT, 0, math.prod(self.shapes[name]))
            for name in self.own
            if layers.index(layer_of(name)) % self.replicas == self.replica
        ]
        return [*weights, *self._shard()]

    def pieces_to_load(self) -> list[Piece]:
        """All weights of the stage, and this rank's shard of the rest."""
        return self._all()

    def _all(self) -> list[Piece]:
        weights = [self._piece(name, WEIGHT, 0, math.prod(self.shapes[name])) for name in self.own]
        return [*weights, *self._shard()]

    def _shard(self) -> list[Piece]:
        total = sum(math.prod(self.shapes[name]) for name in self.own)
        share = -(-total // self.replicas // BLOCK) * BLOCK
        first, last, place, found = self.replica * share, (self.replica + 1) * share, 0, []
        for name in self.own:
            size = math.prod(self.shapes[name])
            begin, end = max(first - place, 0) // BLOCK * BLOCK, last - place
            end = size if end >= size else end // BLOCK * BLOCK
            place += size
            if begin < end:
                found += [self._piece(name, kind, begin, end) for kind in (*KINDS, "absmax")]
        return found

    def _piece(self, name: str, kind: str, begin: int, end: int) -> Piece:
        block = BLOCK if kind == "absmax" else 1
        values = self.memory[name, kind][begin // block : -(-end // block)]
        return Piece(name, kind, self.shapes[name], begin, end, values, block)

    def clear(self) -> None:
        """Forget all numbers."""
        for values in self.memory.values():
            values.zero_()

    def wrong(self) -> list[str]:
        """Pieces whose numbers are not those of the whole state."""
        found = []
        for piece in self._all():
            wanted = self.state[piece.parameter, piece.kind][piece.begin // piece.block : -(-piece.end // piece.block)]
            if not torch.equal(piece.values, wanted):
                found.append(f"{piece.kind} of {piece.parameter}")
        return found


def made_manifest(step: int, run_id: str = "this-run", **changes: object) -> CheckpointManifest:
    """A manifest without files, as `Saver.begin` takes it."""
    values = {
        "run_id": run_id, "step": step, "samples": 8 * step, "tokens": 128 * step, "stages": 1, "replicas": 1,
        "bounds": [0, 4], "precision": "bf16", "optimizer": "adamw", "updates": step, "recipe": {}, "data": {},
        "versions": {}, **changes,
    }  # fmt: skip
    return CheckpointManifest.model_validate(values)


def write_checkpoint(folder: Path, optimizers: Sequence[MadeOptimizer], step: int, run_id: str = "this-run") -> Path:
    """Write the checkpoint of all ranks of a layout, in one process; returns its path."""
    first = optimizers[0]
    manifest = made_manifest(
        step, run_id, stages=first.stages, replicas=first.replicas, optimizer=first.name, updates=first.updates
    )
    return write_pieces(folder, [optimizer.pieces_to_save() for optimizer in optimizers], manifest)


def write_pieces(folder: Path, ranks: Sequence[Sequence[Piece]], manifest: CheckpointManifest) -> Path:
    """Write a checkpoint of the pieces of each rank and of this manifest, in one process; returns its path."""
    path = checkpoint_path(folder, manifest.step)
    parts = []
    for rank, pieces in enumerate(ranks):
        copy = HostCopy(pieces, rank)
        copy.take()
        parts.append(copy.write(path))
    written = merged(parts)
    write_manifest(path, manifest.model_copy(update={"files": written.files, "tensors": written.tensors}))
    return path


def in_layout(state: dict[tuple[str, str], torch.Tensor], stages: int, replicas: int) -> list[MadeOptimizer]:
    """The ranks of a layout that hold a state."""
    return [
        MadeOptimizer(state, stage, stages, replica, replicas) for stage in range(stages) for replica in range(replicas)
    ]
