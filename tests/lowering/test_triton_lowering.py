"""Models in the lowering "triton" against plain nodes, "activation", and the dense update in float64."""

import ast
import copy
import functools
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.coarse import Coarse
from support.interpreter import DEVICE
from support.models import IN, OUT, TOLERANCE, Holder, dense_update, fill, randn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers.pytorch_utils import Conv1D

import melora_fx
from melora_fx import MELoRAConfig, MELoRAError
from melora_fx.adapter.tensors import slices_of
from melora_fx.lowering import by_triton, lowerings, triton_kernels

CONFIGS = {
    "n1_r1": MELoRAConfig(rank=1, num_blocks=1, alpha=1.0),
    "n1_r20": MELoRAConfig(rank=20, num_blocks=1, alpha=20.0),
    "n2_r3": MELoRAConfig(rank=3, num_blocks=2, alpha=3.0),
    "n3_r20": MELoRAConfig(rank=20, num_blocks=3, alpha=10.0),
    "n3_ranks_alphas": MELoRAConfig(rank=(1, 4, 2), num_blocks=3, alpha=(1.0, 0.5, 4.0)),
    "split_3": MELoRAConfig(rank=3, num_blocks=3, alpha=3.0, split=3),
    "split_sizes_ranks": MELoRAConfig(rank=(1, 5), num_blocks=2, alpha=(2.0, 5.0), split=(12, 24)),
}
CONFIG = CONFIGS["n3_ranks_alphas"]
LEADING = {"vector": (), "one": (1,), "matrix": (3,), "batch": (2, 5), "tokens": (70,), "none": (2, 0)}
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects the kernels that are launched, in order."""
    made: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(triton_kernels, name)

        def launch(*args: Any, **options: Any) -> Any:
            made.append(name)
            return original(*args, **options)

        return launch

    for name in ("accumulate", "reduce"):
        monkeypatch.setattr(triton_kernels, name, counted(name))
    return made


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "tiles_for", lambda *_: triton_kernels.Tiles(16, 16, 16, 4, 2))
    monkeypatch.setattr(triton_kernels, "MAX_RANK", 16)


def adapted(
    lowering: str, config: MELoRAConfig = CONFIG, *, dtype: torch.dtype = torch.float32, bias: bool = True
) -> nn.Module:
    """Returns one linear with a filled adapter, with the same values for each lowering."""
    torch.manual_seed(4)
    model = Holder(nn.Linear(IN, OUT, bias=bias).to(DEVICE, dtype))
    return fill(melora_fx.rewrite(model, "inner", replace(config, lowering=lowering)))


def given(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return randn(*shape, seed=seed, dtype=dtype).to(DEVICE)


def step(model: Callable[..., Tensor], x: Tensor, upstream: Tensor | None = None, owner: Any = None) -> list[Tensor]:
    """Returns the output, and the gradients of x, A and B; `owner` has A and B if `model` does not."""
    inner = (owner or model).inner
    x = x.detach().requires_grad_()
    output = model(x)
    upstream = given(*output.shape, seed=9, dtype=output.dtype) if upstream is None else upstream
    return [output.detach(), *torch.autograd.grad(output, [x, inner.lora_a, inner.lora_b], upstream)]


def dense_step(model: nn.Module, x: Tensor, upstream: Tensor | None = None) -> list[Tensor]:
    """Returns the same in float64, from W + Δ."""
    (site,) = melora_fx.sites(model).values()
    leaves = [t.detach().double().requires_grad_() for t in (x, site.lora_a, site.lora_b)]
    bias = getattr(site.owner, "bias", None)
    weight = site.weight.detach().double() + dense_update(site.config, *leaves[1:])
    output = F.linear(leaves[0], weight, None if bias is None else bias.detach().double())
    upstream = given(*output.shape, seed=9) if upstream is None else upstream
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream.double())]


def assert_sums_near(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype, factor: float = 1.0) -> None:
    """Checks equality up to the rounding of sums, relative to the largest value: terms may exceed their sum."""
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        largest = float(other.abs().max()) if other.numel() else 0.0
        bound = factor * TOLERANCE[dtype]["rtol"] * max(1.0, largest)
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=bound)


@pytest.mark.default_cases("split_sizes_ranks-bias", "n2_r3-no_bias")
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_output_and_gradients_are_those_of_plain_nodes_and_of_the_dense_update(config, bias, launches):
    model = adapted("triton", config, bias=bias)
    plain = adapted("plain", config, bias=bias)
    for leading in LEADING.values():
        x = given(*leading, IN)
        launches.clear()
        found = step(model, x)
        assert launches
        assert found[0].is_contiguous()
        assert_sums_near(found, dense_step(model, x), torch.float32)
        assert_sums_near(found, step(plain, x), torch.float32)


@pytest.mark.parametrize("config", [CONFIGS["n1_r20"], CONFIGS["split_sizes_ranks"]], ids=["one_part", "parts"])
def test_each_step_launches_one_kernel_forward_and_four_backward_for_each_part(config, launches):
    model = adapted("triton", config)
    parts = len(config.parts(OUT))
    x = given(70, IN).requires_grad_()
    output = model(x)
    assert launches == ["accumulate"] * parts
    output.sum().backward()
    assert launches[parts:] == ["accumulate", "accumulate", "reduce", "reduce"] * parts


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
@pytest.mark.parametrize("config", [CONFIGS["n3_r20"], CONFIGS["split_sizes_ranks"]], ids=["n3_r20", "split"])
def test_sixteen_bits(config, dtype, launches):
    model = adapted("triton", config, dtype=dtype)
    x = given(70, IN, dtype=dtype)
    found = step(model, x)
    assert bool(launches) is (DEVICE == "cuda" or dtype == torch.float16)  # the interpreter has no bfloat16
    assert [t.dtype for t in found] == [dtype, dtype, torch.float32, torch.float32]
    assert_sums_near(found, dense_step(model, x), dtype, 2)  # h or g is rounded, and then the product


def test_float64_is_left_to_torch(launches):
    x = given(70, IN, dtype=torch.float64)
    found, expected = (step(adapted(lowering, dtype=torch.float64), x) for lowering in ("triton", "activation"))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert not launches


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("config", [CONFIG, CONFIGS["split_sizes_ranks"]], ids=["one_part", "parts"])
def test_dropout_drops_what_activation_drops(config, dtype, launches):
    x = given(2, 35, IN, dtype=dtype)
    steps = []
    for lowering in ("triton", "activation"):
        model = adapted(lowering, replace(config, dropout=0.5), dtype=dtype).train()
        torch.manual_seed(3)
        steps.append(step(model, x))
    assert launches
    assert_sums_near(*steps, dtype)
    assert not torch.allclose(steps[0][0], model.eval()(x))


STRIDED = {
    "swapped_tokens": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every_second": lambda t: torch.stack([t, -t], -1)[..., 0],
    "expanded": lambda t: t[:, :1].expand(t.shape),
    "one_value": lambda t: t[:1, :1, :1].expand(t.shape),
    "features_first": lambda t: t.mT.contiguous().mT,
}


@pytest.mark.default_cases("expanded")
@pytest.mark.parametrize("strided", STRIDED.values(), ids=STRIDED)
def test_input_and_gradient_of_any_strides(strided, launches):
    for config in (CONFIG, CONFIGS["split_3"]):
        model = adapted("triton", config)
        x, upstream = strided(given(4, 18, IN)), strided(given(4, 18, OUT, seed=9))
        assert not x.is_contiguous()
        assert not upstream.is_contiguous()
        assert_sums_near(step(model, x, upstream), dense_step(model, x, upstream), torch.float32)
        assert launches


@pytest.mark.parametrize("wanted", [["x"], ["lora_a"], ["lora_b"], ["lora_a", "lora_b"]], ids=str)
def test_gradients_that_are_not_wanted(wanted, launches):
    model = adapted("triton")
    x = given(70, IN)
    tensors = {"x": x, "lora_a": model.inner.lora_a, "lora_b": model.inner.lora_b}
    expected = dict(zip(tensors, dense_step(model, x)[1:], strict=True))
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in wanted)
    output = model(x)
    output.backward(given(*output.shape, seed=9))
    assert launches
    for name, tensor in tensors.items():
        assert (tensor.grad is not None) is (name in wanted)
        if tensor.grad is not None:
            assert_sums_near([tensor.grad], [expected[name]], torch.float32)


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_weight_of_other_strides(transposed, launches):
    found = []
    for lowering in ("triton", "plain"):
        torch.manual_seed(4)
        inner = Conv1D(OUT, IN) if transposed else nn.Linear(IN, OUT)
        if not transposed:
            inner.weight.data = inner.weight.data.t().contiguous().t()
        model = fill(melora_fx.rewrite(Holder(inner.to(DEVICE)), "inner", replace(CONFIG, lowering=lowering)))
        found.append(step(model, given(70, IN)))
    assert launches
    assert_sums_near(*found, torch.float32)


def test_gradient_of_zeros_that_are_not_written_down(launches):
    model = adapted("triton")
    x = given(70, IN).requires_grad_()
    output = model(x)
    launches.clear()
    upstream = torch._efficientzerotensor((70, OUT), device=DEVICE)
    found = torch.autograd.grad(output, [x, model.inner.lora_a, model.inner.lora_b], upstream)
    assert not any(gradient.any() for gradient in found)
    assert not launches


def test_operands_on_several_devices_are_left_to_torch():
    x = slices_of(given(70, IN), 3)
    lora_a, scaled = given(3, 2, 8), given(3, 12, 2)
    columns = slices_of(given(70, OUT), 3)
    assert by_triton.fits(x, [(columns, lora_a, scaled)])
    assert not by_triton.fits(x, [(columns, lora_a.to("meta"), scaled)])


def test_without_gradients(launches):
    model = adapted("triton")
    x = given(70, IN)
    expected = [dense_step(model, x)[0]]
    for mode in (torch.no_grad, torch.inference_mode):
        launches.clear()
        with mode():
            assert_sums_near([model(x)], expected, torch.float32)
        assert launches == ["accumulate"]


def test_autocast_computes_as_a_half_base_does(launches):
    model, half = adapted("triton"), adapted("triton", dtype=torch.float16)
    with torch.no_grad():
        model.inner.weight.copy_(half.inner.weight), model.inner.bias.copy_(half.inner.bias)
    x = given(70, IN, dtype=torch.float16)

    def run(x: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.float16):
            return model(x)

    found = step(run, x.float(), given(70, OUT, seed=9, dtype=torch.float16), owner=model)
    assert launches
    assert found[0].dtype == torch.float16
    expected = step(half, x)
    assert_sums_near(found, expected, torch.float16)


def test_base_that_is_no_plain_tensor(launches):
    found = []
    for lowering in ("triton", "activation"):
        model = adapted(lowering)
        model.inner.weight = nn.Parameter(model.inner.weight.detach().as_subclass(Coarse), requires_grad=False)
        found.append(step(model, given(70, IN)))
    assert launches
    assert_sums_near(*found, torch.float32)


def test_derivatives_of_gradients_are_those_of_plain_nodes(launches):
    """Kernels have no derivatives: a backward pass that is differentiated uses torch's products."""
    found = []
    for lowering in ("triton", "plain"):
        model = adapted(lowering)
        x = given(7, IN).requires_grad_()
        output = model(x).square().sum()
        launches.clear()
        (first,) = torch.autograd.grad(output, x, create_graph=True)
        assert not launches
        inner = model.inner
        found.append(torch.autograd.grad((first * given(7, IN, seed=5)).sum(), [inner.lora_a, inner.lora_b]))
    assert_sums_near(list(found[0]), list(found[1]), torch.float32, 10)  # sums of sums


@pytest.mark.parametrize("lowering", ["triton", "activation"])
def test_the_bases_product_kept_by_a_checkpoint_is_not_added_to_twice(lowering):
    """Both lowerings add to it in place, so torch refuses to use it again."""
    kept = [torch.ops.aten.addmm.default, torch.ops.aten.mm.default]
    contexts = functools.partial(create_selective_checkpoint_contexts, kept)
    model = adapted(lowering)
    output = checkpoint(model, given(7, IN).requires_grad_(), use_reentrant=False, context_fn=contexts)
    with pytest.raises(RuntimeError, match="has been mutated"):
        output.sum().backward()


def test_batches_of_gradients():
    model = adapted("triton")
    x = given(7, IN).requires_grad_()
    output = model(x)
    upstream = given(3, 7, OUT, seed=9)
    leaves = [x, model.inner.lora_a, model.inner.lora_b]
    together = torch.autograd.grad(output, leaves, upstream, is_grads_batched=True, retain_graph=True)
    for index, single in enumerate(upstream):
        one = torch.autograd.grad(output, leaves, single, retain_graph=True)
        assert_sums_near([each[index] for each in together], list(one), torch.float32)


def test_compiled(launches):
    model = adapted("triton", replace(CONFIG, split=3))
    x = given(70, IN)
    expected = step(model, x)
    launches.clear()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = step(run, x, owner=model)
    assert len(launches) == 3 * 5
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    torch._dynamo.reset()


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_copies_disabled_and_folded(make_copy, launches):
    model = adapted("triton")
    x = given(70, IN)
    output = model(x).detach()
    copied = make_copy(model)
    launches.clear()
    assert torch.equal(copied(x), output)
    assert launches == ["accumulate"]
    launches.clear()
    with melora_fx.disabled(copied):
        assert torch.equal(copied(x), F.linear(x, copied.inner.weight, copied.inner.bias))
    assert not launches
    assert_sums_near([melora_fx.fold(copied)(x)], [output], torch.float32)


def test_saved_and_loaded(tmp_path, launches):
    model = adapted("triton")
    x = given(70, IN)
    melora_fx.save_adapter(model, tmp_path)
    torch.manual_seed(4)
    loaded = melora_fx.load_adapter(Holder(nn.Linear(IN, OUT).to(DEVICE)), tmp_path)
    assert melora_fx.sites(loaded)["inner"].lowering == "triton"
    assert torch.equal(loaded(x), model(x))
    assert launches == ["accumulate"] * 2


def test_untrained_output_is_that_of_the_base_bit_for_bit(launches):
    for dtype in (torch.float32, *HALF.values()):
        model = adapted("triton", dtype=dtype)
        model.inner.lora_b.detach().zero_()
        x = given(70, IN, dtype=dtype)
        assert torch.equal(model(x), F.linear(x, model.inner.weight, model.inner.bias))
    assert launches


def test_it_is_taken_by_name_only():
    model = Holder(nn.Linear(IN, OUT).to(DEVICE, torch.bfloat16))
    for lowering, expected in (("auto", "activation"), ("triton", "triton")):
        report = melora_fx.match(model, "inner", replace(CONFIG, lowering=lowering))
        assert report.sites[0].lowering == expected
        assert f" {expected} " in str(report)
    assert [lowering.name for lowering in lowerings.LOWERINGS if not lowering.is_automatic] == ["triton"]


@pytest.mark.skipif(DEVICE == "cuda", reason="on CUDA the kernels are compiled")
def test_on_a_cpu_without_the_interpreter_it_computes_as_activation(launches, monkeypatch):
    monkeypatch.setattr(triton_kernels, "IS_INTERPRETED", False)
    model, other = adapted("triton"), adapted("activation")
    x = given(70, IN)
    assert all(torch.equal(*pair) for pair in zip(step(model, x), step(other, x), strict=True))
    assert model.to("meta")(x.to("meta")).shape == (70, OUT)
    assert not launches


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch):
    """Simulates that the package is not installed."""
    by_triton.is_installed.cache_clear()
    monkeypatch.delattr("melora_fx.lowering.triton_kernels")
    monkeypatch.setitem(sys.modules, "melora_fx.lowering.triton_kernels", None)
    yield
    by_triton.is_installed.cache_clear()


@pytest.mark.usefixtures("without_triton")
def test_without_the_package_cuda_alone_is_refused_with_the_remedy(launches):
    model = Holder(nn.Linear(IN, OUT))
    x = randn(70, IN)
    expected = model(x)
    melora_fx.rewrite(model, "inner", replace(CONFIG, lowering="triton"))
    assert torch.equal(model(x), expected)
    assert not launches
    on_cuda: Any = SimpleNamespace(nodes=[], weight=SimpleNamespace(is_cuda=True))
    text = "`lowering` (='triton') needs the package triton on CUDA: `pip install triton`, or use 'auto'"
    assert lowerings.lowering_named("triton").misfit(on_cuda) == text
    with pytest.raises(MELoRAError) as caught:
        by_triton.kernels()
    assert str(caught.value) == text


def test_the_kernels_are_imported_where_they_are_needed():
    """Not when a module is imported: `import melora_fx` needs no triton."""
    for path in Path(melora_fx.__file__).parent.rglob("*.py"):
        if path.name != "triton_kernels.py":
            top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
            assert not any(
                "triton_kernels" in ast.unparse(node) or "import triton" in ast.unparse(node) for node in top
            )
