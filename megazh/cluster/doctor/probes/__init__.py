"""Checks that use the GPU or import torch; each runs in a child process (see `megazh.cluster.doctor.probe`)."""
