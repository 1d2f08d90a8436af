"""What the commands' options have in common."""

import argparse
from pathlib import Path

import pytest
import torch

from lightning_adam_mini.cli.arguments import Parser, check_place, cpu_threads, make_folder
from lightning_adam_mini.cli.main import main
from tiny_runs import error_line, write_recipe


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


def test_a_place_is_tried_and_left_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "a" / "b", tmp_path / "file", Path("relative")):
        check_place(place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(ValueError, match=r"--out .*file/below: .*file cannot be written to"):
        check_place(tmp_path / "file" / "below")
    with pytest.raises(ValueError, match=r"--out /proc/x: /proc cannot be written to"):
        check_place(Path("/proc/x"))

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(ValueError, match=r"cannot be written to \(Permission denied\); choose another place"):
        check_place(tmp_path / "new")


GPT2 = '{"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 10}'
COMMANDS = {
    "bench": ["bench", "--hf", GPT2, "--out"],
    "bench throughput": ["bench", "throughput", "--hf", GPT2, "--memory", "1GB", "--out"],
    "hessian": ["hessian", "js", "tiny.yaml", "--out"],
    "study": ["study", "three_block_quadratic", "--out"],
    "export": ["export", "run", "--out"],
    "convert": ["convert", "run.ckpt", "--out"],
    "compare": ["compare", "tiny.yaml", "--lr", "1e-3", "--out"],
    "compare --dry-run": ["compare", "tiny.yaml", "--lr", "1e-3", "--dry-run", "--out"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_tries_its_place_before_the_work(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("model: x\n", "utf-8")
    (tmp_path / "run.ckpt").touch()

    def work(*args, **kwargs):
        raise AssertionError("it begins to work")

    for place in ("application.Application", "bench.steps.run", "bench.throughput.run", "compare.command.first_error"):
        monkeypatch.setattr(f"lightning_adam_mini.cli.{place}", work)
    for out in ("run.ckpt/below", "/proc/x"):
        assert main([*COMMANDS[command], out]) in (1, 2)
        line = error_line(capsys)
        assert out.partition("/")[0] in line
        assert "cannot be written" in line or "is a file" in line or "No such file" in line, line
