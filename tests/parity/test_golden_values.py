"""The update against numbers that the authors' release computed once in float64."""

import pytest
import torch
from torch import nn

from lightning_adam_mini import AdamMini
from tiny_models import SeparateAttention

WEIGHT = [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [-0.1, -0.2, -0.3], [1, 2, 3]]
GRAD = [[0.1, -0.2, 0.3], [1, -2, 0.5], [0.01, 0.02, -0.03], [0, 0, 4]]
GRAD_SCALES = (1, -1, -1.5)

# Cut, weight decay, second moments and parameters after three steps.
GOLDEN = {
    "row": (
        0.1,
        [0.0095725, 0.35896875, 9.5725e-5, 1.094],
        [
            [0.0975885583, 0.2036240830, 0.2927656749],
            [0.3953527398, 0.5053984190, 0.5964775695],
            [-0.1018120405, -0.2036240810, -0.2927656780],
            [0.9970029990, 1.9940059980, 2.9831075830],
        ],
    ),
    "head": (
        0.1,
        [0.184270625, 0.5470478625],
        [
            [0.0992189893, 0.2003632210, 0.2976569679],
            [0.3939880936, 0.5081277116, 0.5957952464],
            [-0.0997282344, -0.1994564688, -0.2990170962],
            [0.9970029990, 1.9940059980, 2.9798351990],
        ],
    ),
    "whole": (
        0.1,
        [0.36565924375],
        [
            [0.0993586233, 0.2000839530, 0.2980758700],
            [0.3953844338, 0.5053350310, 0.5964934165],
            [-0.0997344676, -0.1994689351, -0.2989983967],
            [0.9970029990, 1.9940059980, 2.9773419339],
        ],
    ),
    "whole, no decay": (
        0.0,
        [0.36565924375],
        [
            [0.0996568656, 0.2006862687, 0.2989705969],
            [0.3965686563, 0.5068626874, 0.5982843281],
            [-0.1000343134, -0.2000686269, -0.2998970597],
            [1, 2, 2.9862746252],
        ],
    ),
    "element, no decay": (
        0.0,
        None,
        [
            [0.0954186533, 0.2045813469, 0.2954186530],
            [0.3954186528, 0.5045813472, 0.5954186529],
            [-0.1045813418, -0.2045813445, -0.2954186546],
            [1, 2, 2.9954186529],
        ],
    ),
}


def run_golden(case, **options):
    """Three steps on the query projection of an attention with two heads of two rows."""
    weight_decay, _, _ = GOLDEN[case]
    module = SeparateAttention(3, num_heads=2, num_key_value_heads=2).double()
    weight = module.q_proj.weight
    optimizer = AdamMini(
        module,
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=weight_decay,
        partition_overrides={"query": case.partition(",")[0]},
        **options,
    )
    weight.data = torch.tensor(WEIGHT, dtype=torch.float64)
    for scale in GRAD_SCALES:
        weight.grad = scale * torch.tensor(GRAD, dtype=torch.float64)
        optimizer.step()
    return weight, optimizer.state[weight]


def check_golden(case, **options):
    _, second_moments, parameters = GOLDEN[case]
    weight, state = run_golden(case, **options)
    if second_moments is not None:
        expected = torch.tensor(second_moments, dtype=torch.float64)
        torch.testing.assert_close(state["exp_avg_sq"].flatten(), expected, rtol=1e-9, atol=0)
    expected = torch.tensor(parameters, dtype=torch.float64)
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("implementation", ["reference", "foreach"])  # the kernels are for float32
@pytest.mark.parametrize("case", GOLDEN)
def test_golden_values(case, implementation):
    check_golden(case, implementation=implementation)


@pytest.mark.parametrize("case", GOLDEN)
def test_capturable_golden_values_to_the_precision_of_its_float32_step(case):
    weight, _ = run_golden(case, capturable=True)
    expected = torch.tensor(GOLDEN[case][2], dtype=torch.float64)
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-7)


def test_a_bias_of_the_same_values_is_cut_by_element():
    module = nn.Linear(1, 12).double()
    optimizer = AdamMini(module, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, partition="transformer")
    module.bias.data = torch.tensor(WEIGHT, dtype=torch.float64).flatten()
    for scale in GRAD_SCALES:
        module.bias.grad = scale * torch.tensor(GRAD, dtype=torch.float64).flatten()
        optimizer.step()
    expected = torch.tensor(GOLDEN["element, no decay"][2], dtype=torch.float64).flatten()
    torch.testing.assert_close(module.bias.detach(), expected, rtol=0, atol=1e-9)
