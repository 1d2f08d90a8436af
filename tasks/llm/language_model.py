"""Pre-training of causal language models.

Shapes: `B` sequences, `T` tokens a sequence, `V` vocabulary.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_adam_mini.factory import OptimizerFactory
from lightning_adam_mini.measure import transformer_flops_per_token
from lightning_adam_mini.schedule import Schedule

from ..atomic_files import new_folder
from ..base import PrimaryMetric, Task
from ..data.module import TOKENIZER
from ..gradient_release import check_release, release_gradients
from ..metrics import MeanLoss
from ..parallel.sharding import checkpoint_activations
from .data.module import TokenDataModule
from .data.tokenizer import tokenizer_texts
from .model import Attention, active_parameters, build_config, build_model, initialise, read_config

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

    from lightning_adam_mini.optim import AdamMini

__all__ = ["LanguageModel"]


class LanguageModel(Task):
    """A causal language model of transformers, trained on the next token.

    Args:
        optimizer: Factory of the optimizer.
        schedule: Learning-rate schedule.
        architecture: The `model_type` of transformers, such as `gpt2` or `llama`.
        config: Fields of its configuration, such as `hidden_size`; transformers' defaults for the others. `vocab_size`
            defaults to the data's.
        init_from: Folder in transformers' format with configuration and weights, instead of random weights.
        attention: Implementation of attention.
        activation_checkpointing: Recompute activations in the backward pass, to save memory.
        gradient_release: Update each parameter within the backward pass and free its gradient at once, to save memory.
            For AdamMini on one device, without clipping and accumulation.
        compile: Compile the model with torch.compile.
        sample_prompt: Text that is continued after each validation; none if empty.
        sample_tokens: Tokens to generate, in validation and `predict`.
        temperature: Temperature of generation; 0 selects the most likely token.
        top_k: Generation draws from this many most likely tokens.
    """

    unit = "tokens"
    batch_kind = "token windows"
    logged_metrics = ("train_loss", "val_loss", "val_perplexity")
    primary_metric = PrimaryMetric(label="validation loss, nats a token")

    def __init__(
        self,
        optimizer: OptimizerFactory | None = None,
        schedule: Schedule | None = None,
        architecture: str = "gpt2",
        config: dict[str, Any] | None = None,
        init_from: str | None = None,
        attention: Attention = "sdpa",
        activation_checkpointing: bool = False,
        gradient_release: bool = False,
        compile: bool = False,  # noqa: A002 - the field's word
        sample_prompt: str = "",
        sample_tokens: int = 64,
        temperature: float = 0.8,
        top_k: int = 50,
    ) -> None:
        super().__init__(optimizer, schedule)
        if sample_tokens < 1 or top_k < 1 or temperature < 0:
            raise ValueError("sample_tokens and top_k must be at least 1, and temperature at least 0")
        self.save_hyperparameters()
        self.architecture = architecture
        self.config = dict(config or {})
        self.init_from = init_from
        self.attention = attention
        self.activation_checkpointing = activation_checkpointing
        self.gradient_release = gradient_release
        self._hooks: list[RemovableHandle] = []
        self.compile_model = compile
        self.sample_prompt = sample_prompt
        self.sample_tokens = sample_tokens
        self.temperature = temperature
        self.top_k = top_k
        self.val_mean = MeanLoss()
        self._sample = ""
        self._active_parameters = 0
        if init_from is None:
            build_config(architecture, self.config)  # wrong options raise here, before any data are read

    def configure_model(self) -> None:
        """Build the network.

        Raises:
            ValueError: The vocabulary is smaller than the data's, sequences are longer than the model's positions, or
                `init_from` is not a folder with a model.
        """
        if self.model is not None:
            return
        data = self.data_module()
        vocab_size = getattr(data, "vocab_size", None)
        options = dict(self.config)
        if "vocab_size" not in options and vocab_size is not None:
            options["vocab_size"] = vocab_size
        if self.init_from is None and data is not None:
            options.update(_special_tokens(data, options))
        if self.init_from and self.config:
            rank_zero_warn(f"init_from: the model is as in {self.init_from}; model.config is not used")
        if isinstance(data, TokenDataModule) and (difference := data.meaning_differs(self.given_meaning())):
            raise ValueError(f"the data are not those of model.init_from {self.init_from}: {difference}")
        config = None if self.init_from else build_config(self.architecture, options)
        meta_config = config or read_config(cast("str", self.init_from))
        _check_data(meta_config, vocab_size, getattr(data, "context_length", None))
        self.build(
            lambda: self._checkpointed(build_model(config, self.init_from, self.attention)),
            on_meta=lambda: self._checkpointed(build_model(meta_config, None, self.attention)),
            initialise=initialise,
            is_trained=self.init_from is not None,
            compile=self.compile_model,
        )
        self._active_parameters = active_parameters(self.network)

    def given_meaning(self) -> dict[str, Any]:
        """See `Task.given_meaning`: the tokenizer in the folder of the weights, if there is one."""
        folder = None if self.init_from is None else Path(self.init_from).expanduser()
        if folder is None or not (folder / "tokenizer.json").is_file():
            return {}
        return {TOKENIZER: tokenizer_texts(str(folder))}

    def setup(self, stage: str) -> None:
        """See `Task.setup`.

        Raises:
            ValueError: Gradients are released, but the trainer or the optimizer needs them after the backward pass.
        """
        super().setup(stage)
        if stage == "fit" and self.gradient_release:
            check_release(self.trainer, self.optimizer_factory)

    def on_train_start(self) -> None:
        """Register the hooks that release gradients."""
        super().on_train_start()
        if self.gradient_release:
            (optimizer,) = self.trainer.optimizers
            self._hooks = release_gradients(cast("AdamMini", optimizer))

    def on_train_end(self) -> None:
        """Remove the hooks that release gradients."""
        for hook in self._hooks:
            hook.remove()

    def _checkpointed(self, model: PreTrainedModel) -> PreTrainedModel:
        if self.activation_checkpointing:
            checkpoint_activations(model)
        return model

    def configure_meta_model(self, data: LightningDataModule, device: str = "meta") -> list[str]:
        """See `Task.configure_meta_model`: the vocabulary size follows from the settings of the data.

        Raises:
            ValueError: As `configure_model`.
        """
        options, notes = dict(self.config), []
        if self.init_from is None and "vocab_size" not in options:
            planned = getattr(data, "planned_vocab_size", None)
            if planned is not None:
                options["vocab_size"] = planned
            if getattr(data, "trains_tokenizer", False):
                notes.append(f"the vocabulary has {planned:,} tokens at most: a tokenizer is trained on the text")
        config = read_config(self.init_from) if self.init_from else build_config(self.architecture, options)
        with torch.device(device):
            self.model = build_model(config, None, "eager")  # eager attention is always available
        return notes

    @property
    def network(self) -> PreTrainedModel:
        """The transformers model, once `configure_model` has made it."""
        assert self.model is not None
        return cast("PreTrainedModel", self.model)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits `(B, T, V)` of the tokens after `input_ids` `(B, T)`."""
        return self.network(input_ids=input_ids, use_cache=False).logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy in nats over the labels of a batch."""
        logits = self(batch["input_ids"])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten())
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Reset the mean."""
        self.val_mean.reset()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Sum the cross-entropy over the labels that are not -100."""
        labels = batch["labels"].flatten()
        logits = self(batch["input_ids"])
        count = (labels != -100).sum()
        total = F.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="sum")
        self.val_mean.update(total, count)

    def validation_loss(self) -> Tensor:
        """Mean cross-entropy over the tokens of all ranks so far, in nats; NaN without any."""
        return self.val_mean.compute()

    def on_validation_epoch_end(self) -> None:
        """Log the mean over all tokens of all ranks, and continue the sample prompt."""
        loss = self.validation_loss()
        stage = "test" if self.trainer.testing else "val"
        # The values are equal on all ranks already; without sync_dist Lightning would warn.
        self.log(f"{stage}_loss", loss, prog_bar=True, sync_dist=True)
        self.log(f"{stage}_perplexity", loss.exp(), sync_dist=True)
        if self.sample_prompt and stage == "val" and not self.trainer.sanity_checking and loss.isfinite():
            self._write_sample()

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, str]]:
        """Continue each prompt of a batch: `{"prompt": ..., "continuation": ...}`."""
        continuations = self.generate(batch["input_ids"])
        return [
            {"prompt": prompt, "continuation": text}
            for prompt, text in zip(batch["prompt"], continuations, strict=True)
        ]

    @torch.no_grad()
    def generate(self, input_ids: Tensor) -> list[str]:
        """Continue prompts of equal length.

        Args:
            input_ids: Token ids `(B, P)`; the first ones are dropped if prompt and new tokens exceed the model's
                positions.

        Returns:
            The new text of each.

        Raises:
            ValueError: The data have no tokenizer.
        """
        tokenizer = getattr(self.data_module(), "tokenizer", None)
        if tokenizer is None:
            raise ValueError("generation needs a tokenizer: give the data module's `tokenizer` a local path")
        positions = self.network.config.max_position_embeddings
        new_tokens = min(self.sample_tokens, positions - 1)
        input_ids = input_ids[:, -(positions - new_tokens) :]
        sampling = {"temperature": self.temperature, "top_k": self.top_k} if self.temperature > 0 else {}
        output = self.network.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            do_sample=self.temperature > 0,
            max_new_tokens=new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            synced_gpus=self.is_sharded,  # a rank that has finished continues until all have
            **sampling,
        )
        return tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)

    def export(self, folder: str | Path) -> Path:
        """Save model and tokenizer in transformers' format (safetensors); the folder appears complete.

        Args:
            folder: A folder that does not exist yet.

        Raises:
            ValueError: The folder exists.
        """
        target = Path(folder).expanduser()
        with new_folder(target) as temporary:
            self.network.save_pretrained(temporary)
            tokenizer = getattr(self.data_module(), "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
        return target

    def batch_units(self, batch: dict[str, Tensor]) -> int:
        """Number of tokens in a batch."""
        return batch["input_ids"].numel()

    def flops_per_unit(self, batch: dict[str, Tensor]) -> float | None:
        """FLOPs per token, forward and backward, without recomputation."""
        config = self.network.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return transformer_flops_per_token(
            num_parameters=self._active_parameters,
            num_layers=config.num_hidden_layers,
            hidden_size=config.num_attention_heads * head_dim,
            context_length=batch["input_ids"].shape[1],
        )

    def summary(self) -> dict[str, str]:
        """Final loss and perplexity, those of a unigram model of the same text, and a sample."""
        lines: dict[str, str] = {}
        loss = self.trainer.callback_metrics.get("val_loss")
        if loss is not None:
            lines["validation loss"] = f"{loss:.4f} nats a token, perplexity {loss.exp():.2f}"
            data = self.data_module()
            if hasattr(data, "unigram_loss"):
                unigram = data.unigram_loss()
                lines["unigram model"] = f"{unigram:.4f} nats a token, perplexity {math.exp(unigram):.2f}"
            if getattr(data, "bytes_per_token", None):
                lines["validation bits a byte"] = f"{loss / math.log(2) / data.bytes_per_token:.4f}"
        if self._sample:
            lines["sample"] = repr(self._sample)
        return lines

    def _write_sample(self) -> None:
        """Append a continuation of the sample prompt to `samples.txt`, without a draw from the training's generator.

        Rank zero writes; all ranks generate if the model is sharded.
        """
        tokenizer = getattr(self.data_module(), "tokenizer", None)
        if tokenizer is None or not (self.trainer.is_global_zero or self.is_sharded):
            return
        input_ids = torch.tensor([tokenizer(self.sample_prompt)["input_ids"]], device=self.device)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.trainer.global_step)
            self._sample = self.sample_prompt + self.generate(input_ids)[0]
        if not self.trainer.is_global_zero:
            return
        path = Path(self.trainer.default_root_dir) / "samples.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"--- step {self.trainer.global_step}\n{self._sample}\n")


def _special_tokens(data: Any, options: dict[str, Any]) -> dict[str, int]:
    """End and padding tokens of the data's tokenizer, for a configuration that does not set them."""
    tokenizer = getattr(data, "tokenizer", None)
    eos = getattr(tokenizer, "eos_token_id", None)
    pad = getattr(tokenizer, "pad_token_id", None)
    ids = {"bos_token_id": eos, "eos_token_id": eos, "pad_token_id": pad}
    return {name: number for name, number in ids.items() if number is not None and name not in options}


def _check_data(config: Any, vocab_size: int | None, context_length: int | None) -> None:
    """Check that the model has embeddings for all tokens and positions of the data."""
    if vocab_size is not None and vocab_size > config.vocab_size:
        raise ValueError(
            f"the data have {vocab_size} tokens, the model's vocabulary {config.vocab_size}; set "
            f"model.config.vocab_size to at least {vocab_size}, or use the model's own tokenizer for the data"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if context_length is not None and positions is not None and context_length > positions:
        raise ValueError(
            f"sequences of {context_length} tokens do not fit the model's {positions} positions; lower "
            "data.context_length or raise model.config.max_position_embeddings"
        )
