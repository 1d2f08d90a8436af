"""AdamMini beside the naive transcription, with the blocks of each model written down by hand."""

import tiny_models
from lightning_adam_mini import AdamMini
from reference.naive import NaiveAdamMini, elements, rows, whole
from tiny_models import DIM

OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-3}
WEIGHT_DECAY = 0.1


def fused(axis):
    """Query, key and value behind one another: 4 heads of 2 rows, again 4, and 8 rows of values."""
    return lambda shape: rows(shape, 2, axis, 0, 2 * DIM) + rows(shape, 1, axis, 2 * DIM, 3 * DIM)


def heads_of(size):
    return lambda shape: rows(shape, size)


def output_columns(shape):
    """Rows of the output neurons of a Conv1D, which holds its weight transposed."""
    return rows(shape, axis=1)


BIAS = {".bias": elements}
LLAMA = {
    **BIAS,
    "embed_tokens.weight": rows,
    "q_proj.weight": heads_of(2),
    "k_proj.weight": heads_of(2),
    "v_proj.weight": rows,
    "o_proj.weight": rows,
    "gate_proj.weight": rows,
    "up_proj.weight": rows,
    "down_proj.weight": rows,
    "norm.weight": whole,
    "lm_head.weight": rows,
}
ATTENTION = {"in_proj_weight": fused(0), "in_proj_bias": elements, "out_proj.weight": rows, "out_proj.bias": elements}

# A model, and how to cut the parameters whose names end so; each name has one ending that is here.
MODELS = {
    "gpt2": (
        tiny_models.gpt2,
        {
            **BIAS,
            "wte.weight": rows,
            "wpe.weight": rows,
            "ln_1.weight": whole,
            "ln_2.weight": whole,
            "ln_f.weight": whole,
            "attn.c_attn.weight": fused(1),
            "attn.c_proj.weight": output_columns,
            "mlp.c_fc.weight": output_columns,
            "mlp.c_proj.weight": output_columns,
        },
    ),
    "llama": (lambda: tiny_models.llama(attention_bias=True, mlp_bias=True), LLAMA),
    "llama, tied": (lambda: tiny_models.llama(tie_word_embeddings=True), LLAMA),
    "qwen3": (tiny_models.qwen3, {**LLAMA, "q_proj.weight": heads_of(6), "k_proj.weight": heads_of(6)}),
    "attention": (tiny_models.attention, ATTENTION),
    "cross-attention": (
        tiny_models.cross_attention,
        {**ATTENTION, "q_proj_weight": heads_of(2), "k_proj_weight": heads_of(2), "v_proj_weight": rows},
    ),
    "encoder layer": (
        tiny_models.encoder_layer,
        {
            **ATTENTION,
            "linear1.weight": rows,
            "linear2.weight": rows,
            "norm1.weight": whole,
            "norm2.weight": whole,
            "linear1.bias": elements,
            "linear2.bias": elements,
            "norm1.bias": elements,
            "norm2.bias": elements,
        },
    ),
    "resnet18": (tiny_models.resnet18, {"weight": whole, "bias": whole}),
}


def by_hand(module, endings):
    """The blocks of each parameter."""
    blocks = {}
    for name, parameter in module.named_parameters():
        (cut,) = {cut for ending, cut in endings.items() if name.endswith(ending)}
        blocks[name] = cut(parameter.shape)
    return blocks


def twins(factory):
    """Two equal models in float64."""
    first, second = factory().double(), factory().double()
    tiny_models.randomize(first)
    second.load_state_dict(first.state_dict())
    return first, second


def lockstep(factory, endings, *, steps=3, **options):
    """The parameters of both after some steps, by name."""
    ours, naive = twins(factory)
    optimizer = AdamMini(ours, weight_decay=WEIGHT_DECAY, **OPTIONS, **options)
    weight_decay = {name: WEIGHT_DECAY if p.dim() >= 2 else 0.0 for name, p in naive.named_parameters()}
    reference = NaiveAdamMini(naive.named_parameters(), by_hand(naive, endings), weight_decay=weight_decay, **OPTIONS)
    for _ in range(steps):
        tiny_models.set_gradients(ours, naive)
        optimizer.step()
        reference.step()
    return dict(ours.named_parameters()), dict(naive.named_parameters())
