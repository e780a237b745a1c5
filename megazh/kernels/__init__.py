"""Triton kernels of the training step on CUDA: norm, rotation, SwiGLU, attention, cross entropy, embedding.

Each module of this package needs Triton; `megazh.model.fused` says where they serve, and imports them only there.
All of them are deterministic: no atomics, sums in a fixed order.
"""
