"""Atomic replacement: whatever a kill, a full disk or another process does, the old or the new content is there."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_adam_mini.tasks import atomic_files
from lightning_adam_mini.tasks.atomic_files import (
    atomic_file,
    put_in_place,
    read_json,
    recover,
    remove,
    replacing,
    sweep,
    temporary_path,
    write_json,
    write_text,
)


def make(path, kind, content="new"):
    if kind == "file":
        path.write_text(content)
    elif kind == "folder":
        path.mkdir()
        (path / "content").write_text(content)
    elif kind == "link":
        make(path.with_name(f"{path.name}-of-link"), "folder", content)
        path.symlink_to(f"{path.name}-of-link")


def content(path):
    return (path / "content" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
@pytest.mark.parametrize("before", ["nothing", "file", "folder", "link"])
def test_anything_takes_the_place_of_anything(tmp_path, kind, before):
    target = tmp_path / "last.ckpt"
    make(target, before, "old")
    make(temporary_path(target), kind)
    put_in_place(temporary_path(target), target)
    assert content(target) == "new"
    assert target.is_symlink() == (kind == "link")
    if before == "link":
        assert content(tmp_path / "last.ckpt-of-link") == "old", "what a link leads to is another checkpoint"
    kept = {"last.ckpt"}
    kept |= {"last.ckpt-of-link"} if before == "link" else set()
    kept |= {f"{temporary_path(target).name}-of-link"} if kind == "link" else set()
    assert {path.name for path in tmp_path.iterdir()} == kept


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("before", ["file", "folder", "link"])
@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_at_any_rename_leaves_the_old_one_or_the_new_one(tmp_path, monkeypatch, kind, before, renames):
    target, left = tmp_path / "last.ckpt", [renames]
    make(target, before, "old")
    make(temporary_path(target), kind)
    real = {name: getattr(Path, name) for name in ("rename", "replace")}

    def rename(name):
        def until_killed(path, to):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return real[name](path, to)

        return until_killed

    with monkeypatch.context() as patch:
        for name in real:
            patch.setattr(Path, name, rename(name))
        try:
            put_in_place(temporary_path(target), target)
        except KeyboardInterrupt:
            pass
        else:
            assert left[0] >= 0, "this pair needs fewer renames"
    assert recover(target), "the checkpoint is lost"
    assert content(target) in ("old", "new")
    sweep(tmp_path)
    assert content(target) in ("old", "new")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_folder_that_is_removed_is_gone_at_once(tmp_path, monkeypatch):
    make(tmp_path / "best.ckpt", "folder")
    monkeypatch.setattr(atomic_files.shutil, "rmtree", lambda *_, **__: None)  # killed before the first file
    remove(tmp_path / "best.ckpt")
    assert not (tmp_path / "best.ckpt").exists()
    monkeypatch.undo()
    sweep(tmp_path)
    assert not list(tmp_path.iterdir())


def test_lightning_finds_no_number_in_what_is_half_written():
    assert "hpc_ckpt_" not in temporary_path(Path("run/hpc_ckpt_3.ckpt")).name


def test_who_looks_for_a_folder_that_is_being_replaced_does_not_disturb(tmp_path, monkeypatch):
    target = tmp_path / "last.ckpt"
    make(target, "folder", "old")
    make(temporary_path(target), "folder")
    real = Path.rename

    def rename(path, to):
        moved = real(path, to)
        if path == target:
            assert recover(target)  # by another process, between the two renames
        return moved

    monkeypatch.setattr(Path, "rename", rename)
    put_in_place(temporary_path(target), target)
    assert content(target) == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("name", ["predictions.jsonl", "report.md", "new/loss_curve.png"])
def test_a_full_disk_is_told_with_the_file_that_was_to_be_written(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("before")
    temporary_path(path).symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"cannot write {path}: No space left on device; free space there"):
        write_text(path, "after")
    assert path.read_text() == "before"
    assert [found.name for found in path.parent.iterdir() if found.is_file()] == [path.name]


def test_a_full_disk_is_told_with_the_file_of_the_cache(tmp_path, monkeypatch):
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode="r", **_: real(Path("/dev/full"), mode.replace("x", "w")))
    told = f"cannot write {tmp_path}/tokens.bin: No space left on device; free space there"
    with pytest.raises(OSError, match=told), atomic_file(tmp_path / "tokens.bin") as file:
        file.write(b"0" * 100_000)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "export"
    with replacing(target) as new:
        make(new, "folder", "old")
    with pytest.raises(ZeroDivisionError), replacing(target) as new:
        make(new, "folder", f"{1 / 0}")
    assert content(target) == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_an_error_about_another_file_is_raised_as_it_is(tmp_path):
    """What a block reads is not what cannot be written."""
    with pytest.raises(FileNotFoundError, match="corpus"), atomic_file(tmp_path / "tokens.bin") as file:
        file.write((tmp_path / "corpus.txt").read_bytes())
    assert not list(tmp_path.iterdir())


def test_processes_on_several_machines_do_not_share_a_temporary_file():
    """They may have the same number, as the first process of a container has."""
    program = (
        "import os, sys; os.getpid = lambda: 1\n"
        "from pathlib import Path\n"
        "from lightning_adam_mini.tasks.atomic_files import temporary_path\n"
        "print(temporary_path(Path('x')))\n"
    )
    run = functools.partial(subprocess.run, [sys.executable, "-c", program], capture_output=True, text=True, check=True)
    names = {run().stdout for _ in range(2)}
    assert len(names) == 2


def test_json_that_is_missing_or_damaged_is_empty(tmp_path):
    path = tmp_path / "new" / "facts.json"
    assert read_json(path) == {}
    write_json(path, {"a": "\ud800 \u00e9"})
    assert read_json(path) == {"a": "\ud800 \u00e9"}
    for text in ("[1]", '{"a": ', ""):
        path.write_text(text)
        assert read_json(path) == {}
