"""Adam-mini transcribed from Algorithm 1 of the paper (Zhang et al. 2024), one block after another.

It shares nothing with the library: blocks are lists of element numbers (positions in the flattened parameter) that the
tests write down by hand.
"""

import math

import torch


class NaiveAdamMini:
    """`blocks` and `weight_decay` by parameter name; every block has a scalar second moment of its own."""

    def __init__(self, parameters, blocks, *, lr, betas, eps, weight_decay):
        self.parameters = dict(parameters)
        self.blocks = blocks
        self.lr, (self.beta1, self.beta2), self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.state = {
            name: [{"t": 0, "m": torch.zeros(len(block), dtype=p.dtype), "v": 0.0} for block in blocks[name]]
            for name, p in self.parameters.items()
        }

    @torch.no_grad()
    def step(self):
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            p, g = parameter.detach().flatten(), parameter.grad.flatten()
            for block, state in zip(self.blocks[name], self.state[name], strict=True):
                p[block] = self._updated(p[block], g[block], state, self.weight_decay[name])
            parameter.copy_(p.view_as(parameter))

    def _updated(self, p, g, state, weight_decay):
        state["t"] += 1
        p = p - self.lr * weight_decay * p
        state["m"] = (1 - self.beta1) * g + self.beta1 * state["m"]
        m_hat = state["m"] / (1 - self.beta1 ** state["t"])
        state["v"] = (1 - self.beta2) * (g * g).mean().item() + self.beta2 * state["v"]
        v_hat = state["v"] / (1 - self.beta2 ** state["t"])
        return p - self.lr * m_hat / (math.sqrt(v_hat) + self.eps)


def rows(shape, size=1, axis=0, start=0, stop=None):
    """Blocks of `size` consecutive rows of `axis`, from row `start` to row `stop`."""
    numbers = torch.arange(math.prod(shape)).view(shape).movedim(axis, 0)
    return [block.flatten() for block in numbers[start:stop].split(size)]


def whole(shape):
    return [torch.arange(math.prod(shape))]


def elements(shape):
    return list(torch.arange(math.prod(shape)).split(1))
