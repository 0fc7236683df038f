"""The dry run: what it reports, that it changes nothing, and that it agrees with `rewrite`."""

from contextlib import nullcontext

import pytest
import torch
from support.models import (
    IN,
    OUT,
    TOWER_CONFIG,
    TOWER_SITES,
    Form,
    Holder,
    assert_unchanged,
    attempt,
    bert,
    fill,
    gpt2,
    randn,
    rewritten_tower,
    tokens,
    tower,
)
from torch import fx, nn
from torch.nn import functional as F

import melora_fx
from melora_fx import LinearSite, MELoRAConfig, MELoRAError

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def test_report_of_sites():
    report = melora_fx.match(tower(), ["up", "conv"], MELoRAConfig(rank=2, num_blocks=3))
    assert report.sites == (
        LinearSite("up", IN, OUT, "Linear", "weight", 2 * (IN + OUT)),
        LinearSite("conv", OUT, IN, "Conv1D", "weight", 2 * (IN + OUT)),
    )
    assert [site.name for site in report.untargeted] == ["gate", "own.projection", "head"]
    assert report.skipped == ()


@pytest.mark.parametrize(
    ("config", "count"),
    [
        pytest.param(MELoRAConfig(rank=2, num_blocks=3), 2 * (IN + OUT), id="one_rank"),
        pytest.param(MELoRAConfig(rank=2, num_blocks=1), 2 * (IN + OUT), id="one_block"),
        pytest.param(MELoRAConfig(rank=(1, 4), num_blocks=2), 5 * (IN + OUT) // 2, id="rank_list"),
        pytest.param(MELoRAConfig(rank=2, num_blocks=3, split=3), 2 * (3 * IN + OUT), id="split"),
    ],
)
def test_number_of_parameters_is_that_of_the_paper(config, count):
    (site,) = melora_fx.match(tower(), "up", config).sites
    assert site.num_parameters == count
    model = fill(melora_fx.rewrite(tower(), "up", config))
    trainable = [p for p in melora_fx.adapter_parameters(model).values() if p.requires_grad]
    assert sum(int((p != 0).sum()) for p in trainable) == count


def test_str_is_a_table():
    lines = str(melora_fx.match(tower(), ["up", "conv", "head"], MELoRAConfig(rank=2, num_blocks=4))).splitlines()
    assert lines[0].split() == ["site", "in", "out", "pattern", "lowering", "parameters"]
    assert lines[1].split() == ["up", "24", "36", "Linear", "weight", "120"]
    assert lines[2].split() == ["conv", "36", "24", "Conv1D", "weight", "120"]
    assert lines[3].split() == ["gate", "24", "36", "Linear", "-", "-"]
    assert lines[1].index("24") == lines[3].index("24"), "columns are aligned"
    assert "2 sites, 240 parameters; 2 untargeted (-), 1 skipped" in lines
    assert lines[-1].startswith("skipped head: `out_features` (=6) must be divisible by `num_blocks` (=4)")


def test_misfits_are_skipped_with_the_reason_not_raised():
    report = melora_fx.match(tower(), "all-linear", MELoRAConfig(num_blocks=8))
    assert [name for name, _ in report.skipped] == ["up", "gate", "own.projection", "conv", "head"]
    assert all("these would do: 1, 2, 3, 4, 6, 12" in reason for _, reason in report.skipped[:4])
    assert report.sites == ()


def test_what_cannot_be_captured_is_skipped_with_the_reason():
    model = nn.ModuleDict({"rnn": nn.GRU(IN, IN), "linear": nn.Linear(IN, IN)})
    report = melora_fx.match(model, ["linear", "weight_hh_l0"], MELoRAConfig(num_blocks=3))
    assert [site.name for site in report.sites] == ["linear"]
    assert [name for name, _ in report.skipped] == ["rnn.weight_hh_l0", "rnn.weight_ih_l0"]
    assert all(reason.startswith("`nn.GRU` passes its weights to one function") for _, reason in report.skipped)
    assert all("example_inputs" not in reason for _, reason in report.skipped)  # it would not help


@pytest.mark.default_cases("tower-*", "bert-in_place-train")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("whole", [False, True], ids=["in_place", "whole"])
@pytest.mark.parametrize("build", [tower, bert, gpt2], ids=["tower", "bert", "gpt2"])
def test_changes_nothing(build, whole, training):
    model = build().train(training)
    next(model.parameters()).requires_grad_(False)
    example_inputs = None
    if whole:
        example_inputs = (randn(2, IN),) if build is tower else {"input_ids": tokens()["input_ids"]}
    with assert_unchanged(model):
        report = melora_fx.match(model, "all-linear", TOWER_CONFIG, example_inputs=example_inputs)
    assert report.sites


def test_changes_no_statistics_and_no_random_state():
    model = nn.Sequential(nn.Linear(IN, OUT), nn.BatchNorm1d(OUT), nn.Dropout(0.5)).train()
    with assert_unchanged(model):
        melora_fx.match(model, "all-linear", TOWER_CONFIG)
        melora_fx.match(model, "all-linear", TOWER_CONFIG, example_inputs=(randn(3, IN),))


class Remembers(nn.Module):
    """Its forward counts its calls, and keeps values in its containers."""

    def __init__(self, held: list[int]) -> None:
        super().__init__()
        self.up = nn.Linear(IN, OUT)
        self.register_buffer("steps", torch.zeros(()))
        self.calls = 0
        self.held = held
        self.lengths: dict[str, list[int]] = {"x": []}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps.add_(1)
        self.calls += 1
        self.held.append(self.calls)
        self.lengths["x"].append(x.dim())
        return self.up(x)


@pytest.mark.parametrize("whole", [False, True], ids=["in_place", "whole"])
def test_changes_nothing_that_a_forward_keeps(whole):
    held = [7]
    model = Remembers(held)
    told = pytest.warns(UserWarning, match="keeps `calls`, `held`, `lengths` from call to call")
    with assert_unchanged(model, also=[held]), told if whole else nullcontext():
        melora_fx.match(model, "up", TOWER_CONFIG, example_inputs=(randn(3, IN),) if whole else None)


def test_changes_nothing_of_a_graph_module_or_program():
    traced = fx.symbolic_trace(tower())
    code = traced.code
    with assert_unchanged(traced):
        melora_fx.match(traced, "all-linear", TOWER_CONFIG)
    assert traced.code == code
    program = torch.export.export(tower(), (randn(2, IN),), strict=False)
    nodes = str(program.graph)
    report = melora_fx.match(program, "all-linear", TOWER_CONFIG)
    assert str(program.graph) == nodes
    assert [site.name for site in report.sites] == list(TOWER_SITES)


@pytest.mark.parametrize("example_inputs", [None, (randn(2, IN),)], ids=["in_place", "whole"])
def test_says_what_rewrite_does(example_inputs):
    report = melora_fx.match(tower(), ["up", "own.projection"], TOWER_CONFIG, example_inputs=example_inputs)
    model = melora_fx.rewrite(tower(), ["up", "own.projection"], TOWER_CONFIG, example_inputs=example_inputs)
    described = [
        LinearSite(s.name, s.in_features, s.out_features, s.pattern, s.lowering, s.lora_a.numel() + s.lora_b.numel())
        for s in melora_fx.sites(model).values()
    ]
    assert list(report.sites) == described


@pytest.mark.parametrize("function", [melora_fx.match, melora_fx.rewrite], ids=["match", "rewrite"])
def test_rewritten_model_is_refused(function):
    model = rewritten_tower()
    with assert_unchanged(model), pytest.raises(MELoRAError, match=r"already rewritten \(5 modules, the first `up`\)"):
        function(model, "up", TOWER_CONFIG)


@pytest.mark.parametrize("function", [melora_fx.match, melora_fx.rewrite], ids=["match", "rewrite"])
def test_compiled_model_is_refused(function):
    model = torch.compile(tower(), backend="eager")
    with (
        assert_unchanged(model),
        pytest.raises(MELoRAError, match=r"already compiled.*`rewrite` it first, then call `torch\.compile`"),
    ):
        function(model, "up", TOWER_CONFIG)


@pytest.mark.parametrize("function", [melora_fx.match, melora_fx.rewrite], ids=["match", "rewrite"])
def test_model_compiled_in_place_is_refused_or_compiled_anew(function):
    """`nn.Module.compile` keeps the object; code compiled before the rewrite must not be used after it."""
    model = tower()
    model.compile(backend="eager")
    x = randn(2, IN)
    model(x)
    result, refusal = attempt(function, model, "up", TOWER_CONFIG)
    if result is None:
        assert "compiled" in refusal
        return
    if function is melora_fx.rewrite:
        fill(model)
        reference = fill(melora_fx.rewrite(tower(), "up", TOWER_CONFIG))
        torch.testing.assert_close(model(x), reference(x), rtol=0, atol=0)


def test_model_rewritten_in_a_part_is_refused():
    model = nn.ModuleDict({"a": tower(), "b": tower()})
    melora_fx.rewrite(model["b"], "up", TOWER_CONFIG)
    with (
        assert_unchanged(model),
        pytest.raises(MELoRAError, match=r"already rewritten \(1 modules, the first `b\.up`\)"),
    ):
        melora_fx.rewrite(model, "up", TOWER_CONFIG)


def test_every_obstacle_of_a_linear_is_told():
    model = Holder(Form(lambda x, w, b: F.linear(x, w) @ w + w.sum()))
    ((name, reason),) = melora_fx.match(model, "all-linear", TOWER_CONFIG).skipped
    assert name == "inner"
    assert "also used by `sum`" in reason
    assert "; the graph multiplies by this weight and by its transpose" in reason


def test_hugging_face_model_with_part_left_out():
    report = melora_fx.match(bert(), {"*.0.*": None, "query": TOWER_CONFIG}, TOWER_CONFIG)
    assert [site.name for site in report.sites] == ["encoder.layer.1.attention.self.query"]
    assert len(report.untargeted) == 12
