"""One checkpoint file: saved with a checksum, which is compared before anything in the file is unpickled.

torch saves a zip archive. Its comment at the end, which torch leaves empty and skips, holds the CRC-32 of all bytes
before it, headers and padding included. So the checksum travels with the file, and `torch.load` reads the file like any
other. In archives of other programs, which have no such checksum, the CRC-32 of each entry is compared.
"""

from __future__ import annotations

import os
import pickle
import re
import struct
import time
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

import torch

from lightning_adam_mini import factory
from lightning_adam_mini.schedule import Schedule

from ..errors import error_line

__all__ = [
    "ChecksummedStream",
    "ExactUnpickler",
    "checksum_of",
    "has_checksum",
    "read_file",
    "reason",
    "verify_zip",
    "write_file",
    "write_to",
]

# Checkpoints hold these in their hyperparameters; torch loads no class that is not named.
torch.serialization.add_safe_globals([getattr(factory, name) for name in factory.__all__] + [Schedule])

_EMPTY_COMMENT = struct.pack("<H", 0)
_LABEL = b"lightning-adam-mini crc32 "
_CHECKSUM_BYTES = 8
_COMMENT = struct.pack("<H", len(_LABEL) + _CHECKSUM_BYTES) + _LABEL
"""The end of an archive without the checksum itself; it begins with its own length, as the format requires."""

_LOCAL_HEADER, _END_OF_DIRECTORY, _END_BYTES = b"PK\x03\x04", b"PK\x05\x06", 22
_CHUNK_BYTES = 2**22

_SETTLED_SECONDS = 2.0
"""A file that changed this recently may change again within the resolution of its time stamp."""

_verified: set[tuple[int, ...]] = set()
"""Device, inode, size and time of files whose checksum this process has compared: a resumed run reads its checkpoint
twice, first the record of its data and then all of it."""


class ChecksummedStream:
    """A binary file that sums up what is written to it, and keeps the error of a failed write.

    torch's writer of archives turns the error of a full disk into one about positions.

    Args:
        file: Open for writing, at its start; it is written once, from start to end.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._crc = 0
        self.size = 0
        self.error: OSError | None = None

    @property
    def checksum(self) -> str:
        """CRC-32 of all that was written, eight hexadecimal digits."""
        return f"{self._crc:08x}"

    def write(self, data: bytes | memoryview) -> int:
        """Write all of `data`.

        Raises:
            OSError: For example, the disk is full.
        """
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self._crc = zlib.crc32(data, self._crc)
        self.size += (written := memoryview(data).nbytes)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def write_file(content: Any, path: Path) -> None:
    """Save with torch and a checksum, and wait for the disk.

    Raises:
        OSError: The disk is full, or the file cannot be written.
    """
    with path.open("wb") as file:
        write_to(content, file)
        file.flush()
        os.fsync(file.fileno())


def write_to(content: Any, file: IO[bytes]) -> None:
    """Save with torch and a checksum to a new file.

    Raises:
        OSError: For example, the disk is full.
    """
    stream = ChecksummedStream(file)
    try:
        torch.save(content, stream)
    except RuntimeError as error:
        raise stream.error or error from error
    file.seek(-len(_EMPTY_COMMENT), os.SEEK_CUR)
    file.write(_COMMENT + stream.checksum.encode())


def read_file(path: Path, *, weights_only: bool | None = None, mmap: bool = False) -> Any:
    """Read a file, its tensors on the CPU.

    Args:
        path: The file.
        weights_only: As for `torch.load`; None is True here. Only with False may the file run code.
        mmap: Leave tensors on the disk until they are used, where the format allows it.

    Raises:
        ValueError: The file is damaged, cut off or no checkpoint, or would run code.
        OSError: It cannot be opened.
    """
    with path.open("rb") as file:
        is_archive = file.read(len(_LOCAL_HEADER)) == _LOCAL_HEADER
        try:
            _verify(file)
        except Exception as error:  # zipfile may raise anything on other bytes
            raise _unreadable(path, error) from error
    try:
        return torch.load(path, mmap=mmap and is_archive, map_location="cpu", weights_only=weights_only is not False)
    except Exception as error:  # unpickling other bytes may raise anything
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: BaseException) -> ValueError:
    what = "the file is damaged, is no checkpoint or was cut off. Use another file of its folder"
    if _unsafe_class(error):
        what = "if you trust it, load it with torch.load(weights_only=False), and save it without that"
    return ValueError(f"cannot read the checkpoint {path}: {reason(error)}; {what}")


def reason(error: BaseException) -> str:
    """Why something could not be unpickled, on one line."""
    if name := _unsafe_class(error):
        return f"it asks for {name}, and to load what no checkpoint needs could run code"
    return error_line(error)


def _unsafe_class(error: BaseException) -> str | None:
    """The class that an unpickler has refused to load; torch's message about it has many lines."""
    match = re.search(r"(?i)unsupported (?:global|class):? (?:GLOBAL )?([\w.]+)", str(error))
    return match[1] if match else None


def checksum_of(file: IO[bytes], size: int, end: bytes = b"") -> str:
    """CRC-32 of the next `size` bytes of a file and of `end`, eight hexadecimal digits."""
    crc = 0
    while size > 0 and (part := file.read(min(size, _CHUNK_BYTES))):
        crc = zlib.crc32(part, crc)
        size -= len(part)
    return f"{zlib.crc32(end, crc):08x}"


def has_checksum(file: IO[bytes]) -> bool:
    """Whether `write_file` has written a file; the position moves to its checksum."""
    file.seek(max(file.seek(0, os.SEEK_END) - len(_COMMENT) - _CHECKSUM_BYTES, 0))
    return file.read(len(_COMMENT)) == _COMMENT


def _verify(file: IO[bytes]) -> None:
    """Compare the checksum of a file, or those of its entries; once a process, unless the file changes.

    Raises:
        ValueError: They differ, or there is none where there should be one.
        zipfile.BadZipFile: It is no archive any more.
    """
    stat = os.fstat(file.fileno())
    identity = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    if identity in _verified:
        return
    if not stat.st_size:
        raise ValueError("it is empty")
    if has_checksum(file):
        saved = file.read()
        file.seek(0)
        if checksum_of(file, stat.st_size - len(_COMMENT) - _CHECKSUM_BYTES, _EMPTY_COMMENT).encode() != saved:
            raise ValueError("its checksum is not the one that it was saved with")
    else:
        file.seek(0)
        verify_zip(file)
    if time.time() - max(stat.st_mtime, stat.st_ctime) > _SETTLED_SECONDS:
        _verified.add(identity)


def verify_zip(file: IO[bytes]) -> None:
    """Compare the checksums of the entries of an archive that torch has written without one of the whole.

    Args:
        file: The archive, from its first byte to its last; anything else is left to torch.

    Raises:
        ValueError: An entry differs from its checksum, or the end is missing.
        zipfile.BadZipFile: It is no archive any more.
    """
    if file.read(len(_LOCAL_HEADER)) != _LOCAL_HEADER:
        return
    file.seek(max(file.seek(0, os.SEEK_END) - _END_BYTES, 0))
    end = file.read()
    if not (end.startswith(_END_OF_DIRECTORY) and end.endswith(_EMPTY_COMMENT)):
        raise ValueError("its end is missing")
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.CRC:  # torch has an option that leaves them out
                with archive.open(entry) as content:
                    while content.read(_CHUNK_BYTES):
                        pass  # zipfile compares at the end of an entry


class ExactUnpickler(pickle.Unpickler):
    """Reads a pickle of named classes, and of no others.

    Args:
        file: The pickle.
        classes: Module and name of each, exactly. A prefix is not enough: a module has all that it imports, and a
            name with dots leads on from there.
        options: Those of `pickle.Unpickler`.
    """

    def __init__(self, file: IO[bytes], classes: Collection[tuple[str, str]], **options: Any) -> None:
        super().__init__(file, **options)
        self._classes = classes

    def find_class(self, module: str, name: str) -> Any:
        """The class, if it is one of `classes`.

        Raises:
            pickle.UnpicklingError: It is not.
        """
        if (module, name) not in self._classes:
            raise pickle.UnpicklingError(f"unsupported class {module}.{name}")
        return super().find_class(module, name)
