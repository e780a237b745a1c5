"""Compressed files as streams of bytes."""

import bz2
import lzma
import zlib
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from megazh.errors import DataError

_INPUT = 1 << 18
_PROGRAMS = {"gzip": "gzip", "zstd": "zstd", "bz2": "bzip2", "xz": "xz"}
_UNPACK_ERRORS = (OSError, ValueError, EOFError, zlib.error, lzma.LZMAError)


class Stream(Protocol):
    """Bytes that are read from the beginning to the end."""

    def read(self, size: int, /) -> bytes:
        """At least one and about `size` more bytes; b"" at the end. Raises DataError if the file is damaged."""
        ...

    def tell(self) -> int:
        """Number of bytes of the file that were read so far."""
        ...


def open_bytes(path: Path, compression: str | None) -> Stream:
    """The bytes of a file, decompressed."""
    if compression is None:
        return open(path, "rb")
    return _Zstd(path) if compression == "zstd" else _Unpacked(path, compression)


def for_pyarrow(path: Path) -> str | BinaryIO:
    """A path as pyarrow takes it; the open file if its name is not UTF-8 (as one in GBK), which pyarrow cannot open."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return open(path, "rb")
    return str(path)


class _Gunzip:
    """`zlib` with the methods of the decompressors of `bz2` and `lzma`."""

    def __init__(self) -> None:
        self._object = zlib.decompressobj(31)
        self._rest = b""

    def decompress(self, data: bytes, max_length: int) -> bytes:
        found = self._object.decompress(self._rest + data, max_length)
        self._rest = self._object.unconsumed_tail
        return found

    @property
    def needs_input(self) -> bool:
        return not self._rest

    @property
    def eof(self) -> bool:
        return self._object.eof

    @property
    def unused_data(self) -> bytes:
        return self._object.unused_data


_UNPACKERS: dict[str, Any] = {
    "gzip": _Gunzip,
    "bz2": bz2.BZ2Decompressor,
    "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
}


class _Unpacked:
    """A gzip, bz2 or xz file of one or more members, with zero bytes between and after them if there are any."""

    def __init__(self, path: Path, compression: str) -> None:
        self._path, self._compression = path, compression
        self._file = open(path, "rb")  # noqa: SIM115 (closed when the stream is dropped)
        self._member = _UNPACKERS[compression]()

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int) -> bytes:
        try:
            return self._read(size)
        except _UNPACK_ERRORS as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise damaged_compression(self._path, self._compression, self.tell(), str(error)) from None

    def _read(self, size: int) -> bytes:
        while True:
            if self._member.eof:
                rest = self._member.unused_data.lstrip(b"\0")
                while not rest and (block := self._file.read(_INPUT)):
                    rest = block.lstrip(b"\0")
                if not rest:
                    return b""
                self._member = _UNPACKERS[self._compression]()
            else:
                rest = self._file.read(_INPUT) if self._member.needs_input else b""
                if not rest and self._member.needs_input:
                    found = self._member.decompress(b"", size)
                    if not found and not self._member.eof:
                        raise EOFError("it ends too early")
                    if found:
                        return found
                    continue
            if found := self._member.decompress(rest, size):
                return found


class _Zstd:
    """A zstd file of one or more frames."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self._path = path
        named = for_pyarrow(path)
        self._file = pa.OSFile(named) if isinstance(named, str) else pa.PythonFile(named, "r")
        self._stream = pa.CompressedInputStream(self._file, "zstd")

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int) -> bytes:
        import pyarrow as pa

        try:
            return self._stream.read(size)
        except (pa.ArrowException, OSError, ValueError, SystemError) as error:
            why = " ".join(str(error).split())
            if "too much memory" in why:
                name = self._path.name
                raise DataError(
                    f"{self._path}: compressed with a window above 128 MiB (zstd --long), which is not read; compress "
                    f"it again: zstd -dc --long=31 {name} | zstd -o new-{name}"
                ) from None
            raise damaged_compression(self._path, "zstd", self.tell(), why) from None


def damaged_compression(path: Path, compression: str, position: int, why: str) -> DataError:
    """One-line error for a compressed file that breaks off or has other bytes inside."""
    return DataError(
        f"{path}: truncated or damaged {compression} file, near byte {position:,} of {path.stat().st_size:,}: {why}; "
        f"fetch it again, or keep what can be read: {_PROGRAMS[compression]} -dc {path.name} > {path.stem}"
    )
