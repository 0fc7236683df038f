"""Compares several contenders on one input, then times them and measures their memory and size: one row each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporters.onnx_runtime import Arrays
from exporters.runtime.torch_runner import Runner
from melora_fx import MELoRAError

from .compare import compare
from .latency import Latency, time_runners
from .machine import file_size_mib, origin_columns, peak_memory_mib
from .timing import summarize


@dataclass(frozen=True)
class Contender:
    """A runner that is timed against others.

    Attributes:
        form: its name among the contenders.
        runner: the runner.
        path: the file of its graph; None if it is not a graph, so that it has no file size or memory in the results.
        tensors: optional inputs that the runner passes in addition to the model's inputs: an adapter.
    """

    form: str
    runner: Runner
    path: Path | None = None
    tensors: Arrays = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    """One row of results. Empty cells are None: a graph without a sequence axis, a form that is not a graph.

    Attributes:
        provider, form, model: the provider that computes, the contender's name, and the class of its model.
        ratio: the median divided by that of the first contender.
        max_rel_difference: the largest relative difference of the outputs from the first contender's.
        peak_memory_mib: memory that a separate process needs to load and run the graph at this shape (CPU only).
        file_size_mib: size of the graph with its external data.
        time: UTC.
    """

    provider: str
    form: str
    model: str
    batch: int
    sequence: int | None
    threads: int | None
    median_ms: float
    p20_ms: float
    p80_ms: float
    ratio: float
    rounds: int
    max_rel_difference: float
    peak_memory_mib: float | None
    file_size_mib: float | None
    versions: str
    device: str
    commit: str
    time: str

    @property
    def latency(self) -> Latency:
        """This row as a row of a `LatencyTable`."""
        return Latency(
            name=self.form,
            median_ms=self.median_ms,
            p20_ms=self.p20_ms,
            p80_ms=self.p80_ms,
            ratio=self.ratio,
            rounds=self.rounds,
            threads=self.threads,
        )


def measure(
    load: Callable[[int], Sequence[Contender]],
    inputs: Mapping[str, Any],
    *,
    provider: str,
    model: str,
    batch: int,
    sequence: int | None,
    loads: int = 3,
    rounds: int = 30,
    max_seconds: float = float("inf"),
    max_difference: float | None = None,
    on_round: Callable[[], object] = lambda: None,
) -> list[Measurement]:
    """Compares the outputs, then times all contenders in turn; the first contender is the reference.

    Two loads of the same graph differ in speed by up to 5 % for as long as they stay loaded. Therefore each load gets
    its share of the rounds, and the times of all loads are pooled.

    Args:
        load: called with 0, 1, …; loads and returns the contenders, all on the same number of threads.
        inputs: as for `Runner.run`, with sizes `batch` and `sequence`.
        provider: the provider that computes, for the column of this name. Peak memory is measured only for "cpu".
        model: the column of this name.
        batch, sequence: the columns of these names.
        loads: number of calls of `load`.
        rounds: timed runs of each contender, rounded up to a multiple of `loads`.
        max_seconds: limit of the timing in seconds; each load runs at least one round.
        on_round: called after every round.
        max_difference: largest relative difference allowed from the first contender's outputs; None allows and reports
            any difference.

    Raises:
        MELoRAError: if outputs have other names or shapes, or differ by more than `max_difference`.
    """
    contenders = load(0)
    differences = _differences(contenders, inputs, max_difference)
    memory = {each.form: _peak_memory(each, inputs, provider) for each in contenders}
    seconds: dict[str, list[float]] = {each.form: [] for each in contenders}
    for index in range(loads):
        if index:
            contenders = []  # frees memory for the next load
            contenders = load(index)
        timed = time_runners(
            {each.form: each.runner for each in contenders},
            inputs,
            rounds=-(-rounds // loads),
            warmup=1 + (index > 0),
            max_seconds=max_seconds / loads,
            seed=index,
            on_round=on_round,
        )
        for form, times in timed.items():
            seconds[form] += times
    timings = summarize(seconds)
    origin = origin_columns(provider)
    return [
        Measurement(
            provider=provider,
            form=each.form,
            model=model,
            batch=batch,
            sequence=sequence,
            threads=each.runner.threads,
            max_rel_difference=differences[each.form],
            peak_memory_mib=memory[each.form],
            file_size_mib=None if each.path is None else round(file_size_mib(each.path), 2),
            **timings[each.form].columns(),
            **origin,
        )
        for each in contenders
    ]


def _differences(
    contenders: Sequence[Contender], inputs: Mapping[str, Any], max_difference: float | None
) -> dict[str, float]:
    """Returns each contender's relative difference from the first; raises MELoRAError above `max_difference`."""
    reference = contenders[0]
    differences = {each.form: compare(each.runner, reference.runner, inputs).max_rel_error for each in contenders}
    if max_difference is not None:
        far = [f"`{form}` by {value:.1e}" for form, value in differences.items() if not value <= max_difference]
        if far:
            raise MELoRAError(
                f"the outputs differ from those of `{reference.form}` by more than {max_difference:g} "
                f"(relative): {', '.join(far)}"
            )
    return differences


def _peak_memory(contender: Contender, inputs: Mapping[str, Any], provider: str) -> float | None:
    if contender.path is None or provider != "cpu":
        return None
    peak = peak_memory_mib(contender.path, {**inputs, **contender.tensors}, contender.runner.threads)
    return None if peak is None else round(peak, 1)
