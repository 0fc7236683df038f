"""Exports the graphs of end_to_end with commands, scores them, and times them in turn."""

import functools
import json
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer
from transformers.exporters import OnnxConfig, OnnxExporter

from benchmarks.common.checkout import ROOT
from benchmarks.common.kept import run_offline
from benchmarks.common.stories import read_windows
from benchmarks.studies.glue import TASKS, collate, load, read, score
from benchmarks.studies.runs import ONE_THREAD
from exporters.graph.clean import quiet
from exporters.measuring.timing import time_in_turn
from melora_fx import MELoRAError

from .end_to_end_cells import PEFT_SIDE, Side, Story
from .end_to_end_process import PROBE, byte_tokens
from .peers_graphs import environment_python


def prepare(options: Namespace) -> str:
    """Makes what exporting needs besides a model, before anything is timed; returns what makes PEFT's graphs."""
    if options.quick:
        return f"transformers {transformers.__version__}"
    python = environment_python(options.cache / "peers-environment")
    names = ("optimum-onnx", "transformers", "torch")
    code = f"from importlib.metadata import version; print('; '.join(f'{{n}} {{version(n)}}' for n in {names}))"
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def export(options: Namespace, story: Story, side: Side, base: Path, folder: Path) -> float:
    """Exports with the command that the side's users type, in its own process.

    With --quick, exports PEFT's model with transformers' exporter in this process.

    Returns:
        The seconds that it took.
    """
    out, is_ours = folder / "graph", not side.name.startswith(PEFT_SIDE)
    if story.name == "stories" and not is_ours and not options.quick:
        AutoTokenizer.from_pretrained(base).save_pretrained(folder / "merged")  # optimum needs it
        _name_rope_theta(folder / "merged" / "config.json")
    start = time.perf_counter()
    if is_ours:
        command = [sys.executable, "-m", "exporters.cli", "export", str(base), str(folder / "adapter"), "-o", str(out)]
        run_offline([*command, "--target", "ort-cpu"], ROOT, ONE_THREAD)
    elif options.quick:
        _export_by_transformers(folder / "merged", out)
    else:
        optimum = environment_python(options.cache / "peers-environment").with_name("optimum-cli")
        command = [str(optimum), "export", "onnx", "--model", str(folder / "merged")]
        run_offline([*command, "--task", story.task, str(out)], folder, ONE_THREAD)
    return time.perf_counter() - start


def _name_rope_theta(path: Path) -> None:
    """Writes the base of the rotary embedding into a Llama's configuration under its name in transformers 4.

    optimum-onnx needs transformers 4, which does not read `rope_parameters` of transformers 5 and uses 10000.
    optimum's check does not notice, because it compares with a model that uses 10000 too.
    """
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"rope_theta": config["rope_parameters"]["rope_theta"]}, indent=2))


def check(folder: Path) -> None:
    """Checks that the graph's logits for `PROBE` are the trained model's.

    Raises:
        MELoRAError: if the largest difference of a logit is not below a thousandth of the largest logit.
    """
    graph, expected = Graph(graph_of(folder / "graph")), np.load(folder / "probe.npy")
    difference = np.abs(graph.logits(graph.feed(np.array(PROBE))) - expected).max() / np.abs(expected).max()
    if not difference < TOLERANCE:
        raise MELoRAError(f"{folder.name}: its graph is off by {difference:.1e} of the largest logit")


TOLERANCE = 1e-3


def _export_by_transformers(model_folder: Path, out: Path) -> None:
    config = AutoConfig.from_pretrained(model_folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(model_folder).eval()
    model.config.use_cache = False
    ids = torch.full((2, 16), 5)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    shapes = {name: dict.fromkeys((0, 1), torch.export.Dim.AUTO) for name in inputs}
    with quiet():
        exported = OnnxExporter().export(model, inputs, OnnxConfig(dynamic_shapes=shapes))
    out.mkdir()
    onnx_ir.save(exported.program, out / "model.onnx", external_data="model.onnx.data")


def graph_of(folder: Path) -> Path:
    """Returns the graph in an exported folder."""
    return next(folder.glob("*.onnx"))


class Graph:
    """A plain session with one thread, which needs only token ids."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.outputs = [value.name for value in self._session.get_outputs()]

    def feed(self, ids: np.ndarray, mask: np.ndarray | None = None, types: np.ndarray | None = None) -> dict[str, Any]:
        """Returns the graph's inputs for token ids (batch, length), with an empty cache."""
        batch, length = ids.shape
        known = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids) if mask is None else mask,
            "token_type_ids": np.zeros_like(ids) if types is None else types,
            "position_ids": np.broadcast_to(np.arange(length), ids.shape).copy(),
        }
        found = {}
        for value in self._session.get_inputs():
            if value.name in known:
                found[value.name] = known[value.name]
            else:  # the cache: (batch, heads, past length, size of a head)
                found[value.name] = np.zeros((batch, value.shape[1], 0, value.shape[3]), np.float32)
        return found

    def run(self, feed: Mapping[str, Any]) -> Any:
        return self._session.run(None, feed)

    def logits(self, feed: Mapping[str, Any]) -> np.ndarray:
        return self._session.run(["logits"], feed)[0]


def quality_of(options: Namespace, story: Story, base: Path, path: Path) -> float:
    """Returns the quality of the graph: accuracy on the validation set, or loss on the held-out stories."""
    graph = Graph(path)
    if story.name == "MRPC":
        _, tokenize = load(2, quick=options.quick)
        _, held_out = read(TASKS["MRPC"], options.glue / "mrpc", tokenize)
        count = 32 if options.quick else len(held_out.labels)
        logits = []
        for index in range(count):
            arrays = {name: tensor.numpy() for name, tensor in collate(held_out, [index]).items()}
            feed = graph.feed(arrays["input_ids"], arrays["attention_mask"], arrays["token_type_ids"])
            logits.append(graph.logits(feed))
        return score("accuracy", np.concatenate(logits), held_out.labels[:count])
    tokenizer: Any = byte_tokens if options.quick else AutoTokenizer.from_pretrained(base)
    _, windows = read_windows(options.text, tokenizer)
    losses = []
    for window in windows[: 2 if options.quick else None].split(1):
        logits = torch.from_numpy(graph.logits(graph.feed(window.numpy())))
        losses.append(torch.nn.functional.cross_entropy(logits[0, :-1], window[0, 1:]).item())
    return statistics.fmean(losses)


LOADS = 5
MIN_RUNS = 5
"""Least number of runs of a graph in each load, however long a run takes."""


def latencies_of(paths: Mapping[str, Path], shape: tuple[int, int], seconds: float) -> dict[str, list[float]]:
    """Returns the median milliseconds of each side's graph, run in turn, per load: two sessions of one graph differ.

    Each load has its own order. With five sides, each is first once and last once: the first loaded graph is slower.
    """
    ids = np.random.default_rng(0).integers(3, 100, shape)
    found: dict[str, list[float]] = {name: [] for name in paths}
    for index in range(LOADS):
        order = rotated(list(paths), index)
        graphs = {name: Graph(paths[name]) for name in order}
        actions = {name: functools.partial(graph.run, graph.feed(ids)) for name, graph in graphs.items()}
        times = time_in_turn(actions, rounds=MIN_RUNS)
        more = time_in_turn(actions, rounds=1000, max_seconds=seconds / LOADS, warmup=0)
        for name in paths:
            found[name].append(1e3 * statistics.median([*times[name], *more[name]]))
        del graphs, actions  # before the next are loaded
    return found


def rotated(names: Sequence[Any], index: int) -> list[Any]:
    """Returns all names, starting with another one for each index."""
    start = index % len(names)
    return [*names[start:], *names[:start]]
