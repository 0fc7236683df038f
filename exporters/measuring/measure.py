"""One row of results for each of several contenders on one input: equal first, then timed, and what they take."""

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
    """What is timed against others.

    Attributes:
        form: its name among them.
        runner: computes it.
        path: its graph; None where it is none, and has no file size or memory of its own.
        tensors: optional inputs of the graph that the runner gives beside the model's inputs: an adapter.
    """

    form: str
    runner: Runner
    path: Path | None = None
    tensors: Arrays = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    """One row of results. Empty cells are None: a graph without sequence, a form that is no graph.

    Attributes:
        provider: what computes; form: which of the graphs; model: the class of the model in it.
        ratio: of the median to the first contender's; max_rel_difference: of the outputs to the first one's.
        peak_memory_mib: what a process of its own needs to load and run the graph at this shape (CPU only).
        file_size_mib: the graph and its external data.
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
        """The row that a `LatencyTable` has for it."""
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
    """Compares the outputs, then times all in turn; the first contender is the reference.

    The same graph loaded twice differs by up to 5 % for as long as it stays loaded: each load gets its share of the
    rounds, and the times of all of them are put together.

    Args:
        load: called with 0, 1, …: the contenders, on the same number of threads, loaded anew.
        inputs: as for `Runner.run`, of the given `batch` and `sequence`.
        provider: what computes; the column of this name. Peak memory is measured for "cpu".
        model: the column of this name.
        batch, sequence: the columns of these names.
        loads: number of times that `load` is called.
        rounds: timed runs of each contender, rounded up to the same number for each load.
        max_seconds: of timing; one round a load runs in any case.
        on_round: called after every round.
        max_difference: largest relative difference from the first contender's outputs; None: any, it is reported.

    Raises:
        MELoRAError: where outputs have other names or shapes, or differ by more than `max_difference`.
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
    """The relative difference of each one's outputs from the first one's, none of them above the given one."""
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
