"""Tensor parallelism for Transformers with Llama's layers: a plan by the names of their projections."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .sharding import repeated_blocks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.parallel import ParallelStyle

__all__ = ["apply_tensor_parallel", "check_tensor_parallel"]

_BY_COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
_BY_ROWS = ("self_attn.o_proj", "mlp.down_proj")


def check_tensor_parallel(model: nn.Module, size: int) -> None:
    """Check that a network can be computed by `size` ranks.

    Args:
        model: On any device, also the meta device.
        size: Ranks of tensor parallelism.

    Raises:
        ValueError: There is no plan for the network, or `size` does not divide its heads or widths.
    """
    blocks = repeated_blocks(model)
    if (
        not blocks
        or not all(_has_plan(block) for block in blocks.values())
        or not hasattr(model, "get_output_embeddings")
    ):
        raise ValueError(
            "trainer.strategy.tensor_parallel_size: there is a plan for language models with the layers of Llama "
            f"(llama, mistral, qwen2 and their kin), and none for {type(model).__name__}; set it to 1, and the model "
            "is sharded over all ranks instead"
        )
    config: Any = getattr(model, "config")  # noqa: B009 - a field that nn.Module does not declare
    heads = config.num_attention_heads
    sizes = {
        "attention heads": heads,
        "key-value heads": getattr(config, "num_key_value_heads", None) or heads,
        "units of the MLP": config.intermediate_size,
    }
    for what, number in sizes.items():
        if number % size:
            fitting = [str(n) for n in range(1, number + 1) if all(other % n == 0 for other in sizes.values())]
            raise ValueError(
                f"trainer.strategy.tensor_parallel_size {size} does not divide the {number} {what}; sizes that divide "
                f"all: {', '.join(fitting)}"
            )


def apply_tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a checked network, in place: heads, MLP units and, where they divide evenly, the rows of token tables.

    Projections into heads and units are sharded by output, those back by input, so a layer has two all-reduces in a
    forward pass (Shoeybi et al. 2019, "Megatron-LM", Sec. 3). Norms are replicated.

    Args:
        model: The network; on the meta device, or with the same weights on all ranks.
        mesh: A mesh of one dimension.
    """
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model_with_tables: Any = model
    table, head = model_with_tables.get_input_embeddings(), model_with_tables.get_output_embeddings()
    tied = head is not None and head.weight is table.weight
    even = all(module.weight.shape[0] % mesh.size() == 0 for module in (table, head) if module is not None)
    plan: dict[str, ParallelStyle] = {}
    for name, block in repeated_blocks(model).items():
        plan |= {f"{name}.{child}": ColwiseParallel() for child in _BY_COLUMNS}
        plan |= {f"{name}.{child}": RowwiseParallel() for child in _BY_ROWS}
        assert _has_plan(block)
    for name, module in model.named_modules():
        if name in plan or not any(True for _ in module.parameters(recurse=False)):
            continue
        if even and module is table:
            plan[name] = RowwiseParallel(input_layouts=Replicate())
        elif even and module is head:
            plan[name] = ColwiseParallel(output_layouts=Replicate())
        else:
            plan[name] = _replicated_style()
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    parallelize_module(model, mesh, plan, src_data_rank=None)
    if tied:
        head.weight = table.weight
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable[name])


def _has_plan(block: nn.Module) -> bool:
    """Whether a layer has Llama's projections and otherwise only vectors, none of them within the attention."""
    projections = {name: block.get_submodule(name) for name in (*_BY_COLUMNS, *_BY_ROWS) if _has(block, name)}
    if len(projections) < len(_BY_COLUMNS) + len(_BY_ROWS):
        return False
    planned = {id(parameter) for module in projections.values() for parameter in module.parameters()}
    others = {name: parameter for name, parameter in block.named_parameters() if id(parameter) not in planned}
    # A norm of queries or keys sees the heads of its rank alone, so its gradient would be a partial sum.
    return all(isinstance(module, nn.Linear) for module in projections.values()) and all(
        parameter.dim() == 1 and not name.startswith("self_attn.") for name, parameter in others.items()
    )


def _has(module: nn.Module, path: str) -> bool:
    for part in path.split("."):
        module = getattr(module, part, None)  # type: ignore[assignment]
    return module is not None


def _replicated_style() -> ParallelStyle:
    """Replicates parameters as DTensors, because optimizers need lists of tensors on one mesh."""
    from torch.distributed.tensor import DTensor, Replicate, distribute_module, distribute_tensor
    from torch.distributed.tensor.parallel import ParallelStyle

    class Replicated(ParallelStyle):
        def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
            return distribute_module(module, device_mesh, _place, _take, _give)

    def _place(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for key, parameter in module.named_parameters(recurse=False):
            whole = distribute_tensor(parameter.detach(), mesh, [Replicate()], src_data_rank=None)
            module.register_parameter(key, nn.Parameter(whole, requires_grad=parameter.requires_grad))

    def _take(module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        return tuple(DTensor.from_local(x, mesh, [Replicate()], run_check=False) if _is_plain(x) else x for x in inputs)

    def _give(module: nn.Module, outputs: Any, mesh: DeviceMesh) -> Any:
        return outputs.to_local() if isinstance(outputs, DTensor) else outputs

    def _is_plain(value: Any) -> bool:
        return isinstance(value, Tensor) and not isinstance(value, DTensor)

    return Replicated()
