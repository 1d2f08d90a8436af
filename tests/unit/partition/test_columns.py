"""Blocks of one column, an input: on every kind of matrix, and what has no columns."""

import pytest
import torch
from torch import nn

import tiny_models
from lightning_adam_mini import AdamMini, Blocks, explain, partition_module, verify_partition
from lightning_adam_mini.partition import Role, Strategy, Structure
from tiny_models import DIM, HIDDEN, VOCAB


def blocks_of(model, overrides, strategy="transformer"):
    return {name: found.blocks for name, found in partition_module(model, strategy, overrides).items()}


@pytest.mark.parametrize(
    ("layer", "shape", "axis"),
    [
        (nn.Linear(3, 5), (5, 3), 1),
        (nn.Embedding(5, 3), (5, 3), 1),
        (nn.Conv2d(3, 5, 2), (5, 3, 2, 2), 1),
        (nn.Conv2d(1, 5, 2), (5, 1, 2, 2), 1),
        (nn.Conv2d(4, 6, 2, groups=2), (6, 2, 2, 2), 1),
        (nn.ConvTranspose2d(3, 5, 2), (3, 5, 2, 2), 0),
    ],
    ids=str,
)
def test_a_column_is_an_input(layer, shape, axis):
    found = partition_module(layer, "default", {"weight": "column"})["weight"]
    assert found.structure == "column"
    assert found.blocks == Blocks.rows(shape, axis=axis)
    assert found.blocks.num_values == shape[axis]


def test_matrices_that_are_stored_transposed():
    found = blocks_of(tiny_models.gpt2(), {"mlp": "column", "attention_output": "column"})
    assert found["transformer.h.0.mlp.c_fc.weight"] == Blocks.rows((DIM, HIDDEN), axis=0)
    assert found["transformer.h.0.mlp.c_proj.weight"] == Blocks.rows((HIDDEN, DIM), axis=0)
    assert found["transformer.h.0.attn.c_proj.weight"] == Blocks.rows((DIM, DIM), axis=0)


def test_experts_share_no_column():
    found = blocks_of(tiny_models.mixtral(), {"expert": "column"})
    assert found["model.layers.0.mlp.experts.down_proj"] == Blocks.rows((3, DIM, HIDDEN), axis=2, batch_axes=(0,))


def test_position_tables_with_a_first_axis_of_one():
    model = pytest.importorskip("timm").create_model("vit_tiny_patch16_224")
    found = blocks_of(model, {"position_embedding": "column"})
    assert found["pos_embed"] == Blocks.rows((1, 197, 192), axis=2, batch_axes=(0,))


def test_parts_of_a_fused_matrix_have_the_same_inputs():
    model = tiny_models.attention()
    fused = dict.fromkeys(("query", "key", "value"), "column")
    assert blocks_of(model, fused)["in_proj_weight"] == Blocks.rows((3 * DIM, DIM), axis=1)
    with pytest.raises(ValueError, match=r"in_proj_weight: the parts .* cannot combine column") as error:
        partition_module(model, "transformer", {"value": "column"})
    assert "\n" not in str(error.value)


def test_a_vector_has_no_columns():
    with pytest.raises(ValueError, match=r"bias: a parameter of shape \(5,\) has no columns; override .*'element'"):
        AdamMini(nn.Linear(3, 5), partition_overrides={"bias": "column"})
    assert blocks_of(nn.Linear(3, 5), {}, Strategy("columns", {}, Structure.COLUMN))["bias"] == Blocks.element((5,))


@pytest.mark.parametrize("name", ["reference", "foreach", "fused"])
def test_it_is_the_transposed_matrix_by_row(name):
    wide, tall = nn.Linear(7, 5, bias=False), nn.Linear(5, 7, bias=False)
    tall.weight.data.copy_(wide.weight.detach().t())
    columns = AdamMini(wide, partition="default", partition_overrides={"weight": "column"}, implementation=name)
    rows = AdamMini(tall, partition="default", partition_overrides={"weight": "row"}, implementation=name)
    for step in range(3):
        grad = torch.randn(5, 7, generator=torch.Generator().manual_seed(step))
        wide.weight.grad, tall.weight.grad = grad, grad.t().contiguous()
        columns.step()
        rows.step()
    torch.testing.assert_close(wide.weight, tall.weight.t(), rtol=1e-6, atol=1e-7)
    state, other = columns.state[wide.weight], rows.state[tall.weight]
    assert state["exp_avg_sq"].shape == (1, 7)
    torch.testing.assert_close(state["exp_avg_sq"], other["exp_avg_sq"].t(), rtol=1e-6, atol=0)


def test_the_published_table_of_slimadam():
    found = partition_module(tiny_models.llama(), "slimadam")
    shapes = {name.split(".")[-2]: cut.blocks.state_shapes["exp_avg_sq"] for name, cut in found.items()}
    assert shapes["q_proj"] == (DIM, 1)
    assert shapes["v_proj"] == shapes["o_proj"] == shapes["gate_proj"] == (1, DIM)
    assert shapes["down_proj"] == (1, HIDDEN)
    assert shapes["embed_tokens"] == shapes["lm_head"] == (VOCAB, 1)
    assert shapes["input_layernorm"] == (DIM,)


def test_slimadam_takes_rows_where_a_fused_matrix_has_one_axis():
    found = partition_module(tiny_models.gpt2(), "slimadam")["transformer.h.0.attn.c_attn.weight"]
    assert (found.structure, found.blocks) == ("row", Blocks.rows((DIM, 3 * DIM), axis=1))


def test_columns_of_roles_in_a_strategy_of_ones_own():
    strategy = Strategy("mine", {Role.MLP: Structure.COLUMN}, otherwise=Structure.ELEMENT)
    found = partition_module(tiny_models.encoder_layer(), strategy)
    assert found["linear1.weight"].blocks == Blocks.rows((HIDDEN, DIM), axis=1)
    assert found["linear1.bias"].blocks == Blocks.element((HIDDEN,))


def test_explain_names_them():
    table = explain(tiny_models.llama(), "transformer", {"mlp": "column"}).table(full=True)
    assert "column" in table


def test_a_forward_pass_confirms_them():
    columns = dict.fromkeys(("mlp", "attention_output", "value", "token_embedding", "output_head"), "column")
    tokens = torch.randint(VOCAB, (2, 4))
    for model, partition, overrides in (
        (tiny_models.llama(), "transformer", columns),
        (tiny_models.gpt2(), "slimadam", {}),
    ):
        found = verify_partition(model, tokens, partition=partition, partition_overrides=overrides)
        assert {p.status for name, p in found.parameters.items() if "norm" not in name and "ln_" not in name} == {
            "confirmed"
        }
