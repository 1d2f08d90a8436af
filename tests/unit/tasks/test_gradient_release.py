"""Parameters that are updated within the backward pass."""

import copy

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_adam_mini import AdamMini, factory
from lightning_adam_mini.tasks.gradient_release import check_release, release_gradients
from tiny_models import VOCAB, llama


def loss_of(model, step):
    tokens = torch.randint(VOCAB, (2, 8), generator=torch.Generator().manual_seed(step))
    return model(input_ids=tokens, labels=tokens).loss


def test_the_weights_are_those_of_a_step_after_the_backward_pass():
    released = llama(tie_word_embeddings=True)
    stepped = copy.deepcopy(released)
    alive = []
    optimizers = AdamMini(released, lr=1e-2), AdamMini(stepped, lr=1e-2)
    for parameter in released.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.numel() for p in released.parameters() if p.grad is not None))
        )
    hooks = release_gradients(optimizers[0])
    for step in range(3):
        optimizers[0].step(lambda step=step: loss_of(released, step).backward())
        assert all(parameter.grad is None for parameter in released.parameters())
        loss_of(stepped, step).backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
    for own, other in zip(released.parameters(), stepped.parameters(), strict=True):
        assert torch.equal(own, other)
    assert max(alive) <= max(parameter.numel() for parameter in released.parameters())

    for hook in hooks:
        hook.remove()
    loss_of(released, 3).backward()
    assert all(parameter.grad is not None for parameter in released.parameters())


def test_a_parameter_without_a_gradient_takes_no_step():
    model = nn.Linear(2, 2)
    optimizer = AdamMini(model, partition="default")
    with pytest.raises(ValueError, match="weight has no gradient"):
        optimizer.step_parameter(model.weight)
    with pytest.raises(ValueError, match="does not belong to the model"):
        optimizer.step_parameter(nn.Parameter(torch.zeros(2)))


@pytest.mark.parametrize(
    ("optimizer", "options", "told"),
    [
        (factory.AdamW(), {}, "AdamW cannot: use --optimizer AdamMini"),
        (factory.AdamMini(), {"gradient_clip_val": 1.0}, "set trainer.gradient_clip_val to 0"),
        (factory.AdamMini(), {"accumulate_grad_batches": 2}, "set trainer.accumulate_grad_batches to 1"),
        (factory.AdamMini(), {"devices": 2, "strategy": "ddp"}, "train on one device"),
    ],
)
def test_what_needs_all_gradients_is_refused(optimizer, options, told):
    trainer = Trainer(**{"accelerator": "cpu", "devices": 1, "logger": False, **options})
    with pytest.raises(ValueError, match=told):
        check_release(trainer, optimizer)
