"""Less usual models, wrappers and calls: results as in one process, or an error that names the cause."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.processes import run_processes
from support.sharded import CONFIG, adapted, fill, llama, put_adapter, token_ids, whole, with_config
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import melora_fx
from benchmarks.training.spread import fully_sharded, make_mesh, tensor_parallel
from melora_fx import MELoRAConfig, MELoRAError

TWO = MELoRAConfig(rank=2, num_blocks=2, alpha=4.0)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(tensor).clone() for name, tensor in model.state_dict().items()}


def sharded_root(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=make_mesh(dist.get_world_size()))


class Heads(nn.Module):
    """Multiplies by a weight of three dimensions, (in, heads, out / heads)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(32, 4, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bd,dnh->bnh", x, self.weight)


def _stored_otherwise(kind: str) -> Any:
    """Returns a model whose weights are not stored as (out, in)."""
    torch.manual_seed(0)
    if kind == "GPT-2":
        plain: Any = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=96, n_positions=16)).eval()
        return fill(melora_fx.rewrite(plain, ["c_attn", "c_proj"], CONFIG))
    return fill(melora_fx.rewrite(nn.Sequential(Heads()), "all-linear", CONFIG))


def _folded_weights(kind: str) -> tuple[dict[str, torch.Tensor], bool]:
    model = sharded_root(_stored_otherwise(kind))
    before = state(model)
    with melora_fx.folded(model):
        pass
    is_back = all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())
    return state(melora_fx.fold(model)), is_back


@pytest.mark.default_cases("GPT-2")
@pytest.mark.parametrize("kind", ["GPT-2", "three dimensions"])
def test_weights_that_lie_otherwise_are_folded_as_they_lie(kind: str) -> None:
    alone = state(melora_fx.fold(_stored_otherwise(kind)))
    for found, is_back in run_processes(2, _folded_weights, kind):
        assert is_back
        assert all(torch.equal(found[name], tensor) for name, tensor in alone.items())


def _load_after_a_forward(folder: str) -> str:
    model = sharded_root(adapted())
    logits(model)  # the root holds whole parameters now
    with pytest.raises(MELoRAError) as error:
        melora_fx.load_adapter(model, f"{folder}/{dist.get_rank()}")
    return str(error.value)


@pytest.mark.slow
def test_processes_agree_after_a_forward_too(tmp_path) -> None:
    for rank in range(2):
        melora_fx.save_adapter(fill(adapted(), seed=rank), tmp_path / str(rank))
    for text in run_processes(2, _load_after_a_forward, str(tmp_path)):
        assert "differs between the processes" in text


def _refusals_under_fsdp(folder: str) -> list[str]:
    texts = []
    tied = sharded_root(
        fill(melora_fx.rewrite(llama(tie_word_embeddings=True), ["lm_head", "q_proj"], CONFIG)),
    )
    before = state(tied)
    with pytest.raises(MELoRAError) as error:
        melora_fx.fold(tied, untie=True)
    texts.append(str(error.value))
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(tied).items())
    model = sharded_root(adapted())
    logits(model)
    for verb in (melora_fx.fold, melora_fx.check_fold, lambda part: melora_fx.save_adapter(part, folder)):
        with pytest.raises(MELoRAError) as error:
            verb(model.model)
        texts.append(str(error.value))
    return texts


@pytest.mark.slow
def test_what_fsdp_would_lose_is_refused(tmp_path) -> None:
    for untied, *parts in run_processes(2, _refusals_under_fsdp, str(tmp_path)):
        assert "`untie` cannot give it its own weight" in untied
        assert all("belong to a module above this" in text for text in parts)


def _loaded_on_meta(state_of_base: dict[str, torch.Tensor]) -> torch.Tensor:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    with torch.device("meta"):
        model: Any = melora_fx.rewrite(llama(), "all-linear", CONFIG)
    tensor_parallel(model, make_mesh(dist.get_world_size()))
    set_model_state_dict(model, state_of_base, options=StateDictOptions(full_state_dict=True, strict=False))
    for name, buffer in llama().model.rotary_emb.named_buffers():
        setattr(model.model.rotary_emb, name, buffer)
    assert all(whole(site.lora_a).any() for site in melora_fx.sites(model).values())
    return logits(put_adapter(model))


@pytest.mark.slow
def test_a_state_that_is_assigned_to_sharded_meta_parameters() -> None:
    alone = logits(adapted())
    for found in run_processes(2, _loaded_on_meta, llama().state_dict()):
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)


def _assigned_under_fsdp() -> tuple[torch.Tensor, torch.Tensor]:
    model = fully_sharded(adapted(), make_mesh(dist.get_world_size()))
    before = logits(model)
    held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(held, assign=True)
    return before, logits(model)


@pytest.mark.slow
def test_a_sharded_state_is_assigned_under_fsdp() -> None:
    for before, after in run_processes(2, _assigned_under_fsdp):
        assert torch.equal(before, after)


def _by_hand(num_blocks: int, with_adapter: bool, with_input: bool) -> str:
    """Shards the parameters of a linear without one of torch's styles; returns the text of the error."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = make_mesh(dist.get_world_size())
    model: Any = nn.Sequential(nn.Linear(16, 16))
    model = fill(melora_fx.rewrite(model, "all-linear", with_config(num_blocks=num_blocks, rank=2)))
    for name in ("weight", "bias", *(["lora_a", "lora_b"] if with_adapter else [])):
        parameter = getattr(model[0], name)
        cut = nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)]), parameter.requires_grad)
        model[0].register_parameter(name, cut)
    x = torch.ones(2, 16)
    with pytest.raises(MELoRAError) as error:
        model(DTensor.from_local(x, mesh, [Replicate()]) if with_input else x)
    return str(error.value)


@pytest.mark.default_cases("4")
@pytest.mark.parametrize("num_blocks", [1, 4])
def test_what_is_cut_by_hand_must_be_cut_whole(num_blocks: int) -> None:
    for text in run_processes(2, _by_hand, num_blocks, False, True):
        assert "its adapter was not" in text
    for text in run_processes(2, _by_hand, num_blocks, True, False):
        assert "an input that is not a DTensor" in text


def _whole_capture(verb: str) -> bool:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    x = torch.ones(2, 8)
    expected = plain(x)
    model = sharded_root(melora_fx.rewrite(plain, "all-linear", TWO, example_inputs=(x,)))
    model(x).sum().backward()
    getattr(melora_fx, verb)(model)
    return torch.equal(model(x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["fold", "unload"])
def test_a_whole_capture_under_fsdp_runs_without_its_adapters(verb: str) -> None:
    assert run_processes(2, _whole_capture, verb) == [True, True]


def _without_the_base(verb: str) -> bool:
    """Calls a verb on a model of which only the adapters are sharded; returns whether its logits are correct."""
    from torch.distributed.fsdp import fully_shard

    model = adapted()
    own = {id(parameter) for parameter in melora_fx.adapter_parameters(model).values()}
    base = {parameter for parameter in model.parameters() if id(parameter) not in own}
    for layer in model.model.layers:
        fully_shard(layer, mesh=make_mesh(2), ignored_params=base)
    fully_shard(model, mesh=make_mesh(2), ignored_params=base)
    before = logits(model)
    getattr(melora_fx, verb)(model)
    return torch.allclose(logits(model), before if verb == "fold" else logits(llama()), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["fold", "unload"])
def test_groups_of_adapters_alone_are_gone_with_them(verb: str) -> None:
    assert run_processes(2, _without_the_base, verb) == [True, True]


def _kept_head(folder: str) -> list[float]:
    from support.sharded import train
    from transformers import LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(folder, tp_plan="auto")
    melora_fx.rewrite(model, "q_proj", TWO, keep_trainable=["lm_head"])
    losses = train(model, token_ids(), parameters=[p for p in model.parameters() if p.requires_grad])
    melora_fx.save_adapter(model, f"{folder}/adapter")
    return losses


@pytest.mark.slow
def test_a_kept_head_under_tensor_parallelism(tmp_path) -> None:
    from support.sharded import train

    llama().save_pretrained(tmp_path)
    alone: Any = melora_fx.rewrite(llama(), "q_proj", TWO, keep_trainable=["lm_head"])
    expected = train(alone, token_ids(), parameters=[alone.lm_head.weight])  # B is zero: the adapter hardly matters
    for losses in run_processes(2, _kept_head, str(tmp_path)):
        assert losses[0] == pytest.approx(expected[0], abs=1e-5)
        assert losses[-1] < losses[0]
    again: Any = melora_fx.load_adapter(llama(), tmp_path / "adapter")
    assert not torch.equal(again.lm_head.weight, llama().lm_head.weight)


def _ddp_around_a_part(folder: str) -> str:
    model: Any = adapted()
    model.model = nn.parallel.DistributedDataParallel(model.model)
    with pytest.raises(MELoRAError) as error:
        melora_fx.save_adapter(model, folder)
    return str(error.value)


@pytest.mark.slow
def test_ddp_around_a_part_is_refused(tmp_path) -> None:
    for text in run_processes(2, _ddp_around_a_part, str(tmp_path)):
        assert "`model` is wrapped by DistributedDataParallel" in text


def _masks() -> list[torch.Tensor]:
    """Returns sums of what dropout keeps of inputs of ones, in this process's half of the blocks."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    config = MELoRAConfig(rank=1, num_blocks=2, alpha=1.0, dropout=0.5)
    model: Any = melora_fx.rewrite(nn.Sequential(nn.Linear(64, 2, bias=False)), "all-linear", config)
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].lora_a.copy_(torch.arange(32.0) ** 2)  # so that the sum shows what was dropped
        model[0].lora_b.fill_(1.0)
    parallelize_module(model, make_mesh(2), {"0": ColwiseParallel()})
    torch.manual_seed(0)
    return list(model.train()(torch.ones(8, 64)).detach())


@pytest.mark.slow
def test_processes_drop_other_inputs_of_other_blocks() -> None:
    first, second = run_processes(2, _masks)
    assert not torch.equal(torch.stack(first), torch.stack(second))
