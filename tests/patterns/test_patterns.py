"""Every way to write a linear is found and adapted; operations that only look like one are left unchanged."""

import warnings

import pytest
import torch
from support.linear_forms import BATCH_FORMS, LEADING, LEFT_FORMS, MATRIX_FORMS, ROW_FORMS, aten
from support.models import (
    IN,
    OUT,
    Form,
    Holder,
    adapted_weight,
    assert_equal,
    assert_near,
    assert_unchanged,
    attempt,
    fill,
    output_of,
    randn,
)
from torch import fx, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import melora_fx
from melora_fx import MELoRAConfig, MELoRAError

CONFIG = MELoRAConfig(rank=2, num_blocks=3, alpha=3.0)


def check(model: nn.Module, x: torch.Tensor, *, left: bool = False, config: MELoRAConfig = CONFIG) -> None:
    """Checks that the untrained model is bit-equal to the base, and the filled one near base plus ΔW x in float64."""
    base = output_of(model, x)
    rewritten = melora_fx.rewrite(model, "inner", config)
    (site,) = melora_fx.sites(rewritten).values()
    assert (site.name, site.in_features, site.out_features) == ("inner", IN, OUT)
    assert_equal(output_of(rewritten, x), base)
    fill(rewritten)
    update = adapted_weight(site) - (site.weight.t() if site.weight_is_transposed else site.weight).detach().double()
    delta = update @ x.double() if left else x.double() @ update.T
    assert float(delta.abs().max()) > 0.1
    assert_near(output_of(rewritten, x), base.double() + delta)


@pytest.mark.parametrize("leading", LEADING.values(), ids=LEADING)
@pytest.mark.parametrize(("options", "form"), ROW_FORMS.values(), ids=ROW_FORMS)
def test_input_times_weight(options, form, leading):
    check(Holder(Form(form, **options)), randn(*leading, IN))


@pytest.mark.parametrize(("options", "form"), MATRIX_FORMS.values(), ids=MATRIX_FORMS)
def test_matrix_times_weight(options, form):
    check(Holder(Form(form, **options)), randn(5, IN))


@pytest.mark.parametrize("whole", [False, True], ids=["in_place", "whole"])
@pytest.mark.parametrize(("options", "form"), BATCH_FORMS.values(), ids=BATCH_FORMS)
def test_batch_times_weight(options, form, whole):
    model = Holder(Form(form, **options))
    x = randn(2, 5, IN)
    check(melora_fx.whole_capture.whole_model.capture_whole(model, (x,)) if whole else model, x)


def test_rows_of_a_weight_for_different_inputs():
    """As in attention with a packed weight: q from one sequence, k and v from another."""

    class Cross(nn.Module):
        def __init__(self, cut):
            super().__init__()
            self.cut = cut
            self.weight = nn.Parameter(randn(OUT, IN, seed=11) / 5)

        def forward(self, pair):
            query, rest = self.cut(self.weight)
            return torch.cat([F.linear(pair[0], query), pair[1] @ rest.T], -1)

    cuts = {
        "split_with_sizes": lambda w: w.split([12, 24]),
        "slices": lambda w: (w[:12], w[12:]),
        "narrow": lambda w: (w.narrow(0, 0, 12), w.narrow(0, 12, 24)),
        "chunk": lambda w: (w.chunk(3)[0], w[12:]),
    }
    pair = randn(2, 5, IN)
    for name, cut in cuts.items():
        for config in (CONFIG, MELoRAConfig(rank=2, num_blocks=3, split=3)):
            plain = Holder(Cross(cut))
            base = output_of(plain, pair)
            model = melora_fx.rewrite(plain, "inner", config)
            (site,) = melora_fx.sites(model).values()
            assert_equal(output_of(model, pair), base)
            fill(model)
            update = adapted_weight(site) - site.weight.detach().double()
            query, rest = pair.double() @ update.T
            assert_near(output_of(model, pair), base.double() + torch.cat([query[..., :12], rest[..., 12:]], -1)), name


@pytest.mark.parametrize(("options", "form"), LEFT_FORMS.values(), ids=LEFT_FORMS)
def test_weight_times_matrix(options, form):
    check(Holder(Form(form, **options)), randn(IN, 5), left=True)


@pytest.mark.parametrize(
    "shape", [(IN,), (1, IN, 5), (2, IN, 5), (2, 3, IN, 4)], ids=["vector", "batch_of_1", "batch", "two_batches"]
)
def test_weight_times_other_dimensions(shape):
    """`weight @ x` is adapted correctly for x of any number of dimensions."""
    model = Holder(Form(lambda x, w, b: w @ x)).requires_grad_(False)  # torch uses another product for a trained w
    check(model, randn(*shape), left=True)


def test_weight_times_matrix_with_split():
    check(Holder(Form(lambda x, w, b: w @ x)), randn(IN, 5), left=True, config=MELoRAConfig(2, 3, split=(24, 12)))


def test_weight_times_batch_in_a_whole_capture():
    model = Holder(Form(lambda x, w, b: w @ x))
    x = randn(2, IN, 5)
    base = output_of(model, x)
    rewritten = fill(melora_fx.rewrite(model, "inner", CONFIG, example_inputs=(x,)))
    (site,) = melora_fx.sites(rewritten).values()
    update = adapted_weight(site) - site.weight.detach().double()
    assert_near(output_of(rewritten, x), base.double() + update @ x.double())


class Subclass(nn.Linear):
    """Keeps the forward."""


class Scaled(nn.Linear):
    """Has its own forward, which is still a linear of its weight."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("leading", LEADING.values(), ids=LEADING)
@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: nn.Linear(IN, OUT), id="linear"),
        pytest.param(lambda: nn.Linear(IN, OUT, bias=False), id="linear_no_bias"),
        pytest.param(lambda: Subclass(IN, OUT), id="subclass"),
    ],
)
def test_linear_modules(build, leading):
    check(Holder(build()), randn(*leading, IN))


@pytest.mark.parametrize("leading", [(3,), (2, 5)], ids=["matrix", "batch"])
def test_conv1d(leading):
    conv = Conv1D(OUT, IN)
    nn.init.normal_(conv.bias)
    check(Holder(conv), randn(*leading, IN))


def test_subclass_with_a_forward_of_its_own():
    model = Holder(Scaled(IN, OUT))
    x = randn(3, IN)
    base = output_of(model, x)
    fill(melora_fx.rewrite(model, "inner", CONFIG))
    site = melora_fx.sites(model)["inner"]
    update = adapted_weight(site) - site.weight.detach().double()
    assert_near(output_of(model, x), base.double() + 2 * x.double() @ update.T)


def test_weight_used_by_two_nodes_is_one_site():
    """Wx + W tanh(x): both products see the same ΔW."""
    model = Holder(Form(lambda x, w, b: F.linear(x, w) + torch.tanh(x) @ w.T))
    x = randn(3, IN)
    base = output_of(model, x)
    fill(melora_fx.rewrite(model, "inner", CONFIG))
    site = melora_fx.sites(model)["inner"]
    update = adapted_weight(site) - site.weight.detach().double()
    assert_near(output_of(model, x), base.double() + (x.double() + torch.tanh(x.double())) @ update.T)
    assert_near(output_of(melora_fx.fold(model), x), base.double() + (x.double() + torch.tanh(x.double())) @ update.T)


def test_weight_stored_one_way_and_used_both_ways():
    """An autoencoder with tied weights, Wᵀ tanh(W x), is correct or refused with an error that names it."""
    model = Holder(Form(lambda x, w, b: torch.tanh(F.linear(x, w)) @ w))
    x = randn(3, IN)
    plain = output_of(model, x)
    rewritten, refusal = attempt(melora_fx.rewrite, model, "inner", CONFIG)
    if rewritten is None:
        assert "`inner`" in refusal
        return
    assert_equal(output_of(rewritten, x), plain)
    fill(rewritten)
    weight = adapted_weight(melora_fx.sites(rewritten)["inner"])
    assert_near(output_of(rewritten, x), torch.tanh(x.double() @ weight.T) @ weight)


def test_narrow_input_to_a_wide_weight_that_the_forward_casts():
    """float32 weights, cast to the input's bfloat16 by the model itself."""
    model = Holder(Form(lambda x, w, b: F.linear(x, w.to(x.dtype), b.to(x.dtype))))
    x = randn(3, IN, dtype=torch.bfloat16)
    base = output_of(model, x)
    fill(melora_fx.rewrite(model, "inner", CONFIG))
    site = melora_fx.sites(model)["inner"]
    update = adapted_weight(site) - site.weight.detach().double()
    output = output_of(model, x)
    assert output.dtype == torch.bfloat16
    assert_near(output, base.double() + x.double() @ update.T)


@pytest.mark.parametrize(
    ("build", "pattern"),
    [
        pytest.param(lambda: nn.Linear(IN, OUT), "Linear", id="linear"),
        pytest.param(lambda: Conv1D(OUT, IN), "Conv1D", id="conv1d"),
        pytest.param(lambda: Form(lambda x, w, b: F.linear(x, w)), "F.linear", id="functional"),
        pytest.param(lambda: Form(lambda x, w, b: x @ w.T), "matmul", id="at"),
        pytest.param(lambda: Form(lambda x, w, b: torch.addmm(b, x, w.T)), "addmm", id="addmm"),
        pytest.param(lambda: Form(lambda x, w, b: torch.mm(x, w.T)), "mm", id="mm"),
        pytest.param(lambda: Form(lambda x, w, b: aten.mm.default(x, aten.t.default(w))), "aten.mm", id="aten_mm"),
    ],
)
def test_report_names_the_pattern(build, pattern):
    (site,) = melora_fx.match(Holder(build()), "inner", CONFIG).sites
    assert site.pattern == pattern


@pytest.mark.parametrize("decomposed", [False, True], ids=["training_ir", "core_aten"])
def test_exported_program_with_and_without_decompositions(decomposed):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(IN, OUT)
            self.b = nn.Linear(OUT, IN, bias=False)
            self.c = Conv1D(12, IN)

        def forward(self, x):
            return self.c(self.b(torch.tanh(self.a(x))))

    model = Both()
    x = randn(2, 5, IN)
    program = torch.export.export(model, (x,), strict=False)
    if decomposed:
        with warnings.catch_warnings():  # torch warns about its own deprecated class
            warnings.simplefilter("ignore", FutureWarning)
            program = program.run_decompositions()
    base = output_of(program.module(), x)
    rewritten = melora_fx.rewrite(program, "all-linear", CONFIG)
    assert list(melora_fx.sites(rewritten)) == ["a", "b", "c"]
    assert_equal(output_of(rewritten, x), base)
    fill(rewritten)
    a, b, c = (adapted_weight(site) for site in melora_fx.sites(rewritten).values())
    hidden = torch.tanh(x.double() @ a.T + model.a.bias.double()) @ b.T
    assert_near(output_of(rewritten, x), hidden @ c.T + model.c.bias.double())


def hand_written_graph(build) -> fx.GraphModule:
    """Returns a GraphModule whose nodes are not traced: build(graph, x, weight) returns the output node."""
    root = nn.Module()
    root.inner = nn.Module()
    root.inner.weight = nn.Parameter(randn(OUT, IN, seed=11))
    graph = fx.Graph()
    x = graph.placeholder("x")
    weight = graph.get_attr("inner.weight")
    graph.output(build(graph, x, weight))
    return fx.GraphModule(root, graph)


ATEN_GRAPHS = {
    "mm": lambda g, x, w: g.call_function(aten.mm.default, (x, g.call_function(aten.t.default, (w,)))),
    "mm_permute": lambda g, x, w: g.call_function(
        aten.mm.default, (x, g.call_function(aten.permute.default, (w, [1, 0])))
    ),
    "mm_transpose_clone": lambda g, x, w: g.call_function(
        aten.mm.default,
        (x, g.call_function(aten.clone.default, (g.call_function(aten.transpose.int, (w, 0, 1)),))),
    ),
    "matmul_keywords": lambda g, x, w: g.call_function(
        torch.matmul, (), {"input": x, "other": g.call_function(torch.t, (w,))}
    ),
    "linear": lambda g, x, w: g.call_function(aten.linear.default, (x, w)),
    "linear_keywords": lambda g, x, w: g.call_function(aten.linear.default, (), {"input": x, "weight": w}),
    "call_method": lambda g, x, w: g.call_method("matmul", (x, g.call_method("t", (w,)))),
}


@pytest.mark.parametrize("build", ATEN_GRAPHS.values(), ids=ATEN_GRAPHS)
def test_hand_written_graphs(build):
    check(hand_written_graph(build), randn(5, IN))


NOT_LINEAR = {
    "weight_is_scaled": lambda x, w, b: F.linear(x, w * 2),
    "weight_is_the_input": lambda x, w, b: F.linear(x, x),
    "elementwise": lambda x, w, b: x.unsqueeze(-2) * w,
    "sum_over_the_outputs": lambda x, w, b: torch.einsum("...i,oi->...", x, w),
    "weight_is_scrambled": lambda x, w, b: F.linear(x, w.T.reshape(OUT, IN)),
    "bias_only": lambda x, w, b: x.sum(-1, keepdim=True) + b + w.sum(),
}


@pytest.mark.parametrize("form", NOT_LINEAR.values(), ids=NOT_LINEAR)
def test_not_a_linear_node(form):
    model = nn.ModuleDict({"other": Form(form), "linear": nn.Linear(IN, OUT)})
    report = melora_fx.match(model, "all-linear", CONFIG)
    assert [site.name for site in report.sites] == ["linear"]
    with assert_unchanged(model), pytest.raises((ValueError, MELoRAError), match="`other`"):
        melora_fx.rewrite(model, "other", CONFIG)


def test_buffer_is_not_a_site():
    model = Form(lambda x, w, b: F.linear(x, w))
    weight = model.weight.data
    del model.weight
    model.register_buffer("weight", weight)
    holder = Holder(model)
    with assert_unchanged(holder), pytest.raises(ValueError, match="no linear nodes"):
        melora_fx.match(holder, "all-linear", CONFIG)


def test_embedding_and_convolution_are_not_sites():
    model = nn.ModuleDict({"e": nn.Embedding(OUT, IN), "c": nn.Conv2d(3, 3, 1), "l": nn.Linear(IN, OUT)})
    assert [site.name for site in melora_fx.match(model, "all-linear", CONFIG).sites] == ["l"]
