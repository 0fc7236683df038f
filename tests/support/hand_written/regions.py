"""Products inside a context: without gradients, under autocast, in another thread."""

import functools
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from support.hand_written.case import EITHER, IN_FORWARD, WITH_GRADIENTS, Child, Own, case, matrix
from support.models import IN, OUT

AREA = "Regions"


@case(AREA, "a product under `torch.no_grad()`", "w")
class NoGradRegion(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            gate = torch.sigmoid(F.linear(x, self.w))
        return gate * F.linear(x, self.w)


@case(AREA, "the forward decorated with `@torch.no_grad()`", "frozen.w")
class NoGradDecorator(nn.Module):
    class Frozen(Own):
        @torch.no_grad()
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.w)

    def __init__(self) -> None:
        super().__init__()
        self.frozen = self.Frozen()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(x) * x.mean()


@case(AREA, "gradients switched by a flag: `torch.set_grad_enabled(flag)`", "w")
class GradByFlag(Own):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = []
        for flag in (False, True):
            with torch.set_grad_enabled(flag):
                outputs.append(F.linear(x, self.w))
        return tuple(outputs)


@case(
    AREA,
    "`torch.enable_grad()` in the forward: an energy's gradient is the output",
    "w",
    compiled="no second derivatives",
)
class EnableGrad(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            energy = F.linear(point, self.w).tanh().sum()
            (force,) = torch.autograd.grad(energy, point, create_graph=self.training)
        return force


@case(AREA, "a product under `torch.inference_mode()`", "w")
class InferenceRegion(Own):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.inference_mode():
            norm = F.linear(x, self.w).norm()
        return F.linear(x, self.w) / float(norm), norm


def _under_autocast(model: nn.Module, x: torch.Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


@case(
    AREA,
    "a router in float32: `torch.autocast(enabled=False)` inside autocast",
    "w",
    calls=(_under_autocast,),
    dtype=torch.float32,
)
class Float32Router(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return F.linear(x.float(), self.w.float()).softmax(-1)


@case(AREA, "bfloat16 autocast around a part of the forward", "w", dtype=torch.float32, tolerance=0.1)
class AutocastRegion(Own):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            inside = F.linear(x, self.w)
        return inside, F.linear(x, self.w)


@case(AREA, "gradient checkpointing inside the forward, `use_reentrant=False`", "w")
class CheckpointRegion(Own):
    def part(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(F.linear(x, self.w))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.part, x, use_reentrant=False)


@case(AREA, "gradient checkpointing inside the forward, `use_reentrant=True`", "w")
class ReentrantRegion(CheckpointRegion):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warns in eval mode that no input requires a gradient
            return checkpoint(self.part, x, use_reentrant=True)


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, w = ctx.saved_tensors
        return gradient @ w, gradient.T @ x


@case(AREA, "an autograd.Function that receives the weight", "w", IN_FORWARD)
class AutogradFunction(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Multiply.apply(x, self.w)


class _MultiplyOnly(_Multiply):
    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor]:
        x, _ = ctx.saved_tensors
        return None, gradient.T @ x


@case(AREA, "an autograd.Function that receives the weight, but whose backward does not read it", "w", IN_FORWARD)
class AutogradFunctionOfTheInput(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _MultiplyOnly.apply(x, self.w)


class _MultiplyByModule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: nn.Module) -> torch.Tensor:
        ctx.module = module
        return F.linear(x, module.weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ ctx.module.weight, None


@case(AREA, "an autograd.Function that receives the module", "fc", IN_FORWARD, compiled="not refused")
class AutogradFunctionOfTheModule(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _MultiplyByModule.apply(x, self.fc)


@case(AREA, "a gradient that is reversed before the product", "w")
class ReversedGradient(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 1
        if x.requires_grad:
            x.register_hook(torch.neg)
        return F.linear(x, self.w)


@case(AREA, "`torch.vmap` over the rows of the input", "w", EITHER)
class Vmapped(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.vmap(lambda row: self.w @ row)(x)


@case(AREA, "`torch.func.jacrev` of the product", "w", EITHER)
class Jacobian(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.func.jacrev(lambda point: F.linear(point, self.w).tanh())(x.mean(0))


@case(AREA, "`torch.func.jvp` of the product", "w", EITHER)
class ForwardMode(Own):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch scripts one of its own functions here
            return torch.func.jvp(lambda point: F.linear(point, self.w).tanh(), (x,), (torch.ones_like(x),))


@case(AREA, "`functional_call` of the linear with its weight doubled", "fc", EITHER)
class FunctionalCall(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(self.fc, {"weight": self.fc.weight * 2}, (x,))


@case(AREA, "two products in two threads", ("w", "v"), EITHER)
class Threads(Own):
    def __init__(self) -> None:
        super().__init__()
        self.v = matrix(seed=12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        products = (lambda: F.linear(x, self.w), lambda: F.linear(x, self.v))
        with ThreadPoolExecutor(2) as pool:
            first, second = pool.map(lambda product: product(), products)
        return first * second


@case(AREA, "random numbers from a forked generator", "w", dtype=torch.float32)
class ForkedGenerator(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            noise = torch.randn(OUT)
        return F.linear(x, self.w) + noise + torch.rand(())


@case(AREA, "a profiler's label around the product", "w")
class Labelled(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.profiler.record_function("projection"):
            return F.linear(x, self.w)


@functools.cache
def _scripted() -> Any:
    def multiply(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.tanh(torch.matmul(x, w.t()))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warns that scripting is deprecated
        return torch.jit.script(multiply)


@case(AREA, "a function scripted with `torch.jit.script` that receives the weight", "w", EITHER)
class ScriptedHelper(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _scripted()(x, self.w)


@torch.compile(backend="eager")
def _compiled(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.tanh(F.linear(x, w))


@case(AREA, "a compiled function that receives the weight", "w", EITHER, slow=True)
class CompiledHelper(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _compiled(x, self.w)


@case(AREA, "the forward decorated with `@torch.compile`", "w", EITHER, slow=True)
class CompiledForward(Own):
    @torch.compile(backend="eager")
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(F.linear(x, self.w))


@case(AREA, "meta tensors as a dry run of the shapes", "w", EITHER, exported="adapters on another device than meta")
class ShapesOnMeta(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        width = F.linear(x.to("meta"), self.w.to("meta")).shape[-1]
        return F.linear(x, self.w) * width / IN


@case(AREA, "gradient checkpointing of a function that receives the weight, `use_reentrant=False`", "w", EITHER)
class CheckpointOfAFunction(Own):
    use_reentrant = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return checkpoint(lambda x, w: F.linear(x, w).tanh(), x, self.w, use_reentrant=self.use_reentrant)


@case(AREA, "gradient checkpointing of a function that receives the weight, `use_reentrant=True`", "w", WITH_GRADIENTS)
class ReentrantOfAFunction(CheckpointOfAFunction):
    use_reentrant = True
