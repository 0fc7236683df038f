"""Means over seeds, and what their 95 % intervals (Student's t) allow to say."""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

CONFIDENCE = 0.95

Values = Mapping[int, float]
"""By seed."""


class Interval(NamedTuple):
    """A mean, and the interval that holds the true one in 95 of 100 studies, if the seeds' values spread normally.

    `low` and `high` are None for one seed alone.
    """

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def side(self) -> int:
        """1 or -1 where the whole interval lies above or below zero, 0 where zero is in it."""
        if self.low is None or self.high is None:
            return 0
        return (self.low > 0) - (self.high < 0)


def interval(values: Sequence[float]) -> Interval:
    """Of one value a seed."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, None, None, len(values))
    from scipy.stats import t

    quantile = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    half = quantile * statistics.stdev(values) / len(values) ** 0.5
    return Interval(mean, mean - half, mean + half, len(values))


def paired(values: Values, others: Values) -> Interval | None:
    """Of the differences to `others`, seed by seed, over the seeds that both have; None where they share none."""
    seeds = sorted(values.keys() & others.keys())
    return interval([values[seed] - others[seed] for seed in seeds]) if seeds else None


def mean_over(tasks: Sequence[Values]) -> Values:
    """By seed, the mean over tasks; of the seeds that every task has."""
    seeds = set.intersection(*(set(values) for values in tasks)) if tasks else set()
    return {seed: statistics.fmean(values[seed] for values in tasks) for seed in sorted(seeds)}
