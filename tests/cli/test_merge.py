"""`megazh export --to adapter` and `megazh merge`."""

from pathlib import Path

import pytest
import torch
from decoders import small
from safetensors.torch import load_file
from saved_models import save_lora, save_model

from megazh.cli import main
from megazh.model.decoder import Decoder
from megazh.model.lora_config import LoraConfig


def call(capfd: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    out, err = capfd.readouterr()
    return int(ended.value.code or 0), out, err


def test_an_adapter_is_written_and_merged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shape, lora = small(rope_scaling={"type": "linear", "factor": 2.0}), LoraConfig(rank=2, train_embed_norm=True)
    base = save_model(tmp_path / "base", Decoder(shape, 3), precision="fp32")
    run = save_lora(tmp_path / "run", Decoder(shape, 3, lora=lora), lora, base)
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    code, out, err = call(capfd, "export", run, "--to", "adapter", adapter)
    assert (code, out) == (0, f"{adapter}: rank 2 on q, k, v, o, embedding and norms of {run}, for {base}\n")
    assert "the run had model.rope_scaling=linear" in err
    assert call(capfd, "export", run, "--to", "adapter", adapter)[2].endswith("or replace it with --force\n")
    assert call(capfd, "export", run, "--to", "adapter", adapter, "--force")[0] == 0
    code, out, _ = call(capfd, "merge", base, adapter, merged)
    assert (code, out.startswith(f"{merged}: ")) == (0, True)
    assert f"parameters of {base} with {adapter} as llama, fp32" in out
    assert torch.equal(
        load_file(merged / "model.safetensors")["model.embed_tokens.weight"],
        Decoder(shape, 3).embedding.weight[: shape.vocab_size],
    )
    assert call(capfd, "merge", run, adapter, tmp_path / "again")[2].startswith(f"error: {run}: is a LoRA run itself")
    assert call(capfd, "merge", base, tmp_path / "none", tmp_path / "again")[0] != 0


@pytest.mark.parametrize("option", ["--shard-size=1GB", "--family=llama"])
def test_options_without_a_meaning_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str], option: str) -> None:
    lora = LoraConfig(rank=2)
    run = save_lora(tmp_path / "run", Decoder(small(), 3, lora=lora), lora)
    _, _, err = call(capfd, "export", run, "--to", "adapter", tmp_path / "adapter", option)
    assert err == f"error: {option.partition('=')[0]}: has no meaning for an adapter; leave it out\n"
