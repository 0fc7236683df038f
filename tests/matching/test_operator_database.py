"""Every matrix in a product is a site or has a reason, whatever operator multiplies, in both captures."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import randn
from torch import nn
from torch.nn import functional as F

import melora_fx
from melora_fx import MELoRAConfig

TESTS = Path(__file__).parent.parent
CONFIG = MELoRAConfig(rank=1, num_blocks=1)
WITHOUT_MATRICES = {"dot", "vdot"}

in_both = pytest.mark.parametrize(
    "whole", [pytest.param(False, id="in_place"), pytest.param(True, id="whole", marks=pytest.mark.slow)]
)


class Product(nn.Module):
    """Computes `form(h, w)` of a linear's output h (2, 3, 4) and a parameter."""

    def __init__(self, form: Callable[[Any, Any], Any], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.w = nn.Parameter(randn(*shape))
        self.form = form

    def forward(self, x: torch.Tensor) -> Any:
        return self.form(self.fc(x), self.w)


class Around(nn.Module):
    """Calls a module with `form` of a linear's output."""

    def __init__(self, module: nn.Module, form: Callable[[Any], Any] = lambda h: h) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.inner = module
        self.form = form

    def forward(self, x: torch.Tensor) -> Any:
        out = self.inner(self.form(self.fc(x)))
        return out[0] if isinstance(out, tuple) else out


def said(model: nn.Module, whole: bool) -> dict[str, str]:
    """Maps sites, and heads that "all-linear" leaves out, to "", and all others to their reason."""
    options: dict[str, Any] = {"example_inputs": (randn(2, 3, 4),), "dynamic_axes": {}} if whole else {}
    report = melora_fx.match(model, "all-linear", CONFIG, **options)
    return {site.name: "" for site in (*report.sites, *report.untargeted)} | dict(report.skipped)


ADAPTED: dict[str, tuple[Any, tuple[int, ...]]] = {
    "einsum_dots": (lambda x, w: torch.einsum("...d,ed->...e", x, w), (6, 4)),
    "einsum_order": (lambda x, w: torch.einsum("bsd,de->bes", x, w), (4, 6)),
    "alpha": (lambda x, w: torch.addmm(x.sum(), x[:, 0], w.T, alpha=2), (6, 4)),
    "columns": (lambda x, w: F.linear(x, w[:, 2:6]), (6, 8)),
    "addmv": (lambda x, w: torch.addmv(x.sum(), w, x[0, 0]), (6, 4)),
    "inner": (torch.inner, (6, 4)),
}


@in_both
@pytest.mark.parametrize("form", ADAPTED)
def test_behind_a_simple_view_it_is_a_site(form: str, whole: bool) -> None:
    assert said(Product(*ADAPTED[form]), whole) == {"fc": "", "w": ""}


NO_PATTERN: dict[str, tuple[Any, tuple[int, ...], str]] = {
    "scaled": (lambda x, w: F.linear(x, w * 2), (6, 4), "mul, linear"),
    "masked": (lambda x, w: F.linear(x, w.tril()), (4, 4), "tril, linear"),
    "cat": (lambda x, w: F.linear(x, torch.cat([w, w])), (6, 4), "cat, linear"),
    "every_second_row": (lambda x, w: F.linear(x, w[::2]), (6, 4), "linear"),
    "tensordot": (lambda x, w: torch.tensordot(x, w, dims=1), (4, 6), "tensordot"),
    "bilinear": (lambda x, w: F.bilinear(x, x, w), (5, 4, 4), "bilinear"),
    "einsum_of_three": (lambda x, w: torch.einsum("bsd,de,bse->bs", x, w, x), (4, 4), "einsum"),
    "batches": (lambda x, w: x @ w, (2, 1, 4, 6), "matmul"),
}


@in_both
@pytest.mark.parametrize("form", NO_PATTERN)
def test_another_form_has_a_reason(form: str, whole: bool) -> None:
    build, shape, operators = NO_PATTERN[form]
    reason = said(Product(build, shape), whole)["w"]
    assert f"in a form that has no pattern, `{operators}`" in reason
    assert "leave it out of `targets`" in reason


OTHERS: dict[str, tuple[Any, tuple[int, ...], str]] = {
    "attention": (lambda x, w: F.scaled_dot_product_attention(w.expand(2, 3, 4), x, x), (3, 4), "scaled_dot_product"),
    "kernel": (lambda x, w: F.conv1d(x.mT, w), (6, 4, 3), "the kernel (6, 4, 3) of a convolution"),
    "inverse": (lambda x, w: torch.linalg.inv(w) * x.sum(), (4, 4), "`linalg_inv`"),
    "distances": (torch.cdist, (5, 4), "`cdist`"),
}


@in_both
@pytest.mark.parametrize("form", OTHERS)
def test_what_is_no_linear_is_said_and_not_asked_for(form: str, whole: bool) -> None:
    """A warning about linears that are left out would be an error here."""
    build, shape, text = OTHERS[form]
    assert text in said(Product(build, shape), whole)["w"]
    if whole:
        return
    assert set(melora_fx.sites(melora_fx.rewrite(Product(build, shape), "all-linear", CONFIG))) == {"fc"}
    with pytest.raises(ValueError, match=r"names `w`, a parameter .* that is no linear \(") as refusal:
        melora_fx.match(Product(build, shape), "w", CONFIG)
    assert text in str(refusal.value)


SILENT: dict[str, tuple[Any, tuple[int, ...]]] = {
    "added": (lambda x, w: x + w, (3, 4)),
    "added_to_a_product": (lambda x, w: torch.baddbmm(w, x, x.mT), (2, 3, 3)),
    "looked_up": (lambda x, w: w[x.long()[..., 0].clamp(0, 3)], (5, 4)),
    "scales": (lambda x, w: x * w, (3, 4)),
    "prompt": (lambda x, w: torch.cat([w.expand(2, 3, 4), x], 1), (3, 4)),
}


@in_both
@pytest.mark.parametrize("form", SILENT)
def test_what_takes_part_in_no_product_is_not_said(form: str, whole: bool) -> None:
    assert said(Product(*SILENT[form]), whole) == {"fc": ""}


@in_both
@pytest.mark.filterwarnings("ignore:The tensor attributes self.inner._flat_weights")
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.GRUCell])
def test_recurrent_weights(kind: Any, whole: bool) -> None:
    is_cell = kind is nn.GRUCell
    model = Around(kind(4, 5), (lambda h: h[:, 0]) if is_cell else (lambda h: h))
    reasons = said(model, whole)
    suffix = "" if is_cell else "_l0"
    assert reasons.keys() == {"fc", f"inner.weight_ih{suffix}", f"inner.weight_hh{suffix}"}
    del reasons["fc"]
    assert all(reason.endswith(": leave it out of `targets`") for reason in reasons.values())


@in_both
@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutions(kernel: int, whole: bool) -> None:
    reason = said(Around(nn.Conv1d(4, 6, kernel), lambda h: h.mT), whole)["inner"]
    assert reason.startswith(f"the kernel (6, 4, {kernel}) of a convolution")
    assert ("`nn.Linear`" in reason) == (kernel == 1)


class Tied(nn.Module):
    """Multiplies by the table of its embedding, and looks it up too or not."""

    def __init__(self, looks_up: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.table = nn.Embedding(6, 4)
        self.looks_up = looks_up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.fc(x)
        if self.looks_up:
            h = h + self.table(x.long()[..., 0].clamp(0, 5))
        return self.logits(h)

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        return h @ self.table.weight.T


def test_the_table_of_an_embedding() -> None:
    assert "pass `example_inputs=`" in said(Tied(False), whole=False)["table"]
    assert said(Tied(False), whole=True)["table"] == ""
    assert "looks it up too" in said(Tied(True), whole=False)["table"]
    assert "also used by `embedding`" in said(Tied(True), whole=True)["table"]


class Queries(nn.Module):
    """Passes a parameter to a child that multiplies it by a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.project = nn.Linear(4, 4)
        self.queries = nn.Parameter(randn(3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(self.queries) @ self.fc(x).mT


def test_an_input_of_a_linear() -> None:
    assert "passes it to `project`" in said(Queries(), whole=False)["queries"]
    reason = said(Queries(), whole=True)["queries"]
    assert reason.startswith("a parameter (3, 4) that is an input of `project`")


class Multiplies(nn.Module):
    """Owns nothing, and multiplies by the weight that it receives."""

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.linear(x, w)


class Held(nn.Module):
    """Has parameters that other modules or functions multiply by."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.given = nn.Parameter(randn(4, 4))
        self.listed = nn.ParameterList([nn.Parameter(randn(4, 4)) for _ in range(2)])
        self.projections = nn.Parameter(randn(12, 4))
        self.multiplies = Multiplies()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.multiplies(self.fc(x), self.given)
        h = F.linear(F.linear(h, self.listed[0]), self.listed[1] * 2)
        return F.multi_head_attention_forward(
            *(h, h, h, 4, 2, self.projections, None, None, None, False, 0.0, self.fc.weight, None)
        )[0]


def test_a_remedy_is_one() -> None:
    """If a reason names `example_inputs=`, the parameter is a site with it; otherwise no reason names it."""
    in_place, whole = said(Held(), whole=False), said(Held(), whole=True)
    named = {name for name, reason in in_place.items() if "example_inputs" in reason}
    assert named == {"given", "listed.0", "projections"}
    assert {name for name, reason in whole.items() if reason} == {"listed.1"}
    assert "in a form that has no pattern, `mul, linear`" in in_place["listed.1"]


@in_both
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning", "ignore:The tensor attributes")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm], ids=["old", "new"])
def test_a_normalised_weight_goes_by_its_name(norm: Any, whole: bool) -> None:
    reasons = said(nn.Sequential(norm(nn.Linear(4, 3)), norm(nn.Conv1d(3, 6, 3)), nn.Linear(1, 2)), whole)
    assert {name for name, reason in reasons.items() if reason} == {"0", "1"}
    assert "parametrized, pruned or normalised" in reasons["0"]
    assert "the kernel (6, 3, 3)" in reasons["1"]


class Pooled(nn.Module):
    """Has a linear that these inputs do not reach, and one whose output is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.pooler = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, pools: bool = False) -> torch.Tensor:
        self.unused(x)
        return self.pooler(self.fc(x)) if pools else self.fc(x)


def test_what_no_run_calls_is_said() -> None:
    report = melora_fx.match(Pooled(), "all-linear", CONFIG, example_inputs=(randn(2, 3, 4),), dynamic_axes={})
    ((name, reason),) = report.skipped
    assert name == "pooler"
    assert "never called with these `example_inputs`" in reason
    assert {site.name: site.is_used for site in report.sites} == {"unused": False, "fc": True}
    assert "unused unused: no output depends on it" in str(report)


class Region(nn.Module):
    """Multiplies by `w` in a region that becomes its own graph in an export."""

    def __init__(self, region: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.w = nn.Parameter(randn(4, 4))
        self.region = region

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.fc(x)
        with self.region():
            y = F.linear(x, self.w)
        return h + y


@pytest.mark.parametrize(
    "region", [lambda: torch.autocast("cpu", enabled=False), torch.no_grad], ids=["autocast", "no_grad"]
)
def test_a_region_of_a_whole_capture_is_said(region: Any) -> None:
    assert said(Region(region), whole=False) == {"fc": "", "w": ""}
    reasons = said(Region(region), whole=True)
    assert reasons["fc"] == ""
    assert "adapt it in place, without `example_inputs=`" in reasons["w"]


@pytest.mark.full
def test_the_operators_that_multiply_in_torchs_database() -> None:
    """`support.operator_database` lists them."""
    pytest.importorskip("expecttest")  # the database imports it
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [sys.executable, "-m", "support.operator_database"],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        check=False,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    cases = json.loads(ran.stdout)
    assert {case["operator"] for case in cases if case["operand"] is None} == WITHOUT_MATRICES
    found = [case for case in cases if case["operand"] is not None]
    assert len({case["operator"] for case in found if case["capture"] == "whole"}) > 35
    assert [case for case in found if not case["said"]] == []
