"""Triton kernels of the training step on CUDA: norm, rotation, SwiGLU, attention, cross entropy, embedding.

Most modules need Triton: `megazh.model.fused` and `megazh.model.loss` import them only inside
the functions that use them. All kernels are deterministic: no atomics, sums in a fixed order.
"""
