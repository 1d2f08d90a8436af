"""What was compared and what came out, in a few honest sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .names import task_names
from .wording import learning_rate, number, plain

if TYPE_CHECKING:
    from ..comparison import Comparison, TaskComparison

__all__ = ["page_summary", "page_title", "task_summary"]

LISTED = 4


def page_title(comparison: Comparison) -> str:
    """`AdamMini and AdamW on gpt2_tiny`, or numbers where there are many."""
    optimizers, recipes = comparison.optimizers, list(task_names(comparison).values())
    who = _listed(optimizers) if len(optimizers) <= LISTED - 1 else f"{len(optimizers)} optimizers"
    return f"{who} on {_listed(recipes) if len(recipes) <= LISTED - 2 else f'{len(recipes)} tasks'}"


def page_summary(comparison: Comparison) -> str:
    """What was compared, with which budget, against which reference, and the verdicts, unless they are many."""
    tasks = _listed(list(task_names(comparison).values()))
    sentences = [
        f"Compared: {_listed(comparison.optimizers)} on {tasks}.",
        f"The reference is {plain(comparison.reference)}.",
        _budget(comparison),
        _statuses(comparison),
        *_verdicts(comparison),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def task_summary(comparison: Comparison, task: TaskComparison) -> str:
    """The recipe's own title, its figure and its target."""
    title = plain(task.title).rstrip(".")
    title = f"{title}. " if title and title != task_names(comparison)[task.recipe] else ""
    better = "less" if task.primary_metric.mode == "min" else "more"
    figure = f"Runs are compared by their final {plain(task.primary_metric.label)} ({better} is better)."
    if task.selection_differs:
        figure += (
            f" Learning rates were chosen by {_name_and_unit(task.primary_metric.curve_label)[0]}, not by this figure."
        )
    return f"{title}{figure} {_target(comparison, task)}"


def _target(comparison: Comparison, task: TaskComparison) -> str:
    reference = plain(comparison.reference)
    if task.target is None:
        entry = next((entry for entry in task.entries if entry.optimizer == comparison.reference), None)
        if entry is None or entry.final is None:
            return f"There is no target, because {reference} has no finished run."
        return f"There is no target, because most seeds of {reference} diverged or were not validated."
    name, unit = _name_and_unit(task.primary_metric.curve_label)
    article = "an" if name[:1].lower() in tuple("aeiou") else "a"
    value = f"{number(task.target)} {unit}".rstrip()
    return f"The target is {article} {name} of {value}, the median of where the seeds of {reference} end."


def _name_and_unit(label: str) -> tuple[str, str]:
    """`validation loss` and `nats a token` of a label with both."""
    name, _, unit = plain(label).partition(",")
    return name.strip(), unit.strip()


def _budget(comparison: Comparison) -> str:
    """Whether each optimizer had as many runs as the others, and how many."""
    by_task = [{tuple(sorted(entry.lrs)) for entry in task.entries} for task in comparison.tasks]
    grids = set().union(*by_task)
    sizes = sorted({len(grid) for grid in grids})
    seeds, tuning = comparison.seeds, comparison.tuning_seeds
    rates = f"{sizes[0]} learning rate{'s' * (sizes != [1])}" if len(sizes) == 1 else ""
    if len(grids) == 1:
        (grid,) = grids
        rates = f"the learning rate{'s' * (len(grid) != 1)} {_listed([learning_rate(lr) for lr in grid], 99)}"
    elif not rates:
        rates = f"{sizes[0] if sizes else 0} to {sizes[-1] if sizes else 0} learning rates"
    elif any(len(grids_of_task) > 1 for grids_of_task in by_task):
        rates += ", not the same for all,"
    same = "Each optimizer had the same budget on each task" if len(sizes) == 1 else "The budgets differ"
    more = [seed for seed in seeds if seed not in tuning]
    text = f"{same}: {rates} with {_seeds(tuning)}"
    return f"{text}, then the best one with {_seeds(more)} too." if more else f"{text}."


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' * (len(seeds) != 1)} {_listed([str(seed) for seed in seeds], 99)}"


def _statuses(comparison: Comparison) -> str:
    counts = {status: count for status, count in comparison.statuses.items() if count}
    done, total = counts.pop("done", 0), len(comparison.runs)
    if done == total:
        return f"All {total} runs finished." if total != 1 else "The run finished."
    words = {"timeout": "ran out of time", "interrupted": "interrupted", "pending": "pending"}
    others = [f"{count} {words.get(status, status)}" for status, count in sorted(counts.items())]
    unfinished = " The comparison is not complete." if counts.keys() & {"pending", "interrupted"} else ""
    return f"{done} of {total} runs finished; {_listed(others, 99)}.{unfinished}"


def _verdicts(comparison: Comparison) -> list[str]:
    """One sentence for each optimizer but the reference."""
    if len(comparison.seeds) == 1 and len(comparison.optimizers) > 1:
        return ["There is one seed, so there is no verdict: differences may be chance."]
    if len(comparison.tasks) > 1 and len(comparison.optimizers) > LISTED:
        return []  # the table of verdicts says it in less room
    sentences = []
    for optimizer in comparison.optimizers:
        if optimizer == comparison.reference:
            continue
        words = Counter(
            entry.verdict.word for task in comparison.tasks for entry in task.entries if entry.optimizer == optimizer
        )
        if len(comparison.tasks) == 1:
            found = _listed([_in_one_task(word) for word in words])
        else:
            found = _listed([f"{_in_one_task(word)} on {count}" for word, count in words.most_common()], 99)
            found += f" of {len(comparison.tasks)} tasks"
        sentences.append(f"{plain(optimizer)}: {found}.")
    if any(entry.verdict.word == "within the spread" for task in comparison.tasks for entry in task.entries):
        sentences.append("What is within the spread shows neither a difference nor equality.")
    return sentences


def _in_one_task(word: str) -> str:
    return f"{word} than the reference" if word in ("better", "worse") else word


def _listed(names: Sequence[str], most: int = 8) -> str:
    """`a, b and c`; only the first ones of many."""
    texts = [plain(name) for name in names]
    if len(texts) > most:
        texts = [*texts[: most - 1], f"{len(texts) - most + 1} more"]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}" if texts else "nothing"
