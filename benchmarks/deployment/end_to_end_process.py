"""A training of end_to_end: `python -m benchmarks.deployment.end_to_end_process JOB` saves an adapter and prints JSON.

Of PEFT it saves the merged model too, which other exporters take; ours are folded by `melora-fx export`.
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

import torch
from torch import nn

import melora_fx
from benchmarks.common.stories import BATCH as STORIES_BATCH
from benchmarks.common.stories import read_windows
from benchmarks.studies.glue import HEAD, TASKS, Examples, batches, load, read
from benchmarks.studies.runs import Arm
from benchmarks.studies.training import add_adapter, train
from benchmarks.training.step_cost import peak_memory_mib

Batches = Iterator[dict[str, torch.Tensor]]


def train_one(job: dict[str, Any]) -> dict[str, Any]:
    """Trains as the job says; gives the seconds, the peak of memory in MiB, and the size of the adapter's file.

    The seconds begin with the loaded model: adding the adapter and compiling are among them.
    """
    torch.set_num_threads(1)
    arm, out, found = Arm(*job["arm"]), Path(job["out"]), {}
    torch.manual_seed(job["seed"])

    def whole() -> None:
        model, steps, num_steps = _classifier(job) if job["case"] == "MRPC" else _decoder(job)
        start = time.perf_counter()
        adapted = add_adapter(model, arm, job["targets"], HEAD if job["case"] == "MRPC" else ())
        run: Any = torch.compile(adapted, dynamic=True) if job["compiled"] else adapted
        train(run, steps, num_steps, job["learning_rate"])
        found["training_s"] = time.perf_counter() - start
        found["saving_s"] = _save(adapted, arm, out)

    found["peak_mib"] = peak_memory_mib(whole, "cpu")
    found["adapter_kib"] = next((out / "adapter").glob("adapter*.safetensors")).stat().st_size / 1024
    return found


def _classifier(job: dict[str, Any]) -> tuple[nn.Module, Batches, int]:
    """The model, and the batches of one epoch or more of MRPC."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(job["model"], num_labels=2)
    _, tokenize = load(2, quick=job["quick"])
    examples, _ = read(TASKS["MRPC"], Path(job["data"]), tokenize)
    taken = random.Random(job["seed"]).sample(range(len(examples.labels)), min(job["size"], len(examples.labels)))
    examples = Examples(*([part[index] for index in taken] for part in examples))
    found = list(batches(examples, job["epochs"], job["seed"]))
    return model, iter(found), len(found)


def _decoder(job: dict[str, Any]) -> tuple[nn.Module, Batches, int]:
    """The model, and `size` batches of windows of stories."""
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
    """Saves the adapter, and of PEFT the merged model; returns the seconds."""
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
