"""Uses that once went wrong silently: each is now correct, or refused with an error that names it."""

import copy
import pickle

import numpy as np
import pytest
import torch
from support.models import (
    IN,
    OUT,
    TOWER_CONFIG,
    assert_equal,
    assert_unchanged,
    bert_classifier,
    fill,
    output_of,
    randn,
    rewritten_tower,
    tokens,
    tower,
)
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import melora_fx
from exporters import OrtRunner, TorchRunner, compare, export_onnx
from melora_fx import MELoRAConfig, MELoRAError

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

CONFIG = MELoRAConfig(rank=2, num_blocks=2)


class TiedLanguageModel(nn.Module):
    """Multiplies by the embedding's own weight for its output."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(IN, OUT)
        self.inner = nn.Linear(OUT, OUT)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(self.embedding(ids)) @ self.embedding.weight.T


class Owner(nn.Module):
    def __init__(self, forward) -> None:
        super().__init__()
        self.computes = forward
        self.w = nn.Parameter(randn(OUT, IN) / 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.computes(x, self.w)


@pytest.mark.parametrize(
    "form",
    [
        lambda x, w: F.linear(x, w) / w.norm(),
        lambda x, w: F.linear(x, w) + F.linear(x[:, ::2], w[:, ::2]),
        lambda x, w: F.linear(F.embedding(x.argmax(-1), w), w),
    ],
    ids=["norm", "columns", "embedding"],
)
def test_a_weight_with_another_use_is_refused(form) -> None:
    model = nn.ModuleDict({"a": Owner(form), "b": nn.Linear(IN, OUT)})
    with (
        assert_unchanged(model),
        pytest.raises(MELoRAError, match=r"`a\.w` cannot be adapted: its weight is also"),
    ):
        melora_fx.rewrite(model, "w", CONFIG)
    assert [site.name for site in melora_fx.match(model, "all-linear", CONFIG).sites] == ["b"]


def test_an_output_product_with_the_embedding_is_refused() -> None:
    ids = torch.arange(6).view(2, 3)
    model = TiedLanguageModel()
    with (
        assert_unchanged(model),
        pytest.raises(MELoRAError, match="`embedding` cannot be adapted: its weight is also used by `embedding`"),
    ):
        melora_fx.rewrite(model, ["embedding"], CONFIG, example_inputs=(ids,))
    model = melora_fx.rewrite(model, "all-linear", CONFIG, example_inputs=(ids,))  # it leaves out heads
    assert list(melora_fx.sites(fill(model))) == ["inner"]
    before = output_of(model, ids)
    torch.testing.assert_close(output_of(melora_fx.fold(model), ids), before, rtol=1e-4, atol=1e-4)


class Holder(nn.Module):
    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child
        self.layers = nn.ModuleList([nn.Linear(IN, IN, bias=False)])


class ReadsParameter(Holder):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.child.w.T


class CallsMethod(Holder):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.child.project(x)


class Subscript(Holder):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.layers[0].weight)


class Local(Holder):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layers = self.layers
        for layer in layers:
            x = F.linear(x, layer.weight)
        return x


class Projector(Owner):
    def project(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w)


@pytest.mark.parametrize(
    ("cls", "target"),
    [(ReadsParameter, "child.w"), (CallsMethod, "child.w"), (Subscript, "layers.0"), (Local, "layers.0")],
)
@pytest.mark.parametrize("whole", [False, True], ids=["in_place", "whole"])
def test_a_weight_read_past_its_module_has_its_adapter(cls: type[Holder], target: str, whole: bool) -> None:
    x = randn(3, IN)
    model = melora_fx.rewrite(cls(Projector(F.linear)), target, CONFIG, example_inputs=(x,) if whole else None)
    base = output_of(model, x)
    adapted = output_of(fill(model), x)
    assert not torch.allclose(adapted, base, atol=0.1)
    torch.testing.assert_close(output_of(melora_fx.fold(model), x), adapted, rtol=1e-4, atol=1e-4)


class TwoReaders(nn.Module):
    """The parent multiplies by the child's weight, and the child does too."""

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(randn(IN, IN) / 5)
        self.child = Owner(F.linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.child(x @ self.v) + x @ self.child.w.T


def test_a_weight_with_two_readers_has_its_adapter_for_both() -> None:
    x = randn(3, IN)
    model = fill(melora_fx.rewrite(TwoReaders(), ["v", "child.w"], CONFIG))
    adapted = output_of(model, x)
    torch.testing.assert_close(output_of(melora_fx.fold(model), x), adapted, rtol=1e-4, atol=1e-4)


def test_swapping_in_an_adapter_without_the_head_is_refused(tmp_path) -> None:
    with_head = melora_fx.rewrite(tower(), "up", TOWER_CONFIG, keep_trainable="head")
    melora_fx.save_adapter(with_head, tmp_path / "head")
    without = melora_fx.rewrite(tower(), "up", TOWER_CONFIG)
    melora_fx.save_adapter(without, tmp_path / "none")
    with assert_unchanged(with_head), pytest.raises(MELoRAError, match=r"lacks \['head.bias', 'head.weight'\]"):
        melora_fx.load_adapter(with_head, tmp_path / "none")
    with assert_unchanged(without), pytest.raises(MELoRAError, match=r"keeps \['head.bias', 'head.weight'\] trainable"):
        melora_fx.load_adapter(without, tmp_path / "head")


def test_disabled_inside_folded_is_refused() -> None:
    model = rewritten_tower()
    with (
        melora_fx.folded(model),
        pytest.raises(MELoRAError, match="`disabled` inside `folded`"),
        melora_fx.disabled(model),
    ):
        pass


def test_an_export_inside_disabled_is_the_base(tmp_path) -> None:
    model = rewritten_tower()
    inputs = {"x": randn(2, IN)}
    with melora_fx.disabled(model):
        report = export_onnx(model, inputs, tmp_path)
    assert report.adapter == "none"
    assert compare(OrtRunner(tmp_path / "model.onnx"), TorchRunner(tower()), inputs).max_rel_error <= 1e-5


@pytest.mark.parametrize("assign", [False, True], ids=["to_empty", "assign"])
def test_a_model_materialised_after_the_rewrite_has_its_scalings(assign: bool) -> None:
    source = rewritten_tower()
    with torch.device("meta"):
        model = melora_fx.rewrite(tower(), "all-linear", TOWER_CONFIG)
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict(), assign=assign)
    assert_equal(output_of(model, randn(2, IN)), output_of(source, randn(2, IN)))


def test_names_that_the_module_already_has_are_refused() -> None:
    model = nn.Sequential(nn.Linear(IN, OUT), nn.Linear(OUT, IN))
    model[1].lora_a = None
    with (
        assert_unchanged(model),
        pytest.raises(MELoRAError, match="`1` cannot be adapted: its module already has `lora_a`"),
    ):
        melora_fx.rewrite(model, "1", CONFIG)


class _ReadsPast(nn.Module):
    """Owns a matrix, and reads another module's from a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(randn(IN, IN, seed=3))
        self.fc = nn.Linear(IN, IN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.matrix), dict(self.named_parameters())["fc.weight"])


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_whose_root_runs_its_own_forward_is_watched_too(copied) -> None:
    model = copied(melora_fx.rewrite(_ReadsPast(), "all-linear", CONFIG))
    with pytest.raises(MELoRAError, match=r"`fc`: .*_ReadsPast\.forward"):
        model(randn(2, IN))


@pytest.mark.slow
def test_a_copy_of_a_compiled_capture_runs_itself() -> None:
    model = rewritten_tower(example_inputs=(randn(2, IN),))
    model.compile(backend="eager")
    copied = fill(copy.deepcopy(model), seed=9)
    assert not torch.allclose(output_of(copied, randn(3, IN)), output_of(model, randn(3, IN)), atol=1e-3)


@pytest.mark.parametrize("scale", [1e-4, 1.0])
def test_a_mode_that_is_more_than_dropout_is_refused_at_any_scale(scale: float) -> None:
    class Doubles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(IN, OUT)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * scale * (2 if self.training else 1)

    model = Doubles()
    with assert_unchanged(model), pytest.raises(MELoRAError, match="differs between train and eval mode"):
        melora_fx.rewrite(model, "inner", CONFIG, example_inputs=(randn(2, IN),))


def test_mixed_modes_are_refused_in_a_whole_capture() -> None:
    model = nn.Sequential(nn.Linear(IN, OUT), nn.BatchNorm1d(OUT)).train()
    model[1].eval()
    with assert_unchanged(model), pytest.raises(MELoRAError, match="not in the model's own mode"):
        melora_fx.rewrite(model, "0", CONFIG, example_inputs=(randn(4, IN),))


def test_a_whole_capture_does_not_count_the_models_buffers_on() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(IN, OUT)
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.steps.add_(1)
            return self.inner(x)

    model = Steps()
    melora_fx.match(model, "inner", CONFIG, example_inputs=(randn(2, IN),))
    assert float(model.steps) == 0


def test_momentum_beyond_a_swapped_rank_is_noticed(tmp_path) -> None:
    small = fill(melora_fx.rewrite(tower(), "up", MELoRAConfig(rank=1, num_blocks=2)))
    melora_fx.save_adapter(small, tmp_path / "small")
    model = fill(melora_fx.rewrite(tower(), "up", MELoRAConfig(rank=3, num_blocks=2)))
    optimizer = torch.optim.Adam(melora_fx.adapter_parameters(model).values(), lr=0.1)
    for step in range(2):
        if step:
            melora_fx.load_adapter(model, tmp_path / "small")
        model(randn(2, IN)).sum().backward()
        optimizer.step()
    with pytest.raises(MELoRAError, match=r"`up` holds values beyond its rank 1: .*make a new optimizer"):
        melora_fx.save_adapter(model, tmp_path / "after")


def test_a_diagonal_einsum_is_no_linear() -> None:
    model = nn.ModuleDict({"a": Owner(lambda x, w: torch.einsum("ii,oi->io", x, w)), "b": nn.Linear(IN, OUT)})
    assert [site.name for site in melora_fx.match(model, "all-linear", CONFIG).sites] == ["b"]


def test_one_module_in_two_places_is_one_site_in_both_captures() -> None:
    shared = nn.Linear(IN, IN)
    x = randn(2, IN)
    for example_inputs in (None, (x,)):
        model = melora_fx.rewrite(
            nn.Sequential(shared, nn.ReLU(), shared), "all-linear", CONFIG, example_inputs=example_inputs
        )
        assert list(melora_fx.sites(model)) == ["0"]
        before = output_of(fill(model), x)
        torch.testing.assert_close(output_of(melora_fx.fold(model), x), before, rtol=1e-4, atol=1e-4)


def test_a_model_with_nothing_to_adapt_is_not_frozen() -> None:
    model = nn.ModuleDict({"a": Owner(lambda x, w: F.linear(x, w) / w.norm())})
    with (
        assert_unchanged(model),
        pytest.raises(MELoRAError, match="no linear can be adapted"),
    ):
        melora_fx.rewrite(model, "all-linear", CONFIG)


def test_pruned_after_the_rewrite_is_not_folded() -> None:
    model = rewritten_tower()
    prune.l1_unstructured(model.up, "weight", 0.5)
    with pytest.raises(MELoRAError, match="`up`: its weight is pruned or parametrized"):
        melora_fx.fold(model)


@pytest.mark.default_cases("13")
@pytest.mark.parametrize("opset", [13, 99])
def test_an_opset_that_is_not_written_is_an_error(tmp_path, opset: int) -> None:
    with pytest.raises(MELoRAError, match=f"cannot write opset {opset}|cannot be exported"):
        export_onnx(tower(), {"x": randn(2, IN)}, tmp_path, opset=opset)


def test_a_graph_in_half_precision_is_refused_before_anything_is_written(tmp_path) -> None:
    captured = torch.export.export(tower().bfloat16(), (randn(2, IN, dtype=torch.bfloat16),)).module()
    with pytest.raises(MELoRAError, match=r"a graph that computes in bfloat16: capture `model\.float\(\)`"):
        export_onnx(captured, {"x": randn(2, IN)}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_output_named_like_an_input(tmp_path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(IN, OUT)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"x": self.inner(x)}

    report = export_onnx(Named(), {"x": randn(2, IN)}, tmp_path, verify=False)
    assert list(report.outputs) == ["x_output"]


@pytest.mark.slow
def test_the_adapter_of_a_whole_capture_names_the_models_class(tmp_path) -> None:
    model = melora_fx.rewrite(bert_classifier(), "query", MELoRAConfig(rank=2, num_blocks=3), example_inputs=tokens())
    melora_fx.save_adapter(model, tmp_path)
    assert melora_fx.saving.adapter_file.read_adapter(tmp_path).model["class"] == "BertForSequenceClassification"
    assert np.isfinite(output_of(model, tokens()).numpy()).all()
