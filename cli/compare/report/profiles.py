"""Performance profiles over the tasks (Dolan and More, Mathematical Programming 91, 2002)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from .names import task_names
from .style import Drawing, draw
from .theme import sentinel, series_style
from .wording import number, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..comparison import Comparison
    from ..outcomes import Profile

__all__ = ["profile_chart"]


def profile_chart(comparison: Comparison, cost: Literal["steps", "seconds"]) -> Drawing | None:
    """Share of the tasks on which an optimizer is within a factor of the quickest; None with less than two tasks."""
    profiles = comparison.profiles.get(cost, ())
    num_tasks = max((len(profile.factors) for profile in profiles), default=0)
    if len(comparison.tasks) < 2 or not num_tasks:
        return None
    largest = max((tau for profile in profiles for tau in profile.taus), default=1.0)
    end = max(1.1, largest * 1.08)

    def paint(axes: Axes) -> None:
        for profile in profiles:
            style = series_style(comparison.optimizers.index(profile.optimizer))
            taus, shares = [*profile.taus, end], [*profile.shares, profile.shares[-1] if profile.shares else 0.0]
            if not profile.taus:
                taus, shares = [1.0, end], [0.0, 0.0]
            look = {"color": sentinel(style.variable), "marker": style.marker, "linestyle": style.linestyle}
            # The last corner is the edge of the chart and no measurement.
            axes.plot(taus, shares, drawstyle="steps-post", clip_on=False, markevery=slice(0, -1), **look)
        axes.set_xlim(1, end)
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("factor of the quickest optimizer's " + ("steps" if cost == "steps" else "training time"))
        axes.set_ylabel("share of the tasks")
        axes.locator_params(axis="x", nbins=6)

    title = f"Performance profile, {'steps' if cost == 'steps' else 'training time'} to the target"
    caption = (
        f"Higher is better. A curve at factor 1 is the share of {num_tasks} tasks on which the optimizer was quickest; "
        "one that stays below 1 did not reach the target on every task."
    )
    words = f"{title}. " + " ".join(_in_words(profile, task_names(comparison)) for profile in profiles)
    return draw(f"profile-{cost}", title=title, caption=caption, words=words, paint=paint)


def _in_words(profile: Profile, names: Mapping[str, str]) -> str:
    factors = [
        f"{names[recipe]} never" if factor is None else f"{names[recipe]} factor {number(factor, decimals=2)}"
        for recipe, factor in profile.factors.items()
    ]
    return f"{plain(profile.optimizer)}: {', '.join(factors)}."
