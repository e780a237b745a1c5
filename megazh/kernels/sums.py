"""The last step of a sum that many programs began: their partial sums, in a fixed order."""

import torch


def sum_rows(partial: torch.Tensor) -> torch.Tensor:
    """(rows, width) fp32 to (width,); as a product with ones, which is faster than torch's sum of so few rows."""
    return torch.mv(partial.T, partial.new_ones(len(partial)))
