"""Every command that the README and the pages of `docs/` show can be typed as it stands."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest

from checkout import PACKAGE, ROOT
from shell_blocks import TRAINER_SUBCOMMANDS, Command, commands_in, documented_commands

ADAM_MINI = [command for command in documented_commands("adam-mini") if command.is_complete]
MAKE = [command for command in documented_commands("make") if command.is_complete]
TRAINING = [command for command in ADAM_MINI if command.words[1:2] and command.words[1] in TRAINER_SUBCOMMANDS]
OTHER = [command for command in ADAM_MINI if command not in TRAINING]
# What one machine of the CI cannot offer, or an earlier run left behind.
NEEDS_MORE = re.compile(
    r"num_nodes|gpu|cuda|fsdp|ModelParallel|ckpt_path|devices[ =](?:[2-9]|auto)|init_from|export runs|convert runs|"
    r"imagenet|celeba|arxiv|cora|fashion|cifar|DIR\b|FOLDER"
)
# The last of two equal options counts.
SMALLER = {
    "spectrum": ["--steps", "3", "--probes", "1", "--batches", "1"],
    "js": ["--steps", "3", "--probes", "1", "--batches", "1"],
    "exact": [],
    "moments": ["--steps", "3", "--from-step", "1", "--every", "1"],
    "hessian": ["--columns", "2", "--batches", "1"],
}


def call(words: list[str], monkeypatch) -> int:
    """Run `adam-mini` in this process, which has imported what takes the time, and return its exit status."""
    from lightning_adam_mini.cli.main import main

    monkeypatch.setattr(sys, "argv", ["adam-mini", *words])
    try:
        status = main()
    except SystemExit as stopped:
        status = stopped.code
    return status if isinstance(status, int) else int(status is not None)


def find_unknown_flags(words: list[str], help_text: str) -> list[str]:
    """The flags among the words of a command that its help does not list."""
    known = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w.+-]*", help_text))
    flags = [word.split("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)]
    return [flag for flag in flags if flag not in known]


@pytest.mark.parametrize("command", TRAINING, ids=str)
def test_documented_trainings_parse(command: Command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT / command.folder)
    subcommand, *options = command.words[1:]
    status = call([subcommand, *options, "--print_config"], monkeypatch)
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert "trainer:" in printed.out


@pytest.mark.parametrize("command", OTHER, ids=str)
def test_other_documented_commands_know_their_flags(command: Command, monkeypatch, capsys):
    words = list(command.words[1:])
    # `hessian` has commands of its own, whose options differ.
    subcommand = [word for word in words[: 2 if words[:1] == ["hessian"] else 1] if not word.startswith("-")]
    status = call([*subcommand, "--help"], monkeypatch)
    printed = capsys.readouterr()
    assert status == 0, printed.err
    if "change the recipe" in " ".join(printed.out.split()):  # options of `fit`, which the slow test passes on
        words = [word for word in words if not word.startswith(("--model.", "--data.", "--optimizer."))]
    assert not find_unknown_flags(words, f"{printed.out} --help -h")


@pytest.mark.parametrize("command", MAKE, ids=str)
def test_documented_targets_exist(command: Command):
    dry_run(command.words[1:])


def test_fit_hands_its_arguments_on(monkeypatch, capsys):
    """`make fit ARGS="..."` runs a command that parses."""
    lines = dry_run(["fit", "ARGS=--trainer.max_steps 10"]).splitlines()
    (words,) = [shlex.split(line)[1:] for line in lines if "/adam-mini " in line]
    status = call([*words, "--print_config"], monkeypatch)
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert "max_steps: 10" in printed.out


def dry_run(words) -> str:
    """What `make` would run; it fails where a target does not exist."""
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    finished = subprocess.run(["make", "--dry-run", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_the_readme_shows_both_programs():
    assert TRAINING, "the README shows no training"
    assert MAKE, "the README shows no make target"


@pytest.mark.slow
@pytest.mark.parametrize("command", ADAM_MINI, ids=str)
def test_documented_commands_run(command: Command, tmp_path):
    """Each in a process and a folder of its own, trainings for one batch."""
    words = list(command.words[1:])
    if NEEDS_MORE.search(" ".join(words)):
        pytest.skip("needs other hardware, or the result of another command")
    if command in TRAINING:
        words += ["--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu"]
    if words[0] == "compare":
        words.append("--dry-run")
    if words[0] == "hessian":
        words += SMALLER[words[1]]
    if words[0] == "advise":
        words += SMALLER["hessian" if "hessian" in words else "moments"]
    if words[0] == "study" and "--set" not in words and "--help" not in words:
        pytest.skip("minutes at its full size; tests of the studies run all of them at small ones")
    if "passengers.yaml" in words:  # the guide's own files
        shutil.copytree(ROOT / "examples" / "time_series", tmp_path, dirs_exist_ok=True)
    start = f"import sys; from {PACKAGE}.cli.main import main; sys.exit(main())"
    finished = subprocess.run(
        [sys.executable, "-c", start, *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, f"{finished.stdout[-3000:]}\n{finished.stderr[-3000:]}"


def test_shell_blocks_are_taken_apart():
    page = """
Text with `adam-mini nothing`.

```bash
make install && make fit ARGS="--trainer.max_steps 5"  # a remark
$ OMP_NUM_THREADS=2 .venv/bin/adam-mini fit --config a.yaml \\
    --optimizer.lr 1e-3 | tee log.txt
adam-mini explain RECIPE
```

```python
make = 1
```
"""
    found = commands_in(page, "page")
    assert [command.words for command in found] == [
        ("make", "install"),
        ("make", "fit", "ARGS=--trainer.max_steps 5"),
        (".venv/bin/adam-mini", "fit", "--config", "a.yaml", "--optimizer.lr", "1e-3"),
        ("tee", "log.txt"),
        ("adam-mini", "explain", "RECIPE"),
    ]
    assert [command.program for command in found] == ["make", "make", "adam-mini", "tee", "adam-mini"]
    assert [command.is_complete for command in found] == [True, True, True, True, False]


def test_the_guard_finds_what_does_not_exist():
    assert find_unknown_flags(["explain", "a.yaml", "--hf=x", "--nope"], "  --hf CONFIG\n  -h") == ["--nope"]
    with pytest.raises(AssertionError, match="No rule"):
        dry_run(["no-such-target"])
