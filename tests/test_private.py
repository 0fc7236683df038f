"""Every internal function that the packages borrow does what its wrapper says: an upgrade breaks here first."""

import ast
import contextlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import onnx
import onnx_ir
import onnxruntime
import onnxscript.rewriter
import pytest
import torch
import torch.distributed as dist
import transformers
import transformers.exporters.onnxruntime_fusions
from support.models import IN, OUT, assert_equal, bert_classifier, gpt2, randn
from torch import fx, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import prune

from exporters import private
from exporters.graph.clean import quiet
from melora_fx import torch_private
from melora_fx.distributed import private as process_private
from melora_fx.folding import private as fold_private
from melora_fx.whole_capture import private as export_private

aten = torch.ops.aten
MIXTRAL = transformers.MixtralConfig(
    hidden_size=IN,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=OUT,
    vocab_size=50,
    num_local_experts=2,
)


@pytest.mark.parametrize("short", ["torch_private", "process_private", "fold_private", "export_private", "private"])
def test_every_name_is_called_here(short: str) -> None:
    tree = ast.parse(inspect.getsource(globals()[short]))
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    names += [node.targets[0].id for node in tree.body if isinstance(node, ast.Assign)]
    text = Path(__file__).read_text()
    assert [name for name in names if not re.search(rf"\b{short}\.{name}\b", text)] == []


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_wrapped() -> None:
    plain = nn.Linear(IN, OUT)
    wrappers = (torch.compile(plain), checkpoint_wrapper(plain))
    inner = [getattr(wrapper, name) for wrapper, name in zip(wrappers, torch_private.WRAPPED, strict=True)]
    assert all(module is plain for module in inner)


def test_registered() -> None:
    module = nn.BatchNorm1d(3)
    module.extra = nn.ReLU()
    module.register_parameter("nothing", None)
    parameters, buffers, children = torch_private.registered(module)
    assert list(parameters) == ["weight", "bias", "nothing"]
    assert list(buffers) == ["running_mean", "running_var", "num_batches_tracked"]
    assert list(children) == ["extra"]
    del parameters["nothing"]
    assert not hasattr(module, "nothing"), "the dicts must be the module's own"


def test_kinds_of_modules() -> None:
    convolutions = [nn.Conv1d(1, 1, 1), nn.Conv3d(1, 1, 1), nn.ConvTranspose2d(1, 1, 1)]
    by_mode = [nn.Dropout(), nn.AlphaDropout(), nn.Dropout2d(), nn.BatchNorm1d(1), nn.SyncBatchNorm(1)]
    other = [nn.Linear(1, 1), nn.LayerNorm(1)]
    assert [torch_private.is_convolution(module) for module in convolutions + other] == [True] * 3 + [False] * 2
    assert [torch_private.follows_mode(module) for module in by_mode + other] == [True] * 5 + [False] * 2


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_derived_suffixes() -> None:
    pruned = prune.l1_unstructured(nn.Linear(IN, OUT), "weight", 0.5)
    normed = nn.utils.weight_norm(nn.Linear(IN, OUT))
    names = [f"weight{suffix}" for suffix in torch_private.DERIVED_SUFFIXES]
    for module, name in zip((pruned, normed), names, strict=True):
        assert name in dict(module.named_parameters())


def exported(model: nn.Module, *inputs: torch.Tensor) -> fx.GraphModule:
    return torch.export.export(model, inputs).module()


def test_an_empty_graph_takes_and_returns_the_same_trees() -> None:
    class Pairs(nn.Module):
        def forward(self, pair: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"sum": pair[0] + pair[1]}

    pair = (randn(2), randn(2, seed=2))
    module = torch.export.export(Pairs(), (pair,)).module(check_guards=False)
    graph = torch_private.empty_graph_like(module.graph)
    assert len(graph.nodes) == 0
    values: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, values))
    torch.testing.assert_close(fx.GraphModule(module, graph)(pair), {"sum": pair[0] + pair[1]})


def test_operators() -> None:
    assert torch_private.is_operator(aten.add.Tensor)
    assert not torch_private.is_operator(torch.add)
    assert torch_private.operator_key(aten.add.Tensor) == ("aten::add", "Tensor")
    assert torch_private.operator_key(aten.mm.default) == ("aten::mm", "default")
    assert torch_private.is_region(torch.ops.higher_order.wrap_with_autocast)
    assert not torch_private.is_region(aten.mm.default)


def test_constants_of_a_trace() -> None:
    class Makes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.ones(2)

    module = Makes()
    fx.Tracer().trace(module)
    (made,) = [name for name in vars(module) if torch_private.is_constant_of_trace(name)]
    assert torch.equal(getattr(module, made), torch.ones(2))


def test_a_graph_is_put_without_new_code() -> None:
    module, other = fx.symbolic_trace(nn.Tanh()), fx.symbolic_trace(nn.ReLU())
    code = module.code
    torch_private.put_graph(module, other.graph)
    assert module.graph is other.graph
    assert module.code == code
    made = {name for name in torch_private.MADE_FROM_GRAPH if hasattr(module, name)}
    assert {"_graph", "_compiled_call_impl"} <= made
    pairs = exported(nn.Linear(IN, OUT), randn(2, IN))
    assert [hasattr(pairs, name) for name in torch_private.GRAPH_SPECS] == [True, True]


def test_export_hooks_are_cleared() -> None:
    module = exported(nn.Linear(IN, OUT), randn(2, IN))
    with pytest.raises(AssertionError, match="Guard failed"):
        module(randn(3, IN))
    export_private.clear_export_hooks(module)
    assert module._forward_pre_hooks == {}
    module.register_forward_hook(lambda *_: None, always_call=True)
    export_private.clear_export_hooks(module)
    assert (module._forward_hooks, module._forward_hooks_always_called) == ({}, {})


class Branch(nn.Module):
    """Takes the other branch if there are more than 8 rows, or one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if 1 < x.shape[0] <= 8 else x - 1


def test_what_an_export_assumed_of_sizes() -> None:
    rows = {"x": {0: torch.export.Dim.AUTO}}
    with export_private.without_assuming_two():
        program = torch.export.export(Branch(), (randn(3, IN),), dynamic_shapes=rows)
    assert export_private.export_guards(program) == ["L['x'].size()[0] > 1", "L['x'].size()[0] <= 8"]
    program = torch.export.export(Branch(), (randn(3, IN),), dynamic_shapes=rows)
    assert export_private.export_guards(program) == ["L['x'].size()[0] <= 8"]


def test_conditions_up_to_a_limit() -> None:
    rows = {"x": {0: torch.export.Dim.AUTO}}
    with pytest.raises(export_private.LargeConditionError) as error, export_private.conditions_up_to(0):
        torch.export.export(Branch(), (randn(3, IN),), dynamic_shapes=rows)
    assert error.value.source == "L['x'].size()[0]"
    torch.export.export(Branch(), (randn(3, IN),), dynamic_shapes=rows)


def test_inference_mode_is_recorded_as_no_grad() -> None:
    class Region(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                y = x * 2
            return x + y

    x = randn(2, IN).requires_grad_()
    with export_private.inference_mode_as_no_grad():
        recorded = exported(Region(), x)
    for module, gradient in ((recorded, 1), (exported(Region(), x), 3)):
        (found,) = torch.autograd.grad(module(x).sum(), x)
        assert_equal(found, torch.full_like(x, gradient))
    with torch.inference_mode():
        assert torch.is_inference_mode_enabled()


def test_aliases_of_operators() -> None:
    class Some(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.T * 2).add_(1)

    graph = exported(Some(), randn(2, IN)).graph
    calls = [node for node in graph.nodes if node.op == "call_function"]
    assert [node.target for node in calls if not export_private.may_alias(node)] == [aten.mul.Tensor]


def test_the_structure_of_inputs() -> None:
    structure = export_private.input_structure(exported(nn.Linear(IN, OUT), randn(2, IN)))
    assert torch_private.tree_unflatten([7], structure) == ((7,), {})


def test_fake_tensors() -> None:
    seen: list[bool] = []

    class Looks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch_private.is_fake(x))
            return x + 1

    torch.export.export(Looks(), (randn(2),), strict=False)
    assert seen == [True]
    assert torch_private.is_fake(torch.empty(1, device="meta"))
    assert not torch_private.is_fake(randn(2))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_storages(device: str) -> None:
    first, second = torch.empty(4, 6, device=device), torch.empty(4, 6, device=device)
    assert torch_private.in_one_storage(first, first[1:].t())
    assert not torch_private.in_one_storage(first, second)


def test_versions_are_preserved() -> None:
    weight = nn.Parameter(randn(3, 3))
    loss = (weight * weight).sum()
    with torch_private.preserve_versions([weight]), torch.no_grad():
        weight.mul_(2)
        weight.div_(2)
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * weight.detach())


def test_transforms_are_seen() -> None:
    seen: list[tuple[bool, bool]] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append((torch_private.in_functorch(), torch_private.in_forward_mode()))
        return x.sum()

    look(randn(2))
    torch.func.grad(look)(randn(2))
    with torch.autograd.forward_ad.dual_level():
        look(randn(2))
    assert seen == [(False, False), (True, False), (False, True)]


@pytest.mark.usefixtures("fresh_dynamo")
def test_an_export_is_seen() -> None:
    class Look(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if torch_private.is_exporting() else x - 1

    x = randn(2)
    assert_equal(Look()(x), x - 1)
    assert_equal(torch.compile(Look(), backend="eager")(x), x - 1)
    for strict in (False, True):
        assert_equal(torch.export.export(Look(), (x,), strict=strict).module()(x), x + 1)


def test_tensors_that_stand_for_others() -> None:
    seen: list[bool] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch_private.is_wrapped(x))
        return x

    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            return look(gradients[0])

    x = randn(2).requires_grad_()
    look(x)
    torch.func.vmap(look)(x)
    torch.func.grad(lambda x: look(x).sum())(x)
    torch.autograd.grad(Looks.apply(x), x, torch.eye(2), is_grads_batched=True)
    look(torch._efficientzerotensor((2,)))
    assert seen == [False, True, True, True, True]


def test_an_fx_trace_is_seen() -> None:
    seen: list[bool] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch_private.in_fx_trace())
        return x

    look(randn(2))
    fx.symbolic_trace(look)
    assert seen == [False, True]


def test_trees() -> None:
    tree = {"a": [1, {"b": 2}], "c": (3,)}
    assert torch_private.tree_map(lambda leaf: leaf * 10, tree) == {"a": [10, {"b": 20}], "c": (30,)}
    assert torch_private.tree_leaves(tree) == [1, 2, 3]
    leaves, structure = torch_private.tree_flatten(tree)
    assert torch_private.tree_unflatten([10 * leaf for leaf in leaves], structure) == {"a": [10, {"b": 20}], "c": (30,)}
    assert torch_private.tree_code(tree) == [("['a'][0]", 1), ("['a'][1]['b']", 2), ("['c'][0]", 3)]
    assert torch_private.tree_paths(tree) == [(("a", "0"), 1), (("a", "1", "b"), 2), (("c", "0"), 3)]


def test_names_that_transformers_reads() -> None:
    trainer = inspect.getsource(transformers.trainer)
    assert torch_private.KEYS_NOT_SAVED in trainer
    assert torch_private.HAS_ADAPTERS in trainer + inspect.getsource(transformers.trainer_utils)
    assert torch_private.HAS_ADAPTERS in inspect.getsource(transformers.modeling_utils)


def test_experts() -> None:
    model = transformers.MixtralForCausalLM(MIXTRAL)
    layers = [name for name, module in model.named_modules() if torch_private.is_experts_layer(module)]
    assert layers == ["model.layers.0.mlp.experts"]
    model.set_experts_implementation("batched_mm")
    assert torch_private.experts_implementation(model.config) == "batched_mm"
    assert torch_private.experts_implementation(gpt2().config) in (None, "eager", "grouped_mm")


def test_operators_without_an_overload() -> None:
    assert torch_private.is_packet(aten.linear)
    assert not torch_private.is_packet(aten.linear.default)


def test_grouped_product() -> None:
    x, stack, ends = randn(4, 16), randn(2, 16, 8), torch.tensor([1, 4], dtype=torch.int32)
    product = torch_private.GROUPED_MM(x.bfloat16(), stack.bfloat16(), ends)
    assert product.shape == (4, 8)


def test_dynamo_asks() -> None:
    class Named(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> str:
            return func.__name__

    def product(x: torch.Tensor, stack: torch.Tensor, ends: torch.Tensor) -> Any:
        return nn.functional.grouped_mm(x, stack.as_subclass(Named), offs=ends)

    torch_private.let_dynamo_ask(torch_private.GROUPED_MM)
    inputs = randn(4, 16).bfloat16(), randn(2, 16, 8).bfloat16(), torch.tensor([1, 4], dtype=torch.int32)
    assert torch.compile(product, backend="eager", fullgraph=True)(*inputs) == "_grouped_mm"


def test_names_in_checkpoints() -> None:
    model = bert_classifier()
    keys = [*model.state_dict()]
    assert {(key, name) for key, name, _ in fold_private.checkpoint_names(model, keys)} == {(key, key) for key in keys}
    assert fold_private.checkpoint_names(model, ["bert.embeddings.LayerNorm.gamma"]) == [
        ("bert.embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.weight", ())
    ]
    stored = [f"model.layers.0.block_sparse_moe.experts.{expert}.w{i}.weight" for expert in (0, 1) for i in (1, 2, 3)]
    with torch.device("meta"):
        found = fold_private.checkpoint_names(transformers.MixtralForCausalLM(MIXTRAL), stored)
    converted = {name for *_, names in found for name in names}
    assert converted == {f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}


def test_tied_weights() -> None:
    assert fold_private.tied_weights(gpt2()) == {"lm_head.weight": "transformer.wte.weight"}
    assert fold_private.tied_weights(nn.Linear(IN, OUT)) == {}


def test_what_transformers_does_not_miss() -> None:
    sizes = {"vocab_size": 20, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8}
    heads = {"decoder_ffn_dim": 8, "encoder_attention_heads": 1, "decoder_attention_heads": 1}
    with torch.device("meta"):
        model = transformers.PegasusForConditionalGeneration(transformers.PegasusConfig(**sizes, **heads))
    ignored = [name for name in model.state_dict() if not fold_private.is_needed(model, name)]
    assert ignored == ["final_logits_bias"]


class Scaled(nn.Module):
    """A named linear, so that its node has a scope."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(IN, OUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * 2


def test_scopes_of_nodes() -> None:
    with quiet():
        program = torch.onnx.export(Scaled().eval(), (randn(2, IN),), dynamo=True, verbose=False)
    scopes = {node.op_type: private.name_scopes(node) for node in program.model.graph}
    assert "inner" in scopes["Gemm"]
    assert "inner" not in scopes["Mul"]
    assert private.name_scopes(onnx_ir.node("Relu", [])) == []


def test_an_export_leaves_the_instance_alone_and_is_fused() -> None:
    model = bert_classifier()
    before = dict(vars(model))
    tokens = torch.arange(8).view(2, 4)
    shapes = {"input_ids": {0: torch.export.Dim.AUTO}}
    with quiet():
        graph_model, program = private.export_by_transformers(model, {"input_ids": tokens}, shapes, None)
    assert program.graph_signature.user_inputs == ("input_ids",)
    assert [value.name for value in graph_model.graph.inputs] == ["input_ids"]
    assert vars(model) == before
    private.fuse_for_onnxruntime(graph_model, "cpu", has_cache=False)
    assert "com.microsoft" in {node.domain for node in graph_model.graph}


def test_translations_of_grouped_products() -> None:
    found = private.grouped_translations()
    assert any("grouped_mm_fallback" in str(target) for target in found)
    assert all(callable(write) for write in found.values())


def test_caches_are_taken_and_returned() -> None:
    model = gpt2(num_layers=1).eval()
    argument = private.cache_argument(model)
    assert argument in inspect.signature(model.forward).parameters
    assert private.cache_argument(nn.Linear(IN, OUT)) is None
    tokens = torch.arange(6).view(2, 3)
    with torch.no_grad():
        whole = model(input_ids=tokens, use_cache=True)
        before = private.returned_cache(model(input_ids=tokens[:, :2], use_cache=True))
        assert private.is_plain_cache(before, length=2)
        assert not private.is_plain_cache(before, length=3)
        assert not private.is_plain_cache(None, length=2)
        past = private.dynamic_cache([before.layers[0].keys, before.layers[0].values])
        after = model(input_ids=tokens[:, 2:], use_cache=True, **{argument: past})
    assert private.returned_cache(model(input_ids=tokens, use_cache=False)) is None
    torch.testing.assert_close(after.logits[:, 0], whole.logits[:, 2])
    assert private.is_plain_cache(private.returned_cache(after), length=3)


def test_caches_of_both_are_filled() -> None:
    tensors = [randn(2, 3, length, 4, seed=length) for length in (1, 2, 5, 6)]
    cache = private.cache_of_both(tensors[:2], tensors[2:])
    assert cache.get_seq_length() == 1
    assert cache.cross_attention_cache.layers[0].keys is tensors[2]
    assert cache.is_updated == {0: True}, "existing values are not computed again"
    assert private.cache_of_both([], []).is_updated == {}


def test_attentions_of_batches_are_put_back() -> None:
    fusions = transformers.exporters.onnxruntime_fusions
    names = ("_static_dim", "_shared_rotation")
    before = [getattr(fusions, name) for name in names]
    with private._attentions_of_batches(fusions):
        value = onnx_ir.Value(name="x", shape=onnx_ir.Shape(["batch", 3]))
        assert fusions._static_dim(value, 0) == 1
        assert fusions._static_dim(value, 1) == 3
        assert fusions._shared_rotation(value, value, 16, False) is None
    assert [getattr(fusions, name) for name in names] == before


@pytest.mark.parametrize("count", [2, 3])
def test_pairs_stay_apart_and_threes_do_not(count: int) -> None:
    fusions = transformers.exporters.onnxruntime_fusions
    before = fusions._STEPS, fusions._constant
    weights = [onnx.numpy_helper.from_array(np.ones((3, 4), np.float32), f"w{index}") for index in range(count)]
    products = " ".join(f"y{index} = MatMul(x, w{index})" for index in range(count))
    outputs = ", ".join(f"float[2, 4] y{index}" for index in range(count))
    proto = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : 18]> g (float[2, 3] x) => ({outputs}) {{ {products} }}'
    )
    proto.graph.initializer.extend(weights)
    graph_model = onnx_ir.from_proto(proto)
    assert private._is_of_pair(graph_model.graph.initializers["w0"]) == (count == 2)
    with private._pairs_apart(fusions):
        for step, _ in fusions._STEPS:
            if step not in [each for each, _ in before[0]]:
                step(graph_model)
    assert ("Split" in {node.op_type for node in graph_model.graph}) == (count == 3)
    assert (fusions._STEPS, fusions._constant) == before


def test_matching_is_quicker_and_finds_the_same() -> None:
    def with_sum(op: Any, x: Any) -> Any:
        root = op.Sqrt(x)
        return op.Add(root, x), op.Mul(root, x)

    def without(op: Any, x: Any) -> Any:
        return op.Sub(x, x), op.Div(x, x)

    text = """<ir_version: 9, opset_import: ["" : 18]> g (float[2] x) => (float[2] y, float[2] z)
        { r = Sqrt(x) a = Add(r, x) m = Mul(r, x) y = Neg(a) z = Neg(m) }"""
    rule = onnxscript.rewriter.RewriteRule(with_sum, without)
    own = onnxscript.rewriter._matcher.SimplePatternMatcher.match
    found = []
    for context in (contextlib.nullcontext(), private.quick_matching()):
        graph_model = onnx_ir.from_proto(onnx.parser.parse_model(text))
        with context:
            assert rule.apply_to_model(graph_model) == 1
        found.append([node.op_type for node in graph_model.graph])
    assert found[0] == found[1]
    assert {"Sub", "Div"} <= {*found[0]}
    assert onnxscript.rewriter._matcher.SimplePatternMatcher.match is own


def test_folders_of_configurations(tmp_path: Path) -> None:
    model = bert_classifier()
    assert private.folder_of(model.config) is None
    model.config.save_pretrained(tmp_path)
    assert private.folder_of(transformers.AutoConfig.from_pretrained(tmp_path)) == tmp_path


@pytest.mark.usefixtures("fresh_accelerator")
def test_accelerate_is_seen() -> None:
    model = nn.Linear(IN, OUT)
    assert not private.runs_under_accelerate(model)
    prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    assert private.runs_under_accelerate(prepared)


def small_graph(folder: Path) -> Path:
    """Writes a graph of y = x w, with an axis without a name."""
    text = '<ir_version: 9, opset_import: ["" : 20]> g (float[?, 2] x) => (float[?, 3] y) { y = MatMul (x, w) }'
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((2, 3), np.float32), "w"))
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def test_the_float16_converter(tmp_path: Path) -> None:
    converter = private.float16_converter()
    half = converter.convert_float_to_float16(onnx.load(small_graph(tmp_path)))
    assert {tensor.data_type for tensor in half.graph.initializer} == {onnx.TensorProto.FLOAT16}
    assert "ArrayFeatureExtractor" in converter.DEFAULT_OP_BLOCK_LIST


def test_libraries_of_providers() -> None:
    path = private.provider_library(onnxruntime, "cuda")
    assert path.parent.is_dir()
    assert path.is_file() == ("CUDAExecutionProvider" in onnxruntime.get_available_providers())


def test_nodes_and_nameless_axes_of_sessions(tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(small_graph(tmp_path), options, providers=["CPUExecutionProvider"])
    assert private.node_counts(session) == {"CPUExecutionProvider": 1}
    assert private.is_nameless_axis(session.get_inputs()[0].shape[0])
    assert not private.is_nameless_axis("batch")


def test_what_dynamo_compiles() -> None:
    seen: dict[str, Any] = {}

    def look(compilation: Any) -> None:
        seen["model"], graph = torch_private.compiled_so_far(compilation)
        for value, _, users in torch_private.inputs_of_compiled(graph):
            if isinstance(value, nn.Parameter):
                seen[str(tuple(value.shape))] = [(user.target.__name__, __file__ in user.stack_trace) for user in users]

    class Looks(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = nn.functional.linear(x, self.weight, self.bias)
            torch_private.while_compiling()(look)
            return y

    model = Looks(IN, OUT)
    model(randn(2, IN))
    assert not seen
    torch.compile(model, backend="eager", fullgraph=True)(randn(2, IN))
    assert seen == {"model": model, str((OUT, IN)): [("linear", True)], str((OUT,)): [("linear", True)]}


def test_what_dynamo_leaves_alone() -> None:
    @torch_private.never_compiled
    def compiling() -> list[bool]:
        return [compiling_inside()]

    def compiling_inside() -> bool:
        return torch.compiler.is_compiling()

    def around(x: torch.Tensor) -> tuple[torch.Tensor, list[bool]]:
        return x + torch.compiler.is_compiling(), compiling()

    assert around(torch.zeros(1)) == (torch.zeros(1), [False])
    assert torch.compile(around, backend="eager")(torch.zeros(1)) == (torch.ones(1), [False])


def test_inside_an_autograd_function() -> None:
    seen = []

    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch_private.in_autograd_function())
            return x.clone()

    Looks.apply(randn(2))
    for block in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with block:
            seen.append(torch_private.in_autograd_function())
    assert seen == [True, False, False, False]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled_around_and_inside() -> None:
    found = []

    def look() -> None:
        found.append(torch_private.compiles_around())

    def calls(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        look()
        return x

    look()
    assert found == [None]
    module = nn.Linear(IN, OUT)
    assert not torch_private.is_compiled(module)
    module.compile()
    assert torch_private.is_compiled(module)
    assert torch_private.is_compiled(torch.compile(nn.Linear(IN, OUT)))


@pytest.fixture
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
def test_what_fsdp_puts_on_a_class_and_gathers() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module: Any = nn.Linear(IN, OUT)
    module.register_parameter("added", nn.Parameter(torch.zeros(3)))
    assert process_private.class_below_fsdp(type(module)) is None
    fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    assert process_private.class_below_fsdp(type(module)) is nn.Linear
    assert process_private.is_managed_by_fsdp(module)
    assert not process_private.is_managed_by_fsdp(nn.Linear(IN, OUT))
    assert process_private.fsdp_class(nn.Linear) is type(module)
    assert process_private.shard_size_and_offset(module.weight) == ((OUT, IN), (0, 0))

    class Other(nn.Linear):
        pass

    module.__class__ = process_private.fsdp_class(Other)
    assert process_private.class_below_fsdp(type(module)) is Other
    assert len(module._get_fsdp_state()._fsdp_param_groups[0].fsdp_params) == 3
    del module._parameters["added"]
    process_private.forget_parameters(module)
    assert len(module._get_fsdp_state()._fsdp_param_groups[0].fsdp_params) == 2
    module(randn(2, IN)).sum().backward()
    assert module.weight.grad.shape == (OUT, IN)


@pytest.mark.usefixtures("_one_process")
def test_tensor_parallel_forward() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed.tensor_parallel import ColwiseParallel

    module, mesh, style = nn.Linear(IN, OUT), init_device_mesh("cpu", (1,)), ColwiseParallel()
    assert process_private.tensor_parallel_forward(module) is None
    style.install_forward(module, mesh)
    assert process_private.tensor_parallel_forward(module) == (style, mesh)
    other: Any = nn.Linear(IN, OUT)
    other.forward = module.forward
    assert process_private.tensor_parallel_forward(other) is None
