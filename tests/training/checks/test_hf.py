"""What `-t hf` refuses: missing packages, keys that it cannot honour, and runs of the other engine."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from cases import make_case, on_cpu, on_gpus
from made_runs import make_run

from megazh.errors import MegazhError, UsageError
from megazh.training.checks import hf
from megazh.training.job import Devices, Request
from megazh.training.preflight import RUN, requested_case, warnings_of

HF = Request(engine="hf", stages=1)


def refusals(tmp_path: Path, *settings: str, devices: Devices | None = None, request: Request = HF) -> str:
    """The lines that refuse these settings."""
    with pytest.raises(MegazhError) as refusal:
        warnings_of(make_case(tmp_path, None, list(settings), request=request, devices=devices or on_cpu(2)), [hf.keys])
    return str(refusal.value)


def test_each_key_that_cannot_be_honoured_is_named(tmp_path: Path) -> None:
    refused = {
        "zero_stage=3": "zero_stage=3: it gathers each layer's weights",
        "optimizer.name=muon": "optimizer.name=muon: -t hf has adamw only",
        "z_loss=1e-4": "optimizer.z_loss=0.0001: -t hf has none",
        "residual_dropout=0.1": "model.residual_dropout=0.1: -t hf trains without dropout",
        "attention_dropout=0.2": "model.attention_dropout=0.2: -t hf trains without dropout",
        "dtype=fp16": "precision.dtype=fp16: small gradients vanish",
        "grad_accum_dtype=bf16": "grad_accum_dtype=bf16: gradients are always summed in fp32",
        "communication_dtype=fp16": "communication_dtype=fp16: small gradients vanish",
        "norm=layernorm": "no family of Hugging Face models (llama, qwen2, mistral) can express model.norm=layernorm",
        "attention.pattern=s2": "attention.pattern=s2: -t hf has full attention only",
        "neftune_alpha=5": "noise.neftune_alpha=5: -t hf adds no noise",
        "guard.spike=skip": "guard.spike=skip: with -t hf, the loss of a step is known after its update only",
        "schedule.batch={0: 8, 256: 16}": "schedule.batch: steps of 8, 16 samples, and -t hf has one size for all",
        "stage_bounds=[0,2,4]": "stage_bounds=[0, 2, 4]: -t hf has no stages",
    }
    lines = refusals(tmp_path, *refused).split("\nerror: ")
    for begin in refused.values():
        assert [line for line in lines if line.startswith(begin)], begin
    assert len(lines) == len(refused)
    assert all("is set on the command line" in line for line in lines)
    assert "communication_dtype=bf16: with zero_stage=0" in refusals(
        tmp_path, "communication_dtype=bf16", "zero_stage=0"
    )


def test_lora_is_refused(tmp_path: Path) -> None:
    assert refusals(tmp_path, "lora.rank=8", "initial_checkpoint=base").startswith(
        "lora.rank=8: -t hf trains all weights; leave lora out, or give -t ds_pp"
    )


def test_stages_are_refused_wherever_they_are_given(tmp_path: Path) -> None:
    assert refusals(tmp_path, request=Request(engine="hf")).startswith("pipe_parallel_size=2: -t hf has replicas only")
    assert refusals(tmp_path, request=Request(engine="hf", stages=3)).startswith("pipe_parallel_size=3")


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_what_it_has_is_accepted(tmp_path: Path, stage: int) -> None:
    settings = [f"zero_stage={stage}", "dtype=bf16", "activation_checkpointing=true", "guard.spike=ignore"]
    assert warnings_of(make_case(tmp_path, None, settings, request=HF, devices=on_cpu(2)), [hf.keys]) == []


@pytest.mark.parametrize("missing", [["accelerate"], ["transformers", "accelerate"]], ids=len)
def test_missing_packages_are_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: list[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find(name))
    with pytest.raises(UsageError) as refusal:
        warnings_of(make_case(tmp_path, None, request=HF), [hf.packages])
    assert str(refusal.value) == (
        f"-t hf: {' and '.join(missing)} not installed; run 'bash jobs/setup.sh --hf', or pip install 'megazh[hf]'"
    )


def test_offload_is_refused_with_the_reason() -> None:
    with pytest.raises(UsageError, match=r"^parallel\.offload_optimizer=cpu: .*24 to 80 GB.*leave it out$"):
        requested_case(Request(engine="hf", recipe="demo", settings=["parallel.offload_optimizer=cpu"]))


def test_too_little_memory_is_a_warning(tmp_path: Path) -> None:
    wide: dict[str, Any] = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
    for gib, count in ((24, 0), (1.7, 1)):
        case = make_case(tmp_path, None, model=wide, devices=on_gpus(gib=gib), request=HF)
        assert len(warnings_of(case, [hf.memory])) == count


def test_a_run_keeps_its_engine(tmp_path: Path, stories: Path) -> None:
    pytest.importorskip("transformers")
    begun = make_case(tmp_path, stories, request=Request(stages=1))
    make_run(begun.run.path, tmp_path / "mini.yaml", step=3)
    begun.run.record(begun.job.recipe.to_yaml())
    other = make_case(tmp_path, stories, request=HF)
    with pytest.raises(UsageError) as refusal:
        warnings_of(other, RUN)
    saved = begun.run.checkpoints / "step_00000003"
    assert str(refusal.value) == (
        f"{begun.run.path}: the run was begun with -t ds_pp, and this is -t hf; give -t ds_pp again, or another folder "
        f"with -r; checkpoint.initial_checkpoint={saved} begins one with its weights"
    )
    description = begun.run.path / "run.json"
    description.write_text(json.dumps({**json.loads(description.read_text()), "engine": "hf"}))
    assert warnings_of(other, RUN) == []
