"""Models that can run here, and inputs that they take, for whoever looks at one forward pass."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .model_building import quiet

__all__ = ["built", "check_size", "dummy_inputs", "shortened"]

MAX_ELEMENTS = 1_000_000_000
"""Elements of the largest model that is run, 4 GB in float32, and as many again for copies."""
LARGE = 100_000_000
"""Elements from which on layers are left out."""
LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_encoder_layers",
    "num_decoder_layers",
)  # fmt: skip
"""What configurations of transformers call the number of equal layers."""
BATCH, TOKENS, SIDE = 2, 8, 32


def check_size(model: nn.Module) -> None:
    """Check that a model is small enough to run.

    Raises:
        ValueError: It is not.
    """
    elements = sum(parameter.numel() for parameter in model.parameters())
    if elements > MAX_ELEMENTS:
        raise ValueError(
            f"--verify runs the model, and {elements:,} parameters are too many for that: give a configuration of "
            "the same classes with smaller sizes"
        )


def built(build: Callable[[], nn.Module], outline: nn.Module) -> tuple[nn.Module, list[str]]:
    """A model with random weights, as `runnable` of a `Source` gives it."""
    check_size(outline)
    with quiet():
        return build(), []


def shortened(outline: Any) -> tuple[nn.Module, list[str]]:
    """A model of transformers with random weights, with as many layers as show one of each kind where it is large.

    Args:
        outline: The model on the meta device.
    """
    config, remarks = copy.deepcopy(outline.config), []
    if sum(parameter.numel() for parameter in outline.parameters()) > LARGE:
        for part in (config, *(getattr(config, name) for name in config.sub_configs)):
            for name in LAYERS:
                count = getattr(part, name, None)
                if isinstance(count, int) and count > 2:
                    kinds = [value for value in vars(part).values() if isinstance(value, list) and len(value) == count]
                    kept = max([2, *(1 + kind.index(value) for kind in kinds for value in kind)])
                    for key, value in vars(part).items():
                        if isinstance(value, list) and len(value) == count:
                            setattr(part, key, value[:kept])
                    setattr(part, name, kept)
                    remarks.append(f"verified with {kept} of {count} layers ({name})")
    with quiet():
        with torch.device("meta"):
            check_size(type(outline)(config))
        return type(outline)(config), remarks


def dummy_inputs(model: Any) -> dict[str, Any]:
    """Keyword arguments for a forward pass of a model, from what its configuration says.

    Raises:
        ValueError: It asks for something that nobody here can make up.
    """
    network = model.model if hasattr(model, "optimizer_factory") else model
    config = getattr(network, "config", None)
    signature = inspect.signature(model.forward).parameters
    if "graph" in signature:
        # Labels that the model is given stand beside the features.
        widths = (getattr(module, "in_channels", None) for module in model.modules())
        width = next(width for width in widths if isinstance(width, int) and width > 0)
        return {"graph": _graph(width - (model._num_classes if model.label_reuse else 0))}
    if hasattr(network, "pretrained_cfg"):
        size = network.pretrained_cfg.get("input_size", (3, SIDE, SIDE))
        return {next(iter(signature)): torch.randn(BATCH, *size)}
    made, missing = {}, []
    for name, parameter in signature.items():
        value = _value(name, config, network)
        is_needed = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        is_main = name in (getattr(network, "main_input_name", None), "input_ids", "pixel_values")
        is_pair = name == "decoder_input_ids" and getattr(config, "is_encoder_decoder", False)
        is_wanted = name in ("encoder_hidden_states", "pooled_projections", "timestep") and hasattr(
            config, "_class_name"
        )
        if is_needed or ((is_main or is_pair or is_wanted) and value is not None):
            if value is None:
                missing.append(name)
            else:
                made[name] = value
    if missing or not made:
        raise ValueError(
            f"--verify cannot make up an input for {type(model).__name__}: its forward pass asks for "
            f"{', '.join(missing or signature)}; call lightning_adam_mini.verify_partition with an input of yours"
        )
    return made


def _value(name: str, config: Any, network: Any) -> Tensor | None:
    """A random tensor for an argument of this name; None where its shape is unknown."""
    parts = [config, *(getattr(config, part, None) for part in ("text_config", "vision_config", "audio_config"))]

    def size(*names: str) -> Any:
        found = (_get(part, key) for part in parts if part is not None for key in names)
        return next((value for value in found if value), None)

    if name in ("input_ids", "decoder_input_ids"):
        vocabulary = size("vocab_size")
        return torch.randint(3, vocabulary, (BATCH, TOKENS)) if isinstance(vocabulary, int) else None
    if name in ("pixel_values", "sample", "images", "hidden_states"):
        convolution = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
        channels = size("num_channels", "in_channels", "in_chans") or (convolution.in_channels if convolution else 3)
        side = size("image_size", "sample_size") or getattr(network, "image_size", SIDE)
        height, width = side if isinstance(side, list | tuple) else (side, side)
        return torch.randn(BATCH, int(channels), int(height), int(width))
    if name in ("timestep", "timesteps"):
        return torch.randint(1, 100, (BATCH,))
    if name == "class_labels":
        return torch.zeros(BATCH, dtype=torch.long)
    if name == "encoder_hidden_states":
        width = size("caption_channels", "joint_attention_dim", "cross_attention_dim")
        return torch.randn(BATCH, TOKENS, width) if isinstance(width, int) else None
    if name == "pooled_projections":
        width = size("pooled_projection_dim")
        return torch.randn(BATCH, width) if isinstance(width, int) else None
    if name == "input_features":
        bins, frames = size("num_mel_bins"), size("max_source_positions")
        return torch.randn(BATCH, bins, 2 * frames) if isinstance(bins, int) and isinstance(frames, int) else None
    if name == "input_values":
        return torch.randn(BATCH, 4000)
    return None


def _get(config: Any, key: str) -> Any:
    return config.get(key) if isinstance(config, dict) else getattr(config, key, None)


def _graph(features: int) -> Any:
    """A ring of nodes."""
    from ..tasks.graph.graph import Graph

    nodes = torch.arange(6)
    edges = torch.stack([nodes, nodes.roll(1)])
    x, y = torch.randn(6, features), torch.zeros(6, dtype=torch.long)
    return Graph(x=x, y=y, edge_index=edges, train=nodes, val=nodes, test=nodes)
