"""What the fake packages of trackers have in common: a file of their calls, and faults on request."""

import json
import os
import time
from pathlib import Path
from typing import Any


def called(name: str, /, **values: Any) -> None:
    """Note a call in the file that FAKE_CALLS names, or fail as FAKE_FAULT says: `raise NAME` or `hang NAME`."""
    fault = os.environ.get("FAKE_FAULT", "")
    if fault == f"raise {name}":
        raise ConnectionError(f"no route\nto host ({name})")
    if fault == f"hang {name}":
        time.sleep(60)
    print(f"noise of {name}")
    with Path(os.environ["FAKE_CALLS"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"call": name, **values}, default=str) + "\n")
