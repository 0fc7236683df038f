"""The parts of examples/instruction_tuning.py: prompts and labels, problems, and how lm-eval scores answers."""

import json
import re
import sys
from argparse import Namespace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

EXAMPLES = Path(__file__).parent.parent / "examples"
ROW = {"instruction": "Count the ducks: 3 and 4 more.", "output": "3 + 4 = 7 ducks"}


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return import_module("instruction_tuning")


def _bytes() -> Any:
    """Returns a tokenizer with one token per byte, and a start token before each text, as in Llama."""
    names = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("extra", [{}, {"input": ""}, {"input": "Ducks\n\nquack."}], ids=["none", "empty", "input"])
def test_labels_are_those_of_the_answer_alone(recipe: ModuleType, extra: dict[str, str]) -> None:
    tokenizer = _bytes()
    prompt = recipe.prompt_of(ROW | extra)
    tokens = recipe.tokens_of(ROW | extra, tokenizer, 1000)
    num_prompt = len(tokenizer(prompt)["input_ids"])
    assert prompt.endswith("\n\n### Response:\n")
    for text in (", paired with an input", "### Input:\n", "### Input:\nDucks\n\nquack.\n\n"):
        assert (text in prompt) == bool(extra.get("input"))
    assert tokenizer.decode(tokens["input_ids"]) == f"<s>{prompt}{ROW['output']}</s>"
    assert tokens["labels"] == [-100] * num_prompt + tokens["input_ids"][num_prompt:]
    assert tokenizer.decode(tokens["labels"][num_prompt:]) == f"{ROW['output']}</s>"
    cut = recipe.tokens_of(ROW | extra, tokenizer, num_prompt + 2)
    assert cut == {name: ids[: num_prompt + 2] for name, ids in tokens.items()}


def test_rows_of_a_file(recipe: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"Say {word}", "output": "\u2028"} for word in "abcdefgh"]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in [*rows, rows[0]]) + "\n\n", "utf-8")
    read = recipe.read_rows(path)
    assert sorted(read, key=str) == rows  # each prompt once
    assert read == recipe.read_rows(path) != rows
    path.write_text(json.dumps(rows, indent=2))
    assert sorted(recipe.read_rows(path), key=str) == rows, "an array too"
    path.write_text(json.dumps(rows[0]) + "\n" + json.dumps({"instruction": "Say z"}) + "\n")
    with pytest.raises(SystemExit, match=r"rows without `instruction` or `output`: \[2\]"):
        recipe.read_rows(path)
    path.write_text("instruction,output\n")
    with pytest.raises(SystemExit, match="neither JSON lines nor an array"):
        recipe.read_rows(path)


def test_no_problem_is_asked_that_was_trained_on(recipe: ModuleType) -> None:
    problems = recipe.make_problems(2100)
    assert problems == recipe.make_problems(2100)
    assert len({row["instruction"] for row in problems}) == 2100
    operations = [row["output"].partition(" =")[0] for row in problems]
    assert len(set(operations)) == 2100
    for operation, row in zip(operations, problems, strict=True):
        assert str(eval(operation)) == row["result"]
        assert all(number in row["instruction"].split() for number in operation.split()[::2])


def test_the_result_is_found_in_every_written_answer(recipe: ModuleType) -> None:
    results = import_module("arithmetic_problems").RESULTS
    for row in recipe.make_problems(2100):
        for pattern, which in results.values():
            assert re.findall(pattern, row["output"])[which] == row["result"]
    pattern, which = results["last-number"]
    assert re.findall(pattern, "17 - 5 is 12, and so 1,250.50.")[which] == "1,250.50"
    assert re.findall(pattern, "It is -3")[which] == "-3"


@pytest.mark.parametrize("missing", ["lm-eval", "model"])
def test_what_is_missing_is_said_before_anything_is_written(
    recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str
) -> None:
    found = None if missing == "lm-eval" else object()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
    model = tmp_path if missing == "lm-eval" else tmp_path / "nowhere"
    monkeypatch.setattr(sys, "argv", ["", "--model", str(model), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="pip install lm-eval" if missing == "lm-eval" else "nowhere` does not exist"):
        recipe.main()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("more", "told"), [(["--resume"], "has no checkpoint"), (["--data", "rows"], "neither JSON")])
def test_what_cannot_be_trained_is_said_before_the_base_is_scored(
    recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, more: list[str], told: str
) -> None:
    (tmp_path / "rows").write_text("no JSON")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["", "--model", str(tmp_path), "--no-eval", "--out", "out", *more])
    with pytest.raises(SystemExit, match=told):
        recipe.main()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_lm_eval_gives_written_answers_full_marks(recipe: ModuleType, tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval.api.model")
    problems = recipe.make_problems(30)
    answers = {recipe.prompt_of(row): row["output"] for row in problems}

    class Answering(lm_eval.LM):
        loglikelihood = loglikelihood_rolling = None

        def generate_until(self, requests: list[Any]) -> list[str]:
            answered = [answers[request.args[0]] for request in requests]
            return [f"{text} Or 5?" if self.doubts else text for text in answered]

    recipe.write_task(tmp_path / "task", problems, recipe.prompt_of)
    scores = {}
    for doubts in (False, True):
        model = Answering()
        model.doubts = doubts
        result = recipe.score(f"doubts-{doubts}", model, Namespace(out=tmp_path, tasks=[recipe.TASK]))
        scores[doubts] = {key: value for key, value in result[recipe.TASK].items() if "stderr" not in key}
    assert scores[False] == {"exact_match,stated": 1.0, "exact_match,last-number": 1.0}
    assert scores[True] == {"exact_match,stated": 1.0, "exact_match,last-number": 0.0}
    lines = (tmp_path / "answers" / f"{recipe.TASK}-doubts-True.jsonl").read_text().splitlines()
    assert {json.loads(line)["arguments"][0][0] for line in lines} == answers.keys()
