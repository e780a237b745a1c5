"""`megazh export --to adapter` and `megazh merge`."""

import json
from pathlib import Path

import pytest
import torch
from decoders import small
from made_runs import make_run, write_recipe
from safetensors.torch import load_file
from saved_models import save_lora, save_model

from megazh.cli import main
from megazh.conversation.template import BUILT_IN
from megazh.exchange.chat_template import read_chat_template
from megazh.index.metadata import TemplateInfo
from megazh.model.decoder import Decoder
from megazh.model.lora_config import LoraConfig
from megazh.training.model_source import find_model


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


def test_a_merged_chat_model_has_the_template_of_the_adapter(
    stories: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shape = {"vocab_size": 400}
    make_run(tmp_path / "base", write_recipe(tmp_path / "base.yaml", stories, model=shape))
    base, adapter, merged = (tmp_path / name for name in ("hf", "adapter", "merged"))
    assert call(capfd, "export", tmp_path / "base", base)[0] == 0
    recipe = write_recipe(
        tmp_path / "lora.yaml", stories, model=shape, lora={"rank": 2}, initial_checkpoint=str(base), seq_len=16
    )
    template = TemplateInfo(name="chatml", jinja=BUILT_IN["chatml"], stop="<|im_end|>")
    make_run(tmp_path / "run", recipe, template=template)
    assert call(capfd, "export", tmp_path / "run", "--to", "adapter", adapter) == (
        0, f"{adapter}: rank 2 on q, k, v, o of {tmp_path / 'run' / 'checkpoints' / 'step_00000006'}, for {base}\n", ""
    )  # fmt: skip
    assert call(capfd, "merge", base, adapter, merged)[0] == 0
    assert read_chat_template(base) is None
    found = read_chat_template(merged)
    assert found is not None
    assert found.jinja == template.jinja
    ends = json.loads((merged / "generation_config.json").read_text())["eos_token_id"]
    tokenizer = find_model(merged).tokenizer()
    assert ends == [tokenizer.control_id("<|im_end|>"), tokenizer.eod_id]
    assert json.loads((merged / "config.json").read_text())["eos_token_id"] == ends
    assert json.loads((merged / "tokenizer_config.json").read_text())["chat_template"] == template.jinja


@pytest.mark.parametrize("option", ["--shard-size=1GB", "--family=llama"])
def test_options_without_a_meaning_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str], option: str) -> None:
    lora = LoraConfig(rank=2)
    run = save_lora(tmp_path / "run", Decoder(small(), 3, lora=lora), lora)
    _, _, err = call(capfd, "export", run, "--to", "adapter", tmp_path / "adapter", option)
    assert err == f"error: {option.partition('=')[0]}: has no meaning for an adapter; leave it out\n"
