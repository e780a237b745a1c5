"""Sizes that the engine works with and the planner counts with; imports nothing, so that both can."""

REDUCE_BUCKET_ELEMENTS = 50_000_000
"""Gradients reduced over the replicas at a time. DeepSpeed's default of 5e8 is allocated anew in every step: 2 GB in
fp32."""
