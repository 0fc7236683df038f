"""The studies of quality: intervals, choice of learning rates, repeated runs, the text, and the sentences."""

import copy
import json
import math
import random
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks import glue_study, language_study
from benchmarks.__main__ import main
from benchmarks.common.random_models import llama_config
from benchmarks.pages import quality
from benchmarks.studies import glue, language, runs, texts, training
from benchmarks.studies.comparisons import MEAN, Comparison, Study, differences, progress, unlearnt, values_of
from benchmarks.studies.intervals import Interval, interval, mean_over, paired
from benchmarks.studies.report import caveats, conclusions, origin, rates_table, tables
from benchmarks.studies.runs import COLUMNS, SAME, Arm, Run, train_all, values_by_rate
from exporters.measuring.tables import read_csv, write_csv
from melora_fx import MELoRAError

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT reads it
SETTINGS = "at most 9 examples"
STUDY = Study(
    name="a_study",
    title="A study",
    tasks={"A": "accuracy", "B": "accuracy"},
    arms=["LoRA 8", "MELoRA 8×1", "nothing"],
    comparisons=(Comparison("MELoRA 8×1", "LoRA 8", "8 times fewer parameters"),),
    choice="C",
    rule="The best was taken.",
    near=0,
    seeds=5,
    baseline=("nothing", "giving one answer"),
    beside="",
    unit="points",
    scale="100 × the metric",
    factor=100,
    digits=1,
    higher_is_better=True,
    differs=("It is small.",),
)


def rows_of(values: dict[tuple[str, str], list[float]], settings: str = SETTINGS, day: int = 1) -> list[dict[str, str]]:
    """Returns one row for each value; its index is the seed."""
    facts = {"metric": "accuracy", "epochs": "4", "learning_rate": "0.004", "parameters": "96", "seconds": "3600"}
    facts |= {"settings": settings, "device": "a processor", "versions": "torch 2", "source": "s", "commit": "c"}
    facts |= {"time": f"2026-11-0{day}T00:00:00"}
    return [
        {"task": task, "arm": arm, "seed": str(seed), "value": str(value), **facts}
        for (task, arm), found in values.items()
        for seed, value in enumerate(found)
    ]


# ---- intervals


def test_an_interval_is_that_of_students_t() -> None:
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.7764451051977987 * np.sqrt(2.5 / 5)  # the table's 0.975 quantile for four degrees of freedom
    assert found == pytest.approx((3.0, 3.0 - half, 3.0 + half, 5))


def test_one_seed_has_no_interval() -> None:
    assert interval([0.5]) == Interval(0.5, None, None, 1)
    assert interval([0.5]).side == 0


@pytest.mark.parametrize(("low", "high", "side"), [(0.1, 0.3, 1), (-0.3, -0.1, -1), (-0.1, 0.3, 0), (0.0, 0.0, 0)])
def test_side(low: float, high: float, side: int) -> None:
    assert Interval((low + high) / 2, low, high, 5).side == side


def test_differences_are_by_seed() -> None:
    """A small constant difference distinguishes arms that move together from seed to seed."""
    first = {seed: 10.0 * seed for seed in range(5)}
    found = paired({seed: value + 0.5 + 0.01 * (seed % 2) for seed, value in first.items()}, first)
    assert found is not None
    assert found.mean == pytest.approx(0.504)
    assert found.side == 1
    assert interval([value + 0.5 for value in first.values()]).high - 0.5 > 30, "unpaired, it would show nothing"


def test_only_common_seeds_are_compared() -> None:
    assert paired({0: 1.0, 1: 2.0, 7: 100.0}, {1: 1.0, 0: 0.0, 3: -100.0}) == Interval(1.0, 1.0, 1.0, 2)
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_the_mean_over_tasks_is_by_seed() -> None:
    assert mean_over([{0: 1.0, 1: 3.0}, {1: 5.0, 0: 2.0, 2: 9.0}]) == {0: 1.5, 1: 4.0}


# ---- runs


ARMS = (Arm("LoRA 8", "LoRA", 8), Arm("LoRA 1", "LoRA", 1), Arm("MELoRA 8×1", "MELoRA", 1, 8))


def choice_runs() -> list[Run]:
    return [Run("C", arm, seed, 4, rate, SETTINGS, {}) for arm in ARMS[:2] for rate in (0.1, 0.2) for seed in (7, 8)]


def rows_of_runs(values: list[float]) -> list[dict[str, str]]:
    runs = choice_runs()
    return [dict(zip(SAME, run.key, strict=True), value=str(value)) for run, value in zip(runs, values, strict=True)]


def test_what_a_learning_rate_gave_is_the_mean_over_seeds() -> None:
    rows = rows_of_runs([1.0, 4.0, 2.0, 2.0, 0.0, 1.0, 5.0, 5.0])
    found = values_by_rate(rows, choice_runs())
    assert found == {"LoRA 8": {0.1: 2.5, 0.2: 2.0}, "LoRA 1": {0.1: 0.5, 0.2: 5.0}}
    others = [row | {"settings": "others", "value": "9"} for row in rows]
    assert values_by_rate([*others, *rows], choice_runs()) == found, "rows of other settings do not count"


def test_no_learning_rate_is_chosen_where_a_run_is_missing() -> None:
    rows = rows_of_runs([1.0] * 8)[:-1]
    with pytest.raises(MELoRAError, match=r"without LoRA 1 at 0\.2"):
        values_by_rate(rows, choice_runs())


def test_only_does_not_narrow_what_learning_rates_are_chosen_by(tmp_path: Path) -> None:
    assert not runs.for_choice(options_of(tmp_path, only="RTE", again=True)).again
    assert runs.for_choice(options_of(tmp_path, only="RTE")).only == ""
    assert runs.for_choice(options_of(tmp_path, again=True)).again


def test_one_learning_rate_for_all_arms() -> None:
    first = {0.001: 0.972, 0.002: 0.980, 0.004: 0.9}
    assert glue_study.common_rate({"LoRA 8": first}) == 0.001
    assert glue_study.common_rate({"LoRA 8": first, "LoRA 1": {0.001: 0.8, 0.002: 0.9, 0.004: 0.905}}) == 0.002
    apart = {"LoRA 8": {0.001: 0.9, 0.002: 0.8}, "LoRA 1": {0.001: 0.7, 0.002: 0.95}}
    assert glue_study.common_rate(apart) == 0.002, "the loss of LoRA 8 is the smaller one"


def make_runs(settings: str = SETTINGS) -> list[Run]:
    return [Run("A", arm, seed, 4, 0.004, settings, {"folder": "here"}) for arm in ARMS[:2] for seed in (0, 1)]


def options_of(folder: Path, **others) -> Namespace:
    return Namespace(**{"benchmark": "a_study", "out": folder, "only": "", "again": False, "quick": True} | others)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Collects arms and seeds in the order of their training; the arm "LoRA 1" fails at seed 1."""
    order: list[tuple[str, int]] = []

    def run(job):
        order.append((job["arm"][0], job["seed"]))
        if (job["arm"][0], job["seed"]) == ("LoRA 1", 1):
            raise MELoRAError("no memory")
        return {"metric": "accuracy", "value": 0.5 + job["seed"], "parameters": 96, "seconds": 1.0}

    monkeypatch.setattr(glue, "run", run)
    return order


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, trained, capsys) -> None:
    assert train_all(options_of(tmp_path), "studies.glue", make_runs()[:1]) == 0
    assert train_all(options_of(tmp_path), "studies.glue", make_runs()) == 1, "one fails"
    assert trained == [("LoRA 8", 0), ("LoRA 8", 1), ("LoRA 1", 0), ("LoRA 1", 1)]
    assert "LoRA 1, 1: failed: no memory" in capsys.readouterr().out
    rows = read_csv(tmp_path / "a_study.csv")
    assert tuple(rows[0]) == COLUMNS
    assert [(row["arm"], row["seed"], row["value"]) for row in rows] == [
        ("LoRA 8", "0", "0.5"),
        ("LoRA 8", "1", "1.5"),
        ("LoRA 1", "0", "0.5"),
    ]
    trained.clear()
    assert train_all(options_of(tmp_path), "studies.glue", make_runs()) == 1
    assert trained == [("LoRA 1", 1)], "only failed runs are tried again"


def test_what_waits_is_not_trained_after_an_unexpected_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def run(job):
        trained.append(job["seed"])
        raise OSError("no space left")

    monkeypatch.setattr(glue, "run", run)
    runs = [Run("A", ARMS[0], seed, 4, 0.004, SETTINGS, {}) for seed in range(50)]
    with pytest.raises(OSError, match="no space left"):
        train_all(options_of(tmp_path), "studies.glue", runs)
    assert len(trained) < 50


def test_other_settings_are_other_runs_and_again_replaces(tmp_path: Path, trained) -> None:
    first = make_runs()[:1]
    train_all(options_of(tmp_path), "studies.glue", first)
    train_all(options_of(tmp_path), "studies.glue", make_runs("other")[:1])
    train_all(options_of(tmp_path, again=True), "studies.glue", first)
    assert len(trained) == 3
    assert sorted(row["settings"] for row in read_csv(tmp_path / "a_study.csv")) == [SETTINGS, "other"]


def test_only_takes_tasks_and_arms_by_a_part_of_their_name(tmp_path: Path, trained) -> None:
    assert train_all(options_of(tmp_path, only="LoRA 8"), "studies.glue", make_runs()) == 0
    assert trained == [("LoRA 8", 0), ("LoRA 8", 1)]


def test_the_key_of_a_run_is_that_of_its_row(tmp_path: Path, trained) -> None:
    run = make_runs()[0]
    train_all(options_of(tmp_path), "studies.glue", [run])
    row = read_csv(tmp_path / "a_study.csv")[0]
    assert runs.key_of(row) == run.key
    assert dict(zip(SAME, run.key, strict=True))["learning_rate"] == "0.004"


def test_a_job_is_json() -> None:
    job = json.loads(json.dumps(make_runs()[0].job))
    assert Arm(*job["arm"]) == ARMS[0]
    assert (job["task"], job["seed"], job["learning_rate"], job["folder"]) == ("A", 0, 0.004, "here")


# ---- training


@pytest.mark.parametrize("arm", [Arm("LoRA 2", "LoRA", 2), Arm("MELoRA 4×2", "MELoRA", 2, 4)], ids=lambda arm: arm.kind)
def test_both_libraries_train_the_same(arm: Arm) -> None:
    """Two sites, 32 → 32, in each of two layers: equal counts at equal block ranks. The base stays, the head trains."""
    torch.manual_seed(0)
    model, tokenize = glue.load(2, quick=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = training.add_adapter(model, arm, glue.TARGETS, glue.HEAD)
    assert training.num_adapter_parameters(adapted, glue.HEAD) == 4 * (32 + 32) * 2
    examples = glue.Examples([tokenize(f"text {index}") for index in range(32)], [index % 2 for index in range(32)])
    seconds = training.train(adapted, glue.batches(examples, 3, 0), 6, 0.01)
    assert seconds > 0
    changed = {
        name for name, value in adapted.named_parameters() if not value.requires_grad and not _is_in(value, before)
    }
    assert not changed, "frozen parameters stay the same"
    trained = {name for name, value in adapted.named_parameters() if value.requires_grad}
    assert sum("classifier" in name or "pooler" in name for name in trained) == 4
    assert all("classifier" in name or "pooler" in name or "lora" in name.lower() for name in trained)


def test_one_block_trains_as_lora_step_by_step() -> None:
    """The library does not cause MELoRA's losses against LoRA: from the same weights both learn the same."""
    base, tokenize = glue.load(2, quick=True)
    lora = training.add_adapter(copy.deepcopy(base), Arm("LoRA 4", "LoRA", 4), glue.TARGETS, glue.HEAD)
    ours = training.add_adapter(copy.deepcopy(base), Arm("MELoRA 1×4", "MELoRA", 4, 1), glue.TARGETS, glue.HEAD)
    theirs = {name: value for name, value in lora.named_parameters() if value.requires_grad}
    factors = [value for name, value in theirs.items() if "lora_A" in name]
    mine = {name: value for name, value in ours.named_parameters() if value.requires_grad}
    assert len(factors) == 4
    with torch.no_grad():
        for value, other in zip(
            [value for name, value in mine.items() if name.endswith("lora_a")], factors, strict=True
        ):
            assert value.abs().max() <= 32**-0.5, "like PEFT's: uniform up to 1 / √features"
            assert other.abs().max() <= 32**-0.5
            value.copy_(other.view_as(value))
    examples = glue.Examples([tokenize(f"text {index}") for index in range(64)], [index % 2 for index in range(64)])
    for model in (lora, ours):
        torch.manual_seed(1)  # for the base's dropout
        training.train(model.train(), glue.batches(examples, 4, 0), 16, 0.01)
    for value, other in zip(mine.values(), theirs.values(), strict=True):
        torch.testing.assert_close(value.flatten(), other.flatten(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arm", [Arm("LoRA 2", "LoRA", 2), Arm("MELoRA 4×2", "MELoRA", 2, 4)], ids=lambda arm: arm.kind)
def test_both_libraries_train_the_same_under_autocast(arm: Arm) -> None:
    """The arms of the language study differ in nothing else: both compute in bfloat16 and keep float32 weights."""
    torch.manual_seed(0)
    adapted = training.add_adapter(LlamaForCausalLM(llama_config(32, 64, 2, 2, vocab_size=64)), arm, ("q_proj",))
    seen = set()
    for module in adapted.modules():
        module.register_forward_hook(lambda module, inputs, output: seen.add(getattr(output, "dtype", None)))
    windows = torch.arange(64, dtype=torch.int32).view(16, 4)
    training.train(adapted, language.batches(windows, 2, 0), 2, 0.01, torch.bfloat16)
    assert torch.bfloat16 in seen
    assert {value.dtype for value in adapted.parameters()} == {torch.float32}
    trained = [value for value in adapted.parameters() if value.requires_grad]
    assert len(trained) == 4
    assert all(value.abs().sum() > 0 for value in trained), "both factors learn"


def _is_in(value: torch.Tensor, before: dict[str, torch.Tensor]) -> bool:
    return any(value.shape == other.shape and torch.equal(value, other) for other in before.values())


def test_the_learning_rate_rises_and_falls_to_zero() -> None:
    model = torch.nn.Linear(1, 1)
    seen = []

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = model

        def forward(self, x):
            return Namespace(loss=self.linear(x).sum())

    step = torch.optim.AdamW.step
    adapted = Loss()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.optim.AdamW,
            "step",
            lambda self, *args: (seen.append(self.param_groups[0]["lr"]), step(self, *args)),
        )
        training.train(adapted, [{"x": torch.ones(1, 1)}] * 100, 100, 1.0)
    assert seen[0] == pytest.approx(1 / 6)
    assert max(seen) == seen[5] == pytest.approx(1.0)
    assert seen[-1] == pytest.approx(1 / 94)


# ---- GLUE


def test_every_arm_sees_the_same_batches() -> None:
    examples = glue.Examples(
        [([number] * (1 + number % 7), [0] * (1 + number % 7)) for number in range(300)], [0] * 300
    )
    first, second, other = ([batch["input_ids"] for batch in glue.batches(examples, 2, seed)] for seed in (3, 3, 4))
    assert len(first) == 2 * -(-300 // glue.BATCH)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert not all(one.shape == two.shape and torch.equal(one, two) for one, two in zip(first, other, strict=True))
    epoch = torch.cat([batch[:, 0] for batch in first[: len(first) // 2]])
    assert sorted(epoch.tolist()) == list(range(300)), "each example once an epoch"


def test_batches_are_padded_behind() -> None:
    found = glue.collate(glue.Examples([([5, 6], [0, 1]), ([7], [1])], [1.5, 2.0]), [0, 1])
    assert found["input_ids"].tolist() == [[5, 6], [7, 0]]
    assert found["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert found["token_type_ids"].tolist() == [[0, 1], [1, 0]]
    assert found["labels"].tolist() == [1.5, 2.0]


@pytest.mark.parametrize(
    ("metric", "predicted", "labels", "value"),
    [
        ("accuracy", [[1, 0], [0, 1], [0, 1], [0, 1]], [0, 1, 1, 0], 0.75),
        ("Matthews", [[1, 0], [0, 1], [0, 1], [1, 0]], [0, 1, 1, 0], 1.0),
        ("Matthews", [[0, 1], [1, 0], [1, 0], [0, 1]], [0, 1, 1, 0], -1.0),
        ("Pearson", [[1.0], [2.0], [3.0]], [2.0, 4.0, 6.0], 1.0),
        ("Pearson", [[2.0], [2.0], [2.0]], [2.0, 4.0, 6.0], 0.0),
    ],
)
def test_score(metric: str, predicted: list[list[float]], labels: list[float], value: float) -> None:
    assert glue.score(metric, np.array(predicted, dtype=np.float32), labels) == pytest.approx(value)


def test_one_answer() -> None:
    held_out = glue.Examples([([1], [0])] * 4, [1, 1, 1, 0])
    examples = glue.Examples([([1], [0])] * 3, [1, 0, 1])
    assert glue.score_of_one_answer(glue.TASKS["RTE"], examples, held_out) == 0.75
    assert glue.score_of_one_answer(glue.TASKS["CoLA"], examples, held_out) == 0.0
    assert glue.score_of_one_answer(glue.TASKS["STS-B"], examples, held_out) == 0.0


def test_what_is_trained_beside_the_adapter_is_told_rightly() -> None:
    """MiniLM-L6: 384 features, adapters on query and value of six layers."""
    head = 384 * 384 + 384 + 384 * 2 + 2
    lora, ours = (12 * rank * 2 * 384 for rank in (8, 1))
    assert f"{head:,} parameters ({head - 385:,} on STS-B)" in glue_study.STUDY.beside
    assert f"{(head + lora) / (head + ours):.1f} times fewer" in glue_study.STUDY.beside


def write_glue(folder: Path, count: int = 24) -> None:
    """Writes files in the format of GLUE and SNIPS, with quotation marks that do not quote."""
    for name, task in glue.TASKS.items():
        place = folder / ("snips" if name == "SNIPS" else f"glue/{task.folder}")
        place.mkdir(parents=True)
        generator = random.Random(name)
        for file in task.files:
            lines = ["\t".join([*task.columns, "label"])]
            for index in range(count):
                label = f"{generator.uniform(0, 5):.3f}" if task.is_regression else ("yes", "no", "maybe")[index % 2]
                words = [f'the "{generator.choice("abc")}' for _ in task.columns]
                lines.append("\t".join([*words, label]))
            (place / file).write_text("\n".join(lines) + "\n")


def test_read_takes_labels_in_one_order(tmp_path: Path) -> None:
    write_glue(tmp_path)
    examples, held_out = glue.read(glue.TASKS["RTE"], tmp_path / "glue/rte", lambda *texts: (list(texts), []))
    assert set(examples.labels) == set(held_out.labels) == {0, 1}
    assert examples.labels[0] == 1, "no, yes"
    assert examples.tokens[0][0][0].startswith('the "')
    scores, _ = glue.read(glue.TASKS["STS-B"], tmp_path / "glue/stsb", lambda *texts: (list(texts), []))
    assert all(isinstance(label, float) for label in scores.labels)


@pytest.mark.slow
def test_the_glue_study_runs_quickly(tmp_path: Path, capsys) -> None:
    write_glue(tmp_path)
    arguments = ["glue_study", "--quick", "--seeds", "3", "--out", str(tmp_path / "out")]
    arguments += ["--glue", str(tmp_path / "glue"), "--snips", str(tmp_path / "snips")]
    assert main(arguments) == 0
    rows = read_csv(tmp_path / "out" / "glue_study.csv")
    assert tuple(rows[0]) == COLUMNS
    main_rows = [row for row in rows if row["task"] != "SNIPS"]
    assert len(main_rows) == len({(row["task"], row["arm"], row["seed"]) for row in main_rows}) == 4 * (5 * 3 + 1)
    assert {row["parameters"] for row in main_rows if row["arm"] == "head alone"} == {"0"}
    assert {row["parameters"] for row in main_rows if row["arm"] in ("MELoRA 8×1", "LoRA 1")} == {"256"}
    assert {row["parameters"] for row in main_rows if row["arm"] in ("MELoRA 8×8", "LoRA 8")} == {"2048"}
    report = (tmp_path / "out" / "glue_study.md").read_text()
    assert "MELoRA 8×1 against LoRA 8 (8 times fewer parameters, equal rank): " in report
    assert (tmp_path / "out" / "glue_study.png").stat().st_size > 10_000
    capsys.readouterr()
    assert main(arguments) == 0
    assert "64 of 64 runs have a row" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["glue_study", "language_study"])
def test_nothing_is_trained_for_an_only_without_a_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Not even the runs that choose the learning rates."""
    write_glue(tmp_path)
    monkeypatch.setattr(glue_study, "train_all", None)
    monkeypatch.setattr(language_study, "train_all", None)
    monkeypatch.setattr(language_study, "prepare", None)
    folders = ["--glue", str(tmp_path / "glue"), "--snips", str(tmp_path / "snips")] if name == "glue_study" else []
    text = [] if folders else ["--text", str(tmp_path / "glue" / "rte" / "train.tsv")]
    assert main([name, "--quick", "--only", "QNLI", "--out", str(tmp_path / "out"), *folders, *text]) == 2
    assert "`--only QNLI` matches no run; runs have names such as `" in capsys.readouterr().out


def test_without_glue_it_says_where_glue_comes_from(tmp_path: Path, capsys) -> None:
    assert main(["glue_study", "--quick", "--glue", str(tmp_path), "--out", str(tmp_path / "out")]) == 3
    said = capsys.readouterr().err
    assert str(tmp_path / "rte" / "train.tsv") in said
    assert "gluebenchmark.com" in said
    assert not (tmp_path / "out").exists()


# ---- text


def test_documents_hold_no_paragraph_twice(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("\n".join(["one", "two", "one", "three"] * 50 + ["four"] * 3))
    documents = texts.read_documents(str(tmp_path / "text"))
    assert "\n".join(documents.values()).split("\n") == ["one", "two", "three", "four"]


def test_windows_are_of_documents_of_their_own() -> None:
    documents = {f"{index:03}": chr(index) * (3 * texts.WINDOW + 7) for index in range(100)}
    cut = texts.windows(documents, lambda text: [ord(letter) for letter in text])
    assert {name: len(found) for name, found in cut.items()} == {"held out": 15, "choice": 15, "train": 270}
    assert all((found == found[:, :1]).all() for found in cut.values()), "no window spans two documents"
    seen = {name: set(found.flatten().tolist()) for name, found in cut.items()}
    assert not seen["train"] & seen["held out"]
    assert not seen["train"] & seen["choice"]
    assert not seen["choice"] & seen["held out"]


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(MELoRAError, match="too short"):
        texts.windows({"a": "x" * 200, "b": "x" * 200}, lambda text: [1] * len(text))


@pytest.mark.slow
def test_botocore_is_prose() -> None:
    pytest.importorskip("botocore", reason="the text of the study: pip install botocore")
    documents = texts.read_documents(texts.BOTOCORE)
    assert len(documents) > 400
    paragraphs = "\n".join(documents.values()).split("\n")
    assert len(set(paragraphs)) == len(paragraphs)
    assert min(map(len, paragraphs)) >= texts.SHORTEST
    marked = sum("<p>" in paragraph or "&amp;" in paragraph for paragraph in paragraphs)
    assert marked < len(paragraphs) / 1000, "except those about HTML"
    assert sum(map(len, paragraphs)) > 4e6, "more than a million tokens"


def test_batches_of_language_share_no_window() -> None:
    windows = torch.arange(64, dtype=torch.int32).view(64, 1)
    first, second = (list(language.batches(windows, 8, seed)) for seed in (0, 0))
    ids = torch.cat([batch["input_ids"] for batch in first])
    assert sorted(ids.flatten().tolist()) == list(range(64))
    assert all(torch.equal(one["input_ids"], two["input_ids"]) for one, two in zip(first, second, strict=True))
    assert len(list(language.batches(windows[:3], 8, 0))) == 8, "a short text is used again"


@pytest.mark.slow
def test_the_language_study_runs_quickly(tmp_path: Path) -> None:
    arguments = ["language_study", "--quick", "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    assert main(arguments) == 0
    rows = read_csv(tmp_path / "out" / "language_study.csv")
    assert tuple(rows[0]) == COLUMNS
    found = {row["arm"]: row for row in rows if row["task"] == language_study.TASK and row["seed"] == "0"}
    assert list(found) == ["none", "LoRA 36", "MELoRA 36×1", "LoRA 8", "MELoRA 8×1", "LoRA 1"]
    parameters = {arm: int(row["parameters"]) for arm, row in found.items()}
    assert parameters["LoRA 36"] == 36 * parameters["MELoRA 36×1"]
    assert parameters["LoRA 8"] == 8 * parameters["MELoRA 8×1"]
    assert float(found["LoRA 36"]["value"]) < float(found["none"]["value"]), "it learns"
    assert "none" in (tmp_path / "out" / "language_study.md").read_text()


def test_the_best_learning_rate_has_a_worse_one_on_either_side() -> None:
    assert language_study.further_rate({1e-3: 3.0, 2e-3: 2.9, 4e-3: 2.8}) == 8e-3
    assert language_study.further_rate({1e-3: 2.7, 2e-3: 2.9, 4e-3: 2.8}) == 5e-4
    assert language_study.further_rate({1e-3: 3.0, 2e-3: 2.7, 4e-3: 2.8}) is None


def test_learning_rates_are_tried_until_the_best_lies_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is smallest at 16 times the first rate, except for one arm, for which a rate inside is best."""
    best = dict.fromkeys((arm.name for arm in language_study.ARMS), 1.6e-2) | {"LoRA 36": 2e-3}
    tried: list[tuple[str, float]] = []

    def train(options, script, of) -> int:
        tried.extend((run.arm.name, run.learning_rate) for run in of)
        new = [
            dict.fromkeys(COLUMNS, "")
            | dict(zip(SAME, run.key, strict=True))
            | {"value": str(abs(math.log(run.learning_rate / best[run.arm.name])))}
            for run in of
        ]
        write_csv([*read_csv(tmp_path / "rows.csv"), *new], COLUMNS, tmp_path / "rows.csv")
        return 0

    monkeypatch.setattr(language_study, "train_all", train)
    options = Namespace(quick=False, again=False, only="", choice_steps=2)

    def make(task: str, arm: Arm, seed: int, rate: float, steps: int) -> Run:
        return Run(task, arm, seed, 1, rate, "settings", {})

    status, chosen = language_study._choose(options, make, tmp_path / "rows.csv")
    assert (status, chosen) == (0, best)
    assert max(rate for _, rate in tried) == 3.2e-2
    assert len(tried) == len(set(tried)) == 4 * 5 + 2 * 4


def test_36_divides_the_features_of_the_targets_alone() -> None:
    """SmolLM2-135M's shapes: hidden size 576, keys 192, intermediate size 1536."""
    assert 576 % 36 == 0
    assert 192 % 36 != 0 != 1536 % 36
    assert language.TARGETS == ("q_proj", "o_proj")


# ---- report


def test_conclusions_say_what_the_intervals_allow() -> None:
    steady = [0.70, 0.72, 0.74, 0.71, 0.73]
    rows = rows_of(
        {
            ("A", "LoRA 8"): steady,
            ("A", "MELoRA 8×1"): [value - 0.02 + 0.001 * (seed % 2) for seed, value in enumerate(steady)],
            ("B", "LoRA 8"): steady,
            ("B", "MELoRA 8×1"): [0.74, 0.70, 0.73, 0.72, 0.71],
        }
    )
    found = differences(STUDY, rows)[STUDY.comparisons[0]]
    assert found["A"].side == -1
    assert found["B"].side == 0
    told = "* MELoRA 8×1 against LoRA 8 (8 times fewer parameters)"
    assert conclusions(STUDY, rows)[0] == f"{told}: worse on A; not distinguished on B, {MEAN}."
    lower = STUDY._replace(higher_is_better=False)
    assert conclusions(lower, rows)[0] == f"{told}: better on A; not distinguished on B, {MEAN}."


def test_a_trial_beside_the_study_is_none_of_it() -> None:
    """Other settings or learning rates count only if more rows have them, or as many newer ones."""
    main = rows_of({("A", "LoRA 8"): [0.5, 0.7], ("A", "MELoRA 8×1"): [0.4, 0.4]}, day=1)
    trial = rows_of({("A", "LoRA 8"): [0.1]}, settings="a trial", day=2)
    faster = [row | {"learning_rate": "0.1", "seed": "7"} for row in rows_of({("A", "LoRA 8"): [0.2]}, day=3)]
    expected = {"A": {"LoRA 8": {0: 50.0, 1: 70.0}, "MELoRA 8×1": {0: 40.0, 1: 40.0}}}
    assert values_of(STUDY, [*main, *trial, *faster]) == values_of(STUDY, [*faster, *trial, *main]) == expected
    anew = [row | {"settings": "anew", "value": "0.9"} for row in rows_of({("A", "LoRA 8"): [0] * 4}, day=4)]
    assert values_of(STUDY, [*main, *anew]) == {"A": {"LoRA 8": dict.fromkeys(range(4), 90.0)}}


def test_a_study_under_way_says_so_and_compares_common_seeds() -> None:
    rows = rows_of({("A", "LoRA 8"): [0.5] * 4, ("A", "MELoRA 8×1"): [0.6] * 3, ("A", "nothing"): [0.1]})
    rows += rows_of({("B", "LoRA 8"): [0.5]})
    assert progress(STUDY, rows) == (8, 20)
    assert "**In progress: 8 of 20 trainings are done.**" in "\n".join(origin(STUDY, rows))
    assert {arm: list(seeds) for arm, seeds in values_of(STUDY, rows)["A"].items()} == {
        "LoRA 8": [0, 1, 2],
        "MELoRA 8×1": [0, 1, 2],
        "nothing": [0],
    }
    page = quality.studies([row | {"task": {"A": "RTE", "B": "SNIPS"}[row["task"]]} for row in rows])
    assert page == ["*`python -m benchmarks glue_study` is in progress: 7 of 100 trainings are done.*"]
    assert "0 of 100" in quality.studies([row | {"task": "SNIPS"} for row in rows])[0]


def test_a_complete_study_tells_every_interval_in_the_readme() -> None:
    arms = {arm: 0.8 - 0.05 * place for place, arm in enumerate(glue_study.STUDY.arms)}
    values = {
        (task, arm): [value + 0.01 * (seed * (place + 1) % 3) for seed in range(5 if arm != "one answer" else 1)]
        for place, (arm, value) in enumerate(arms.items())
        for task in glue_study.GLUE
    }
    text = "\n".join(quality.studies(rows_of(values)))
    assert text.count(" to +") + text.count(" to -") == 4 * 5, "four comparisons on four tasks and in the mean"
    assert "head alone" not in text
    assert "\n* MELoRA 8×1 against LoRA 8 (8 times fewer parameters, equal rank): worse on RTE, MRPC" in text
    assert "not that the two are equal" in text.replace("\n", " ")
    assert "5 seeds" in text


def test_a_task_on_which_nothing_is_learnt_is_named() -> None:
    """Arms that are equal because none has learnt are not evidence; nor is an arm that beats a failed one."""
    values = {("A", "LoRA 8"): [0.5, 0.53, 0.49], ("A", "MELoRA 8×1"): [0.51, 0.5, 0.5], ("A", "nothing"): [0.51]}
    learnt = {("B", "LoRA 8"): [0.7, 0.72, 0.71], ("B", "MELoRA 8×1"): [0.5, 0.5, 0.51], ("B", "nothing"): [0.51]}
    assert unlearnt(STUDY, rows_of(values | learnt)) == ["A"]
    assert "On A no arm is better than giving one answer: nothing about" in caveats(STUDY, rows_of(values | learnt))[0]
    failed = values | {("A", "MELoRA 8×1"): [0.3, 0.31, 0.3]}
    assert differences(STUDY, rows_of(failed | learnt))[STUDY.comparisons[0]]["A"].side == -1
    assert conclusions(STUDY, rows_of(failed | learnt))[0].endswith(f": worse on B, {MEAN}.")
    three = STUDY._replace(tasks={**STUDY.tasks, "D": "accuracy"})
    more = rows_of(failed | learnt | {("D", arm): of for (_, arm), of in learnt.items()})
    assert list(differences(three, more)[STUDY.comparisons[0]]) == ["A", "B", "D", MEAN, "mean without A"]
    assert unlearnt(STUDY._replace(higher_is_better=False), rows_of(values | learnt)) == ["A", "B"]
    assert unlearnt(STUDY, rows_of({key: found[:2] for key, found in values.items()})) == [], "two seeds say nothing"


def test_nothing_is_concluded_from_two_seeds() -> None:
    rows = rows_of({("A", "LoRA 8"): [0.5, 0.5], ("A", "MELoRA 8×1"): [0.6, 0.6]})
    assert conclusions(STUDY, rows) == ["Nothing is concluded from fewer than 3 seeds."]


def test_the_learning_rates_are_shown_with_what_they_gave() -> None:
    choice = [
        row | {"task": "C", "learning_rate": rate, "value": value}
        for rate, value in (("0.001", "0.9"), ("0.004", "0.95"))
        for row in rows_of({("C", "LoRA 8"): [0.0]})
    ]
    lines = rates_table(STUDY, [*choice, *rows_of({("A", "LoRA 8"): [0.5]})])
    assert lines[0] == "The best was taken."
    assert "| accuracy at | 0.001 | 0.004 |" in lines
    assert "| LoRA 8 | 0.9000 | **0.9500** |" in lines
    near = rates_table(STUDY._replace(near=0.06), [*choice, *rows_of({("A", "LoRA 8"): [0.5]})])
    assert "| LoRA 8 | *0.9000* | **0.9500** |" in near
    assert "the rate that the rule would choose for the arm on its own" in near[2]


def test_tables_hold_what_is_there() -> None:
    """In an unfinished study an arm that lacks a task has no mean over tasks, and a difference needs a pair."""
    rows = rows_of({("A", "LoRA 8"): [0.5, 0.7], ("A", "MELoRA 8×1"): [0.6], ("B", "LoRA 8"): [0.5, 0.5]})
    lines = tables(STUDY, rows)
    assert f"| arm | adapter parameters | A, accuracy | B, accuracy | {MEAN} |" in lines
    assert "| LoRA 8 | 96 | 50.0 | 50.0 (50.0 to 50.0) | 50.0 |" in lines
    assert "| MELoRA 8×1 | 96 | 60.0 |  |  |" in lines
    assert "| MELoRA 8×1 − LoRA 8 | 8 times fewer parameters | +10.0 |  |  |" in lines


@pytest.mark.parametrize("study", [glue_study.STUDY, language_study.STUDY], ids=lambda study: study.name)
def test_the_committed_report_is_that_of_the_committed_rows(study: Study, tmp_path: Path) -> None:
    results = Path(glue_study.__file__).parent / "results"
    rows = read_csv(results / f"{study.name}.csv")
    if not rows:
        pytest.skip(f"{study.name} has no rows yet")
    write_csv(rows, COLUMNS, tmp_path / f"{study.name}.csv")
    assert main([study.name, "--report-only", "--out", str(tmp_path)]) == 0
    assert (tmp_path / f"{study.name}.md").read_text() == (results / f"{study.name}.md").read_text()


@pytest.mark.parametrize("study", [glue_study.STUDY, language_study.STUDY], ids=lambda study: study.name)
def test_comparisons_are_of_arms_of_the_study(study: Study) -> None:
    assert study.baseline[0] in study.arms
    assert {arm for each in study.comparisons for arm in (each.arm, each.other)} <= set(study.arms)
