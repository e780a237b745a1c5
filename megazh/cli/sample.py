"""`megazh sample`: text from a trained model."""

import argparse
import sys
import time
from pathlib import Path

from megazh.cli.options import Subparsers, add_command, count
from megazh.errors import UsageError

EXAMPLES = """examples:
  megazh sample runs/demo '春天的一个早晨，'
  megazh sample runs/demo '秋天到了，' --temperature 0                  the most likely continuation
  megazh sample runs/demo '秋天到了，' --top-p 0.9 --count 3 --seed 7
  megazh sample models/Qwen1.5-0.5B '秋天到了，'                         a Hugging Face folder
  megazh sample runs/qwen0.5b_6x3090 '中国的首都是' --checkpoint step_00001000 --device cuda"""

_SEEDS = 1 << 32


def add_to(commands: Subparsers) -> None:
    """Add `sample`."""
    parser = add_command(commands, "sample", "continue a text with a trained model", EXAMPLES)
    parser.add_argument("model", type=Path, metavar="MODEL", help="run, checkpoint, imported or Hugging Face folder")
    parser.add_argument("prompt", help="the text to continue")
    parser.add_argument(
        "--checkpoint", metavar="NAME", help="one of RUN/checkpoints, or its path (default: the newest)"
    )
    parser.add_argument(
        "--max-tokens", type=count, default=200, metavar="N", help="largest number of tokens (default: 200)"
    )
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0: greedy (default: 0.8)")
    parser.add_argument(
        "--top-k", type=int, default=50, metavar="K", help="draw among the K most likely tokens; 0: all (default: 50)"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=0.95,
        metavar="P",
        help="draw among the most likely tokens of this total probability (default: 0.95)",
    )
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1 repeats less (default: 1)"
    )
    parser.add_argument(
        "--additive-penalty",
        type=float,
        default=0.0,
        metavar="A",
        help="lower the logit of each token by A where it occurred; fades by --penalty-decay a token (default: 0)",
    )
    parser.add_argument(
        "--penalty-decay", type=float, default=0.98, metavar="D", help="see --additive-penalty (default: 0.98)"
    )
    parser.add_argument("--count", type=count, default=1, metavar="N", help="number of continuations (default: 1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed, the same text (default: 0)")
    parser.add_argument("--ignore-end", action="store_true", help="continue after the end of the document")
    parser.add_argument(
        "--no-cache", action="store_true", help="recompute all tokens for each new one (for comparison)"
    )
    parser.add_argument("--no-graphs", action="store_true", help="on CUDA, launch each kernel by itself (slower)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is a GPU")
    parser.set_defaults(call=_sample)


def _sample(options: argparse.Namespace) -> None:
    from megazh.model.sampling import SamplingOptions
    from megazh.training.text_model import open_model

    drawing = SamplingOptions(
        options.temperature,
        options.top_k,
        options.top_p,
        options.repetition_penalty,
        options.additive_penalty,
        options.penalty_decay,
    )
    if not options.prompt:
        raise UsageError("the prompt is empty: give at least one character")
    if any("\udc80" <= each <= "\udcff" for each in options.prompt):  # surrogates stand for bytes that are not UTF-8
        raise UsageError("the prompt is not valid UTF-8: set the terminal to UTF-8")
    if not 0 <= options.seed < _SEEDS:
        raise UsageError(f"--seed {options.seed}: expected a number from 0 to {_SEEDS - 1}")
    model = open_model(options.model, options.checkpoint, options.device)
    if warning := model.warning(options.prompt):
        print(warning, file=sys.stderr)
    for number in range(options.count):
        begun, tokens = time.perf_counter(), 0
        sys.stdout.write(options.prompt)
        for text in model.stream(
            options.prompt,
            options.max_tokens,
            drawing,
            options.seed + number,
            stop_at_end=not options.ignore_end,
            cached=not options.no_cache,
            graphs=False if options.no_graphs else None,
        ):
            tokens += 1
            sys.stdout.write(text)
            sys.stdout.flush()
        tokens -= 1  # the last piece is the rest of the text, not a token
        sys.stdout.write("\n")
        seconds = time.perf_counter() - begun
        print(f"[{tokens} tokens, {tokens / max(seconds, 1e-9):.1f} tokens/s]", file=sys.stderr)
