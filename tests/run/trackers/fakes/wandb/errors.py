"""Errors of wandb."""


class UsageError(Exception):
    """It is used wrongly."""
