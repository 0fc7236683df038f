"""One of several processes is killed: the others end with an error, and the adapter on disk is intact."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.processes import ENDED, outcomes_of_processes, run_processes
from support.sharded import adapted, averaged, fill, spread_with, token_ids

import melora_fx
from melora_fx.saving.adapter_file import read_adapter

STEPS = 4
TIMEOUT = 20
"""Seconds after which a collective fails; a lost connection is noticed at once."""


def _kill_this() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _train(mode: str, folder: str, first: int, killed_at: int | None) -> list[float]:
    """Returns the losses from step `first` on; writes an adapter and a checkpoint after each step.

    In step `killed_at` the last process is killed in the middle of its backward pass.
    """
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, ids = spread_with(mode, adapted(), token_ids())
    own = melora_fx.adapter_parameters(model)
    optimizer = torch.optim.AdamW(own.values(), lr=1e-2, eps=1e-3)
    if first:
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        checkpoint.load(states, checkpoint_id=f"{folder}/checkpoint-{first - 1}")
        set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
        melora_fx.load_adapter(model, f"{folder}/adapter")
    losses = []
    for step in range(first, STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        if step == killed_at and dist.get_rank() == dist.get_world_size() - 1:
            loss.register_hook(lambda gradient: _kill_this())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        checkpoint.save(states, checkpoint_id=f"{folder}/checkpoint-{step}")
        melora_fx.save_adapter(model, f"{folder}/adapter")
    return averaged(losses)


@pytest.mark.slow_cases("FSDP and TP")
@pytest.mark.situation(
    "Several processes",
    "one process is killed in a step",
    "the others raise an error; a resumed run has the losses of an uninterrupted one",
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("mode", ["DDP", "FSDP by layer", "TP", "FSDP and TP"])
def test_killed_in_a_step(mode: str, tmp_path: Path) -> None:
    whole = run_processes(4, _train, mode, str(tmp_path / "whole"), 0, None)[0]
    start = time.monotonic()
    *others, killed = outcomes_of_processes(4, _train, mode, str(tmp_path), 0, 2, timeout=TIMEOUT)
    assert killed == (False, ENDED)
    assert not any(finished for finished, _ in others)
    assert all("Error" in text for _, text in others)
    assert time.monotonic() - start < 3 * TIMEOUT
    read_adapter(tmp_path / "adapter")
    for losses in run_processes(4, _train, mode, str(tmp_path), 2, None):
        assert losses == pytest.approx(whole[2:], abs=1e-6)


def _save_and_die(mode: str, folder: str, where: str) -> None:
    """Saves another adapter over the existing one; the process that writes is killed in a function of `os`."""
    model: Any = spread_with(mode, fill(adapted(), seed=5), token_ids())[0]
    setattr(os, where, lambda *args, **options: _kill_this())
    melora_fx.save_adapter(model, folder)


@pytest.mark.slow
@pytest.mark.situation(
    "Several processes",
    "the process that writes an adapter is killed",
    "the others raise an error; the old adapter is intact",
)
@pytest.mark.parametrize("where", ["fsync", "replace"])
@pytest.mark.parametrize("mode", ["FSDP by layer", "TP"])
def test_killed_while_it_writes(mode: str, where: str, tmp_path: Path) -> None:
    melora_fx.save_adapter(adapted(), tmp_path)
    before = [(tmp_path / name).read_bytes() for name in ("adapter.safetensors", "adapter_config.json")]
    killed, other = outcomes_of_processes(2, _save_and_die, mode, str(tmp_path), where, timeout=TIMEOUT)
    assert killed == (False, ENDED)
    assert not other[0]
    assert "Error" in other[1]
    assert [(tmp_path / name).read_bytes() for name in ("adapter.safetensors", "adapter_config.json")] == before
    read_adapter(tmp_path)
    melora_fx.save_adapter(adapted(), tmp_path)  # removes what the killed process has left
    assert {path.name for path in tmp_path.iterdir()} == {"adapter.safetensors", "adapter_config.json"}


def _die_before_gathering(mode: str, folder: str) -> None:
    model: Any = spread_with(mode, fill(adapted(), seed=5), token_ids())[0]
    if dist.get_rank() == 1:
        _kill_this()
    melora_fx.save_adapter(model, folder)


@pytest.mark.slow
def test_killed_before_the_adapter_is_gathered(tmp_path: Path) -> None:
    melora_fx.save_adapter(adapted(), tmp_path)
    before = (tmp_path / "adapter.safetensors").read_bytes()
    outcomes = outcomes_of_processes(2, _die_before_gathering, "FSDP by layer", str(tmp_path), timeout=TIMEOUT)
    assert [finished for finished, _ in outcomes] == [False, False]
    assert "Error" in outcomes[0][1]
    assert (tmp_path / "adapter.safetensors").read_bytes() == before
