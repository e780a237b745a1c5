"""Low-rank pairs of a LoRA run's checkpoint are merged where its weights are read."""

from pathlib import Path

import pytest
import torch
from decoders import alone, logits, small
from saved_models import save_lora

from megazh.model.decoder import Decoder
from megazh.model.lora_config import PART, LoraConfig, Target
from megazh.training import weight_reader
from megazh.training.model_source import find_model
from megazh.training.weights import load_decoder


@pytest.mark.parametrize("block", [1 << 22, 100])
def test_a_loaded_model_computes_what_the_pairs_compute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(weight_reader, "_BLOCK", block)
    settings = LoraConfig(rank=3, targets=list(Target))
    model = Decoder(small(qkv_bias=True, num_key_value_heads=2), 3, lora=settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".b"):
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    path = save_lora(tmp_path, model, settings)
    loaded = load_decoder(find_model(path), torch.device("cpu"))
    assert not any(PART in name for name, _ in loaded.named_parameters())
    tokens = torch.randint(0, 97, (1, 24), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        logits(loaded, tokens, *alone(24)), logits(model.eval(), tokens, *alone(24)), rtol=1e-4, atol=1e-4
    )
