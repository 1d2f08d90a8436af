"""Steps on tensors that were exchanged since the last one: what `test_boundary.py` runs in processes of their own.

    python step_fuzz.py SEED COUNT FILE

An example trains one small model twice, by `reference` and by another implementation, puts other memory in the place of
parameters, gradients and states between the steps, and steps on. Both must do the same: the same numbers, or a
ValueError each, after which nothing has changed. FILE gets a line for each example that held.
"""

import copy
import random
import sys
import warnings
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import nn

from lightning_adam_mini import AdamMini

SHAPES = [(3, 5), (64, 65), (7,), (1, 9), (5, 1), (2, 3, 4), (0, 4), (70, 130), ()]
PARTITIONS = ["default", "element", "transformer", "factored"]
FORMATS = [{}, {}, {}, {"exp_avg_dtype": torch.uint8}, {"exp_avg_dtype": torch.bfloat16}]
# Numbers that are stored in few bits are rounded by each implementation at its own places.
FINE, COARSE = {"rtol": 1e-4, "atol": 1e-4}, {"rtol": 3e-2, "atol": 3e-2}


class Model(nn.Module):
    """Parameters of any shape, and a linear layer, which is cut by rows where the partition says so."""

    def __init__(self, chance, dtype):
        super().__init__()
        for number in range(chance.randint(1, 2)):
            self.register_parameter(f"p{number}", nn.Parameter(torch.randn(chance.choice(SHAPES), dtype=dtype)))
        self.linear = nn.Linear(66, 64, dtype=dtype)


def random_like(chance, tensor):
    generator = torch.Generator().manual_seed(chance.randrange(2**31))
    numbers = torch.randn(tensor.shape, generator=generator, dtype=torch.float32, device="cpu")
    return numbers.to(tensor.device, tensor.dtype)


# What is put in the place of a tensor.


def another_shape(chance, data):
    if not data.dim() or not data.numel() or chance.random() < 0.2:
        return torch.zeros(chance.choice(SHAPES), dtype=data.dtype, device=data.device)
    axis = chance.randrange(data.dim())
    length = chance.randint(0, data.shape[axis] + 2)
    longer = torch.cat([data, data, data], axis) if length > data.shape[axis] else data
    return longer.narrow(axis, chance.randint(0, longer.shape[axis] - length), length)


def other_strides(chance, data):
    flat, numel = data.reshape(-1), data.numel()
    ways = [
        lambda: data.mT if data.dim() >= 2 else data,
        lambda: data.mT.contiguous().mT if data.dim() >= 2 else data,
        lambda: torch.stack([data, data], -1)[..., 1],
        lambda: torch.cat([flat.new_zeros(3), flat, flat.new_zeros(2)])[3 : 3 + numel].view(data.shape),
        lambda: flat[:1].expand(numel).view(data.shape) if data.dim() < 2 and numel else data[:1].expand(data.shape),
        lambda: flat.new_zeros(numel + 5).as_strided(data.shape, [1] * data.dim()),
        data.clone,
    ]
    return chance.choice(ways)()


def another_dtype(chance, data):
    return data.to(chance.choice([torch.float64, torch.bfloat16, torch.float16, torch.float32]))


def another_device(chance, data):
    return data.to("meta")


def put(tensor, data):
    """As `tensor.data = data`; between devices, as torch's modules may do it."""
    if data.device == tensor.device:
        tensor.data = data
    elif isinstance(tensor, nn.Parameter):
        torch.utils.swap_tensors(tensor, nn.Parameter(data))


# What happens between two steps.


def other_parameter(chance, optimizer, params):
    param = chance.choice(params)
    put(param, chance.choice([another_shape, other_strides, another_dtype, another_device])(chance, param.data))
    if chance.random() < 0.7:
        param.grad = None
        param.grad = random_like(chance, param)


def other_gradient(chance, optimizer, params):
    param = chance.choice(params)
    new = chance.choice([another_shape, other_strides, another_dtype, another_device])(
        chance, random_like(chance, param)
    )
    param.grad = None
    param.grad = torch.zeros_like(param)
    put(param.grad, new)


def other_state(chance, optimizer, params):
    state = optimizer.state[chance.choice(params)]
    key = chance.choice(sorted(state))
    new = chance.choice([another_shape, other_strides])(chance, state[key])
    if chance.random() < 0.5:
        state[key] = new
    else:
        put(state[key], new)


def another_size_of_the_storage(chance, optimizer, params):
    param = chance.choice(params)
    target = param if param.grad is None or chance.random() < 0.5 else param.grad
    if not target.is_meta:
        for _ in range(chance.randint(1, 2)):
            size = target.untyped_storage().nbytes()
            target.untyped_storage().resize_(chance.choice([0, 4, size // 2]))
        target.untyped_storage().fill_(0)  # it may be whole again, with whatever lay there


def one_buffer(chance, optimizer, params):
    """All parameters are views of one, and may share elements."""
    overlap, offset = chance.choice([0, 0, 1, 7]), 0
    buffer = torch.linspace(-1, 1, 30000, dtype=torch.float32, device="cpu")
    views = {dtype: buffer.to(dtype) for dtype in {param.dtype for param in params}}
    for param in params:
        if not param.is_meta:
            put(param, views[param.dtype][offset : offset + param.numel()].view(param.shape))
            offset = max(offset + param.numel() - overlap, 0)


def the_gradient_is_the_parameter(chance, optimizer, params):
    param = chance.choice(params)
    param.grad = None
    param.grad = param.detach()


def a_sign_that_is_not_in_memory(chance, optimizer, params):
    param = chance.choice(params)
    if param.dtype is torch.float32 and not param.is_meta:
        pairs = torch.stack([random_like(chance, param), random_like(chance, param)], -1)
        param.grad = torch.view_as_complex(pairs).conj().imag


EVENTS = [other_parameter] * 3 + [other_gradient] * 3
EVENTS += [other_state, another_size_of_the_storage, one_buffer, the_gradient_is_the_parameter]
EVENTS += [a_sign_that_is_not_in_memory]


def states_of(optimizer, params):
    """The tensors of all states, by what they are and under which keys."""
    tensors = [(key, tensor) for param in params for key, tensor in optimizer.state[param].items()]
    return tensors, [(key, id(tensor)) for key, tensor in tensors]


def contents(optimizer, params):
    """Copies of all that a step may change; shapes alone, where there is no memory for them."""
    kept = []
    for tensor in (tensor for param in params for tensor in (param, *optimizer.state[param].values())):
        is_there = not tensor.is_meta and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()
        kept.append((tuple(tensor.shape), tensor.dtype, tensor.detach().clone() if is_there else None))
    return kept


def assert_same(found, expected, **tolerances):
    assert [entry[:2] for entry in found] == [entry[:2] for entry in expected]
    for (_, dtype, x), (_, _, y) in zip(found, expected, strict=True):
        assert (x is None) is (y is None)
        if x is None:
            continue
        if dtype is torch.uint8:  # a code beside the border to the next
            x, y, own = x.float(), y.float(), {"rtol": 0, "atol": 8 if tolerances["atol"] else 0}
        else:
            own = tolerances
        torch.testing.assert_close(x, y, equal_nan=True, **own)


def train(module, chance, implementation, partition, formats):
    """Five steps, with exchanges before the third and the fourth.

    Returns:
        What was refused; what there is in the end; and the fewest bytes of a number that was stepped on the way.
    """
    params = list(module.parameters())
    optimizer = AdamMini(module, lr=0.1, eps=1e-2, partition=partition, implementation=implementation, **formats)
    itemsize = 8
    for number in range(5):
        for param in params:
            if number == 0 or param.grad is None or chance.random() < 0.6:
                param.grad = None
                param.grad = random_like(chance, param)
        if number in (2, 3):
            chance.choice(EVENTS)(chance, optimizer, params)
        before, (kept, states) = contents(optimizer, params), states_of(optimizer, params)
        itemsize = min(itemsize, *(dtype.itemsize for _, dtype, _ in before))
        try:
            optimizer.step()
        except ValueError as error:
            assert states_of(optimizer, params)[1] == states, f"{len(kept)} tensors, and others now"
            assert_same(contents(optimizer, params), before, rtol=0, atol=0)
            return str(error), [], itemsize
    return None, contents(optimizer, params), itemsize


def example(chance):
    warnings.simplefilter("ignore")
    dtype = chance.choice([torch.float32, torch.float32, torch.bfloat16])
    formats = dict(chance.choice(FORMATS))
    if torch.bfloat16 in (dtype, formats.get("exp_avg_dtype")) and chance.random() < 0.5:
        formats["stochastic_rounding"] = True
    partition, implementation = chance.choice(PARTITIONS), chance.choice([None, "fused", "foreach"])
    torch.manual_seed(chance.randrange(2**31))
    module, seed_of_events = Model(chance, dtype), chance.random()
    default_dtype = chance.choice([torch.float32, torch.float64, torch.bfloat16, torch.float16])
    default_device = chance.choice(["cpu", "meta"])
    try:
        torch.set_default_dtype(default_dtype)
        torch.set_default_device(default_device)
        (refused, expected, itemsize), (refused_too, found, _) = (
            train(copy.deepcopy(module), random.Random(seed_of_events), how, partition, formats)
            for how in ("reference", implementation)
        )
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert (refused is None) is (refused_too is None), f"reference: {refused}; {implementation}: {refused_too}"
    is_fine = dtype is torch.float32 and not formats and itemsize >= 4
    assert_same(found, expected, **(FINE if is_fine else COARSE))


def main():
    first, count, file = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    with file.open("w") as done:

        @seed(first)
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.randoms(use_true_random=True))
        def run(chance):
            example(chance)
            done.write("held\n")
            done.flush()

        run()


if __name__ == "__main__":
    main()
