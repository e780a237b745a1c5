"""`megazh plan`: stages, memory, speed and days of a recipe, before anything is bought or started."""

import argparse

from megazh.cli.options import Subparsers, add_command, count

EXAMPLES = """examples:
  megazh plan qwen0.5b_6x3090
  megazh plan qwen0.5b_6x3090 -n 8 --card 4090 --mfu 0.45
  megazh plan qwen0.5b_6x3090 --nodes 2 -n 12 --network 12.5     two hosts, 100 Gbit/s between them
  megazh plan qwen0.5b_6x3090 --measured     with the links of this machine, as 'megazh doctor' measured them
  megazh plan minillm_1.4b micro_batch_size=4 activation_checkpointing=false

Figures are projections from FLOPs, or from layer times that an earlier run measured on that card."""


def add_to(commands: Subparsers) -> None:
    """Add `plan`."""
    parser = add_command(commands, "plan", "what a recipe needs, and the best layout for it", EXAMPLES)
    parser.add_argument("recipe", metavar="RECIPE", help="a name in jobs/recipes/, or the path of a .yaml file")
    parser.add_argument("-n", "--num-gpus", type=count, metavar="N", help="number of GPUs (default: the recipe's)")
    parser.add_argument("--card", default="3090", metavar="CARD", help="3090, 4090, a100, a100-40, h100, h200")
    parser.add_argument("--memory", type=float, metavar="GIB", help="memory of the card in GiB (default: its own)")
    parser.add_argument(
        "--mfu",
        type=float,
        metavar="SHARE",
        help="share of its peak that one GPU reaches (default: as measured on an H100)",
    )
    parser.add_argument(
        "--bandwidth",
        type=float,
        metavar="GB/S",
        help="bandwidth between GPUs of a host (default: the recipe's parallel.gpu_bandwidth, 10: PCIe 4, no NVLink)",
    )
    parser.add_argument(
        "--nodes", type=count, default=1, metavar="N", help="hosts that share the GPUs in equal parts (default: 1)"
    )
    parser.add_argument(
        "--network",
        type=float,
        metavar="GB/S",
        help="bandwidth of a host to the others (default: the recipe's parallel.network_bandwidth, 1.25)",
    )
    parser.add_argument(
        "--measured", action="store_true", help="bandwidths that 'megazh doctor' has measured on this machine"
    )
    parser.usage = "%(prog)s RECIPE [options] [key=value ...]"
    parser.set_defaults(settings=[], call=_plan)


def _plan(options: argparse.Namespace) -> None:
    from megazh.cluster.plan import MEASURED_MFU, Assumptions, plan
    from megazh.training.recipe import read_recipe
    from megazh.training.recipe_files import recipe_path

    recipe, settings = read_recipe(recipe_path(options.recipe), options.settings)
    parallel = recipe.parallel
    gpu_bandwidth, network_bandwidth = parallel.gpu_bandwidth, parallel.network_bandwidth
    if options.measured:
        from megazh.cluster.doctor.measured import measured

        links = measured(between_hosts=options.nodes > 1)
        gpu_bandwidth = gpu_bandwidth if links.gpus is None else links.gpus
        network_bandwidth = network_bandwidth if links.hosts is None else links.hosts
        print(links.describe())
    assumed = Assumptions(
        card=options.card,
        memory_gib=options.memory,
        mfu=MEASURED_MFU if options.mfu is None else options.mfu,
        bandwidth=gpu_bandwidth if options.bandwidth is None else options.bandwidth,
        nodes=options.nodes,
        network=network_bandwidth if options.network is None else options.network,
    )
    for line in plan(recipe, settings, options.num_gpus or recipe.parallel.num_gpus or 1, assumed):
        print(line)
