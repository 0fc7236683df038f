"""end_to_end: its rows are ratios within a round, its graphs get the inputs that they need, its table is complete."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from benchmarks import end_to_end
from benchmarks.common.random_models import llama_config
from benchmarks.deployment import end_to_end_cells
from benchmarks.deployment.end_to_end_cells import PEFT_SIDE, SIDES, STORIES, spread
from benchmarks.deployment.end_to_end_graphs import (
    LOADS,
    Graph,
    _name_rope_theta,
    check,
    graph_of,
    latencies_of,
    rotated,
)
from benchmarks.deployment.end_to_end_process import PROBE
from benchmarks.pages import quality
from melora_fx import MELoRAError

OURS = SIDES[2].name


def found(training: float, quality: float = 0.5) -> dict[str, float]:
    return {
        "training_s": training,
        "first_step_s": 1.0,
        "peak_mib": 100.0,
        "adapter_kib": 8.0,
        "adapter_alone_kib": 4.0,
        "export_s": 2.0,
        "total_s": training + 2,
        "quality": quality,
    }


def test_a_ratio_is_of_the_same_round() -> None:
    """The second round runs on a machine three times slower: each side's times triple, their ratio stays the same."""
    rounds = [{side.name: found(10.0 if side.name == PEFT_SIDE else 5.0) for side in SIDES} for _ in range(3)]
    rounds[1] = {name: {**each, "training_s": 3 * each["training_s"]} for name, each in rounds[0].items()}
    loads = {side.name: [4.0, 8.0, 4.0] if side.name == PEFT_SIDE else [3.0, 4.0, 4.4] for side in SIDES}
    latencies = dict.fromkeys(end_to_end.SHAPES, loads)
    row = end_to_end._row(STORIES[0], OURS, rounds, latencies)
    assert (row["training_s"], row["training_ratio"]) == (5.0, 0.5)
    assert (row["ms_1x32"], row["ratio_8x64"], row["ratio_8x64_least"], row["ratio_8x64_most"]) == (4.0, 0.75, 0.5, 1.1)
    assert row["quality_of_rounds"] == "0.5000 0.5000 0.5000"
    assert row["ratio"] == pytest.approx(7 / 12, abs=1e-4)
    theirs = end_to_end._row(STORIES[0], PEFT_SIDE, rounds, latencies)
    assert {theirs[name] for name in theirs if "ratio" in name} == {1.0}
    assert (row["training_ratio_least"], row["training_ratio_most"]) == (0.5, 0.5)


def rows() -> list[dict[str, str]]:
    rounds = [{side.name: found(5.0 + index, 0.7 + index / 100) for index, side in enumerate(SIDES)}]
    latencies = {name: {side.name: [2.0] for side in SIDES} for name in end_to_end.SHAPES}
    made = [
        end_to_end._row(story, side.name, rounds, latencies) | {"case": story.name}
        for story in STORIES
        for side in SIDES
    ]
    facts = {"device": "a processor", "versions": "torch 2", "commit": "c", "time": "2026-11-28T00:00:00"}
    facts["theirs_by"] = "optimum-onnx 0.1"
    return [{name: str(value) for name, value in (row | facts).items()} for row in made]


def test_the_report_has_a_line_for_each_side(tmp_path: Path) -> None:
    end_to_end.write_report(rows(), tmp_path)
    lines = (tmp_path / "end_to_end.md").read_text().splitlines()
    for story in STORIES:
        for side in SIDES:
            assert sum(line.startswith(f"| {story.name} | {side.name} |") for line in lines) == 1
    assert any("6 (1.20)" in line and "accuracy 0.710" in line and "| 2 (1.00) |" in line for line in lines)


def test_a_ratio_is_shown_with_its_ends() -> None:
    row = {"ratio": "0.931", "ratio_least": "0.9299", "ratio_most": "0.934"}
    assert spread(row, "ratio") == "0.93"
    assert spread(row | {"ratio_most": "0.97"}, "ratio") == "0.93, 0.93 to 0.97"


def test_the_report_names_where_each_story_was_measured(tmp_path: Path) -> None:
    changed = rows()
    for row in changed:
        if row["case"] == "stories":
            row |= {"device": "another", "rounds": "1"}
    end_to_end.write_report(changed, tmp_path)
    text = (tmp_path / "end_to_end.md").read_text()
    assert "MRPC on 2026-11-28: a processor" in text
    assert "stories on 2026-11-28: another; torch 2; PEFT's graphs by optimum-onnx 0.1; commit c; 1 rounds." in text


def test_a_round_is_kept_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ratio is from one round: sides that were measured on another day are measured again."""
    measured: list[str] = []

    def side(options, story, side, index, base, work) -> dict[str, float]:
        if len(measured) == 3:
            measured.append("stopped")
            raise KeyboardInterrupt
        measured.append(side.name)
        return found(5.0)

    monkeypatch.setattr(end_to_end, "_side", side)
    arguments = (None, STORIES[0], SIDES, 0, tmp_path, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        end_to_end._round(*arguments)
    whole = end_to_end._round(*arguments)
    assert set(whole) == set(measured[4:]) == {each.name for each in SIDES}
    assert end_to_end._round(*arguments) == whole
    assert len(measured) == 4 + len(SIDES)


def test_the_readme_has_a_line_for_each_side_but_the_first() -> None:
    lines = [line for line in quality.end_to_end(rows()) if line.startswith(("| MRPC", "| stories"))]
    assert len(lines) == len(STORIES) * (len(SIDES) - 1)
    assert lines[1].startswith(
        "| MRPC, accuracy | ours, 8 blocks of rank 8 | 0.700 → 0.720 | 1.40 | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 |"
    )


def test_four_sides_train_equally_many_parameters() -> None:
    """n blocks of rank r have as many parameters as a LoRA of rank r."""
    assert [side.arm.rank for side in end_to_end_cells.SIDES[:4]] == [8, 8, 8, 8]
    assert [side.compiled for side in end_to_end_cells.SIDES] == [False, True, False, True, False]
    assert [side.name for side in end_to_end_cells.QUICK_SIDES] == [PEFT_SIDE, f"{OURS}, compiled"]


def write_graph(path: Path, extra: dict[str, tuple]) -> None:
    """Writes a graph whose logits (B, T, 1) are the tokens as numbers; `extra`: further inputs that it does not use."""
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])]
    inputs += [helper.make_tensor_value_info(name, *form) for name, form in extra.items()]
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["numbers", "last"], ["logits"]),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", 1])]
    last = [helper.make_tensor("last", TensorProto.INT64, [1], [2])]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, last)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


def test_a_graph_is_given_what_it_takes(tmp_path: Path) -> None:
    cache = (TensorProto.FLOAT, ["batch", 3, "past", 64])
    write_graph(tmp_path / "model.onnx", {"position_ids": (TensorProto.INT64, ["batch", "sequence"]), "past.0": cache})
    graph = Graph(graph_of(tmp_path))
    ids = np.array([[5, 6, 7], [8, 9, 10]])
    feed = graph.feed(ids)
    assert set(feed) == {"input_ids", "position_ids", "past.0"}
    assert feed["position_ids"].tolist() == [[0, 1, 2], [0, 1, 2]]
    assert feed["past.0"].shape == (2, 3, 0, 64)
    assert graph.logits(feed)[..., 0].tolist() == ids.tolist()


def test_latencies_are_of_every_side(tmp_path: Path) -> None:
    write_graph(tmp_path / "model.onnx", {})
    times = latencies_of({"one": tmp_path / "model.onnx", "two": tmp_path / "model.onnx"}, (1, 4), 0.05)
    assert set(times) == {"one", "two"}
    assert all(len(loads) == LOADS and all(0 < each < 1e3 for each in loads) for loads in times.values())


def test_each_side_is_loaded_at_every_place() -> None:
    """The first side that is loaded is slower than the later ones."""
    orders = [rotated(SIDES, index) for index in range(LOADS)]
    assert LOADS % len(SIDES) == 0
    assert all({order[place] for order in orders} == set(SIDES) for place in range(len(SIDES)))


def test_a_graph_that_answers_otherwise_is_refused(tmp_path: Path) -> None:
    """As PEFT's merged Llama does, which transformers 4 reads with another rotary embedding."""
    (tmp_path / "graph").mkdir()
    write_graph(tmp_path / "graph" / "model.onnx", {})
    answer = np.array(PROBE, np.float32)[..., None]
    np.save(tmp_path / "probe.npy", answer)
    check(tmp_path)
    np.save(tmp_path / "probe.npy", answer * 1.01)
    with pytest.raises(MELoRAError, match=r"its graph is off by .* of the largest logit"):
        check(tmp_path)


def test_the_rotary_base_stands_where_transformers_4_looks(tmp_path: Path) -> None:
    llama_config(64, 128, 2, 4, vocab_size=256).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    before = json.loads(path.read_text())
    assert "rope_theta" not in before, "otherwise this is no longer needed"
    _name_rope_theta(path)
    assert json.loads(path.read_text()) == before | {"rope_theta": before["rope_parameters"]["rope_theta"]}


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    said = end_to_end._why_no_mrpc(tmp_path)
    assert str(tmp_path / "mrpc" / "train.tsv") in said
    assert "--glue" in said
