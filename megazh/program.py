"""How this user starts megazh, and programs installed with it: by name, or by what works where PATH lacks the name."""

import os
import shlex
import shutil
import sys
from pathlib import Path


def program(script: str = "megazh", module: str = "megazh") -> str:
    """The first words of a command, for messages that name one: they work when pasted into a shell.

    That is `megazh` if PATH has the script that was installed with this Python; its path, if PATH does not lead there;
    else `python -m megazh` with the name or the path of this Python, and PYTHONPATH where only that leads to megazh.

    Args:
        script: name of the program.
        module: the module that runs it.
    """
    folder, root = Path(sys.executable).parent, Path(__file__).parents[1]
    paths = os.environ.get("PYTHONPATH", "")
    by_path = str(root) in paths.split(os.pathsep)
    if (folder / script).is_file() and not by_path:
        return _named(script, folder)
    variable = f"PYTHONPATH={shlex.quote(paths)} " if by_path and Path.cwd() != root else ""
    return f"{variable}{_named(Path(sys.executable).name, folder)} -m {module}"


def runnable(text: str) -> str:
    """A message, with the commands of megazh that it quotes ('megazh plan NAME') as this user can run them."""
    return text.replace("'megazh ", f"'{program()} ")


def _named(name: str, folder: Path) -> str:
    """The name of a program in `folder` if PATH leads there, else its path, relative if it is below this folder."""
    found = shutil.which(name)
    if found and os.path.realpath(os.path.dirname(found)) == os.path.realpath(folder):
        return name
    path, here = folder / name, Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))
