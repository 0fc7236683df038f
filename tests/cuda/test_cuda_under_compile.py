"""Under `torch.compile`: a step equals eager mode's, no graph breaks or is compiled twice, CUDA graphs replay it."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from support.cuda import (
    DEVICE,
    IS_DRY_RUN,
    ON_CUDA,
    assert_all_near,
    assert_same,
    assert_sums_near,
    by_lowering,
    to_device,
)
from support.expert_stacks import TARGETS, mixtral
from support.lowered import CONFIG, DROPOUT, JIT_IS_DEPRECATED, MANY, lowered, seeded, step
from support.models import IN, OUT, bert, fill, output_of, randn, tokens
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import melora_fx
from melora_fx import MELoRAConfig

pytestmark = [*ON_CUDA, JIT_IS_DEPRECATED]

BACKEND = "aot_eager" if IS_DRY_RUN else "inductor"


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, OUT), nn.GELU(), nn.Linear(OUT, IN, bias=False)).to(DEVICE)


def x_of(seed: int = 1) -> Tensor:
    return randn(*MANY, IN, seed=seed).to(DEVICE)


def compiled(model: nn.Module) -> Callable[..., Tensor]:
    return torch.compile(model, backend=BACKEND, fullgraph=True)


def by_graphs(model: nn.Module) -> Callable[..., Tensor]:
    """Compiles a model into CUDA graphs, whose outputs the next call overwrites; in a dry run, only compiles it."""
    if IS_DRY_RUN:
        run = torch.compile(model, backend=BACKEND, fullgraph=True)
    else:
        run = torch.compile(model, mode="reduce-overhead", fullgraph=True)

    def call(*args: Tensor, **inputs: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        output = run(*args, **inputs)
        return (output if isinstance(output, Tensor) else output[0]).clone()

    return call


@by_lowering("auto")
def test_a_step_is_that_of_eager_mode(lowering):
    model = lowered(mlp, lowering)
    assert_all_near(step(model, x_of(), compiled(model)), [each.double() for each in step(model, x_of())], 3)


def test_steps_are_compiled_once():
    model = lowered(mlp).train()
    counter = CompileCounterWithBackend(BACKEND)
    run = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = torch.optim.AdamW(melora_fx.adapter_parameters(model).values())
    for seed in range(3):
        run(x_of(seed)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counter.frame_count == 1


def test_dropout_in_forward_and_backward_is_the_same():
    """The adapter is linear in its input: x · (gradient of x, minus the base's) is the sum of its output."""
    model = lowered(lambda: mlp()[:1], config=DROPOUT).train()
    run = compiled(model)
    x = x_of().requires_grad_()
    output = run(x)
    (of_x,) = torch.autograd.grad(output.sum(), x)
    with torch.no_grad():
        update = output - nn.functional.linear(x, model[0].weight, model[0].bias)
        by_gradient = (of_x - model[0].weight.sum(0)) * x
        assert abs(float(by_gradient.sum() - update.sum())) < 1e-5 * float(update.abs().sum())
        assert not torch.equal(run(x), output)


def test_dropout_is_seeded():
    model = lowered(mlp, config=DROPOUT).train()
    run = compiled(model)
    assert_same(seeded(run, x_of()), seeded(run, x_of()))


def test_autocast():
    dtype = torch.bfloat16
    model = lowered(mlp)
    context = torch.autocast(DEVICE, dtype)
    found = step(model, x_of(), context(compiled(model)))
    expected = step(model, x_of(), context(model))
    assert_all_near([each.to(dtype) for each in found], [each.double() for each in expected], 4)


def test_disabled_runs_the_base():
    model = lowered(mlp)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    adapted = output_of(run, x_of())
    with melora_fx.disabled(model):
        assert_same(output_of(run, x_of()), output_of(mlp(), x_of()))
    assert_same(output_of(run, x_of()), adapted)


def test_nothing_breaks_the_graph_of_a_hugging_face_model():
    model = fill(melora_fx.rewrite(bert(num_layers=1).to(DEVICE), "all-linear", CONFIG))
    counter = CompileCounterWithBackend(BACKEND)
    run = torch.compile(model, backend=counter, fullgraph=True)
    given = to_device(tokens())
    for seed in range(2):
        fill(model, seed)
        assert_sums_near(output_of(run, given), output_of(model, given).double(), 10)
    assert counter.frame_count == 1


@by_lowering("auto", "plain")
def test_cuda_graphs_replay_a_step(lowering):
    model = lowered(mlp, lowering)
    run = by_graphs(model)
    for seed in range(4):  # warm-up, capture, replays; with other values in the adapter and in x
        fill(model, seed)
        assert_all_near(step(model, x_of(seed), run), [each.double() for each in step(model, x_of(seed))], 3)


def test_cuda_graphs_leave_dropout_out():
    model = lowered(mlp, config=DROPOUT).train()
    run = by_graphs(model)
    outputs = []
    for _ in range(4):
        output = run(x_of())
        output.square().mean().backward()
        outputs.append(output.detach())
    assert len({float(output.sum()) for output in outputs}) == 4


def test_cuda_graphs_leave_grouped_experts_out():
    given = to_device({"input_ids": tokens(3, 7)["input_ids"]})
    config = MELoRAConfig(rank=2, num_blocks=2)
    model = melora_fx.rewrite(mixtral("grouped_mm").to(DEVICE), TARGETS, config, example_inputs=given)
    fill(model)
    run = by_graphs(model)
    with torch.no_grad():
        for _ in range(3):
            assert_sums_near(run(**given), output_of(model, given).double(), 10)


def test_values_exchanged_in_place_are_those_that_a_cuda_graph_uses(tmp_path):
    model = lowered(mlp)
    melora_fx.save_adapter(fill(model, 7), tmp_path)
    expected = output_of(model, x_of())
    fill(model, 8)
    run = by_graphs(model)
    with torch.no_grad():
        for _ in range(3):
            run(x_of())
        melora_fx.load_adapter(model, tmp_path)
        assert_sums_near(run(x_of()), expected.double(), 3)


def test_ranks_of_blocks_are_compiled_too():
    config = replace(CONFIG, rank=(1, 4, 2), split=(12, 24))
    model = fill(melora_fx.rewrite(mlp(), {"0": config, "2": None}))
    assert_all_near(step(model, x_of(), compiled(model)), [each.double() for each in step(model, x_of())], 3)
