"""What every figure of the report means."""

from __future__ import annotations

__all__ = ["DEFINITIONS"]

DEFINITIONS: tuple[tuple[str, str], ...] = (
    (
        "Budget",
        "Every optimizer is given a grid of learning rates. Each is trained with the tuning seeds, and the best "
        "one with the remaining seeds too. A run that diverges counts among the learning rates of its optimizer; one "
        "that failed is tried again at each start, and nothing takes its place.",
    ),
    (
        "Best learning rate",
        "The one with the best mean over the tuning seeds, among those at which every tuning seed came to its end; "
        "where a seed was lost at each rate, the best of those with the most seeds left. It is chosen on figures of "
        "validation: where the final figure is one of a test, that of validation chooses; where the final figure is "
        "itself one of validation, the same figure chooses and there is no held-out set. A rate at which a run failed "
        "or was not finished, for no fault of the optimizer's, is named below the table and leaves no verdict. Where "
        "the best is the lowest or the highest of the grid, a wider grid may hold a better one.",
    ),
    (
        "Final figure, mean ± std",
        "Mean and sample standard deviation (divisor n − 1) of the last value of each run, over the seeds that "
        "came to their end at the best learning rate. The tuning seeds, on which the rate was chosen, "
        "are among them: their figures are selected ones. One seed has no deviation.",
    ),
    (
        "Difference and interval",
        "Mean less the reference's mean, with the 95\u00a0% confidence interval of Welch's t test (Welch, Biometrika "
        "34, 1947), which does not assume equal spreads. With few seeds it is wide, as it should be. Nothing is "
        "corrected for the number of comparisons.",
    ),
    (
        "Verdict",
        "Better or worse: the whole interval lies on that side of zero. Within the spread: it holds zero; so many "
        "seeds do not tell the two apart, which is neither a win nor a proof that they are equal. Failed: every run "
        "did. No verdict: there are too few values, the seeds do not differ at all, or runs were lost, and what is "
        "left would flatter.",
    ),
    (
        "Target, steps and time to it",
        "The target is the median over seeds of the reference's last validation at its best learning rate; of an even "
        "number of seeds the worse of the middle two, so that the reference's median seed reaches it. Steps and time "
        "to the target end at the first validation that is at least as good; so they are known to one validation "
        "interval. The figure is the median over seeds, where a seed that never got there, or diverged, counts as "
        "later than any other. Seeds that failed or were not finished are left out.",
    ),
    (
        "Training time, time per step",
        "Wall-clock time from the first step on, without validation; saving checkpoints counts. Runs that share a "
        "machine slow one another down, and not all alike: with several at once, times and their ratios are "
        "indicative. One run at a time (--jobs 1) measures them.",
    ),
    (
        "Optimizer's update",
        "The time from the end of gradient clipping to the end of the optimizer's step; part of the time per step.",
    ),
    (
        "Peak memory",
        "On CUDA the peak that the allocator handed out on one rank; on a CPU the peak of the resident memory of "
        "the process, with Python, its libraries and the data.",
    ),
    (
        "Optimizer state, measured and predicted",
        "Bytes of all tensors in the optimizer's state on one rank, as counted in the run, and as the shapes of "
        "the parameters predict it before training. Costs are medians over the seeds at the best learning rate.",
    ),
    (
        "Performance profile",
        "For each task, the median time to the target in units of the quickest optimizer's. The curve at a factor "
        "is the share of the tasks on which the optimizer is within that factor (Dolan and More, Mathematical "
        "Programming 91, 2002). The target is the reference's, so the profile depends on the choice of the "
        "reference.",
    ),
)
