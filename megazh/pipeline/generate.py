"""Generation with a model spread over stages: hidden states go from stage to stage, logits back to all ranks."""

import torch
import torch.distributed as dist

from megazh.model.generate import Forward
from megazh.model.kv_cache import KeyValueCache
from megazh.pipeline.module import DecoderPipeline


def pipeline_forward(module: DecoderPipeline, capacity: int) -> Forward:
    """Make a forward pass like `cached_forward` for a pipeline.

    All ranks call the returned function with the same tokens and get the same logits, (vocab,) fp32.

    Args:
        module: this rank's stage.
        capacity: the longest sequence in tokens, prompt included.
    """
    parameter = next(module.parameters())
    device, dtype = parameter.device, parameter.dtype
    cache = KeyValueCache(module.config, capacity, device, dtype)
    grid = module.mpu()
    stages, mine = grid.pipe_parallel_size, grid.get_stage_id()
    group, ranks = grid.get_pipe_parallel_group(), grid.pp_group

    @torch.no_grad()
    def forward(tokens: list[int]) -> torch.Tensor:
        attend = cache.extend(len(tokens))
        states = torch.tensor([tokens], device=device)
        for stage in range(stages):
            if stage == mine:
                hidden = module.run_layers(states, attend)
            elif stage < stages - 1:
                hidden = torch.empty(1, len(tokens), module.config.hidden_size, device=device, dtype=dtype)
            if stage < stages - 1:
                dist.broadcast(hidden, ranks[stage], group=group)
                states = hidden
        logits = torch.empty(module.config.vocab_size, device=device)
        if module.is_last:
            logits = module.logits(hidden[0, -1])
        if stages > 1:
            dist.broadcast(logits, ranks[-1], group=group)
        return logits.cpu()  # where all ranks sample the same token, whatever their cards

    return forward
