"""`megazh sample`: text from a trained model."""

import argparse
import sys
import time
from pathlib import Path

from megazh.cli.options import Subparsers, add_command, add_device, add_sampling, count, sampling
from megazh.errors import UsageError

EXAMPLES = """examples:
  megazh sample runs/demo '春天的一个早晨，'
  megazh sample runs/demo '秋天到了，' --temperature 0                  the most likely continuation
  megazh sample runs/demo '秋天到了，' --top-p 0.9 --count 3 --seed 7
  megazh sample models/Qwen1.5-0.5B '秋天到了，'                         a Hugging Face folder
  megazh sample runs/qwen0.5b_6x3090 '中国的首都是' --checkpoint step_00001000 --device cuda"""


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
    add_sampling(parser)
    parser.add_argument("--count", type=count, default=1, metavar="N", help="number of continuations (default: 1)")
    parser.add_argument("--ignore-end", action="store_true", help="continue after the end of the document")
    parser.add_argument(
        "--no-cache", action="store_true", help="recompute all tokens for each new one (for comparison)"
    )
    add_device(parser)
    parser.set_defaults(call=_sample)


def _sample(options: argparse.Namespace) -> None:
    from megazh.training.text_model import open_model

    drawing = sampling(options)
    if not options.prompt:
        raise UsageError("the prompt is empty: give at least one character")
    if any("\udc80" <= each <= "\udcff" for each in options.prompt):  # surrogates stand for bytes that are not UTF-8
        raise UsageError("the prompt is not valid UTF-8: set the terminal to UTF-8")
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
