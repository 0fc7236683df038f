"""Makes arithmetic word problems in the style of GSM8K, and an lm-eval task that asks them, for instruction_tuning.py.

GSM8K itself must be downloaded; these problems are made on the spot, and are the same each time.
"""

import itertools
import json
import operator
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

TASK = "arithmetic_problems"
NUMBER = r"-?\d+(?:,\d{3})*(?:\.\d+)?"
RESULTS = {"stated": (f"The answer is ({NUMBER})", 0), "last-number": (NUMBER, -1)}
"""How to find the result in an answer: a regular expression, and which match to take. GSM8K also has two such ways."""
KINDS = (
    ("{name} has {a} {things} and gets {b} more. How many {things} are there?", "+", operator.add),
    ("{name} has {a} {things} and eats {b} of them. How many {things} are left?", "-", operator.sub),
    ("{name} fills {a} boxes with {b} {things} each. How many {things} is that?", "*", operator.mul),
)
Row = dict[str, str]


def make_problems(count: int) -> list[Row]:
    """Returns problems with Alpaca's fields and their `result`; no two have the same numbers and the same operation."""
    generator = random.Random(0)
    cases = [case for case in itertools.product(KINDS, range(2, 60), range(2, 60)) if case[1] > case[2]]
    rows = []
    for (text, sign, compute), a, b in generator.sample(cases, count):
        name, things = generator.choice(["Tom", "Lily", "Ben", "Sue"]), generator.choice(["apples", "eggs"])
        result = str(compute(a, b))
        output = f"{a} {sign} {b} = {result}. The answer is {result}."
        rows.append(
            {"instruction": text.format(name=name, things=things, a=a, b=b), "output": output, "result": result}
        )
    return rows


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row, default=str)}\n" for row in rows), encoding="utf-8")


def write_task(folder: Path, problems: list[Row], prompt_of: Callable[[Row], str]) -> None:
    """Writes the task in the format of lm-eval's documentation, and the prompts that it reads."""
    path = folder.resolve() / "problems.jsonl"
    write_rows(path, ({"prompt": prompt_of(row), "result": row["result"]} for row in problems))
    filters = [
        {
            "name": name,
            "filter": [
                {"function": "regex", "regex_pattern": pattern, "group_select": which},
                {"function": "take_first"},
            ],
        }
        for name, (pattern, which) in RESULTS.items()
    ]
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(path.parent / "cache")},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{result}}",
        "generation_kwargs": {"until": ["\n\n", "###"], "do_sample": False, "max_gen_toks": 64},
        "filter_list": filters,
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / f"{TASK}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")
