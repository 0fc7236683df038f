"""What users do with a model in the first days, tried on a rewritten one: it works as before, or is refused."""

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from support.models import (
    IN,
    OUT,
    TOLERANCE,
    TOWER_CONFIG,
    adapted_weight,
    assert_equal,
    assert_near,
    bert,
    dense_update,
    fill,
    gpt2,
    output_of,
    randn,
    rewritten_tower,
    tokens,
    tower,
)
from support.packed import Caller, Lines, Packed
from support.quantized_bases import QUANTIZED, difference, inputs_of
from support.quantized_bases import rewritten as rewritten_base
from support.training import STEPS, Losses, Sentences, StopAt, arguments, rewritten, trainer_of
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
)

import melora_fx
from melora_fx import AdapterCheckpointCallback, MELoRAConfig, MELoRAError

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch.ao's, and of imports in torchao, bitsandbytes
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
    pytest.mark.usefixtures("fresh_dynamo"),
]

CONFIG = MELoRAConfig(rank=2, num_blocks=3, alpha=3.0)


class Interrupted(TrainerCallback):
    """Simulates Ctrl-C in step 4."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 4:
            raise KeyboardInterrupt


def interrupt(trainer: Trainer) -> None:
    trainer.add_callback(Interrupted())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


@pytest.mark.situation("Trainer", "interrupted (Ctrl-C), then `fold`, `save_pretrained`", "the whole model is saved")
@pytest.mark.parametrize("use", [interrupt, Trainer.evaluate], ids=["interrupted", "evaluated only"])
def test_what_is_folded_after_a_trainer_is_saved_whole(use: Callable[[Trainer], Any], tmp_path) -> None:
    model = fill(rewritten())
    use(trainer_of(model, tmp_path, AdapterCheckpointCallback())[0])
    folded = melora_fx.fold(model.eval())
    folded.save_pretrained(tmp_path / "folded")
    assert_equal(output_of(type(model).from_pretrained(tmp_path / "folded"), tokens()), output_of(folded, tokens()))


@pytest.mark.parametrize("use", [interrupt, Trainer.evaluate], ids=["interrupted", "evaluated only"])
def test_save_pretrained_warns_again_after_a_trainer(use: Callable[[Trainer], Any], tmp_path) -> None:
    model = rewritten()
    use(trainer_of(model, tmp_path, AdapterCheckpointCallback())[0])
    with pytest.warns(UserWarning, match="save_adapter"):
        model.save_pretrained(tmp_path / "saved")


@pytest.mark.default_cases("head kept trainable")
@pytest.mark.situation("Trainer", "a tied language model, resumed from its adapter", "same losses; still tied")
@pytest.mark.parametrize(
    ("targets", "kept"),
    [(["c_attn"], ()), (["c_attn", "lm_head"], ()), (["c_attn"], ["lm_head"])],
    ids=["head frozen", "head adapted", "head kept trainable"],
)
@pytest.mark.slow
def test_a_tied_language_model_resumes_from_its_adapter(targets: list[str], kept: Any, tmp_path) -> None:
    def losses(directory: Path, *callbacks: TrainerCallback, resume: bool = False) -> dict[int, float]:
        model = melora_fx.rewrite(gpt2(), targets, CONFIG, keep_trainable=kept)
        logged = Losses()
        options = arguments(directory)
        all_callbacks = [AdapterCheckpointCallback(), logged, *callbacks]
        Trainer(model, options, train_dataset=Lines(), callbacks=all_callbacks).train(resume_from_checkpoint=resume)
        assert model.lm_head.weight is model.transformer.wte.weight
        assert model.lm_head.weight.requires_grad == bool(kept)
        return logged.by_step

    whole = losses(tmp_path / "whole")
    losses(tmp_path / "parts", StopAt(3))
    assert losses(tmp_path / "parts", resume=True) == {step: whole[step] for step in range(4, STEPS + 1)}


@pytest.mark.situation("Trainer", "Seq2SeqTrainer, T5, `predict_with_generate`", "trains, generates")
@pytest.mark.slow
def test_a_sequence_to_sequence_model_trains_evaluates_and_generates(tmp_path) -> None:
    sizes = {"vocab_size": 50, "d_model": 24, "d_kv": 12, "d_ff": 36, "num_layers": 2, "num_heads": 2}
    plain = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1))
    model = melora_fx.rewrite(plain, ["q", "v", "wi", "wo"], CONFIG)
    options = arguments(tmp_path, max_steps=4, save_steps=2).to_dict()
    options |= {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    options |= {"predict_with_generate": True, "generation_max_length": 6}
    known = {name: value for name, value in options.items() if name in Seq2SeqTrainingArguments.__dataclass_fields__}
    trainer = Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(**known),
        train_dataset=Lines(4),
        eval_dataset=Lines(4),
        callbacks=[AdapterCheckpointCallback()],
    )
    trainer.train()
    predicted = torch.as_tensor(trainer.predict(Lines(4)).predictions)
    folded = melora_fx.fold(model.eval())
    expected = folded.generate(Lines().tokens, max_length=6)
    assert_equal(predicted[:, : expected.size(1)], expected)


@pytest.mark.situation("Trainer", "`model_init`, two trainings", "each from its own model")
@pytest.mark.slow
def test_model_init_makes_a_model_for_each_training(tmp_path) -> None:
    trainer = Trainer(
        model_init=rewritten,
        args=arguments(tmp_path),
        train_dataset=Sentences(),
        callbacks=[AdapterCheckpointCallback()],
    )
    first = trainer.train().training_loss
    assert trainer.train().training_loss == first
    assert melora_fx.sites(melora_fx.load_adapter(trainer.model, tmp_path / f"checkpoint-{STEPS}"))


@pytest.mark.default_cases("torchao int8 weights-*", "torch dynamic int8-*", "bitsandbytes 4 bits-eager")
@pytest.mark.situation(
    "Quantised and half-precision bases", "quantised, under bfloat16 autocast", "trains, eager and compiled"
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("base", QUANTIZED)
@pytest.mark.slow
def test_autocast_over_a_quantised_base(base: str, compiled: bool) -> None:
    model, weights = rewritten_base(base)
    sites = list(melora_fx.sites(model).values())
    x = inputs_of(base)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    with torch.autocast("cpu", torch.bfloat16):
        output = run(x)
    output.float().square().sum().backward()
    factors = [site.lora_b.detach().double().requires_grad_() for site in sites]
    hidden = x.double()
    for index, (site, weight, factor) in enumerate(zip(sites, weights, factors, strict=True)):
        update = dense_update(site.config, site.lora_a.detach(), factor)
        bias = model[2 * index].bias
        bias = bias() if callable(bias) else bias
        hidden = F.linear(F.gelu(hidden) if index else hidden, weight.double() + update, bias.detach().double())
    hidden.square().sum().backward()
    assert difference(output.detach(), hidden.detach()) < 5e-2  # bfloat16, which some bases also round to 8 bits
    for site, factor in zip(sites, factors, strict=True):
        assert site.lora_b.grad.dtype == torch.float32
        assert difference(site.lora_b.grad, factor.grad) < 5e-2


@pytest.mark.situation(
    "Quantised and half-precision bases",
    "a bias kept trainable next to quantised weights",
    "the gradient of the oracle",
)
@pytest.mark.parametrize("base", [name for name in QUANTIZED if name != "torch dynamic int8"])  # its bias is packed too
def test_a_bias_beside_quantised_weights_is_trained_on_request(base: str) -> None:
    model, weights = rewritten_base(base)
    model[0].bias.requires_grad_(True)
    model[2].bias.requires_grad_(True)
    output = model(inputs_of(base))
    output.float().sum().backward()
    first, last = melora_fx.sites(model).values()
    matrices = [
        weight.double() + dense_update(CONFIG_OF_BASES, s.lora_a, s.lora_b).detach()
        for weight, s in zip(weights, (first, last), strict=True)
    ]
    bias = model[0].bias.detach().double().requires_grad_()
    hidden = F.linear(inputs_of(base).double(), matrices[0], bias)
    F.linear(F.gelu(hidden), matrices[1]).sum().backward()
    assert difference(model[0].bias.grad, bias.grad) < 5e-2  # some bases round to 8 or 16 bits
    assert_equal(model[2].bias.grad.float(), torch.full((output.size(-1),), float(len(output))))


CONFIG_OF_BASES = MELoRAConfig(rank=2, num_blocks=4, alpha=3.0)


def test_a_packed_kernel_without_a_gradient_beside_a_trained_bias() -> None:
    model = fill(melora_fx.rewrite(nn.Sequential(nn.Linear(IN, IN), Packed()), "all-linear", CONFIG))
    model[1].bias.requires_grad_(True)
    first, last = melora_fx.sites(model).values()
    model(randn(5, IN)).square().sum().backward()
    factor = first.lora_b.detach().double().requires_grad_()
    below = F.linear(
        randn(5, IN).double(),
        first.weight.detach().double() + dense_update(CONFIG, first.lora_a.detach(), factor),
        model[0].bias.detach().double(),
    )
    matrix = model[1].codes.double() / 8 + dense_update(CONFIG, last.lora_a, last.lora_b).detach()
    F.linear(below, matrix).square().sum().backward()
    assert difference(first.lora_b.grad, factor.grad) < TOLERANCE[torch.float32]["rtol"] * 10


@pytest.mark.parametrize("options", [{}, {"scale": 2.0}], ids=["by keyword", "a further argument"])
def test_a_packed_linear_is_called_as_before(options: dict[str, float]) -> None:
    model = Caller(Packed(), **options)
    expected = output_of(model, randn(5, IN))
    assert_equal(output_of(melora_fx.rewrite(model, "all-linear", CONFIG), randn(5, IN)), expected)


class Permuted(nn.Module):
    """A layer of a flow: it has the sizes of a linear and an integer buffer, but is not a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = IN
        self.register_buffer("order", torch.randperm(IN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., self.order].exp()


class Convolved(nn.Module):
    """A block of convolutions with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = IN
        self.out_features = OUT
        self.convolution = nn.Conv1d(IN, OUT, 1)
        self.register_buffer("mask", torch.ones(OUT, 1, dtype=torch.bool))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.convolution(x.unsqueeze(-1)) * self.mask).squeeze(-1)


@pytest.mark.parametrize("build", [Permuted, Convolved])
def test_what_has_sizes_and_integers_is_not_yet_a_linear(build: Callable[[], Any]) -> None:
    first = build()
    model = nn.Sequential(first, nn.Linear(first.out_features, IN))
    assert [site.name for site in melora_fx.match(model, "all-linear", CONFIG).sites] == ["1"]


class Gated(nn.Module):
    """Matrices with names as in RWKV and gated attention, and a vector with a name that pruning would use."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("w_q", "w_v", "w_g"):
            setattr(self, name, nn.Parameter(randn(IN, IN) * 0.2))
        self.x_orig = nn.Parameter(torch.ones(IN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.x_orig
        return (F.linear(x, self.w_q) + F.linear(x, self.w_v)) * F.linear(x, self.w_g).sigmoid()


def test_parameters_that_are_called_as_those_of_weight_norm() -> None:
    report = melora_fx.match(nn.Sequential(Gated()), "all-linear", CONFIG)
    assert {site.name for site in report.sites} == {"0.w_q", "0.w_v", "0.w_g"}
    assert not report.skipped


@pytest.mark.situation(
    "Training", "`checkpoint_wrapper` around layers, before or after `rewrite`", "trains; `save_adapter` works"
)
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_checkpoint_wrapper(before: bool, tmp_path) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(IN, OUT), nn.Tanh()), nn.Linear(OUT, IN))
    plain = copy.deepcopy(model)
    if before:
        model[0] = checkpoint_wrapper(model[0])
    melora_fx.rewrite(model, "all-linear", CONFIG)
    if not before:
        model[0] = checkpoint_wrapper(model[0])
    fill(model)(randn(5, IN)).sum().backward()
    first, last = melora_fx.sites(model).values()
    assert first.lora_b.grad is not None
    hidden = torch.tanh(F.linear(randn(5, IN).double(), adapted_weight(first), plain[0][0].bias.double()))
    assert_near(model(randn(5, IN)), F.linear(hidden, adapted_weight(last), plain[1].bias.double()))
    melora_fx.save_adapter(model, tmp_path)


def test_an_optimizer_for_each_part_is_not_stale() -> None:
    model = melora_fx.rewrite(tower(), ["up", "gate"], TOWER_CONFIG, keep_trainable=["head"])
    optimizers = [torch.optim.SGD(part.parameters(), 1e-2) for part in (model.up, model.gate, model.head)]
    model(randn(5, IN)).sum().backward()
    before = {name: value.detach().clone() for name, value in model.named_parameters() if value.grad is not None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for optimizer in optimizers:
            optimizer.step()
    unchanged = {name for name, value in before.items() if torch.equal(value, model.get_parameter(name))}
    assert unchanged == {"up.lora_a", "gate.lora_a"}, "their gradients are zero as long as B is"


def test_an_optimizer_that_has_stepped_before_the_rewrite_is_noticed() -> None:
    rewritten_tower()
    model = tower()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    model(randn(5, IN)).sum().backward()
    optimizer.step()
    melora_fx.rewrite(model, "all-linear", TOWER_CONFIG)
    model(randn(5, IN)).sum().backward()
    with pytest.warns(UserWarning, match="make the optimizer after `rewrite`"):
        optimizer.step()


@pytest.mark.situation("Training", "layers replaced by `torch.compile(layer)`", "the names in the file are unchanged")
def test_layers_that_are_compiled_one_by_one_do_not_change_the_file(tmp_path) -> None:
    model = fill(melora_fx.rewrite(bert(), ["query", "value"], CONFIG))
    names = list(melora_fx.sites(model))
    expected = output_of(model, tokens())
    for index, layer in enumerate(model.encoder.layer):
        model.encoder.layer[index] = torch.compile(layer, backend="eager")
    assert_equal(output_of(model, tokens()), expected)
    melora_fx.save_adapter(model, tmp_path)
    loaded = melora_fx.load_adapter(bert(), tmp_path)
    assert list(melora_fx.sites(loaded)) == names
    assert_equal(output_of(loaded, tokens()), expected)


def test_layers_that_are_compiled_before_the_rewrite_run_their_adapters() -> None:
    model = bert()
    twin = fill(melora_fx.rewrite(bert(), ["query", "value"], CONFIG))
    for index, layer in enumerate(model.encoder.layer):
        model.encoder.layer[index] = torch.compile(layer, backend="eager")
    assert_equal(output_of(model, tokens()), output_of(bert(), tokens()))
    melora_fx.rewrite(model, ["query", "value"], CONFIG)
    with torch.no_grad():
        for site, other in zip(melora_fx.sites(model).values(), melora_fx.sites(twin).values(), strict=True):
            site.lora_a.copy_(other.lora_a)
            site.lora_b.copy_(other.lora_b)
    assert_equal(output_of(model, tokens()), output_of(twin, tokens()))


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("again", COPIES.values(), ids=COPIES)
def test_a_copy_made_while_the_base_runs_is_adapted(again: Callable[[Any], Any]) -> None:
    model = rewritten_tower()
    x = randn(5, IN)
    adapted = output_of(model, x)
    with melora_fx.disabled(model):
        copied = again(model)
        base = output_of(model, x)
    assert_equal(output_of(copied, x), adapted)
    assert_equal(output_of(model, x), adapted)
    with melora_fx.disabled(copied):
        assert_equal(output_of(copied, x), base)


@pytest.mark.slow
@pytest.mark.parametrize("again", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("wrapped", [False, True], ids=["in place", "wrapper"])
def test_a_copy_of_a_compiled_model(wrapped: bool, again: Callable[[Any], Any]) -> None:
    model = rewritten_tower()
    x = randn(5, IN)
    adapted = output_of(model, x)
    if wrapped:
        model = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
    assert_equal(output_of(model, x), adapted)
    copied = again(model)
    assert_equal(output_of(copied, x), adapted)
    assert list(melora_fx.sites(copied)) == list(melora_fx.sites(model))


def _train_in_child(model: Any, x: torch.Tensor, queue: Any) -> None:
    queue.put(output_of(model, x).numpy())
    with torch.no_grad():
        model.up.lora_b.add_(1.0)


@pytest.mark.default_cases("fork")
@pytest.mark.situation(
    "Moved and copied", "`share_memory`, another process by fork or spawn", "its updates are visible here"
)
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_shared_with_another_process(start: str) -> None:
    model = rewritten_tower()
    x = randn(5, IN)
    expected = output_of(model, x)
    before = model.up.lora_b.detach().clone()
    model.share_memory()
    context: Any = torch.multiprocessing.get_context(start)
    queue = context.Queue()
    process = context.Process(target=_train_in_child, args=(model, x, queue))
    process.start()
    assert_equal(torch.from_numpy(queue.get(timeout=60)), expected)
    process.join()
    assert_equal(model.up.lora_b.detach(), before + 1)


@pytest.mark.situation("Moved and copied", "`del model`, without `save_pretrained`", "freed at once")
def test_a_model_is_freed_when_it_is_let_go() -> None:
    def freed(build: Callable[[], Any]) -> bool:
        model = build()
        weight = weakref.ref(model.up.weight)
        del model
        return weight() is None

    gc.collect()
    gc.disable()
    try:
        assert freed(tower)
        assert freed(rewritten_tower)
    finally:
        gc.enable()


GENERATE: dict[str, Callable[[], dict[str, Any]]] = {
    "static cache": lambda: {"cache_implementation": "static"},
    "assisted by a plain model": lambda: {"assistant_model": gpt2()},
    "assisted by a rewritten model": lambda: {
        "assistant_model": fill(melora_fx.rewrite(gpt2(), ["c_attn"], CONFIG), seed=5)
    },
    "prompt lookup": lambda: {"prompt_lookup_num_tokens": 3},
    "several sequences of a beam": lambda: {"num_beams": 3, "num_return_sequences": 2},
}


@pytest.mark.slow
@pytest.mark.situation(
    "Generation", "static cache, assisted, prompt lookup, several beams", "the tokens of the folded model"
)
@pytest.mark.parametrize("options", GENERATE.values(), ids=GENERATE)
def test_generate_in_rarer_ways(options: Callable[[], dict[str, Any]]) -> None:
    model = fill(melora_fx.rewrite(gpt2(), ["c_attn", "c_fc", "c_proj"], CONFIG))
    folded = melora_fx.fold(copy.deepcopy(model))
    prompt = tokens(1)["input_ids"]
    found, expected = (each.generate(prompt, max_new_tokens=8, **options()) for each in (model, folded))
    assert_equal(found, expected)


@pytest.mark.situation("First hour", "`resize_token_embeddings` with an adapted head", "one error that names the sizes")
def test_an_adapted_head_whose_vocabulary_grows_says_so() -> None:
    model = fill(melora_fx.rewrite(gpt2(), ["c_attn", "lm_head"], CONFIG))
    model.resize_token_embeddings(57)
    with pytest.raises(MELoRAError, match="a linear of 57 output features has an adapter of 51"):
        output_of(model, tokens())


@pytest.mark.situation("First hour", "`resize_token_embeddings` with other linears adapted", "works")
def test_a_vocabulary_that_grows_beside_the_adapters() -> None:
    model = fill(melora_fx.rewrite(gpt2(), ["c_attn"], CONFIG))
    expected = output_of(model, tokens())
    model.resize_token_embeddings(57)
    assert_equal(output_of(model, tokens())[..., :51], expected)
    assert not model.lm_head.weight.requires_grad
    assert len(melora_fx.sites(model)) == 2


def test_lbfgs() -> None:
    model = rewritten_tower()
    x = randn(5, IN)
    optimizer = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad], line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    before = float(optimizer.step(closure).detach())
    assert float(closure().detach()) < before / 100
