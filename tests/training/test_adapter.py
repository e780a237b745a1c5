"""Adapters: equal to PEFT in training and once loaded there, merged with their base, refused for any other."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import alone, logits, small
from safetensors.torch import load_file, save_file
from saved_models import save_lora, save_model

from megazh.config import from_mapping
from megazh.errors import DataError, UsageError
from megazh.exchange.adapter import ADAPTER, ADAPTER_CONFIG
from megazh.model.decoder import Decoder
from megazh.model.lora_config import PART, LoraConfig, Target
from megazh.pipeline.precision import Dtype
from megazh.training.adapter import export_adapter, with_adapter
from megazh.training.export import ExportOptions, export_to_hf
from megazh.training.model_source import find_model
from megazh.training.weights import load_decoder

SHAPE = {"qkv_bias": True, "num_key_value_heads": 2}
STEPS, ROWS, LENGTH = 10, 2, 24
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "attention": ({}, {"rank": 4}),
    "all": ({"tie_word_embeddings": False}, {"rank": 3, "alpha": 6.0, "targets": list(Target)}),
    "embedding and norms": ({}, {"rank": 4, "targets": ["q", "down"], "train_embed_norm": True}),
}  # fmt: skip
"""Changes to the shape, and settings of LoRA."""


def make_base(folder: Path, case: str, seed: int = 3, precision: str = "fp32") -> Path:
    """A Hugging Face folder of a base whose biases are not zero."""
    model = Decoder(small(**SHAPE, **CASES[case][0]), seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    source = find_model(save_model(folder / "checkpoint", model, precision=precision))
    export_to_hf(source, folder / "hf", ExportOptions())
    return folder / "hf"


def settings(case: str) -> LoraConfig:
    return from_mapping(CASES[case][1], LoraConfig, "test")


def begin(base: Path, case: str) -> Decoder:
    """A model of a LoRA run before its first step."""
    loaded = load_decoder(find_model(base), torch.device("cpu"))
    model = Decoder(loaded.config, 5, lora=settings(case))
    with torch.no_grad():
        for name, weight in loaded.named_parameters():
            model.get_parameter(name).copy_(weight)
    return model


def micro_batch(step: int) -> torch.Tensor:
    return torch.randint(0, 97, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))


def train(model: Decoder) -> list[float]:
    """Loss of each step of AdamW."""
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], 1e-2, weight_decay=0.1)
    positions, boundaries = (each.expand(ROWS, -1) for each in alone(LENGTH))
    losses = []
    for step in range(STEPS):
        tokens = micro_batch(step)
        labels = torch.cat([tokens[:, 1:], torch.full((ROWS, 1), -100)], 1)
        loss = model.loss(tokens, labels, positions, boundaries) / (ROWS * (LENGTH - 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def save_run(folder: Path, model: Decoder, base: Path, case: str, precision: str = "fp32") -> Path:
    return save_lora(folder, model, settings(case), base, precision)


class Trained:
    """A base, and a run that was trained from it with PEFT beside it."""

    def __init__(self, folder: Path, case: str) -> None:
        self.base, self.case = make_base(folder, case), case
        self.model = begin(self.base, case)
        self.peft = peft_model(self.base, self.model, case)
        self.losses, self.of_peft = train(self.model), train_peft(self.peft)
        self.run = save_run(folder / "run", self.model.eval(), self.base, case)
        self.adapter = folder / "adapter"
        export_adapter(find_model(self.run), self.adapter)

    def logits(self) -> torch.Tensor:
        """Logits of a micro-batch that was not trained on."""
        positions, boundaries = (each.expand(ROWS, -1) for each in alone(LENGTH))
        with torch.no_grad():
            return logits(self.model, micro_batch(99), positions, boundaries)


def peft_model(base: Path, model: Decoder, case: str) -> Any:
    """The base in transformers with PEFT's LoRA, which begins with the A of a model."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    lora = settings(case)
    whole = ["embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"] if lora.train_embed_norm else None
    config = PeftConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=[f"{target}_proj" for target in lora.targets],
        task_type="CAUSAL_LM", modules_to_save=whole, ensure_weight_tying=bool(whole),
    )  # fmt: skip
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if ".lora_A." in name:
                parts = name.split(".")
                product = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "up"}
                target = parts[parts.index("lora_A") - 1].removesuffix("_proj")
                part = "attention" if "self_attn" in parts else "mlp"
                block = parts[parts.index("layers") + 1]
                place = f"blocks.{block}.{part}.{product.get(target, target)}_proj{PART}{target}.a"
                parameter.copy_(model.get_parameter(place))
    return peft


def train_peft(peft: Any) -> list[float]:
    optimizer = torch.optim.AdamW([each for each in peft.parameters() if each.requires_grad], 1e-2, weight_decay=0.1)
    losses = []
    for step in range(STEPS):
        loss = peft(input_ids=micro_batch(step), labels=micro_batch(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def their_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(micro_batch(99)).logits


@pytest.fixture(scope="module", params=CASES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run of each case."""
    pytest.importorskip("peft")
    return Trained(tmp_path_factory.mktemp("trained"), request.param)


def test_ten_steps_are_those_of_peft(trained: Trained) -> None:
    assert trained.losses == pytest.approx(trained.of_peft, abs=1e-4)
    assert trained.losses[-1] != pytest.approx(trained.losses[0], abs=1e-2)
    torch.testing.assert_close(trained.logits(), their_logits(trained.peft), rtol=0, atol=1e-3)


def test_peft_loads_an_adapter(trained: Trained) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert sorted(each.name for each in trained.adapter.iterdir()) == [ADAPTER_CONFIG, ADAPTER]
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(trained.base), trained.adapter)
    torch.testing.assert_close(their_logits(loaded), trained.logits(), rtol=0, atol=1e-4)
    before = their_logits(AutoModelForCausalLM.from_pretrained(trained.base))
    assert float((before - trained.logits()).abs().max()) > 0.1


def test_a_merged_folder_is_base_and_adapter(trained: Trained, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    merged = with_adapter(find_model(trained.base), trained.adapter)
    export_to_hf(merged, tmp_path / "merged", ExportOptions())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(their_logits(loaded), trained.logits(), rtol=0, atol=1e-4)
    export_to_hf(find_model(trained.run), tmp_path / "exported", ExportOptions())
    stored, other = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "exported"))
    assert stored.keys() == other.keys()
    assert all(torch.equal(stored[name], other[name]) for name in stored), "the run's own export is the same"
    tied = json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]
    assert tied == ("lm_head.weight" not in stored) == (trained.case != "all")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert f"merged: rank {settings(trained.case).rank}" in card


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and an adapter for it, whose pairs are not trained."""
    folder = tmp_path_factory.mktemp("made")
    base = make_base(folder, "attention")
    run = save_run(folder / "run", begin(base, "attention"), base, "attention")
    export_adapter(find_model(run), folder / "adapter")
    return base, folder / "adapter"


def test_the_dtype_of_a_base_does_not_count(made: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = made
    in_bf16 = tmp_path / "bf16"
    export_to_hf(find_model(base), in_bf16, ExportOptions(dtype=Dtype.BF16))
    run = save_run(tmp_path / "run", begin(base, "attention"), base, "attention", precision="bf16")
    export_adapter(find_model(run), tmp_path / "adapter")
    for path in (adapter, tmp_path / "adapter", tmp_path / "adapter" / ADAPTER):
        for folder in (base, in_bf16):
            assert with_adapter(find_model(folder), path).adapter is not None
    assert load_file(tmp_path / "adapter" / ADAPTER).popitem()[1].dtype == torch.bfloat16
    export_adapter(find_model(run), tmp_path / "fp32", Dtype.FP32)
    assert load_file(tmp_path / "fp32" / ADAPTER).popitem()[1].dtype == torch.float32


def test_another_base_is_refused_by_name(made: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = made
    other = make_base(tmp_path / "other", "attention", seed=4)
    with pytest.raises(UsageError, match=rf"is for another base, {base} \(fingerprint .*weights of {other} are others"):
        with_adapter(find_model(other), adapter)
    larger = tmp_path / "larger"
    export_to_hf(
        find_model(save_model(larger, Decoder(small(**{**SHAPE, "hidden_size": 64})), precision="fp32")),
        larger / "hf", ExportOptions(),
    )  # fmt: skip
    with pytest.raises(UsageError, match=rf"another base, {base}: {larger / 'hf'} has hidden_size 64 instead of 32"):
        with_adapter(find_model(larger / "hf"), adapter)
    run = save_run(tmp_path / "run", begin(base, "attention"), base, "attention")
    with pytest.raises(UsageError, match="is a LoRA run itself"):
        with_adapter(find_model(run), adapter)
    with pytest.raises(UsageError, match="has no low-rank pairs: its run trained all weights"):
        export_adapter(find_model(base), tmp_path / "nothing")


def test_a_damaged_adapter_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    from safetensors import safe_open

    base, adapter = made
    data = (adapter / ADAPTER).read_bytes()
    tensors, path = load_file(adapter / ADAPTER), tmp_path / ADAPTER
    with safe_open(adapter / ADAPTER, "pt") as file:
        metadata = file.metadata()
    name = next(iter(tensors))

    def refused(reason: str) -> None:
        with pytest.raises(DataError, match=reason):
            with_adapter(find_model(base), path)

    path.write_bytes(data[:-100])
    refused("not a file of tensors")
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused("its numbers have changed since it was written; copy or export it again")
    path.unlink()
    refused(f"no adapter .{ADAPTER} is missing.; 'megazh export RUN --to adapter OUT' writes one")
    save_file(tensors, path, {"format": "pt"})
    refused("names no base in its metadata")
    for text in ("{", "[]", "{}", metadata["megazh"].replace('"rank":4', '"rank":5'), '{"format_version": 2}'):
        save_file(tensors, path, {**metadata, "megazh": text})
        refused("later megazh" if "version" in text and len(text) < 30 else "damaged")
    save_file({**tensors, name: tensors[name] * torch.nan}, path, metadata)
    refused("not finite")
    save_file({key: value for key, value in tensors.items() if key != name}, path, metadata)
    refused(f"lacks {name}")


def test_both_copies_of_a_tied_embedding_are_equal(tmp_path: Path) -> None:
    from safetensors import safe_open

    case = "embedding and norms"
    base = make_base(tmp_path, case)
    export_adapter(find_model(save_run(tmp_path / "run", begin(base, case), base, case)), tmp_path / "adapter")
    path, head = tmp_path / "adapter" / ADAPTER, "base_model.model.lm_head.weight"
    tensors = load_file(path)
    assert torch.equal(tensors[head], tensors["base_model.model.model.embed_tokens.weight"])
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({**tensors, head: tensors[head] + 1}, path, metadata)
    with pytest.raises(DataError, match=f"{head} differs from"):
        with_adapter(find_model(base), path)
