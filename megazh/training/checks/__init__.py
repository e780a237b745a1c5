"""Checks of a run before anything starts. Each is a function of a `Case` that raises what refuses the run, and yields
lines that warn of what may be meant otherwise. `megazh.training.preflight` lists them all.
"""
