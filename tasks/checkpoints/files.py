"""One file of a checkpoint: saved with a checksum, which is compared before anything in the file is unpickled.

torch saves a zip archive. The comment at its end, which torch leaves empty and skips, holds the CRC-32 of all bytes
before it, headers and padding included. So the checksum goes wherever the file goes, and `torch.load` reads the file
as any other. In archives without one, of other programs, the CRC-32 of each entry is compared.
"""

from __future__ import annotations

import os
import pickle
import re
import struct
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
_NAMED = b"lightning-adam-mini crc32 "
_CHECKSUM_BYTES = 8
_COMMENT = struct.pack("<H", len(_NAMED) + _CHECKSUM_BYTES) + _NAMED
"""The end of an archive without the checksum itself; it begins with its own length, as the format has it."""

_LOCAL_HEADER, _END_OF_DIRECTORY, _END_BYTES = b"PK\x03\x04", b"PK\x05\x06", 22
_AT_ONCE = 2**22


class ChecksummedStream:
    """A binary file that counts what is written to it, and knows why it failed.

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
            OSError: The disk is full, say.
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
        OSError: The disk is full, say.
    """
    stream = ChecksummedStream(file)
    try:
        torch.save(content, stream)
    except RuntimeError as error:
        raise stream.error or error from error
    file.seek(-len(_EMPTY_COMMENT), os.SEEK_CUR)
    file.write(_COMMENT + stream.checksum.encode())


def read_file(path: Path, *, weights_only: bool | None = None, mmap: bool = False) -> Any:
    """What a file of a checkpoint holds, its tensors on the CPU.

    Args:
        path: The file.
        weights_only: As for `torch.load`; only with False, which nothing in this project asks for, may the file run
            code.
        mmap: Leave tensors on the disk until they are used, where the format allows it.

    Raises:
        ValueError: The file is damaged, cut off or no checkpoint, or would run code.
        OSError: It cannot be opened.
    """
    with path.open("rb") as file:
        is_archive = file.read(len(_LOCAL_HEADER)) == _LOCAL_HEADER
        try:
            _verify(file)
        except Exception as error:  # zipfile may raise anything of another archive
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
    """On one line, why something could not be unpickled."""
    if name := _unsafe_class(error):
        return f"it asks for {name}, and to load what no checkpoint needs could run code"
    return error_line(error)


def _unsafe_class(error: BaseException) -> str | None:
    """What an unpickler has refused to load; torch says it with many words."""
    match = re.search(r"(?i)unsupported (?:global|class):? (?:GLOBAL )?([\w.]+)", str(error))
    return match[1] if match else None


def checksum_of(file: IO[bytes], size: int, end: bytes = b"") -> str:
    """CRC-32 of the next `size` bytes of a file and of `end`, eight hexadecimal digits."""
    crc = 0
    while size > 0 and (part := file.read(min(size, _AT_ONCE))):
        crc = zlib.crc32(part, crc)
        size -= len(part)
    return f"{zlib.crc32(end, crc):08x}"


def has_checksum(file: IO[bytes]) -> bool:
    """Whether a file was written by `write_file`, as its end says; it is read on from its end."""
    file.seek(max(file.seek(0, os.SEEK_END) - len(_COMMENT) - _CHECKSUM_BYTES, 0))
    return file.read(len(_COMMENT)) == _COMMENT


def _verify(file: IO[bytes]) -> None:
    """Compare the checksum of a file, or those of its entries.

    Raises:
        ValueError: They differ, or there is none where there should be one.
        zipfile.BadZipFile: The archive is none any more.
    """
    size = os.fstat(file.fileno()).st_size
    if not size:
        raise ValueError("it is empty")
    if has_checksum(file):
        told = file.read()
        file.seek(0)
        if checksum_of(file, size - len(_COMMENT) - _CHECKSUM_BYTES, _EMPTY_COMMENT).encode() != told:
            raise ValueError("its checksum is not the one that it was saved with")
    else:
        file.seek(0)
        verify_zip(file)


def verify_zip(file: IO[bytes]) -> None:
    """Compare the checksums of the entries of an archive that torch has written without one of the whole.

    Args:
        file: The archive, from its first byte to its last; what does not begin as one is left to torch.

    Raises:
        ValueError: An entry differs from its checksum, or the end is missing.
        zipfile.BadZipFile: The archive is none any more.
    """
    if file.read(len(_LOCAL_HEADER)) != _LOCAL_HEADER:
        return
    file.seek(max(file.seek(0, os.SEEK_END) - _END_BYTES, 0))
    end = file.read()
    if not (end.startswith(_END_OF_DIRECTORY) and end.endswith(_EMPTY_COMMENT)):
        raise ValueError("its end is missing")
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.CRC:  # torch can be told to leave them out
                with archive.open(entry) as content:
                    while content.read(_AT_ONCE):
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
        """The class, where it is one of those that were named.

        Raises:
            pickle.UnpicklingError: It is not.
        """
        if (module, name) not in self._classes:
            raise pickle.UnpicklingError(f"unsupported class {module}.{name}")
        return super().find_class(module, name)
