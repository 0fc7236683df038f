"""The kernels themselves, against sums in float64: sizes, strides, pieces, precision; and that they compile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.interpreter import DEVICE
from support.models import TOLERANCE, randn
from torch import Tensor

from melora_fx.lowering import triton_kernels as kernels

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
if DEVICE == "cuda":  # the interpreter has no products of bfloat16
    DTYPES["bf16"] = torch.bfloat16


@pytest.fixture(params=["own_tiles", "small_tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the small tiles every loop runs more than once, and a rank above 16 needs two launches."""
    if request.param == "small_tiles":
        monkeypatch.setattr(kernels, "tiles_for", lambda *_: kernels.Tiles(16, 16, 16, 4, 2))
        monkeypatch.setattr(kernels, "MAX_RANK", 16)
        monkeypatch.setattr(kernels, "PROGRAMS", 12)


def assert_sums_near(actual: Tensor, expected: Tensor, factor: float = 1.0) -> None:
    """Checks equality up to the rounding of sums, relative to the largest value: terms may exceed their sum."""
    assert actual.shape == expected.shape
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    bound = factor * TOLERANCE[actual.dtype]["rtol"] * max(1.0, largest)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=bound)


def operand(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return randn(*shape, seed=seed, dtype=dtype).to(DEVICE)


def slices(num_blocks: int, tokens: int, width: int, *, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns (N, T, width): views of the rows of one tensor (T, N · width)."""
    return operand(tokens, num_blocks, width, seed=seed, dtype=dtype).transpose(0, 1)


SIZES = {
    "one_of_all": (1, 1, 1, 1, 1),
    "odd": (3, 5, 1, 8, 12),
    "many_tokens": (2, 70, 3, 12, 18),
    "large_rank": (3, 5, 20, 8, 12),
    "no_tokens": (2, 0, 3, 12, 18),
    "loops": (2, 70, 33, 70, 66),
}


@pytest.mark.default_cases("own_tiles-*", "small_tiles-odd-*", "small_tiles-one_of_all-*")
@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_sums_are_those_of_float64(sizes, dtype):
    num_blocks, tokens, rank, num_inputs, num_outputs = sizes
    x = slices(num_blocks, tokens, num_inputs, seed=1, dtype=dtype)
    first = operand(num_blocks, rank, num_inputs, seed=2, dtype=dtype) / num_inputs**0.5
    second = operand(num_blocks, num_outputs, rank, seed=3, dtype=dtype)
    mask = (slices(num_blocks, tokens, num_outputs, seed=4) > 0).to(dtype)
    before = slices(num_blocks, tokens, num_outputs, seed=5, dtype=dtype)
    expected = torch.bmm(x.double(), first.double().mT)
    update = torch.bmm(expected, second.double().mT)

    hidden = kernels.accumulate(x, first, keep_hidden=True)
    assert_sums_near(hidden, expected)
    for kept, masked in ((True, False), (False, True)):
        out = before.clone()
        found = kernels.accumulate(x, first, second, out, mask if masked else None, keep_hidden=kept)
        assert_sums_near(out, before.double() + (update * mask.double() if masked else update), 2)
        assert (found is None) is not kept
        assert found is None or torch.equal(found, hidden)

    sums = kernels.reduce(hidden, x)
    assert sums.dtype == torch.float32
    assert_sums_near(sums, torch.bmm(hidden.double().mT, x.double()))
    assert torch.equal(sums, kernels.reduce(hidden, x))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, about sums that are left out
def test_an_infinite_input_is_infinite_and_no_more() -> None:
    """Ranks that pad a tile become NaN if they are multiplied by infinity: they must not be added."""
    x = torch.ones(1, 2, 3, device=DEVICE)
    x[0, 0, 0] = float("inf")
    factors = torch.ones(1, 1, 3, device=DEVICE)
    out = torch.zeros(1, 2, 3, device=DEVICE)
    kernels.accumulate(x, factors, factors.mT.contiguous(), out)
    assert out.tolist() == [[[float("inf")] * 3, [3.0] * 3]]


STRIDED = {
    "rows": lambda t: t,
    "columns_first": lambda t: t.mT.contiguous().mT,
    "tokens_first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every_second": lambda t: torch.stack([t, -t], -1)[..., 0],
    "part_of_a_row": lambda t: torch.cat([t[..., :3], t, t], -1)[..., 3 : 3 + t.size(-1)],
    "one_token": lambda t: t[:, :1].expand(t.shape),
    "one_value": lambda t: t[:1, :1, :1].expand(t.shape),
}


@pytest.mark.parametrize("strided", STRIDED.values(), ids=STRIDED)
def test_operands_of_any_strides(strided):
    x = strided(operand(2, 70, 24, seed=1))
    first = strided(operand(2, 5, 24, seed=2) / 5)
    second = strided(operand(2, 36, 5, seed=3))
    mask = strided((operand(2, 70, 36, seed=4) > 0).float())
    out = operand(70, 2, 36, seed=5).transpose(0, 1)
    hidden = torch.bmm(x.double(), first.double().mT)
    expected = out.double() + torch.bmm(hidden, second.double().mT) * mask.double()
    found = kernels.accumulate(x, first, second, out, mask, keep_hidden=True)
    assert_sums_near(out, expected)
    assert_sums_near(kernels.reduce(found, x), torch.bmm(found.double().mT, x.double()))


def test_only_the_columns_of_out_are_written():
    rows = operand(70, 3 + 2 * 18 + 5, seed=5)
    before = rows.clone()
    kernels.accumulate(
        slices(2, 70, 12, seed=1),
        operand(2, 3, 12, seed=2),
        operand(2, 18, 3, seed=3),
        rows[:, 3:39].unflatten(1, (2, 18)).transpose(0, 1),
    )
    assert torch.equal(rows[:, :3], before[:, :3])
    assert torch.equal(rows[:, 39:], before[:, 39:])
    assert not torch.isclose(rows[:, 3:39], before[:, 3:39]).any(0).all()


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("rank", [3, 20])
def test_what_is_written_has_another_version(rank):
    """It shows autograd, and checkpoints that keep tensors, that a tensor has changed."""
    out = slices(2, 70, 18, seed=5)
    before = out._version
    kernels.accumulate(slices(2, 70, 12, seed=1), operand(2, rank, 12, seed=2), operand(2, 18, rank, seed=3), out)
    assert out._version > before


@pytest.mark.slow  # four gigabytes, but a CPU only reserves them
def test_offsets_above_32_bits():
    far = torch.empty(2**31 + 24, dtype=torch.float16, device=DEVICE).as_strided((1, 3, 24), (0, 2**30, 1))
    far.copy_(operand(1, 3, 24, seed=1, dtype=torch.float16))
    first = operand(1, 5, 24, seed=2, dtype=torch.float16) / 5
    second = operand(1, 24, 5, seed=3, dtype=torch.float16) / 5
    near = far.contiguous()
    hidden = kernels.accumulate(far, first, keep_hidden=True)
    assert torch.equal(hidden, kernels.accumulate(near, first, keep_hidden=True))
    assert torch.equal(kernels.reduce(hidden, far), kernels.reduce(hidden, near))
    kernels.accumulate(near.clone(), first, second, near)
    kernels.accumulate(far.contiguous(), first, second, far)
    assert torch.equal(far, near)


def test_products_of_float32_are_rounded_as_torch_rounds_its_own():
    before = torch.backends.cuda.matmul.fp32_precision
    found = []
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            found.append(kernels._options(kernels.tiles_for(8, torch.float32))["PRECISION"])
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert found == ["ieee", "tf32"]


COMPILE = """
import importlib.util, sys, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
spec = importlib.util.spec_from_file_location("triton_kernels", sys.argv[1])
kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)
class Absent:  # what a launch asks a GPU's driver before it runs
    get_current_target = staticmethod(lambda: GPUTarget("cuda", int(sys.argv[4]), 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
driver.set_active(Absent())
made = set()
def compile_alone(kernel):
    run = kernel.run
    kernel.run = lambda *args, **options: made.add(run(*args, **{**options, "warmup": True}))
compile_alone(kernels._accumulate), compile_alone(kernels._reduce)
rank, dtype = int(sys.argv[2]), getattr(torch, sys.argv[3])
for tokens in (8192, 1, 17):
    x, y = (torch.zeros(tokens, 8, width, dtype=dtype).transpose(0, 1) for width in (512, 1024))
    a, b = torch.zeros(8, rank, 512, dtype=dtype), torch.zeros(8, 1024, rank, dtype=dtype)
    kernels.accumulate(x, a, b, y)
    hidden = kernels.accumulate(y, b.mT, a.mT, x, x, keep_hidden=True)
    kernels.accumulate(x, a, keep_hidden=True)
    kernels.reduce(hidden, x)
print(len(made), max(kernel.metadata.shared for kernel in made), kernels.IS_INTERPRETED)
"""


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="on CUDA the other tests compile what they launch, and time is short")
@pytest.mark.parametrize(
    ("rank", "dtype", "architecture"),
    [
        pytest.param(8, "bfloat16", 90, id="bf16_r8"),
        pytest.param(256, "bfloat16", 90, id="bf16_r256", marks=pytest.mark.slow),
        pytest.param(256, "float16", 80, id="fp16_r256_sm80", marks=pytest.mark.slow),
        pytest.param(8, "float32", 90, id="fp32_r8", marks=pytest.mark.slow),
        pytest.param(256, "float32", 80, id="fp32_r256_sm80", marks=pytest.mark.slow),
    ],
)
def test_one_kernel_of_each_kind_is_compiled_for_all_numbers_of_tokens(rank, dtype, architecture, tmp_path):
    """The launching functions themselves run up to the launch: they need no GPU, and shared memory suffices."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, Path(kernels.__file__), str(rank), dtype, str(architecture)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    num_kernels, shared_bytes, is_interpreted = done.stdout.split()
    assert (int(num_kernels), is_interpreted) == (4, "False")
    assert int(shared_bytes) <= 96 * 1024
