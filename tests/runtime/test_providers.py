"""The providers that a session gets, and their options, all without a GPU."""

from pathlib import Path
from typing import Any

import pytest

from exporters.runtime.providers import CPU, CUDA, TENSORRT, ProviderChoice, choose_provider, profile_shapes

INPUTS = {"input_ids": ("batch", "sequence"), "attention_mask": ("batch", "sequence"), "scale": (3,)}
SHAPES = {"batch": (1, 8, 32), "sequence": (16, 64, 256)}
FIXED = {"batch": (8, 8, 8), "sequence": (64, 64, 64)}
GRAPH = Path("/models/model.onnx")


def choice(provider: str, **options: Any) -> ProviderChoice:
    return choose_provider(provider, GRAPH, INPUTS, **options)


def test_profiles_are_written_as_tensorrt_reads_them() -> None:
    assert profile_shapes(INPUTS, SHAPES) == {
        "trt_profile_min_shapes": "input_ids:1x16,attention_mask:1x16",
        "trt_profile_opt_shapes": "input_ids:8x64,attention_mask:8x64",
        "trt_profile_max_shapes": "input_ids:32x256,attention_mask:32x256",
    }


def test_fixed_axes_stand_in_a_profile_as_they_are() -> None:
    assert profile_shapes({"x": ("batch", 3, 224, 224)}, {"batch": (1, 2, 4)}) == {
        "trt_profile_min_shapes": "x:1x3x224x224",
        "trt_profile_opt_shapes": "x:2x3x224x224",
        "trt_profile_max_shapes": "x:4x3x224x224",
    }


def test_a_graph_of_fixed_axes_needs_no_profile() -> None:
    assert profile_shapes({"x": (2, 24)}, {}) == {}


def test_all_that_is_wrong_with_shapes_is_said_at_once() -> None:
    with pytest.raises(ValueError, match="does not fit the graph") as caught:
        profile_shapes(INPUTS, {"batch": (1, 8, 4), "length": (1, 1, 1)})
    text = str(caught.value)
    assert "no range for the axis `sequence` of input_ids, attention_mask" in text
    assert "no input has an axis `length`: the dynamic axes are batch, sequence" in text
    assert "`batch` (=(1, 8, 4)) must be (min, opt, max)" in text


@pytest.mark.parametrize("sizes", [(0, 1, 2), (2, 1, 3), (1, 2), 8, (1.0, 2.0, 3.0), ("1", "2", "3")], ids=str)
def test_ranges_that_are_none(sizes: Any) -> None:
    with pytest.raises(ValueError, match=r"must be \(min, opt, max\)"):
        choice("cpu", shapes={"batch": sizes})


def test_each_provider_takes_what_the_one_before_leaves() -> None:
    assert [name for name, _ in choice("cpu").providers] == [CPU]
    assert [name for name, _ in choice("cuda").providers] == [CUDA, CPU]
    assert [name for name, _ in choice("tensorrt").providers] == [TENSORRT, CUDA, CPU]


def test_inputs_and_outputs_are_bound_where_they_would_be_copied() -> None:
    assert [choice(name).io_binding for name in ("cpu", "cuda", "tensorrt")] == [False, True, True]
    assert [choice(name).device for name in ("cpu", "cuda", "tensorrt")] == ["cpu", "cuda", "cuda"]
    assert choice("cpu", io_binding=True).io_binding
    assert not choice("cuda", io_binding=False).io_binding


def test_float32_on_cuda_is_float32() -> None:
    assert choice("cuda").providers[0] == (CUDA, {"use_tf32": "False", "cudnn_conv_algo_search": "HEURISTIC"})
    fixed = choose_provider("cuda", GRAPH, {"x": (2, 24)})
    assert fixed.providers[0] == (CUDA, {"use_tf32": "False"}), "one size: the choice is measured once"


def test_tensorrt_caches_engines_beside_the_graph() -> None:
    options = choice("tensorrt", shapes=SHAPES).providers[0][1]
    assert options["trt_engine_cache_enable"] == options["trt_timing_cache_enable"] == "True"
    assert options["trt_engine_cache_path"] == options["trt_timing_cache_path"] == "/models/model.tensorrt"
    assert options["trt_profile_opt_shapes"] == "input_ids:8x64,attention_mask:8x64"
    assert "trt_fp16_enable" not in options


def test_a_cached_engine_is_of_one_content_and_one_range() -> None:
    cases: list[dict[str, Any]] = [
        {"content": "a"},
        {"content": "b"},
        {"content": "a", "shapes": SHAPES},
        {"content": "a", "shapes": FIXED},
    ]
    prefixes = [choice("tensorrt", **case).providers[0][1]["trt_engine_cache_prefix"] for case in cases]
    assert len(set(prefixes)) == len(cases)
    assert all(prefix.startswith("model_") for prefix in prefixes)
    assert prefixes[0] == choice("tensorrt", content="a").providers[0][1]["trt_engine_cache_prefix"]


def test_half_precision_is_that_of_the_graph() -> None:
    options = choice("tensorrt", precision="fp16").providers[0][1]
    assert options["trt_fp16_enable"] == options["trt_layer_norm_fp32_fallback"] == "True"


def test_an_ep_context_gets_its_file_and_a_relative_cache() -> None:
    options = choice("tensorrt", provider_options={"trt_dump_ep_context_model": True}).providers[0][1]
    assert options["trt_ep_context_file_path"] == "/models/model_ctx.onnx"
    assert options["trt_engine_cache_path"] == "model.tensorrt"


def test_given_options_go_before_ours() -> None:
    given = {"use_tf32": True, "gpu_mem_limit": 1024, "cudnn_conv_algo_search": None, "device_id": 1}
    chosen = choice("cuda", provider_options=given)
    assert chosen.providers[0][1] == {"use_tf32": "True", "gpu_mem_limit": "1024", "device_id": "1"}
    assert chosen.device_id == 1
    assert choice("tensorrt", provider_options={"device_id": 1}).providers[1][1]["device_id"] == "1"


def test_axes_of_one_size_are_fixed() -> None:
    chosen = choice("tensorrt", shapes={"batch": (8, 8, 8), "sequence": (16, 64, 256)})
    assert chosen.fixed_axes == {"batch": 8}
    assert chosen.providers[0][1]["trt_profile_min_shapes"] == "input_ids:8x16,attention_mask:8x16"
    assert not [name for name in choice("tensorrt", shapes=FIXED).providers[0][1] if "profile" in name]


@pytest.mark.parametrize(
    ("provider", "option"), [("cuda", "enable_cuda_graph"), ("tensorrt", "trt_cuda_graph_enable")], ids=str
)
def test_cuda_graphs_need_fixed_axes_and_bound_memory(provider: str, option: str) -> None:
    given = {option: True}
    assert choice(provider, provider_options=given, shapes=FIXED).cuda_graph
    with pytest.raises(ValueError, match=rf"`{option}` .* fix 'sequence' with `shapes`"):
        choice(provider, provider_options=given, shapes=SHAPES | {"batch": (8, 8, 8)})
    with pytest.raises(ValueError, match="leave `io_binding` on"):
        choice(provider, provider_options=given, shapes=FIXED, io_binding=False)
    assert not choice(provider, provider_options={option: False}).cuda_graph


@pytest.mark.parametrize(
    ("provider", "options", "text"),
    [
        ("npu", {}, r"`provider` \(='npu'\) must be one of 'cpu', 'cuda', 'tensorrt'"),
        ("cpu", {"provider_options": {"use_tf32": 1}}, "the CPU provider has none"),
        ("cuda", {"provider_options": {"device_id": "first"}}, r"`device_id` \(='first'\) must be the number"),
        ("cpu", {"threads": 0}, r"`threads` \(=0\) must be 1 or more"),
    ],
    ids=["provider", "options", "device", "threads"],
)
def test_what_cannot_be_chosen(provider: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        choice(provider, **options)
