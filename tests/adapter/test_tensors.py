"""A and B of one site: initial values, names, parts, matrices of a stack, scaling, and another rank."""

import pytest
import torch
from support.models import assert_equal, assert_near, dense_update, randn, tower

import melora_fx
from melora_fx import MELoRAConfig
from melora_fx.adapter.tensors import AdapterTensors
from melora_fx.config import INITS

IN = 24
OUT = 36
CONFIGS = {
    "ranks_alphas": MELoRAConfig(rank=(1, 4, 2), num_blocks=3, alpha=(1.0, 0.5, 4.0)),
    "split_sizes": MELoRAConfig(rank=(3, 1), num_blocks=2, split=(24, 12)),
    "one_block": MELoRAConfig(rank=2, num_blocks=1),
}


def filled(config: MELoRAConfig, num_experts: int = 1) -> AdapterTensors:
    """Returns random A and B, with zeros in the padding of ranks."""
    shapes = config.adapter_shapes(IN, OUT, num_experts)
    adapter = AdapterTensors(config, randn(*shapes[0], seed=1), randn(*shapes[1], seed=2))
    for block, rank in enumerate(config.ranks * num_experts):
        adapter.lora_a[block].unflatten(0, (-1, max(config.ranks)))[:, rank:] = 0
        adapter.lora_b[block, :, rank:] = 0
    return adapter


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_another_rank_is_the_same_update_and_comes_back(config: MELoRAConfig) -> None:
    adapter = filled(config)
    larger = adapter.with_rank(7)
    num_parts = len(config.parts(OUT))
    assert tuple(larger.lora_a.shape) == (config.num_blocks, num_parts * 7, IN // config.num_blocks)
    assert tuple(larger.lora_b.shape) == (config.num_blocks, OUT // config.num_blocks, 7)
    for (a, b), (larger_a, larger_b) in zip(adapter.parts(torch.float64), larger.parts(torch.float64), strict=True):
        assert_near(larger_b @ larger_a, b @ a)
    back = larger.with_rank(max(config.ranks))
    assert_equal(back.factors, adapter.factors)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parts_are_the_rows_of_the_dense_update(config: MELoRAConfig) -> None:
    adapter = filled(config)
    rows = [torch.block_diag(*(b @ a)) for a, b in adapter.parts(torch.float64)]
    assert_near(torch.cat(rows), dense_update(config, adapter.lora_a, adapter.lora_b))


def test_each_matrix_of_a_stack_has_its_own() -> None:
    config = CONFIGS["ranks_alphas"]
    stack = filled(config, num_experts=4)
    assert stack.num_experts == 4
    assert [tuple(own.lora_a.shape) for own in stack.by_matrix()] == [config.adapter_shapes(IN, OUT)[0]] * 4
    assert_equal(torch.cat([own.scaled_b() for own in stack.by_matrix()]), stack.scaled_b())
    assert next(stack.by_matrix()).lora_a.data_ptr() == stack.lora_a.data_ptr()


def test_names_lead_there_and_back() -> None:
    adapter = filled(CONFIGS["one_block"])
    named = adapter.named("encoder.0.query")
    assert list(named) == ["encoder.0.query.lora_a", "encoder.0.query.lora_b"]
    back = AdapterTensors.of("encoder.0.query", adapter.config, named | {"head.weight": randn(2, 2)})
    assert back.lora_a is adapter.lora_a
    assert back.lora_b is adapter.lora_b


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("split", "num_experts"), [(None, 1), (3, 1), (None, 4), (3, 4)])
def test_orthogonal_rows_are_orthonormal_in_each_block(dtype: torch.dtype, split: int | None, num_experts: int) -> None:
    config = MELoRAConfig(rank=(1, 4, 2), num_blocks=3, split=split, init="orthogonal")
    adapter = AdapterTensors.new(config, IN, OUT, num_experts=num_experts, dtype=dtype)
    assert adapter.lora_a.dtype == dtype
    assert not adapter.lora_b.any()
    blocks = adapter.lora_a.view(num_experts, 3, split or 1, 4, IN // 3)
    for block, rank in enumerate(config.ranks):
        for rows in blocks[:, block].flatten(0, 1):
            assert_near(rows[:rank] @ rows[:rank].mT, torch.eye(rank, dtype=torch.float64))
            assert not rows[rank:].any()
    distinct = {tuple(rows[0].tolist()) for rows in blocks.flatten(0, 2)}
    assert len(distinct) == num_experts * 3 * (split or 1)


def test_orthogonal_columns_are_orthonormal_where_the_rank_is_above_them() -> None:
    config = MELoRAConfig(rank=11, num_blocks=3, init="orthogonal")
    for rows in AdapterTensors.new(config, IN, OUT).lora_a:
        assert_near(rows.mT @ rows, torch.eye(IN // 3, dtype=torch.float64))


@pytest.mark.parametrize("init", INITS)
def test_initial_values_follow_the_seed(init: str) -> None:
    config = MELoRAConfig(rank=2, num_blocks=3, init=init)
    torch.manual_seed(3)
    first = AdapterTensors.new(config, IN, OUT).lora_a
    assert not torch.equal(AdapterTensors.new(config, IN, OUT).lora_a, first)
    torch.manual_seed(3)
    assert_equal(AdapterTensors.new(config, IN, OUT).lora_a, first)


@pytest.mark.parametrize("init", INITS)
def test_the_meta_device_has_shapes_and_no_values(init: str) -> None:
    config = MELoRAConfig(rank=2, num_blocks=3, init=init)
    adapter = AdapterTensors.new(config, IN, OUT, device="meta")
    assert adapter.lora_a.is_meta
    assert (tuple(adapter.lora_a.shape), tuple(adapter.lora_b.shape)) == config.adapter_shapes(IN, OUT)


def test_rewrite_starts_as_the_configuration_says() -> None:
    model = melora_fx.rewrite(tower(), "all-linear", MELoRAConfig(rank=2, num_blocks=3, init="orthogonal"))
    for site in melora_fx.sites(model).values():
        for rows in site.lora_a.detach():
            assert_near(rows @ rows.mT, torch.eye(2, dtype=torch.float64))
