"""Shards of all replicas make up every parameter once; norms count once; a refused step changes nothing."""

import math

import pytest
import torch
from decoders import small

from megazh.model.decoder import Decoder
from megazh.model.main_grad import main_grad
from megazh.pipeline.parameters import NamedParameter
from megazh.pipeline.role import Role
from megazh.pipeline.sharded_optimizer import ALIGNMENT, ShardedOptimizer, _Group, layer_of
from megazh.pipeline.state import MASTER, WEIGHT, Piece
from megazh.pipeline.update_rule import Shard, UpdateRule
from megazh.training.optimizers.adamw import AdamW
from megazh.training.optimizers.muon import Muon

SHAPES = {"a": (37, 11), "b": (300,), "c": (64, 64), "d": (5,), "e": (20, 70), "f": (11, 37)}


class Halve(UpdateRule):
    """Halves the weights, with a state of one number per 256 elements."""

    blocks = {"scale": 256}  # noqa: RUF012

    def make_state(self, elements: int, device: torch.device) -> dict[str, torch.Tensor]:
        return {"scale": torch.arange(float(elements // 256)), "plain": torch.zeros(elements)}

    def update(self, shard: Shard, learning_rate: float, number: int) -> None:
        shard.weights.mul_(0.5)


def parameters(dtype: torch.dtype = torch.float32, copies: tuple[str, ...] = ()) -> list[NamedParameter]:
    """Parameters of many sizes with random weights, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    return [
        NamedParameter(
            f"blocks.{number}.{name}",
            torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)),
            Role.MATRIX if len(shape) > 1 else Role.BIAS,
            name in copies,
        )
        for number, (name, shape) in enumerate(SHAPES.items())
    ]


def matrices(members: list[NamedParameter]) -> list[NamedParameter]:
    return [member for member in members if member.role is Role.MATRIX]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
@pytest.mark.parametrize("rule", [AdamW((0.9, 0.95), 1e-8), Muon(0.95, True, 5, True), Halve()])
def test_the_shards_hold_every_element_once(rule: UpdateRule, ranks: int, dtype: torch.dtype) -> None:
    wanted = {member.name: member.parameter.detach().clone() for member in matrices(parameters(dtype))}
    found: dict[tuple[str, str], list[Piece]] = {}
    for rank in range(ranks):
        for piece in _Group(matrices(parameters(dtype)), rule, 0.0, rank, ranks).pieces():
            found.setdefault((piece.parameter, piece.kind), []).append(piece)
    kinds = set(rule.make_state(ALIGNMENT, torch.device("cpu"))) | ({MASTER} if dtype is torch.bfloat16 else set())
    assert set(found) == {(name, kind) for name in wanted for kind in kinds}
    for (name, kind), pieces in found.items():
        pieces.sort(key=lambda piece: piece.begin)
        ends = [piece.end for piece in pieces]
        assert [piece.begin for piece in pieces] == [0, *ends[:-1]], name
        assert ends[-1] == wanted[name].numel()
        for piece in pieces:
            assert piece.begin % ALIGNMENT == 0
            assert len(piece.values) == -(-(piece.end - piece.begin) // piece.block)
        if kind == MASTER:
            assert torch.equal(torch.cat([piece.values for piece in pieces]), wanted[name].flatten().float())
        if rule.whole_matrices:
            assert len(pieces) == 1


@pytest.mark.parametrize("ranks", [2, 3])
def test_whole_matrices_are_shared_out_by_size(ranks: int) -> None:
    members = [
        NamedParameter(f"blocks.{number}.w", torch.nn.Parameter(torch.zeros(size, 256)), Role.MATRIX)
        for number, size in enumerate([9, 1, 1, 4, 3, 3, 9, 6])
    ]
    groups = [_Group(members, Muon(0.95, True, 5, True), 0.0, rank, ranks) for rank in range(ranks)]
    rows = [sum(shape[0] for _, shape in group.shard.matrices) for group in groups]
    assert sum(rows) == 36
    assert max(rows) == 36 // ranks
    assert len(groups[0].weights) == 36 * 256


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_gradient_counts_once_in_the_norm(ranks: int) -> None:
    members = parameters(copies=("a", "e"))
    squared = 0.0
    for rank in range(ranks):
        group = _Group(members, Halve(), 0.0, rank, ranks)
        for member in members:
            sums = main_grad(member.parameter)
            assert sums is not None
            sums.fill_(2.0 if member.is_copy else 1.0)
        squared += sum(float(part.square().sum()) for part in group.counted())
    assert squared == sum(member.parameter.numel() for member in members if not member.is_copy)


def test_weights_keep_their_values_and_their_gradients_have_a_place() -> None:
    wanted, members = parameters(), parameters()
    group = _Group(members, Halve(), 0.0, 0, 1)
    for before, member in zip(wanted, members, strict=True):
        assert torch.equal(before.parameter, member.parameter)
        sums = main_grad(member.parameter)
        assert sums is not None
        assert (sums.shape, sums.dtype) == (member.parameter.shape, torch.float32)
        sums += 1
    assert group.sums.sum() == sum(member.parameter.numel() for member in members)


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 1)


def optimizer(members: list[NamedParameter], norm: float = 0.0) -> ShardedOptimizer:
    rule = Halve()
    return ShardedOptimizer("halve", members, lambda parameter: (rule, 0.0), None, torch.float32, norm)


@pytest.mark.usefixtures("one_rank")
def test_a_refused_step_changes_no_weight_and_clears_the_gradients() -> None:
    members, before = parameters(torch.bfloat16), parameters(torch.bfloat16)
    own = optimizer(members)
    seen: list[tuple[float, float]] = []

    def accept(loss: float, norm: float) -> bool:
        seen.append((loss, norm))
        return len(seen) > 1

    own.accept = accept
    for refused in (True, False):
        for member in members:
            main_grad(member.parameter).fill_(1.0)  # type: ignore[union-attr]
        own.reduce_gradients()
        totals = own.totals(torch.tensor(2.5))
        assert own.step(totals) != refused
        assert own.updates == (0 if refused else 1)
        for old, member in zip(before, members, strict=True):
            wanted = old.parameter if refused else (old.parameter.float() / 2).bfloat16()
            assert torch.equal(member.parameter, wanted)
            assert not main_grad(member.parameter).any()  # type: ignore[union-attr]
    count = sum(member.parameter.numel() for member in members)
    assert seen == [(2.5, pytest.approx(math.sqrt(count)))] * 2


@pytest.mark.usefixtures("one_rank")
def test_a_state_that_is_restarted_is_that_of_a_new_optimizer_and_weights_stay() -> None:
    own, new = optimizer(parameters()), optimizer(parameters())
    own.updates = 7
    for piece in own.pieces_to_load():
        if piece.kind != WEIGHT:
            piece.values.fill_(3.0)
    own.restart()
    assert own.updates == 0
    for piece, wanted in zip(own.pieces_to_load(), new.pieces_to_load(), strict=True):
        assert (piece.parameter, piece.kind) == (wanted.parameter, wanted.kind)
        assert torch.equal(piece.values, wanted.values)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_norm_that_is_not_finite_is_refused(value: float) -> None:
    members = parameters()
    own = optimizer(members)
    main_grad(members[3].parameter)[2] = value  # type: ignore[index]
    totals = own.totals(torch.tensor(1.0))
    assert not math.isfinite(totals.norm)
    assert not own.step(totals)


@pytest.mark.usefixtures("one_rank")
def test_the_norm_of_many_numbers_is_right() -> None:
    member = NamedParameter("head.weight", torch.nn.Parameter(torch.zeros(3000, 1000)), Role.HEAD)
    own = optimizer([member])
    sums = main_grad(member.parameter)
    assert sums is not None
    sums.normal_(generator=torch.Generator().manual_seed(0))
    assert own.totals(torch.tensor(1.0)).norm == pytest.approx(sums.double().norm().item(), rel=1e-6)


@pytest.mark.usefixtures("one_rank")
def test_clipping_is_that_of_torch() -> None:
    class Keep(Halve):
        def update(self, shard: Shard, learning_rate: float, number: int) -> None:
            self.seen = shard.gradient.clone()

    rule, members = Keep(), parameters()
    own = ShardedOptimizer("keep", members, lambda parameter: (rule, 0.0), None, torch.float32, 0.3)
    for number, member in enumerate(members):
        member.parameter.grad = torch.full_like(member.parameter, number + 1.0)
        main_grad(member.parameter).copy_(member.parameter.grad)  # type: ignore[union-attr]
    assert own.step(own.totals(torch.tensor(1.0)))
    norm = torch.nn.utils.clip_grad_norm_([member.parameter for member in members], 0.3)
    assert own.totals(torch.tensor(1.0)).norm == 0
    assert rule.seen.norm() == pytest.approx(0.3, rel=1e-5)
    assert rule.seen[: 37 * 11] == pytest.approx(members[0].parameter.grad.flatten().numpy(), rel=1e-5)  # type: ignore[union-attr]
    assert norm > 0.3


@pytest.mark.usefixtures("one_rank")
def test_frozen_parameters_have_weights_only() -> None:
    members = parameters(torch.bfloat16)
    members[2].parameter.requires_grad_(False)
    own = optimizer(members)
    kinds = {(piece.parameter, piece.kind) for piece in own.pieces_to_load()}
    assert {kind for name, kind in kinds if name == members[2].name} == {WEIGHT}
    assert {kind for name, kind in kinds if name == members[1].name} == {WEIGHT, MASTER, "scale", "plain"}
    assert main_grad(members[2].parameter) is None


@pytest.mark.usefixtures("one_rank")
def test_a_copy_is_loaded_and_not_saved() -> None:
    own = optimizer(parameters(copies=("a",)))
    assert all(piece.parameter != "blocks.0.a" for piece in own.pieces_to_save())
    assert {piece.kind for piece in own.pieces_to_load() if piece.parameter == "blocks.0.a"} == {
        WEIGHT, "scale", "plain",
    }  # fmt: skip


@pytest.mark.usefixtures("one_rank")
def test_rows_that_pad_are_in_no_piece() -> None:
    members = parameters()
    members[0].parameter.rows = 30  # type: ignore[attr-defined]
    pieces = [piece for piece in optimizer(members).pieces_to_load() if piece.parameter == "blocks.0.a"]
    assert {piece.shape for piece in pieces} == {(30, 11)}
    assert {(piece.begin, piece.end) for piece in pieces} == {(0, 330)}


def test_layers_are_named_as_in_the_model() -> None:
    names = {layer_of(name) for name, _ in Decoder(small(tie_word_embeddings=False)).named_parameters()}
    assert names == {"embedding", "blocks.0", "blocks.1", "norm", "head"}
