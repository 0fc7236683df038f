"""Attributes that `rewrite` leaves on modules: one mark each, one on the root; earlier attributes are restored."""

import copy
import gc
import inspect
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import bert, bert_classifier, by_torch_save, fill, tower
from torch import nn
from torch.optim import optimizer as torch_optimizer
from transformers import TrainerControl, TrainerState, TrainingArguments

import melora_fx
from melora_fx import AdapterCheckpointCallback
from melora_fx.rewriting.marks import Patches
from melora_fx.rewriting.stale_optimizer import _Watch

CONFIG = melora_fx.MELoRAConfig(rank=2, num_blocks=4)


def rewritten_bert() -> nn.Module:
    return fill(melora_fx.rewrite(bert(), "query", CONFIG))


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """Replaces PyTorch's table of hooks, to exclude those of other tests' models."""
    empty: dict[int, Any] = OrderedDict()
    monkeypatch.setattr(torch_optimizer, "_global_optimizer_pre_hooks", empty)
    return empty


def marks_of(model: nn.Module) -> dict[str, list[str]]:
    """Returns our attributes by module, except the adapters."""
    found = {path: [name for name in vars(module) if "melora" in name] for path, module in model.named_modules()}
    return {path: names for path, names in found.items() if names}


def test_one_mark_on_each_module_and_one_on_the_root() -> None:
    model = rewritten_bert()
    marks = marks_of(model)
    assert marks.pop("") == ["melora_root"]
    assert set(marks) == set(melora_fx.sites(model))
    assert all(names == ["melora_mark"] for names in marks.values())
    for name, names in marks_of(model).items():
        with melora_fx.disabled(model):
            assert marks_of(model)[name] == names
        with melora_fx.folded(model):
            assert marks_of(model)[name] == names
    assert not marks_of(melora_fx.fold(model))


def own_save(*args: Any, **kwargs: Any) -> str:
    return "the user's own"


@pytest.mark.filterwarnings("ignore:`save_pretrained` of a rewritten model")
@pytest.mark.parametrize("copy_of", [lambda model: model, copy.deepcopy, by_torch_save], ids=["self", "copy", "saved"])
def test_what_stood_on_a_hugging_face_model_comes_back(copy_of: Any) -> None:
    plain = bert()
    plain.save_pretrained = own_save
    model = copy_of(fill(melora_fx.rewrite(plain, "query", CONFIG)))
    assert model.save_pretrained is not own_save
    assert model.save_pretrained("nowhere") == "the user's own"
    melora_fx.fold(model)
    assert model.save_pretrained is own_save
    assert vars(plain).keys() - {"melora_root"} == vars(model).keys() - {"melora_root"}


@pytest.mark.parametrize("copy_of", [lambda model: model, copy.deepcopy, by_torch_save], ids=["self", "copy", "saved"])
def test_nothing_of_ours_stays_on_a_hugging_face_model(copy_of: Any) -> None:
    before = set(vars(bert()))
    assert set(vars(melora_fx.fold(copy_of(rewritten_bert())))) == before


def test_what_is_put_on_a_rewritten_model_stays() -> None:
    model = rewritten_bert()
    model.save_pretrained = own_save
    assert melora_fx.fold(model).save_pretrained is own_save


@pytest.mark.filterwarnings("ignore:`save_pretrained` of a rewritten model")
def test_a_wrapper_around_save_pretrained_stays(tmp_path: Path) -> None:
    model = rewritten_bert()
    save = model.save_pretrained
    model.save_pretrained = lambda folder: save(folder)
    wrapper = model.save_pretrained
    for step in ("rewritten", "folded"):
        model.save_pretrained(tmp_path / step)
        assert model.save_pretrained is wrapper
        assert (tmp_path / step / "model.safetensors").exists()
        if step == "rewritten":
            melora_fx.fold(model)


def test_a_trainers_patches_go_with_a_second_rewrite(tmp_path: Path) -> None:
    """The part is rewritten, a Trainer trains the whole, the part is folded; then the whole is rewritten and folded."""
    before = set(vars(bert_classifier()))
    model = bert_classifier()
    melora_fx.rewrite(model.bert, "query", CONFIG)
    callback = AdapterCheckpointCallback()
    callback.on_init_end(TrainingArguments(str(tmp_path)), TrainerState(), TrainerControl(), model=model)
    melora_fx.fold(model.bert)
    melora_fx.fold(melora_fx.rewrite(model, "query", CONFIG))
    assert set(vars(model)) == before
    model.save_pretrained(tmp_path / "plain")


@pytest.mark.usefixtures("hooks")
def test_a_hook_of_others_is_not_disturbed() -> None:
    """A model is collected while PyTorch iterates over its hooks."""
    watch = _Watch()
    models = [tower()]
    watch.add(models[0])

    def collect(*_: Any) -> None:
        models.clear()
        gc.collect()

    others = [torch_optimizer.register_optimizer_step_pre_hook(collect) for _ in range(2)]
    torch.optim.SGD(nn.Linear(2, 2).parameters()).step()
    for hook in others:
        hook.remove()
    watch.remove_unused_hook()
    assert watch.hook is None


def test_a_model_is_collected_without_a_generator() -> None:
    """Dynamo raises an error for generators when it compiles whole graphs, and a collection may happen then."""
    watch = _Watch()
    models = [tower()]
    watch.add(models[0])
    called = []
    sys.setprofile(lambda frame, event, _: called.append(frame.f_code) if event == "call" else None)
    try:
        models.clear()
        gc.collect()
    finally:
        sys.setprofile(None)
    assert watch.forget.__code__ in called
    assert [code.co_name for code in called if code.co_flags & inspect.CO_GENERATOR] == []


def test_patches_tell_none_from_nothing() -> None:
    model = nn.Identity()
    model.given = None
    patches = Patches()
    for value in (1, 2):
        patches.put(model, "given", value)
        patches.put(model, "new", value)
    with patches.lifted(model):
        assert vars(model)["given"] is None
        assert "new" not in vars(model)
    assert (model.given, model.new) == (2, 2)
    patches.take_all_off(model)
    assert vars(model)["given"] is None
    assert "new" not in vars(model)


def test_the_hook_on_optimizers_goes_with_the_last_model(hooks: dict[int, Any]) -> None:
    watch = _Watch()
    first, second = tower(), tower()
    watch.add(first)
    watch.add(second)
    assert len(hooks) == 1
    watch.discard(first)
    assert len(hooks) == 1
    del second
    gc.collect()
    assert not hooks
    watch.add(first)
    torch.optim.SGD(first.parameters()).step()
    assert len(hooks) == 1
    watch.discard(first)
    assert not hooks
