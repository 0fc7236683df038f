"""The only timer: everything that is compared takes turns, and is summarised relative to a reference."""

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Timing:
    """The milliseconds per run of an action, and the ratio of its median to the reference's."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    ratio: float
    rounds: int

    def columns(self) -> dict[str, Any]:
        """Returns the fields, rounded to four decimals."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


def time_in_turn(
    actions: Mapping[str, Callable[..., object]],
    *,
    rounds: int,
    warmup: int = 1,
    max_seconds: float = float("inf"),
    seed: int = 0,
    prepare: Callable[[str], Sequence[Any]] = lambda name: (),
    on_round: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Runs each action once per round, in a new random order every round.

    All actions thus see the same machine, and none always follows the same other one. No garbage is collected while an
    action is timed.

    Args:
        actions: the actions by name.
        rounds: number of timed runs of each action.
        warmup: number of untimed runs of each action before the first round.
        max_seconds: no further round begins after so many seconds.
        seed: seed of the order.
        prepare: called before each run with the action's name, untimed; returns the arguments of the action.
        on_round: called after every round.

    Returns:
        the seconds of every run, by name.
    """
    for name in actions:
        for _ in range(warmup):
            _seconds(actions[name], prepare(name))
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    order = list(actions)
    generator = random.Random(seed)
    begin = time.perf_counter()
    for index in range(rounds):
        if index and time.perf_counter() - begin > max_seconds:
            break
        generator.shuffle(order)
        for name in order:
            seconds[name].append(_seconds(actions[name], prepare(name)))
        on_round()
    return seconds


def _seconds(action: Callable[..., object], arguments: Sequence[Any]) -> float:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        action(*arguments)
        return time.perf_counter() - start
    finally:
        if was_enabled:
            gc.enable()


def summarize(seconds: Mapping[str, Sequence[float]], reference: str | None = None) -> dict[str, Timing]:
    """Returns medians with p20 and p80 by name. Ratios refer to the name `reference`, by default the first one."""
    cuts = {name: 1000 * np.percentile(times, (50, 20, 80)) for name, times in seconds.items()}
    floor = cuts[next(iter(cuts)) if reference is None else reference][0]
    return {
        name: Timing(float(median), float(p20), float(p80), float(median / floor), len(seconds[name]))
        for name, (median, p20, p80) in cuts.items()
    }
