"""Which lowering a site gets, and that the graph, the code and the copies are those of the plain nodes."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from support.lowered import (
    CONFIG,
    DROPOUT,
    LOWERINGS,
    MANY,
    adapter_gradients,
    assert_close,
    linear,
    lowered,
    num_calls,
    step,
)
from support.models import (
    IN,
    OUT,
    Form,
    Holder,
    assert_equal,
    assert_near,
    assert_unchanged,
    by_torch_save,
    dense_copy,
    fill,
    output_of,
    randn,
    tower,
)
from torch import Tensor, fx, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import melora_fx
from melora_fx import MELoRAConfig, config
from melora_fx.lowering import lowerings

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


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


def test_a_configuration_can_name_every_lowering():
    assert set(config.LOWERINGS) == {"auto", *(lowering.shown_as for lowering in lowerings.LOWERINGS)}


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
    with pytest.raises(ValueError, match=r"`dropout` \(=0.1\) excludes `lowering` 'weight': use 'activation' or"):
        MELoRAConfig(dropout=0.1, lowering="weight")


@pytest.mark.parametrize("config", [CONFIG, DROPOUT], ids=["weight", "activation"])
def test_graph_and_code_are_those_of_the_plain_lowering(tower_case, config):
    options = {"example_inputs": (tower_case.inputs,)} if tower_case.captured else {}
    models = [lowered(tower, lowering, config, **options) for lowering in ("auto", "plain")]
    for ours, theirs in zip(*(melora_fx.sites(model).values() for model in models), strict=True):
        assert ours.lowering != theirs.lowering
        assert ours.code == theirs.code
        assert "adapted_linear" not in ours.code
        if isinstance(ours.module, fx.GraphModule):
            assert str(ours.module.graph) == str(theirs.module.graph)
            assert not any("adapted_linear" in str(node.target) for node in ours.module.graph.nodes)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch_save": by_torch_save,
    "deepcopy_of_pickled": lambda model: copy.deepcopy(pickle.loads(pickle.dumps(model))),
}


@pytest.mark.default_cases("tower-in_place-*-deepcopy", "tower-whole-weight-*", "tower-in_place-drop-*")
@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize(
    "config", [CONFIG, DROPOUT, replace(CONFIG, lowering="plain")], ids=["weight", "drop", "plain"]
)
def test_copies_keep_the_lowering(tower_case, config, make_copy, calls):
    options = {"example_inputs": (tower_case.inputs,)} if tower_case.captured else {}
    model = lowered(tower, config.lowering, config, **options)
    x = randn(*MANY, IN)
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
    model = lowered(tower, config=config, **options)
    x = randn(*MANY, IN)
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


@pytest.mark.default_cases("activation-eager", "weight-*")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_disabled_between_forward_and_backward_is_allowed(lowering, compiled):
    model = lowered(tower, lowering)
    x = randn(*MANY, IN)
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
