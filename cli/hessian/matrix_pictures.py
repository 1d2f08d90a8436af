"""Pictures of absolute entries of a Hessian, small enough for a page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["show_matrix", "shrunk"]

MOST = 256
DECADES = 4


def shrunk(matrix: Tensor, most: int = MOST) -> Tensor:
    """Absolute values, of large matrices the largest of each square, at most `most` to a side: lines stay seen."""
    step = -(-len(matrix) // most)
    return F.max_pool2d(matrix.abs()[None, None], step, ceil_mode=True)[0, 0].float()


def show_matrix(axes: Axes, values: Tensor, title: str) -> None:
    """Values `(k, k)` in colours of four decades below the largest one.

    Args:
        axes: Where.
        values: Not negative; see `shrunk`.
        title: Above the picture.
    """
    top = values.max().item() or 1.0
    shown = (values / top).clamp(min=10.0**-DECADES).log10()
    axes.imshow(shown.numpy(), vmin=-DECADES, vmax=0, cmap="magma", interpolation="nearest")
    axes.set_title(f"{title}\nlargest {top:.1e}", fontsize=7)
    axes.set_xticks([])
    axes.set_yticks([])
