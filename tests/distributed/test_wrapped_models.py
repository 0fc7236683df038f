"""Refusals for models that are wrapped or sharded, and verbs that work through a wrapper."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import sharded
from support.models import assert_unchanged, in_situations
from support.processes import run_processes
from support.sharded import adapted, llama, token_ids, with_config
from torch import nn

import melora_fx
from benchmarks.training.spread import fully_sharded, make_mesh, tensor_parallel
from exporters import export_onnx
from melora_fx import MELoRAConfig, MELoRAError

situation = pytest.mark.situation


@pytest.fixture
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _fsdp1(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "FullyShardedDataParallel": _fsdp1,
    "FSDPModule": lambda model: fully_sharded(model, make_mesh(1)),
    "DataParallel": nn.DataParallel,
}


@pytest.mark.usefixtures("_one_process")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning:torch")
@in_situations(
    "name",
    "Several processes",
    "refused with an error that names the wrapper",
    {f"`rewrite` inside `{name}`": name for name in WRAPPERS},
)
def test_rewrite_of_a_wrapped_model(name: str) -> None:
    wrapped: Any = WRAPPERS[name](llama())
    models = [wrapped, nn.Sequential(wrapped)]
    if name not in ("DataParallel", "FullyShardedDataParallel"):
        inner = wrapped.module if name == "DistributedDataParallel" else wrapped
        models += [inner.model, inner.model.layers[0], torch.compile(wrapped)]
    for model in models:
        for function in (melora_fx.rewrite, melora_fx.match):
            with assert_unchanged(model), pytest.raises(MELoRAError, match=rf"is wrapped by {name}.*then wrap it"):
                function(model, "all-linear")


@pytest.mark.usefixtures("_one_process")
@situation("Several processes", "`export_onnx` of a sharded model", "refused; remedy: export from one process")
def test_a_sharded_model_is_not_exported(tmp_path) -> None:
    model = fully_sharded(adapted(), make_mesh(1))
    with pytest.raises(MELoRAError, match="sharded over processes"):
        export_onnx(model, {"input_ids": token_ids()}, tmp_path / "model.onnx")


@pytest.mark.usefixtures("_one_process")
def test_what_is_inside_of_ddp_is_refused_as_long_as_that_is_there() -> None:
    wrapped = nn.parallel.DistributedDataParallel(llama())
    model = wrapped.module
    with pytest.raises(MELoRAError, match="the model is wrapped by DistributedDataParallel"):
        melora_fx.rewrite(model, "all-linear")
    del wrapped
    assert melora_fx.sites(melora_fx.rewrite(model, "all-linear"))


@pytest.mark.usefixtures("_one_process")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning:torch")
@in_situations(
    "name",
    "Several processes",
    "refused; remedy: call them on the model inside",
    {f"verbs on `{name}`": name for name in ("FullyShardedDataParallel", "DataParallel")},
)
def test_verbs_on_opaque_wrappers(name: str, tmp_path) -> None:
    wrapped: Any = WRAPPERS[name](adapted())
    verbs: list[Callable[[Any], object]] = [
        melora_fx.fold,
        melora_fx.check_fold,
        lambda model: melora_fx.save_adapter(model, tmp_path),
        lambda model: melora_fx.load_adapter(model, tmp_path),
        lambda model: melora_fx.disabled(model).__enter__(),
    ]
    for verb in verbs:
        with pytest.raises(MELoRAError, match=rf"the model is a {name}, which keeps its own parameters"):
            verb(wrapped)


def _refusal(config: MELoRAConfig, plan: dict[str, Any], settings: dict[str, Any]) -> str:
    from torch.distributed.tensor.parallel import parallelize_module

    model = adapted(config, **settings)
    with pytest.raises(MELoRAError) as error:
        parallelize_module(model, make_mesh(dist.get_world_size()), plan)
    return str(error.value)


@pytest.mark.situation(
    "Several processes",
    "tensor parallelism with `split`, `lowering='plain'` or a `num_blocks` that does not fit",
    "refused with an error that names the site and the setting",
)
@pytest.mark.default_cases("RowwiseParallel-num_blocks")
@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            with_config(num_blocks=3, rank=2),
            r"`num_blocks` \(=3\) does not fit 2 processes: .* multiple of 2",
        ),
        (with_config(split=2), r"`split` \(=2\) cuts it differently"),
        (with_config(lowering="plain"), r"`lowering` \(='plain'\) would gather in every step"),
    ],
    ids=["num_blocks", "split", "plain"],
)
@pytest.mark.parametrize("style", ["ColwiseParallel", "RowwiseParallel"])
def test_what_tensor_parallelism_cannot_have(config: MELoRAConfig, text: str, style: str) -> None:
    from torch.distributed.tensor import parallel

    name = "model.layers.0.mlp.up_proj" if style == "ColwiseParallel" else "model.layers.0.mlp.down_proj"
    settings = {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 6, "num_key_value_heads": 3}
    for found in run_processes(2, _refusal, config, {name: getattr(parallel, style)()}, settings):
        assert re.search(rf"`{name}`: .*{text}", found)


def _with_dropout() -> tuple[float, float, float]:
    model: Any = tensor_parallel(adapted(with_config(dropout=0.5)), make_mesh(dist.get_world_size()))
    ids = token_ids()

    def loss() -> float:
        with torch.no_grad():
            return float(model(input_ids=ids, labels=ids).loss)

    model.train()
    first, second = loss(), loss()
    model.eval()
    return first, second, loss()


@pytest.mark.slow
def test_dropout_under_tensor_parallelism_follows_the_mode() -> None:
    model, ids = adapted(with_config(dropout=0.5)).eval(), token_ids()
    expected = model(input_ids=ids, labels=ids).loss.item()
    for first, second, own in run_processes(2, _with_dropout):
        assert first != second
        assert own == pytest.approx(expected, abs=1e-5)


def _trained_with_norms() -> list[str]:
    import warnings

    model = tensor_parallel(adapted(), make_mesh(dist.get_world_size()), sequence=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sharded.train(model, token_ids(), 1, parameters=trained)
        model.requires_grad_(False)
    return [str(each.message) for each in caught if "rewrite" in str(each.message)]


@pytest.mark.slow
def test_norms_that_sequence_parallelism_makes_trainable_are_named() -> None:
    for warned in run_processes(2, _trained_with_norms):
        (text,) = warned
        assert "`model.layers.0.input_layernorm.weight`" in text
        assert "SequenceParallel" in text


def _cut_by_hand() -> str:
    """Replaces a weight by a DTensor without its rewritten module; returns the text of the error."""
    from torch.distributed.tensor import Shard, distribute_tensor

    model: Any = melora_fx.rewrite(nn.Sequential(nn.Linear(8, 8)), "all-linear", MELoRAConfig(rank=2, num_blocks=2))
    weight = distribute_tensor(model[0].weight.detach(), make_mesh(dist.get_world_size()), [Shard(0)])
    model[0]._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(MELoRAError) as error:
        model(torch.ones(2, 8))
    return str(error.value)


def test_a_weight_that_was_cut_past_the_module_is_refused() -> None:
    for text in run_processes(2, _cut_by_hand):
        assert "was sharded after `rewrite`, but its adapter was not" in text


def _in_the_order_of_transformers(folder: str, config: MELoRAConfig) -> list[float]:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, tp_plan="auto")
    ids = token_ids()

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids).logits

    base = logits()
    plain = type(model.model.layers[0].self_attn.q_proj)
    melora_fx.rewrite(model, "all-linear", config)
    assert torch.equal(logits(), base)
    sharded.put_adapter(model, config)
    losses = sharded.train(model, ids)
    trained = logits()
    torch.testing.assert_close(model(input_ids=ids).logits, trained)  # with gradients it takes another path
    with melora_fx.disabled(model):
        assert torch.equal(logits(), base)
    melora_fx.save_adapter(model, f"{folder}/adapter")
    with melora_fx.folded(model):
        merged = logits()
    melora_fx.fold(model)
    assert torch.equal(logits(), merged)
    torch.testing.assert_close(merged, trained, atol=1e-5, rtol=0)
    assert type(model.model.layers[0].self_attn.q_proj) is plain
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("num_blocks", [4, 2])
@situation("Several processes", "`from_pretrained(tp_plan=…)` → `rewrite`", "as in one process")
def test_rewritten_after_transformers_has_sharded(num_blocks: int, tmp_path) -> None:
    config = with_config(num_blocks=num_blocks, rank=2)
    llama(attention_bias=True).save_pretrained(tmp_path)
    alone = adapted(config, attention_bias=True)
    sharded.put_adapter(alone, config)
    losses = sharded.train(alone, token_ids())
    for own in run_processes(4, _in_the_order_of_transformers, str(tmp_path), config):
        assert own == pytest.approx(losses, abs=1e-5)


def _experts(folder: str) -> str:
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(folder, tp_plan="auto")
    with assert_unchanged(model), pytest.raises(MELoRAError, match="gate_up_proj") as error:
        melora_fx.rewrite(model, "gate_up_proj", with_config(rank=2))
    with pytest.warns(UserWarning, match="leaves 2 linears alone: `model.layers.0.mlp.experts.gate_up_proj`"):
        melora_fx.rewrite(model, "all-linear", with_config(rank=2))
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    return str(error.value)


@pytest.mark.slow
@pytest.mark.situation(
    "Several processes", "experts that transformers has sharded", 'refused; "all-linear" leaves them out with a warning'
)
def test_experts_that_transformers_has_sharded_are_refused(tmp_path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": sharded.VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    MixtralForCausalLM(MixtralConfig(**sizes, **heads)).save_pretrained(tmp_path)
    for text in run_processes(2, _experts, str(tmp_path)):
        assert "its `forward` was replaced on the instance" in text
