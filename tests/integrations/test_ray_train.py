"""AdamMini in Ray Train: two workers that talk through gloo, one of which fails and is started again."""

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from checkout import ROOT
from tiny_models import llama

pytest.importorskip("ray.train")

import ray
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig, get_checkpoint, get_context, report
from ray.train.torch import TorchConfig, TorchTrainer, prepare_model
from torch.distributed.fsdp import fully_shard

from framework_runs import SAVED, STEPS, adamw, element, factored, loss_of, whole

pytestmark = pytest.mark.slow


def ddp(model):
    return prepare_model(model)


def fsdp2(model):
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def alone(model):
    return model


def steps(model, wrapped, optimizer, rank, world, first=0):
    """Steps on this rank's part of each batch; each step is yielded once it is taken."""
    for step in range(first, STEPS):
        loss_of(wrapped, step, rank, world).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield step + 1


def start(wrap, build):
    torch.manual_seed(0)
    model = llama(num_hidden_layers=2)
    wrapped = wrap(model)
    return model, wrapped, build(model)


def loop(config):
    """What each worker runs: all runs to their end, and one that fails at its fifth step and goes on from its third."""
    rank, world = get_context().get_world_rank(), get_context().get_world_size()
    model, wrapped, optimizer = start(fsdp2, factored)
    first = 0
    if saved := get_checkpoint():
        with saved.as_directory() as folder:
            state = torch.load(Path(folder, f"{rank}.pt"), weights_only=False)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        first = SAVED
    for step in steps(model, wrapped, optimizer, rank, world, first):
        if step == SAVED:
            weights, moments = get_state_dict(model, optimizer)
            with TemporaryDirectory() as folder:
                torch.save({"model": weights, "optimizer": moments}, Path(folder, f"{rank}.pt"))
                report({"step": step}, checkpoint=Checkpoint.from_directory(folder))
        if step == SAVED + 2 and not first:
            raise RuntimeError("a worker is lost")
    results = {"resumed": whole(model), "first": first}
    for wrap in (ddp, fsdp2):
        for build in (adamw, element, factored):
            model, wrapped, optimizer = start(wrap, build)
            assert list(steps(model, wrapped, optimizer, rank, world))[-1] == STEPS
            results[wrap.__name__, build.__name__] = whole(model)
            if build is factored:
                results["structures", wrap.__name__] = {n: p.structure for n, p in optimizer.partition.items()}
    if rank == 0:
        torch.save(results, config["file"])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One fit of Ray Train, which takes most of a minute to start and end."""
    folder = tmp_path_factory.mktemp("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")]))
        patch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "120")
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 1024**2)
        try:
            TorchTrainer(
                loop,
                train_loop_config={"file": str(folder / "results.pt")},
                scaling_config=ScalingConfig(num_workers=2, use_gpu=False),
                torch_config=TorchConfig(backend="gloo"),
                run_config=RunConfig(
                    name="run", storage_path=str(folder), failure_config=FailureConfig(max_failures=1)
                ),
            ).fit()
        finally:
            ray.shutdown()
    return torch.load(folder / "results.pt", weights_only=False)


def furthest(weights, others):
    assert weights.keys() == others.keys()
    return max((weights[name] - others[name]).abs().max().item() for name in weights)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_elements_train_as_adamw(results, wrap):
    assert furthest(results[wrap, "element"], results[wrap, "adamw"]) < 1e-6


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_two_workers_train_as_one_process(results, wrap):
    model, wrapped, optimizer = start(alone, factored)
    assert list(steps(model, wrapped, optimizer, 0, 1))[-1] == STEPS
    assert results["structures", wrap] == {name: p.structure for name, p in optimizer.partition.items()}
    assert furthest(results[wrap, "factored"], whole(model)) < 1e-6


def test_a_run_that_lost_a_worker_is_the_run(results):
    assert results["first"] == SAVED
    assert furthest(results["resumed"], results["fsdp2", "factored"]) == 0
