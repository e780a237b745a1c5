"""The files of a checkpoint, as DeepSpeed writes and reads them: hashed, without code, no exception halfway."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from enum import Enum
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from megazh.training.weights import load_tensors
from megazh.writing import write_all


class _Remembering:
    """A file for `torch.save` that never fails: after the first OSError it only counts what it is given.

    torch turns an exception of a file into a RuntimeError, as it does for much else. This way the OSError is known.
    """

    def __init__(self, path: str, discard: bool) -> None:
        self.size = 0
        self.error: OSError | None = None
        self._digest = hashlib.sha256()
        self._file: FileIO | None = None
        if not discard:
            self._try(lambda: self._open(path))

    def write(self, data: Any) -> int:
        """Append `data`; returns its size in bytes."""
        view = memoryview(data).cast("B")
        self.size += len(view)
        if self._file is not None:
            self._digest.update(view)
            file = self._file
            self._try(lambda: write_all(file, view))
        return len(view)

    def flush(self) -> None:
        """Do nothing: `torch.save` calls it, and `close` flushes."""

    def close(self) -> str:
        """Flush to disk and close; returns the SHA-256 as hex."""
        if self._file is not None:
            file = self._file
            self._try(lambda: os.fsync(file.fileno()))
            self._try(file.close)
        return self._digest.hexdigest()

    def _open(self, path: str) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed by `close`)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            self.error = self.error or error
            if self._file is not None:
                with contextlib.suppress(OSError):
                    self._file.close()
            self._file = None


class SafeCheckpointEngine(TorchCheckpointEngine):
    """Flushes and hashes the files that it writes; reads tensors and plain values only.

    A write that fails raises nothing, so that all ranks come to the end of DeepSpeed's `save_checkpoint`, which has
    collectives in between: it is in `failure`, and later files are only counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.written: list[tuple[str, int, str]] = []
        self.needed = 0
        """Bytes of all files that this rank was to write."""
        self.failure: OSError | None = None
        """The first write of this rank that failed."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        with self.remembered():
            os.makedirs(path, exist_ok=exist_ok)

    def save(self, state_dict: Any, path: str) -> None:
        file: Any = _Remembering(path, discard=self.failure is not None)
        torch.save(_plain(state_dict), file)
        digest = file.close()
        self.needed += file.size
        self.written.append((path, file.size, digest))
        self.failure = self.failure or file.error

    @contextlib.contextmanager
    def remembered(self) -> Iterator[None]:
        """Keep an OSError of the block in `failure` instead of raising it."""
        try:
            yield
        except OSError as error:
            self.failure = self.failure or error

    def load(self, path: str, map_location: Any = None) -> Any:
        return load_tensors(Path(path), map_location, _allowed())


def _allowed() -> list[Any]:
    """DeepSpeed's own types in its files, which are records of numbers."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, fragment_address, set]


def _plain(value: Any) -> Any:
    """Replace members of enumerations by their values: some versions of Python pickle members as function calls."""
    if isinstance(value, Enum):
        return value.value
    if type(value) is dict:
        return {key: _plain(inner) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(inner) for inner in value)
    return value
