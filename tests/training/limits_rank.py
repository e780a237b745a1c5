"""One rank of two, of which one comes late to a collective; see `test_hang.py`. `python limits_rank.py FOLDER`."""

import datetime
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import save_results

from megazh.training.hang import limit_collectives


def seconds_until_it_fails(group: dist.ProcessGroup | None) -> tuple[float, str]:
    """How long a collective waits for the other rank, and what it raises."""
    begun = time.monotonic()
    try:
        dist.all_reduce(torch.ones(1), group=group)
    except RuntimeError as error:
        return time.monotonic() - begun, str(error)
    return time.monotonic() - begun, ""


if __name__ == "__main__":
    dist.init_process_group("gloo")
    folder, groups = Path(sys.argv[1]), [None, dist.new_group([0, 1]), dist.new_group([0, 1])]
    limit_collectives(datetime.timedelta(seconds=60))
    for group in groups:
        dist.barrier(group)
    limit_collectives(datetime.timedelta(seconds=2))
    done = folder / "done"
    if dist.get_rank() == 0:
        save_results(folder, {"found": [seconds_until_it_fails(group) for group in groups]})
        done.touch()
    else:
        while not done.exists():
            time.sleep(0.05)
        save_results(folder, {})
    sys.stdout.flush()
    os._exit(0)  # the groups are of no use any longer
