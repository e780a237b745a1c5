"""Rules and weight decay by the role of a parameter."""

import sys
import types

import pytest
import torch
from recipes import make_recipe

from megazh.errors import UsageError
from megazh.pipeline.parameters import NamedParameter
from megazh.pipeline.role import Role
from megazh.training.optimizers.adamw import AdamW
from megazh.training.optimizers.choose import check_optimizer, rules, state_bytes
from megazh.training.optimizers.muon import Muon
from megazh.training.recipe import Device, OptimizerConfig, OptimizerName


def config(**settings: object) -> OptimizerConfig:
    """The optimizer's section of a small recipe."""
    return make_recipe(**settings).optimizer


def named(role: Role) -> NamedParameter:
    return NamedParameter("x", torch.nn.Parameter(torch.zeros(2, 2)), role)


def test_matrices_are_decayed_norms_and_biases_are_not() -> None:
    rule_of = rules(config(weight_decay=0.25))
    decay = {role: rule_of(named(role))[1] for role in Role}
    assert decay == {Role.EMBEDDING: 0.25, Role.HEAD: 0.25, Role.MATRIX: 0.25, Role.NORM: 0.0, Role.BIAS: 0.0}


def test_decay_may_act_on_other_roles() -> None:
    rule_of = rules(config(weight_decay=0.25, decayed=["matrix", "bias"]))
    assert [role for role in Role if rule_of(named(role))[1]] == [Role.MATRIX, Role.BIAS]


def test_muon_has_the_matrices_of_blocks_only() -> None:
    rule_of = rules(config(**{"optimizer.name": "muon"}))
    found = {role: type(rule_of(named(role))[0]) for role in Role}
    assert found == {role: Muon if role is Role.MATRIX else AdamW for role in Role}
    assert rule_of(named(Role.NORM))[0] is rule_of(named(Role.HEAD))[0], "one rule, and so one flat tensor"


@pytest.mark.parametrize("name", OptimizerName)
def test_the_state_is_as_large_as_the_plan_says(name: OptimizerName) -> None:
    if name in (OptimizerName.ADAMW8BIT, OptimizerName.FUSED_ADAM):
        pytest.importorskip("bitsandbytes" if name is OptimizerName.ADAMW8BIT else "amp_C")
    rule_of = rules(config(**{"optimizer.name": name.value}))
    for role, wanted in ((Role.MATRIX, state_bytes(name).matrix), (Role.EMBEDDING, state_bytes(name).other)):
        state = rule_of(named(role))[0].make_state(1 << 12, torch.device("cpu"))
        assert sum(tensor.nbytes for tensor in state.values()) / (1 << 12) == wanted


@pytest.mark.parametrize(("name", "package"), [("adamw8bit", "bitsandbytes"), ("fused_adam", "apex")])
def test_a_missing_package_is_named(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.functional", None)
    with pytest.raises(
        UsageError, match=rf"^optimizer\.name={name} needs {package}.*set optimizer\.name=adamw"
    ) as found:
        check_optimizer(config(**{"optimizer.name": name}), Device.CUDA)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("name", ["adamw8bit", "fused_adam"])
def test_kernels_of_gpus_are_refused_on_the_cpu(name: str) -> None:
    with pytest.raises(UsageError, match=rf"^optimizer\.name={name}: .* on CUDA only; set optimizer\.name=adamw$"):
        check_optimizer(config(**{"optimizer.name": name}), Device.CPU)


def test_the_other_project_of_the_name_apex_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    other = types.ModuleType("apex")
    other.__file__ = "/site-packages/apex/__init__.py"
    monkeypatch.setitem(sys.modules, "apex", other)
    with pytest.raises(UsageError, match=r"/site-packages/apex/__init__\.py is not NVIDIA's apex"):
        check_optimizer(config(**{"optimizer.name": "fused_adam"}), Device.CUDA)


def test_an_apex_without_kernels_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    package, apply = types.ModuleType("apex"), types.ModuleType("apex.multi_tensor_apply")
    apply.multi_tensor_applier = None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.multi_tensor_apply", apply)
    monkeypatch.setitem(sys.modules, "amp_C", None)
    with pytest.raises(UsageError, match="apex was built without its CUDA extensions"):
        check_optimizer(config(**{"optimizer.name": "fused_adam"}), Device.CUDA)
