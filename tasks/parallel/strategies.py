"""FSDP2 and HSDP for `--trainer.strategy`, alone or with tensor parallelism."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import StrategyRegistry

from lightning_adam_mini.optim.distributed import is_dtensor

from ..sharded_checkpoints import AtomicFolderCheckpoint
from .initialisation import Initialisation
from .sharding import sync_gradients
from .sizes import MeshSizes, fit_sizes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["FSDP2", "HSDP", "register_strategies"]


class FSDP2(AtomicFolderCheckpoint):
    """Shards parameters, gradients and optimizer state over all ranks; the task's `configure_model` divides its model.

    Without options it is `--trainer.strategy fsdp2`; with options, `--trainer.strategy
    lightning_adam_mini.tasks.parallel.FSDP2 --trainer.strategy.tensor_parallel_size 2`.

    Args:
        tensor_parallel_size: Neighbouring ranks that compute a model's heads and MLPs in parts, on the same data; the
            others shard. Language models with Llama's layers only.
        replicate_size: Groups of ranks that each hold all of the model, sharded within.
        save_distributed_checkpoint: Save a folder to which each rank writes its part. By default rank zero gathers all
            and writes one file, which loads anywhere: on any number of ranks, under any strategy, or without one.
        reshard_after_forward: Free the gathered parameters of a block after its forward pass, and gather them again for
            the backward pass. Without it a step is quicker and takes the memory of the whole model.
        defer_gradient_sync: With gradient accumulation, reduce gradients once a step and not once a batch. Each rank
            then holds whole gradients in between.
        param_dtype: Gather and compute in this dtype, which halves the traffic; the parameters' by default. Norms
            and the like run in it too, so `trainer.precision bf16-mixed` is the more careful choice.
        reduce_dtype: Reduce gradients in this dtype; `param_dtype` by default.
        cpu_offload: Keep parameters, gradients and optimizer state in the host's memory. For GPUs.
        activation_checkpointing: Compute the activations of blocks again in the backward pass.
        initialisation: `whole` builds the model on each rank's CPU, with the weights of one process with the same seed,
            bit by bit. `sharded` never holds more than one parameter whole: its weights are the same for any number of
            ranks, but others than those; for language models only. `auto` is `sharded` from a billion parameters.
        timeout_minutes: Give up when a rank does not answer for so long.
        process_group_backend: Of torch.distributed; chosen by the device by default.

    Raises:
        ValueError: Sizes that do not divide the ranks.
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
        """How the ranks are divided.

        Raises:
            ValueError: A size does not divide them.
        """
        world = self.num_nodes * self.num_processes
        replicate = self.num_nodes if self.replicate_size is None else self.replicate_size
        return fit_sizes(world, replicate=replicate, tensor=self.tensor_parallel_size)

    @property
    def data_mesh(self) -> DeviceMesh:
        """The ranks to shard over; with those to replicate over as the first of two dimensions."""
        return (
            self.device_mesh["data_parallel"] if self.sizes.replicate == 1 else self.device_mesh["replicate", "shard"]
        )

    @property
    def tensor_mesh(self) -> DeviceMesh | None:
        """The ranks that compute together; None where each computes alone."""
        return self.device_mesh["tensor_parallel"] if self.sizes.tensor > 1 else None

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Ranks that read different data, and this one's number among them.

        All predict the same: predictions may take more steps for one prompt than for another, and every rank has to
        take part in each.
        """
        trainer = getattr(self.lightning_module, "_trainer", None)
        if trainer is not None and trainer.state.fn == "predict":
            return {"num_replicas": 1, "rank": 0}
        return {"num_replicas": self.sizes.data_ranks, "rank": self.global_rank // self.sizes.tensor}

    def setup_environment(self) -> None:
        """Meet the other ranks."""
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
        """Make the optimizer; evaluate without inference mode, whose tensors FSDP2 could not train with afterwards."""
        for loop in (
            trainer.fit_loop.epoch_loop.val_loop,
            trainer.validate_loop,
            trainer.test_loop,
            trainer.predict_loop,
        ):
            loop.inference_mode = False
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Move what is not sharded; offloaded parameters stay where they are."""
        assert self.model is not None
        if not self.cpu_offload:
            super().model_to_device()
            return
        self.model._apply(lambda tensor: tensor if is_dtensor(tensor) else tensor.to(self.root_device))

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Let gradients add up on each rank, where asked for, until the last batch of a step."""
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
        """Refuse sizes that do not fit before any process is started."""
        _ = self.sizes
        super()._configure_launcher()

    def _get_process_group_backend(self) -> str:
        # Offloaded gradients are added up and gathered on the CPU.
        offloads = self.cpu_offload and self.root_device.type == "cuda" and not self._process_group_backend
        return "cpu:gloo,cuda:nccl" if offloads else super()._get_process_group_backend()


class HSDP(FSDP2):
    """Replicates a model over the nodes and shards it within each.

    Gradients of a model cross the network once a step, and parameters never do: faster than FSDP2 where the network
    between nodes is slow, and a model must fit the GPUs of a node.

    Args:
        replicate_size: Groups of ranks that each hold all of the model; the number of nodes by default.
        **options: Those of `FSDP2`.
    """

    strategy_name = "hsdp"

    def __init__(self, replicate_size: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.replicate_size = replicate_size


def register_strategies() -> None:
    """Make `--trainer.strategy fsdp2` and `hsdp` known to Lightning."""
    for strategy in (FSDP2, HSDP):
        if strategy.strategy_name not in StrategyRegistry:
            StrategyRegistry.register(
                strategy.strategy_name, strategy, description=(strategy.__doc__ or "").split("\n")[0]
            )
