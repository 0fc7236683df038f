"""Means over seeds, with 95 % intervals (Student's t)."""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

CONFIDENCE = 0.95

Values = Mapping[int, float]
"""Values by seed."""


class Interval(NamedTuple):
    """A mean, and an interval that contains the true mean in 95 of 100 studies, if values are normal over seeds.

    `low` and `high` are None for a single seed.
    """

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def side(self) -> int:
        """1 or -1 if the whole interval is above or below zero, else 0."""
        if self.low is None or self.high is None:
            return 0
        return (self.low > 0) - (self.high < 0)


def interval(values: Sequence[float]) -> Interval:
    """Returns the interval of the values, one per seed."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, None, None, len(values))
    from scipy.stats import t

    quantile = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    half = quantile * statistics.stdev(values) / len(values) ** 0.5
    return Interval(mean, mean - half, mean + half, len(values))


def paired(values: Values, others: Values) -> Interval | None:
    """Returns the interval of `values` - `others`, seed by seed, over the common seeds; None if there are none."""
    seeds = sorted(values.keys() & others.keys())
    return interval([values[seed] - others[seed] for seed in seeds]) if seeds else None


def mean_over(tasks: Sequence[Values]) -> Values:
    """Returns the mean over tasks by seed, for the seeds that every task has."""
    seeds = set.intersection(*(set(values) for values in tasks)) if tasks else set()
    return {seed: statistics.fmean(values[seed] for values in tasks) for seed in sorted(seeds)}
