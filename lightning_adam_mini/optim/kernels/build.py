"""The C kernel as a library: compiled once by the system's compiler, kept in a cache folder, loaded through ctypes.

A build is a folder of the cache that is named after all that it depends on: the source, the flags, the compiler's
version and the processor, since a home folder may serve several machines. It holds the library and its checksum, which
is compared before the library is loaded: a truncated one could end the process.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from warnings import warn

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
_LIBRARY, _CHECKSUM = "adam_mini.so", "sha256"


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
    if sys.maxsize < 2**32:
        raise _BuildError("it needs a 64-bit system")
    compiler = _compiler()
    build = _cache_folder() / _key(compiler)
    if loaded := _load(build):
        return loaded
    try:
        build.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{build.name}.", dir=build.parent))
    except OSError:  # a read-only home: build for this process alone
        folder = build = _temporary_folder()
    try:
        _compile(compiler, folder)
        if folder != build:
            _move(folder, build)
        loaded = _load(build) or _load(folder)
        if loaded is None:
            raise _BuildError(f"the library that {shlex.join(compiler)} made cannot be loaded")
        return loaded
    finally:  # a library that is loaded stays in memory without its file
        shutil.rmtree(folder, ignore_errors=True)


def _temporary_folder() -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix="lightning-adam-mini."))
    except OSError as error:
        raise _BuildError(f"neither the cache nor a temporary folder can be written: {error}") from error


def _compiler() -> list[str]:
    """The command of the C compiler: `CC`, or the first of the usual names."""
    if named := shlex.split(os.environ.get("CC", "")):
        if shutil.which(named[0]) is None:
            raise _BuildError(f"CC names {named[0]!r}, which is not there")
        return named
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    raise _BuildError("there is no C compiler (cc, gcc or clang) in PATH")


def _cache_folder() -> Path:
    if own := os.environ.get("LIGHTNING_ADAM_MINI_CACHE"):
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "lightning-adam-mini")
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
            broken = folder.with_name(f"{folder.name}.broken")
            try:
                build.rename(broken)
            except OSError:
                continue
            shutil.rmtree(broken, ignore_errors=True)
