"""MELoRAConfig: what it accepts, what it computes, and the text of each refusal."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from melora_fx import MELoRAConfig
from melora_fx.config import INITS


def test_defaults_are_the_documented_ones():
    config = MELoRAConfig()
    fields = (config.rank, config.num_blocks, config.alpha, config.dropout, config.use_rslora, config.split)
    assert fields == (8, 8, 16.0, 0.0, False, None)
    assert (config.init, config.lowering) == ("kaiming", "auto")


def test_is_frozen_and_hashable_also_from_lists():
    config = MELoRAConfig(rank=[1, 2], num_blocks=2, alpha=[1.0, 2.0], split=[12, 24])
    assert (config.rank, config.alpha, config.split) == ((1, 2), (1.0, 2.0), (12, 24))
    assert hash(config) == hash(MELoRAConfig(rank=(1, 2), num_blocks=2, alpha=(1.0, 2.0), split=(12, 24)))
    with pytest.raises(AttributeError):
        config.rank = 3


@pytest.mark.parametrize(
    ("fields", "ranks", "scalings"),
    [
        pytest.param({"rank": 4, "num_blocks": 2, "alpha": 8}, (4, 4), (2.0, 2.0), id="numbers"),
        pytest.param({"rank": (1, 4), "num_blocks": 2, "alpha": 8.0}, (1, 4), (8.0, 2.0), id="rank_list"),
        pytest.param({"rank": 2, "num_blocks": 2, "alpha": (1.0, 3.0)}, (2, 2), (0.5, 1.5), id="alpha_list"),
        pytest.param(
            {"rank": (1, 4), "num_blocks": 2, "alpha": (1.0, 3.0), "use_rslora": True},
            (1, 4),
            (1.0, 1.5),
            id="rslora_lists",
        ),
        pytest.param({"rank": 1, "num_blocks": 1, "alpha": 1e-3}, (1,), (1e-3,), id="one_block"),
    ],
)
def test_ranks_and_scalings(fields, ranks, scalings):
    config = MELoRAConfig(**fields)
    assert config.ranks == ranks
    assert config.total_rank == sum(ranks)
    assert config.scalings == pytest.approx(scalings, rel=1e-15)


@given(
    num_blocks=st.integers(1, 6),
    data=st.data(),
    use_rslora=st.booleans(),
    dropout=st.floats(0, 0.99),
    init=st.sampled_from(list(INITS)),
)
def test_dict_round_trip(num_blocks, data, use_rslora, dropout, init):
    ranks = st.integers(1, 64)
    alphas = st.floats(1e-6, 1e6)
    config = MELoRAConfig(
        rank=data.draw(ranks | st.lists(ranks, min_size=num_blocks, max_size=num_blocks)),
        num_blocks=num_blocks,
        alpha=data.draw(alphas | st.lists(alphas, min_size=num_blocks, max_size=num_blocks)),
        dropout=dropout,
        use_rslora=use_rslora,
        split=data.draw(st.none() | ranks | st.lists(ranks, min_size=1, max_size=4)),
        init=init,
    )
    back = MELoRAConfig.from_dict(config.to_dict())
    assert back == config
    assert (back.ranks, back.scalings) == (config.ranks, config.scalings)
    assert math.isclose(sum(config.ranks), config.total_rank)


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        pytest.param({"rank": 0}, ValueError, r"`rank` \(=0\) must be at least 1", id="rank_zero"),
        pytest.param({"rank": -2}, ValueError, r"`rank` \(=-2\) must be at least 1", id="rank_negative"),
        pytest.param({"rank": 1.5}, TypeError, r"`rank` must be an int, got 1\.5", id="rank_float"),
        pytest.param({"rank": True}, TypeError, "`rank` must be an int, got True", id="rank_bool"),
        pytest.param({"rank": "8"}, TypeError, "`rank` must be an int, got '8'", id="rank_str"),
        pytest.param({"rank": None}, TypeError, "`rank` must be an int", id="rank_none"),
        pytest.param(
            {"rank": [1, 2], "num_blocks": 3}, ValueError, r"`rank` lists 2 .*`num_blocks` \(=3\)", id="rank_list_short"
        ),
        pytest.param({"rank": [], "num_blocks": 1}, ValueError, "`rank` lists 0", id="rank_list_empty"),
        pytest.param(
            {"rank": [1, 0], "num_blocks": 2}, ValueError, r"`rank\[1\]` \(=0\) must be at least 1", id="rank_list_zero"
        ),
        pytest.param(
            {"rank": [1, True], "num_blocks": 2}, TypeError, r"`rank\[1\]` must be an int", id="rank_list_bool"
        ),
        pytest.param({"num_blocks": 0}, ValueError, r"`num_blocks` \(=0\) must be at least 1", id="blocks_zero"),
        pytest.param({"num_blocks": True}, TypeError, "`num_blocks` must be an int", id="blocks_bool"),
        pytest.param({"num_blocks": 2.0}, TypeError, "`num_blocks` must be an int", id="blocks_float"),
        pytest.param({"alpha": float("nan")}, ValueError, r"`alpha` \(=nan\) must be positive", id="alpha_nan"),
        pytest.param({"alpha": float("inf")}, ValueError, r"`alpha` \(=inf\) must be .*finite", id="alpha_inf"),
        pytest.param({"alpha": 0}, ValueError, r"`alpha` \(=0\) must be positive", id="alpha_zero"),
        pytest.param({"alpha": -1.0}, ValueError, r"`alpha` \(=-1\.0\) must be positive", id="alpha_negative"),
        pytest.param({"alpha": True}, TypeError, "`alpha` must be a number, got True", id="alpha_bool"),
        pytest.param({"alpha": "16"}, TypeError, "`alpha` must be a number, got '16'", id="alpha_str"),
        pytest.param(
            {"alpha": [1.0], "num_blocks": 2}, ValueError, r"`alpha` lists 1 .*`num_blocks` \(=2\)", id="alpha_short"
        ),
        pytest.param(
            {"alpha": [1.0, float("nan")], "num_blocks": 2}, ValueError, r"`alpha\[1\]` \(=nan\)", id="alpha_list_nan"
        ),
        pytest.param({"dropout": 1.0}, ValueError, r"`dropout` \(=1\.0\) must be at least 0", id="dropout_one"),
        pytest.param({"dropout": -0.1}, ValueError, r"`dropout` \(=-0\.1\)", id="dropout_negative"),
        pytest.param({"dropout": float("nan")}, ValueError, r"`dropout` \(=nan\)", id="dropout_nan"),
        pytest.param({"dropout": "0.1"}, TypeError, "`dropout` must be a number, got '0.1'", id="dropout_str"),
        pytest.param({"dropout": True}, TypeError, "`dropout` must be a number, got True", id="dropout_bool"),
        pytest.param({"split": 0}, ValueError, r"`split` \(=0\) must be at least 1", id="split_zero"),
        pytest.param({"split": True}, TypeError, "`split` must be an int", id="split_bool"),
        pytest.param({"split": []}, ValueError, "`split` must name at least one part", id="split_empty"),
        pytest.param({"split": [12, 0]}, ValueError, r"`split\[1\]` \(=0\)", id="split_list_zero"),
        pytest.param({"split": "qkv"}, TypeError, "`split` must be an int", id="split_str"),
        pytest.param({"init": "zeros"}, ValueError, "`init` .*'zeros'.*'kaiming', 'gaussian', 'orthogonal'", id="init"),
        pytest.param(
            {"init": ["kaiming"]}, ValueError, r"`init` \(=\['kaiming'\]\) must be one of", id="init_of_another_type"
        ),
        pytest.param({"lowering": "fast"}, ValueError, "`lowering` .*'fast'.*'auto'", id="lowering"),
        pytest.param({"use_rslora": "no"}, TypeError, "`use_rslora` must be a bool, got 'no'", id="rslora_str"),
    ],
)
def test_refusals_name_the_field_and_its_rule(fields, error, text):
    with pytest.raises(error, match=text):
        MELoRAConfig(**fields)


@pytest.mark.parametrize(
    ("split", "parts"),
    [
        pytest.param(None, (36,), id="none"),
        pytest.param(3, (12, 12, 12), id="count"),
        pytest.param((24, 6, 6), (24, 6, 6), id="sizes"),
    ],
)
def test_parts(split, parts):
    assert MELoRAConfig(split=split).parts(36) == parts


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        pytest.param({"num_blocks": 3}, None, id="fits"),
        pytest.param({"num_blocks": 5}, r"`in_features` \(=24\) and `out_features` \(=36\) .*\(=5\)", id="both"),
        pytest.param({"num_blocks": 8}, r"^`out_features` \(=36\) must be divisible by `num_blocks` \(=8\)", id="out"),
        pytest.param({"num_blocks": 9}, r"^`in_features` \(=24\) must be divisible by", id="in"),
        pytest.param({"num_blocks": 1, "split": 5}, r"`out_features` \(=36\) .* `split` \(=5\)", id="split_count"),
        pytest.param({"num_blocks": 1, "split": (30, 5)}, r"`split` .*must add up to .*36.*not 35", id="split_sum"),
        pytest.param({"num_blocks": 3, "split": (30, 4, 2)}, r"`split\[1\]` \(=4\) and `split\[2\]`", id="split_size"),
    ],
)
def test_misfit(fields, text):
    reason = MELoRAConfig(**fields).misfit(24, 36)
    if text is None:
        assert reason is None
    else:
        assert reason is not None
        assert re.search(text, reason), reason


def test_misfit_lists_the_divisors_that_would_do():
    assert MELoRAConfig(num_blocks=5).misfit(24, 36).endswith("these would do: 1, 2, 3, 4, 6, 12")
    assert MELoRAConfig(num_blocks=3, split=(30, 4, 2)).misfit(24, 36).endswith("these would do: 1, 2")
