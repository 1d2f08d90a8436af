"""Small models laid out over ranks, and their training: what tests of sharding have in common."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import tiny_models

NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
BATCH = 12


class Convolutions(nn.Module):
    """Convolutions, norms, a transposed convolution and a head, whose output channels no number of ranks divides."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 5, 3), nn.GroupNorm(1, 5), nn.ConvTranspose2d(5, 3, 2), nn.Flatten())
        self.head = nn.Linear(3 * 5 * 5, tiny_models.VOCAB)

    def forward(self, tokens):
        images = F.one_hot(tokens.repeat(1, 2)[:, :6] % 6, 6).float().unsqueeze(1)
        return self.head(self.layers(images))


MODELS = {
    "llama": tiny_models.llama,
    "3 heads": lambda: tiny_models.llama(hidden_size=12, num_attention_heads=3, num_key_value_heads=3),
    "14 heads": lambda: tiny_models.llama(hidden_size=28, num_attention_heads=14, num_key_value_heads=2),
    "gpt2": lambda: tiny_models.gpt2(**NO_DROPOUT),
    "experts": tiny_models.mixtral,
    "convolutions": Convolutions,
}


def build(name):
    torch.manual_seed(0)
    return MODELS[name]()


def layers(model):
    """The repeated blocks that are wrapped one by one."""
    return [block for module in model.modules() if isinstance(module, nn.ModuleList) for block in module]


def shard(model, mesh):
    """FSDP2, or HSDP on a mesh of two dimensions."""
    for layer in layers(model):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def split_tensors(model, mesh):
    """Tensor parallelism of a Llama: heads and hidden units over the ranks."""
    columns = dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ColwiseParallel)
    rows = dict.fromkeys(("o_proj", "down_proj"), RowwiseParallel)
    for layer in layers(model):
        plan = {
            name: (columns | rows)[name.rpartition(".")[2]]() for name, _ in layer.named_modules() if "_proj" in name
        }
        parallelize_module(layer, mesh, plan)
    return model


def wrap(model, strategy=ShardingStrategy.FULL_SHARD, **options):
    """The first FSDP."""
    kinds = tuple({type(layer) for layer in layers(model)})
    return FullyShardedDataParallel(
        model,
        use_orig_params=True,
        device_id=torch.device("cpu"),
        sharding_strategy=strategy,
        auto_wrap_policy=lambda module, recurse, nonwrapped_numel: recurse or isinstance(module, kinds),
        **options,
    )


def lay_out(model, layout, world):
    """A model on all ranks; its layout, the number of parts of the batch, and which of them is this rank's."""
    rank = torch.distributed.get_rank()
    if layout == "fsdp2":
        return shard(model, init_device_mesh("cpu", (world,))), world, rank
    if layout == "hsdp":
        return (
            shard(model, init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))),
            world,
            rank,
        )
    if layout == "tp":
        return split_tensors(model, init_device_mesh("cpu", (world,))), 1, 0
    if layout == "fsdp2 x tp":
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tensor"))
        split_tensors(model, mesh["tensor"])
        return shard(model, mesh["data"]), world // 2, mesh["data"].get_local_rank()
    assert layout == "fsdp1"
    return wrap(model), world, rank


def train(model, optimizer, steps, *, parts=1, part=0, start=0):
    """Steps on random tokens: this part of each batch, of which gradients are means."""
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, tiny_models.VOCAB, (BATCH, tiny_models.POSITIONS), generator=generator)
        tokens = tokens.chunk(parts)[part]
        output = model(tokens)
        logits = getattr(output, "logits", output)
        if logits.dim() == 3:
            F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        else:
            F.cross_entropy(logits, tokens[:, 0]).backward()
        optimizer.step()
        optimizer.zero_grad()


def whole_parameters(model):
    """Parameters as on one process, by their names there."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            return {n.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for n, p in model.named_parameters()}
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }
