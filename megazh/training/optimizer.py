"""AdamW over a model's parameters, weight decay on its matrices only."""

from collections.abc import Iterable

import torch

from megazh.training.recipe import Recipe


def make_optimizer(parameters: Iterable[torch.nn.Parameter], recipe: Recipe) -> torch.optim.AdamW:
    """torch's fused AdamW (arXiv 1711.05101); norms and biases, all that has one dimension, are not decayed."""
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    matrices = [parameter for parameter in wanted if parameter.dim() >= 2]
    vectors = [parameter for parameter in wanted if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    beta1, beta2 = recipe.betas
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],  # a stage may have no matrix, or no vector
        lr=recipe.learning_rate,
        betas=(beta1, beta2),
        eps=recipe.eps,
        fused=True,
    )
