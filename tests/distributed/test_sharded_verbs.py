"""The verbs have the same results on models that are spread over processes as in one process."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import sharded
from support.processes import run_processes
from support.sharded import CONFIG, adapted, fill, llama, spread_with, token_ids, train, whole
from torch import nn

import melora_fx
from benchmarks.training.spread import MODES
from melora_fx import MELoRAError
from melora_fx.names import unwrap

CASES = [(mode, 4) for mode in MODES] + [("DDP", 2), ("FSDP by layer", 2), ("TP", 2)]
FILES = ("adapter.safetensors", "adapter_config.json")


def spread(mode: str, model: Any) -> Any:
    return spread_with(mode, model, token_ids())[0]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(tensor).clone() for name, tensor in unwrap(model).state_dict().items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def _bytes(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES]


def _save(mode: str, folder: str, number_of_heads: int) -> None:
    model = spread(mode, adapted(num_key_value_heads=number_of_heads))
    logits(model)  # after it, a root of FSDP holds whole parameters
    melora_fx.save_adapter(model, folder)
    assert all((Path(folder) / name).exists() for name in FILES), "it must return after the files are written"


@pytest.mark.default_cases("2-FSDP by layer")
@pytest.mark.situation(
    "Several processes", "`save_adapter` from any layout, in 2 and 4 processes", "the same bytes as from one process"
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("number", [2, 4])
def test_files_are_the_same_bytes_whatever_the_layout(number: int, mode: str, tmp_path) -> None:
    melora_fx.save_adapter(adapted(), tmp_path / "alone")
    run_processes(number, _save, mode, str(tmp_path / "spread"), 4)
    assert _bytes(tmp_path / "spread") == _bytes(tmp_path / "alone")


def _gathered_bytes(mode: str, folder: str) -> int:
    """Returns the largest number of elements that a collective returns during `save_adapter`."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if "c10d" in str(func) and isinstance(result, torch.Tensor):
                Counting.largest = max(Counting.largest, result.numel())
            return result

    model = spread(mode, adapted())
    with Counting():
        melora_fx.save_adapter(model, folder)
    return Counting.largest


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["FSDP by layer", "TP"])
def test_saving_gathers_the_adapter_alone(mode: str, tmp_path) -> None:
    largest = max(factor.numel() for factor in melora_fx.adapter_parameters(adapted()).values())
    for found in run_processes(2, _gathered_bytes, mode, str(tmp_path)):
        assert 0 < found <= largest


def _use(mode: str, other: str) -> tuple[dict[str, torch.Tensor], ...]:
    """Calls all verbs except `save_adapter`, in a row; returns the states after loading, folding and unloading."""
    base = logits(spread(mode, llama()))
    model = spread(mode, adapted())
    names = list(melora_fx.sites(adapted()))
    before = logits(model)
    assert list(melora_fx.sites(model)) == names
    assert not torch.equal(before, base)
    with melora_fx.disabled(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), before)
    report = melora_fx.check_fold(model)
    with melora_fx.folded(model):
        torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)
    assert torch.equal(logits(model), before)
    assert str(report) == str(melora_fx.check_fold(adapted()))
    melora_fx.load_adapter(model, other)
    loaded = state(model)
    after = logits(model)
    assert not torch.equal(after, before)
    melora_fx.fold(model)
    assert not melora_fx.sites(model)
    torch.testing.assert_close(logits(model), after, atol=1e-5, rtol=0)
    assert type(unwrap(model).model.layers[0].self_attn.q_proj).__name__.removeprefix("FSDP") == "Linear"
    folded = state(model)
    if mode != "DDP":  # DDP has prepared for other parameters
        ids = token_ids()
        model(input_ids=ids, labels=ids).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    plain = spread(mode, adapted())
    logits(plain)
    melora_fx.unload(plain)
    assert torch.equal(logits(plain), base)
    return loaded, folded, state(plain)


@pytest.mark.situation(
    "Several processes",
    "`sites`, `disabled`, `check_fold`, `folded`, `load_adapter`, `fold`, `unload`",
    "as in one process",
)
@pytest.mark.default_cases("TP-2")
@pytest.mark.parametrize(("mode", "number"), CASES, ids=[f"{mode}-{number}" for mode, number in CASES])
def test_verbs_on_every_process(mode: str, number: int, tmp_path) -> None:
    other = fill(melora_fx.rewrite(llama(), "all-linear", sharded.with_config(rank=2)), seed=7)
    melora_fx.save_adapter(other, tmp_path)
    alone = adapted()
    melora_fx.load_adapter(alone, tmp_path)
    loaded = state(alone)
    melora_fx.fold(alone)
    for own_loaded, own_folded, own_plain in run_processes(number, _use, mode, str(tmp_path)):
        assert_same(own_loaded, loaded)
        assert_same(own_folded, state(alone))
        assert_same(own_plain, state(llama()))


def _fail_to_load(mode: str, folder: str) -> list[str]:
    """Returns the errors if the file of one process is damaged or another one, or if its base is incorrect on all."""
    model = spread(mode, adapted())
    before = state(model)
    errors = []
    for case in ("cut", "another", "wrong base"):
        own = f"{folder}/{case}" if dist.get_rank() == 0 or case == "wrong base" else f"{folder}/good"
        with pytest.raises(MELoRAError) as error:
            melora_fx.load_adapter(model, own)
        errors.append(str(error.value))
        assert_same(state(model), before)
    logits(model)
    return errors


@pytest.mark.situation(
    "Several processes",
    "`load_adapter` if it fails on one process, or one reads another adapter",
    "all raise an error; nothing is changed",
)
@pytest.mark.default_cases("FSDP by layer")
@pytest.mark.parametrize("mode", ["FSDP by layer", "FSDP and TP"])
def test_load_adapter_changes_nothing_on_an_error_of_one_process(mode: str, tmp_path) -> None:
    melora_fx.save_adapter(adapted(), tmp_path / "good")
    melora_fx.save_adapter(fill(adapted(), seed=5), tmp_path / "another")
    melora_fx.save_adapter(adapted(), tmp_path / "cut")
    path = tmp_path / "cut" / FILES[0]
    path.write_bytes(path.read_bytes()[:-8])
    other = llama()
    nn.init.normal_(other.model.layers[1].mlp.down_proj.weight)
    melora_fx.save_adapter(fill(melora_fx.rewrite(other, "all-linear", CONFIG)), tmp_path / "wrong base")
    first, second = run_processes(2, _fail_to_load, mode, str(tmp_path))
    assert "cut" in first[0]
    assert "another process has failed" in second[0]
    assert "differs between the processes" in first[1]
    assert "differs between the processes" in second[1]
    assert "`model.layers.1.mlp.down_proj`" in first[2]
    assert first[2] == second[2]


def _fail_to_save(folder: str) -> str:
    model = spread("FSDP by layer", adapted())
    with pytest.raises(MELoRAError) as error:
        melora_fx.save_adapter(model, folder)
    logits(model)
    return str(error.value)


def test_all_know_that_one_could_not_write(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    first, second = run_processes(2, _fail_to_save, str(tmp_path / "file" / "adapter"))
    assert "cannot be written" in first
    assert "another process has failed" in second
    assert "cannot be written" in second


def _save_on_one(folder: str) -> None:
    model = spread("DDP", adapted())
    if dist.get_rank() == 1:
        melora_fx.save_adapter(model, folder)
    dist.barrier()
    assert (Path(folder) / FILES[0]).exists()


def test_one_process_of_ddp_may_save_alone(tmp_path) -> None:
    run_processes(2, _save_on_one, str(tmp_path / "adapter"))
    melora_fx.save_adapter(adapted(), tmp_path / "alone")
    assert _bytes(tmp_path / "adapter") == _bytes(tmp_path / "alone")


LAYOUTS = [mode for mode in MODES if "sequence" not in mode]


def _resumed(source: str, targets: list[str], folder: str) -> tuple[list[float], dict[str, list[float]]]:
    """Returns the losses after a checkpoint of one layout, in that layout and in others that have loaded it."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def made(mode: str) -> tuple[Any, torch.optim.Optimizer, torch.Tensor]:
        model, ids = spread_with(mode, adapted(), token_ids())
        own = melora_fx.adapter_parameters(model).values()
        return model, torch.optim.AdamW(own, lr=1e-2, eps=1e-3), ids

    def states(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))

    def steps(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> list[float]:
        losses = []
        for _ in range(2):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return sharded.averaged(losses)

    model, optimizer, ids = made(source)
    steps(model, optimizer, ids)
    checkpoint.save(states(model, optimizer), checkpoint_id=folder)
    expected = steps(model, optimizer, ids)
    found = {}
    for target in targets:
        model, optimizer, ids = made(target)
        with torch.no_grad():
            for parameter in melora_fx.adapter_parameters(model).values():
                parameter.zero_()
        own = states(model, optimizer)
        checkpoint.load(own, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=own["model"], optim_state_dict=own["optimizer"])
        found[target] = steps(model, optimizer, ids)
    return expected, found


@pytest.mark.slow_cases("FSDP and TP", "TP", "DDP")
@pytest.mark.situation(
    "Several processes", "`torch.distributed.checkpoint` from any layout into any", "continues with the same losses"
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("source", LAYOUTS)
def test_distributed_checkpoints_go_from_any_layout_to_any(source: str, tmp_path) -> None:
    for expected, found in run_processes(4, _resumed, source, LAYOUTS, str(tmp_path)):
        assert found.keys() == set(LAYOUTS)
        for losses in found.values():
            assert losses == pytest.approx(expected, abs=1e-5)


def _with_reference() -> list[float]:
    """Trains as DPO does: the base runs between a forward pass and its backward pass."""
    model, ids = spread_with("FSDP by layer", adapted(), token_ids())
    optimizer = torch.optim.AdamW(melora_fx.adapter_parameters(model).values(), lr=1e-2, eps=1e-3)
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        with contextlib.ExitStack() as stack:
            stack.enter_context(melora_fx.disabled(model))
            stack.enter_context(torch.no_grad())
            model(input_ids=ids, labels=ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sharded.averaged(losses)


@pytest.mark.slow
def test_the_base_may_run_between_forward_and_backward() -> None:
    losses = train(adapted(), token_ids())
    for own in run_processes(2, _with_reference):
        assert own == pytest.approx(losses, abs=1e-5)
