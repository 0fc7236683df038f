"""The MELoRA paper's second experiment: a language model learns to follow instructions, and lm-eval scores its answers.

    python examples/instruction_tuning.py --model LLAMA_FOLDER --data alpaca.json --dtype bfloat16 --out OUT

The data has Alpaca's fields `instruction`, `output` and optionally `input`: one JSON object per line, or an array of
objects, as in Alpaca's own file. Only the answers count in the loss. The base and the tuned model then solve the word
problems of arithmetic_problems.py; `--tasks gsm8k`, or another name that lm-eval knows, downloads that task and asks
with the prompt of that task, not with the trained one.

Without `--model` and `--data` everything runs at toy size: a Llama of 260 thousand parameters learns such problems. It
learns the form of the answers and next to no arithmetic. Only the toy size has been run: models of 7B parameters and
GPUs are untested.

Needs `pip install melora_fx accelerate lm-eval`. The toy run takes two minutes on one core; with `--quick` half a
minute.
"""

import argparse
import gc
import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import torch
from arithmetic_problems import TASK, Row, make_problems, write_rows, write_task
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import melora_fx

TOY_MODEL = Path(__file__).parents[2] / "shared" / "data" / "models" / "stories260K-hf"
START = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
WITH_INPUT = ", paired with an input that provides further context"


def prompt_of(row: Row) -> str:
    """Returns Alpaca's prompt for a row."""
    parts = [START.format(WITH_INPUT if row.get("input") else ""), f"### Instruction:\n{row['instruction']}"]
    if row.get("input"):
        parts.append(f"### Input:\n{row['input']}")
    return "\n\n".join([*parts, "### Response:\n"])


def tokens_of(row: Row, tokenizer: Any, max_tokens: int) -> dict[str, list[int]]:
    """Returns prompt and answer as tokens, cut at `max_tokens`; only the answer and the end token have labels."""
    prompt = tokenizer(prompt_of(row))["input_ids"]
    answer = [*tokenizer(row["output"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    labels = [-100] * len(prompt) + answer
    return {"input_ids": (prompt + answer)[:max_tokens], "labels": labels[:max_tokens]}


def read_rows(path: Path) -> list[Row]:
    """Returns the rows of the file, one for each prompt, in a random order that is always the same."""
    text = path.read_text(encoding="utf-8")
    lines = [line for line in text.split("\n") if line.strip()]
    try:
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise SystemExit(f"`{path}` is neither JSON lines nor an array in JSON: {error}") from error
    needed = {"instruction", "output"}
    wrong = [number for number, row in enumerate(rows, 1) if not isinstance(row, dict) or not needed <= row.keys()]
    if wrong:
        raise SystemExit(f"`{path}`: rows without `instruction` or `output`: {wrong[:10]}")
    rows = list({prompt_of(row): row for row in rows}.values())
    random.Random(0).shuffle(rows)
    return rows


def load_model(folder: Path, args: argparse.Namespace) -> Any:
    gc.collect()  # frees the previous model: a Trainer and its parts refer to each other
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=args.dtype)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def open_for_scoring(folder: Path, args: argparse.Namespace) -> Any:
    """Loads the model in `folder` for lm-eval."""
    from lm_eval.models.huggingface import HFLM

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return HFLM(pretrained=load_model(folder, args), tokenizer=tokenizer, batch_size=args.device_batch)


def score(name: str, model: Any, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Returns lm-eval's scores of `model` for each task, and writes its answers to OUT/answers under `name`."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    # Reading all of lm-eval's own tasks takes a quarter of a minute.
    manager = TaskManager(include_path=str(args.out / "task"), include_defaults=args.tasks != [TASK])
    result = simple_evaluate(model, tasks=args.tasks, task_manager=manager)
    for task, samples in result["samples"].items():
        kept = ("arguments", "resps", "filter", "filtered_resps", "target")
        rows = [{key: sample[key] for key in kept} for sample in samples]
        write_rows(args.out / "answers" / f"{task}-{name}.jsonl", rows)
    return {
        task: {key: float(value) for key, value in values.items() if isinstance(value, float)}
        for task, values in result["results"].items()
    }


def make_trainer(model: Any, tokenizer: Any, rows: list[Row], args: argparse.Namespace) -> Trainer:
    tokens = [tokens_of(row, tokenizer, args.max_tokens) for row in rows]
    kept = [row for row in tokens if row["labels"][-1] != -100]
    num_cut = sum(row["labels"][-1] != tokenizer.eos_token_id for row in kept)
    num_held_out = min(2000, max(1, len(kept) // 10))
    print(f"{len(kept) - num_held_out} rows to train on, {num_held_out} held out")
    print(
        f"at {args.max_tokens} tokens {num_cut} answers are cut; {len(tokens) - len(kept)} rows without any of their "
        "answer are left out"
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    settings = TrainingArguments(
        output_dir=str(args.out),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.device_batch,
        per_device_eval_batch_size=args.device_batch,
        gradient_accumulation_steps=max(1, args.batch // args.device_batch),
        learning_rate=args.learning_rate,
        warmup_steps=0.1,
        train_sampling_strategy="group_by_length",
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        load_best_model_at_end=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    return Trainer(
        model,
        settings,
        train_dataset=kept[num_held_out:],
        eval_dataset=kept[:num_held_out],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[melora_fx.AdapterCheckpointCallback()],
    )


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Trains, and writes the adapter and the folded model; returns losses of held-out answers, in nats per token."""
    torch.manual_seed(0)
    model, tokenizer = load_model(args.model, args), AutoTokenizer.from_pretrained(args.model)
    config = melora_fx.MELoRAConfig(rank=args.rank, num_blocks=args.blocks, alpha=16, dropout=0.05)
    melora_fx.rewrite(model, args.targets, config)
    num_trainable, num_all = model.num_parameters(only_trainable=True), model.num_parameters()
    print(f"{len(melora_fx.sites(model))} sites; trainable: {num_trainable:,} of {num_all:,} parameters")
    trainer = make_trainer(model, tokenizer, read_rows(args.data), args)
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=args.resume)
    after = trainer.evaluate()["eval_loss"]
    melora_fx.save_adapter(model, args.out / "adapter")
    melora_fx.fold(model)  # a plain LlamaForCausalLM again
    folded = trainer.evaluate()["eval_loss"]
    model.config.use_cache = True  # the Trainer switched it off
    model.save_pretrained(args.out / "merged")
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out / "merged")
    losses = {"loss_before": before, "loss_after": after, "loss_folded": folded}
    return {"trainable_parameters": num_trainable, "parameters": num_all, **losses}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a Hugging Face folder")
    parser.add_argument("--data", type=Path, help="JSON with Alpaca's fields")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8, help="rank of one block")
    parser.add_argument(
        "--targets", nargs="+", default=["q_proj", "v_proj"], help="default: the authors' q_proj v_proj"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="dtype of the base")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--learning-rate", type=float, help="default: 3e-4, at toy size 1e-2")
    parser.add_argument("--batch", type=int, help="rows per step; default: 128, at toy size 16")
    parser.add_argument("--device-batch", type=int, default=8, help="rows per forward pass")
    parser.add_argument("--max-tokens", type=int, default=256, help="maximum for prompt and answer together")
    parser.add_argument("--tasks", nargs="+", default=[TASK], help="tasks of lm-eval")
    parser.add_argument("--no-eval", action="store_true", help="skip lm-eval")
    parser.add_argument("--resume", action="store_true", help="resume from the last checkpoint in OUT")
    parser.add_argument("--quick", action="store_true", help="one epoch, and fewer problems")
    parser.add_argument("--out", type=Path, default=Path("instruction-tuning-output"))
    args = parser.parse_args()
    is_toy = args.model is None
    args.model = args.model or TOY_MODEL
    args.learning_rate = args.learning_rate or (1e-2 if is_toy else 3e-4)
    args.batch = args.batch or (16 if is_toy else 128)
    args.epochs = 1 if args.quick else args.epochs
    return args


def main() -> None:
    args = parse_arguments()
    if not args.no_eval and importlib.util.find_spec("lm_eval") is None:
        raise SystemExit("lm-eval is not installed: pip install lm-eval, or pass --no-eval")
    if not args.model.is_dir():
        raise SystemExit(f"`{args.model}` does not exist: pass --model a Hugging Face folder")
    if args.data is not None:
        read_rows(args.data)
    if args.resume and not list(args.out.glob("checkpoint-*")):
        raise SystemExit(f"`{args.out}` has no checkpoint to resume from: leave --resume out")
    num_train, num_asked = (400, 16) if args.quick else (2000, 100)
    problems = make_problems(num_train + num_asked)
    write_task(args.out / "task", problems[num_train:], prompt_of)
    if args.data is None:
        args.data = args.out / "train.jsonl"
        write_rows(args.data, problems[:num_train])

    scores = {}
    if not args.no_eval:
        scores["base"] = score("base", open_for_scoring(args.model, args), args)
    report = train(args)
    if not args.no_eval:
        scores["tuned"] = score("tuned", open_for_scoring(args.out / "merged", args), args)
    (args.out / "report.json").write_text(json.dumps(report | {"scores": scores}, indent=2) + "\n")
    before, after, folded = (report[f"loss_{when}"] for when in ("before", "after", "folded"))
    print(f"held-out loss {before:.3f} → {after:.3f} nats per token of the answers, folded {folded:.3f}")
    for task, values in scores.get("base", {}).items():
        for key in (key for key in values if "stderr" not in key):
            print(f"{task}, {key}: {values[key]:.3f} → {scores['tuned'][task][key]:.3f}")


if __name__ == "__main__":
    main()
