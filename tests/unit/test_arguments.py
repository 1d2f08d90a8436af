"""What the commands' options have in common."""

import argparse

import pytest
import torch

from lightning_adam_mini.cli.arguments import Parser, cpu_threads, make_folder


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80GB", 80_000_000_000),
        ("80 gib", 80 * 2**30),
        ("1.5MiB", 3 * 2**19),
        (".5GB", 500_000_000),
        ("2.tb", 2_000_000_000_000),
        ("1TiB", 2**40),
        (" 7 ", 7),
        ("7B", 7),
    ],
)
def test_memory(text, size):
    assert Parser().memory(text, least=1) == size


@pytest.mark.parametrize("text", ["", "much", "80 apples", "GB", ".", "1.2.3GB", "-1GB", "1e9", "9" * 400, "nan"])
def test_what_is_no_memory(text):
    with pytest.raises(argparse.ArgumentError, match=r"--memory .*give a number with a unit, such as 80GB"):
        Parser().memory(text, least=0)


def test_no_memory_is_for_those_who_can_do_without():
    assert Parser().memory("0", least=0) == 0
    with pytest.raises(argparse.ArgumentError, match=r"--memory 0\.4: more than nothing"):
        Parser().memory("0.4", least=1)


def test_threads_are_of_the_command_alone():
    before = torch.get_num_threads()
    with cpu_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with cpu_threads(None):
        assert torch.get_num_threads() == before


def test_threads_are_given_back_after_an_error():
    before = torch.get_num_threads()

    def fail():
        with cpu_threads(before + 1):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.get_num_threads() == before


def test_a_folder_is_made_and_tried(tmp_path, monkeypatch):
    make_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        make_folder(tmp_path / "file" / "below")

    def refuse(*args, **kwargs):
        raise PermissionError("read-only")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(OSError, match="read-only"):
        make_folder(tmp_path / "a")
