"""Build the C kernel with the system's compiler, keep it in a cache folder, and load it through ctypes.

A build is a folder in the cache, named by a hash of all that it depends on: source, flags, compiler version and
processor, since several machines may share a home folder. It holds the library and its checksum, which is compared
before loading: a truncated library could crash the process. A library runs with the user's rights, so none is loaded
that another user may have written.
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

__all__ = ["cache_folder", "library", "unavailable"]

SOURCE = Path(__file__).with_name("adam_mini.c")
"""It includes the headers next to it."""
FLAGS = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")
"""`-ffp-contract=off`: the compiler must not fuse multiplications and additions on its own. Where torch rounds once,
the source calls `fmaf`; everywhere else both round twice. `-fno-math-errno`: square roots need not set `errno`, so they
are vectorized. No `-ffast-math`: it would reorder sums and ignore NaN."""
OPTIONAL_FLAGS = tuple(
    (*processor, *threads)
    for processor in (("-march=native",), ())
    for threads in (("-fopenmp",), ("-fopenmp-simd",), ())
)
"""Flags that some compilers do not know or have no runtime for, best first. `-fopenmp-simd` builds a kernel with one
thread; without it sums are not vectorized."""
TIMEOUT_SECONDS = 300
_LIBRARY, _CHECKSUM, _UNFINISHED = "adam_mini.so", "sha256", ".unfinished"


class _BuildError(Exception):
    """There is no library, for the reason in the message."""


def library() -> ctypes.CDLL | None:
    """The library, compiled on the first call if the cache has none; None if that fails.

    The first call in a process that fails warns with the reason.
    """
    return _library_or_reason()[0]


def unavailable() -> str | None:
    """Why there is no library; None if there is one."""
    return _library_or_reason()[1]


def cache_folder() -> Path:
    """`$LIGHTNING_ADAM_MINI_CACHE`, else `lightning-adam-mini` in `$XDG_CACHE_HOME` or `~/.cache`."""
    own = os.environ.get("LIGHTNING_ADAM_MINI_CACHE")
    try:
        if own:
            return Path(own).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "lightning-adam-mini").expanduser()
    except RuntimeError:  # the user has no home folder: treat it as a read-only one
        return Path(os.devnull, "lightning-adam-mini")


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
    if sys.maxsize < 2**32:
        raise _BuildError("it needs a 64-bit system")
    compiler = _compiler()
    build = cache_folder() / _key(compiler)
    distrust = _distrust(build)
    if distrust:
        warn(
            f"AdamMini does not use its kernel cache, since {distrust}: a library from there could run anything. It "
            "compiles the kernel for this process alone. Set LIGHTNING_ADAM_MINI_CACHE to a folder that only you may "
            "write to.",
            stacklevel=2,
        )
    elif loaded := _load(build):
        return loaded
    with _folder_to_build_in(None if distrust else build) as folder:
        _compile(compiler, folder)
        if not distrust and build.parent == folder.parent:
            _move(folder, build)
        loaded = (None if distrust else _load(build)) or _load(folder)
        if loaded is None:
            raise _BuildError(f"the library that {shlex.join(compiler)} made cannot be loaded")
        return loaded  # it stays in memory when its file is removed


def _distrust(build: Path) -> str | None:
    """Why another user may have written a build; None if only this user can, or if there is none yet."""
    user = os.getuid() if hasattr(os, "getuid") else None
    for path in (build.parent, build, build / _LIBRARY, build / _CHECKSUM):
        for read in (os.lstat, os.stat):  # a link and its target
            try:
                status = read(path)
            except OSError:
                continue
            if user is not None and status.st_uid != user:
                return f"{path} belongs to another user"
            # Many systems give each user a group of their own (umask 002): write access of that group is harmless.
            is_own_group = status.st_gid == status.st_uid != 0
            forbidden = stat.S_IWOTH | (0 if is_own_group else stat.S_IWGRP)
            if user is not None and not stat.S_ISLNK(status.st_mode) and status.st_mode & forbidden:
                return f"others may write to {path}"
    return None


@contextmanager
def _folder_to_build_in(build: Path | None) -> Iterator[Path]:
    """A new folder next to a build, so that renaming it is atomic, or a temporary one; it is removed afterwards."""
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


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left: unfinished builds that no process holds a lock on."""
    for unfinished in folder.glob(f"*{_UNFINISHED}*"):
        with suppress(OSError):
            lock = _lock(unfinished)
            if lock is not None:
                shutil.rmtree(unfinished, ignore_errors=True)
                os.close(lock)


def _lock(folder: Path) -> int | None:
    """A lock on a folder that ends with this process; None if the system has no locks.

    Raises:
        BlockingIOError: Another process holds it.
        OSError: The folder is gone.
    """
    if sys.platform == "win32":
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # some network file systems have no locks
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor


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
            raise _BuildError(f"CC names {named[0]!r}, which is not installed")
        return named
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    raise _BuildError("there is no C compiler (cc, gcc or clang) in PATH")


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
    first_core = {line.partition(":")[0].strip(): line for line in reversed(lines)}
    keys = ("vendor_id", "cpu family", "model", "model name", "flags", "CPU implementer", "CPU part", "Features", "isa")
    return "\n".join([platform.machine(), *(first_core[key] for key in keys if key in first_core)])


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError) as error:
        raise _BuildError(f"{command[0]} does not run: {error}") from error


def _compile(compiler: list[str], folder: Path) -> None:
    """Write the library and its checksum to `folder`."""
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
    """The library in a folder; None if it is missing or differs from what was written."""
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
    """Rename a finished build, which is atomic: other processes see all of it or nothing."""
    for _ in range(2):
        try:
            folder.rename(build)
            return
        except OSError:  # another process was faster, or the build that is there is broken
            if _load(build):
                return
            # Keeps the suffix of unfinished builds, so that it is cleaned up even if this process is killed now.
            broken = folder.with_name(f"{folder.name}.broken")
            try:
                build.rename(broken)
            except OSError:
                continue
            shutil.rmtree(broken, ignore_errors=True)
