"""A folder for each test of the command line, with a recipe that takes a second."""

import itertools
import logging
import os
import socket

import lightning.pytorch  # noqa: F401 - its log keeps the standard error of its first import, be it that of a test
import pytest

from tiny_runs import RECIPE, write_recipe


@pytest.fixture(scope="session")
def prepared_data(tmp_path_factory):
    """The cache of prepared text, one for all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def work_dir(tmp_path, monkeypatch, prepared_data):
    """The folder from which the command is called; it holds `tiny.yaml` and its text."""
    write_recipe(tmp_path)
    monkeypatch.setenv("LIGHTNING_ADAM_MINI_CACHE", str(prepared_data))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def small(work_dir, caplog):
    """`tiny.yaml` with one layer of width 8 in two heads; the folder."""
    model = RECIPE["model"]["init_args"]
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
    write_recipe(work_dir, model={**RECIPE["model"], "init_args": {**model, "config": sizes, "sample_prompt": ""}})
    logger = logging.getLogger("lightning_adam_mini")
    logger.propagate = True  # a command of another test may have shown it by itself
    caplog.set_level(logging.INFO, "lightning_adam_mini")
    return work_dir


_ports = itertools.count(20_000 + 137 * (os.getpid() % 80))


@pytest.fixture(autouse=True)
def _port_of_its_own(_no_rank_of_another_test, monkeypatch):
    """Below the ports that systems hand out: two tests at a time may find the same one free."""
    for port in _ports:
        with socket.socket() as trial:
            if trial.connect_ex(("127.0.0.1", port)) != 0:
                break
    monkeypatch.setenv("MASTER_PORT", str(port))
