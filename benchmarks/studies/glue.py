"""Trains MiniLM-L6 on one task: `python -m benchmarks.studies.glue JOB` prints the score as JSON."""

import csv
import json
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from benchmarks.common.models import minilm_folder

from .runs import Arm
from .training import add_adapter, num_adapter_parameters, train

TARGETS = ("query", "value")
HEAD = ("pooler", "classifier")
"""Two linears, like the head of the paper's RoBERTa. MiniLM's pooler contains noise: it was never trained."""
BATCH = 16
MAX_LENGTH = 128
POOL = 8
"""Number of batches whose texts are sorted by length together, for less padding."""


class Task(NamedTuple):
    """A classification or regression task. `files`: those for training and for scoring, in `folder`."""

    folder: str
    columns: tuple[str, ...]
    metric: str
    files: tuple[str, str] = ("train.tsv", "validation.tsv")

    @property
    def is_regression(self) -> bool:
        return self.metric == "Pearson"


PAIR = ("sentence1", "sentence2")
TASKS = {
    "RTE": Task("rte", PAIR, "accuracy"),
    "MRPC": Task("mrpc", PAIR, "accuracy"),
    "CoLA": Task("cola", ("sentence",), "Matthews"),
    "STS-B": Task("stsb", PAIR, "Pearson"),
    "SNIPS": Task("snips", ("sentence",), "accuracy", ("train_small.tsv", "validation.tsv")),
}
"""The tasks with the metrics of the MELoRA paper, and SNIPS, on which learning rates are chosen."""


class Examples(NamedTuple):
    """Token ids and token types of each text or pair, and labels: integers, or floats for a regression."""

    tokens: list[tuple[list[int], list[int]]]
    labels: list[Any]


def read(task: Task, folder: Path, tokenize: Callable[..., Any]) -> tuple[Examples, Examples]:
    """Returns the examples for training and for scoring."""
    parts = [_rows(folder / name) for name in task.files]
    names = sorted({row["label"] for row in parts[0]})
    number = float if task.is_regression else names.index
    return tuple(  # type: ignore[return-value]
        Examples(
            [tokenize(*(row[column] for column in task.columns)) for row in rows],
            [number(row["label"]) for row in rows],
        )
        for rows in parts
    )


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def score(metric: str, predicted: np.ndarray, labels: Sequence[Any]) -> float:
    """Returns the value of a metric. `predicted`: (examples, labels), or (examples, 1) for a regression."""
    from sklearn.metrics import matthews_corrcoef

    if metric == "Pearson":
        if np.ptp(predicted) == 0:
            return 0.0  # undefined; scikit-learn's Matthews of one class is 0 too
        return float(np.corrcoef(predicted[:, 0], labels)[0, 1])
    chosen = predicted.argmax(-1)
    return float(matthews_corrcoef(labels, chosen) if metric == "Matthews" else (chosen == np.array(labels)).mean())


def score_of_one_answer(task: Task, examples: Examples, held_out: Examples) -> float:
    """Returns the score of always answering the most common label of `examples`, or their mean for a regression."""
    counts = np.bincount(examples.labels) if not task.is_regression else [np.mean(examples.labels)]
    return score(task.metric, np.tile(np.array(counts, dtype=np.float32), (len(held_out.labels), 1)), held_out.labels)


def batches(examples: Examples, epochs: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yields batches in another order each epoch, with texts of similar length together; the same for the same seed."""
    shuffler = random.Random(seed)
    for _ in range(epochs):
        order = list(range(len(examples.tokens)))
        shuffler.shuffle(order)
        cut: list[list[int]] = []
        for start in range(0, len(order), BATCH * POOL):
            pool = sorted(order[start : start + BATCH * POOL], key=lambda index: len(examples.tokens[index][0]))
            cut += [pool[first : first + BATCH] for first in range(0, len(pool), BATCH)]
        shuffler.shuffle(cut)
        yield from (collate(examples, indices) for indices in cut)


def collate(examples: Examples, indices: Sequence[int]) -> dict[str, torch.Tensor]:
    """Returns a batch of these examples, padded with token 0."""
    length = max(len(examples.tokens[index][0]) for index in indices)
    ids, types, mask = (torch.zeros(len(indices), length, dtype=torch.long) for _ in range(3))
    for row, index in enumerate(indices):
        tokens, kinds = examples.tokens[index]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        types[row, : len(tokens)] = torch.tensor(kinds)
        mask[row, : len(tokens)] = 1
    labels = torch.tensor([examples.labels[index] for index in indices])
    return {"input_ids": ids, "token_type_ids": types, "attention_mask": mask, "labels": labels}


def load(num_labels: int, *, quick: bool) -> tuple[nn.Module, Callable[..., tuple[list[int], list[int]]]]:
    """Returns the model with a new head, and a function from a text or a pair to its token ids and token types."""
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        BertConfig,
        BertForSequenceClassification,
    )

    if quick:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = BertForSequenceClassification(BertConfig(vocab_size=128, num_labels=num_labels, **sizes))
        return model, lambda *texts: (
            (ids := [3 + each % 125 for each in " ".join(texts).encode()[:32]]),
            [0] * len(ids),
        )
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())

    def tokenize(*texts: str) -> tuple[list[int], list[int]]:
        found = tokenizer(*texts, truncation=True, max_length=MAX_LENGTH)
        return found["input_ids"], found["token_type_ids"]

    return AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=num_labels), tokenize


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Trains, and returns the score after the last epoch.

    The seed decides the head, the examples and their order, equally for every arm.
    """
    task, arm, seed = TASKS[job["task"]], Arm(*job["arm"]), job["seed"]
    torch.manual_seed(seed)
    folder = Path(job["folder"])
    labels = {row["label"] for row in _rows(folder / task.files[0])}
    model, tokenize = load(1 if task.is_regression else len(labels), quick=job["quick"])
    examples, held_out = read(task, folder, tokenize)
    taken = random.Random(seed).sample(range(len(examples.labels)), min(job["max_examples"], len(examples.labels)))
    examples = Examples(*([part[index] for index in taken] for part in examples))
    if job["quick"]:
        held_out = Examples(*(part[:32] for part in held_out))
    if arm.kind == "constant":
        return {
            "metric": task.metric,
            "value": score_of_one_answer(task, examples, held_out),
            "parameters": 0,
            "seconds": 0,
        }
    model = add_adapter(model, arm, TARGETS, HEAD)
    epochs = int(job["epochs"])
    num_steps = sum(-(-min(BATCH * POOL, len(taken) - start) // BATCH) for start in range(0, len(taken), BATCH * POOL))
    seconds = train(model, batches(examples, epochs, seed), epochs * num_steps, job["learning_rate"])
    with torch.inference_mode():
        indices = sorted(range(len(held_out.labels)), key=lambda index: len(held_out.tokens[index][0]))
        order = [indices[start : start + 32] for start in range(0, len(indices), 32)]
        logits = [model(**collate(held_out, part)).logits.float().numpy() for part in order]
    value = score(task.metric, np.concatenate(logits), [held_out.labels[index] for index in indices])
    return {
        "metric": task.metric,
        "value": value,
        "parameters": num_adapter_parameters(model, HEAD),
        "seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(run(json.loads(sys.argv[1]))))
