"""Uses of the classes of rewritten models: calling, deriving, changing and parametrizing them."""

import copy
import gc
import weakref

import pytest
import torch
from support.models import IN, OUT, assert_equal, assert_unchanged, fill, randn
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import melora_fx
from melora_fx import MELoRAConfig, MELoRAError

CONFIG = MELoRAConfig(rank=2, num_blocks=3)


class Both(nn.Module):
    """Has its own matrix, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(randn(OUT, IN) * 0.2)
        self.fc = nn.Linear(OUT, OUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.linear(x, self.w))


def rewritten() -> nn.Module:
    return fill(melora_fx.rewrite(Both(), ["w", "fc"], CONFIG))


@pytest.mark.parametrize("of", [lambda model: model, lambda model: model.fc], ids=["root", "child"])
def test_the_class_of_a_rewritten_module_makes_plain_ones(of):
    module = of(rewritten())
    arguments = () if isinstance(module, Both) else (OUT, OUT)
    made = type(module)(*arguments)
    assert type(made) in (Both, nn.Linear)
    made(randn(2, made.w.shape[1] if isinstance(made, Both) else OUT))


def test_a_class_below_it_makes_its_own() -> None:
    class Below(type(rewritten())):  # type: ignore[misc]
        pass

    model = Below()
    assert type(model) is Below
    plain = model(randn(2, IN))
    melora_fx.rewrite(model, ["w", "fc"], CONFIG)
    assert_equal(model(randn(2, IN)), plain)
    melora_fx.fold(model)
    assert type(model) is Below


def test_a_forward_that_the_class_is_given_later_runs() -> None:
    class Patched(Both):
        pass

    model = melora_fx.rewrite(Patched(), ["w", "fc"], CONFIG)
    before = model(randn(2, IN))
    Patched.forward = lambda self, x: 2 * Both.forward(self, x)  # type: ignore[method-assign]
    assert_equal(model(randn(2, IN)), 2 * before)


@pytest.mark.parametrize(
    ("tensor", "of"),
    [("w_lora_a", lambda model: model), ("lora_b", lambda model: model.fc), ("bias", lambda model: model.fc)],
    ids=["adapter of the root", "adapter of a linear", "bias"],
)
def test_a_fold_of_what_was_parametrized_since_is_refused_before_anything(tensor, of):
    model = rewritten()
    parametrize.register_parametrization(of(model), tensor, nn.Identity())
    with assert_unchanged(model), pytest.raises(MELoRAError, match="parametrized after `rewrite`"):
        melora_fx.fold(model)


def test_a_class_that_forbids_to_delete_can_be_folded() -> None:
    class Keeps(Both):
        def __delattr__(self, name: str) -> None:
            raise RuntimeError("nothing is deleted here")

    model = fill(melora_fx.rewrite(Keeps(), ["w", "fc"], CONFIG))
    output = model(randn(2, IN))
    torch.testing.assert_close(melora_fx.fold(model)(randn(2, IN)), output)


class Sized(Both):
    """Has a constructor with an argument."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.w = nn.Parameter(randn(OUT, features) * 0.2)


def test_a_replica_of_data_parallel_is_adapted() -> None:
    model = fill(melora_fx.rewrite(Sized(IN), ["w", "fc"], CONFIG))
    replica = model._replicate_for_data_parallel()
    for name, parameter in model._parameters.items():
        setattr(replica, name, parameter.detach())
    assert type(replica) is type(model)
    assert_equal(replica(randn(2, IN)), model(randn(2, IN)))


def test_a_name_that_is_parted_from_the_weight_is_its_own() -> None:
    model = Both()
    model.alias = model.w
    melora_fx.rewrite(model, "w", CONFIG)
    model.alias = nn.Parameter(randn(OUT, IN))
    assert model.alias is not model.w
    assert model.alias is dict(model.named_parameters())["alias"]


def test_a_class_that_is_frozen_is_adapted_or_left_whole() -> None:
    class Frozen(nn.Linear):
        def __init__(self) -> None:
            super().__init__(IN, OUT)
            self.is_made = True

        def __setattr__(self, name: str, value: object) -> None:
            if "is_made" in vars(self):
                raise RuntimeError("frozen")
            super().__setattr__(name, value)

    model = fill(melora_fx.rewrite(nn.Sequential(Frozen()), "0", CONFIG))
    output = model(randn(2, IN))
    torch.testing.assert_close(melora_fx.fold(model)(randn(2, IN)), output)


def test_methods_that_are_given_anything_compute() -> None:
    class Methods(Both):
        def by_keyword(self, *, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.w)

        def variadic(self, *inputs: torch.Tensor) -> torch.Tensor:
            return F.linear(inputs[0], self.w)

        def _initial(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.w)

        def __matmul__(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.w)

    model, x = fill(melora_fx.rewrite(Methods(), "w", CONFIG)), randn(2, IN)
    outputs = [model.by_keyword(x=x), model.variadic(x), model._initial(x), model @ x]
    melora_fx.fold(model)
    for output in outputs:
        torch.testing.assert_close(output, F.linear(x, model.w))


def test_equal_methods_of_two_classes_compute() -> None:
    """As if a notebook cell that defines them is run twice."""

    def made() -> nn.Module:
        class Again(Both):
            def method(self, x: torch.Tensor) -> torch.Tensor:
                return F.linear(x, self.w)

        return fill(melora_fx.rewrite(Again(), "w", CONFIG))

    first, second = made(), made()
    del first
    gc.collect()
    output = second.method(randn(2, IN))
    melora_fx.fold(second)
    torch.testing.assert_close(output, F.linear(randn(2, IN), second.w))


def test_a_part_that_is_taken_out_is_freed() -> None:
    model = rewritten()
    part = weakref.ref(model.fc)
    model.fc = nn.Identity()
    gc.collect()
    assert part() is None


def test_a_copy_of_another_dtype_compiles_as_one_graph(fresh_dynamo) -> None:
    """The copy has a new class."""
    model = copy.deepcopy(rewritten().double())
    x = randn(2, IN, dtype=torch.float64)
    compiled = torch.compile(model, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, model(x))


def test_more_parts_of_a_weight_than_there_are_layers() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(randn(100, IN) * 0.2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([F.linear(x, self.w[row : row + 1]) for row in range(100)], -1)

    model, x = melora_fx.rewrite(Heads(), "w", MELoRAConfig(rank=1, num_blocks=2)), randn(2, IN)
    output = fill(model)(x)
    torch.testing.assert_close(output, melora_fx.fold(model)(x))


def test_a_weight_in_a_long_computation_is_looked_at_once() -> None:
    class Long(Both):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.w
            for _ in range(60):
                y = y + y.tanh()
            return self.fc(x @ y.T)

    skipped = dict(melora_fx.match(Long(), "all-linear", CONFIG).skipped)
    assert "no pattern" in skipped["w"]


def test_a_mapping_decides_by_its_first_match() -> None:
    class Masked(Both):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(F.linear(x, self.w * 2))

    with pytest.warns(UserWarning, match="leaves 1 linears alone"):
        model = melora_fx.rewrite(Masked(), {"all-linear": CONFIG, "w": None})
    assert list(melora_fx.sites(model)) == ["fc"]
