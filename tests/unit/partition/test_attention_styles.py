"""Attention in classes of one's own: each projection is right, or a warning or a refusal names it."""

import ast
import re
import warnings

import pytest
from torch import nn

from attention_styles import STYLES, Attention
from lightning_adam_mini import AdamMini, partition_module
from lightning_adam_mini.blocks import Kind
from lightning_adam_mini.partition import resolve_strategy


@pytest.fixture(params=STYLES)
def style(request):
    return STYLES[request.param]


def described(partition, names):
    return {name: (partition[name].role.name, partition[name].blocks.num_values) for name in names}


def advised(message, argument):
    """The dictionaries that a message advises for an argument."""
    return [ast.literal_eval(told) for told in re.findall(rf"{argument}=(\{{.*?\}})", message)]


def test_there_are_forty():
    assert len(STYLES) >= 40


def test_every_style_is_a_transformer(style):
    assert resolve_strategy("auto", style.build()).name == "transformer"


def messages_of(module):
    """The optimizer's partition, or None, and what a warning or a refusal says."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            partition = AdamMini(module).partition
        except ValueError as error:
            return None, str(error)
    return partition, " ".join(str(warning.message) for warning in caught)


def test_each_projection_is_right_or_named(style):
    partition, told = messages_of(style.build())
    if partition is None:
        assert style.outcome == "refused"
        # All that need an order or a number of heads are named at once.
        headless = {"query", "key"} if "has neither" in told else set()
        unclear = {name for name, (role, _) in style.truth.items() if "+" in role or role in headless}
        assert {name for name in style.truth if f"{name}: " in told} == unclear
        return
    wrong = {n: found for n, found in described(partition, style.truth).items() if found != style.truth[n]}
    assert style.outcome == ("named" if wrong else "right")
    assert bool(wrong) == bool(told)
    for name in wrong:
        assert name in told
        assert partition[name].blocks.kind is Kind.ELEMENT


@pytest.mark.parametrize("name", [name for name, style in STYLES.items() if style.layout])
def test_the_layout_that_a_user_names_settles_a_style(name):
    style = STYLES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        partition = AdamMini(style.build(), partition_layouts={"Attention": style.layout}).partition
    assert described(partition, style.truth) == style.truth


@pytest.mark.parametrize("name", [name for name, style in STYLES.items() if style.outcome != "right"])
def test_what_a_message_advises_is_accepted(name):
    style, module = STYLES[name], STYLES[name].build()
    _, message = messages_of(module)
    overrides, orders = advised(message, "partition_overrides"), advised(message, "partition_layouts")
    assert overrides
    for given in overrides:
        partition_module(module, "transformer", given)
    for given in orders:
        partition = partition_module(module, "transformer", layouts=given)
        assert all(not cut.role.problem for cut in partition.values())
    if style.outcome == "refused" and isinstance(style.layout, str):
        assert style.layout in message


def test_layers_of_a_whole_model_are_named_at_once():
    model = nn.Sequential(*(Attention(**{f"{n}_qkv": nn.Linear(8, 24), "num_heads": 2}) for n in ("a", "b", "a")))
    model.append(Attention(query=nn.Linear(8, 8), key=nn.Linear(8, 8), value=nn.Linear(8, 8)))
    with pytest.raises(ValueError, match="no layout knows") as error:
        AdamMini(model)
    for name in ("0.a_qkv", "1.b_qkv", "2.a_qkv", "3.query", "3.key"):
        assert f"{name}.weight" in str(error.value)
