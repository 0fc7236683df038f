"""Everything that works on any model works on a rewritten one: moved, copied, hooked, loaded late, generating."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from support.models import (
    assert_equal,
    assert_unchanged,
    bert_classifier,
    fill,
    gpt2,
    in_situations,
    output_of,
    randn,
    tokens,
)
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import melora_fx
from melora_fx import MELoRAConfig, MELoRAError

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

CONFIG = MELoRAConfig(rank=2, num_blocks=3, alpha=3.0)
BERT_TARGETS = ["query", "value", "dense"]
GPT2_TARGETS = ["c_attn", "c_fc", "c_proj"]
situation = pytest.mark.situation


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(24, 36), nn.Tanh(), nn.Linear(36, 24))


def rewritten_mlp(**options: Any) -> nn.Sequential:
    model = melora_fx.rewrite(mlp(), "all-linear", CONFIG, **options)
    assert isinstance(model, nn.Module)
    return fill(model)


def rewritten_bert() -> nn.Module:
    return fill(melora_fx.rewrite(bert_classifier(), BERT_TARGETS, CONFIG, keep_trainable="classifier"))


def rewritten_gpt2() -> GPT2LMHeadModel:
    model = fill(melora_fx.rewrite(gpt2(), GPT2_TARGETS, CONFIG))
    assert isinstance(model, GPT2LMHeadModel)
    return model


def gradients(model: nn.Module, x: Any) -> dict[str, torch.Tensor]:
    """Returns the gradients of the adapters after one backward pass, and clears them in `model`."""
    output = model(**x) if isinstance(x, dict) else model(x)
    output = output if isinstance(output, torch.Tensor) else output.logits
    output.float().square().sum().backward()
    found = {name: value.grad.clone() for name, value in melora_fx.adapter_parameters(model).items()}
    model.zero_grad()
    return found


@in_situations(
    "options",
    "Generation",
    "the tokens of the folded model, with and without the key-value cache",
    {"greedy": {}, "beam search": {"num_beams": 3}, "sampling": {"do_sample": True, "top_k": 5}},
)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generate(family: str, options: dict[str, Any]) -> None:
    if family == "gpt2":
        model: Any = rewritten_gpt2()
    else:
        config = LlamaConfig(
            vocab_size=50,
            hidden_size=24,
            intermediate_size=36,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            initializer_range=0.2,
            eos_token_id=49,
            pad_token_id=0,
        )
        model = fill(melora_fx.rewrite(LlamaForCausalLM(config).eval(), "all-linear", CONFIG))
    prompt = tokens(2, 6)
    prompt["attention_mask"][:] = 1

    def generated(of: Any, **more: Any) -> torch.Tensor:
        torch.manual_seed(3)
        return of.generate(**prompt, max_new_tokens=12, **options, **more)

    with melora_fx.disabled(model):
        base = generated(model)
    cached = generated(model)
    assert not torch.equal(cached, base), "the adapter must change the tokens"
    assert_equal(generated(model, use_cache=False), cached)
    assert_equal(generated(melora_fx.fold(copy.deepcopy(model))), cached)


def _without_dropout(model: nn.Module) -> Any:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing", "ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("order", ["before", "after"])
@in_situations(
    "reentrant",
    "Training",
    "the same gradients as without it, with frozen embeddings",
    {f"gradient checkpointing, `use_reentrant={flag}`": flag for flag in (True, False)},
)
@pytest.mark.parametrize(
    ("build", "targets"), [(bert_classifier, BERT_TARGETS), (gpt2, GPT2_TARGETS)], ids=["bert", "gpt2"]
)
def test_gradient_checkpointing(build: Callable[[], Any], targets: list[str], reentrant: bool, order: str) -> None:
    inputs = tokens() if build is bert_classifier else {"input_ids": tokens()["input_ids"]}
    model = _without_dropout(build())
    enable = model.gradient_checkpointing_enable
    if order == "before":
        enable({"use_reentrant": reentrant})
    model = fill(melora_fx.rewrite(model, targets, CONFIG))
    if order == "after":
        enable({"use_reentrant": reentrant})
    actual = gradients(model, inputs)
    expected = gradients(fill(melora_fx.rewrite(_without_dropout(build()), targets, CONFIG)), inputs)
    for name, value in expected.items():
        assert value.abs().max() > 0, name
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))


@situation("Training", "bfloat16 autocast", "float32 gradients, close to those without autocast")
def test_autocast() -> None:
    model = rewritten_mlp()
    x = randn(5, 24)
    expected = gradients(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        actual = gradients(model, x)
    for name, value in expected.items():
        assert actual[name].dtype == torch.float32
        assert (actual[name] - value).abs().max() < 0.05 * value.abs().max()


@pytest.mark.usefixtures("fresh_accelerator")
@situation("Training", "`accelerator.prepare`, `save_state`, `load_state`", "trains; the saved state is restored")
def test_accelerate(tmp_path) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = rewritten_mlp()
    x = randn(5, 24)
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.save_state(tmp_path)
    before = model(x)
    assert before.dtype == torch.float32
    accelerator.backward(before.square().sum())
    optimizer.step()
    assert not torch.equal(model(x), before)
    accelerator.load_state(tmp_path)
    assert_equal(model(x), before)
    melora_fx.save_adapter(accelerator.unwrap_model(model), tmp_path / "adapter")


@pytest.mark.usefixtures("fresh_accelerator")
@situation(
    "Training",
    "`accelerator.prepare` of a rewritten linear itself",
    "the wrapper stays active in `disabled`; `fold` asks to unwrap it",
)
def test_accelerate_wraps_a_rewritten_root() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    plain = nn.Linear(24, 36)
    x = randn(5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        base = plain(x).float()
    model = accelerator.prepare(fill(melora_fx.rewrite(plain, "all-linear", CONFIG)))
    adapted = model(x)
    with melora_fx.disabled(model):
        assert_equal(model(x), base)
    assert_equal(model(x), adapted)
    with pytest.raises(MELoRAError, match="`forward` was replaced on the instance after `rewrite`"):
        melora_fx.fold(model)
    inner = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    expected = inner(x)
    with melora_fx.disabled(inner):
        assert_equal(inner(x), nn.functional.linear(x, inner.weight, inner.bias))
    torch.testing.assert_close(melora_fx.fold(inner)(x), expected, rtol=1e-5, atol=1e-5)
    assert type(inner) is nn.Linear
    assert "forward" not in vars(inner)


@situation(
    "Moved and copied",
    "`model.to(dtype)`, `.double()`, `.to('meta')`",
    "A, B and the output follow the dtype and the device",
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_moved_to_a_dtype(dtype: torch.dtype) -> None:
    model = rewritten_mlp()
    x = randn(5, 24)
    expected = model(x)
    moved = copy.deepcopy(model).to(dtype)
    output = moved(x.to(dtype))
    assert output.dtype == dtype
    assert {value.dtype for value in moved.state_dict().values()} == {dtype}
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)
    assert model.to("meta")(x.to("meta")).shape == (5, 24)


def _saved(model: nn.Module, directory: Path) -> nn.Module:
    torch.save(model, directory / "model.pt")
    return torch.load(directory / "model.pt", weights_only=False)


@in_situations(
    "again",
    "Moved and copied",
    "the same bits, in separate tensors",
    {
        "`copy.deepcopy`": lambda model, _: copy.deepcopy(model),
        "pickled": lambda model, _: pickle.loads(pickle.dumps(model)),
        "`torch.save(model)`, `torch.load`": _saved,
    },
)
@pytest.mark.parametrize("build", [rewritten_mlp, rewritten_bert, rewritten_gpt2])
def test_copies(build: Callable[[], nn.Module], again: Callable[..., nn.Module], tmp_path) -> None:
    model = build()
    inputs = randn(3, 24) if build is rewritten_mlp else {"input_ids": tokens()["input_ids"]}
    copied = again(model, tmp_path)
    expected = output_of(model, inputs)
    assert_equal(output_of(copied, inputs), expected)
    fill(copied, seed=9)
    assert not torch.equal(output_of(copied, inputs), expected)
    assert_equal(output_of(model, inputs), expected)
    assert [type(module) for module in melora_fx.fold(copied).modules()] == [
        type(module) for module in melora_fx.fold(model).modules()
    ]


@situation("Called in other ways", "`torch.func.functional_call` with other A and B", "the output for these values")
def test_functional_call() -> None:
    model = rewritten_mlp()
    x = randn(5, 24)
    other = fill(copy.deepcopy(model), seed=4)
    assert_equal(torch.func.functional_call(model, other.state_dict(), (x,)), other(x))


@situation("Called in other ways", "`torch.inference_mode`, `torch.no_grad`", "the same bits")
def test_inference_mode() -> None:
    model = rewritten_mlp()
    x = randn(5, 24)
    expected = model(x)
    for context in (torch.inference_mode(), torch.no_grad()):
        with context:
            assert_equal(model(x), expected.detach())


@situation("Called in other ways", "forward and backward hooks on a site, old and new", "each is called once")
def test_hooks_of_a_site() -> None:
    model = mlp()
    calls = list[str]()

    def register(site: nn.Module, when: str) -> None:
        site.register_forward_pre_hook(lambda _, args: calls.append(f"{when} pre {tuple(args[0].shape)}"))
        site.register_forward_hook(lambda _, __, output: calls.append(f"{when} forward {tuple(output.shape)}"))
        site.register_full_backward_hook(lambda _, grads, __: calls.append(f"{when} backward {tuple(grads[0].shape)}"))

    register(model[0], "before")
    model = fill(melora_fx.rewrite(model, "all-linear", CONFIG))
    register(model[0], "after")
    model(randn(5, 24).requires_grad_()).sum().backward()
    expected = [
        f"{when} {what}"
        for what in ("pre (5, 24)", "forward (5, 36)", "backward (5, 24)")
        for when in ("before", "after")
    ]
    assert sorted(calls) == sorted(expected)
    calls.clear()
    melora_fx.fold(model)(randn(5, 24).requires_grad_()).sum().backward()
    assert sorted(calls) == sorted(expected), "a fold keeps them"


@situation(
    "Called in other ways", "`named_modules`, `isinstance`, `requires_grad_`, `apply`", "paths and classes as before"
)
def test_walking_the_modules() -> None:
    plain = bert_classifier()
    model = rewritten_bert()
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    for (_, module), (_, other) in zip(model.named_modules(), plain.named_modules(), strict=True):
        assert isinstance(module, type(other))
    assert not any(value.requires_grad for value in model.requires_grad_(False).parameters())
    assert all(value.requires_grad for value in model.requires_grad_(True).parameters())
    seen: list[int] = []
    model.apply(lambda module: seen.extend(id(value) for value in module.parameters(recurse=False)))
    assert {id(value) for value in melora_fx.adapter_parameters(model).values()} <= set(seen)


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def _double(linear: nn.Module) -> None:
    parametrize.register_parametrization(linear, "weight", Doubled())


@in_situations(
    "change",
    "Parametrized weights",
    "refused with an error that names the linear",
    {
        "a parametrization before `rewrite`": _double,
        "`parametrizations.weight_norm`": nn.utils.parametrizations.weight_norm,
        "`spectral_norm` with hooks": nn.utils.spectral_norm,
        "`prune.l1_unstructured`": lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
    },
)
def test_a_weight_that_is_made_anew_is_refused_by_name(change: Callable[[nn.Module], Any]) -> None:
    model = mlp()
    change(model[0])
    _assert_first_is_refused(model)


@pytest.mark.parametrize("change", [_double, nn.utils.parametrizations.weight_norm])
def test_a_weight_that_is_made_anew_is_refused_in_a_whole_capture(change: Callable[[nn.Module], Any]) -> None:
    model = mlp()
    change(model[0])
    _assert_first_is_refused(model, example_inputs=(randn(2, 24),))


def _assert_first_is_refused(model: nn.Module, **options: Any) -> None:
    report = melora_fx.match(model, "all-linear", CONFIG, **options)
    assert [site.name for site in report.sites] == ["2"]
    assert "is parametrized, pruned or normalised" in dict(report.skipped)["0"]
    with assert_unchanged(model), pytest.raises(MELoRAError, match="`0` cannot be adapted: its weight is parametrized"):
        melora_fx.rewrite(model, ["0"], CONFIG, **options)
    with pytest.warns(UserWarning, match="leaves 1 linears alone: `0`"):
        melora_fx.rewrite(model, "all-linear", CONFIG, **options)


@situation(
    "Parametrized weights", "a parametrization after `rewrite`", "works; copies and folds ask to remove it first"
)
def test_parametrized_after_the_rewrite() -> None:
    model = rewritten_mlp()
    x = randn(5, 24)
    site = model[0]
    expected = site(x) + x @ site.weight.t()
    _double(site)
    torch.testing.assert_close(site(x), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(MELoRAError, match="Linear that was parametrized after `rewrite` cannot be copied"):
        copy.deepcopy(model)
    with pytest.raises(MELoRAError, match="pruned or parametrized: make it permanent first"):
        melora_fx.fold(model)
    parametrize.remove_parametrizations(site, "weight")
    torch.testing.assert_close(copy.deepcopy(model)[0](x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(melora_fx.fold(model)[0](x), expected, rtol=1e-5, atol=1e-5)


@situation("After `fold`", "types, hooks, training flags, `requires_grad`, keys, attributes", "as before `rewrite`")
def test_fold_gives_the_modules_back() -> None:
    model = bert_classifier()
    layer = model.bert.encoder.layer[0]
    layer.attention.self.query.weight.requires_grad_(False)
    layer.attention.self.value.train()
    layer.attention.self.query.my_attribute = ["mine"]
    handle = layer.attention.self.query.register_forward_hook(lambda *_: None)

    def facts() -> dict[str, Any]:
        return {
            "types": [(name, type(module), module.training) for name, module in model.named_modules()],
            "grads": [(name, value.requires_grad) for name, value in model.named_parameters()],
            "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
            "hooks": {name: list(module._forward_hooks) for name, module in model.named_modules()},
            "keys": list(model.state_dict()),
        }

    before = facts()
    melora_fx.rewrite(model, BERT_TARGETS, CONFIG, keep_trainable="classifier")
    assert facts() != before
    melora_fx.fold(fill(model))
    assert facts() == before
    handle.remove()
    assert not layer.attention.self.query._forward_hooks


@situation("Loaded late", "`low_cpu_mem_usage`, `device_map='cpu'`", "works")
def test_low_cpu_mem_usage(tmp_path) -> None:
    gpt2().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, low_cpu_mem_usage=True, device_map="cpu")
    ids = {"input_ids": tokens()["input_ids"]}
    assert_equal(output_of(fill(melora_fx.rewrite(model, GPT2_TARGETS, CONFIG)), ids), output_of(rewritten_gpt2(), ids))


@situation("Loaded late", "`device_map` with offload to disk", "refused; remedy: remove the hook")
def test_disk_offload_is_refused(tmp_path) -> None:
    gpt2().save_pretrained(tmp_path / "model")
    places = {f"transformer.{name}": "cpu" for name in ("wte", "wpe", "ln_f")}
    places |= {"lm_head": "cpu", "transformer.h": "disk"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "off")
    text = r"attn\.c_attn` cannot be adapted: its `forward` was replaced on the instance"
    with assert_unchanged(model), pytest.raises(MELoRAError, match=text):
        melora_fx.rewrite(model, GPT2_TARGETS, CONFIG)


def _on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


@situation(
    "Loaded late", "rewritten on meta, then `to_empty` and the base's state", "a fresh adapter: the base's output bits"
)
@pytest.mark.parametrize("captured", [False, True], ids=["in_place", "whole"])
def test_to_empty_gives_a_fresh_adapter(captured: bool) -> None:
    plain = mlp()
    x = randn(5, 24)
    options = {"example_inputs": (x.to("meta"),)} if captured else {}
    model = melora_fx.rewrite(_on_meta(mlp), "all-linear", CONFIG, **options).to_empty(device="cpu")
    model.load_state_dict(plain.state_dict(), strict=False)
    assert_equal(model(x), plain(x))
    for site in melora_fx.sites(model).values():
        assert 0 < site.lora_a.abs().max() < 1
    assert all(value.abs().max() > 0 for name, value in gradients(model, x).items() if name.endswith("lora_b"))


@situation(
    "Loaded late",
    "rewritten on meta, then the base's state with `assign=True`",
    "a fresh adapter: the base's output bits",
)
@pytest.mark.parametrize("captured", [False, True], ids=["in_place", "whole"])
def test_assigned_weights_get_a_fresh_adapter(captured: bool) -> None:
    plain = mlp()
    x = randn(5, 24)
    options = {"example_inputs": (x.to("meta"),)} if captured else {}
    model = melora_fx.rewrite(_on_meta(mlp), "all-linear", CONFIG, **options)
    model.load_state_dict(plain.state_dict(), strict=False, assign=True)
    assert_equal(model(x), plain(x))
    assert not any(value.is_meta for value in [*model.parameters(), *model.buffers()])
    assert all(value.requires_grad for value in melora_fx.adapter_parameters(model).values())
    assert sum(value.requires_grad for value in model.parameters()) == 4


@situation("Loaded late", "rewritten on meta, then a rewritten model's state", "that model's output bits")
@pytest.mark.parametrize("assign", [False, True])
def test_a_whole_state_is_kept(assign: bool) -> None:
    source = rewritten_mlp()
    x = randn(5, 24)
    model = melora_fx.rewrite(_on_meta(mlp), "all-linear", CONFIG)
    model = model if assign else model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict(), assign=assign)
    assert_equal(model(x), source(x))


@situation("First hour", "forgotten `.train()`", "trains, without dropout, as in PyTorch")
def test_forgotten_train() -> None:
    config = MELoRAConfig(rank=2, num_blocks=3, dropout=0.5)
    model = fill(melora_fx.rewrite(mlp().eval(), "all-linear", config))
    x = randn(5, 24)
    assert_equal(model(x), model(x))
    assert all(value.abs().max() > 0 for value in gradients(model, x).values())
    assert not torch.equal(model.train()(x), model(x))


@situation("First hour", "`rewrite` after `torch.compile(model)`", "refused; remedy: the reverse order")
def test_rewrite_after_compile() -> None:
    model = torch.compile(mlp(), backend="eager")
    with (
        assert_unchanged(model),
        pytest.raises(MELoRAError, match=r"already compiled: `rewrite` it first, then call `torch\.compile`"),
    ):
        melora_fx.rewrite(model, "all-linear", CONFIG)


@situation("First hour", "`rewrite` after `model.compile()`, in place", "works: it is recompiled")
@pytest.mark.slow
def test_rewrite_after_compile_in_place() -> None:
    model = bert_classifier()
    inputs = tokens()
    model.compile(backend="eager")
    model(**inputs)
    model = fill(melora_fx.rewrite(model, BERT_TARGETS, CONFIG, keep_trainable="classifier"))
    assert_equal(output_of(model, inputs), output_of(rewritten_bert(), inputs))


@situation("First hour", "an optimizer made before `rewrite`", "a warning at its first step")
def test_a_stale_optimizer_is_noticed() -> None:
    model = mlp()
    x = randn(5, 24)
    stale = torch.optim.AdamW(model.parameters())
    melora_fx.rewrite(model, ["0"], CONFIG, keep_trainable=["2"])
    fresh = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad])
    everything = torch.optim.AdamW(model.parameters())
    head = torch.optim.SGD(model[2].parameters())
    with pytest.warns(UserWarning, match="this AdamW holds the weights of 1 linears, which `rewrite` has frozen"):
        stale.step()
    for optimizer in (stale, fresh, everything, head):  # a warning would be an error here
        model(x).sum().backward()
        optimizer.step()
    other = torch.optim.AdamW(model.parameters())
    melora_fx.fold(model)
    other.step()


@situation("First hour", "`fold` on a `torch.compile` wrapper", "folds the model inside")
def test_fold_of_a_wrapper() -> None:
    model = rewritten_mlp()
    x = randn(5, 24)
    compiled = torch.compile(model, backend="eager")
    expected = compiled(x)
    assert melora_fx.fold(compiled) is compiled
    assert not melora_fx.sites(model)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)


@situation("First hour", "`rewrite` twice", "refused; remedies: `fold`, `load_adapter`")
def test_rewrite_twice() -> None:
    model = rewritten_mlp()
    with (
        assert_unchanged(model),
        pytest.raises(MELoRAError, match=r"already rewritten .*: `fold` it first, or `load_adapter`"),
    ):
        melora_fx.rewrite(model, "all-linear", CONFIG)


@situation("First hour", "`save_pretrained` of a rewritten model", "a warning that names `save_adapter` and `fold`")
def test_save_pretrained_warns(tmp_path) -> None:
    with pytest.warns(UserWarning, match="use `melora_fx.save_adapter`, or call `melora_fx.fold` first"):
        rewritten_gpt2().save_pretrained(tmp_path)


@situation("First hour", "nothing in the loss is trained (inside `disabled`)", "PyTorch's error, no crash")
def test_backward_inside_disabled() -> None:
    model = rewritten_mlp()
    with melora_fx.disabled(model), pytest.raises(RuntimeError, match="does not require grad"):
        model(randn(5, 24)).sum().backward()


@situation(
    "First hour", "`load_adapter` of a PEFT folder, a missing one, one of another model", "one error that says which"
)
def test_load_adapter_of_something_else(tmp_path) -> None:
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "peft" / "adapter_model.safetensors").write_bytes(b"")
    melora_fx.save_adapter(rewritten_gpt2(), tmp_path / "other")
    for folder, text in (("peft", "peft"), ("nothing", "nothing"), ("other", "is for another model")):
        model = mlp()
        with assert_unchanged(model), pytest.raises(MELoRAError, match=text):
            melora_fx.load_adapter(model, tmp_path / folder)
