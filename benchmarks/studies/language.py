"""Trains a decoder on text: `python -m benchmarks.studies.language JOB` prints the loss as JSON."""

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM

from benchmarks.studies.runs import Arm
from benchmarks.studies.training import add_adapter, num_adapter_parameters, train

TARGETS = ("q_proj", "o_proj")
"""576 → 576 in SmolLM2: 36 divides neither the 192 outputs of `k_proj` and `v_proj` nor 1536 in the other linears."""
BATCH = 8
AUTOCAST = torch.bfloat16
"""The dtype of training, as usual for decoders; the held-out loss is computed in float32."""


def batches(windows: torch.Tensor, num_steps: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yields batches that share no window, if there are enough windows; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    passes = -(-num_steps * BATCH // len(windows))
    order = torch.cat([torch.randperm(len(windows), generator=generator) for _ in range(passes)])
    for step in range(num_steps):
        ids = windows[order[step * BATCH : (step + 1) * BATCH]].long()
        yield {"input_ids": ids, "labels": ids}


@torch.inference_mode()
def loss_of(model: nn.Module, windows: torch.Tensor) -> float:
    """Returns the mean cross-entropy per token, in nats; every window and every token has the same weight."""
    losses = [len(ids) * model(input_ids=ids, labels=ids).loss.item() for ids in windows.long().split(BATCH)]
    return sum(losses) / len(windows)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Trains on `job["steps"]` batches and returns the held-out loss; the arm "none" is not trained."""
    arm, seed = Arm(*job["arm"]), job["seed"]
    cut = load_file(Path(job["text"]) / "windows.safetensors")
    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM.from_pretrained(job["model"])
    parameters, seconds = 0, 0.0
    if arm.kind != "none":
        model = add_adapter(model, arm, TARGETS)
        parameters = num_adapter_parameters(model)
        cases = batches(cut["train"], job["steps"], seed)
        seconds = train(model, cases, job["steps"], job["learning_rate"], AUTOCAST)
    loss = loss_of(model.eval(), cut[job["held_out"]])
    return {"metric": "loss", "value": loss, "parameters": parameters, "seconds": round(seconds, 1)}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(run(json.loads(sys.argv[1]))))
