"""One rank of a small pipeline that trains, and the same training without DeepSpeed; see `test_ladder.py`.

`python ladder_rank.py FOLDER STAGES/NAME...` runs these cases one after the other.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from decoders import packed, small
from ranks import join_ranks, save_results

from megazh.model.backend import Backend
from megazh.model.config import ModelConfig
from megazh.model.decoder import Decoder
from megazh.model.document_map import encode_document_map
from megazh.model.embedding_noise import EmbeddingNoise
from megazh.model.layers import layer_count
from megazh.model.lora_config import LoraConfig, Target
from megazh.pipeline.precision import Dtype, Precision
from megazh.training.optimizers.choose import rules
from megazh.training.recipe import MuonConfig, OptimizerConfig, OptimizerName

STEPS, MICRO_BATCHES, ROWS, SEQ = 10, 6, 2, 16
DECAY, CLIP = 0.1, 0.3
SEED = 3
PARTS = 4
"""Parts of the model (embedding, two blocks, head), and so the largest number of stages."""


@dataclass(frozen=True)
class Case:
    """A model, and the way it is trained."""

    model: dict[str, Any] = field(default_factory=dict)
    checkpointing: bool = False
    z_loss: float = 0.0
    compute: Dtype = Dtype.FP32
    communication: Dtype = Dtype.FP32
    """Dtype of the reduction over replicas."""
    optimizer: OptimizerName = OptimizerName.ADAMW
    learning_rate: float = 1e-3
    recorded: bool = False
    """Whether passes go the way of CUDA graphs, each of which runs Python again here."""
    attention_group: int | None = None
    """Tokens per group of shifted sparse attention."""
    lora: LoraConfig | None = None
    """LoRA; None: all weights are trained."""
    neftune_alpha: float = 0.0
    """Strength of the noise on embedded tokens."""

    @property
    def config(self) -> ModelConfig:
        """The model's configuration; by default with grouped heads, biases, and rotation of all dimensions."""
        return small(**{"num_key_value_heads": 2, "qkv_bias": True, "initializer_range": 0.05, **self.model})


UNTIED = {"tie_word_embeddings": False}
# Without biases: the bias of a key dimension that is not rotated has no effect on the loss. Its gradient is rounding
# error, from which AdamW would make steps of full size.
NEOX = {
    "norm": "layernorm", "mlp": "gelu", "parallel_residual": True, "partial_rotary_factor": 0.5, "qkv_bias": False,
}  # fmt: skip
CASES = {
    "tied": Case(),
    # Muon orthogonalizes in bf16, as torch's own does. A gradient that was summed in another order rounds otherwise
    # there, which moves a weight by some hundredths of the learning rate.
    "muon": Case(optimizer=OptimizerName.MUON, learning_rate=1e-4),
    "muon untied": Case(UNTIED, optimizer=OptimizerName.MUON, learning_rate=1e-4),
    "untied": Case(UNTIED, checkpointing=True),
    "z_loss": Case(z_loss=0.01, checkpointing=True),
    "neox": Case(NEOX),
    "recorded": Case(z_loss=0.01, recorded=True),
    "z_loss untied": Case(UNTIED, z_loss=0.01, neftune_alpha=5.0),
    "dropout": Case({"residual_dropout": 0.2, "attention_dropout": 0.1}, checkpointing=True),
    "groups": Case(checkpointing=True, attention_group=4),
    "lora": Case(lora=LoraConfig(rank=4, targets=list(Target), dropout=0.1, train_embed_norm=True)),
    "pairs": Case(lora=LoraConfig(rank=4), attention_group=4),
    "recorded pairs": Case(lora=LoraConfig(rank=4, targets=[Target.Q, Target.DOWN]), recorded=True),
    "tied bf16": Case(compute=Dtype.BF16),
    "bf16 between replicas": Case(compute=Dtype.BF16, communication=Dtype.BF16),
    "untied bf16": Case(UNTIED, compute=Dtype.BF16),
}


def micro_batch(number: int) -> tuple[torch.Tensor, ...]:
    """Tokens, labels, positions and boundaries of micro-batch `number`; in every third one many labels are ignored."""
    lengths = [[5 + number % 7, 3], [2, 9]] if number % 3 else [[SEQ], [4]]
    tokens, labels, positions, boundaries = packed(lengths, SEQ, seed=number)
    if number % 3 == 1:
        labels[:, : SEQ // 2] = -100
    return tokens, labels, positions, boundaries


def sample_numbers(number: int) -> torch.Tensor:
    """Numbers of the samples of micro-batch `number`."""
    return torch.arange(number * ROWS, (number + 1) * ROWS)


def noise_of(case: Case, number: int) -> EmbeddingNoise | None:
    """Noise on the embedded tokens of micro-batch `number`."""
    if not case.neftune_alpha:
        return None
    return EmbeddingNoise(case.neftune_alpha, SEED, sample_numbers(number), micro_batch(number)[3])


def valid_labels(step: int) -> int:
    """Number of labels in a step that are not ignored."""
    first = step * MICRO_BATCHES
    return sum(int((micro_batch(number)[1] >= 0).sum()) for number in range(first, first + MICRO_BATCHES))


def settings(case: Case) -> OptimizerConfig:
    """The optimizer's settings in a recipe."""
    return OptimizerConfig(
        name=case.optimizer, learning_rate=case.learning_rate, weight_decay=DECAY, muon=MuonConfig(match_adamw=False)
    )


def optimizers_for(model: Decoder, case: Case) -> list[torch.optim.Optimizer]:
    """torch's own optimizers: weight decay on matrices only; with Muon, AdamW for what is no matrix of a block."""
    whole = [p for p in model.blocks.parameters() if p.dim() > 1] if case.optimizer is OptimizerName.MUON else []
    rest = [p for p in model.parameters() if p.requires_grad and not any(p is other for other in whole)]
    groups = [
        {"params": [p for p in rest if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in rest if p.dim() == 1], "weight_decay": 0.0},
    ]
    found: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([g for g in groups if g["params"]], case.learning_rate, (0.9, 0.95))
    ]
    return [*found, torch.optim.Muon(whole, case.learning_rate, DECAY)] if whole else found


def train_plainly(case: Case) -> dict[str, Any]:
    """Train in fp32 in this process with torch alone; returns losses and gradient norms by step, and the weights."""
    model = Decoder(case.config, SEED, attention_group=case.attention_group, lora=case.lora)
    optimizers = optimizers_for(model, case)
    losses, norms = [], []
    for step in range(STEPS):
        loss = torch.zeros(())
        for number in range(step * MICRO_BATCHES, (step + 1) * MICRO_BATCHES):
            tokens, labels, positions, boundaries = micro_batch(number)
            noise = noise_of(case, number)
            loss = loss + model.loss(tokens, labels, positions, boundaries, case.z_loss, sample_numbers(number), noise)
        loss = loss / valid_labels(step)
        loss.backward()
        losses.append(loss.item())
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    return {"losses": losses, "norms": norms, "weights": layer_weights(model)}


def layer_weights(model: Decoder) -> dict[str, torch.Tensor]:
    """Copies of the weights, named `NUMBER.name` with the layer numbers of `make_layer`."""
    return {name: weight.detach().clone() for name, weight in layer_parameters(model).items()}


def layer_parameters(model: Decoder) -> dict[str, torch.nn.Parameter]:
    """The parameters, named `NUMBER.name` with the layer numbers of `make_layer`; a tied matrix has two names."""
    last = layer_count(model.config) - 1
    layers = {0: model.embedding, last - 1: model.norm, last: model.head}
    layers.update({number + 1: block for number, block in enumerate(model.blocks)})
    return {f"{n}.{name}": parameter for n, layer in layers.items() for name, parameter in layer.named_parameters()}


def make_pipeline(
    case: Case, stages: int, frozen: tuple[str, ...] = (), backend: Backend = Backend.MASKED
) -> tuple[Any, Any]:
    """The module of this rank's stage, and its engine; parameters of the names in `frozen` are not trained."""
    from megazh.pipeline.costs import costs_by_flops
    from megazh.pipeline.engine import make_engine, quiet
    from megazh.pipeline.module import DecoderPipeline
    from megazh.pipeline.parameters import named_parameters
    from megazh.pipeline.split import best_bounds
    from megazh.pipeline.work import Work

    replicas = dist.get_world_size() // stages
    precision = Precision(case.compute, Dtype.FP32, case.communication)
    work = Work(
        case.config, stages, replicas, SEQ, ROWS, MICRO_BATCHES // replicas, precision, case.checkpointing,
        backend, attention_group=case.attention_group, lora=case.lora,
        neftune_alpha=case.neftune_alpha,
    )  # fmt: skip
    costs = costs_by_flops(dataclasses.replace(work, activation_checkpointing=False))
    bounds = best_bounds(costs.parts(case.config.num_hidden_layers), stages)
    with quiet():
        module = DecoderPipeline(work, bounds, SEED, case.z_loss)
    for each in named_parameters(module):
        if each.name in frozen:
            each.parameter.requires_grad_(False)
    engine = make_engine(module, case.optimizer.value, rules(settings(case)), work, CLIP)
    if case.recorded:
        _stand_in_for_graphs(engine)
    engine.optimizer.learning_rate = case.learning_rate
    return module, engine


def _stand_in_for_graphs(engine: Any) -> None:
    from megazh.pipeline import recorded

    def record(passes: Callable[[], None], pool: Any) -> Callable[[], None]:
        passes()  # as if recorded: its results have places, and nothing was added to any gradient
        engine.optimizer.clear_gradients()
        return passes

    recorded.record, recorded.new_pool = record, lambda: None
    engine._records = True


def feed(step: int, replica: int, replicas: int) -> Iterator[Any]:
    """The micro-batches of a replica, scaled as `training_feed` scales them."""
    count = MICRO_BATCHES // replicas
    scale = torch.tensor([1 / valid_labels(step)])
    for number in range(count):
        place = step * MICRO_BATCHES + number * replicas + replica
        tokens, labels, positions, boundaries = micro_batch(place)
        yield (tokens, encode_document_map(positions, boundaries, sample_numbers(place))), (labels, scale)


def stage_weights(module: Any) -> dict[str, torch.Tensor]:
    """Copies of the weights that this rank holds, named as in `layer_weights`."""
    numbered = enumerate(module.forward_funcs, module._local_start)
    return {f"{n}.{name}": w.detach().clone() for n, layer in numbered for name, w in layer.named_parameters()}


def train_in_stages(case: Case, stages: int) -> dict[str, Any]:
    """Train with DeepSpeed; returns losses and norms as this rank reports them, and the weights that it holds."""
    from megazh.pipeline.engine import check_tied

    module, engine = make_pipeline(case, stages)
    replicas, replica = dist.get_world_size() // stages, module.mpu().get_data_parallel_rank()
    losses, norms = [], []
    for step in range(STEPS):
        losses.append(float(engine.train_batch(feed(step, replica, replicas))))
        norms.append(float(engine.get_global_grad_norm()))
    check_tied(module)
    return {"losses": losses, "norms": norms, "weights": stage_weights(module)}


if __name__ == "__main__":
    join_ranks()
    results = {}
    for run in sys.argv[2:]:
        stages, name = run.split("/")
        results[run] = train_in_stages(CASES[name], int(stages))
    save_results(Path(sys.argv[1]), results)
    dist.barrier()
    dist.destroy_process_group()
