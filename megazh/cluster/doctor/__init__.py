"""Examination of machines before a run: versions, GPUs, links, kernels, disk, limits, network; alone or all hosts."""
