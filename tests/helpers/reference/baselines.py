"""The rules of the baselines, transcribed from their papers for one tensor.

Each function takes a tensor, its gradients in order, the learning rate of each step, and the weight decay, and returns
the tensor after all steps. They share nothing with the library or with any other; nothing is done in place.
"""

import itertools
import math

import torch


def sgd(p, gradients, rates, decay, *, momentum, nesterov=False):
    """Sutskever et al. 2013 in torch's form: the buffer sums gradients and the rate scales the buffer."""
    m = torch.zeros_like(p)
    for g, lr in zip(gradients, rates, strict=True):
        g = g + decay * p
        m = momentum * m + g
        p = p - lr * (g + momentum * m if nesterov else m)
    return p


def adam(p, gradients, rates, decay, *, betas, eps):
    """Kingma and Ba 2015, Algorithm 1, with an L2 term."""
    (beta1, beta2), m, v = betas, torch.zeros_like(p), torch.zeros_like(p)
    for t, (g, lr) in enumerate(zip(gradients, rates, strict=True), 1):
        g = g + decay * p
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        p = p - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
    return p


def adamw(p, gradients, rates, decay, *, betas, eps):
    """Loshchilov and Hutter 2019, Algorithm 2, where decay is scaled by the learning rate."""
    (beta1, beta2), m, v = betas, torch.zeros_like(p), torch.zeros_like(p)
    for t, (g, lr) in enumerate(zip(gradients, rates, strict=True), 1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        p = p - lr * ((m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps) + decay * p)
    return p


def lion(p, gradients, rates, decay, *, betas):
    """Chen et al. 2023, Algorithm 2."""
    (beta1, beta2), m = betas, torch.zeros_like(p)
    for g, lr in zip(gradients, rates, strict=True):
        c = beta1 * m + (1 - beta1) * g
        p = p - lr * (c.sign() + decay * p)
        m = beta2 * m + (1 - beta2) * g
    return p


def lamb(p, gradients, rates, decay, *, betas, eps, bias_correction=True):
    """You et al. 2020, Algorithm 2, with phi(z) = z."""
    (beta1, beta2), m, v = betas, torch.zeros_like(p), torch.zeros_like(p)
    for t, (g, lr) in enumerate(zip(gradients, rates, strict=True), 1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m_hat = m / (1 - beta1**t) if bias_correction else m
        v_hat = v / (1 - beta2**t) if bias_correction else v
        r = m_hat / (v_hat.sqrt() + eps) + decay * p
        ratio = p.norm() / r.norm() if p.norm() > 0 and r.norm() > 0 else 1.0
        p = p - lr * ratio * r
    return p


def novograd(p, gradients, rates, decay, *, betas, eps, grad_averaging=False):
    """Ginsburg et al. 2019, Algorithm 1, with eps at the first step too."""
    beta1, beta2 = betas
    for t, (g, lr) in enumerate(zip(gradients, rates, strict=True), 1):
        v = (g**2).sum() if t == 1 else beta2 * v + (1 - beta2) * (g**2).sum()  # noqa: F821
        d = g / (v.sqrt() + eps) + decay * p
        d = (1 - beta1) * d if grad_averaging else d
        m = d if t == 1 else beta1 * m + d  # noqa: F821
        p = p - lr * m
    return p


def factored(r, c):
    """The rank-one matrix R C / (1 R) of row means and column means, for the last two dimensions."""
    return r[..., :, None] * c[..., None, :] / r.mean(-1)[..., None, None]


def rms(x):
    return (x**2).mean().sqrt()


def adafactor(
    p,
    gradients,
    rates,
    decay,
    *,
    beta1,
    decay_rate=-0.8,
    beta2_cap=1.0,
    clip_threshold=1.0,
    eps1=1e-30,
    eps2=1e-3,
    relative_step=False,
    scale_parameter=False,
    warmup_init=False,
):
    """Shazeer and Stern 2018, Algorithms 4 and 5; momentum after clipping and rate, and decay, as released."""
    r = c = v = m = 0.0
    for t, (g, lr) in enumerate(zip(gradients, rates, strict=True), 1):
        if relative_step:
            lr = min(1e-6 * t if warmup_init else 1e-2, 1 / math.sqrt(t))
        if scale_parameter:
            lr = lr * max(eps2, rms(p).item())
        beta2 = min(1 - t**decay_rate, beta2_cap)
        squares = g**2 + eps1
        if p.dim() >= 2:
            r = beta2 * r + (1 - beta2) * squares.mean(-1)
            c = beta2 * c + (1 - beta2) * squares.mean(-2)
            v = factored(r, c)
        else:
            v = beta2 * v + (1 - beta2) * squares
        u = g / v.sqrt()
        u = lr * u / max(1.0, rms(u).item() / clip_threshold)
        if beta1 is not None:
            m = beta1 * m + (1 - beta1) * u
            u = m
        p = p - lr * decay * p - u
    return p


def came(p, gradients, rates, decay, *, betas, clip_threshold=1.0, eps1=1e-30, eps2=1e-16):
    """Luo et al. 2023, Algorithm 2; vectors, which it leaves out, have no confidence, as in the authors' code."""
    beta1, beta2, beta3 = betas
    m = torch.zeros_like(p)
    r = c = v = r_res = c_res = 0.0
    for g, lr in zip(gradients, rates, strict=True):
        squares = g**2 + eps1
        if p.dim() >= 2:
            r = beta2 * r + (1 - beta2) * squares.mean(-1)
            c = beta2 * c + (1 - beta2) * squares.mean(-2)
            v = factored(r, c)
        else:
            v = beta2 * v + (1 - beta2) * squares
        u = g / v.sqrt()
        u = u / max(1.0, rms(u).item() / clip_threshold)
        m = beta1 * m + (1 - beta1) * u
        update = m
        if p.dim() >= 2:
            instability = (u - m) ** 2 + eps2
            r_res = beta3 * r_res + (1 - beta3) * instability.mean(-1)
            c_res = beta3 * c_res + (1 - beta3) * instability.mean(-2)
            update = m / factored(r_res, c_res).sqrt()
        p = p - lr * decay * p - lr * update
    return p


def sm3(p, gradients, rates, decay, *, momentum):
    """Anil et al. 2019, Algorithm SM3-II, one element after another; a slice is an axis and an index."""
    shape = tuple(p.shape)
    elements = list(itertools.product(*map(range, shape)))
    slices = {i: list(enumerate(i)) or [(0, 0)] for i in elements}
    mu = {r: 0.0 for i in elements for r in slices[i]}
    m = torch.zeros_like(p)
    for g, lr in zip(gradients, rates, strict=True):
        u, new = torch.zeros_like(p), dict.fromkeys(mu, 0.0)
        for i in elements:
            nu = min(mu[r] for r in slices[i]) + g[i].item() ** 2
            u[i] = g[i] / math.sqrt(nu) if nu > 0 else 0.0
            for r in slices[i]:
                new[r] = max(new[r], nu)
        mu = new
        m = momentum * m + (1 - momentum) * u
        p = p - lr * decay * p - lr * m
    return p


def muon(p, gradients, rates, decay, *, momentum, orthogonalize, nesterov=True):
    """Jordan et al. 2024 with the rate of Liu et al. 2025, Eq. 4, for one matrix; the buffer averages, as in torch.

    `orthogonalize` is the Newton-Schulz iteration, which does not depend on the scale of the buffer.
    """
    m = torch.zeros_like(p)
    for g, lr in zip(gradients, rates, strict=True):
        m = momentum * m + (1 - momentum) * g
        u = (1 - momentum) * g + momentum * m if nesterov else m
        p = p - lr * decay * p - lr * 0.2 * math.sqrt(max(p.shape)) * orthogonalize(u)
    return p


def newton_schulz(g, steps=5):
    """Jordan et al. 2024: X <- a X + b (X X') X + c (X X')^2 X, from g over its Frobenius norm."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g / g.norm()
    for _ in range(steps):
        x = a * x + b * (x @ x.mT) @ x + c * (x @ x.mT) @ (x @ x.mT) @ x
    return x
