"""Runs one process of peers: loads all sides in its own order, checks them, and times them in turn.

`python -m benchmarks.deployment.peers_process JOB` prints JSON: shape → side → milliseconds of each run,
and differences.
"""

import functools
import json
import random
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime

from benchmarks.common.models import token_arrays
from exporters.measuring.timing import time_in_turn
from melora_fx import MELoRAError

from .peers_graphs import MERGED, Shape

BALLAST_BYTES = 2 << 30
"""As in `decoding_process`: a session's place in memory changes its time."""
TOLERANCE = {False: 1e-4, True: 2e-2}
"""Largest difference from our merged graph, relative to the largest output; True: for graphs with another activation
(optimum's O3 approximates Gelu)."""
APPROXIMATE = ("optimum O3",)
NO_EQUAL = ("keep q,v", "keep all-linear")
"""Sides with an adapter, which compute something else."""
MAX_ROUNDS = 400


def measure(job: Mapping[str, Any]) -> dict[str, Any]:
    ballast = b"x" * BALLAST_BYTES
    order = list(job["graphs"])
    random.Random(job["seed"]).shuffle(order)
    sessions = {side: _session(job["graphs"][side]) for side in order}
    found: dict[str, Any] = {"milliseconds": {}, "differences": {}}
    for sizes in job["shapes"]:
        shape = Shape(**sizes)
        feeds = {side: _feed(sessions[side], shape) for side in job["graphs"]}
        found["differences"][shape.name] = _differences(sessions, feeds)
        runs = {side: functools.partial(sessions[side].run, None, feeds[side]) for side in job["graphs"]}
        seconds = time_in_turn(runs, rounds=MAX_ROUNDS, max_seconds=job["seconds"])
        found["milliseconds"][shape.name] = {side: [each * 1e3 for each in times] for side, times in seconds.items()}
    assert ballast
    return found


def _session(path: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _feed(session: Any, shape: Shape) -> dict[str, np.ndarray]:
    """Returns a graph's inputs, equal for all graphs; some of the peers' need positions and token types too."""
    arrays = token_arrays(shape.batch, shape.size)
    ids = arrays["input_ids"]
    arrays["position_ids"] = np.broadcast_to(np.arange(shape.size), ids.shape).copy()
    arrays["token_type_ids"] = np.zeros_like(ids)
    image = (shape.batch, 3, shape.size, shape.size)
    names = [value.name for value in session.get_inputs()]
    if "pixel_values" in names:
        arrays = {"pixel_values": np.random.default_rng(0).standard_normal(image, dtype=np.float32)}
    return {name: arrays[name] for name in names}


def _differences(sessions: Mapping[str, Any], feeds: Mapping[str, Any]) -> dict[str, float]:
    """Returns each side's largest difference from our merged graph.

    Raises:
        MELoRAError: if a difference is too large.
    """
    outputs = {side: session.run(None, feeds[side])[0] for side, session in sessions.items()}
    expected = outputs[MERGED]
    found = {side: float(np.abs(output - expected).max() / np.abs(expected).max()) for side, output in outputs.items()}
    for side, difference in found.items():
        if side not in NO_EQUAL and not difference <= TOLERANCE[side in APPROXIMATE]:
            raise MELoRAError(f"{side}: differs by {difference:.1e} from {MERGED}")
    return found


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
