"""Lockstep with the authors' release 1.1.1 on models that it cuts as the paper says."""

import copy

import pytest
import torch
from torch import nn

import tiny_models
from lightning_adam_mini import AdamMini
from tiny_models import DIM, HEADS, KV_HEADS, VOCAB

release = pytest.importorskip("adam_mini")
OPTIONS = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
ATOL = 1e-10  # float64; both sum squares in an order of their own, and the loss feeds it back for 20 steps


class ConvolutionAndLinear(nn.Module):
    """Without biases, to which the release gives full second moments, and without names that it knows."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, bias=False)
        self.second = nn.ConvTranspose2d(4, 3, 2, bias=False)
        self.third = nn.Linear(3 * 5 * 5, 4, bias=False)

    def forward(self, images):
        return self.third(self.second(self.first(images).tanh()).flatten(1))


def transformer_loss(model, seed):
    tokens = torch.randint(VOCAB, (2, 5), generator=torch.Generator().manual_seed(seed))
    return model(input_ids=tokens, labels=tokens).loss


def image_loss(model, seed):
    images = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return model(images).square().mean()


def release_optimizer(model):
    parameters = list(model.named_parameters())
    return release.Adam_mini(parameters, dim=DIM, n_heads=HEADS, n_kv_heads=KV_HEADS, verbose=False, **OPTIONS)


MODELS = {
    "llama": (tiny_models.llama, transformer_loss, {}),
    "llama without groups": (lambda: tiny_models.llama(num_key_value_heads=HEADS), transformer_loss, {}),
    "llama with biases": (lambda: tiny_models.llama(attention_bias=True, mlp_bias=True), transformer_loss, {}),
    "llama of two layers": (lambda: tiny_models.llama(num_hidden_layers=2), transformer_loss, {}),
    "llama, tied": (lambda: tiny_models.llama(tie_word_embeddings=True), transformer_loss, {}),
    "no transformer": (ConvolutionAndLinear, image_loss, {"partition": "default"}),
}


def trainings(factory, loss, options):
    """Two equal models with their losses, and how to build the optimizer of each."""
    ours = factory().double()
    return [
        (ours, loss, lambda model: AdamMini(model, **OPTIONS, **options)),
        (copy.deepcopy(ours), loss, release_optimizer),
    ]


def run(model, loss, build, *, steps=20, reload_at=None):
    """The parameters after some steps, the optimizer's state saved and loaded midway."""
    optimizer = build(model)
    for step in range(steps):
        if step == reload_at:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = build(model)
            optimizer.load_state_dict(state)
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("reload_at", [None, 10])
@pytest.mark.parametrize("model", MODELS)
def test_lockstep(model, reload_at):
    ours, theirs = (run(*training, reload_at=reload_at) for training in trainings(*MODELS[model]))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=ATOL, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("factory", "parameter"),
    [
        # Heads of 6 rows, which the release cuts at dim * dim / heads elements.
        (tiny_models.qwen3, "model.layers.0.self_attn.q_proj.weight"),
        # Output neurons in columns, which it takes for rows.
        (tiny_models.gpt2, "transformer.h.0.mlp.c_fc.weight"),
        # Query, key and value in one matrix, whose name it does not know.
        (tiny_models.gpt2, "transformer.h.0.attn.c_attn.weight"),
    ],
)
def test_it_differs_where_the_release_is_wrong(factory, parameter):
    ours, theirs = (run(*training, steps=3) for training in trainings(factory, transformer_loss, {}))
    assert not torch.allclose(ours[parameter], theirs[parameter], rtol=0, atol=1e-6)
