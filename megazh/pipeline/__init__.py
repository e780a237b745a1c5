"""The decoder as a DeepSpeed pipeline: costs, cut into stages, memory, schedule, module and engine."""
