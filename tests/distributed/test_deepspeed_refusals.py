"""Refusals if DeepSpeed has the parameters, which its attributes show; tested without DeepSpeed.

`test_deepspeed.py` runs DeepSpeed itself.
"""

import enum
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.models import assert_unchanged
from support.sharded import adapted, llama
from support.training import rewritten, trainer_of
from torch import nn

import melora_fx
from melora_fx import AdapterCheckpointCallback, MELoRAConfig, MELoRAError
from melora_fx.names import unwrap

situation = pytest.mark.situation


class _Status(enum.Enum):
    """Like DeepSpeed's ZeroParamStatus."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2


def _partition(model: nn.Module, status: _Status = _Status.NOT_AVAILABLE) -> nn.Module:
    """Changes parameters as ZeRO-3 does: sets `ds_id` and `ds_status`, and removes the values if not available."""
    for index, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_status = index, status  # type: ignore[attr-defined]
        if status is _Status.NOT_AVAILABLE:
            parameter.data = torch.empty(0)
    return model


class DeepSpeedEngine(nn.Module):
    """Recognised by its name and package, like DeepSpeed's own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


DeepSpeedEngine.__module__ = "deepspeed.runtime.engine"


def _enter(manager: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
    return lambda model: manager(model).__enter__()


READING: dict[str, Callable[[Any], Any]] = {
    "sites": melora_fx.sites,
    "check_fold": melora_fx.check_fold,
    "save_adapter": lambda model: melora_fx.save_adapter(model, "adapter"),
}
WRITING: dict[str, Callable[[Any], Any]] = {
    "fold": melora_fx.fold,
    "folded": _enter(melora_fx.folded),
    "unload": melora_fx.unload,
}


@pytest.fixture
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    melora_fx.save_adapter(adapted(), "another")
    yield
    assert [each.name for each in tmp_path.iterdir()] == ["another"]


@pytest.mark.usefixtures("_in_a_folder")
@situation("DeepSpeed", "ZeRO-3: `sites`, `check_fold`, `save_adapter`", "refused; remedy: `GatheredParameters`")
def test_parameters_that_are_elsewhere() -> None:
    model: Any = _partition(adapted())
    for name, verb in READING.items():
        with pytest.raises(
            MELoRAError, match=rf"`{name}`: ZeRO-3 has partitioned .*`model\.embed_.*GatheredParameters"
        ):
            verb(DeepSpeedEngine(model))
    assert list(melora_fx.adapter_parameters(model).values()) == [p for p in model.parameters() if p.requires_grad]
    with melora_fx.disabled(model):
        assert all(not parameter.numel() for parameter in model.parameters())
    plain = _partition(llama())
    for verb in (melora_fx.rewrite, melora_fx.match, melora_fx.load_adapter):
        with assert_unchanged(plain), pytest.raises(MELoRAError, match="GatheredParameters"):
            verb(plain, "another" if verb is melora_fx.load_adapter else "all-linear")


@pytest.mark.usefixtures("_in_a_folder")
@pytest.mark.parametrize("status", _Status)
@situation("DeepSpeed", "ZeRO-3: `fold`, `folded`, `unload`", "refused: written values would be lost")
def test_nothing_is_written_into_partitioned_parameters(status: _Status) -> None:
    model = _partition(adapted(), status)
    for name, verb in WRITING.items():
        with assert_unchanged(model), pytest.raises(MELoRAError, match=rf"`{name}`: ZeRO-3 .* would lose what is wr"):
            verb(model)


@pytest.mark.usefixtures("_in_a_folder")
@situation(
    "DeepSpeed", "`load_adapter` after `deepspeed.initialize`", "refused: its optimizer would write its own copies back"
)
def test_load_adapter_beside_copies_in_an_optimizer() -> None:
    model = adapted()
    for parameter in melora_fx.adapter_parameters(model).values():
        parameter._hp_mapping = None  # type: ignore[attr-defined]  # as for a part of another process
    for given in (model, _partition(adapted(), _Status.AVAILABLE), DeepSpeedEngine(model)):
        with assert_unchanged(given), pytest.raises(MELoRAError, match=r"would write them back.* before `deepspeed\.i"):
            melora_fx.load_adapter(given, "another")


@situation("DeepSpeed", "`rewrite` after `deepspeed.initialize`", "refused with an error that names the wrapper")
def test_rewrite_of_an_engine() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        engine: Any = DeepSpeedEngine(llama())
        for model in (engine, engine.module, engine.module.model):
            for function in (melora_fx.rewrite, melora_fx.match):
                with assert_unchanged(model), pytest.raises(MELoRAError, match="is wrapped by DeepSpeedEngine"):
                    function(model, "all-linear")
    finally:
        dist.destroy_process_group()


@situation(
    "DeepSpeed", "`rewrite` after ZeRO-3 has replaced `F.linear`", "refused; remedy: turn off `memory_efficient_linear`"
)
def test_rewrite_where_linears_are_not_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    def replaced(x: Any, weight: Any, bias: Any = None) -> Any:
        raise AssertionError

    replaced.__module__ = "deepspeed.runtime.zero.linear"
    model = llama()
    monkeypatch.setattr(nn.functional, "linear", replaced)
    with assert_unchanged(model), pytest.raises(MELoRAError, match="`memory_efficient_linear` to false"):
        melora_fx.rewrite(model, "all-linear")


def test_verbs_on_an_engine_have_the_models_names(tmp_path: Path) -> None:
    model = adapted()
    engine = DeepSpeedEngine(model)
    assert unwrap(torch.compile(engine, backend="eager")) is model
    assert melora_fx.sites(engine).keys() == melora_fx.sites(model).keys()
    melora_fx.save_adapter(engine, tmp_path / "engine")
    melora_fx.save_adapter(model, tmp_path / "model")
    assert (tmp_path / "engine" / "adapter.safetensors").read_bytes() == (
        tmp_path / "model" / "adapter.safetensors"
    ).read_bytes()


def test_a_callback_under_zero_3_is_refused(tmp_path: Path) -> None:
    class Plugin:
        zero_stage = 3

    model = rewritten()
    trainer, _ = trainer_of(model, tmp_path)
    trainer.args.deepspeed_plugin = Plugin()
    with assert_unchanged(model), pytest.raises(MELoRAError, match="`AdapterCheckpointCallback`: ZeRO-3 leaves no"):
        AdapterCheckpointCallback().on_init_end(trainer.args, trainer.state, trainer.control, model=model)


def test_a_state_is_loaded_around_partitioned_parameters() -> None:
    model: Any = _partition(adapted())
    scalings = [buffer.clone() for name, buffer in model.named_buffers() if "scaling" in name]
    model.load_state_dict({}, strict=False)
    model.double()
    assert len(scalings) == 14
    for before, after in zip(
        scalings, [each for name, each in model.named_buffers() if "scaling" in name], strict=True
    ):
        assert torch.equal(before, after.float())


_REPLACED_LINEAR = """
import torch

class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias=None):
        ctx.save_for_backward(x, weight)
        return x.matmul(weight.t()) + (0 if bias is None else bias)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient.matmul(weight), None, None

def linear(x, weight, bias=None):
    return Function.apply(x, weight, bias)
"""


def test_a_replaced_linear_computes_for_who_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reader(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model
            self.kept = [model.weight]

        def forward(self, x: torch.Tensor, *, is_by_list: bool) -> torch.Tensor:
            return nn.functional.linear(x, self.kept[0]) if is_by_list else self.model(x)

    config = MELoRAConfig(rank=2, num_blocks=2, lowering="activation")
    model = melora_fx.rewrite(Reader(nn.Linear(8, 8, bias=False)), "model", config)
    namespace: dict[str, Any] = {"__name__": "deepspeed.runtime.zero.linear"}
    exec(_REPLACED_LINEAR, namespace)
    monkeypatch.setattr(nn.functional, "linear", namespace["linear"])
    x = torch.ones(2, 8, requires_grad=True)
    with pytest.raises(MELoRAError, match="did not read it from the module's attribute"):
        model(x, is_by_list=True)
    model(x, is_by_list=False).sum().backward()
    assert model.model.lora_b.grad.abs().sum() > 0
