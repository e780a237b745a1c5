"""The roles of parameters. Starts without torch."""

from enum import StrEnum


class Role(StrEnum):
    """What a parameter is to the model; optimizers and weight decay go by it."""

    EMBEDDING = "embedding"
    """Matrix of the token embedding; with tied weights also that of the head."""
    HEAD = "head"
    """Matrix of the head."""
    MATRIX = "matrix"
    """Any other 2-D weight."""
    NORM = "norm"
    """Weight or bias of a norm."""
    BIAS = "bias"
    """Bias of a product."""
