"""DeepSpeed's compiled operators: megazh uses none, so that no machine needs a compiler."""


def use_no_compiled_operators() -> None:
    """Keep DeepSpeed in this process from compiling; call it before `deepspeed.init_distributed`.

    On the CPU DeepSpeed would otherwise build an all-reduce of its own at its first start: minutes with g++, an error
    without it, and every later start waits for ever where that first one was killed. Without it, gloo does the work.
    On GPUs this spares the search for a CUDA toolkit, and its warnings.
    """
    import deepspeed.ops

    # The table of what can be built. DeepSpeed fills it at its first use, and then takes it as it is.
    deepspeed.ops.__compatible_ops__ = {}
