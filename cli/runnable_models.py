"""Models that run here: with random weights on a device, and random inputs for their forward pass."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .messages import quiet

__all__ = [
    "WEIGHT_STD",
    "built",
    "check_size",
    "choose_device",
    "dummy_inputs",
    "give_memory",
    "shortened",
    "trained_bytes",
]

MAX_ELEMENTS = 1_000_000_000
"""Elements of the largest model that runs: 4 GB in float32, and as much again for copies."""
LARGE = 100_000_000
"""A model with more elements runs with fewer layers."""
LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_encoder_layers",
    "num_decoder_layers",
)  # fmt: skip
"""Names of the number of layers in configurations of transformers."""
BATCH, TOKENS, SIDE = 2, 8, 32
WEIGHT_STD = 0.02


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


def built(build: Callable[[], nn.Module], meta_model: nn.Module) -> tuple[nn.Module, list[str]]:
    """Build a model with random weights; the result is that of `Source.runnable`."""
    check_size(meta_model)
    with quiet():
        return build(), []


def shortened(meta_model: Any) -> tuple[nn.Module, list[str]]:
    """Build a model of transformers with random weights; a large one keeps at least one layer of each kind.

    Args:
        meta_model: The model on the meta device.
    """
    config, remarks = copy.deepcopy(meta_model.config), []
    if sum(parameter.numel() for parameter in meta_model.parameters()) > LARGE:
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
            check_size(type(meta_model)(config))
        return type(meta_model)(config), remarks


def dummy_inputs(model: Any) -> dict[str, Any]:
    """Random keyword arguments for the forward pass of a model, from the sizes in its configuration.

    Raises:
        ValueError: It needs an argument of unknown shape.
    """
    network = model.model if hasattr(model, "optimizer_factory") else model
    config = getattr(network, "config", None)
    signature = inspect.signature(model.forward).parameters
    if "graph" in signature:
        # With label reuse, labels are concatenated to the features.
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
    """A random tensor for an argument of this name; None if its shape is unknown."""
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


def choose_device(name: str | None) -> torch.device:
    """The device of `--device`.

    Raises:
        ValueError: CUDA is asked for, and there is no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; leave it out, or give --device cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def give_memory(model: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Replace parameters and buffers on the meta device by tensors with memory; tied parameters stay tied.

    Parameters are drawn from a normal distribution of standard deviation `WEIGHT_STD`, buffers are zero.

    Args:
        model: A model on the meta device; it is changed in place.
        device: Device of the tensors.
        dtype: Dtype of floating-point parameters; their own by default.
    """
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    kind = dtype if parameter.is_floating_point() and dtype else parameter.dtype
                    # Not `empty_like`: under FakeTensorMode it rejects a real tensor.
                    content = torch.empty_strided(parameter.shape, parameter.stride(), dtype=kind, device=device)
                    if content.is_floating_point():
                        content.normal_(0.0, WEIGHT_STD)
                    made[parameter] = nn.Parameter(content, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[parameter]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)


def trained_bytes(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Bytes of the trainable parameters, in `dtype` or their own."""
    return sum(p.numel() * (dtype or p.dtype).itemsize for p in model.parameters() if p.requires_grad)
