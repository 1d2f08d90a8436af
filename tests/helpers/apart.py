"""Test files that run in a process of their own, since they leave threads behind, after which no fork can train.

A backward pass of fake tensors leaves those of autograd, and torch's profiler its own.
"""

import os
import subprocess
import sys

import pytest

_APART = "ADAM_MINI_TESTS_APART"
apart = pytest.mark.skipif(_APART not in os.environ, reason="runs in a process of its own")


def assert_passes_apart(file):
    """Run the tests of a file that are marked `apart`."""
    options = ["-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider", "-m", "not slow"]
    command = [sys.executable, "-m", "pytest", *options, file]
    done = subprocess.run(command, env=os.environ | {_APART: "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
