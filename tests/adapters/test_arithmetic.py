"""Sums, means and multiples of adapters: against dense sums in float64, and bit-equal if nothing is rounded."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.adapter_files import edit_header, header_of
from support.made_adapters import IN, OUT, made_adapter, updates_of
from support.models import bert_classifier, fill, output_of, randn, site_update, tokens

import melora_fx
from exporters import add_adapters, average_adapters, scale_adapter
from exporters.adapters.lora_form import loras_of
from melora_fx import MELoRAConfig, MELoRAError
from melora_fx.saving.adapter_file import read_adapter

PLAIN = MELoRAConfig(rank=2, num_blocks=3, alpha=5.0)
RANKS = MELoRAConfig(rank=(1, 3, 2), num_blocks=3, alpha=(4.0, 1.5, 7.0))
STABLE = MELoRAConfig(rank=(2, 1, 4), num_blocks=3, alpha=3.0, use_rslora=True)
PAIRS = {
    "equal": (PLAIN, PLAIN, {}),
    "ranks": (PLAIN, RANKS, {}),
    "rslora": (STABLE, RANKS, {}),
    "rslora twice": (STABLE, STABLE, {}),
    "one block": (MELoRAConfig(rank=3, num_blocks=1), MELoRAConfig(rank=1, num_blocks=1, alpha=9.0), {}),
    "split": (MELoRAConfig(rank=2, num_blocks=3, split=2), MELoRAConfig(rank=(3, 1, 2), num_blocks=3, split=2), {}),
    "uneven split": (
        MELoRAConfig(rank=2, num_blocks=3, split=(12, 24)),
        MELoRAConfig(rank=1, num_blocks=3, split=(12, 24), use_rslora=True),
        {},
    ),
    "experts": (PLAIN, RANKS, {"num_experts": 4}),
    "experts with parts": (
        MELoRAConfig(rank=2, num_blocks=2, split=2),
        MELoRAConfig(rank=(1, 3), num_blocks=2, split=2, alpha=3.0),
        {"num_experts": 3},
    ),
    "bfloat16": (PLAIN, RANKS, {"dtype": torch.bfloat16}),
    "float16": (STABLE, PLAIN, {"dtype": torch.float16}),
    "float64": (STABLE, RANKS, {"dtype": torch.float64}),
}


def pair(folder: Path, case: str = "equal") -> tuple[Path, Path]:
    first, second, options = PAIRS[case]
    return (
        made_adapter(folder / "a", {"up": first, "gate": first}, seed=1, **options),
        made_adapter(folder / "b", {"gate": second, "own": second}, seed=2, **options),
    )


def weighted_sum(adapters: dict[Path, float]) -> dict[str, torch.Tensor]:
    """Returns Σ w_k Δ_k of each site, in float64."""
    total: dict[str, torch.Tensor] = {}
    for folder, weight in adapters.items():
        for name, update in updates_of(folder).items():
            total[name] = total.get(name, torch.zeros_like(update)) + weight * update
    return total


def assert_updates(folder: Path, expected: dict[str, torch.Tensor], rtol: float = 2e-7) -> None:
    """Checks the updates up to float32's rounding of B, relative to the largest value."""
    actual = updates_of(folder)
    assert [*actual] == [*expected]
    for name, update in expected.items():
        torch.testing.assert_close(actual[name], update, rtol=0, atol=rtol * float(update.abs().max()))


@pytest.mark.default_cases("weighted-*", "sum-equal")
@pytest.mark.parametrize("case", PAIRS)
@pytest.mark.parametrize("weights", [(1, 1), (0.7, -0.3)], ids=["sum", "weighted"])
def test_a_sum_is_the_sum_of_the_updates(case: str, weights: tuple[float, float], tmp_path: Path) -> None:
    adapters = dict(zip(pair(tmp_path, case), weights, strict=True))
    add_adapters(adapters, tmp_path / "sum")
    assert_updates(tmp_path / "sum", weighted_sum(adapters))
    first, second, _ = PAIRS[case]
    configs = read_adapter(tmp_path / "sum").configs
    assert configs["gate"].ranks == tuple(map(sum, zip(first.ranks, second.ranks, strict=True)))
    assert (configs["up"].ranks, configs["own"].ranks) == (first.ranks, second.ranks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight", [1.0, 0.3], ids=str)
def test_equal_scalings_keep_bits_and_dtype(dtype: torch.dtype, weight: float, tmp_path: Path) -> None:
    """Also if different ranks, alphas and signs make them equal."""
    other = MELoRAConfig(rank=4, num_blocks=3, alpha=10.0)
    a = made_adapter(tmp_path / "a", {"up": PLAIN}, seed=1, dtype=dtype)
    b = made_adapter(tmp_path / "b", {"up": other}, seed=2, dtype=dtype)
    add_adapters({a: weight, b: -weight}, tmp_path / "sum")
    own, first, second = (read_adapter(folder).tensors_of("up") for folder in (tmp_path / "sum", a, b))
    torch.testing.assert_close(own.lora_b, torch.cat([first.lora_b, -second.lora_b], 2), rtol=0, atol=0)
    torch.testing.assert_close(own.lora_a, torch.cat([first.lora_a, second.lora_a], 1), rtol=0, atol=0)
    assert own.config.scalings == tuple(weight * scaling for scaling in PLAIN.scalings)


def test_a_ratio_that_a_narrow_dtype_holds_keeps_it(tmp_path: Path) -> None:
    a, b = (
        made_adapter(tmp_path / name, {"up": PLAIN}, seed=seed, dtype=torch.bfloat16)
        for seed, name in enumerate(["a", "b"])
    )
    add_adapters({a: 1.5, b: 0.375}, tmp_path / "quarter")
    add_adapters({a: 1.5, b: 0.35}, tmp_path / "odd")
    dtypes = [read_adapter(tmp_path / name).tensors["up.lora_b"].dtype for name in ("quarter", "odd")]
    assert dtypes == [torch.bfloat16, torch.float32]
    assert_updates(tmp_path / "quarter", weighted_sum({a: 1.5, b: 0.375}), rtol=1e-15)


def test_dtypes_meet_in_the_wider_one(tmp_path: Path) -> None:
    a = made_adapter(tmp_path / "a", {"up": PLAIN}, seed=1, dtype=torch.bfloat16)
    b = made_adapter(tmp_path / "b", {"up": PLAIN}, seed=2, dtype=torch.float16)
    add_adapters({a: 1, b: 1}, tmp_path / "sum")
    assert {tensor.dtype for tensor in read_adapter(tmp_path / "sum").tensors.values()} == {torch.float32}
    assert_updates(tmp_path / "sum", weighted_sum({a: 1, b: 1}), rtol=1e-15)


@pytest.mark.parametrize("config", [PLAIN, RANKS, STABLE], ids=["plain", "ranks", "rslora"])
def test_multiples_keep_the_bits(config: MELoRAConfig, tmp_path: Path) -> None:
    folder = made_adapter(tmp_path / "a", {"up": config})
    before = read_adapter(folder).tensors_of("up")
    for factor in (-0.3, 3, 0):
        scale_adapter(folder, factor, tmp_path / "out")
        own = read_adapter(tmp_path / "out").tensors_of("up")
        assert torch.equal(own.lora_a, before.lora_a)
        assert torch.equal(own.lora_b, before.lora_b * ((factor > 0) - (factor < 0)))
        assert_updates(tmp_path / "out", {"up": factor * updates_of(folder)["up"]}, rtol=1e-15)
    scale_adapter(folder, 1, tmp_path / "out")
    assert read_adapter(tmp_path / "out").sha256 == read_adapter(folder).sha256


def test_one_alone_is_a_multiple(tmp_path: Path) -> None:
    folder = made_adapter(tmp_path / "a", {"up": STABLE})
    add_adapters({str(folder): -0.3}, tmp_path / "sum")
    scale_adapter(str(folder), -0.3, tmp_path / "scaled")
    assert read_adapter(tmp_path / "sum").sha256 == read_adapter(tmp_path / "scaled").sha256


def test_weights_of_zero_leave_an_adapter_out(tmp_path: Path) -> None:
    a, b = pair(tmp_path)
    add_adapters({a: 2.0, b: 0}, tmp_path / "sum")
    assert_updates(tmp_path / "sum", weighted_sum({a: 2.0}))


def test_two_spellings_of_a_folder_count_twice(tmp_path: Path) -> None:
    a, b = pair(tmp_path)
    add_adapters({a: 1, b: 1, str(b / ".." / "a"): 1}, tmp_path / "sum")
    assert_updates(tmp_path / "sum", weighted_sum({a: 2, b: 1}))


def test_means_of_updates(tmp_path: Path) -> None:
    a, b = pair(tmp_path, "ranks")
    c = made_adapter(tmp_path / "c", {"up": STABLE}, seed=3)
    average_adapters([a, str(b), c], tmp_path / "mean")
    assert_updates(tmp_path / "mean", weighted_sum({a: 1 / 3, b: 1 / 3, c: 1 / 3}))
    average_adapters((folder for folder in (a, a)), tmp_path / "same")
    assert_updates(tmp_path / "same", updates_of(a), rtol=1e-15)


SCALES = st.floats(-3, 3).filter(lambda value: abs(value) > 1e-3)


@pytest.mark.slow
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=st.sampled_from([*PAIRS]), weights=st.tuples(SCALES, SCALES), factor=SCALES)
def test_the_order_of_sums_and_multiples_is_free(
    case: str, weights: tuple[float, float], factor: float, tmp_path: Path
) -> None:
    a, b = pair(tmp_path, case)
    add_adapters({a: weights[0], b: weights[1]}, tmp_path / "sum")
    scale_adapter(tmp_path / "sum", factor, tmp_path / "scaled sum")
    scale_adapter(a, factor, tmp_path / "fa")
    scale_adapter(b, factor, tmp_path / "fb")
    add_adapters({tmp_path / "fa": weights[0], tmp_path / "fb": weights[1]}, tmp_path / "sum of scaled")
    expected = {name: factor * update for name, update in weighted_sum({a: weights[0], b: weights[1]}).items()}
    assert_updates(tmp_path / "scaled sum", expected)
    assert_updates(tmp_path / "sum of scaled", expected)


@pytest.mark.slow
@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, 2.0)], ids=str)
def test_it_is_what_peft_concatenates(weights: tuple[float, float], tmp_path: Path) -> None:
    import peft

    configs = [MELoRAConfig(rank=3, num_blocks=1, alpha=4.0), MELoRAConfig(rank=2, num_blocks=1, alpha=5.0)]
    folders = [
        made_adapter(tmp_path / name, {"up": config}, seed=seed)
        for seed, (name, config) in enumerate(zip("ab", configs, strict=True))
    ]
    model = torch.nn.ModuleDict({"up": torch.nn.Linear(IN, OUT)})
    theirs: Any = None
    for folder, config in zip(folders, configs, strict=True):
        options = peft.LoraConfig(r=config.ranks[0], lora_alpha=config.alpha, target_modules=["up"])
        if theirs is None:
            theirs = peft.PeftModel(model, options, folder.name)
        else:
            theirs.add_adapter(folder.name, options)
        (lora,) = loras_of(read_adapter(folder).tensors_of("up"))
        layer = theirs.base_model.model["up"]
        with torch.no_grad():
            layer.lora_A[folder.name].weight.copy_(lora.lora_a)
            layer.lora_B[folder.name].weight.copy_(lora.lora_b / config.scalings[0])
    theirs.add_weighted_adapter([*"ab"], [*weights], "sum", combination_type="cat")
    add_adapters(dict(zip(folders, weights, strict=True)), tmp_path / "sum")
    expected = theirs.base_model.model["up"].get_delta_weight("sum").detach().double()
    assert_updates(tmp_path / "sum", {"up": expected}, rtol=1e-6)


HEAD = {"head.weight": randn(3, OUT), "head.steps": torch.tensor(7)}
OTHER = {"head.weight": randn(3, OUT, seed=9), "head.steps": torch.tensor(7)}
LABELS = {"class": "Tower", "num_labels": 3, "labels": ["x", "y", "z"]}


def test_a_common_head_is_kept_with_its_labels(tmp_path: Path) -> None:
    a = made_adapter(tmp_path / "a", {"up": PLAIN}, kept=HEAD, model=LABELS)
    b = made_adapter(tmp_path / "b", {"up": PLAIN}, seed=1, kept=HEAD, model=LABELS)
    c = made_adapter(tmp_path / "c", {"up": PLAIN}, seed=2, model={"class": "Other", "num_labels": 2})
    add_adapters({c: 1, a: 0.5, b: 0.25}, tmp_path / "sum")
    found = read_adapter(tmp_path / "sum")
    assert found.model == LABELS
    assert found.kept == ("head.weight", "head.steps")
    assert all(torch.equal(value, HEAD[name]) for name, value in found.kept_tensors().items())
    assert found.fingerprints == read_adapter(a).fingerprints
    assert header_of(tmp_path / "sum")["sites"]["up"]["is_transposed"] is False
    scale_adapter(a, 1, tmp_path / "same")
    assert read_adapter(tmp_path / "same").sha256 == read_adapter(a).sha256


def test_facts_of_models_are_those_that_all_agree_on(tmp_path: Path) -> None:
    a = made_adapter(tmp_path / "a", {"up": PLAIN}, model=LABELS | {"pad_token_id": 0})
    b = made_adapter(tmp_path / "b", {"up": PLAIN}, model={"class": "Tower", "num_labels": 2})
    add_adapters({a: 1, b: 1}, tmp_path / "sum")
    assert read_adapter(tmp_path / "sum").model == {"class": "Tower", "pad_token_id": 0}


def test_means_of_heads(tmp_path: Path) -> None:
    a = made_adapter(tmp_path / "a", {"up": PLAIN}, kept=HEAD, model=LABELS)
    b = made_adapter(tmp_path / "b", {"up": PLAIN}, kept=OTHER, model=LABELS)
    average_adapters([a, b], tmp_path / "mean")
    mean = read_adapter(tmp_path / "mean").kept_tensors()
    expected = (HEAD["head.weight"].double() + OTHER["head.weight"].double()) / 2
    torch.testing.assert_close(mean["head.weight"], expected.float(), rtol=0, atol=0)
    assert mean["head.steps"] == 7
    with pytest.raises(
        MELoRAError, match=r"trained `head.weight`, `head.steps` in full.*`average_adapters` takes their mean"
    ):
        add_adapters({a: 1, b: 1}, tmp_path / "sum")


@pytest.mark.parametrize(
    ("kept", "model", "text"),
    [
        (None, LABELS, "they have trained different modules in full, nothing and `head.weight`, `head.steps`"),
        (OTHER | {"head.steps": torch.tensor(8)}, LABELS, "`head.steps` holds integers that differ"),
        (OTHER | {"head.weight": randn(2, OUT)}, LABELS, r"`head.weight` has the shapes \(2, 36\) and \(3, 36\)"),
        (OTHER, LABELS | {"labels": ["y", "x", "z"]}, "are in a different order"),
    ],
    ids=["none", "integers", "shapes", "labels"],
)
def test_heads_without_a_mean_are_refused(kept: Any, model: Any, text: str, tmp_path: Path) -> None:
    a = made_adapter(tmp_path / "a", {"up": PLAIN}, kept=HEAD, model=LABELS)
    b = made_adapter(tmp_path / "b", {"up": PLAIN}, kept=kept, model=model)
    with pytest.raises(MELoRAError, match=text):
        average_adapters([a, b], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


@pytest.mark.slow
def test_a_sum_loads_trains_folds_like_any_adapter(tmp_path: Path) -> None:
    configs = [MELoRAConfig(rank=2, num_blocks=3), MELoRAConfig(rank=(1, 2, 1), num_blocks=3, alpha=3.0)]
    expected = {}
    for seed, config in enumerate(configs):
        model = fill(melora_fx.rewrite(bert_classifier(num_layers=1), ["query", "output.dense"], config), seed)
        melora_fx.save_adapter(model, tmp_path / str(seed))
        expected |= {
            name: expected.get(name, 0) + (0.7, 0.3)[seed] * site_update(site)
            for name, site in melora_fx.sites(model).items()
        }
    add_adapters({tmp_path / "0": 0.7, tmp_path / "1": 0.3}, tmp_path / "sum")
    model = melora_fx.load_adapter(bert_classifier(num_layers=1), tmp_path / "sum")
    for name, site in melora_fx.sites(model).items():
        torch.testing.assert_close(site_update(site), expected[name], rtol=1e-5, atol=1e-6)
    outputs = output_of(model, tokens())
    other = melora_fx.rewrite(bert_classifier(num_layers=1), ["query", "output.dense"], MELoRAConfig(5, num_blocks=3))
    torch.testing.assert_close(output_of(melora_fx.load_adapter(other, tmp_path / "sum"), tokens()), outputs)
    model(**tokens()).logits.sum().backward()
    assert all(parameter.grad.any() for parameter in melora_fx.adapter_parameters(model).values())
    torch.testing.assert_close(output_of(melora_fx.fold(model), tokens()), outputs, rtol=1e-4, atol=1e-4)


OTHERS = {
    "base": ({"base": 1}, PLAIN, "64 of 64 sampled values differ"),
    "blocks": (
        {},
        MELoRAConfig(num_blocks=4),
        "24 → 36 features in num_blocks 4, not 24 → 36 features in num_blocks 3",
    ),
    "split": ({}, MELoRAConfig(num_blocks=3, split=2), r"num_blocks 3, split \(18, 18\), not 24 → 36 features"),
    "stack": ({"num_experts": 2}, PLAIN, r"its shape is \[2, 36, 24\]"),
    "direction": ({"entry": {"is_transposed": True}}, PLAIN, "has the other orientation"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_adapters_that_do_not_fit_each_other_are_refused(case: str, tmp_path: Path) -> None:
    """Also if the first one does not describe its base: the others are compared with each other."""
    options, config, text = OTHERS[case]
    a = made_adapter(tmp_path / "a", {"up": PLAIN})
    b = made_adapter(tmp_path / "b", {"up": config}, **options)
    unknown = made_adapter(tmp_path / "unknown", {"up": PLAIN})
    edit_header(
        unknown,
        lambda header: header["sites"]["up"]["base"].update(
            without_values=header["sites"]["up"]["base"].pop("values") and "meta"
        ),
    )
    for folders in ((a, b), (unknown, a, b)):
        with pytest.raises(MELoRAError, match=f"`up` of `.*b`: .*{text}.*compared with `.*a`|{text}"):
            add_adapters(dict.fromkeys(folders, 1.0), tmp_path / "out")
        with pytest.raises(MELoRAError, match=text):
            average_adapters(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    add_adapters({unknown: 1, a: 1}, tmp_path / "out")
    assert read_adapter(tmp_path / "out").fingerprints == read_adapter(a).fingerprints


def test_adapters_without_a_common_model_are_refused(tmp_path: Path) -> None:
    a = made_adapter(tmp_path / "a", {"up": PLAIN})
    b = made_adapter(tmp_path / "b", {"bert.up": PLAIN}, model={"class": "BertModel"})
    with pytest.raises(MELoRAError, match="no model has the sites of both"):
        add_adapters({a: 1, b: 1}, tmp_path / "out")


def test_a_file_that_says_nothing_of_its_base_is_refused(tmp_path: Path) -> None:
    a = made_adapter(tmp_path / "a", {"up": PLAIN})

    def as_format_1(header: dict[str, Any]) -> None:
        header["format_version"] = 1
        del header["sha256"], header["sites"]["up"]["base"]

    edit_header(a, as_format_1)
    with pytest.raises(MELoRAError, match="load it into its model and save it again"):
        scale_adapter(a, 2.0, tmp_path / "out")
    assert not (tmp_path / "out").exists()


BAD = {
    "nan": (lambda a, out: scale_adapter(a, math.nan, out), ValueError, r"`factor` \(=nan\) must be finite"),
    "huge": (lambda a, out: scale_adapter(a, 10**400, out), ValueError, r"`factor` \(=inf\) must be finite"),
    "bool": (lambda a, out: scale_adapter(a, True, out), TypeError, "`factor` must be a number, got True"),
    "text": (lambda a, out: add_adapters({a: "1"}, out), TypeError, "the weight of `.*a` must be a number, got '1'"),
    "inf": (
        lambda a, out: add_adapters({a: math.inf}, out),
        ValueError,
        r"the weight of `.*a` \(=inf\) must be finite",
    ),
    "range": (
        lambda a, out: scale_adapter(a, 1e-40, out),
        MELoRAError,
        "update of `up` would be out of range: `alpha`",
    ),
    "overflow": (
        lambda a, out: add_adapters({a: 1e308, str(a): 1e308}, out),
        MELoRAError,
        "update of `up` would be out of range: `alpha`",
    ),
    "empty": (lambda a, out: add_adapters({}, out), ValueError, "`adapters` is empty"),
    "zeros": (lambda a, out: add_adapters({a: 0.0}, out), ValueError, "all weights are 0"),
    "list": (lambda a, out: add_adapters([a], out), TypeError, "must be a dict, folder → weight, got list"),
    "none": (lambda a, out: average_adapters([], out), ValueError, "`adapter_dirs` is empty"),
    "one": (lambda a, out: average_adapters(a, out), TypeError, "must be several folders, got one"),
    "missing": (lambda a, out: add_adapters({a: 1, a / "no": 1}, out), MELoRAError, "no` is not an adapter folder"),
    "input": (lambda a, out: add_adapters({a: 1}, a), MELoRAError, "is the folder that is read, or in it"),
    "spelled": (lambda a, out: scale_adapter(a, 2, a / ".." / "a"), MELoRAError, "is the folder that is read"),
    "inside": (
        lambda a, out: average_adapters([a, a], a / "mean"),
        MELoRAError,
        "is the folder that is read, or in it",
    ),
    "head": (lambda a, out: scale_adapter(a.parent / "head", 0.5, out), MELoRAError, "has trained `head.weight`"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_error_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    call, error, text = BAD[case]
    a = made_adapter(tmp_path / "a", {"up": PLAIN})
    made_adapter(tmp_path / "head", {"up": PLAIN}, kept=HEAD)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(error, match=text):
        call(a, tmp_path / "out")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "out").exists()
