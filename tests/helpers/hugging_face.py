"""Trainers, accelerators and ranks of Hugging Face's libraries on a CPU: what their tests have in common."""

import contextlib
import os
import warnings
from unittest import mock

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel

import tiny_models
from ranks import run_ranks

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
RATE, DECAY, STEPS = 1e-2, 0.1, 4


def llama(seed=0, **options):
    torch.manual_seed(seed)
    return tiny_models.llama(**options)


def gpt2():
    torch.manual_seed(0)
    return tiny_models.gpt2(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)


def with_adapters(model=None):
    """A model with low-rank adapters of query and value."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(llama() if model is None else model, config)


def sentences(number=16):
    """Random tokens and their labels."""
    rows = torch.randint(0, tiny_models.VOCAB, (number, tiny_models.POSITIONS), generator=torch.Generator())
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(folder, kind=None, **options):
    """TrainingArguments with another learning rate and weight decay than any default, quietly."""
    defaults = {
        "learning_rate": RATE,
        "weight_decay": DECAY,
        "adam_beta2": 0.99,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    if "RANK" not in os.environ:
        defaults["use_cpu"] = True
    kind = kind or transformers.TrainingArguments
    return kind(output_dir=str(folder), **{**defaults, **options})


def optimizer_of(trainer):
    """AdamMini within what accelerate made of it."""
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def plain(name):
    """The name of a parameter without what wrappers add."""
    return name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")


def structures(optimizer):
    """The role and the blocks of each parameter by its name in the model that was wrapped."""
    return {plain(name): (found.role.name, found.blocks) for name, found in optimizer.partition.items()}


def groups_of(optimizer, model):
    """The options and the parameters of each group that has any, by the names of the model."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    options = ("lr", "betas", "eps", "weight_decay")
    return [
        ({key: group[key] for key in options}, [names[parameter] for parameter in group["params"]])
        for group in optimizer.param_groups
        if group["params"]
    ]


def weights(model):
    """Whole parameters by their names in the model that was wrapped."""
    is_flattened = isinstance(model, FullyShardedDataParallel)
    with FullyShardedDataParallel.summon_full_params(model) if is_flattened else contextlib.nullcontext():
        return {
            plain(name): getattr(parameter, "full_tensor", lambda p=parameter: p)().detach().clone()
            for name, parameter in model.named_parameters()
        }


def difference(first, second):
    """The largest difference of weights, which have the same names."""
    assert first.keys() == second.keys()
    return max((first[name] - weight).abs().max().item() for name, weight in second.items())


def forget_ranks():
    """Accelerate keeps for all of a process which ranks there are."""
    for kind in (accelerate.state.AcceleratorState, accelerate.state.GradientState, accelerate.state.PartialState):
        kind._reset_state()


def on_ranks(work, layout, *given):
    """What `work(layout, *given)` returns on two ranks.

    accelerate shards on accelerators alone: on CPUs it ignores the plugin of FSDP and replicates the model. So it takes
    the ranks for two GPUs there, which compute on the CPU.
    """
    return run_ranks(2, _on_rank, work, layout, given)


def _on_rank(rank, work, layout, given):
    forget_ranks()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    warnings.simplefilter("ignore")
    if layout == "ddp":
        os.environ["ACCELERATE_USE_CPU"] = "true"
        return work(layout, *given)
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    said = {
        "accelerate.PartialState._prepare_backend": ("gloo", accelerate.DistributedType.MULTI_GPU),
        "accelerate.utils.dataclasses.is_cuda_available": True,
        "torch.cuda.current_device": torch.device("cpu"),
        "transformers.training_args.is_torch_bf16_gpu_available": True,
    }
    with contextlib.ExitStack() as patches:
        for name, answer in said.items():
            patches.enter_context(mock.patch(name, return_value=answer))
        return work(layout, *given)
