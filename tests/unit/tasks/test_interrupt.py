"""Signals that end a run: what a job of SLURM is queued again with."""

import logging

import pytest

from lightning_adam_mini.tasks.callbacks.stopping import requeue


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A stand-in for SLURM's program, which notes what it is asked and fails where told to."""
    program = tmp_path / "scontrol"
    program.write_text(
        f'#!/bin/sh\necho "$*" >> {tmp_path}/log\n[ -z "$TROUBLE" ] || {{ echo "$TROUBLE" >&2; exit 1; }}\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    return tmp_path / "log"


def test_a_job_is_queued_again_by_its_number(scontrol, caplog):
    requeue()
    assert scontrol.read_text() == "requeue 12\n"
    assert not caplog.records


def test_one_of_an_array_is_queued_again_alone(scontrol, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "10")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    requeue()
    assert scontrol.read_text() == "requeue 10_2\n"


def test_a_refusal_is_told_with_what_to_do(scontrol, monkeypatch, caplog):
    monkeypatch.setenv("TROUBLE", "Job may not be requeued")
    with caplog.at_level(logging.ERROR):
        requeue()
    assert "Job may not be requeued" in caplog.text
    assert "scontrol requeue 12" in caplog.text


def test_a_node_without_scontrol_is_told(scontrol, monkeypatch, caplog):
    monkeypatch.setenv("PATH", "/nowhere")
    with caplog.at_level(logging.ERROR):
        requeue()
    assert "submit it again" in caplog.text
