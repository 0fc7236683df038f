"""TRL's SFTTrainer and DPOTrainer train a rewritten model as they train any other, and DPO's reference is its base."""

import copy
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.models import assert_equal, in_situations
from support.processes import free_port, run_processes
from support.training import STEPS, StopAt
from support.trl_runs import (
    WithoutAdapters,
    around_the_same_weights,
    base,
    dpo_trainer,
    rewritten,
    sft_trainer,
)
from torch import nn
from transformers import LlamaForCausalLM

import exporters
import melora_fx
from melora_fx import AdapterCheckpointCallback, MELoRAConfig, MELoRAError

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs TRL: pip install trl"),
    pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning"),
]
situation = pytest.mark.situation


class _Batches:
    """A collator that stores the batches that it returns."""

    def __init__(self, collator: Callable[..., Any]) -> None:
        self.collator = collator
        self.given: list[dict[str, torch.Tensor]] = []

    def __call__(self, examples: Any) -> Any:
        self.given.append(self.collator(examples))
        return self.given[-1]


def _plain_loop(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> list[float]:
    optimizer = torch.optim.AdamW(melora_fx.adapter_parameters(model).values(), lr=1e-2, weight_decay=0)
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@in_situations(
    "options",
    "TRL",
    "the losses of a plain loop",
    {
        "`SFTTrainer` with its default gradient checkpointing": {},
        "`SFTTrainer` without gradient checkpointing": {"gradient_checkpointing": False},
    },
)
def test_losses_of_a_plain_loop(options: dict[str, Any], tmp_path: Path) -> None:
    trainer, losses = sft_trainer(
        rewritten(), tmp_path, lr_scheduler_type="constant", max_grad_norm=0, save_strategy="no", **options
    )
    batches = trainer.data_collator = _Batches(trainer.data_collator)
    trainer.train()
    assert list(losses.by_step.values()) == pytest.approx(_plain_loop(rewritten(), batches.given[:STEPS]), abs=1e-5)


@pytest.mark.slow
@situation("TRL", "`SFTTrainer` in bfloat16, its default", "trains; A and B stay float32")
def test_bfloat16(tmp_path: Path) -> None:
    trainer, expected = sft_trainer(rewritten(), tmp_path, save_strategy="no")
    trainer.train()
    model = rewritten()
    trainer, losses = sft_trainer(model, tmp_path, save_strategy="no", bf16=True)
    trainer.train()
    assert list(losses.by_step.values()) == pytest.approx(list(expected.by_step.values()), abs=0.02)
    assert {parameter.dtype for parameter in melora_fx.adapter_parameters(model).values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@situation("TRL", "`SFTTrainer`, compared with a PeftModel of the same values", "the same losses")
def test_losses_of_a_peft_model(tmp_path: Path) -> None:
    import peft

    config = MELoRAConfig(rank=4, num_blocks=1, alpha=4.0)  # a scaling of 1, which both formats store alike
    model = rewritten(config=config)
    melora_fx.save_adapter(model, tmp_path / "adapter")
    exporters.write_peft_adapter(tmp_path / "adapter", tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(base(), str(tmp_path / "peft"), is_trainable=True)
    trainer, losses = sft_trainer(model, tmp_path / "ours", save_strategy="no")
    trainer.train()
    trainer, expected = sft_trainer(theirs, tmp_path / "theirs", save_strategy="no")
    trainer.train()
    assert losses.by_step == pytest.approx(expected.by_step, abs=1e-5)


@pytest.mark.slow
@situation(
    "TRL",
    "`SFTTrainer`, `AdapterCheckpointCallback`, resumed",
    "only trained tensors are saved; the losses of an uninterrupted run",
)
def test_resumed_from_a_checkpoint_of_the_adapter(tmp_path: Path) -> None:
    whole = rewritten()
    trainer, expected = sft_trainer(whole, tmp_path / "whole", AdapterCheckpointCallback())
    trainer.train()
    sft_trainer(rewritten(), tmp_path / "run", AdapterCheckpointCallback(), StopAt(3))[0].train()
    resumed = rewritten()
    trainer, losses = sft_trainer(resumed, tmp_path / "run", AdapterCheckpointCallback())
    trainer.train(resume_from_checkpoint=True)
    assert losses.by_step == {step: loss for step, loss in expected.by_step.items() if step > 3}
    assert_equal(resumed.state_dict(), whole.state_dict())
    saved = load_file(tmp_path / "run" / "checkpoint-6" / "model.safetensors")
    assert saved.keys() == melora_fx.adapter_parameters(resumed).keys()
    loaded = melora_fx.load_adapter(base(), tmp_path / "run" / "checkpoint-6")
    assert_equal(loaded.state_dict(), whole.state_dict())
    with pytest.warns(UserWarning, match=r"`melora_fx\.save_adapter`, or call `melora_fx\.fold` first"):
        trainer.save_model(str(tmp_path / "final"))


def _in_two_processes(directory: str, port: int) -> list[float]:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    options: dict[str, Any] = {"per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    model = rewritten()
    trainer, losses = sft_trainer(model, Path(directory), AdapterCheckpointCallback(), **options)
    trainer.train()
    assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
    return list(losses.by_step.values())


@pytest.mark.slow
@situation("TRL", "`SFTTrainer` in two processes, with DDP", "the losses of one process")
def test_two_processes(tmp_path: Path) -> None:
    trainer, expected = sft_trainer(rewritten(), tmp_path / "alone", AdapterCheckpointCallback())
    trainer.train()
    first, _ = run_processes(2, _in_two_processes, str(tmp_path / "two"), free_port())
    assert first == pytest.approx(list(expected.by_step.values()), abs=1e-5)
    one, two = (load_file(tmp_path / run / "checkpoint-6" / "model.safetensors") for run in ("alone", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=0)


@pytest.mark.slow
@situation("TRL", "`SFTTrainer` on an 8-bit base", "trains; TRL casts A and B to bfloat16")
def test_a_base_in_eight_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    base().save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(load_in_8bit=True), dtype=torch.bfloat16
    )
    model = rewritten(model)
    before = {name: value.clone() for name, value in melora_fx.adapter_parameters(model).items()}
    trainer, losses = sft_trainer(model, tmp_path / "run", save_strategy="no", bf16=True)
    trainer.train()
    after = melora_fx.adapter_parameters(model)
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    assert all(not torch.equal(before[name].bfloat16(), after[name]) for name in after)
    assert max(losses.by_step.values()) < 7


@situation("TRL", "an adapter on `lm_head`, whose weight TRL reads itself", "refused, as for a PeftModel")
def test_an_adapted_head_is_refused(tmp_path: Path) -> None:
    trainer, _ = sft_trainer(rewritten(targets=["lm_head", "q_proj"]), tmp_path, save_strategy="no")
    with pytest.raises(MELoRAError, match=r"`lm_head`: .*chunked_logprob.* leave this linear out of `targets`"):
        trainer.train()


@pytest.mark.slow
@situation("TRL", "`keep_trainable=['lm_head']`", "the losses of a plain loop")
def test_a_trained_head(tmp_path: Path) -> None:
    options: dict[str, Any] = {"lr_scheduler_type": "constant", "max_grad_norm": 0, "save_strategy": "no"}
    trainer, losses = sft_trainer(rewritten(keep_trainable=["lm_head"]), tmp_path, **options)
    batches = trainer.data_collator = _Batches(trainer.data_collator)
    trainer.train()
    model = rewritten(keep_trainable=["lm_head"])
    optimizer = torch.optim.AdamW((each for each in model.parameters() if each.requires_grad), lr=1e-2, weight_decay=0)
    for loss, batch in zip(losses.by_step.values(), batches.given, strict=False):
        own = model(**batch).loss
        own.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert loss == pytest.approx(own.item(), abs=1e-4)


def _frozen(**options: Any) -> tuple[Any, Any]:
    return rewritten(**options), base().requires_grad_(False)


def _by_disabled(**options: Any) -> tuple[Any, Any]:
    model = rewritten(**options)
    return model, WithoutAdapters(model)


def _same_weights(**options: Any) -> tuple[Any, Any]:
    model = base()
    reference = around_the_same_weights(model)
    return rewritten(model, **options), reference


def _loaded_by_trl(folder: Path, **options: Any) -> tuple[Any, Any]:
    base().save_pretrained(folder)
    return rewritten(LlamaForCausalLM.from_pretrained(folder), **options), None


REFERENCES: dict[str, Callable[..., tuple[Any, Any]]] = {
    "`melora_fx.disabled`": lambda folder, **options: _by_disabled(**options),
    "a second model with the same weights": lambda folder, **options: _same_weights(**options),
    "`ref_model=None`, a model from a folder": _loaded_by_trl,
}


def _logs(model: Any, reference: Any, directory: Path, **options: Any) -> dict[int, Any]:
    trainer, logs = dpo_trainer(model, reference, directory, **options)
    trainer.train()
    assert len(logs.by_step) == STEPS
    return logs.by_step


@pytest.mark.slow_cases("*disabled-bfloat16", "*folder-no checkpointing")
@pytest.mark.default_cases("*: melora_fx.disabled-default")
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_checkpointing": False}, {"bf16": True}],
    ids=["default", "no checkpointing", "bfloat16"],
)
@in_situations(
    "reference",
    "TRL",
    "losses and rewards as with a frozen copy of the base",
    {f"`DPOTrainer`, reference: {name}": make for name, make in REFERENCES.items()},
)
def test_rewards_beside_a_frozen_copy(reference: Callable[..., Any], options: dict[str, Any], tmp_path: Path) -> None:
    expected = _logs(*_frozen(), tmp_path / "frozen", **options)
    assert _logs(*reference(tmp_path / "base"), tmp_path / "run", **options) == expected


@pytest.mark.slow
@situation("TRL", "`DPOTrainer`, `precompute_ref_log_probs`, a new adapter", "as with a frozen copy of the base")
def test_precomputed_with_a_new_adapter(tmp_path: Path) -> None:
    expected = _logs(*_frozen(is_filled=False), tmp_path / "frozen")
    own = _logs(rewritten(is_filled=False), None, tmp_path / "run", precompute_ref_log_probs=True)
    for step in expected:
        assert own[step] == pytest.approx(expected[step], abs=1e-5)


@pytest.mark.slow
@situation(
    "TRL",
    "`DPOTrainer`, `precompute_ref_log_probs`, an adapter that is already trained",
    "the reference is that adapter, as for a PeftModel",
)
def test_precomputed_with_a_trained_adapter(tmp_path: Path) -> None:
    model = rewritten()
    expected = _logs(model, copy.deepcopy(model).requires_grad_(False), tmp_path / "frozen")
    own = _logs(rewritten(), None, tmp_path / "run", precompute_ref_log_probs=True)
    for step in expected:
        assert own[step] == pytest.approx(expected[step], abs=1e-5)


def _preferred_in_two_processes(name: str, directory: str, port: int) -> list[Any]:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    model, reference = REFERENCES[name](Path(directory, f"base-{port}"))
    trainer, logs = dpo_trainer(
        model, reference, Path(directory, "run"), per_device_train_batch_size=2, ddp_backend="gloo"
    )
    trainer.train()
    return list(logs.by_step.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in REFERENCES if "folder" not in name])
def test_rewards_in_two_processes(name: str, tmp_path: Path) -> None:
    expected = _logs(*_frozen(), tmp_path / "frozen")
    first, _ = run_processes(2, _preferred_in_two_processes, name, str(tmp_path), free_port())
    for own, step in zip(first, expected, strict=True):
        assert own == pytest.approx(expected[step], abs=1e-4)


@pytest.mark.slow
@situation("TRL", "`DPOTrainer` without `ref_model`, a model that is not from a folder", "TRL's error on construction")
def test_a_model_from_nowhere(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"Repo id|repo_id|not a valid"):
        dpo_trainer(rewritten(), None, tmp_path)
