"""The C kernel as a library: compiled once by the system's compiler, kept in a cache folder, loaded through ctypes.

A build is a folder of the cache that is named after all that it depends on: the source, the flags, the compiler's
version and the processor, since a home folder may serve several machines. It holds the library and its checksum, which
is compared before the library is loaded: a truncated one could end the process. A library runs as this user, so none is
loaded that another one may have written.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from warnings import warn

if sys.platform != "win32":
    import fcntl

__all__ = ["library", "unavailable"]

SOURCE = Path(__file__).with_name("adam_mini.c")
"""It includes the headers beside it."""
FLAGS = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")
"""Without contraction, elements are rounded as torch rounds them; without `errno`, roots are vectors."""
OPTIONAL_FLAGS = tuple(
    (*processor, *threads)
    for processor in (("-march=native",), ())
    for threads in (("-fopenmp",), ("-fopenmp-simd",), ())
)
"""What not every compiler knows or has libraries for, in this order: with `-fopenmp-simd` a step takes one thread,
and without it sums are no vectors."""
TIMEOUT_SECONDS = 300
_LIBRARY, _CHECKSUM, _UNFINISHED = "adam_mini.so", "sha256", ".unfinished"


class _BuildError(Exception):
    """There is no library, for the reason that it says."""


def library() -> ctypes.CDLL | None:
    """The library, compiled at the first call if the cache has none; None where it cannot be had.

    The first call in a process that gets none warns with the reason.
    """
    return _library_or_reason()[0]


def unavailable() -> str | None:
    """Why there is no library; None if there is one."""
    return _library_or_reason()[1]


@cache
def _library_or_reason() -> tuple[ctypes.CDLL | None, str | None]:
    try:
        return _find_or_build(), None
    except _BuildError as error:
        warn(
            f"AdamMini has no kernel for the CPU and takes slower steps: {error}. Set CC to a C compiler that works, "
            "or choose implementation='foreach'.",
            stacklevel=2,
        )
        return None, str(error)


def _find_or_build() -> ctypes.CDLL:
    build: Path | None
    if sys.maxsize < 2**32:
        raise _BuildError("it needs a 64-bit system")
    compiler = _compiler()
    build = _cache_folder() / _key(compiler)
    if distrust := _distrust(build):
        warn(
            f"AdamMini does not use its kernel cache, since {distrust}: a library from there could run anything. It "
            "compiles the kernel for this process alone. Set LIGHTNING_ADAM_MINI_CACHE to a folder that only you may "
            "write to.",
            stacklevel=2,
        )
        build = None
    elif loaded := _load(build):
        return loaded
    with _folder_to_build_in(build) as folder:
        _compile(compiler, folder)
        if build is not None and build.parent == folder.parent:
            _move(folder, build)
        loaded = (_load(build) if build is not None else None) or _load(folder)
        if loaded is None:
            raise _BuildError(f"the library that {shlex.join(compiler)} made cannot be loaded")
        return loaded  # it stays in memory without its file


def _distrust(build: Path) -> str | None:
    """Why others may have written a build; None if only this user can, or there is nothing yet."""
    user = os.getuid() if hasattr(os, "getuid") else None
    for path in (build.parent, build, build / _LIBRARY, build / _CHECKSUM):
        for read in (os.lstat, os.stat):  # a link and what it leads to
            try:
                status = read(path)
            except OSError:
                continue
            if user is not None and status.st_uid != user:
                return f"{path} belongs to another user"
            # Where each user has a group of their own, what that group may write only they may.
            is_own_group = status.st_gid == status.st_uid != 0
            forbidden = stat.S_IWOTH | (0 if is_own_group else stat.S_IWGRP)
            if user is not None and not stat.S_ISLNK(status.st_mode) and status.st_mode & forbidden:
                return f"others may write to {path}"
    return None


@contextmanager
def _folder_to_build_in(build: Path | None) -> Iterator[Path]:
    """A folder beside a build, or a temporary one where there can be none: for this process, and gone after it."""
    lock = None
    try:
        if build is None:
            raise PermissionError
        build.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_leftovers(build.parent)
        folder = Path(tempfile.mkdtemp(prefix=f"{build.name}.", suffix=_UNFINISHED, dir=build.parent))
        lock = _lock(folder)
    except OSError:  # as in a read-only home
        folder = _temporary_folder()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _remove_leftovers(cache_folder: Path) -> None:
    """Remove what processes left that were killed: folders that none of them holds a lock on any more."""
    for folder in cache_folder.glob(f"*{_UNFINISHED}*"):
        with suppress(OSError):
            lock = _lock(folder)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def _lock(folder: Path) -> int | None:
    """A lock on a folder that ends with this process; None where the system has none.

    Raises:
        BlockingIOError: Another process has it.
        OSError: The folder is gone.
    """
    if sys.platform == "win32":
        return None
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # some network file systems have no locks
        os.close(opened)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return opened


def _temporary_folder() -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix="lightning-adam-mini."))
    except OSError as error:
        raise _BuildError(f"neither the cache nor a temporary folder can be written: {error}") from error


def _compiler() -> list[str]:
    """The command of the C compiler: `CC`, or the first of the usual names."""
    try:
        named = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise _BuildError(f"CC is {os.environ['CC']!r}, which is no command ({str(error).lower()})") from error
    if named:
        if shutil.which(named[0]) is None:
            raise _BuildError(f"CC names {named[0]!r}, which is not there")
        return named
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    raise _BuildError("there is no C compiler (cc, gcc or clang) in PATH")


def _cache_folder() -> Path:
    own = os.environ.get("LIGHTNING_ADAM_MINI_CACHE")
    try:
        if own:
            return Path(own).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "lightning-adam-mini").expanduser()
    except RuntimeError:  # nobody's home: as for a read-only one
        return Path(os.devnull, "lightning-adam-mini")


def _key(compiler: list[str]) -> str:
    """A hash of all that the library depends on."""
    version = _run([*compiler, "--version"])
    sources = [path.read_text() for path in (SOURCE, *sorted(SOURCE.parent.glob("*.h")))]
    parts = [*sources, repr((FLAGS, OPTIONAL_FLAGS)), shlex.join(compiler), version.stdout, _processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.platform()} {platform.processor()}"
    told = {line.partition(":")[0].strip(): line for line in reversed(lines)}  # of the first core
    keys = ("vendor_id", "cpu family", "model", "model name", "flags", "CPU implementer", "CPU part", "Features", "isa")
    return "\n".join([platform.machine(), *(told[key] for key in keys if key in told)])


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError) as error:
        raise _BuildError(f"{command[0]} does not run: {error}") from error


def _compile(compiler: list[str], folder: Path) -> None:
    """Leave the library and its checksum in `folder`."""
    target = folder / _LIBRARY
    for optional in OPTIONAL_FLAGS:
        done = _run([*compiler, *FLAGS, *optional, str(SOURCE), "-o", str(target), "-lm"])
        if done.returncode == 0 and target.is_file():
            (folder / _CHECKSUM).write_text(_checksum(target))
            target.chmod(0o700)
            (folder / _CHECKSUM).chmod(0o600)
            return
    lines = (done.stdout + done.stderr).strip().splitlines() or [f"exit status {done.returncode} without a message"]
    raise _BuildError(f"{shlex.join(compiler)} could not compile it: {lines[-1]}")


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _load(build: Path) -> ctypes.CDLL | None:
    """The library in a folder; None if it is not there or not what was written."""
    try:
        if _checksum(build / _LIBRARY) != (build / _CHECKSUM).read_text():
            return None
        loaded = ctypes.CDLL(str(build / _LIBRARY))
        step = loaded.adam_mini_step
    except (OSError, AttributeError, UnicodeDecodeError):
        return None
    step.argtypes = [ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_double] * 5, *[ctypes.c_int] * 2]
    step.restype = ctypes.c_int
    return loaded


def _move(folder: Path, build: Path) -> None:
    """Give a finished build its name: at once, so that other processes see all of it or nothing."""
    for _ in range(2):
        try:
            folder.rename(build)
            return
        except OSError:  # another process was quicker; or what is there is broken
            if _load(build):
                return
            broken = folder.with_name(f"{folder.name}.broken")  # a leftover too, if this process is killed now
            try:
                build.rename(broken)
            except OSError:
                continue
            shutil.rmtree(broken, ignore_errors=True)
