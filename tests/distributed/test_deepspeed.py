"""DeepSpeed's ZeRO trains a rewritten model as one process does: losses, adapters, verbs.

`test_deepspeed_refusals.py` tests what is refused under DeepSpeed, without DeepSpeed.
"""

import importlib.util
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import sharded, trl_runs
from support.models import bert_classifier, in_situations
from support.processes import free_port, run_processes
from support.sharded import CONFIG, adapted, averaged, fill, llama, own_rows, token_ids
from support.training import StopAt, rewritten, trainer_of
from torch import nn

import melora_fx
from melora_fx import AdapterCheckpointCallback, MELoRAError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed: pip install deepspeed"),
]
situation = pytest.mark.situation


def _prepare() -> Any:
    """Initialises DeepSpeed on the CPU, in a process of `run_processes`."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "CROSS_RANK": "0", "CROSS_SIZE": "1"}
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    return deepspeed


def _settings(stage: int, **options: Any) -> dict[str, Any]:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero | options,
    }


def _engine(model: nn.Module, settings: dict[str, Any]) -> Any:
    import deepspeed

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, eps=1e-3)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def _step(engine: Any, ids: torch.Tensor) -> float:
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    engine.step()
    return averaged([loss.item()])[0]


def _gathered(model: nn.Module) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(model.parameters()))


def _trained_by_zero(stage: int, options: dict[str, Any], folder: str) -> list[float]:
    _prepare()
    model, plain = adapted(), llama()
    alone = adapted()
    engine = _engine(model, _settings(stage, **options))
    ids = own_rows(token_ids())
    losses = [_step(engine, ids) for _ in range(3)]
    with torch.no_grad(), melora_fx.disabled(engine):
        torch.testing.assert_close(engine(input_ids=ids).logits, plain(input_ids=ids).logits)
    losses.append(_step(engine, ids))
    with _gathered(model) if stage == 3 else nullcontext():
        assert melora_fx.sites(engine).keys() == melora_fx.sites(alone).keys()
        melora_fx.check_fold(engine)
        if dist.get_rank() == 0:
            melora_fx.save_adapter(engine, folder)
    with pytest.raises(MELoRAError, match=r"`load_adapter`: DeepSpeed's optimizer"):
        melora_fx.load_adapter(engine, folder)
    for given in (engine, model):
        with pytest.raises(MELoRAError, match="is wrapped by DeepSpeedEngine"):
            melora_fx.rewrite(given, "all-linear")
    with torch.no_grad():
        trained = engine(input_ids=ids).logits
    if stage == 3:
        for verb in (melora_fx.fold, melora_fx.unload, melora_fx.sites):
            with pytest.raises(MELoRAError, match="ZeRO-3"):
                verb(engine)
        return losses
    with torch.no_grad():
        with melora_fx.folded(engine):
            torch.testing.assert_close(engine(input_ids=ids).logits, trained, atol=1e-5, rtol=0)
        melora_fx.fold(engine)
        torch.testing.assert_close(engine(input_ids=ids).logits, trained, atol=1e-5, rtol=0)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    return losses


@in_situations(
    "case",
    "DeepSpeed",
    "losses and adapter as in one process; `disabled` and `save_adapter` are correct",
    {f"ZeRO-{stage} in two processes": (stage, {}) for stage in (1, 2, 3)}
    | {"ZeRO-3 in two processes, `memory_efficient_linear` off": (3, {"memory_efficient_linear": False})},
)
def test_losses_of_one_process(case: tuple[int, dict[str, Any]], tmp_path: Path) -> None:
    alone = adapted()
    expected = sharded.train(alone, token_ids(), 4)
    for losses in run_processes(2, _trained_by_zero, *case, str(tmp_path)):
        assert losses == pytest.approx(expected, abs=1e-5)
    loaded = melora_fx.load_adapter(llama(), tmp_path)
    for name, value in melora_fx.adapter_parameters(loaded).items():
        torch.testing.assert_close(value, melora_fx.adapter_parameters(alone)[name], atol=1e-5, rtol=0)


def _made_in_parts(folder: str) -> list[float]:
    deepspeed = _prepare()
    settings = _settings(3, memory_efficient_linear=False)
    with deepspeed.zero.Init(config_dict_or_path=settings):
        model: Any = llama()
    with pytest.raises(MELoRAError, match="GatheredParameters"):
        melora_fx.rewrite(model, "all-linear", CONFIG)
    with _gathered(model):
        torch.save(model.state_dict(), f"{folder}/base-{dist.get_rank()}.pt")
        fill(melora_fx.rewrite(model, "all-linear", CONFIG))
    engine = _engine(model, settings)
    losses = [_step(engine, own_rows(token_ids())) for _ in range(3)]
    with _gathered(model):
        melora_fx.save_adapter(engine, f"{folder}/adapter-{dist.get_rank()}")
    with deepspeed.zero.Init(config_dict_or_path=settings):
        another: Any = llama()
    with _gathered(another):
        melora_fx.load_adapter(another, f"{folder}/adapter-{dist.get_rank()}")
    ids = own_rows(token_ids())
    with torch.no_grad():
        logits = _engine(another, settings)(input_ids=ids).logits
        torch.testing.assert_close(logits, engine(input_ids=ids).logits)
    return losses


@situation(
    "DeepSpeed", "ZeRO-3, a model made inside `zero.Init`", "`rewrite` inside `GatheredParameters`; as in one process"
)
def test_a_model_made_in_parts(tmp_path: Path) -> None:
    found = run_processes(2, _made_in_parts, str(tmp_path))
    base = torch.load(tmp_path / "base-0.pt")
    alone = llama()
    alone.load_state_dict(base)
    fill(melora_fx.rewrite(alone, "all-linear", CONFIG))
    expected = sharded.train(alone, token_ids())
    assert found == [pytest.approx(expected, abs=1e-5)] * 2
    plain = llama()
    plain.load_state_dict(base)
    loaded = melora_fx.load_adapter(plain, tmp_path / "adapter-1")
    for name, value in melora_fx.adapter_parameters(loaded).items():
        torch.testing.assert_close(value, melora_fx.adapter_parameters(alone)[name], atol=1e-5, rtol=0)


def _by_trainer(stage: int, folder: str) -> list[dict[int, float]]:
    _prepare()
    os.environ["MASTER_PORT"] = str(free_port())
    auto = dict.fromkeys(["train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"], "auto")
    zero = {"stage3_gather_16bit_weights_on_model_save": True}
    settings = _settings(stage, **zero) | auto | {"zero_force_ds_cpu_optimizer": False}
    callbacks = [AdapterCheckpointCallback] if stage < 3 else []
    options: dict[str, Any] = {"deepspeed": settings, "per_device_train_batch_size": 2}
    options["average_tokens_across_devices"] = False  # which would double the loss of any classifier
    models = [_without_dropout() for _ in range(2)]
    stopped, first = trainer_of(models[0], Path(folder), StopAt(3), *(make() for make in callbacks), **options)
    stopped.train()
    resumed, second = trainer_of(models[1], Path(folder), *(make() for make in callbacks), **options)
    resumed.train(resume_from_checkpoint=True)
    if stage == 3:
        with pytest.raises(MELoRAError, match="`AdapterCheckpointCallback`: ZeRO-3 leaves no"):
            trainer_of(models[1], Path(folder), AdapterCheckpointCallback(), **options)
    return [first.by_step, second.by_step]


def _without_dropout() -> Any:
    model = rewritten()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@in_situations(
    "stage",
    "DeepSpeed",
    "losses of an uninterrupted run in one process",
    {"a Trainer with ZeRO-2, resumed, `AdapterCheckpointCallback`": 2, "a Trainer with ZeRO-3, resumed": 3},
)
def test_a_trainer(stage: int, tmp_path: Path) -> None:
    trainer, expected = trainer_of(_without_dropout(), tmp_path / "alone", save_strategy="no")
    trainer.train()
    (first, second), _ = run_processes(2, _by_trainer, stage, str(tmp_path / "run"), timeout=200)
    assert list(first) == [1, 2, 3]
    assert list(second) == [4, 5, 6]
    assert first | second == pytest.approx(expected.by_step, abs=1e-4)
    if stage == 2:
        loaded = melora_fx.load_adapter(bert_classifier(), tmp_path / "run" / "checkpoint-6")
        for name, value in loaded.state_dict().items():
            torch.testing.assert_close(value, trainer.model.state_dict()[name], atol=1e-4, rtol=0)


def _preferred_by_zero(stage: int, folder: str) -> list[Any]:
    _prepare()
    os.environ["MASTER_PORT"] = str(free_port())
    auto = dict.fromkeys(["train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"], "auto")
    settings = _settings(stage) | auto | {"zero_force_ds_cpu_optimizer": False}
    model = trl_runs.base()
    reference = trl_runs.around_the_same_weights(model)
    options = {"deepspeed": settings, "per_device_train_batch_size": 2}
    trainer, logs = trl_runs.dpo_trainer(trl_runs.rewritten(model), reference, Path(folder), **options)
    trainer.train()
    return list(logs.by_step.values())


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs TRL: pip install trl")
@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning")
@in_situations(
    "stage",
    "DeepSpeed",
    "losses and rewards as in one process with a frozen copy",
    {f"TRL's `DPOTrainer` with ZeRO-{stage}, the reference with the same weights": stage for stage in (2, 3)},
)
def test_preferences(stage: int, tmp_path: Path) -> None:
    frozen = trl_runs.base().requires_grad_(False)
    trainer, expected = trl_runs.dpo_trainer(trl_runs.rewritten(), frozen, tmp_path / "alone")
    trainer.train()
    first, _ = run_processes(2, _preferred_by_zero, stage, str(tmp_path / "run"), timeout=200)
    for own, step in zip(first, expected.by_step, strict=True):
        assert own == pytest.approx(expected.by_step[step], abs=1e-4)
