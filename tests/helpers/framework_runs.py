"""What runs of other frameworks share: the same optimizers, batches that follow from the step, and whole weights."""

import torch
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

from lightning_adam_mini import AdamMini
from tiny_models import VOCAB

STEPS, SAVED, ROWS, LENGTH = 6, 3, 4, 8


def adamw(model):
    return torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1, foreach=False)


def element(model):
    return AdamMini(model, 1e-2, weight_decay=0.1, partition="element", weight_decay_policy="all")


def factored(model):
    return AdamMini(model, 1e-2, weight_decay=0.1, partition="factored")


def loss_of(wrapped, step, rank, world):
    """The loss of a step on this rank's part of its batch."""
    tokens = torch.randint(VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))
    mine = tokens[rank * ROWS // world : (rank + 1) * ROWS // world]
    logits = wrapped(input_ids=mine[:, :-1]).logits
    return cross_entropy(logits.flatten(0, 1), mine[:, 1:].flatten())


def whole(model):
    """Copies of the weights, gathered from their shards."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }
