"""Slurm jobs: what they have, and whether they start again."""
