"""What the Triton kernels share: addresses, loads and the arithmetic of one element.

No kernel gets a tensor of the model: each reads addresses from a table, so that one launch serves a whole list. Tables
are built in `triton_plan`, and launches walk through their rows:

- `addresses`, int64 (tensors, 4): parameter, gradient, first moment, second moment.
- `scalars`, float32 (tensors, 3): the factor of weight decay, the step size, the root of the second bias correction.
- `bands`, int64 (bands, 6): tensor, first element, number of runs, elements a run, first second moment, first program.
- `chunks`, int64 (chunks, 4): tensor, first element, elements, second moment.
- `tiles`, int64 (tiles, 7): tensor, first element, elements to the next row, rows, columns, first entry of `columns`,
  number of the tile along its columns.
- `columns`, int32 (columns, 2): second moment, first partial sum.
- `blocks`, int64 (blocks, 5): tensor, second moment, first partial sum, number of partial sums, elements.

Arithmetic is in float32, and partial sums, which are float64, are added in a fixed order, so that a step is the same
each time.
`is_aligned` promises that runs start at multiples of 16 bytes and have multiples of 8 elements: then loads are 128 bits
wide.

Annotations are no strings in these files: Triton reads them.
"""

import triton
import triton.language as tl

__all__ = ["load_floats", "load_length", "load_scalars", "pointer_to", "step_factor", "store_update"]


@triton.jit
def pointer_to(
    addresses: tl.tensor,
    tensor: tl.tensor,
    field: tl.constexpr,
    offset: tl.tensor,
    dtype: tl.constexpr,
    is_aligned: tl.constexpr,
) -> tl.tensor:
    """The address of element `offset` of a tensor, as a pointer; the hint that it is aligned makes loads wide."""
    pointer = tl.load(addresses + tensor * 4 + field).to(tl.pointer_type(dtype)) + offset
    if is_aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load_floats(pointer: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Elements in float32, zeros where there are none."""
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_scalars(scalars: tl.tensor, tensor: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The factor of weight decay, the step size, and the root of the second bias correction of a tensor."""
    entry = scalars + tensor * 3
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)


@triton.jit
def load_length(values: tl.tensor, is_aligned: tl.constexpr) -> tl.tensor:
    """A small number of elements from a table; masks that are constant over 8 elements keep loads wide."""
    length = tl.load(values).to(tl.int32)
    if is_aligned:
        length = tl.multiple_of(length, 8)
    return length


@triton.jit
def store_update(
    param: tl.tensor,
    exp_avg: tl.tensor,
    mask: tl.tensor,
    p: tl.tensor,
    g: tl.tensor,
    m: tl.tensor,
    decay: tl.tensor,
    factor: tl.tensor,
    weight1: tl.tensor,
) -> None:
    """Store `m + weight1 * (g - m)`, and `decay * p` less `factor` times that."""
    m = m + weight1 * (g - m)
    tl.store(exp_avg, m.to(exp_avg.dtype.element_ty), mask=mask)
    tl.store(param, (p * decay - factor * m).to(param.dtype.element_ty), mask=mask)


@triton.jit
def step_factor(moment: tl.tensor, step_size: tl.tensor, root: tl.tensor, eps: tl.tensor) -> tl.tensor:
    """What the first moment is multiplied by: the step size over the root of the corrected second moment."""
    return step_size / (tl.sqrt(moment) / root + eps)
