#!/usr/bin/env python3
"""Measure tokens/s of greedy decoding beside `transformers.generate`, same random weights, in one run.

python tools/bench/generate.py                              0.5B (`qwen0.5b_6x3090`) in bf16 on a GPU
python tools/bench/generate.py --tokens 512 --batches 1 4 16
python tools/bench/generate.py --device cpu                 a tiny model in fp32, to try this program
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from megazh.cli.options import count
from megazh.exchange.families import choose_family
from megazh.exchange.hf_config import hf_config
from megazh.exchange.tensor_names import hf_tensors
from megazh.model.config import ModelConfig
from megazh.model.decoder import Decoder
from megazh.model.generate import generate_batch
from megazh.model.sampling import SamplingOptions
from megazh.training.recipe import load_recipe
from megazh.training.recipe_files import recipe_path

GREEDY = SamplingOptions(temperature=0.0)
TINY = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 256,
}


def main() -> None:
    """Parse the command line, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="qwen0.5b_6x3090", help="recipe of the shape (default: qwen0.5b_6x3090)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--batches", type=count, nargs="+", default=[1, 16], metavar="N", help="default: 1 16")
    parser.add_argument("--prompt", type=count, default=128, metavar="N", help="tokens per prompt (default: 128)")
    parser.add_argument("--tokens", type=count, default=256, metavar="N", help="tokens to decode (default: 256)")
    parser.add_argument("--repeats", type=count, default=3, metavar="N", help="the fastest counts (default: 3)")
    options = parser.parse_args()
    on_cuda = options.device == "cuda"
    config = load_recipe(recipe_path(options.recipe)).model if on_cuda else ModelConfig.model_validate(TINY)
    model = Decoder(config).eval().to(options.device, torch.bfloat16 if on_cuda else torch.float32)
    peer = transformers_model(model, options.prompt + options.tokens)
    card = torch.cuda.get_device_name() if on_cuda else "CPU"
    print(f"{card}, torch {torch.__version__}, {options.prompt} + {options.tokens} tokens, greedy, tokens/s")
    print(f"{'batch':>5} {'transformers':>13} {'no graphs':>10} {'megazh':>10} {'ratio':>6}  same tokens")
    for rows in options.batches:
        generator = torch.Generator().manual_seed(rows)
        prompts = torch.randint(0, config.vocab_size, (rows, options.prompt), generator=generator)

        def ours(graphs: bool | None, prompts: torch.Tensor = prompts) -> list[list[int]]:
            seeds = [0] * len(prompts)
            return generate_batch(
                model, prompts.tolist(), options.tokens, GREEDY, config.vocab_size, (), seeds, graphs=graphs
            )

        def theirs(prompts: torch.Tensor = prompts) -> list[list[int]]:
            ids = prompts.to(options.device)
            found = peer.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=options.tokens,
                min_new_tokens=options.tokens, do_sample=False, pad_token_id=0,
            )  # fmt: skip
            return found[:, options.prompt :].tolist()

        total = rows * options.tokens
        other, expected = measured(theirs, total, options.repeats)
        plain, _ = measured(lambda: ours(False), total, options.repeats)
        fast, found = measured(lambda: ours(None), total, options.repeats)
        same = sum(int((torch.tensor(a) == torch.tensor(b)).sum()) for a, b in zip(found, expected, strict=True))
        print(f"{rows:>5} {other:>13,.1f} {plain:>10,.1f} {fast:>10,.1f} {fast / other:>5.1f}x  {same / total:.1%}")


def measured(work: Callable[[], list[list[int]]], total: int, repeats: int) -> tuple[float, list[list[int]]]:
    """Tokens/s of the fastest of some repeats after one that is not counted, and the tokens."""
    found, best = work(), float("inf")
    for _ in range(repeats):
        begun = time.perf_counter()
        found = work()  # ends with all tokens on the CPU
        best = min(best, time.perf_counter() - begun)
    return total / best, found


def transformers_model(model: Decoder, length: int) -> Any:
    """The same model as transformers computes it."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config, weight = model.config, model.head.weight
    dtype = str(weight.dtype).removeprefix("torch.")
    values = hf_config(config, choose_family(config), length, dtype, eos_id=None, pad_id=None)
    settings = AutoConfig.for_model(values.pop("model_type"), **values)
    state = model.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        tensors = {each.name: state[each.parameter][each.begin : each.end].cpu().clone() for each in hf_tensors(config)}
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        settings.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=weight.dtype).to(weight.device).eval()


if __name__ == "__main__":
    main()
