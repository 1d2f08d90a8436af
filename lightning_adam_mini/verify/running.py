"""Run one forward pass of a model under the tracer, and restore the model bit by bit."""

from __future__ import annotations

import copy
import inspect
import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import FunctionType
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import checkpoint

from lightning_adam_mini.verify.operations import Factor, arguments, tensors_in
from lightning_adam_mini.verify.tracing import Call, Tracer

__all__ = ["traced"]

_CONTAINERS = (list, dict, OrderedDict, defaultdict, set, deque)

FUNCTIONS = ("flash_attn_func", "flex_attention")
"""Attention functions that any file may import; the delta rules of linear attention are defined next to models."""


def traced(
    model: nn.Module,
    inputs: Sequence[Any],
    keyword_inputs: Mapping[str, Any],
    *,
    on_call: Callable[[Call], None] | None = None,
) -> Tracer:
    """Trace one forward pass of a model, in eval mode and on copies of its weights.

    Args:
        model: The model.
        inputs: Positional arguments of its forward pass.
        keyword_inputs: Keyword arguments.
        on_call: Called with each attention call.

    Returns:
        The tracer.

    Raises:
        ValueError: The model has no weights, or its forward pass fails.
    """
    _check(model)
    with _restored(model), torch.inference_mode(False), torch.enable_grad():
        tracer = Tracer(_swap_parameters(model), on_call=on_call)
        args, kwargs = _copied((inputs, keyword_inputs))
        tracer.mark_inputs([args, kwargs])
        try:
            with _watched(model, tracer), tracer:
                getattr(model, "_orig_mod", model)(*args, **kwargs)  # not what torch.compile made of it
        except Exception as error:
            raise _explained(error, model, inputs, keyword_inputs) from error
    return tracer


def _copied(inputs: tuple[Sequence[Any], Mapping[str, Any]]) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Copies of the inputs, since the model may write to them; a tensor that occurs twice is copied once."""
    memo: dict[int, Any] = {
        id(tensor): tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in tensors_in(inputs)
    }
    try:
        return copy.deepcopy(inputs, memo)
    except Exception:  # noqa: BLE001 - other people's classes
        return inputs


def _check(model: nn.Module) -> None:
    """Check that a model can run here.

    Raises:
        ValueError: It cannot; the message has the remedy.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"verify_partition takes a model, an instance of nn.Module, not a {type(model).__name__}")
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(f"{name}: has no shape yet; run one batch through the model first (lazy layers)")
        if parameter.is_meta:
            raise ValueError(
                f"{name}: is on the meta device and has no weights to run; build the model on the CPU, with fewer "
                "layers if it is large: random weights are enough"
            )
        if hasattr(parameter, "full_tensor"):
            raise ValueError(f"{name}: is sharded; verify the partition before the model is sharded")


def _explained(
    error: Exception, model: nn.Module, inputs: Sequence[Any], keyword_inputs: Mapping[str, Any]
) -> Exception:
    """The error for a forward pass that failed: whether it fails in general, or only while it is traced."""
    message = f"{type(error).__name__}: {error}"
    try:
        with torch.no_grad():
            model(*inputs, **keyword_inputs)
    except Exception:  # noqa: BLE001 - other people's code may raise anything
        return ValueError(f"the forward pass of {type(model).__name__} does not take this input:\n{message}")
    return ValueError(f"the forward pass of {type(model).__name__} runs, but cannot be traced:\n{message}")


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Restore weights, buffers, attributes, modes and the random state on exit."""
    modules = list(model.modules())
    modes = [module.training for module in modules]
    attributes = [(vars(module), dict(vars(module))) for module in modules]
    # They contain parameters and buffers, and lists that a model may append to.
    contents = [
        (value, copy.copy(value)) for _, own in attributes for value in own.values() if type(value) in _CONTAINERS
    ]
    python_state, numpy = random.getstate(), sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    try:
        with torch.random.fork_rng([device.index or 0 for device in devices]):
            torch.manual_seed(0)
            for module in modules:
                module.training = False
                for name, buffer in () if isinstance(module, torch.jit.ScriptModule) else module._buffers.items():
                    module._buffers[name] = None if buffer is None else buffer.detach().clone()
            yield
    finally:
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)
        for container, content in [*attributes, *contents]:
            container.clear()
            (container.extend if isinstance(container, list | deque) else container.update)(content)
        for module, mode in zip(modules, modes, strict=True):
            if module.training != mode:  # scripted modules keep it elsewhere
                module.training = mode


def _swap_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Replace parameters by copies without hooks and flags, and return these by name.

    A weight with equal elements, such as a gate or a LoRA factor that starts at zero, would hide later dependencies:
    its copy gets noise.
    """
    copies: dict[int, nn.Parameter] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        for name, parameter in () if isinstance(module, torch.jit.ScriptModule) else module._parameters.items():
            if parameter is None or not parameter.is_floating_point():
                continue
            if id(parameter) not in copies:
                copy = parameter.detach().clone()
                if copy.numel() and copy.dtype.itemsize > 1 and bool((copy == copy.flatten()[0]).all()):
                    copy += 0.1 * torch.randn_like(copy)
                copies[id(parameter)] = nn.Parameter(copy)
            module._parameters[name] = copies[id(parameter)]
    return {names[key]: copy for key, copy in copies.items() if key in names}


@contextmanager
def _watched(model: nn.Module, tracer: Tracer) -> Iterator[None]:
    """Track running modules, and functions whose inner operations do not look like attention."""

    def left(*_: Any) -> None:
        tracer.running.pop()

    fastpath = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fastpath)
        if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled, and the import takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        # Activation checkpointing would run parts again, inside derivatives.
        stack.enter_context(patch.object(checkpoint, "_checkpoint_hook", lambda _: nullcontext()))
        stack.enter_context(
            patch.object(checkpoint.CheckpointFunction, "apply", lambda function, _, *args: function(*args))
        )
        enter = nn.modules.module.register_module_forward_pre_hook(lambda module, _: tracer.running.append(module))
        leave = nn.modules.module.register_module_forward_hook(left, always_call=True)
        stack.callback(enter.remove)
        stack.callback(leave.remove)
        modules = list(model.modules())
        for module in modules:
            if _is_graph_attention(module):
                stack.enter_context(
                    patch.object(module, "message", _watched_message(tracer, cast("Any", module.message)))
                )
            for name, value in list(vars(module).items()):
                if (heads := _heads_dimension(value)) is not None:
                    stack.enter_context(patch.object(module, name, _watched_function(tracer, value, heads)))
        own_files = {sys.modules.get(type(module).__module__) for module in modules}
        for file in list(sys.modules.values()):
            members = getattr(file, "__dict__", {})
            for name in list(members) if file in own_files else FUNCTIONS:
                if (heads := _heads_dimension(members.get(name))) is not None:
                    stack.enter_context(patch.object(file, name, _watched_function(tracer, members[name], heads)))
        yield


def _heads_dimension(value: Any) -> int | None:
    """The dimension of heads in the arguments of an attention function; None for any other function."""
    if not isinstance(value, FunctionType):
        return None
    name = value.__name__
    if name not in FUNCTIONS and "delta" not in name:
        return None
    try:
        first = tuple(inspect.signature(value).parameters)[:3]
    except (TypeError, ValueError):
        return None
    if first not in (("query", "key", "value"), ("q", "k", "v")):
        return None
    return 1 if name == "flex_attention" else 2


def _watched_function(tracer: Tracer, function: Callable[..., Any], heads: int) -> Callable[..., Any]:
    def watched(*args: Any, **kwargs: Any) -> Any:
        names = list(inspect.signature(function).parameters)[:3]
        query, key, value = (Factor(tensor, (0, heads)) for tensor in arguments(names, args, kwargs))
        return tracer.attend(function, (query, key, value), args, kwargs)

    return watched


def _is_graph_attention(module: nn.Module) -> bool:
    code = getattr(getattr(type(module), "message", None), "__code__", None)
    return code is not None and {"query_i", "key_j", "value_j"} <= set(code.co_varnames[: code.co_argcount])


def _watched_message(tracer: Tracer, message: Callable[..., Any]) -> Callable[..., Any]:
    """Edges are the tokens: `(edges, heads, head_dim)`."""

    def watched(query_i: Tensor, key_j: Tensor, value_j: Tensor, **rest: Any) -> Any:
        operands = Factor(query_i, (1,)), Factor(key_j, (1,)), Factor(value_j, (1,))
        return tracer.attend(message, operands, (), {"query_i": query_i, "key_j": key_j, "value_j": value_j, **rest})

    return watched
