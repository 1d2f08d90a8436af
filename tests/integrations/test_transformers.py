"""AdamMini in the Trainer of transformers: what it gets, and that it trains, stops and goes on as it should."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from transformers import MambaConfig, MambaForCausalLM, Trainer, ViTConfig, ViTForImageClassification

import hugging_face
import tiny_models
from hugging_face import (
    DECAY,
    RATE,
    STEPS,
    arguments,
    difference,
    gpt2,
    groups_of,
    llama,
    optimizer_of,
    sentences,
    structures,
    weights,
    with_adapters,
)
from lightning_adam_mini import AdamMini, annotate
from lightning_adam_mini.integrations import transformers as integration
from lightning_adam_mini.integrations.transformers import AdamMiniFactory


def trainer_of(how, model, args, *, train_dataset=None, **options):
    """A Trainer that gets AdamMini in one of the ways there are."""
    if how == "factory":
        given = {"optimizer_cls_and_kwargs": (AdamMiniFactory, {"args": args, **options})}
    elif how == "class":
        partition = {"partition": options.pop("partition", "auto")}
        annotate(model, **partition)
        own = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2)}
        given = {"optimizer_cls_and_kwargs": (AdamMini, own | options)}
    elif how == "optimizers":
        given = {"optimizers": (AdamMiniFactory()(model, args, **options), None)}
    else:
        given = {}
    return Trainer(model, args, train_dataset=train_dataset or sentences(), **given)


WAYS = ["factory", "class", "optimizers"]


@pytest.mark.parametrize("how", WAYS)
def test_the_trainer_gets_the_partition_and_the_options(how, tmp_path):
    args = arguments(tmp_path)
    trainer = trainer_of(how, llama(), args, partition="factored")
    trainer.create_optimizer()
    expected = AdamMini(trainer.model, lr=RATE, betas=(0.9, 0.99), weight_decay=DECAY, partition="factored")
    assert structures(optimizer_of(trainer)) == structures(expected)
    assert groups_of(optimizer_of(trainer), trainer.model) == groups_of(expected, trainer.model)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("build", [llama, gpt2])
def test_element_blocks_train_as_the_adamw_of_the_trainer(build, how, tmp_path):
    """Whose groups are those of the policy `matrices` in these models."""
    adamw = trainer_of("adamw", build(), arguments(tmp_path))
    ours = trainer_of(how, build(), arguments(tmp_path), partition="element")
    for trainer in (adamw, ours):
        trainer.train()
    assert type(optimizer_of(adamw)) is torch.optim.AdamW
    assert difference(weights(ours.model), weights(adamw.model)) < 1e-6
    assert difference(weights(build()), weights(adamw.model)) > RATE


def test_the_trainer_trains_as_a_loop(tmp_path):
    """The whole data set in each batch, since the Trainer shuffles."""
    args = arguments(tmp_path, per_device_train_batch_size=16, lr_scheduler_type="constant")
    trainer = trainer_of("factory", llama(), args, partition="factored")
    trainer.train()
    model = llama()
    optimizer = AdamMini(model, lr=RATE, betas=(0.9, 0.99), weight_decay=DECAY, partition="factored")
    batch = torch.stack([row["input_ids"] for row in sentences()])
    for _ in range(STEPS):
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert difference(weights(trainer.model), weights(model)) < 1e-6


@pytest.mark.parametrize("how", WAYS)
def test_a_run_that_is_resumed_is_one_that_was_not_stopped(how, tmp_path):
    whole = trainer_of(how, llama(), arguments(tmp_path / "whole"))
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer_of(how, llama(), arguments(tmp_path / "run", **saving)).train()
    resumed = trainer_of(how, llama(seed=1), arguments(tmp_path / "run", **saving))
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.state.global_step == STEPS
    assert difference(weights(resumed.model), weights(whole.model)) == 0


def test_axolotl_hands_over_the_arguments(tmp_path):
    model, args = llama(), arguments(tmp_path)
    expected = groups_of(AdamMiniFactory()(model, args=args, lr=0.5), model)
    assert groups_of(AdamMiniFactory()(model, args, lr=0.5), model) == expected
    assert expected[0][0] == {"lr": 0.5, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": DECAY}


def test_the_learning_rate_may_come_without_the_arguments():
    optimizer = AdamMiniFactory()(llama(), lr=0.5, weight_decay=0.25)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.5, 0.25), (0.5, 0.0)]


# Weight decay: the Trainer goes by names, AdamMini(model) by what is a vector.


def mamba():
    return MambaForCausalLM(MambaConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, state_size=4))


def vit():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4))


@pytest.mark.parametrize(
    ("build", "vectors"),
    [
        (llama, set()),
        (gpt2, set()),
        (tiny_models.bert, set()),
        (vit, {"vit.embeddings.cls_token"}),
        (mamba, {"backbone.layers.0.mixer.D", "backbone.norm_f.weight"}),
    ],
)
def test_vectors_that_the_trainer_decays_and_the_factory_does_not(build, vectors, tmp_path):
    def decaying(how):
        trainer = trainer_of(how, build(), arguments(tmp_path), partition="default")
        groups = groups_of(trainer.create_optimizer(), trainer.model)
        return {name for options, names in groups if options["weight_decay"] for name in names}

    assert decaying("class") - decaying("factory") == vectors
    assert decaying("factory") - decaying("class") == set()


# Adapters.


@pytest.mark.parametrize("how", WAYS)
def test_adapters_train_as_with_adamw_and_the_base_stays(how, tmp_path):
    adamw = trainer_of("adamw", with_adapters(), arguments(tmp_path))
    ours = trainer_of(how, with_adapters(), arguments(tmp_path), partition="element")
    for trainer in (adamw, ours):
        trainer.train()
    assert difference(weights(ours.model), weights(adamw.model)) < 1e-6
    trained = {name for name, value in weights(with_adapters()).items() if (weights(ours.model)[name] != value).any()}
    assert trained == {name for name, parameter in ours.model.named_parameters() if parameter.requires_grad}
    assert len(optimizer_of(ours).state) == len(trained) == 4


@pytest.mark.parametrize("how", WAYS)
def test_adapters_get_the_partition_of_the_model(how, tmp_path):
    trainer = trainer_of(how, with_adapters(), arguments(tmp_path), partition="factored")
    found = structures(trainer.create_optimizer())
    expected = structures(AdamMini(trainer.model, partition="factored"))
    assert found.items() <= expected.items()
    assert {name for name in expected if "lora" in name} <= found.keys()


def test_a_model_may_be_annotated_before_it_has_adapters(tmp_path):
    model = with_adapters(annotate(llama(), "factored"))
    trainer = Trainer(model, arguments(tmp_path), optimizer_cls_and_kwargs=(AdamMini, {"lr": RATE}))
    found = {blocks for _, blocks in structures(trainer.create_optimizer()).values()}
    expected = structures(AdamMini(model, partition="factored"))
    assert found == {blocks for name, (_, blocks) in expected.items() if "lora" in name}


def test_adapters_are_resumed(tmp_path):
    whole = trainer_of("factory", with_adapters(), arguments(tmp_path / "whole"))
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer_of("factory", with_adapters(), arguments(tmp_path / "run", **saving)).train()
    resumed = trainer_of("factory", with_adapters(), arguments(tmp_path / "run", **saving))
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert difference(weights(resumed.model), weights(whole.model)) == 0


def test_base_weights_that_are_packed_stay_out(tmp_path):
    """As those of 4 bits are: of another shape and dtype than the layer's."""
    model = with_adapters()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    layer.weight = nn.Parameter(torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
    optimizer = AdamMiniFactory()(model, arguments(tmp_path))
    expected = AdamMiniFactory()(with_adapters(), arguments(tmp_path))
    assert {n: s for n, s in structures(optimizer).items() if "lora" in n} == {
        n: s for n, s in structures(expected).items() if "lora" in n
    }


# What is refused, before training starts.


def frozen():
    return llama().requires_grad_(False)


@pytest.mark.parametrize(
    ("build", "given", "message"),
    [
        (llama, (AdamMini, {"lr": RATE}), r"got parameters without their model.*annotate\(model\)"),
        (llama, (AdamMiniFactory, {}), r"got no lr and no weight_decay.*\{\"args\": args"),
        (llama, (AdamMiniFactory, {"lr": RATE}), "got no weight_decay"),
        (llama, (AdamMiniFactory, {"args": {"learning_rate": RATE}}), "TrainingArguments of the Trainer, not .*dict"),
        (llama, (AdamMiniFactory, {"lr": -1.0, "weight_decay": 0.0}), "lr must be a finite number"),
        (llama, (AdamMiniFactory, {"lr": RATE, "weight_decay": 0.0, "partition": "rows"}), "unknown partition"),
        (frozen, (AdamMiniFactory, {"lr": RATE, "weight_decay": 0.0}), r"no parameter of the model .*requires_grad_\("),
    ],
)
def test_what_is_refused(build, given, message, tmp_path):
    model = build()
    with pytest.raises(ValueError, match=message) as caught:
        Trainer(model, arguments(tmp_path), train_dataset=sentences(), optimizer_cls_and_kwargs=given).train()
    assert "\n" not in str(caught.value)
    assert difference(weights(model), weights(llama())) == 0


def test_an_option_that_adam_mini_has_not_is_named(tmp_path):
    given = (AdamMiniFactory, {"args": arguments(tmp_path), "optim_bits": 8})
    with pytest.raises(TypeError, match="optim_bits"):
        Trainer(llama(), arguments(tmp_path), optimizer_cls_and_kwargs=given).create_optimizer()


def test_a_trainer_that_knows_no_factories_is_told():
    """It calls what it takes for an optimizer class with groups."""
    with pytest.raises(ValueError, match=r"factories need transformers 5\.2, or call annotate") as caught:
        AdamMiniFactory([{"params": list(llama().parameters())}], lr=RATE)
    assert hugging_face.transformers.__version__ in str(caught.value)
    assert integration.__all__ == ["AdamMiniFactory"]
