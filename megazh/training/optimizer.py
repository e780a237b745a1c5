"""AdamW over the parameters of a stage, with weight decay on matrices only."""

from collections.abc import Iterable

import torch

from megazh.training.recipe import OptimizerConfig


def make_optimizer(parameters: Iterable[torch.nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """Make torch's fused AdamW (arXiv 1711.05101); 1-D parameters (norms, biases) have no weight decay."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() >= 2]
    vectors = [parameter for parameter in trained if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    beta1, beta2 = config.betas
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],  # a stage may have no matrix, or no vector
        lr=config.learning_rate,
        betas=(beta1, beta2),
        eps=config.eps,
        fused=True,
    )
