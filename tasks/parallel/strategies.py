"""The strategies `fsdp2` and `hsdp`, alone or with tensor parallelism, and checks of all strategies before training."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_adam_mini.optim.distributed import is_dtensor

from ..checkpoints.saving import AtomicFolderCheckpoint
from .sharding import (
    checkpoint_activations,
    running_statistics,
    shard_model,
    share_running_statistics,
    sync_gradients,
)
from .tensor_parallel import apply_tensor_parallel, check_tensor_parallel

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["FSDP2", "HSDP", "MeshSizes", "check_strategy", "fit_sizes", "register_strategies"]

Initialisation = Literal["auto", "whole", "sharded"]


@dataclass(frozen=True, kw_only=True)
class MeshSizes:
    """Sizes of a device mesh, outermost first; `replicate * shard * tensor` is the world size.

    Args:
        replicate: Groups of ranks that hold the same parameters.
        shard: Ranks over which parameters are sharded, and that read different data.
        tensor: Ranks that read the same data and compute parts of each matrix product.
    """

    replicate: int = 1
    shard: int = 1
    tensor: int = 1

    @property
    def data_ranks(self) -> int:
        """Ranks that read different data."""
        return self.replicate * self.shard


def fit_sizes(world: int, *, replicate: int, tensor: int) -> MeshSizes:
    """Shard over the ranks that replication and tensor parallelism leave.

    Args:
        world: Number of ranks.
        replicate: See `MeshSizes`.
        tensor: See `MeshSizes`.

    Raises:
        ValueError: A size does not divide the number of ranks; the message names those that do.
    """
    if tensor < 1 or world % tensor:
        raise ValueError(_misfit("tensor_parallel_size", tensor, world, "ranks"))
    if replicate < 1 or (world // tensor) % replicate:
        ranks = "ranks" if tensor == 1 else f"ranks (of {world}, {tensor} at a time compute together)"
        raise ValueError(_misfit("replicate_size", replicate, world // tensor, ranks))
    return MeshSizes(replicate=replicate, shard=world // tensor // replicate, tensor=tensor)


def _misfit(option: str, size: int, number: int, what: str) -> str:
    *others, last = [str(divisor) for divisor in range(1, number + 1) if number % divisor == 0]
    fitting = f"{', '.join(others)} or {last}" if others else last
    return (
        f"trainer.strategy.{option} {size} does not divide {number} {what}: set it to {fitting}, or change the devices"
    )


class FSDP2(AtomicFolderCheckpoint):
    """Shards parameters, gradients and optimizer state over all ranks.

    Tasks of this project are sharded as they are built, in `configure_model`, and so is any module whose
    `configure_model` calls `fully_shard` with its `device_mesh`. Of any other LightningModule the networks that are its
    attributes are sharded here, from the weights of the first rank.

    Without options it is `--trainer.strategy fsdp2`; with options, `--trainer.strategy
    lightning_adam_mini.tasks.parallel.FSDP2 --trainer.strategy.tensor_parallel_size 2`.

    Args:
        tensor_parallel_size: Neighbouring ranks that share the heads and MLP units of a model, on the same data. For
            language models with Llama's layers.
        replicate_size: Groups of ranks that each hold all of the model, sharded within.
        save_distributed_checkpoint: Save a folder to which each rank writes its part. By default rank zero gathers all
            parts and writes one file. Both load on any number of ranks; the file also under any other strategy.
        reshard_after_forward: Free the gathered parameters of a block after its forward pass, and gather them again for
            the backward pass. Without it a step is faster and takes the memory of the whole model.
        defer_gradient_sync: With gradient accumulation, reduce gradients once a step and not once a batch. In between
            each rank holds whole gradients.
        param_dtype: Gather and compute in this dtype, which halves the traffic; the parameters' by default. Norms and
            other sensitive operations run in it too; `trainer.precision bf16-mixed` keeps those in float32.
        reduce_dtype: Reduce gradients in this dtype; `param_dtype` by default.
        cpu_offload: Keep parameters, gradients and optimizer state in the host's memory. For GPUs.
        activation_checkpointing: Recompute the activations of blocks in the backward pass.
        initialisation: `whole` builds the model on the CPU of each rank, with exactly the weights of one process with
            the same seed. `sharded`, for language models, never holds more than one parameter whole: its weights are
            the same for any number of ranks, but differ from those of `whole`. `auto` is `sharded` from a billion
            parameters.
        timeout_minutes: Raise an error when a rank has not answered for so long.
        process_group_backend: Backend of torch.distributed; by default chosen by the device.

    Raises:
        ValueError: A size does not divide the number of ranks.
    """

    strategy_name = "fsdp2"

    def __init__(
        self,
        tensor_parallel_size: int = 1,
        replicate_size: int = 1,
        save_distributed_checkpoint: bool = False,
        reshard_after_forward: bool = True,
        defer_gradient_sync: bool = False,
        param_dtype: Literal["bfloat16", "float16"] | None = None,
        reduce_dtype: Literal["float32", "bfloat16"] | None = None,
        cpu_offload: bool = False,
        activation_checkpointing: bool = False,
        initialisation: Initialisation = "auto",
        timeout_minutes: float = 5.0,
        process_group_backend: str | None = None,
    ) -> None:
        if timeout_minutes <= 0:
            raise ValueError(f"trainer.strategy.timeout_minutes must be positive, not {timeout_minutes}")
        super().__init__(
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timedelta(minutes=timeout_minutes),
        )
        self.tensor_parallel_size = tensor_parallel_size
        self.replicate_size: int | None = replicate_size
        self.reshard_after_forward = reshard_after_forward
        self.defer_gradient_sync = defer_gradient_sync
        self.param_dtype: torch.dtype | None = getattr(torch, param_dtype) if param_dtype else None
        self.reduce_dtype: torch.dtype | None = getattr(torch, reduce_dtype) if reduce_dtype else None
        self.cpu_offload = cpu_offload
        self.activation_checkpointing = activation_checkpointing
        self.initialisation: Initialisation = initialisation

    @property
    def sizes(self) -> MeshSizes:
        """Sizes of the device mesh.

        Raises:
            ValueError: A size does not divide the number of ranks.
        """
        world = self.num_nodes * self.num_processes
        replicate = self.num_nodes if self.replicate_size is None else self.replicate_size
        return fit_sizes(world, replicate=replicate, tensor=self.tensor_parallel_size)

    @property
    def data_mesh(self) -> DeviceMesh:
        """The mesh to shard over; with replication, its first of two dimensions replicates."""
        return (
            self.device_mesh["data_parallel"] if self.sizes.replicate == 1 else self.device_mesh["replicate", "shard"]
        )

    @property
    def tensor_mesh(self) -> DeviceMesh | None:
        """The mesh of tensor parallelism; None without it."""
        return self.device_mesh["tensor_parallel"] if self.sizes.tensor > 1 else None

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Number of ranks that read different data, and the position of this one.

        In prediction all ranks read the same: one prompt may take more steps than another, and every rank has to take
        part in each step.
        """
        trainer = getattr(self.lightning_module, "_trainer", None)
        if trainer is not None and trainer.state.fn == "predict":
            return {"num_replicas": 1, "rank": 0}
        return {"num_replicas": self.sizes.data_ranks, "rank": self.global_rank // self.sizes.tensor}

    def setup_environment(self) -> None:
        """Join the process group and make the device mesh."""
        self._setup_distributed()
        from torch.distributed.device_mesh import init_device_mesh

        sizes = self.sizes
        named = {"data_parallel": sizes.shard, "tensor_parallel": sizes.tensor}
        if sizes.replicate > 1:
            named = {"replicate": sizes.replicate, "shard": sizes.shard, "tensor_parallel": sizes.tensor}
        self._device_mesh = init_device_mesh(self.root_device.type, tuple(named.values()), mesh_dim_names=tuple(named))
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    def setup(self, trainer: Trainer) -> None:
        """Shard what is whole, make the optimizer, and turn off inference mode, whose tensors FSDP2 cannot train.

        Raises:
            ValueError: The module cannot be sharded so that all ranks train the same parameters.
        """
        check_strategy(trainer)
        for loop in (
            trainer.fit_loop.epoch_loop.val_loop,
            trainer.validate_loop,
            trainer.test_loop,
            trainer.predict_loop,
        ):
            loop.inference_mode = False
        assert self.lightning_module is not None
        if self._is_whole(self.lightning_module):
            self._shard_networks(self.lightning_module)
        super().setup(trainer)

    def shard(self, model: nn.Module) -> nn.Module:
        """Shard a network, with the options of this strategy.

        Args:
            model: With the same weights on all ranks, or on the meta device. It is changed in place.

        Returns:
            The network; another object where batch norms are exchanged for synchronized ones.

        Raises:
            ValueError: The network has no layers that tensor parallelism knows, or no blocks to recompute.
        """
        _hide_needless_warnings()
        if self._layer_sync is not None:  # trainer.sync_batchnorm, which Lightning ignores under this strategy
            model = self._layer_sync.apply(model)
        if self.tensor_mesh is not None:
            check_tensor_parallel(model, self.tensor_mesh.size())
            apply_tensor_parallel(model, self.tensor_mesh)
        if self.activation_checkpointing:
            checkpoint_activations(model)
        if self.sizes.data_ranks > 1 or self.tensor_mesh is None or self.param_dtype is not None:
            shard_model(
                model,
                self.data_mesh,
                reshard_after_forward=self.reshard_after_forward,
                param_dtype=self.param_dtype,
                reduce_dtype=self.reduce_dtype,
                cpu_offload=self.cpu_offload,
            )
        return model

    def _is_whole(self, module: LightningModule) -> bool:
        """Whether nothing of a module is sharded yet.

        Raises:
            ValueError: A part of it is, and each rank would train the rest for itself.
        """
        sharded = [is_dtensor(parameter) for parameter in module.parameters()]
        if any(sharded) and self.sizes.data_ranks > 1:
            for name, parameter in module.named_parameters():
                if parameter.requires_grad and not is_dtensor(parameter):
                    raise ValueError(
                        f"{name}: configure_model has sharded other parameters and not this one, so that each rank "
                        "would train its own; call fully_shard for a module that holds it, or freeze it"
                    )
        return not any(sharded)

    def _shard_networks(self, module: LightningModule) -> None:
        """Shard the networks of a module that knows nothing of sharding."""
        if own := [name for name, _ in module.named_parameters(recurse=False)]:
            raise ValueError(
                f"{own[0]}: {self.strategy_name} gathers parameters for the forward pass of a module, and "
                f"{type(module).__name__} uses this one itself; move it into a submodule with a forward pass"
            )
        networks = list(_networks(module))
        owners = Counter(parameter for *_, network in networks for parameter in network.parameters())
        for name, parameter in module.named_parameters():
            if parameter.is_meta:
                raise ValueError(
                    f"{name}: a parameter on the meta device has no values to shard; build the model on the CPU, or "
                    "call fully_shard in configure_model"
                )
            if owners[parameter] > 1:
                raise ValueError(
                    f"{name}: {owners[parameter]} networks of {type(module).__name__} share this parameter; put them "
                    "into one module whose forward pass calls both"
                )
        tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
        for tensor in tensors:
            first = tensor.detach().to(self.root_device)
            dist.broadcast(first, src=0)
            tensor.detach().copy_(first)
        for parent, name, network in networks:
            setattr(parent, name, self.shard(network))
        if not is_overridden("configure_model", module):  # Lightning asks for it, and there is nothing left to do
            module.configure_model = lambda: None  # type: ignore[method-assign]

    def post_backward(self, closure_loss: Tensor) -> None:
        """Give all ranks the same batch-norm statistics, as DDP does: evaluations and weight averages need it."""
        super().post_backward(closure_loss)
        assert self.model is not None
        if statistics := running_statistics(self.model):
            share_running_statistics(statistics)

    def model_to_device(self) -> None:
        """Move what is not sharded; offloaded parameters stay on the CPU."""
        assert self.model is not None
        if not self.cpu_offload:
            super().model_to_device()
            return
        self.model._apply(lambda tensor: tensor if is_dtensor(tensor) else tensor.to(self.root_device))

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """With `defer_gradient_sync`, accumulate gradients on each rank until the last batch of a step."""
        if not self.defer_gradient_sync:
            yield
            return
        assert self.model is not None
        sync_gradients(self.model, False)
        try:
            yield
        finally:
            sync_gradients(self.model, True)

    def _configure_launcher(self) -> None:
        """Check the sizes before other processes are started."""
        _ = self.sizes
        super()._configure_launcher()

    def _get_process_group_backend(self) -> str:
        # Offloaded gradients are accumulated and gathered on the CPU.
        offloads = self.cpu_offload and self.root_device.type == "cuda" and not self._process_group_backend
        return "cpu:gloo,cuda:nccl" if offloads else super()._get_process_group_backend()


def _networks(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Children that have parameters, with their parents and names; lists and dicts have no forward pass themselves."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _networks(child)
        elif any(True for _ in child.parameters()):
            yield module, name, child


def _hide_needless_warnings() -> None:
    """Hide what torch warns about although the tasks use it correctly."""
    # Outputs are views, and no task changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # FSDP2 with tensor parallelism gathers whole parameters in two steps, which only checkpoints need.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


class HSDP(FSDP2):
    """Replicates a model over the nodes and shards it within each node.

    Gradients cross the network between nodes once a step, parameters never. So it is faster than FSDP2 on a slow
    network, and the model has to fit the GPUs of one node.

    Args:
        replicate_size: Groups of ranks that each hold all of the model; by default the number of nodes.
        **options: Those of `FSDP2`.
    """

    strategy_name = "hsdp"

    def __init__(self, replicate_size: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.replicate_size = replicate_size


def register_strategies() -> None:
    """Register `--trainer.strategy fsdp2` and `hsdp` with Lightning."""
    for strategy in (FSDP2, HSDP):
        if strategy.strategy_name not in StrategyRegistry:
            StrategyRegistry.register(
                strategy.strategy_name, strategy, description=(strategy.__doc__ or "").split("\n")[0]
            )


def check_strategy(trainer: Trainer) -> None:
    """Reject strategies and options that would fail at the first batch, or do something else than asked.

    Raises:
        ValueError: With what to use instead.
    """
    strategy = trainer.strategy
    if any(cls.__name__ == "DeepSpeedStrategy" for cls in type(strategy).__mro__):
        raise ValueError(
            "trainer.strategy: DeepSpeed flattens all parameters into one, and optimizers need each with its "
            "shape; use --trainer.strategy fsdp2, which shards as much"
        )
    if type(strategy).__name__ == "ModelParallelStrategy":  # it leaves most of the work to the task
        raise ValueError(
            "trainer.strategy: use lightning_adam_mini.tasks.parallel.FSDP2 in place of Lightning's "
            "ModelParallelStrategy, with the same tensor_parallel_size"
        )
    if not isinstance(strategy, FSDP2):
        return
    if trainer.precision in ("16-mixed", "transformer-engine", "transformer-engine-float16"):
        raise ValueError(
            f"trainer.precision {trainer.precision} does not run with trainer.strategy {strategy.strategy_name}, whose "
            "gradients are sharded: use bf16-mixed"
        )
    if strategy.cpu_offload and strategy.root_device.type == "cpu":
        raise ValueError(
            "trainer.strategy.cpu_offload moves parameters from GPUs to the host, and there is no GPU: leave it out"
        )
    if strategy.cpu_offload and strategy.tensor_parallel_size > 1:
        raise ValueError(
            "trainer.strategy.cpu_offload does not go with tensor_parallel_size above 1: set one of them back"
        )
