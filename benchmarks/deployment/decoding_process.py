"""Runs one process of decoding: loads all sides of a setting in its own order, checks them, and times them in turn.

`python -m benchmarks.deployment.decoding_process JOB` prints JSON: step → side → milliseconds of each run,
and differences.
"""

import functools
import json
import random
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnxruntime
import torch
import transformers

from exporters.measuring.timing import time_in_turn
from exporters.onnx_files.cache_names import LOGITS, is_past
from exporters.private import cache_argument, dynamic_cache
from melora_fx import MELoRAError

from .decoding_cells import SIDES, Side, Step
from .decoding_graphs import load_merged, step_arrays, text

Arrays = Mapping[str, np.ndarray]
Run = Callable[[], Any]
TOLERANCE = 1e-4
"""Largest difference between a side and torch, relative to the largest logit."""
MAX_ROUNDS = 500
BALLAST_BYTES = 2 << 30
"""Kept while the sides are loaded and timed: it occupies the small pieces at the start of free memory. Otherwise the
first session of a process gets them, and takes up to 20 % longer for a token."""


class Graph:
    """A session that gets the cache with each run, as in plain ONNX Runtime: nothing is copied."""

    def __init__(self, path: str, native_adapter: str | None) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._inputs = [value.name for value in self._session.get_inputs()]
        self._outputs = [value.name for value in self._session.get_outputs()]
        self._with_adapter = None
        if native_adapter is not None:
            self._adapter = onnxruntime.LoraAdapter()  # the options keep only its address
            self._adapter.Load(native_adapter)
            self._with_adapter = onnxruntime.RunOptions()
            self._with_adapter.add_active_adapter(self._adapter)

    def prepare(self, arrays: Arrays, gives_adapter: bool) -> Run:
        feed = {name: onnxruntime.OrtValue.ortvalue_from_numpy(arrays[name]) for name in self._inputs}
        options = self._with_adapter if gives_adapter else None
        return functools.partial(self._session.run_with_ort_values, self._outputs, feed, options)

    def logits(self, outputs: Any) -> np.ndarray:
        return np.asarray(outputs[self._outputs.index(LOGITS)].numpy())


class Eager:
    """The merged model in torch, with transformers' own cache."""

    def __init__(self, folder: str, adapter: str) -> None:
        self._model = load_merged(folder, adapter)
        self._cache_argument = cache_argument(self._model) or ""

    def prepare(self, arrays: Arrays, gives_adapter: bool) -> Run:
        past = [torch.as_tensor(value) for name, value in arrays.items() if is_past(name)]
        inputs = {name: torch.as_tensor(value) for name, value in arrays.items() if not is_past(name)}
        past = past if past[0].size(2) else []
        return lambda: self._run(inputs, past)

    @torch.no_grad()
    def _run(self, inputs: Mapping[str, torch.Tensor], past: list[torch.Tensor]) -> Any:
        return self._model(**inputs, **{self._cache_argument: dynamic_cache(past)}, use_cache=True)

    def logits(self, outputs: Any) -> np.ndarray:
        return np.asarray(outputs.logits.numpy())


def measure(job: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the order of loading, and times and differences by step and side, ready for JSON.

    Raises:
        MELoRAError: if the logits of a side differ from torch's, or if the adapter changes nothing.
    """
    torch.set_num_threads(1)
    sides = [side for side in SIDES if side.name in job["sides"]]
    kinds = list(dict.fromkeys(side.graph for side in sides))
    random.Random(f"{job['setting']} {job['index']}").shuffle(kinds)
    ballast = b"1" * BALLAST_BYTES
    loaded = {kind: _load(kind, job) for kind in kinds}
    with np.load(job["reference"]) as file:
        reference = dict(file)
    found: dict[str, Any] = {"order": kinds, "milliseconds": {}, "differences": {}}
    for step in (Step(*each) for each in job["steps"]):
        actions: dict[str, Run] = {}
        differences = {}
        for side in sides:
            arrays, logits = _given_and_expected(reference, side, step)
            actions[side.name] = loaded[side.graph].prepare(arrays, side.gives_adapter)
            differences[side.name] = _difference(loaded[side.graph].logits(actions[side.name]()), logits)
        _refuse_wrong(step, differences, reference)
        seconds = time_in_turn(
            actions, rounds=MAX_ROUNDS, warmup=0, max_seconds=step.share * job["seconds"], seed=job["index"]
        )
        found["milliseconds"][step.name] = {name: [round(1e3 * s, 4) for s in each] for name, each in seconds.items()}
        found["differences"][step.name] = differences
    del ballast
    return found


def _load(kind: str, job: Mapping[str, Any]) -> Graph | Eager:
    if kind == "torch":
        return Eager(job["model"], job["adapter"])
    return Graph(job["graphs"][kind], job["native_adapters"].get(kind))


def _given_and_expected(reference: Arrays, side: Side, step: Step) -> tuple[Arrays, np.ndarray]:
    """Returns the inputs of a step by name, with the cache of the side's model, and its last logits."""
    own = {name.partition("/")[2]: value for name, value in reference.items() if name.startswith(f"{side.equals}/")}
    logits = own[step.name]
    past = {name: np.ascontiguousarray(value[:, :, : step.past]) for name, value in own.items() if is_past(name)}
    return step_arrays(text(step.end, logits.shape[-1]), step) | past, logits


def _difference(logits: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(logits[:, -expected.shape[1] :] - expected).max() / np.abs(expected).max())


def _refuse_wrong(step: Step, differences: Mapping[str, float], reference: Arrays) -> None:
    if wrong := {name: value for name, value in differences.items() if not value <= TOLERANCE}:
        raise MELoRAError(f"{step.name}: logits differ from torch's by more than {TOLERANCE} of the largest: {wrong}")
    if _difference(reference[f"adapted/{step.name}"], reference[f"base/{step.name}"]) < 10 * TOLERANCE:
        raise MELoRAError("the adapter changes nothing")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(json.dumps(measure(json.loads(sys.argv[1]))))
