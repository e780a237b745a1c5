"""One rank of those that agree on a checkpoint; see `test_resume_choice.py`.

`python resume_rank.py FOLDER CASE...`: rank N sees FOLDER/CASE/host_N/checkpoints, as a host of its own would. A file
`named` in CASE holds the checkpoint that the recipe names, a file `only` the step that counts.
"""

import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch.distributed as dist
from ranks import save_results

from megazh.errors import MegazhError
from megazh.training.resume import agree_on_checkpoint, agree_on_initial


def agree(case: Path) -> dict[str, Any]:
    """What this rank takes for the checkpoint to go on from, or its error; and the lines that it prints."""
    folder = case / f"host_{dist.get_rank()}" / "checkpoints"
    late = folder / "late"
    if late.exists() and dist.get_rank() == 1:
        target = folder / "step_00000003"
        threading.Timer(1.0, lambda: os.rename(late, target)).start()
    named = (case / "named").read_text() if (case / "named").exists() else None
    only = int((case / "only").read_text()) if (case / "only").exists() else None
    lines: list[str] = []
    try:
        found = agree_on_checkpoint(folder, "this-run", lines.append, named, seconds=2.5, only=only)
        if found is None and (case / "initial").exists():
            found = agree_on_initial(Path((case / "initial").read_text()), seconds=2.5)
    except MegazhError as error:
        return {"error": str(error), "type": type(error).__name__, "lines": lines}
    return {"name": found and found[0].name, "step": found and found[1].step, "lines": lines}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    here = Path(sys.argv[1])
    found = {case: agree(here / case) for case in sys.argv[2:]}
    save_results(here, found)
    dist.barrier()
    dist.destroy_process_group()
