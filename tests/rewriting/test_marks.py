"""What `rewrite` leaves on modules: one mark each, one on the root; and what stood there before comes back."""

import copy
import gc
from typing import Any

import pytest
import torch
from support.models import bert, by_torch_save, fill, tower
from torch import nn
from torch.optim import optimizer as torch_optimizer

import melora_fx
from melora_fx.rewriting.marks import Patches
from melora_fx.rewriting.stale_optimizer import _Watch

CONFIG = melora_fx.MELoRAConfig(rank=2, num_blocks=4)


def rewritten_bert() -> nn.Module:
    return fill(melora_fx.rewrite(bert(), "query", CONFIG))


def marks_of(model: nn.Module) -> dict[str, list[str]]:
    """Our attributes by module, beside the adapters."""
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
    patches.take_off(model)
    assert vars(model)["given"] is None
    assert "new" not in vars(model)


def test_the_hook_on_optimizers_goes_with_the_last_model() -> None:
    gc.collect()  # models of other tests
    watch = _Watch()
    hooks = torch_optimizer._global_optimizer_pre_hooks
    number = len(hooks)
    first, second = tower(), tower()
    watch.add(first)
    watch.add(second)
    assert len(hooks) == number + 1
    watch.discard(first)
    assert len(hooks) == number + 1
    del second
    gc.collect()
    assert len(hooks) == number
    watch.add(first)
    torch.optim.SGD(first.parameters()).step()
    assert len(hooks) == number + 1
    watch.discard(first)
    assert len(hooks) == number
