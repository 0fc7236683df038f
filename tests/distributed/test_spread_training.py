"""Several processes train as one does: losses, gradients, and the data that they send each other."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import sharded
from support.processes import run_processes
from support.sharded import CONFIG, adapted, averaged, gradients, own_rows, spread_with, token_ids, train, with_config

import melora_fx
from benchmarks.training.spread import MODES, fully_sharded, make_mesh
from melora_fx import MELoRAConfig

CONFIGS = {
    "blocks": CONFIG,
    "more blocks": with_config(num_blocks=8, rank=2),
    "two blocks": with_config(num_blocks=2, rank=[3, 2]),
    "one block": with_config(num_blocks=1, rank=4),
    "activation": with_config(lowering="activation"),
    "plain": with_config(lowering="plain"),
}
CASES = [(mode, 4, name) for mode in MODES for name in ("blocks", "more blocks", "two blocks")]
CASES += [(mode, 2, name) for mode in MODES for name in ("blocks", "one block") if mode != "FSDP and TP"]
CASES += [(mode, 2, name) for mode in ("FSDP by layer", "FSDP by linear") for name in ("activation", "plain")]


def _trained(mode: str, config: MELoRAConfig, settings: dict[str, Any]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Returns the mean losses of three steps, and the whole gradients of a fourth."""
    model, ids = spread_with(mode, adapted(config, **settings), token_ids())
    losses = averaged(train(model, ids))
    model(input_ids=ids, labels=ids).loss.backward()
    return losses, gradients(model)


def _alone(config: MELoRAConfig, settings: dict[str, Any]) -> tuple[list[float], dict[str, torch.Tensor]]:
    model, ids = adapted(config, **settings), token_ids()
    losses = train(model, ids)
    model(input_ids=ids, labels=ids).loss.backward()
    return losses, gradients(model)


@pytest.mark.slow_cases("*-4-two blocks", "*-2-one block", "*TP-4-blocks", "*-activation")
@pytest.mark.default_cases("FSDP by layer-2-plain", "DDP-2-blocks")
@pytest.mark.situation(
    "Several processes",
    "DDP, FSDP2, tensor and sequence parallelism, FSDP2 × tensor",
    "losses and gradients as in one process",
)
@pytest.mark.parametrize(("mode", "number", "name"), CASES, ids=["-".join(map(str, case)) for case in CASES])
def test_processes_train_as_one(mode: str, number: int, name: str) -> None:
    config = CONFIGS[name]
    settings: dict[str, Any] = {"attention_bias": True, "mlp_bias": True} if name == "blocks" else {}
    losses, alone = _alone(config, settings)
    for own, found in run_processes(number, _trained, mode, config, settings):
        assert own == pytest.approx(losses, abs=1e-5)
        assert found.keys() == alone.keys()
        for each in alone:
            torch.testing.assert_close(found[each], alone[each], atol=1e-5, rtol=0)


def _communication(mode: str, config: MELoRAConfig | None) -> dict[str, int]:
    """Counts the collectives of a step by name; without a configuration, those of the frozen model."""
    from torch.distributed.tensor.debug import CommDebugMode

    model: Any = sharded.llama()
    if config is None:
        model.requires_grad_(False)
        model.model.layers[0].input_layernorm.weight.requires_grad_(True)  # so that gradients reach the first layer
    else:
        model = sharded.fill(melora_fx.rewrite(model, "all-linear", config))
        model.model.layers[0].input_layernorm.weight.requires_grad_(True)
    model, ids = spread_with(mode, model, token_ids())
    with CommDebugMode() as counted:
        model(input_ids=ids, labels=ids).loss.backward()
    return {str(operator): number for operator, number in counted.get_comm_counts().items()}


@pytest.mark.situation(
    "Several processes",
    "tensor parallelism, `num_blocks` a multiple of the number of processes",
    "no more collectives than the base",
)
@pytest.mark.default_cases("TP-2")
@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("mode", ["TP", "TP and sequence"])
def test_blocks_of_their_own_add_no_collective(mode: str, number: int) -> None:
    frozen = run_processes(number, _communication, mode, None)[0]
    assert frozen
    assert run_processes(number, _communication, mode, CONFIG)[0] == frozen


@pytest.mark.slow
def test_fewer_blocks_add_up_two_gradients_a_linear() -> None:
    frozen = run_processes(4, _communication, "TP", None)[0]
    own = run_processes(4, _communication, "TP", CONFIGS["two blocks"])[0]
    (operator,) = frozen
    assert own == {operator: frozen[operator] + 2 * 14}


def _reduced_bytes(config: MELoRAConfig) -> int:
    model, _ = spread_with("TP", adapted(config), token_ids())
    return sum(site.num_reduced_bytes for site in melora_fx.sites(model).values())


@pytest.mark.slow
def test_sites_say_what_is_added() -> None:
    assert run_processes(4, _reduced_bytes, CONFIG) == [0] * 4
    few = CONFIGS["two blocks"]
    factors = melora_fx.adapter_parameters(adapted(few)).values()
    assert run_processes(4, _reduced_bytes, few) == [sum(4 * factor.numel() for factor in factors)] * 4


def _sent_by_ddp() -> tuple[int, int]:
    """Returns the number of elements that a step reduces, and the number in the adapter."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    model, ids = spread_with("DDP", adapted(), token_ids())
    sizes = []

    def count(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sizes.append(bucket.buffer().numel())
        return allreduce_hook(state, bucket)

    model.register_comm_hook(None, count)
    model(input_ids=ids, labels=ids).loss.backward()
    return sum(sizes), sum(parameter.numel() for parameter in melora_fx.adapter_parameters(model).values())


def test_ddp_reduces_the_gradients_of_adapters_alone() -> None:
    for sent, own in run_processes(2, _sent_by_ddp):
        assert sent == own


def _with_options_of_ddp(option: str) -> list[float]:
    ids = token_ids(8)
    if option == "compiled outside":
        model: Any = torch.compile(sharded.distributed_data_parallel(adapted()), backend="aot_eager")
        return averaged(train(model, own_rows(ids)))
    if option == "compiled inside":
        model = sharded.distributed_data_parallel(torch.compile(adapted(), backend="aot_eager"))
        return averaged(train(model, own_rows(ids)))
    if option == "static_graph":
        return averaged(train(sharded.distributed_data_parallel(adapted(), static_graph=True), own_rows(ids)))
    model = sharded.distributed_data_parallel(adapted())
    optimizer = torch.optim.AdamW(melora_fx.adapter_parameters(model).values(), lr=1e-2, eps=1e-3)
    losses = []
    for _ in range(3):
        first, second = own_rows(ids).chunk(2)
        with model.no_sync():
            one = model(input_ids=first, labels=first).loss / 2
            one.backward()
        other = model(input_ids=second, labels=second).loss / 2
        other.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(one.item() + other.item())
    return averaged(losses)


@pytest.mark.situation(
    "Several processes", "DDP compiled outside and inside, `no_sync`, `static_graph`", "losses as in one process"
)
@pytest.mark.slow
@pytest.mark.parametrize("option", ["compiled outside", "compiled inside", "static_graph", "no_sync"])
def test_ddp_in_the_usual_ways(option: str) -> None:
    losses = train(adapted(), token_ids(8))
    for own in run_processes(2, _with_options_of_ddp, option):
        assert own == pytest.approx(losses, abs=1e-5)


def _in_bfloat16(lowering: str) -> tuple[list[float], set[torch.dtype]]:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = fully_sharded(adapted(with_config(lowering=lowering)), make_mesh(dist.get_world_size()), mp_policy=policy)
    losses = averaged(train(model, own_rows(token_ids())))
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    return losses, {gradient.dtype for gradient in gradients(model).values()}


@pytest.mark.slow
@pytest.mark.situation(
    "Several processes",
    "FSDP2, bfloat16 parameters, float32 reductions, every lowering",
    "trains; gradients are float32",
)
@pytest.mark.parametrize("lowering", ["auto", "activation", "plain", "weight"])
def test_fsdp_computes_in_bfloat16_and_reduces_in_float32(lowering: str) -> None:
    losses = train(adapted(), token_ids())
    for own, dtypes in run_processes(2, _in_bfloat16, lowering):
        assert own == pytest.approx(losses, abs=2e-2)
        assert dtypes == {torch.float32}


def _compiled_layers(mode: str) -> list[float]:
    model: Any = adapted()
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    model, ids = spread_with(mode, model, token_ids())
    return averaged(train(model, ids))


@pytest.mark.slow
@pytest.mark.situation(
    "Several processes", "layers compiled under FSDP2 and tensor parallelism", "losses as in one process"
)
@pytest.mark.parametrize("mode", ["FSDP by layer", "TP"])
def test_compiled_layers(mode: str) -> None:
    losses = train(adapted(), token_ids())
    for own in run_processes(2, _compiled_layers, mode):
        assert own == pytest.approx(losses, abs=1e-5)


def _made_on_meta(mode: str, state: dict[str, torch.Tensor], folder: str) -> list[float]:
    """Rewrites on meta, shards, allocates memory, loads the base's state and the adapter; returns the losses."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    with torch.device("meta"):
        model: Any = melora_fx.rewrite(sharded.llama(), "all-linear", CONFIG)
    model, ids = spread_with(mode, model, token_ids())
    model.to_empty(device="cpu")
    rotary = sharded.llama().model.rotary_emb  # no state contains its buffers
    for name, buffer in rotary.named_buffers():
        model.model.rotary_emb.get_buffer(name).copy_(buffer)
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=False))
    assert all(not sharded.whole(site.lora_b).any() for site in melora_fx.sites(model).values())
    assert all(sharded.whole(site.lora_a).any() for site in melora_fx.sites(model).values())
    melora_fx.load_adapter(model, folder)
    return averaged(train(model, ids))


@pytest.mark.slow
@pytest.mark.situation(
    "Several processes", "rewritten on meta, sharded, `to_empty`, state and adapter loaded", "losses as in one process"
)
@pytest.mark.parametrize("mode", ["FSDP by layer", "FSDP by linear", "TP", "FSDP and TP"])
def test_meta_sharded_given_memory_and_loaded(mode: str, tmp_path) -> None:
    melora_fx.save_adapter(adapted(), tmp_path)
    losses = train(adapted(), token_ids())
    for own in run_processes(2, _made_on_meta, mode, sharded.llama().state_dict(), str(tmp_path)):
        assert own == pytest.approx(losses, abs=1e-5)


def _with_clipped_gradients(mode: str) -> tuple[list[float], float]:
    model, ids = spread_with(mode, adapted(), token_ids())
    model(input_ids=ids, labels=ids).loss.backward()
    own = list(melora_fx.adapter_parameters(model).values())
    norm = torch.nn.utils.clip_grad_norm_(own, 0.01)
    norm = sharded.whole(norm)
    return [sharded.whole(parameter.grad).norm().item() for parameter in own], norm.item()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["DDP", "FSDP by layer", "TP", "FSDP and TP"])
def test_clipped_gradients(mode: str) -> None:
    model, ids = adapted(), token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    own = list(melora_fx.adapter_parameters(model).values())
    norm = torch.nn.utils.clip_grad_norm_(own, 0.01)
    for norms, found in run_processes(4, _with_clipped_gradients, mode):
        assert found == pytest.approx(norm.item(), rel=1e-4)
        assert norms == pytest.approx([parameter.grad.norm().item() for parameter in own], rel=1e-4)
