"""A and B of one site: names, parts, matrices of a stack, scaling, and another rank."""

import pytest
import torch
from support.models import assert_equal, assert_near, dense_update, randn

from melora_fx import MELoRAConfig
from melora_fx.adapter.tensors import AdapterTensors

IN = 24
OUT = 36
CONFIGS = {
    "ranks_alphas": MELoRAConfig(rank=(1, 4, 2), num_blocks=3, alpha=(1.0, 0.5, 4.0)),
    "split_sizes": MELoRAConfig(rank=(3, 1), num_blocks=2, split=(24, 12)),
    "one_block": MELoRAConfig(rank=2, num_blocks=1),
}


def filled(config: MELoRAConfig, num_experts: int = 1) -> AdapterTensors:
    """Random ones, zero where a rank is padded."""
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
