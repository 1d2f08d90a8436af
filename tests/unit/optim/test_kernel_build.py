"""The C kernel is compiled once, survives a damaged cache, and gives the reason if it is not available."""

import ctypes
import multiprocessing as mp
import os
import signal
import sys
import time
from warnings import catch_warnings

import pytest
import torch

from lightning_adam_mini.optim.kernels import build, cpu_plan

SOURCE = "int adam_mini_step(void) { return 0; }\n"
needs_compiler = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, a process that has not loaded the library, and a source that compiles quickly."""
    folder = tmp_path / "cache"
    source = tmp_path / "small.c"
    source.write_text(SOURCE)
    monkeypatch.setattr(build, "SOURCE", source)
    monkeypatch.setenv("LIGHTNING_ADAM_MINI_CACHE", str(folder))
    build._library_or_reason.cache_clear()
    yield folder
    build._library_or_reason.cache_clear()


def counted(monkeypatch):
    """The commands that run from now on."""
    commands, run = [], build._run
    monkeypatch.setattr(build, "_run", lambda command: commands.append(command) or run(command))
    return commands


def compilations(commands):
    return [command for command in commands if "-shared" in command]


def script(folder, *lines):
    path = folder / "compiler"
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)
    return str(path)


@needs_compiler
def test_the_second_process_finds_the_library(cache, monkeypatch):
    commands = counted(monkeypatch)
    assert build.library() is not None
    assert len(compilations(commands)) == 1
    build._library_or_reason.cache_clear()
    assert build.library() is not None
    assert len(compilations(commands)) == 1
    assert [path.name for folder in cache.iterdir() for path in sorted(folder.iterdir())] == ["adam_mini.so", "sha256"]


@needs_compiler
@pytest.mark.parametrize("differs", ["source", "flags", "processor", "compiler"])
def test_another_machine_gets_a_library_of_its_own(differs, cache, tmp_path, monkeypatch):
    build.library()
    build._library_or_reason.cache_clear()
    if differs == "source":
        source = tmp_path / "other.c"
        source.write_text(SOURCE + "\n")
        monkeypatch.setattr(build, "SOURCE", source)
    elif differs == "flags":
        monkeypatch.setattr(build, "FLAGS", ("-O2", *build.FLAGS[1:]))
    elif differs == "processor":
        monkeypatch.setattr(build, "_processor", lambda: "another one")
    else:
        (compiler,) = build._compiler()
        monkeypatch.setenv("CC", script(tmp_path, f'[ "$1" = --version ] && echo newer || exec {compiler} "$@"'))
    assert build.library() is not None
    assert len(list(cache.iterdir())) == 2


def build_at_once(barrier):
    barrier.wait(30)
    sys.exit(build.library() is None)


@needs_compiler
def test_two_processes_at_once(cache):
    context = mp.get_context("fork")
    barrier = context.Barrier(2)
    processes = [context.Process(target=build_at_once, args=(barrier,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    (folder,) = cache.iterdir()
    assert build._load(folder) is not None


@needs_compiler
def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    """A file in its place: a mode would not stop root."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIGHTNING_ADAM_MINI_CACHE", str(tmp_path / "file"))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    assert build.library() is not None
    assert not list(temporary.iterdir())


@needs_compiler
@pytest.mark.parametrize("damage", ["truncated", "emptied", "without its checksum", "another library"])
def test_a_broken_library_is_built_again(damage, cache, monkeypatch):
    build.library()
    (folder,) = cache.iterdir()
    path = folder / "adam_mini.so"
    content = path.read_bytes()
    path.unlink()  # the one that is loaded keeps its file
    path.write_bytes({"truncated": content[: len(content) // 2], "emptied": b""}.get(damage, content))
    if damage == "without its checksum":
        (folder / "sha256").unlink()
    elif damage == "another library":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    build._library_or_reason.cache_clear()
    commands = counted(monkeypatch)
    assert build.library() is not None
    assert len(compilations(commands)) == 1
    assert list(cache.iterdir()) == [folder]
    assert build._load(folder) is not None


@needs_compiler
def test_flags_that_a_compiler_does_not_know_are_omitted(tmp_path, monkeypatch):
    (compiler,) = build._compiler()
    refuse = 'case "$*" in *-fopenmp*|*-march*) echo no such option; exit 1;; esac'
    monkeypatch.setenv("CC", script(tmp_path, refuse, f'exec {compiler} "$@"'))
    commands = counted(monkeypatch)
    assert build.library() is not None
    assert len(compilations(commands)) == len(build.OPTIONAL_FLAGS)


def warnings_of(function):
    with catch_warnings(record=True, action="always") as caught:
        function()
    return [str(warning.message) for warning in caught]


def test_a_compiler_that_fails_warns_once(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", script(tmp_path, "echo first line", "echo the last line >&2", "exit 1"))
    (message,) = warnings_of(build.library)
    assert "the last line" in message
    assert "first line" not in message
    assert "implementation='foreach'" in message
    assert not warnings_of(build.library)
    assert build.library() is None
    assert "could not compile" in build.unavailable()
    assert not list(cache.iterdir())


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    (message,) = warnings_of(build.unavailable)
    assert "no C compiler" in message
    assert not warnings_of(build.library)


def test_a_compiler_that_is_not_installed(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    (message,) = warnings_of(build.library)
    assert "CC names 'no-such-compiler'" in message


@pytest.mark.parametrize("command", ["gcc 'x", 'cc "', "cc \\"])
def test_a_compiler_that_is_no_command(command, monkeypatch):
    monkeypatch.setenv("CC", command)
    (message,) = warnings_of(build.library)
    assert f"CC is {command!r}, which is no command" in message
    assert "implementation='foreach'" in message


def planted(folder):
    """Change a library in the cache and its checksum, as anybody who may write there can."""
    (path,) = folder.glob("*/adam_mini.so")
    content = path.read_bytes() + b"planted"
    path.unlink()  # the one that is loaded keeps its file
    path.write_bytes(content)
    path.with_name("sha256").write_text(build._checksum(path))
    return path


def everybody(path):
    path.chmod(path.stat().st_mode | 0o002)


def the_group(path):
    if os.getgid() != 0:
        pytest.skip("the group is this user's own")
    path.chmod(path.stat().st_mode | 0o020)


def another_user(path):
    try:
        os.chown(path, 12345, -1)
    except PermissionError:
        pytest.skip("only root may change the owner of a file")


def a_link(path):
    """To a file of another user."""
    elsewhere = path.with_name("elsewhere")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    another_user(elsewhere)


@needs_compiler
@pytest.mark.parametrize(
    ("part", "of_others"),
    [
        ("cache", everybody),
        ("cache", another_user),
        ("build", the_group),
        ("build", a_link),
        ("library", everybody),
        ("library", a_link),
        ("checksum", another_user),
    ],
)
def test_a_library_that_others_may_have_written_is_not_loaded(part, of_others, cache, tmp_path, monkeypatch):
    build.library()
    library = planted(cache)
    parts = {"cache": cache, "build": library.parent, "library": library, "checksum": library.with_name("sha256")}
    of_others(parts[part])
    build._library_or_reason.cache_clear()
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    loaded = []
    monkeypatch.setattr(ctypes, "CDLL", lambda path, cdll=ctypes.CDLL: loaded.append(path) or cdll(path))
    (message,) = warnings_of(build.library)
    assert "does not use its kernel cache" in message
    assert "LIGHTNING_ADAM_MINI_CACHE" in message
    assert not warnings_of(build.library)
    assert build.library() is not None
    assert loaded
    assert all(path.startswith(str(temporary)) for path in loaded)
    assert not list(temporary.iterdir())


@needs_compiler
def test_nothing_is_left_in_a_cache_that_others_may_write_to(tmp_path, monkeypatch):
    """Not even where it is the folder of temporary files, in which the kernel is built then."""
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    everybody(open_to_all)
    monkeypatch.setattr("tempfile.tempdir", str(open_to_all))
    monkeypatch.setenv("LIGHTNING_ADAM_MINI_CACHE", str(open_to_all))
    (message,) = warnings_of(build.library)
    assert "others may write to" in message
    assert not list(open_to_all.iterdir())


@needs_compiler
def test_a_cache_of_ones_own_is_used_without_a_warning(cache, monkeypatch):
    old = os.umask(0o002)  # as where each user has a group
    try:
        assert not warnings_of(build.library)
        build._library_or_reason.cache_clear()
        commands = counted(monkeypatch)
        assert not warnings_of(build.library)
    finally:
        os.umask(old)
    assert not compilations(commands)


@needs_compiler
@pytest.mark.parametrize("variable", ["LIGHTNING_ADAM_MINI_CACHE", "XDG_CACHE_HOME"])
def test_a_tilde_in_the_path_of_the_cache(variable, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LIGHTNING_ADAM_MINI_CACHE")
    monkeypatch.setenv(variable, "~/own")
    build.library()
    assert list((tmp_path / "home" / "own").rglob("adam_mini.so"))
    assert not (tmp_path / "~").exists()


def build_slowly(compiler):
    os.environ["CC"] = compiler
    build.library()


@needs_compiler
def test_what_a_killed_build_left_is_removed(cache, tmp_path, monkeypatch):
    """By the next build, but not while the other one is running."""
    (compiler,) = build._compiler()
    slow = script(tmp_path, f'[ "$1" = --version ] && exec {compiler} --version', "sleep 5")
    process = mp.get_context("fork").Process(target=build_slowly, args=(slow,))
    process.start()
    deadline = time.monotonic() + 30
    while not list(cache.glob("*.unfinished")) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    (unfinished,) = cache.glob("*.unfinished")
    build.library()
    assert unfinished.exists()
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    build._library_or_reason.cache_clear()
    monkeypatch.setattr(build, "_processor", lambda: "another one")
    build.library()
    assert not unfinished.exists()
    assert all((folder / "sha256").exists() for folder in cache.iterdir())


def test_a_compiler_that_makes_no_library(tmp_path, monkeypatch):
    write_nothing = ('for word; do [ "$before" = -o ] && echo > "$word"', "before=$word; done", "true")
    monkeypatch.setenv("CC", script(tmp_path, *write_nothing))
    (message,) = warnings_of(build.library)
    assert "cannot be loaded" in message


def test_a_fork_of_a_process_with_threads_takes_one(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(cpu_plan, "_most_threads", {"parent": 1, "process": 1})
    assert cpu_plan._num_threads() == 2
    cpu_plan._after_fork()
    assert cpu_plan._num_threads() == 1


def test_a_fork_of_a_process_with_one_thread_takes_what_torch_has(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(cpu_plan, "_most_threads", {"parent": 1, "process": 1})
    cpu_plan._num_threads()
    cpu_plan._after_fork()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert cpu_plan._num_threads() == 2
