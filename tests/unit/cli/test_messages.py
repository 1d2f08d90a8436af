"""One line from jsonargparse's own messages, as the installed version words them."""

from argparse import ArgumentError
from dataclasses import dataclass, field
from typing import Literal

import pytest
from jsonargparse import ArgumentParser

from lightning_adam_mini.cli.messages import near_option, one_line
from lightning_adam_mini.factory import OptimizerFactory


@dataclass
class Options:
    number: float = 1.0
    count: int | None = None
    flag: bool = False
    shape: Literal["round", "square"] = "round"
    cuts: dict[str, Literal["row", "whole"]] = field(default_factory=dict)
    pair: tuple[float, float] = (0.0, 1.0)
    either: Literal["low", "high"] | Literal["half", "full"] | None = None


def said(*arguments):
    """What jsonargparse says about a command line."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--options", type=Options, default=Options())
    parser.add_subclass_arguments(OptimizerFactory, "optimizer", instantiate=False, required=False)
    parser.set_defaults({"optimizer": {"class_path": "lightning_adam_mini.factory.AdamMini"}})
    parser.add_argument("--config", action="config")
    with pytest.raises(ArgumentError) as error:
        parser.parse_args(list(arguments))
    return str(error.value)


CHOICES = "Adafactor, Adam, AdamMini, AdamW, CAME, LAMB, Lion, Muon, NovoGrad, SGD, SM3"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--options.number", "many"], "options.number: expected a number, got many"),
        (["--options.count", "1.5"], "options.count: expected a whole number, got 1.5"),
        (["--options.flag", "maybe"], "options.flag: expected true or false, got maybe"),
        (["--options.pair", "[1]"], "options.pair: expected a tuple with 2 elements, got [1]"),
        (["--options.pair", "1"], "options.pair: expected a list, got 1"),
        (["--options.shape", "squar"], "options.shape: 'squar' is not one of round, square; did you mean square?"),
        (["--options.shape", "x"], "options.shape: 'x' is not one of round, square"),
        (["--options.cuts", "{a: rwo}"], "options.cuts: 'rwo' is not one of row, whole; did you mean row?"),
        (["--options.either", "hal"], "options.either: 'hal' is not one of low, high, half, full; did you mean half?"),
        (["--optimizer.lr", "fast"], "optimizer.lr: expected a number, got fast"),
        (
            ["--optimizer", "Adammini"],
            f"optimizer: there is no class 'Adammini'; did you mean AdamMini? Choose from: {CHOICES}",
        ),
        (["--optimizer", "1"], f"optimizer: there is no class '1'. Choose from: {CHOICES}"),
        (["--optimizer", "none.such.Class"], f"optimizer: there is no class 'none.such.Class'. Choose from: {CHOICES}"),
        (["--optimizer", "datetime.date"], f"optimizer: there is no class 'datetime.date'. Choose from: {CHOICES}"),
        (
            ["--optimizer", "Lion", "--optimizer.eps", "1"],
            "Lion has no option 'eps'. It has: lr, weight_decay, weight_decay_policy, betas",
        ),
        (
            ["--optimizer", "Lion", "--optimizer.beta", "1"],
            "Lion has no option 'beta'; did you mean betas? It has: lr, weight_decay, weight_decay_policy, betas",
        ),
    ],
)
def test_what_the_parser_says(arguments, expected):
    assert one_line(said(*arguments)) == expected


@pytest.mark.parametrize("content", ["", "text", "- a", "a: [\n", "options: {nmber: 1}", "options: {number: x}"])
def test_files(tmp_path, content):
    (tmp_path / "file.yaml").write_text(content, "utf-8")
    line = one_line(said("--config", str(tmp_path / "file.yaml")))
    assert "\n" not in line
    assert 10 < len(line) < 200
    assert "subtypes" not in line


def test_options_that_come_near():
    options = {"--options.number", "--optimizer", "--config"}
    assert near_option(said("--options.nmber", "1"), options).startswith(
        "there is no option --options.nmber; did you mean --options.number? "
    )
    assert near_option("unrecognized arguments: --xyz=3 more", options).startswith("there is no option --xyz. ")
    assert near_option("something else", options) == "something else"


def test_a_message_of_ours_stays_as_it_is():
    message = "lr must be a finite number of at least 0, not -1.0"
    assert one_line(message) == message
    assert one_line("first\n   second  third\n") == "first second third"
    assert one_line("") == ""


def test_an_error_in_a_class_is_the_cause():
    message = (
        "Does not validate against any of the Union subtypes\n"
        "Subtypes: [<class 'package.Task'>, <class 'NoneType'>]\n"
        "Errors:\n"
        "  - lr must be positive:\n"
        "    not -1\n"
        "  - Expected a <class 'NoneType'>\n"
        "Given value type: <class 'jsonargparse._namespace.Namespace'>\n"
        "Given value: Namespace(lr=-1)"
    )
    assert one_line(message) == "lr must be positive: not -1"


def test_an_error_of_a_reading_process_is_its_last_line():
    text = "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File x\n"
    assert one_line(text + "ValueError: cannot read a.png; remove it\n") == "cannot read a.png; remove it"
