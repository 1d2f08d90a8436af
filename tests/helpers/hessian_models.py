"""Small models, their losses and their dense Hessians."""

import copy
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import tiny_models


class Tied(nn.Module):
    """An embedding that is also the head, a frozen layer, a layer that nothing reaches, and a linear parameter."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.hidden = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.frozen(torch.tanh(self.hidden(self.embed(tokens))))))


class Normed(nn.Module):
    """A convolution with batch norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(8, 3)

    def forward(self, images):
        return self.head(F.silu(self.norm(self.conv(images))).flatten(1))


def classify(model, batch):
    inputs, labels = batch
    logits = model(inputs)
    logits = getattr(logits, "logits", logits)
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def token_batches(vocabulary, count=3, size=2, length=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(vocabulary, (count, 2, size, length), generator=generator)
    return [(inputs, labels) for inputs, labels in draws]


def image_batches(count=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(5, 1, 4, 4, generator=generator).to(dtype), torch.randint(3, (5,), generator=generator))
        for _ in range(count)
    ]


def tied():
    return tiny_models.randomize(Tied()), token_batches(7)


def normed():
    model = Normed()
    model.norm.running_mean.uniform_(-1, 1)
    return model.eval(), image_batches()


def normed_in_training():
    model, batches = normed()
    return model.train(), batches


def gpt2():
    model = tiny_models.gpt2(n_inner=6, vocab_size=5, attn_implementation="sdpa").eval()
    return tiny_models.randomize(model), token_batches(5, count=1)


MODELS = {"tied": tied, "normed": normed, "normed in training": normed_in_training, "gpt2": gpt2}


def build(name):
    torch.manual_seed(0)
    return MODELS[name]()


@cache
def known_hessian(name):
    """The mean Hessian of a model of the table, computed once."""
    model, batches = build(name)
    return dense_hessian(model, classify, batches)


def dense_hessian(model, loss_fn, batches):
    """The mean Hessian of a copy in float64, `(n, n)`, in the order of trainable parameters, a row at a time.

    Not `torch.func.hessian`: in jacrev, vmap over the backward pass of layer and batch norm (torch 2.15) gives a
    Hessian that is not symmetric, by 1% to 10%.
    """
    model = copy.deepcopy(model).double()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total = 0
    for batch in batches:
        with sdpa_kernel(SDPBackend.MATH):
            loss = loss_fn(model, tuple(t.double() if t.is_floating_point() else t for t in batch))
        found = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True, allow_unused=True)
        gradient = torch.cat([part.flatten() for part in found])
        rows = [
            torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True, allow_unused=True)
            if entry.requires_grad
            else [torch.zeros_like(parameter) for parameter in parameters]
            for entry in gradient
        ]
        total = total + torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    return total / len(batches)


def offsets(model):
    """Where each trainable parameter begins in a flat vector."""
    found, start = {}, 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[name] = start
            start += parameter.numel()
    return found


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def difference_of_gradients(model, loss_fn, batches, vector, step=1e-6):
    """The mean Hessian times a vector from gradients alone, `(g(w + s v) - g(w - s v)) / 2 s`; a model in float64."""

    def gradient(step):
        moved = copy.deepcopy(model)
        parameters = [parameter for parameter in moved.parameters() if parameter.requires_grad]
        with torch.no_grad():
            for parameter, part in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
                parameter.add_(part.view(parameter.shape), alpha=step)
        loss = sum(loss_fn(moved, batch) for batch in batches) / len(batches)
        found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([part.flatten() for part in found])

    return (gradient(step) - gradient(-step)) / (2 * step)
