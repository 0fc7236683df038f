"""Three captures of one model: the same sites, the same bits; modes, shapes and inputs that they must respect."""

import copy

import pytest
import torch
from support.models import (
    IN,
    OUT,
    TOWER_CONFIG,
    TOWER_SITES,
    Form,
    Holder,
    Tower,
    adapted_weight,
    assert_equal,
    assert_near,
    assert_unchanged,
    attempt,
    bert,
    dense_copy,
    fill,
    gpt2,
    output_of,
    randn,
    tokens,
    tower,
)
from support.zoo import SelfAttention
from torch import fx, nn
from torch.nn import functional as F

import melora_fx
from melora_fx import MELoRAConfig, MELoRAError

CONFIG = MELoRAConfig(rank=2, num_blocks=3, alpha=3.0)


def whole(model: nn.Module, example_inputs, targets="all-linear", config=CONFIG) -> nn.Module:
    return melora_fx.rewrite(model, targets, config, example_inputs=example_inputs)


def symbolic(model, x):
    return melora_fx.rewrite(fx.symbolic_trace(model), "all-linear", TOWER_CONFIG)


def program(model, x):
    shapes = (dict.fromkeys(range(x.dim()), torch.export.Dim.AUTO),)
    exported = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=False)
    return melora_fx.rewrite(exported, "all-linear", TOWER_CONFIG)


def program_module(model, x):
    shapes = (dict.fromkeys(range(x.dim()), torch.export.Dim.AUTO),)
    exported = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=False)
    return melora_fx.rewrite(exported.module(), "all-linear", TOWER_CONFIG)


CAPTURES = {
    "in_place": lambda model, x: melora_fx.rewrite(model, "all-linear", TOWER_CONFIG),
    "example_inputs": lambda model, x: melora_fx.rewrite(model, "all-linear", TOWER_CONFIG, example_inputs=(x,)),
    "symbolic_trace": symbolic,
    "exported_program": program,
    "exported_module": program_module,
}


@pytest.mark.parametrize("capture", CAPTURES.values(), ids=CAPTURES)
def test_captures_agree(capture):
    x = randn(2, 5, IN)
    plain = tower()
    model = capture(tower(), x)
    assert set(melora_fx.sites(model)) == set(TOWER_SITES)
    assert_equal(output_of(model, x), output_of(plain, x))
    fill(model)
    reference = fill(melora_fx.rewrite(tower(), "all-linear", TOWER_CONFIG))
    assert_equal(output_of(model, x), output_of(reference, x))
    assert_near(output_of(model, x), output_of(dense_copy(model, plain), x.double()))
    if capture is not CAPTURES["in_place"]:
        assert isinstance(model, fx.GraphModule)
    folded = melora_fx.fold(model)
    assert set(folded.state_dict()) == set(plain.state_dict())
    assert_near(output_of(folded, x), output_of(dense_copy(reference, plain), x.double()))


def test_graph_module_given_is_changed_in_place():
    traced = fx.symbolic_trace(tower())
    assert melora_fx.rewrite(traced, "up", CONFIG) is traced


def test_example_inputs_leave_the_model_as_a_plain_one_with_shared_parameters():
    model = tower()
    types = {name: type(module) for name, module in model.named_modules()}
    captured = whole(model, (randn(2, IN),))
    assert {name: type(module) for name, module in model.named_modules()} == types
    assert melora_fx.sites(model) == {}
    shared = dict(model.named_parameters())
    for name, parameter in captured.named_parameters():
        if ".lora_" not in name and "_lora_" not in name:
            assert parameter is shared[name]


@pytest.mark.default_cases("bert")
@pytest.mark.parametrize("build", [bert, gpt2], ids=["bert", "gpt2"])
def test_hugging_face_captures_agree_bit_for_bit(build):
    inputs = tokens(2, 5)
    config = MELoRAConfig(rank=2, num_blocks=3, alpha=3.0)
    plain = build()
    in_place = melora_fx.rewrite(build(), "all-linear", config)
    captured = whole(build(), inputs, config=config)
    assert list(melora_fx.sites(in_place)) == list(melora_fx.sites(captured))
    other = tokens(3, 7, seed=5)
    assert_equal(output_of(in_place, other), output_of(plain, other))
    assert_equal(output_of(captured, other), output_of(plain, other))
    fill(in_place), fill(captured)
    assert_equal(output_of(captured, other), output_of(in_place, other))
    assert_near(output_of(in_place, other).double().float(), output_of(dense_copy(in_place, plain), other))
    assert type(captured(**other)) is type(plain(**other))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left = nn.Linear(IN, OUT)
        self.right = nn.Linear(IN, OUT, bias=False)

    def forward(self, a, b, scale=1.0):
        return scale * self.left(a) + self.right(b)


@pytest.mark.parametrize("as_dict", [False, True], ids=["tuple", "dict"])
def test_example_inputs_as_tuple_and_dict(as_dict):
    model = TwoInputs()
    a = randn(2, IN)
    b = randn(2, IN, seed=2)
    expected = model(a, b)
    captured = whole(model, {"a": a, "b": b} if as_dict else (a, b))
    assert_equal(captured(a=a, b=b) if as_dict else captured(a, b), expected)


def test_example_inputs_as_a_list_are_positional():
    model = TwoInputs()
    a = randn(2, IN)
    b = randn(2, IN, seed=2)
    assert_equal(whole(model, [a, b])(a, b), model(a, b))


@pytest.mark.parametrize("value", [randn(2, IN), 3, "x"], ids=["tensor", "int", "str"])
def test_example_inputs_of_another_type(value):
    model = tower()
    with (
        assert_unchanged(model),
        pytest.raises(TypeError, match="`example_inputs` must be a dict of keyword or a tuple of positional"),
    ):
        whole(model, value)


def test_batch_of_one_is_doubled_so_that_the_batch_stays_free():
    plain = tower()
    captured = whole(tower(), (randn(1, 5, IN),))
    for shape in ((1, 5), (4, 5), (2, 9)):
        x = randn(*shape, IN)
        assert_equal(output_of(captured, x), output_of(plain, x))


def test_batch_of_one_that_wants_a_gradient():
    plain = nn.Sequential(nn.Linear(IN, OUT)).requires_grad_(False)
    x = randn(1, IN).requires_grad_()
    captured = whole(copy.deepcopy(plain), (x,))
    assert_equal(captured(x), plain(x))


@pytest.mark.slow
def test_batch_of_one_of_a_hugging_face_model():
    plain = bert()
    captured = whole(bert(), tokens(1, 5), targets="query")
    for batch, length in ((1, 5), (3, 5), (2, 8)):
        inputs = tokens(batch, length)
        assert_equal(output_of(captured, inputs), output_of(plain, inputs))


def test_size_that_the_model_freezes_is_named():
    class FixedLength(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(IN, OUT)
            self.position = nn.Parameter(torch.zeros(5, IN))

        def forward(self, tokens):
            return self.linear(tokens + self.position)

    captured = whole(FixedLength(), (randn(2, 5, IN),))
    assert captured(randn(3, 5, IN)).shape == (3, 5, OUT)
    with pytest.raises(MELoRAError, match=r"`tokens` has shape \(2, 4, 24\), .* for \(any, 5, 24\).*capture again"):
        captured(randn(2, 4, IN))
    with pytest.raises(MELoRAError, match=r"`tokens` has shape \(5, 24\)"):
        captured(tokens=randn(5, IN))


def test_numbers_that_are_computed_from_a_length_are_checked():
    class Rounded(nn.Linear):
        def forward(self, x):
            return super().forward(x) * int(0.5 * x.size(1)) + int(x.size(1) ** 0.5)

    plain = Rounded(IN, OUT).requires_grad_(False)
    captured = whole(copy.deepcopy(plain), (randn(2, 4, IN),))
    x = randn(2, 5, IN)
    assert_equal(captured(x), plain(x))
    with pytest.raises(MELoRAError, match=r"float\(x\.shape\[1\]\).*; here `x` has shape \(2, 9, 24\)"):
        captured(randn(2, 9, IN))


def test_model_that_cannot_be_exported():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(IN, OUT)

        def forward(self, x):
            return self.linear(x) if x.sum() > 0 else self.linear(-x)

    model = Branches()
    with assert_unchanged(model), pytest.raises(MELoRAError, match="cannot capture `Branches`"):
        whole(model, (randn(2, IN),))


def test_wrong_example_inputs_are_an_error_of_the_capture():
    model = tower()
    with assert_unchanged(model), pytest.raises(MELoRAError, match="do not fit the model's forward"):
        whole(model, {"nonsense": randn(2, IN)})


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_capture_takes_and_keeps_the_mode(training):
    model = tower(dropout=0.5).train(training)
    model.norm.training = not training  # one child has its own mode
    before = {name: module.training for name, module in model.named_modules()}
    captured = whole(model, (randn(2, IN),))
    assert {name: module.training for name, module in model.named_modules()} == before
    assert captured.training is training


def test_dropout_follows_the_mode():
    x = randn(3, IN)
    plain = tower(dropout=0.5)
    model = whole(tower(dropout=0.5), (x,))
    for _ in range(2):
        model.train()
        assert not torch.equal(output_of(model, x), output_of(model, x))
        model.eval()
        assert_equal(output_of(model, x), output_of(plain, x))


@pytest.mark.slow
def test_dropout_and_attention_dropout_follow_the_mode():
    inputs = tokens(2, 6)
    plain = bert()
    model = fill(whole(bert(), tokens(), targets="query"))
    reference = fill(melora_fx.rewrite(bert(), "query", CONFIG))
    model.train(), reference.train()
    torch.manual_seed(7)
    first = output_of(model, inputs)
    assert not torch.equal(output_of(model, inputs), first)
    torch.manual_seed(7)
    assert_equal(output_of(reference, inputs), first)  # the same calls of dropout in the same order
    model.eval()
    with melora_fx.disabled(model):
        assert_equal(output_of(model, inputs), output_of(plain, inputs))


class ModeModule(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(IN, OUT)
        self.inner = inner

    def forward(self, x):
        return self.inner(self.linear(x))


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: nn.Dropout(0.5), id="dropout"),
        pytest.param(lambda: nn.Dropout1d(0.5), id="dropout1d"),
        pytest.param(lambda: nn.AlphaDropout(0.5), id="alpha_dropout"),
        pytest.param(lambda: nn.FeatureAlphaDropout(0.5), id="feature_alpha_dropout"),
        pytest.param(lambda: nn.RReLU(), id="rrelu"),
        pytest.param(lambda: nn.BatchNorm1d(5), id="batch_norm"),
    ],
)
def test_module_that_differs_between_the_modes_is_right_in_eval(build):
    """Bit-equal to the eager module in eval mode and different in train mode, or refused; never silently incorrect."""
    x = randn(3, 5, IN)
    model = ModeModule(build()).eval()
    expected = output_of(model, x)
    captured, refusal = attempt(whole, copy.deepcopy(model), (x,))
    if captured is None:
        assert "train" in refusal
        return
    assert_equal(output_of(captured.eval(), x), expected)
    assert not torch.equal(output_of(captured.train(), x), expected)
    assert_equal(output_of(captured.eval(), x).shape, expected.shape)


def test_forward_that_branches_on_the_mode_is_right_in_eval_or_refused():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(IN, OUT)

        def forward(self, x):
            return self.linear(x) + (100.0 if self.training else 0.0)

    x = randn(3, IN)
    model = Noisy().eval()
    expected = output_of(model, x)
    captured, refusal = attempt(whole, copy.deepcopy(model), (x,))
    if captured is None:
        assert "train" in refusal
        return
    assert_equal(output_of(captured.eval(), x), expected)
    assert_equal(output_of(captured.train(), x), output_of(model.train(), x))


def test_batch_norm_keeps_its_statistics_in_eval_and_moves_them_in_train():
    x = randn(7, IN)
    model = nn.Sequential(nn.Linear(IN, OUT), nn.BatchNorm1d(OUT), nn.Linear(OUT, IN))
    plain = copy.deepcopy(model)
    captured = whole(model, (x,))
    base = {name: value.clone() for name, value in captured.state_dict().items()}
    assert_equal({name: base[name] for name in plain.state_dict()}, dict(plain.state_dict()))
    captured.eval()
    assert_equal(output_of(captured, x), output_of(plain.eval(), x))
    assert_equal(dict(captured.state_dict()), base)
    captured.train()
    assert_equal(output_of(captured, x), output_of(plain.train(), x))
    assert_equal({name: captured.state_dict()[name] for name in plain.state_dict()}, dict(plain.state_dict()))


def test_batch_norm_that_is_used_twice_counts_in_train_only():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(IN, IN)
            self.norm = nn.BatchNorm1d(IN)

        def forward(self, x):
            return self.norm(torch.tanh(self.norm(self.linear(x))))

    plain = Twice().requires_grad_(False)
    captured = whole(copy.deepcopy(plain), (randn(7, IN),))
    for training in (True, False, True):
        x = randn(5, IN)
        assert_equal(captured.train(training)(x), plain.train(training)(x))
    assert int(plain.norm.num_batches_tracked) == int(captured.norm.num_batches_tracked) == 4


def test_attention_that_never_calls_its_projection_is_refused_by_name():
    model = Holder(nn.MultiheadAttention(IN, 2))
    for target in ("out_proj", "in_proj_weight"):
        with assert_unchanged(model), pytest.raises(MELoRAError, match=rf"`inner\.{target}`.*`example_inputs=`"):
            melora_fx.rewrite(model, target, CONFIG)


def test_attention_in_a_whole_capture():
    x = randn(2, 5, IN)
    plain = SelfAttention().eval()
    with torch.no_grad():
        plain.attention.in_proj_bias.normal_()
    model = whole(
        copy.deepcopy(plain), (x,), {"in_proj_weight": MELoRAConfig(2, 3, alpha=4.0, split=3), "out_proj": CONFIG}
    )
    assert list(melora_fx.sites(model)) == ["attention.in_proj_weight", "attention.out_proj"]
    torch.testing.assert_close(output_of(model, x), output_of(plain, x))  # eager eval mode takes its fused fast path
    fill(model)
    reference = dense_copy(model, plain).train()  # train mode without dropout: the path that is not fused
    assert_near(output_of(model, x), output_of(reference, x.double()))


def test_adapter_on_a_transformer_encoder_layer_works_or_is_refused_in_eval():
    """Its fast path reads `linear1.weight` directly and would skip the adapter."""
    plain = nn.TransformerEncoderLayer(IN, 2, OUT, batch_first=True, dropout=0.0).eval()
    model = Holder(copy.deepcopy(plain))
    rewritten, refusal = attempt(melora_fx.rewrite, model, "linear1", CONFIG)
    if rewritten is None:
        assert "`inner.linear1`" in refusal
        return
    fill(model)
    x = randn(2, 5, IN)
    reference = copy.deepcopy(plain).double()
    with torch.no_grad():
        reference.linear1.weight.copy_(adapted_weight(melora_fx.sites(model)["inner.linear1"]))
    assert_near(output_of(model.eval(), x), output_of(reference.train(), x.double()))


def test_recurrent_weights_are_refused_by_name():
    model = nn.ModuleDict({"rnn": nn.GRU(IN, IN), "linear": nn.Linear(IN, IN)})
    with assert_unchanged(model), pytest.raises(MELoRAError, match=r"`rnn\.weight_ih_l0` cannot be adapted"):
        melora_fx.rewrite(model, "weight_ih_l0", CONFIG)


def test_replaced_forward_is_refused():
    model = tower()
    original = model.up.forward
    model.up.forward = lambda x: original(x)
    with assert_unchanged(model), pytest.raises(MELoRAError, match=r"`up`.*`forward` was replaced on the instance"):
        melora_fx.rewrite(model, "up", CONFIG)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda self, x: F.linear(x, self.weight) * (2 if self.training else 1), id="mode"),
        pytest.param(
            lambda self, x: F.linear(x, self.weight) if x.sum() > 0 else F.linear(-x, self.weight), id="control_flow"
        ),
    ],
)
def test_forward_that_a_trace_would_decide_decides_itself(function):
    model = Holder(type("Owner", (nn.Linear,), {"forward": function})(IN, OUT))
    melora_fx.rewrite(model, "inner", CONFIG)
    plain = melora_fx.fold(copy.deepcopy(fill(model)))
    for training in (True, False):
        for x in (randn(3, IN).abs(), -randn(3, IN).abs()):
            expected = output_of(plain.train(training), x)
            torch.testing.assert_close(output_of(model.train(training), x), expected, rtol=1e-4, atol=1e-4)


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(randn(OUT, IN))

    def forward(self, x, mask=None):
        return F.linear(x if mask is None else x * mask, self.weight)


def test_optional_argument_is_given_or_not():
    model = nn.ModuleDict({"inner": Optional()})
    melora_fx.rewrite(model, "inner", CONFIG)
    plain = melora_fx.fold(copy.deepcopy(fill(model)))["inner"]
    x = randn(2, IN)
    for mask in (None, randn(2, IN, seed=5)):
        torch.testing.assert_close(model["inner"](x, mask), plain(x, mask), rtol=1e-4, atol=1e-4)
    captured = Holder(Optional())
    assert_equal(output_of(whole(captured, (x,)), x), output_of(captured, x))


def test_default_argument_of_a_traced_forward_is_kept():
    class Scaled(nn.Linear):
        def forward(self, x, scale=2.0):
            return scale * super().forward(x)

    model = nn.ModuleDict({"inner": Scaled(IN, OUT)})
    x = randn(2, IN)
    expected = model["inner"](x)
    other = model["inner"](x, scale=3.0)
    melora_fx.rewrite(model, "inner", CONFIG)
    assert_equal(model["inner"](x), expected)
    assert_equal(model["inner"](x, scale=3.0), other)


def test_module_used_in_two_places_is_one_site():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(IN, IN)
            self.second = self.first

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    x = randn(3, IN)
    model = melora_fx.rewrite(Twice(), "all-linear", CONFIG)
    (site,) = melora_fx.sites(fill(model)).values()
    weight = adapted_weight(site)
    bias = site.owner.bias.detach().double()
    expected = torch.tanh(x.double() @ weight.T + bias) @ weight.T + bias
    assert_near(output_of(model, x), expected)
    assert_near(output_of(melora_fx.fold(model), x), expected)
    assert model.first is model.second


def test_module_given_as_the_root_itself():
    model = nn.Linear(IN, OUT)
    x = randn(3, IN)
    base = output_of(model, x)
    assert melora_fx.rewrite(model, "all-linear", CONFIG) is model
    (site,) = melora_fx.sites(model).values()
    assert_equal(output_of(model, x), base)
    fill(model)
    expected = x.double() @ adapted_weight(site).T + model.bias.detach().double()
    assert_near(output_of(model, x), expected)
    assert_near(output_of(melora_fx.fold(model), x), expected)
    assert type(model) is nn.Linear


def test_many_equal_modules_do_not_share_what_they_compute():
    """They share code; each module keeps its own values."""
    model = nn.Sequential(*[nn.Linear(IN, IN) for _ in range(3)], Form(lambda x, w, b: x @ w.T), nn.Linear(OUT, IN))
    x = randn(2, IN)
    plain = copy.deepcopy(model)
    fill(melora_fx.rewrite(model, "all-linear", CONFIG))
    assert_near(output_of(model, x), output_of(dense_copy(model, plain), x.double()))


@pytest.mark.slow
def test_whole_capture_keeps_config_for_save_and_generation_code():
    model = bert()
    config = whole(model, tokens(), targets="query").config
    assert config.to_dict() == model.config.to_dict()
    assert config is not model.config, "untying the capture must not change the model"


@pytest.mark.slow
def test_use_cache_is_put_back():
    model = gpt2()
    assert model.config.use_cache is True
    whole(model, {"input_ids": tokens()["input_ids"]}, targets="c_attn")
    assert model.config.use_cache is True


def test_tower_in_train_mode_is_traced_like_in_eval():
    assert list(melora_fx.sites(melora_fx.rewrite(Tower().train(), "all-linear", CONFIG))) == list(TOWER_SITES)


class Kept(nn.Module):
    """A child with buffers that its forward assigns to."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.linear = nn.Linear(IN, OUT)
        self.register_buffer("mean", torch.zeros((), dtype=dtype))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        y = self.linear(x)
        self.calls = self.calls + 1
        y = y * (1 + self.mean)
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean()
        return y - self.mean


@pytest.mark.parametrize("make", [Kept, lambda: Holder(Kept())], ids=["of_the_model", "of_a_child"])
def test_buffers_that_a_forward_assigns_to_are_kept(make):
    plain = make().requires_grad_(False)
    captured = whole(copy.deepcopy(plain), (randn(2, IN),))
    for seed in range(3):
        x = randn(4, IN, seed=seed)
        y = captured(x)
        assert_equal(y, plain(x))
        y.sum().backward()  # needs the mean that was read
    assert_equal({name: captured.state_dict()[name] for name in plain.state_dict()}, dict(plain.state_dict()))
    assert any(int(buffer) == 3 for name, buffer in captured.named_buffers() if name.endswith("calls"))


def test_a_buffer_that_would_become_another_one_is_refused():
    model = Holder(Kept(torch.float16))
    with assert_unchanged(model), pytest.raises(MELoRAError, match=r"assigns .*float32 to the buffer `inner\.mean`"):
        whole(model, (randn(2, IN),))


def test_regions_of_inference_mode_have_no_gradient():
    class Frozen(nn.Linear):
        def forward(self, x):
            with torch.inference_mode():
                y = super().forward(x)
            return y.clone()

    enter = torch.inference_mode.__enter__
    model = nn.Sequential(nn.Linear(IN, IN), Frozen(IN, OUT))
    captured = fill(whole(model, (randn(2, IN),), "0"))
    assert torch.inference_mode.__enter__ is enter
    assert not captured(randn(2, IN)).requires_grad


def test_random_numbers_of_a_forward_are_neither_compared_nor_used_up():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x) * torch.rand(x.shape[0], 1)

    plain = Holder(Noisy(IN, OUT)).requires_grad_(False)
    before = torch.get_rng_state()
    captured = whole(copy.deepcopy(plain), (randn(2, IN),))
    x = randn(3, IN)
    torch.set_rng_state(before)
    expected = plain(x)
    torch.set_rng_state(before)
    assert_equal(captured(x), expected)


def test_a_forward_that_catches_an_error_of_an_operator_is_refused():
    class Tries(nn.Linear):
        def forward(self, x):
            try:
                return F.linear(x[:, 1:], self.weight)
            except RuntimeError:
                return F.linear(x, self.weight)

    model = Holder(Tries(IN, OUT))
    with (
        assert_unchanged(model),
        pytest.raises(MELoRAError, match="`Holder` cannot be captured whole: its graph raises"),
    ):
        whole(model, (randn(2, IN),))


def test_a_product_that_nobody_uses_beside_one_that_is_used():
    class Overwritten(nn.Linear):
        def forward(self, x):
            for _ in range(3):
                y = super().forward(x)
                x = x / 2
            return y

    x = randn(2, IN)
    plain = Holder(Overwritten(IN, OUT))
    captured = fill(whole(copy.deepcopy(plain), (x,)))
    assert_near(output_of(captured, x), output_of(dense_copy(captured, plain), x.double()))
