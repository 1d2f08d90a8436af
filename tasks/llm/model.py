"""Building transformers' causal language models from a configuration or from a local folder."""

from __future__ import annotations

from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

from lightning_adam_mini.hints import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["Attention", "active_parameters", "build_config", "build_model", "initialise", "read_config"]

Attention = Literal["sdpa", "eager", "flash_attention_2"]


def build_config(architecture: str, options: dict[str, Any]) -> PreTrainedConfig:
    """A transformers configuration, with its defaults for fields that are not in `options`.

    Args:
        architecture: The `model_type` of transformers, such as `gpt2` or `llama`.
        options: Fields of its configuration class.

    Raises:
        ValueError: Either does not exist, with similar names; or a value or a combination of values is wrong.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig

    if architecture not in CONFIG_MAPPING:
        hint = did_you_mean(architecture, list(CONFIG_MAPPING), otherwise=", such as gpt2 or llama")
        raise ValueError(f"transformers has no architecture {architecture!r}{hint}")
    default = AutoConfig.for_model(architecture)
    _check_options(default, options)
    special = {
        name: None for name in ("bos_token_id", "eos_token_id", "pad_token_id") if _too_large(default, name, options)
    }
    try:
        config = AutoConfig.for_model(architecture, **special, **options)
    except StrictDataclassError as error:
        cause = str(error).splitlines()[-1].partition(": ")[2]  # after the type of the inner error
        raise ValueError(f"{type(default).__name__} rejects these options: {cause}") from error
    _check_sizes(config, has_head_dim="head_dim" in options)
    return config


def _check_options(default: PreTrainedConfig, options: dict[str, Any]) -> None:
    """Raise if the configuration has no such option, or has a number and the value is not one."""
    known = {*default.to_dict(), *default.attribute_map}
    for name, value in options.items():
        if name not in known:
            hint = did_you_mean(name, sorted(known), otherwise=f"; it has {', '.join(sorted(known))}")
            raise ValueError(f"{type(default).__name__} has no option {name!r}{hint}")
        like = getattr(default, name, None)
        kinds = (int, float, NoneType) if isinstance(like, bool) or not isinstance(value, bool) else ()
        if isinstance(like, int | float) and not isinstance(value, kinds):
            raise ValueError(f"model.config.{name} must be of type {type(like).__name__}, not {value!r}")


def _check_sizes(config: PreTrainedConfig, *, has_head_dim: bool) -> None:
    """Raise if a size is not positive, or if numbers of heads do not divide each other or the width."""
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        if (size := getattr(config, name)) is None or size < 1:
            raise ValueError(f"model.config.{name} must be at least 1, not {'null' if size is None else size}")
    heads, width = config.num_attention_heads, config.hidden_size
    if not has_head_dim and width % heads:
        raise ValueError(f"{heads} attention heads do not divide the width {width}: change one, or give head_dim")
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % key_heads:
        raise ValueError(f"{key_heads} key-value heads do not divide the {heads} attention heads")


def _too_large(default: PreTrainedConfig, name: str, options: dict[str, Any]) -> bool:
    """Whether a special token that is a default lies outside a vocabulary that was made smaller."""
    token = getattr(default, name, None)
    return name not in options and isinstance(token, int) and token >= options.get("vocab_size", default.vocab_size)


def build_model(config: PreTrainedConfig | None, init_from: str | None, attention: Attention) -> PreTrainedModel:
    """A causal language model: random weights from `config`, or the weights of a local folder.

    Args:
        config: Configuration for random weights; not used with `init_from`.
        init_from: Folder in transformers' format.
        attention: Implementation of attention.

    Raises:
        ValueError: `init_from` is not a folder with a model. Nothing is ever downloaded.
    """
    from transformers import AutoModelForCausalLM

    if init_from is None:
        assert config is not None
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    folder = _model_folder(init_from)
    # In the trainer's precision, for any precision of the folder.
    return AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, attn_implementation=attention, dtype=torch.get_default_dtype()
    )


def initialise(model: nn.Module) -> None:
    """Initialise all weights and buffers of a model that was built on the meta device, by transformers' rules."""
    cast("PreTrainedModel", model).initialize_weights()


def read_config(init_from: str) -> PreTrainedConfig:
    """The configuration of a local folder, for a model without its weights.

    Raises:
        ValueError: `init_from` is not a folder with a model.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(_model_folder(init_from), local_files_only=True)
    config.dtype = torch.get_default_dtype()  # as `build_model`
    return config


def _model_folder(init_from: str) -> Path:
    folder = Path(init_from).expanduser()
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"init_from: {init_from} is not a local folder with a config.json; nothing is downloaded, so give a folder "
            "saved by save_pretrained or by adam-mini export"
        )
    return folder


def active_parameters(model: PreTrainedModel) -> int:
    """Number of parameters that multiply activations: all but embeddings that are only looked up."""
    head = model.get_output_embeddings()
    used = {id(p) for p in head.parameters()} if head is not None else set()
    looked_up = {
        id(child.weight): child.weight.numel()
        for child in model.modules()
        if isinstance(child, nn.Embedding) and id(child.weight) not in used
    }
    return sum(p.numel() for p in model.parameters()) - sum(looked_up.values())
