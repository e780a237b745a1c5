"""Python's garbage collector, kept out of training steps, where it would look at a million objects that stay."""

import gc

COLLECT_EVERY = 1000
"""Largest number of steps from one collection to the next."""


def collect_on_request_only() -> None:
    """Exempt all objects that live now from later collections, and leave these to `gc.collect()` alone."""
    gc.collect()
    gc.freeze()
    gc.disable()
