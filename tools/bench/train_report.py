"""Results of `train.py`, and the table that it prints."""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch

from megazh.errors import WorkerError
from megazh.files import write_atomic
from megazh.pipeline.costs import LayerCosts
from megazh.pipeline.passes import makespan
from megazh.run.peaks import mfu, peak_flops
from megazh.training.recipe import Recipe

MEGAZH, MEGAZH_HF = "megazh", "megazh_hf"
"""Names of megazh's own engines: `-t ds_pp` and `-t hf`."""


@dataclass
class Result:
    """Measurements of one contender."""

    name: str
    seconds: list[float]
    """Seconds of each step after the warm-up."""
    memory_bytes: int
    losses: list[float]
    note: str
    waited: float | None = None
    """Share of the time that steps of megazh waited for samples."""
    stages: int = 1
    bounds: list[int] | None = None
    costs: LayerCosts | None = None
    """Layer costs that megazh's stages were cut by."""


class Report:
    """Results so far; none is lost where a later contender hangs or is interrupted."""

    def __init__(self, arguments: argparse.Namespace, recipe: Recipe, tokens: int, card: str | None) -> None:
        self._arguments, self._recipe, self._tokens, self._card = arguments, recipe, tokens, card
        self._results: list[Result] = []
        self._left_out: dict[str, str] = {}

    def add(self, result: Result) -> None:
        """Keep a result and print its speed."""
        self._results.append(result)
        rate = rate_of(result, self._tokens, self._arguments.num_gpus)
        print(f"measured {result.name}: {rate:,.0f} tokens/s/GPU", file=sys.stderr, flush=True)
        self._write()

    def leave_out(self, contender: str, reason: str) -> None:
        """Record why a contender was not measured."""
        self._left_out[contender] = reason
        print(f"left out: {contender}: {reason}", file=sys.stderr, flush=True)
        self._write()

    def print(self) -> None:
        """Print the table.

        Raises:
            WorkerError: megazh was among the contenders and could not be measured.
        """
        arguments = self._arguments
        print(
            f"{arguments.recipe}, {arguments.seq_len} tokens, documents of {arguments.document_tokens:g} on average, "
            f"{arguments.micro_batches} micro-batches of {arguments.micro_batch_size} per GPU and step, "
            f"{arguments.num_gpus} x {self._card or 'CPU rank'}, torch {torch.__version__}; median of "
            f"{arguments.steps - arguments.warm_up} steps"
        )
        print(self._formula())
        for line in table(self._results, self._recipe, self._tokens, arguments.num_gpus, self._card):
            print(line)
        for line in describe_stages(self._results, arguments.micro_batches):
            print(line)
        for contender, reason in self._left_out.items():
            print(f"left out: {contender}: {reason}")
        if MEGAZH in self._left_out:
            raise WorkerError(f"megazh was not measured: {self._left_out[MEGAZH]}")

    def _formula(self) -> str:
        flops = self._recipe.flops_per_token
        peak = peak_flops(self._card, self._recipe.logging.peak_tflops)
        over = f"{peak / 1e12:g} TFLOP/s" if peak else "the card's peak, which is not known here"
        return (
            f"MFU = tokens/s x {flops.total / 1e9:.3f} GFLOP (6 per parameter in products, causal attention over "
            f"whole rows) / {over}"
        )

    def _write(self) -> None:
        if not self._arguments.json:
            return
        results = [{**asdict(each), "costs": each.costs.model_dump() if each.costs else None} for each in self._results]
        found = {
            "card": self._card,
            "torch": torch.__version__,
            "tokens_a_step": self._tokens,
            "results": results,
            "left_out": self._left_out,
        }
        write_atomic(self._arguments.json, (json.dumps(found, indent=1) + "\n").encode())


def table(results: Sequence[Result], recipe: Recipe, tokens: int, gpus: int, card: str | None) -> list[str]:
    """One line per contender."""
    peak = peak_flops(card, recipe.logging.peak_tflops)
    flops = recipe.flops_per_token.total
    own = next((each for each in results if each.name.split()[0] == MEGAZH), None)
    lines = [
        f"{'contender':<16} {'tokens/s/GPU':>12} {'min-max':>17} {'MFU':>6} {'memory':>10} {'megazh is':>10}  notes"
    ]
    for each in results:
        rates = [tokens / second / gpus for second in each.seconds]
        rate = statistics.median(rates)
        used = mfu(rate, flops, peak)
        share = "?" if used is None else f"{used:.3f}"
        times = f"{rate_of(own, tokens, gpus) / rate:.2f} x" if own else "-"
        extra = [each.note]
        if each.waited is not None:
            extra.append(f"waited for samples {each.waited:.2%}")
        if each.stages > 1:
            extra.append(f"cut {each.bounds}")
        lines.append(
            f"{each.name:<16} {rate:>12,.0f} {f'{min(rates):,.0f}-{max(rates):,.0f}':>17} {share:>6} "
            f"{each.memory_bytes / 2**30:>6.2f} GiB {times:>10}  {'; '.join(extra)}"
        )
    return lines


def describe_stages(results: Sequence[Result], micro_batches: int) -> list[str]:
    """Speed of each pipeline relative to replicas alone, and the limit that its cut and its bubble set."""
    flat = next((each for each in results if each.name.split()[0] == MEGAZH and each.stages == 1), None)
    lines = []
    for each in results:
        if each.stages == 1 or each.costs is None or each.bounds is None:
            continue
        count = micro_batches * each.stages
        blocks = each.bounds[-1] - 2
        pairs = list(pairwise(each.bounds))
        whole = sum(each.costs.parts(blocks)) / each.stages
        plain = makespan([each.costs.passes(*pair, blocks, split=False) for pair in pairs], count)
        split = makespan([each.costs.passes(*pair, blocks, split=True) for pair in pairs], count)
        line = (
            f"pp={each.stages}, {count} micro-batches, cut {each.bounds}: layer {each.costs.block * 1e3:.2f} ms, head "
            f"{each.costs.head * 1e3:.2f} ms; cut and bubble allow {count * whole / plain:.3f} of the replicas' speed "
            f"with one forward, one backward, {count * whole / split:.3f} with deferred weight passes"
        )
        if flat is not None:
            reached = statistics.median(flat.seconds) / statistics.median(each.seconds)
            line += f"; reached {reached:.3f}, {reached / (count * whole / plain):.3f} of the former"
        lines.append(line)
    return lines


def rate_of(result: Result, tokens: int, gpus: int) -> float:
    """Tokens per second and GPU of the median step."""
    return tokens / statistics.median(result.seconds) / gpus
