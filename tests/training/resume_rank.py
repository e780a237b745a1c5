"""One rank of those that agree on a checkpoint; see `test_resume.py`.

`python resume_rank.py FOLDER CASE...`: rank N sees FOLDER/CASE/host_N/checkpoints, as a host of its own would.
"""

import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch.distributed as dist
from ranks import save_results

from megazh.errors import MegazhError
from megazh.training.resume import agree_on_checkpoint


def agree(folder: Path) -> dict[str, Any]:
    """What this rank takes for the newest checkpoint, or its error."""
    late = folder / "late"
    if late.exists() and dist.get_rank() == 1:
        target = folder / "step_00000003"
        threading.Timer(1.0, lambda: os.rename(late, target)).start()
    try:
        path, manifest = agree_on_checkpoint(folder, "this-run", seconds=2.5)
    except MegazhError as error:
        return {"error": str(error), "type": type(error).__name__}
    return {"name": path and path.name, "step": manifest and manifest.step}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    here = Path(sys.argv[1])
    found = {case: agree(here / case / f"host_{dist.get_rank()}" / "checkpoints") for case in sys.argv[2:]}
    save_results(here, found)
    dist.barrier()
    dist.destroy_process_group()
