"""Functions compiled by numba, kept on disk where there is a place for them, and compiled anew where there is none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba.core.caching import FunctionCache

from megazh.caches import own_folder, warn_not_kept

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(**options: Any) -> Callable[[_Function], _Function]:
    """Decorate a function as `numba.njit(**options)` does, and keep the machine code for the next process.

    numba itself keeps it in `NUMBA_CACHE_DIR`, beside the source or below the home folder, and raises an error at
    import where it can write to none of them. Here it is kept in `own_folder` then or, where that fails as well, not at
    all: the function is compiled in each process, which takes seconds.
    """

    def decorate(function: _Function) -> _Function:
        dispatcher = numba.njit(**options)(function)
        cache = _cache_of(function)
        if cache is not None:
            dispatcher._cache = cache
        return dispatcher

    return decorate


class _Cache(FunctionCache):
    """numba's cache of a function; a full or damaged disk costs the time to compile, and nothing else."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # an unreadable file, or a truncated one, for which pickle raises many types
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception as error:  # pickle raises many types for a damaged index file, which it reads before
            warn_not_kept(Path(self.cache_path), error)


def _cache_of(function: Callable[..., Any]) -> _Cache | None:
    try:
        return _Cache(function)
    except RuntimeError:  # numba has found no folder
        pass
    folder = own_folder("numba")
    if folder is None:
        return None
    config: Any = numba.config
    before, config.CACHE_DIR = config.CACHE_DIR, str(folder)
    try:
        return _Cache(function)
    except RuntimeError:
        return None
    finally:
        config.CACHE_DIR = before
