"""Runs one training of end_to_end: `python -m benchmarks.deployment.end_to_end_process JOB` prints JSON.

Saves the adapter. For PEFT, saves the merged model too, which other exporters need; `melora-fx export` folds ours.
"""

import json
import random
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

import melora_fx
from benchmarks.common.stories import BATCH as STORIES_BATCH
from benchmarks.common.stories import read_windows
from benchmarks.studies.glue import HEAD, TASKS, Examples, batches, load, read
from benchmarks.studies.runs import Arm
from benchmarks.studies.training import add_adapter, num_adapter_parameters, train
from benchmarks.training.step_cost import peak_memory_mib

Batches = Iterator[dict[str, torch.Tensor]]
PROBE = [list(range(20, 52))]
"""Token ids, (1, 32), on which every graph is compared with torch."""


def train_one(job: dict[str, Any]) -> dict[str, Any]:
    """Runs the training of a job; saves the adapter, and the model's logits for `PROBE`.

    Returns:
        `training_s`: seconds from the loaded model on, including adding the adapter and compiling. `first_step_s`: the
        part of them up to the end of the first step. `saving_s`. `peak_mib`: the memory that loading and training add
        after the imports. `adapter_kib`: the size of the adapter's file. `adapter_alone_kib`: the size of the
        adapter's parameters, without the head.
    """
    torch.set_num_threads(1)
    arm, out, found, models = Arm(*job["arm"]), Path(job["out"]), {}, []
    head = HEAD if job["case"] == "MRPC" else ()
    torch.manual_seed(job["seed"])

    def whole() -> None:
        model, steps, num_steps = _classifier(job) if job["case"] == "MRPC" else _decoder(job)
        start = time.perf_counter()
        adapted = add_adapter(model, arm, job["targets"], head)
        run: Any = torch.compile(adapted, dynamic=True) if job["compiled"] else adapted
        asked: list[float] = []
        train(run, _noted(steps, asked), num_steps, job["learning_rate"])
        asked.append(time.perf_counter())
        found["training_s"], found["first_step_s"] = asked[-1] - start, asked[1] - start
        models.append(adapted)

    found["peak_mib"] = peak_memory_mib(whole, "cpu")
    with torch.inference_mode():
        np.save(out / "probe.npy", models[0].eval()(input_ids=torch.tensor(PROBE)).logits.numpy())
    found["adapter_alone_kib"] = num_adapter_parameters(models[0], head) * 4 / 1024
    found["saving_s"] = _save(models[0], arm, out)
    found["adapter_kib"] = next((out / "adapter").glob("adapter*.safetensors")).stat().st_size / 1024
    return found


def _noted(steps: Batches, times: list[float]) -> Batches:
    """Yields the same batches; appends to `times` when each was requested."""
    for batch in steps:
        times.append(time.perf_counter())
        yield batch


def _classifier(job: dict[str, Any]) -> tuple[nn.Module, Batches, int]:
    """Returns the model, and the batches of all epochs of MRPC with their number."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(job["model"], num_labels=2)
    _, tokenize = load(2, quick=job["quick"])
    examples, _ = read(TASKS["MRPC"], Path(job["data"]), tokenize)
    taken = random.Random(job["seed"]).sample(range(len(examples.labels)), min(job["size"], len(examples.labels)))
    examples = Examples(*([part[index] for index in taken] for part in examples))
    found = list(batches(examples, job["epochs"], job["seed"]))
    return model, iter(found), len(found)


def _decoder(job: dict[str, Any]) -> tuple[nn.Module, Batches, int]:
    """Returns the model, and `size` batches of windows of stories with their number."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(job["model"])
    tokenizer: Any = AutoTokenizer.from_pretrained(job["model"]) if not job["quick"] else byte_tokens
    windows, _ = read_windows(Path(job["data"]), tokenizer)
    generator = torch.Generator().manual_seed(job["seed"])

    def steps() -> Batches:
        for _ in range(job["size"]):
            ids = windows[torch.randint(len(windows), (STORIES_BATCH,), generator=generator)]
            yield {"input_ids": ids, "labels": ids}

    return model, steps(), job["size"]


def byte_tokens(text: str) -> Any:
    return SimpleNamespace(input_ids=list(text.encode()))


def _save(model: nn.Module, arm: Arm, out: Path) -> float:
    """Saves the adapter, and for PEFT the merged model; returns the seconds."""
    start = time.perf_counter()
    if arm.kind == "LoRA":
        saved: Any = model
        saved.save_pretrained(out / "adapter")
        saved.merge_and_unload().save_pretrained(out / "merged")
    else:
        melora_fx.save_adapter(model, out / "adapter")
    return time.perf_counter() - start


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(train_one(json.loads(sys.argv[1]))))
