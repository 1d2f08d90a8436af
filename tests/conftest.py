"""What every test shares: one thread, one seed, no network, one table of tolerances."""

import os
import random

# Before the first import of torch or Hugging Face, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from hypothesis import settings

# The same examples on every machine, and no deadline: the first call of an operator may compile or load something.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

# How far two orders of the same operations may lie apart after a few steps.
TOLERANCES = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.float16: {"rtol": 1e-3, "atol": 1e-4},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-3},
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Two workers share two cores, and the order of a sum must not depend on the machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    """Every test starts from the same random state, alone or after any other test."""
    random.seed(0)
    torch.manual_seed(0)


LAUNCHED = ("GROUP_RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "RANK", "WORLD_SIZE")


@pytest.fixture(autouse=True)
def _no_rank_of_another_test(request):
    """Lightning leaves in the environment which rank this process was, and a process started later waits for others.

    It leaves its process group too, and a forked process could make none of its own.
    """
    yield
    for name in LAUNCHED:
        os.environ.pop(name, None)
    if torch.distributed.is_initialized() and "_one_process" not in request.fixturenames:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def tolerances():
    """`torch.testing.assert_close(a, b, **tolerances[a.dtype])`."""
    return TOLERANCES


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if hasattr(item, "callspec") and item.callspec.params.get("implementation") == "fused":
        from lightning_adam_mini.optim.kernels import cpu

        if reason := cpu.unavailable():
            pytest.skip(reason)
