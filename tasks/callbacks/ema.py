"""An exponential moving average of the weights, of which each rank keeps its own shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_adam_mini.optim.distributed import is_dtensor, is_flattened, local

__all__ = ["AveragedTensors", "WeightEMA"]


class WeightEMA(WeightAveraging):
    """An exponential moving average of the weights, with a decay that grows in the first steps.

    Validation, prediction and the `state_dict` of checkpoints use the averaged weights; so do the task's own
    `on_validation_*` hooks. Training continues from the raw weights. Buffers, such as the statistics of batch norm, are
    averaged too. Checkpoints have the form of Lightning's WeightAveraging, which copies the module and so cannot
    average shards: here each rank averages its own.

    Args:
        decay: Weight of the average in an update.
        warmup: Use `min(decay, (1 + s) / (10 + s))` in update `s`, so that the random initial weights soon lose
            their influence (as in TensorFlow's ExponentialMovingAverage with `num_updates`).

    Raises:
        ValueError: The decay is not in (0, 1).
    """

    def __init__(self, decay: float = 0.9999, warmup: bool = True) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(f"the decay of the weights' average must be in (0, 1), not {decay}")
        super().__init__()
        self.decay = decay
        self.warmup = warmup
        self._averages: AveragedTensors | None = None
        self._training_is_over = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start a new average for a fit.

        Raises:
            ValueError: The trainer's precision would lose small steps of the average, or differ from the weights'.
        """
        if stage != "fit":
            return
        if trainer.precision in ("bf16-true", "16-true", "64-true"):
            raise ValueError(
                f"an average of the weights needs trainer.precision 32-true, bf16-mixed or 16-mixed, not "
                f"{trainer.precision}; or set model.ema_decay to null"
            )
        self._averages, self._training_is_over = None, False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the weights after the strategy has placed them."""
        if self._averages is None:
            self._averages = AveragedTensors(pl_module)
        else:  # a checkpoint was loaded before the module moved
            self._averages.to_devices_of(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average after a complete step."""
        if trainer.global_step > self._latest_update_step:
            self._update(trainer, pl_module)

    def _update(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._averages is not None
        seen = self._averages.updates
        self._averages.update(pl_module, min(self.decay, (1 + seen) / (10 + seen)) if self.warmup else self.decay)
        self._latest_update_step = trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: the average follows steps, not epochs."""

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the averaged weights into the module."""
        self._swap_in_fit(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the averaged weights for what the task does at the end of a validation."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the raw weights back, before a checkpoint is saved."""
        self._swap_in_fit(trainer, pl_module)

    def _swap_in_fit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # After training the module keeps the average, so a later validation swaps nothing.
        if self._averages is not None and trainer.state.fn == TrainerFn.FITTING and not self._training_is_over:
            self._averages.swap(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the averaged weights in the module, and keep the raw ones for later checkpoints."""
        assert self._averages is not None
        self._averages.swap(pl_module)
        self._training_is_over = True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the average as `state_dict` and the raw weights as `current_model_state`."""
        if self._averages is None:
            return
        if trainer.training and not self._training_is_over and trainer.global_step > self._latest_update_step:
            # A callback that saves after a step may run before this one: the average has to include that step.
            self._update(trainer, pl_module)
            if self.state_key in checkpoint.get("callbacks", {}):
                checkpoint["callbacks"][self.state_key] = self.state_dict()
        here = checkpoint["state_dict"]
        kept = self._averages.state_dict(pl_module, here)
        raw, averaged = (kept, here) if self._training_is_over else (here, kept)
        checkpoint["state_dict"], checkpoint["current_model_state"] = averaged, raw
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(self._averages.updates)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore both in a fit; elsewhere the averaged weights are enough."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if self._averages is None:
            self._averages = AveragedTensors(pl_module)
        else:
            self._averages.take(pl_module)  # the strategy has loaded `state_dict`, the average
        if "current_model_state" not in checkpoint:
            rank_zero_warn("the checkpoint holds no average of the weights: it begins with the weights that were saved")
            return
        self._averages.updates = int(checkpoint["averaging_state"]["n_averaged"])
        trainer.strategy.load_model_state_dict({"state_dict": checkpoint["current_model_state"]}, strict=True)


class AveragedTensors:
    """Averages of the parameters and buffers of a module by name; they start from its values at the first update.

    Args:
        module: What is averaged; of a DTensor its local part, without communication.

    Raises:
        ValueError: FSDP1 has flattened a parameter.
    """

    def __init__(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            if is_flattened(parameter):
                raise ValueError(
                    f"{name}: the average of the weights needs parameters that FSDP has not flattened; use "
                    "--trainer.strategy fsdp2 or ddp, or set model.ema_decay to null"
                )
        self.updates = 0
        self._sharded = any(is_dtensor(parameter) for parameter in module.parameters())
        self._copies = {name: local(tensor).detach().clone() for name, tensor in self._tensors(module)}

    @torch.no_grad()
    def update(self, module: nn.Module, decay: float) -> None:
        """Move the averages towards the module; the first time, copy it.

        Args:
            module: As in the constructor.
            decay: Weight of the average.
        """
        groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for name, tensor in self._tensors(module):
            copy = self._copies[name]
            copies, current = groups.setdefault((copy.device, copy.dtype), ([], []))
            copies.append(copy)
            current.append(local(tensor).detach())
        for (_, dtype), (copies, current) in groups.items():
            if self.updates and dtype.is_floating_point:
                torch._foreach_lerp_(copies, current, 1.0 - decay)
            else:  # counters, such as those of batch norm
                torch._foreach_copy_(copies, current)
        self.updates += 1

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchange the averages with the values of the module."""
        for name, tensor in self._tensors(module):
            copy, here = self._copies[name], local(tensor).detach()
            kept = copy.clone()
            copy.copy_(here)
            here.copy_(kept)

    @torch.no_grad()
    def take(self, module: nn.Module) -> None:
        """Copy the values of the module, on their present devices."""
        self._copies = {name: local(tensor).detach().clone() for name, tensor in self._tensors(module)}

    def to_devices_of(self, module: nn.Module) -> None:
        """Follow a module that has moved since the copies were made."""
        for name, tensor in self._tensors(module):
            self._copies[name] = self._copies[name].to(local(tensor).device)

    def state_dict(self, module: nn.Module, saved: Mapping[str, Any]) -> dict[str, Any]:
        """The averages in the form in which a strategy saves the module; all ranks take part.

        Args:
            module: As in the constructor.
            saved: The state dict of the module from the strategy: with DTensors, or with whole tensors, which some
                ranks may lack.
        """
        keeps_shards = any(isinstance(value, Tensor) and is_dtensor(value) for value in saved.values())
        names = {id(tensor): name for name, tensor in self._tensors(module)}
        state = dict(saved)
        for key, tensor in module.state_dict(keep_vars=True).items():
            name = names.get(id(tensor))
            if name is None:  # an extra state, which is no tensor
                continue
            average = self._as(tensor, self._copies[name])
            if is_dtensor(average) and not keeps_shards:
                average = average.full_tensor()  # one at a time, kept by the ranks that keep whole tensors
            key = key if key in saved else key.replace("_orig_mod.", "")  # strategies leave out torch.compile's prefix
            if key in saved:
                state[key] = average if keeps_shards else average.to(saved[key].device)
        return state

    def _as(self, tensor: Tensor, copy: Tensor) -> Tensor:
        """A copy of the local part with the layout of the tensor."""
        if not is_dtensor(tensor):
            return copy
        from torch.distributed.tensor import DTensor

        layout = (tensor.device_mesh, tensor.placements)
        return DTensor.from_local(copy, *layout, run_check=False, shape=tensor.shape, stride=tensor.stride())

    def _tensors(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Parameters and buffers; under FSDP2 as shards, from which the next forward pass gathers."""
        if self._sharded:
            from torch.distributed.fsdp import FSDPModule

            for part in module.modules():
                if isinstance(part, FSDPModule):
                    part.reshard()
        yield from module.named_parameters()
        yield from module.named_buffers()
