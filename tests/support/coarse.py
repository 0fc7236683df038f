"""A weight that only `F.linear` can read."""

import torch
from torch import Tensor
from torch.nn import functional as F


class Coarse(Tensor):
    """A weight that `F.linear` rounds to eighths, like a quantised one; no other function may compute with it."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if function is F.linear:
                return F.linear(args[0], rounded(args[1].as_subclass(Tensor)), *args[2:])
            if function is Tensor.detach:
                return function(*args).as_subclass(cls)
            if function.__name__ in ("__get__", "__set__", "size", "dim", "is_floating_point", "requires_grad_"):
                return function(*args, **kwargs or {})
        raise AssertionError(f"{function} of a weight that only F.linear can read")


def rounded(weight: Tensor) -> Tensor:
    return torch.round(weight * 8) / 8
