"""Names of equal layers as one: `layers.0.weight` and `layers.1.weight` as `layers.{0,1}.weight`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import product
from typing import TypeVar

__all__ = ["collapse", "collapse_names", "template"]

Item = TypeVar("Item")
Numbers = tuple[int, ...]


def template(name: str) -> str:
    """A name with `*` for each segment that is a number: the same for equal parts of equal layers."""
    return ".".join("*" if _is_number(segment) else segment for segment in name.split("."))


def collapse(
    items: Iterable[Item], *, name: Callable[[Item], str], alike: Callable[[Item], Hashable]
) -> list[tuple[str, list[Item]]]:
    """Items that are alike, and whose names differ in numbers only, under one name each.

    Args:
        items: What has names; no name occurs twice.
        name: The name of an item.
        alike: What has to be equal besides.

    Returns:
        Pairs of a name and the items that it stands for, in the order of their first items. The braces in a name stand
        for every combination of the numbers in them and for nothing else, though a long list shows its ends alone.
    """
    groups: dict[Hashable, dict[Numbers, tuple[int, Item]]] = {}
    for position, item in enumerate(items):
        group = groups.setdefault((template(name(item)), alike(item)), {})
        group[_numbers(name(item))] = (position, item)
    found = []
    for group in groups.values():
        for sets in _products(list(group)):
            together = [group[combination] for combination in product(*sets)]
            found.append((together[0][0], _spelt(name(together[0][1]), sets), [item for _, item in together]))
    return [(pattern, members) for _, pattern, members in sorted(found, key=lambda entry: entry[0])]


def collapse_names(names: Iterable[str], *, limit: int = 6) -> str:
    """Names for a sentence: equal layers as one, and at most `limit` of them."""
    collapsed = collapse(names, name=str, alike=lambda _: None)
    rest = sum(len(members) for _, members in collapsed[limit:])
    return ", ".join(pattern for pattern, _ in collapsed[:limit]) + (f" and {rest} more" if rest else "")


def _is_number(segment: str) -> bool:
    return segment.isdecimal() and segment == str(int(segment))


def _numbers(name: str) -> Numbers:
    return tuple(int(segment) for segment in name.split(".") if _is_number(segment))


def _products(combinations: Sequence[Numbers]) -> list[tuple[Numbers, ...]]:
    """Combinations as products of sets: `(0, 0), (0, 1), (1, 0)` as `{0} x {0, 1}` and `{1} x {0}`."""
    if not combinations[0]:
        return [()]
    rests: dict[int, list[Numbers]] = {}
    for first, *rest in combinations:
        rests.setdefault(first, []).append(tuple(rest))
    with_same_rests: dict[frozenset[Numbers], list[int]] = {}
    for first, own in rests.items():
        with_same_rests.setdefault(frozenset(own), []).append(first)
    return [(tuple(firsts), *sets) for firsts in with_same_rests.values() for sets in _products(rests[firsts[0]])]


def _spelt(name: str, sets: Sequence[Numbers]) -> str:
    spelt = iter(sets)
    return ".".join(_braces(next(spelt)) if _is_number(segment) else segment for segment in name.split("."))


def _braces(numbers: Numbers, limit: int = 8) -> str:
    """One number as it is, several in braces, of runs the ends."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    told = [f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs]
    if len(told) > limit:
        told = [*told[:2], "...", told[-1]]
    return f"{{{','.join(told)}}}"
