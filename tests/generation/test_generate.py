"""`generate`: writes what torch's own `generate` writes, for several texts or one, and ends each at its place."""

import json
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.decoders import CONFIG, VOCABULARY, adapted_llama, llama, read_by, text_folder
from support.exports import Exports
from support.models import fill
from transformers import AutoTokenizer

import melora_fx
from exporters import OrtRunner, generate, write_ort_adapter
from exporters.generation.decoder import CachedDecoder
from exporters.generation.generate import new_tokens
from melora_fx import MELoRAConfig, MELoRAError

PROMPTS = ["w40 w4 w18 w47 w44 w8 w43", "w12 w46", "w5 w9 w4 w20 w33"]
"""The model writes many tokens after the first two prompts, and few after the last."""

NEVER = {"eos_token_id": None}


def by_torch(model: Any, folder: Path, prompts: Sequence[str], new: int, ends: list[int] | None = None) -> list[str]:
    """Returns what torch's `generate` writes after each prompt, one at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.generation_config.eos_token_id = ends
    written = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        outputs = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new)
        new_ids = outputs[0, ids.size(1) :].tolist()
        stop = next((place for place, token in enumerate(new_ids) if token in (ends or ())), len(new_ids))
        written.append(read_by(tokenizer, ids[0].tolist(), new_ids[:stop]))
    return written


@pytest.fixture(scope="module")
def folder(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a plain model, whose end token is a token like any other."""
    return text_folder(exports("decoder").path, tmp_path_factory.mktemp("decoder") / "texts", **NEVER)


@pytest.fixture(scope="module")
def swap_folder(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    graph = exports("adapted decoder", adapter="swap", target="ort-cpu").path
    return text_folder(graph, tmp_path_factory.mktemp("decoder") / "texts", **NEVER)


def variant(folder: Path, new: Path, **settings: Any) -> Path:
    return text_folder(folder / "model.onnx", new, lambda _: None, **settings)


def test_texts_at_once_and_alone_are_torchs(folder: Path) -> None:
    expected = by_torch(llama(), folder, PROMPTS, 20)
    assert generate(folder, PROMPTS, max_new_tokens=20) == expected
    assert [generate(folder, prompt, max_new_tokens=20) for prompt in PROMPTS] == [[text] for text in expected]
    assert generate(folder / "model.onnx", reversed(PROMPTS), max_new_tokens=20, threads=1) == expected[::-1]
    assert generate(str(folder), PROMPTS[:1], max_new_tokens=1) == by_torch(llama(), folder, PROMPTS[:1], 1)


def end_after(folder: Path, prompt: str, number: int) -> int:
    """Returns a token that a model writes at this place after a prompt or later, but not before it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt)["input_ids"]
    decoder = CachedDecoder(OrtRunner(folder / "model.onnx"), 1)
    tokens = [step[0] for step in new_tokens(decoder, [ids], [20])]
    return next(int(token) for token in tokens[number:] if token is not None and token not in tokens[:number])


def test_an_end_token_ends_its_text_and_the_others_go_on(folder: Path, tmp_path: Path) -> None:
    ends = [end_after(folder, PROMPTS[0], 3), end_after(folder, PROMPTS[1], 8)]
    ended = variant(folder, tmp_path / "ended", eos_token_id=ends)
    expected = by_torch(llama(), folder, PROMPTS, 20, ends)
    assert len({len(text.split()) for text in expected}) > 1
    assert generate(ended, PROMPTS, max_new_tokens=20) == expected
    assert [generate(ended, prompt, max_new_tokens=20)[0] for prompt in PROMPTS] == expected
    one = variant(folder, tmp_path / "one", eos_token_id=ends[0])
    assert generate(one, PROMPTS, max_new_tokens=20) == by_torch(llama(), folder, PROMPTS, 20, ends[:1])


def test_a_text_that_ends_at_once_is_empty(folder: Path, tmp_path: Path) -> None:
    end = end_after(folder, PROMPTS[1], 0)
    pieces = []
    ended = variant(folder, tmp_path / "ended", eos_token_id=end)
    assert generate(ended, PROMPTS[1], on_text=lambda *piece: pieces.append(piece)) == [""]
    assert pieces == []


@pytest.mark.parametrize("source", ["generation_config.json", "config.json"])
def test_where_end_tokens_stand(folder: Path, tmp_path: Path, source: str) -> None:
    """As in torch: only generation_config.json counts, if it is there; the tokenizer's end token does not."""
    end = end_after(folder, PROMPTS[0], 2)
    own = variant(folder, tmp_path / "own")
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((own / name).read_text())
        settings["eos_token_id"] = end if name == source else None
        (own / name).write_text(json.dumps(settings))
    expected = by_torch(llama(), folder, PROMPTS[:1], 20, [end] if source == "generation_config.json" else None)
    assert generate(own, PROMPTS[0], max_new_tokens=20) == expected
    (own / "generation_config.json").unlink()
    expected = by_torch(llama(), folder, PROMPTS[:1], 20, [end] if source == "config.json" else None)
    assert generate(own, PROMPTS[0], max_new_tokens=20) == expected


def test_a_text_ends_at_the_models_last_position(folder: Path) -> None:
    """Each text at its own, however long the others are."""
    long = " ".join(f"w{4 + number % 40}" for number in range(60))
    texts = generate(folder, [PROMPTS[1], long])
    alone = [generate(folder, prompt)[0] for prompt in (PROMPTS[1], long)]
    assert texts == alone == [*by_torch(llama(), folder, [PROMPTS[1]], 62), *by_torch(llama(), folder, [long], 4)]


@pytest.mark.parametrize("length", [63, 64, 65])
def test_prompts_of_as_many_tokens_as_there_are_positions(folder: Path, length: int) -> None:
    long = " ".join(f"w{4 + number % 40}" for number in range(length))
    if length < 64:
        assert generate(folder, long) == by_torch(llama(), folder, [long], 1)
        return
    with pytest.raises(MELoRAError, match=rf"prompt 1 has {length} tokens: the model in `.*` has 64 positions"):
        generate(folder, ["w5", long])


def test_an_empty_prompt_begins_with_the_tokenizers_first_token(folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([[tokenizer.bos_token_id]])
    model = llama()
    model.generation_config.eos_token_id = None
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=9)[0].tolist()
    assert generate(folder, ["", PROMPTS[0]], max_new_tokens=9)[0] == read_by(tokenizer, [1], whole[1:])
    own = variant(folder, tmp_path / "own")
    settings = json.loads((own / "tokenizer_config.json").read_text())
    settings["bos_token"] = None
    (own / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(MELoRAError, match=r"prompt 1 \(=''\) has no tokens, and the tokenizer no first token"):
        generate(own, ["w5", ""])


@pytest.mark.parametrize("token", [None, "<added>"], ids=["none", "one that the model has not"])
def test_a_tokenizers_padding_does_not_matter(folder: Path, tmp_path: Path, token: str | None) -> None:
    own = variant(folder, tmp_path / "own")
    settings = json.loads((own / "tokenizer_config.json").read_text())
    settings["pad_token"] = token
    (own / "tokenizer_config.json").write_text(json.dumps(settings))
    if token is not None:
        assert AutoTokenizer.from_pretrained(own).pad_token_id >= VOCABULARY
    assert generate(own, PROMPTS, max_new_tokens=9) == generate(folder, PROMPTS, max_new_tokens=9)


def test_adapters_as_folders_and_as_files(swap_folder: Path, tmp_path: Path) -> None:
    model = adapted_llama()
    melora_fx.save_adapter(model, tmp_path / "adapter")
    write_ort_adapter(tmp_path / "adapter", swap_folder / "model.onnx", tmp_path / "a.onnx_adapter")
    expected = by_torch(model, swap_folder, PROMPTS, 9)
    assert generate(swap_folder, PROMPTS, adapter=tmp_path / "adapter", max_new_tokens=9) == expected
    assert generate(swap_folder, PROMPTS, adapter=str(tmp_path / "a.onnx_adapter"), max_new_tokens=9) == expected
    base = by_torch(llama(), swap_folder, PROMPTS, 9)
    assert generate(swap_folder, PROMPTS, max_new_tokens=9) == base != expected


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]], ids=["every site", "some sites"])
def test_adapters_of_other_ranks(swap_folder: Path, tmp_path: Path, targets: Any) -> None:
    config = MELoRAConfig(rank=(5, 3), num_blocks=2, alpha=(9, 2))
    model = fill(melora_fx.rewrite(llama(), targets, config), seed=7)
    melora_fx.save_adapter(model, tmp_path / "adapter")
    expected = by_torch(model, swap_folder, PROMPTS, 9)
    assert generate(swap_folder, PROMPTS, adapter=tmp_path / "adapter", max_new_tokens=9) == expected


def test_adapters_that_do_not_fit_are_refused(folder: Path, swap_folder: Path, tmp_path: Path) -> None:
    other = fill(melora_fx.rewrite(llama(), "all-linear", MELoRAConfig(rank=2, num_blocks=1)))
    melora_fx.save_adapter(other, tmp_path / "blocks")
    with pytest.raises(MELoRAError, match="num_blocks 1 and split None, the graph's are 2"):
        generate(swap_folder, "w5", adapter=tmp_path / "blocks")
    wide = fill(melora_fx.rewrite(llama(hidden_size=64), "all-linear", CONFIG))
    melora_fx.save_adapter(wide, tmp_path / "wide")
    with pytest.raises(MELoRAError, match="does not fit the model"):
        generate(swap_folder, "w5", adapter=tmp_path / "wide")
    with pytest.raises(MELoRAError, match=r"the adapter `.*nowhere` does not exist"):
        generate(swap_folder, "w5", adapter=tmp_path / "nowhere")
    with pytest.raises(MELoRAError, match="swap"):
        generate(folder, "w5", adapter=tmp_path / "blocks")


def test_seeds_decide_what_is_drawn(folder: Path) -> None:
    options: dict[str, Any] = {"sample": True, "max_new_tokens": 12, "temperature": 2.0}
    first, again, other = (generate(folder, PROMPTS, seed=seed, **options) for seed in (1, 1, 2))
    assert first == again != other
    assert first != generate(folder, PROMPTS, max_new_tokens=12)
    likely = generate(folder, PROMPTS, max_new_tokens=12)
    assert generate(folder, PROMPTS, sample=True, top_p=1e-9, max_new_tokens=12) == likely
    assert generate(folder, PROMPTS, sample=True, temperature=5e-324, max_new_tokens=12) == likely


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_new_tokens": 0}, r"`max_new_tokens` \(=0\) must be a whole number, 1 or more"),
        ({"max_new_tokens": 2.0}, r"`max_new_tokens` \(=2\.0\) must be a whole number"),
        ({"max_new_tokens": "5"}, r"`max_new_tokens` \(='5'\) must be a whole number"),
        ({"temperature": 0}, r"`temperature` \(=0\) must be above 0; `sample=False` takes the most likely"),
        ({"temperature": -1.0}, r"`temperature` \(=-1\.0\) must be above 0"),
        ({"temperature": float("nan")}, r"`temperature` \(=nan\) must be above 0"),
        ({"top_p": 0}, r"`top_p` \(=0\) must be above 0 and at most 1"),
        ({"top_p": 1.01}, r"`top_p` \(=1\.01\) must be above 0 and at most 1"),
        ({"top_p": float("nan")}, r"`top_p` \(=nan\) must be above 0"),
        ({"seed": -1}, r"`seed` \(=-1\) must be a whole number, 0 or more"),
        ({"seed": 1.5}, r"`seed` \(=1\.5\) must be a whole number"),
        ({"prompts": []}, r"`prompts` \(=\[\]\) must be one string or several"),
        ({"prompts": [5]}, r"`prompts` \(=\[5\]\) must be one string or several"),
        ({"prompts": None}, r"`prompts` \(=None\) must be one string or several"),
        ({"prompts": b"w5"}, r"`prompts` \(=b'w5'\) must be one string or several"),
        ({"provider": "abacus"}, r"`provider` \(='abacus'\)"),
    ],
    ids=str,
)
def test_options_out_of_range(folder: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        generate(folder, **{"prompts": "w5"} | options)


def test_graphs_and_folders_that_no_text_comes_of(exports: Exports, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MELoRAError, match=r"nowhere/model\.onnx` does not exist"):
        generate(tmp_path / "nowhere", "w5")
    own = variant(folder, tmp_path / "own")
    shutil.copytree(Path(exports("tower").path).parent, own, dirs_exist_ok=True)
    with pytest.raises(MELoRAError, match="has no key-value cache: export a model that generates with `use_cache=T"):
        generate(own, "w5")
    assert not [*Path(exports("decoder").path).parent.glob("tokenizer*")]
    with pytest.raises(MELoRAError, match=r"the configurations and tokenizer of .* cannot be read"):
        generate(exports("decoder").path, "w5")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["{", "[]", "\udcff"], ids=["half", "a list", "no text"])
def test_files_that_cannot_be_read(folder: Path, tmp_path: Path, name: str, content: str) -> None:
    own = variant(folder, tmp_path / "own")
    (own / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(MELoRAError, match=r"the configurations and tokenizer of .* cannot be read"):
        generate(own, "w5")


def test_settings_of_other_ways_to_generate_change_nothing(folder: Path, tmp_path: Path) -> None:
    settings = {
        "num_beams": 4,
        "do_sample": True,
        "temperature": 0.1,
        "max_length": 3,
        "suppress_tokens": [5],
        "x": [1],
    }
    own = variant(folder, tmp_path / "own", forced_bos_token_id=3, early_stopping="never", **settings)
    assert generate(own, PROMPTS, max_new_tokens=6) == generate(folder, PROMPTS, max_new_tokens=6)


def test_several_threads_generate_at_once(swap_folder: Path, tmp_path: Path) -> None:
    melora_fx.save_adapter(adapted_llama(), tmp_path / "adapter")
    cases = [(prompt, adapter) for prompt in PROMPTS for adapter in (None, tmp_path / "adapter")]
    expected = [generate(swap_folder, prompt, adapter=adapter, max_new_tokens=9) for prompt, adapter in cases]
    found: dict[int, list[str]] = {}

    def write(index: int) -> None:
        prompt, adapter = cases[index]
        found[index] = generate(swap_folder, prompt, adapter=adapter, max_new_tokens=9, threads=1)

    threads = [threading.Thread(target=write, args=(index,)) for index in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(len(cases))] == expected
