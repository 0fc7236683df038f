"""The update of a weight, tile by tile: against the dense oracle, with the same bits in every layout."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models import assert_equal, assert_near, dense_update, randn

from melora_fx import MELoRAConfig
from melora_fx.adapter import update
from melora_fx.adapter.tensors import AdapterTensors, diagonal_blocks
from melora_fx.adapter.update import Scratch, Tile, add_update, non_finite, update_tiles

CONFIG = MELoRAConfig(rank=(1, 4, 2), num_blocks=3, alpha=(1.0, 0.5, 4.0))
IN = 24
OUT = 36


def filled(config: MELoRAConfig, in_features: int = IN, out_features: int = OUT) -> AdapterTensors:
    shapes = config.adapter_shapes(in_features, out_features)
    return AdapterTensors(config, randn(*shapes[0], seed=1), randn(*shapes[1], seed=2))


@pytest.fixture(params=[1, 100, 1 << 19], ids=["rows", "small_tiles", "one_tile"])
def _tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(update._TILE_ELEMENTS, "cpu", request.param)


LAYOUTS = {
    "rows": lambda weight: weight.clone(),
    "transposed": lambda weight: weight.t().contiguous().t(),
    "columns_of_a_larger": lambda weight: torch.cat([weight, weight, weight], dim=1)[:, IN : 2 * IN],
    "rows_of_a_larger_transposed": lambda weight: torch.cat([weight, weight]).t().contiguous().t()[OUT:],
}


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gets_the_same_bits_and_nothing_beside_it_changes(layout: str, dtype: torch.dtype) -> None:
    base = randn(OUT, IN, seed=3).to(dtype)
    adapter = filled(CONFIG)
    weight = LAYOUTS[layout](base)
    around = weight.untyped_storage().nbytes() // weight.element_size() - weight.numel()
    whole = torch.empty(0, dtype=dtype).set_(weight.untyped_storage())
    before = whole.clone()
    add_update(adapter, weight)
    exact = base.double() + dense_update(CONFIG, adapter.lora_a, adapter.lora_b)
    assert_near(weight, exact)
    expected = base.clone()
    for tile in update_tiles(adapter, expected, Scratch()):
        wide = torch.promote_types(dtype, torch.float32)
        tile.block.copy_(tile.block.to(wide) + tile.delta.to(wide))
    assert_equal(weight, expected)
    assert int((whole != before).sum()) <= OUT * IN // 3
    assert around == 0 or not torch.equal(whole, before)


@given(
    num_blocks=st.integers(1, 5),
    rank=st.integers(1, 4),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    parts=st.integers(1, 3),
    tile=st.integers(1, 60),
)
def test_any_shape_and_any_tile(num_blocks: int, rank: int, height: int, width: int, parts: int, tile: int) -> None:
    config = MELoRAConfig(rank=rank, num_blocks=num_blocks, alpha=3.0, split=parts)
    in_features = num_blocks * width
    out_features = parts * num_blocks * height
    adapter = filled(config, in_features, out_features)
    weight = randn(out_features, in_features)
    expected = weight.double() + dense_update(config, adapter.lora_a, adapter.lora_b)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(update._TILE_ELEMENTS, "cpu", tile)
        add_update(adapter, weight)
    assert_near(weight, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_tile_writes_its_exact_sum_rounded(dtype: torch.dtype) -> None:
    """Also if the sum is halfway between two values, and if one of the terms is far smaller than the other."""
    wide = torch.promote_types(dtype, torch.float32)
    powers = torch.arange(-60, 60, dtype=torch.float64)
    weight = (1 + randn(4, 120, seed=1).double().round(decimals=1)).to(dtype)
    delta = (randn(4, 120, seed=2).double().sign() * (2**powers + (2.0 ** (powers - 20)))).to(wide)
    delta[:2] = (2**powers).to(wide)
    before = weight.clone()
    tile = Tile(weight, delta.clone(), Scratch())
    rounded = tile.rounded.clone()
    assert_equal(weight, before)
    tile.write()
    assert_equal(weight, rounded)
    assert_equal(weight, (before.to(wide) + delta).to(dtype))


def test_who_observes_sees_each_tile_before_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(update._TILE_ELEMENTS, "cpu", 100)
    weight = randn(OUT, IN, seed=3)
    before = weight.clone()
    seen = []
    add_update(
        filled(CONFIG), weight, observe=lambda tile: seen.append((tile.block, tile.block.clone(), tile.rounded.clone()))
    )
    assert len(seen) == 3
    for block, own, rounded in seen:
        assert_equal(block, rounded)
        assert not torch.equal(block, own)
    assert_equal(torch.cat([own for _, own, _ in seen], dim=1), next(diagonal_blocks(before, 3, (OUT,))))


def test_scratch_is_reused_and_grows() -> None:
    scratch = Scratch()
    device = torch.device("cpu")
    first = scratch.take("delta", torch.Size((2, 3)), torch.float32, device)
    second = scratch.take("delta", torch.Size((3,)), torch.float32, device)
    assert first.data_ptr() == second.data_ptr()
    assert scratch.take("other", torch.Size((3,)), torch.float32, device).data_ptr() != first.data_ptr()
    assert scratch.take("delta", torch.Size((1 << 20,)), torch.float32, device).numel() == 1 << 20


@pytest.mark.parametrize(
    ("dtype", "size", "reason"),
    [
        (torch.float16, 1.0, None),
        (torch.float16, 1e5, "beyond the range of float16"),
        (torch.bfloat16, 1e5, None),
        (torch.bfloat16, 1e20, "beyond the range of bfloat16"),
        (torch.float32, 1e20, "beyond the range of float32"),
        (torch.float64, 1e20, None),
        (torch.float32, float("nan"), "NaN or infinity"),
        (torch.float32, float("inf"), "NaN or infinity"),
    ],
)
def test_what_is_not_finite_is_told_before_it_is_added(dtype: torch.dtype, size: float, reason: str | None) -> None:
    adapter = filled(CONFIG)
    adapter.lora_a[0] = abs(size) if size < 1e10 else 1e20
    adapter.lora_b[0, 0, 0] = size
    weight = randn(OUT, IN, seed=3).to(dtype)
    found = non_finite(adapter, weight.dtype, lambda: weight)
    assert (found is None) if reason is None else (found is not None and reason in found)


def test_a_base_that_is_not_finite_is_the_bases_own_matter() -> None:
    weight = randn(OUT, IN, seed=3).half()
    weight[0, 0] = float("inf")
    assert non_finite(filled(CONFIG), weight.dtype, lambda: weight) is None


def test_an_update_of_zeros_leaves_every_bit() -> None:
    """Also in the matrices of a stack whose update is zero: -0 stays -0."""
    stacked = AdapterTensors.new(CONFIG, IN, OUT, num_experts=2)
    stacked.lora_b[: len(CONFIG.ranks)] = filled(CONFIG).lora_b
    weight = torch.full((2, OUT, IN), -0.0)
    add_update(stacked, weight)
    assert weight[0].any()
    assert torch.equal(weight[1].view(torch.int32), torch.full((OUT, IN), -0.0).view(torch.int32))


IN_PLACE = """
import sys, torch
from melora_fx import MELoRAConfig
from melora_fx.adapter.tensors import AdapterTensors
from melora_fx.adapter.update import add_update

def resident(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) // 1024

config = MELoRAConfig(rank=4, num_blocks=1)
weight = torch.randn(4096, 4096).to(getattr(torch, sys.argv[1]))
lora_a, lora_b = torch.randn(1, 4, 4096), torch.randn(1, 4096, 4)
add_update(AdapterTensors(config, lora_a, lora_b[:, :64]), weight[:64])
open("/proc/self/clear_refs", "w").write("5")  # resets the peak
before = resident("VmRSS")
add_update(AdapterTensors(config, lora_a, lora_b), weight)
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not report resident memory")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_block_that_is_the_whole_weight_takes_no_second_copy(dtype: str) -> None:
    command = [sys.executable, "-c", IN_PLACE, dtype]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 16, "MiB, compared with a weight of 64 or 32"
