"""What holds for the update whatever the numbers."""

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_adam_mini import AdamMini, Blocks
from lightning_adam_mini.measure import adamw_state_bytes, optimizer_state_bytes
from lightning_adam_mini.optim import update
from lightning_adam_mini.optim.shards import Shard
from lightning_adam_mini.optim.state import init_state
from lightning_adam_mini.optim.update import ParameterView, StepOptions
from lightning_adam_mini.partition import STRATEGIES
from tiny_models import SeparateAttention

OPTIONS = StepOptions(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
implementations = st.sampled_from(["reference", "foreach"])
seeds = st.integers(0, 2**32 - 1)


def three_steps(blocks, param, grads, implementation="reference", **options):
    """The parameter after three steps with the given gradients."""
    param = param.clone()
    state = init_state(param, blocks, exp_avg_dtype=None, capturable=False)
    moments = tuple(state[key] for key in blocks.state_shapes)
    for grad in grads:
        tensor = ParameterView(param, grad.clone(), Shard(blocks), state["step"], state["exp_avg"], moments)
        if implementation == "foreach":
            update.foreach_([tensor], replace(OPTIONS, **options))
        else:
            update.reference_([tensor], replace(OPTIONS, **options))
    return param


def draw_tensors(seed, shape, count=4):
    generator = torch.Generator().manual_seed(seed)
    param, *grads = torch.randn((count, *shape), generator=generator, dtype=torch.float64)
    return param, grads


@given(seeds, st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), implementations, st.randoms())
def test_permuting_blocks_commutes_with_the_update(seed, num_blocks, block_size, width, implementation, random):
    blocks = Blocks.rows((num_blocks * block_size, width), block_size=block_size)
    param, grads = draw_tensors(seed, blocks.shape)
    order = list(range(num_blocks))
    random.shuffle(order)

    def permuted(tensor):
        return tensor.unflatten(0, (num_blocks, block_size))[order].flatten(0, 1)

    after = permuted(three_steps(blocks, param, grads, implementation))
    before = three_steps(blocks, permuted(param), [permuted(grad) for grad in grads], implementation)
    torch.testing.assert_close(before, after, rtol=1e-12, atol=1e-12)


@given(seeds, implementations)
def test_permuting_inside_a_block_commutes_with_the_update(seed, implementation):
    blocks = Blocks.rows((4, 6), block_size=2)
    param, grads = draw_tensors(seed, blocks.shape)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))

    def permuted(tensor):
        return tensor.unflatten(0, (2, 2)).flatten(1)[:, order].view(4, 6)

    after = permuted(three_steps(blocks, param, grads, implementation))
    before = three_steps(blocks, permuted(param), [permuted(grad) for grad in grads], implementation)
    torch.testing.assert_close(before, after, rtol=1e-12, atol=1e-12)


def test_permuting_across_blocks_does_not():
    blocks = Blocks.rows((4, 6), block_size=2)
    param, grads = draw_tensors(0, blocks.shape)
    order = [0, 2, 1, 3]
    after = three_steps(blocks, param, grads)[order]
    before = three_steps(blocks, param[order], [grad[order] for grad in grads])
    assert not torch.allclose(before, after, rtol=1e-6, atol=1e-6)


CUTS = [
    Blocks.element((4, 6)),
    Blocks.whole((4, 6)),
    Blocks.rows((4, 6)),
    Blocks.rows((4, 6), axis=1, block_size=3),
    Blocks.factored((4, 6)),
]


@given(seeds, st.sampled_from(CUTS), st.floats(1e-6, 1e6), implementations)
def test_the_scale_of_gradients_does_not_matter(seed, blocks, scale, implementation):
    param, grads = draw_tensors(seed, blocks.shape)
    expected = three_steps(blocks, param, grads, implementation, eps=0.0)
    scaled = three_steps(blocks, param, [scale * grad for grad in grads], implementation, eps=0.0)
    torch.testing.assert_close(scaled, expected, rtol=1e-9, atol=1e-9)


@given(seeds, st.sampled_from(CUTS))
def test_the_scale_of_one_step_does(seed, blocks):
    """The test above can fail: moments remember the scale of the steps before."""
    param, grads = draw_tensors(seed, blocks.shape)
    expected = three_steps(blocks, param, grads, eps=0.0)
    changed = three_steps(blocks, param, [grads[0], 10 * grads[1], grads[2]], eps=0.0)
    assert not torch.allclose(changed, expected, rtol=1e-9, atol=1e-9)


@given(seeds, implementations)
def test_factored_equals_element_on_a_rank_one_gradient(seed, implementation):
    """The same gradient three times, its square an outer product: nothing is lost. None is far below the others."""
    param, _ = draw_tensors(seed, (4, 6))
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.rand(n, generator=generator, dtype=torch.float64) + 2.0 for n in (4, 6))
    grads = [torch.outer(rows, columns)] * 3
    expected = three_steps(Blocks.element((4, 6)), param, grads, implementation)
    actual = three_steps(Blocks.factored((4, 6)), param, grads, implementation)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@given(seeds, implementations, st.integers(0, 23), st.floats(0, 150))
def test_one_huge_gradient_does_not_hurt_the_other_elements_of_a_factored_matrix(seed, implementation, place, exponent):
    """It does without the floor: by `10**exponent` times the learning rate."""
    param, grads = draw_tensors(seed, (4, 6))
    grads = [grad.sign() * (0.5 + torch.rand_like(grad)) for grad in grads]
    grads[1].view(-1)[place] *= 10**exponent
    options = {"beta2": 0.999, "weight_decay": 0.0}
    before = three_steps(Blocks.factored((4, 6)), param, grads[:1], implementation, **options)
    after = three_steps(Blocks.factored((4, 6)), param, grads, implementation, **options)
    moves = (after - before).abs().view(-1)
    others = torch.arange(24) != place
    assert moves[others].max() < 2 * OPTIONS.lr * 1.5 / (0.5 * 0.3**0.5)
    assert moves.isfinite().all()


@given(
    strategy=st.sampled_from([*STRATEGIES]),
    heads=st.integers(1, 3),
    groups=st.integers(1, 2),
    head_dim=st.integers(1, 3),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    exp_avg_dtype=st.sampled_from([None, torch.bfloat16, torch.float32]),
)
@settings(max_examples=30)
def test_state_bytes_match_the_formula(strategy, heads, groups, head_dim, dtype, exp_avg_dtype):
    attention = SeparateAttention(6, head_dim=head_dim, num_heads=heads * groups, num_key_value_heads=groups)
    module = nn.Sequential(nn.Embedding(5, 6), attention, nn.Linear(6, 3), nn.LayerNorm(3)).to(dtype)
    optimizer = AdamMini(module, partition=strategy, exp_avg_dtype=exp_avg_dtype)
    wide = torch.promote_types(dtype, torch.float32)
    expected = sum(
        parameter.numel() * (exp_avg_dtype or dtype).itemsize + optimizer.partition[name].blocks.num_bytes(wide) + 4
        for name, parameter in module.named_parameters()
    )
    assert optimizer_state_bytes(optimizer) == expected
    if strategy == "element" and dtype == wide and exp_avg_dtype is None:
        assert expected == adamw_state_bytes(module.parameters())
