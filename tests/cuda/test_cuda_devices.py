"""Models and adapters that move: between CPU and device, through files and copies, in dtype, and from meta."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.cuda import (
    DEVICE,
    ON_CUDA,
    assert_all_near,
    assert_same,
    assert_sums_near,
    by_dtype,
    by_lowering,
    to_device,
)
from support.lowered import lowered, step
from support.models import TOWER_CONFIG, assert_unchanged, bert, fill, output_of, randn, tokens, tower
from torch import Tensor, nn

import melora_fx
from melora_fx import MELoRAConfig

pytestmark = ON_CUDA

CAPTURES = pytest.mark.parametrize("captured", [False, True], ids=["in_place", "whole"])
OF_BERT = MELoRAConfig(rank=2, num_blocks=3, alpha=3.0)


def rewritten_tower(device: str = "cpu", *, captured: bool = False, seed: int = 100) -> nn.Module:
    example = {"example_inputs": (x_of(device),)} if captured else {}
    return fill(melora_fx.rewrite(tower().to(device), "all-linear", TOWER_CONFIG, **example), seed)


def rewritten_bert(device: str = "cpu", *, captured: bool = False) -> nn.Module:
    example = {"example_inputs": to_device(tokens(), device)} if captured else {}
    return fill(melora_fx.rewrite(bert(num_layers=1).to(device), "all-linear", OF_BERT, **example))


def x_of(device: str = DEVICE) -> Tensor:
    return randn(4, 30, 24).to(device)


def devices(model: nn.Module) -> set[str]:
    """Returns the device types of all tensors, including buffers that are not in the state."""
    return {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]}


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@CAPTURES
def test_rewritten_on_the_device(captured):
    model = rewritten_bert(DEVICE, captured=captured)
    assert devices(model) == {DEVICE}
    expected = output_of(rewritten_bert("cpu", captured=captured), tokens())
    assert_sums_near(output_of(model, to_device(tokens())), expected.double(), 10)


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
def test_initial_values_on_the_device(init):
    model = nn.Sequential(nn.Linear(24, 36)).to(DEVICE)
    (site,) = melora_fx.sites(melora_fx.rewrite(model, "0", MELoRAConfig(rank=2, num_blocks=3, init=init))).values()
    assert {tensor.device.type for tensor in (site.lora_a, site.lora_b, site.scaling)} == {DEVICE}
    assert bool(site.lora_a.isfinite().all())
    assert float(site.lora_a.detach().std()) > 0.05
    assert not site.lora_b.any()


@CAPTURES
@pytest.mark.parametrize("build", [rewritten_tower, rewritten_bert], ids=["tower", "bert"])
def test_moved_to_the_device_and_back(build, captured):
    model = build("cpu", captured=captured)
    given = x_of("cpu") if build is rewritten_tower else tokens()
    expected = output_of(model, given)
    model.to(DEVICE)
    assert devices(model) == {DEVICE}
    assert_sums_near(output_of(model, to_device(given)), expected.double(), 10)
    model.to("cpu")
    assert_same(output_of(model, given), expected)


@by_lowering()
def test_gradients_after_a_move(lowering):
    model = lowered(tower, lowering)
    expected = [each.double() for each in step(model, x_of("cpu"))]
    assert_all_near(step(model.to(DEVICE), x_of()), expected, 10)


def test_training_goes_on_after_a_move():
    found = []
    for places in (("cpu", "cpu"), ("cpu", DEVICE), (DEVICE, "cpu")):
        model = rewritten_tower()
        losses = []
        for place in places:
            model.to(place)
            optimizer = torch.optim.AdamW(melora_fx.adapter_parameters(model).values(), lr=1e-2)
            for _ in range(2):
                optimizer.zero_grad()
                loss = model(x_of(place)).square().mean()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
        found.append(losses)
    assert found[0][-1] < found[0][0]
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    assert found[2] == pytest.approx(found[0], rel=1e-3)


@pytest.mark.parametrize("kept", [(), ("head",)], ids=["adapter", "with_a_head"])
def test_files_are_those_of_the_cpu_byte_for_byte(kept, tmp_path):
    for device in ("cpu", DEVICE):
        targets = {"head": None, "*": TOWER_CONFIG} if kept else "all-linear"
        model = fill(melora_fx.rewrite(tower(), targets, TOWER_CONFIG, keep_trainable=kept)).to(device)
        melora_fx.save_adapter(model, tmp_path / f"from_{device}_{len(list(tmp_path.iterdir()))}")
    one, other = sorted(tmp_path.iterdir())
    assert files(one) == files(other)


def test_saved_on_the_device_and_loaded_on_the_cpu_and_back(tmp_path):
    source = rewritten_tower(DEVICE)
    melora_fx.save_adapter(source, tmp_path / "one")
    loaded = melora_fx.load_adapter(tower(), tmp_path / "one")
    assert devices(loaded) == {"cpu"}
    assert_same(dict(melora_fx.adapter_parameters(loaded)), dict(melora_fx.adapter_parameters(source)))
    melora_fx.save_adapter(loaded, tmp_path / "two")
    back = melora_fx.load_adapter(tower().to(DEVICE), tmp_path / "two")
    assert devices(back) == {DEVICE}
    assert_same(output_of(back, x_of()), output_of(source, x_of()))
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_swapped_in_place(tmp_path):
    small = MELoRAConfig(rank=1, num_blocks=3, alpha=7.0)
    other = fill(melora_fx.rewrite(tower(), "all-linear", small), 5)
    melora_fx.save_adapter(other, tmp_path)
    model = rewritten_tower(DEVICE)
    places = {name: parameter.data_ptr() for name, parameter in melora_fx.adapter_parameters(model).items()}
    melora_fx.load_adapter(model, tmp_path)
    assert {name: parameter.data_ptr() for name, parameter in melora_fx.adapter_parameters(model).items()} == places
    assert devices(model) == {DEVICE}
    assert_sums_near(output_of(model, x_of()), output_of(other, x_of("cpu")).double(), 10)
    melora_fx.save_adapter(model, tmp_path / "again")
    assert files(tmp_path / "again") == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


def test_an_adapter_of_another_base_is_refused_on_the_device(tmp_path):
    melora_fx.save_adapter(rewritten_tower(DEVICE), tmp_path)
    model = tower(seed=1).to(DEVICE)
    with assert_unchanged(model), pytest.raises(melora_fx.MELoRAError, match="trained on another base model"):
        melora_fx.load_adapter(model, tmp_path)


def _saved(model: nn.Module, place: str) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False, map_location=place)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch_save": lambda model: _saved(model, DEVICE),
}


@CAPTURES
@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_copies_stay_on_the_device(make_copy, captured):
    model = rewritten_tower(DEVICE, captured=captured)
    copied = make_copy(model)
    assert devices(copied) == {DEVICE}
    assert_same(output_of(copied, x_of()), output_of(model, x_of()))


@CAPTURES
def test_loaded_onto_another_device_than_it_was_saved_on(captured):
    for source, target in ((DEVICE, "cpu"), ("cpu", DEVICE)):
        model = rewritten_bert(source, captured=captured)
        loaded = _saved(model, target)
        assert devices(loaded) == {target}
        expected = output_of(model, to_device(tokens(), source))
        assert_sums_near(output_of(loaded, to_device(tokens(), target)), expected.double(), 10)


def test_state_of_the_cpu_is_loaded_on_the_device():
    source = rewritten_tower(seed=7)
    model = rewritten_tower(DEVICE)
    model.load_state_dict(source.state_dict())
    assert devices(model) == {DEVICE}
    assert_same(dict(model.state_dict()), dict(source.state_dict()))
    assert_sums_near(output_of(model, x_of()), output_of(source, x_of("cpu")).double(), 10)


@by_dtype()
def test_moved_to_a_dtype(dtype):
    model = rewritten_tower(DEVICE)
    expected = output_of(model, x_of())
    model.to(dtype)
    output = output_of(model, x_of().to(dtype))
    assert output.dtype == dtype
    assert_sums_near(output, expected.double(), 10)


@CAPTURES
def test_from_meta_to_the_device(captured):
    with torch.device("meta"):
        empty = bert(num_layers=1)
    example = {"example_inputs": to_device(tokens(), "meta")} if captured else {}
    model = melora_fx.rewrite(empty, "all-linear", OF_BERT, **example).to_empty(device=DEVICE)
    plain = bert(num_layers=1)
    model.load_state_dict(plain.state_dict(), strict=False)
    for name, buffer in plain.named_buffers():  # they are not in the state
        model.get_buffer(name).copy_(buffer)
    assert devices(model) == {DEVICE}
    assert_sums_near(output_of(model, to_device(tokens())), output_of(plain, tokens()).double(), 10)
    for site in melora_fx.sites(model).values():
        assert 0 < float(site.lora_a.detach().abs().max()) < 1
        assert not site.lora_b.any()
