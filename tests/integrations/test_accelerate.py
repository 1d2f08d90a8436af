"""AdamMini under accelerate: replicated and sharded on two ranks, alone and in the Trainer, against one process."""

import contextlib
import os
from unittest import mock

import pytest
import torch

pytest.importorskip("accelerate")

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import Trainer

from hugging_face import (
    RATE,
    STEPS,
    arguments,
    difference,
    forget_ranks,
    llama,
    on_ranks,
    optimizer_of,
    sentences,
    structures,
    weights,
    with_adapters,
)
from lightning_adam_mini import AdamMini, annotate
from lightning_adam_mini.integrations.transformers import AdamMiniFactory

WITHIN = 1e-6
WRAPPERS = {"ddp": DistributedDataParallel, "fsdp1": FullyShardedDataParallel, "fsdp2": FSDPModule}
LAYOUTS = list(WRAPPERS)
LAYER = "LlamaDecoderLayer"


def three_heads():
    """Rows of a head on both ranks."""
    return llama(hidden_size=12, num_attention_heads=3, num_key_value_heads=3)


MODELS = {
    "heads": three_heads,
    "adapters": lambda: with_adapters(three_heads()),
    "bfloat16": lambda: three_heads().bfloat16(),
}


# A loop of one's own.


def accelerator_of(layout, state_dict_type="SHARDED_STATE_DICT"):
    if layout not in ("fsdp1", "fsdp2"):
        return Accelerator(cpu="RANK" not in os.environ)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=int(layout[-1]),
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[LAYER],
        state_dict_type=state_dict_type,
        cpu_ram_efficient_loading=False,
        sync_module_states=False,
        use_orig_params=None if layout == "fsdp2" else True,
    )
    return Accelerator(fsdp_plugin=plugin)


def prepare(layout, how, **options):
    """The accelerator, the model and the optimizer, as a program of one's own prepares them."""
    accelerator, model = accelerator_of(layout), three_heads()
    options = {"lr": RATE, "weight_decay": 0.1, **options}
    partition = options.pop("partition", "auto")
    if how == "parameters":
        annotate(model, partition)
    else:
        options["partition"] = partition
    if layout == "fsdp1":
        model = accelerator.prepare(model)
    optimizer = AdamMini(model.parameters() if how == "parameters" else model, **options)
    if layout == "fsdp1":
        optimizer = accelerator.prepare(optimizer)
    else:
        model, optimizer = accelerator.prepare(model, optimizer)
    assert isinstance(model, WRAPPERS.get(layout, torch.nn.Module))
    return accelerator, model, optimizer


def loop(accelerator, model, optimizer, steps):
    world = accelerator.num_processes
    loader = accelerator.prepare(DataLoader(sentences(), batch_size=4 // world))
    for number, batch in enumerate(loader):
        if number in steps:
            accelerator.backward(model(**batch).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


def train(layout, how, options):
    accelerator, model, optimizer = prepare(layout, how, **options)
    loop(accelerator, model, optimizer, range(STEPS))
    if layout == "fsdp2":
        assert all(isinstance(parameter, DTensor) for parameter in optimizer.optimizer.state)
    return weights(model), structures(optimizer.optimizer)


@pytest.fixture(autouse=True)
def _forget():
    yield
    forget_ranks()


CASES = [
    (layout, how, partition) for layout in LAYOUTS for how, partition in (("model", "auto"), ("parameters", "factored"))
]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "how", "partition"), CASES)
def test_ranks_train_as_one_process(layout, how, partition):
    options = {"partition": partition}
    alone, expected = train(None, how, options)
    for there, found in on_ranks(train, layout, how, options):
        assert difference(there, alone) < WITHIN
        assert {
            name.replace("module.", "").replace("_fsdp_wrapped_", ""): each for name, each in found.items()
        } == expected
    assert difference(weights(three_heads()), alone) > RATE


@contextlib.contextmanager
def copies_of_states(layout):
    """torch gathers each kind of moments of FSDP1 in one buffer, and copies it from there to the CPU."""
    with mock.patch.object(torch.Tensor, "cpu", torch.Tensor.clone) if layout == "fsdp1" else contextlib.nullcontext():
        yield


def stop_and_go_on(layout, partition, folder):
    """Weights of a run; of one that is saved after two steps; and of another that loads it."""
    whole = prepare(layout, "model", partition=partition)
    loop(*whole, range(STEPS))
    accelerator, model, optimizer = prepare(layout, "model", partition=partition)
    accelerator._models, accelerator._optimizers = [model], [optimizer]
    loop(accelerator, model, optimizer, range(2))
    with copies_of_states(layout):
        accelerator.save_state(folder)
    accelerator, model, optimizer = prepare(layout, "model", partition=partition)
    accelerator._models, accelerator._optimizers = [model], [optimizer]
    accelerator.load_state(folder)
    loop(accelerator, model, optimizer, range(2, STEPS))
    return weights(whole[1]), weights(model)


@pytest.mark.slow
@pytest.mark.parametrize("partition", ["auto", "factored"])
@pytest.mark.parametrize("layout", [None, *LAYOUTS])
def test_a_saved_state_goes_on(layout, partition, tmp_path):
    given = (layout, partition, str(tmp_path))
    for whole, resumed in on_ranks(stop_and_go_on, *given) if layout else [stop_and_go_on(*given)]:
        assert difference(whole, resumed) == 0


# The Trainer.


def fsdp(layout, config):
    if layout not in ("fsdp1", "fsdp2"):
        return {}
    own = {"version": int(layout[-1]), "transformer_layer_cls_to_wrap": [LAYER], "sync_module_states": False}
    return {"fsdp": True, "fsdp_config": own | config}


def trainer_of(layout, how, model, folder, config=(), **options):
    world = int(os.environ.get("WORLD_SIZE", "1"))
    args = arguments(folder, per_device_train_batch_size=4 // world, **fsdp(layout, dict(config)), **options)
    if how == "adamw":
        return Trainer(model, args, train_dataset=sentences())
    if how == "class":
        annotate(model, "factored")
        given = (AdamMini, {"lr": RATE, "betas": (args.adam_beta1, args.adam_beta2)})
    else:
        given = (AdamMiniFactory, {"args": args, "partition": "element" if how == "element" else "factored"})
    return Trainer(model, args, train_dataset=sentences(), optimizer_cls_and_kwargs=given)


def train_by_trainer(layout, how, model, folder):
    trainer = trainer_of(layout, how, MODELS[model](), folder)
    trainer.train()
    assert isinstance(trainer.model_wrapped, WRAPPERS.get(layout, torch.nn.Module))
    return weights(trainer.model), structures(optimizer_of(trainer)), len(optimizer_of(trainer).state)


TRAINER_CASES = [
    *((layout, how, "heads") for layout in LAYOUTS for how in ("factory", "class")),
    *((layout, "factory", "adapters") for layout in LAYOUTS),
]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "how", "model"), TRAINER_CASES)
def test_the_trainer_on_ranks_trains_as_one_process(layout, how, model, tmp_path):
    alone, expected, trained = train_by_trainer(None, how, model, tmp_path)
    for there, found, states in on_ranks(train_by_trainer, layout, how, model, str(tmp_path)):
        assert difference(there, alone) < WITHIN
        assert found == expected
        assert states == trained
    start = weights(MODELS[model]())
    assert sum(bool((start[name] != value).any()) for name, value in alone.items()) == trained > 0


def train_as(layout, how, model, folder, config, options):
    """Under other options of FSDP2 and of the Trainer: weights, and the dtypes of the state."""
    trainer = trainer_of(layout, how, MODELS[model](), folder, config, **options)
    trainer.train()
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    assert all(getattr(plugin, name) == value for name, value in dict(config).items())
    states = optimizer_of(trainer).state.values()
    return weights(trainer.model), {value.dtype for state in states for value in state.values()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "model", "config", "options"),
    [
        *((layout, "heads", (), {}) for layout in LAYOUTS),
        # Ranks have the model on the meta device while it is sharded, and get its weights from the first.
        ("fsdp2", "heads", (("cpu_ram_efficient_loading", True),), {}),
        # accelerate makes float32 of the parameters after the optimizer is built.
        ("fsdp2", "bfloat16", (), {"bf16": True}),
    ],
)
def test_element_blocks_train_as_the_adamw_of_the_trainer(layout, model, config, options, tmp_path):
    given = (model, str(tmp_path), config, options)
    (adamw, _), (ours, dtypes) = (on_ranks(train_as, layout, how, *given)[0] for how in ("adamw", "element"))
    assert difference(ours, adamw) < WITHIN
    assert dtypes == {torch.float32}
    assert difference(ours, weights(MODELS[model]())) > RATE


def stop_and_resume(layout, model, folder, kind):
    saving = {"save_strategy": "steps", "save_steps": 2}
    config = {"state_dict_type": kind}
    runs = [trainer_of(layout, "factory", MODELS[model](), folder, config, **saving) for _ in range(2)]
    with copies_of_states(layout):
        runs[0].train()
    runs[1].train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    return [weights(trainer.model) for trainer in runs]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "model", "kind"),
    [
        ("ddp", "heads", "FULL_STATE_DICT"),
        *((layout, "heads", f"{kind}_STATE_DICT") for layout in ("fsdp1", "fsdp2") for kind in ("FULL", "SHARDED")),
        ("fsdp2", "adapters", "FULL_STATE_DICT"),
    ],
)
def test_the_trainer_resumes_on_ranks(layout, model, kind, tmp_path):
    for whole, resumed in on_ranks(stop_and_resume, layout, model, str(tmp_path), kind):
        assert difference(whole, resumed) == 0


@pytest.mark.slow
@pytest.mark.parametrize("how", ["factory", "class"])
def test_flat_parameters_are_refused(how, tmp_path):
    with pytest.raises(AssertionError, match=r"ValueError: .*use_orig_params=True"):
        on_ranks(train_as, "fsdp1", how, "heads", str(tmp_path), (("use_orig_params", False),), {})
