"""The decoder as a DeepSpeed pipeline: costs, stage bounds, module and engine."""
