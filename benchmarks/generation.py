"""Does an exported decoder generate the same text as torch: merged, unmerged, swappable, and in onnxruntime-genai?

SmolLM2-135M-Instruct in float32, with an adapter in all linears that was trained on stories. Five prompts are continued
greedily by up to 32 tokens: one by one with transformers' `generate`, with the adapter unmerged; all at once, padded on
the left, with the loop of `exporters.generate` over the graphs of `adapter="fold"`, `"keep"` and `"swap"`; and one by
one with onnxruntime-genai from the same folders. The logits of every step are compared too. Writes generation.csv, with
a row for each way, and generation.md, with the texts. --quick uses a tiny model.
"""

import functools
import itertools
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoTokenizer

import melora_fx
from exporters import OrtRunner, export_onnx, write_ort_adapter
from exporters.generation.decoder import CachedDecoder
from exporters.generation.generate import new_tokens
from exporters.generation.sampling import most_likely
from exporters.measuring.tables import markdown_table
from exporters.onnx_files.cache_names import MASK, TOKENS
from melora_fx import MELoRAConfig, MELoRAError

from .common.cases import Case, Row, run_cases
from .common.needs import why_missing
from .common.origin import written_by
from .common.stories import read_windows, train_adapter, why_no_text
from .deployment.decoding_graphs import Workshop, load_model

CONFIG = MELoRAConfig(rank=8, num_blocks=8, alpha=16)
NEW_TOKENS = 32
PROMPTS = (
    "Once upon a time there was a little boy called Tom. One day",
    "The sun was warm, and Lily",
    "A big dog and a small cat lived in",
    "Mum said:",
    "There was a red ball in the park. Ben wanted to play with it, but his sister",
)
TINY_PROMPTS = ("w5 w9 w4", "w7 w8", "w3 w3 w30 w31", "w90", "w40 w41 w42 w43 w44")
TORCH, TORCH_BASE = "torch", "torch, base"
KINDS = {"fold": "merged", "keep": "unmerged", "swap": "swap, active"}
BASE = "swap, none active"
TOLERANCE = 1e-3
"""Largest absolute difference of a logit between a graph and torch."""

_BETWEEN = " ¦ "


class Written(NamedTuple):
    """The continuation of each prompt: token ids without the end token, and the logits, (steps, vocabulary)."""

    tokens: list[list[int]]
    logits: list[np.ndarray]


def run(options: Namespace) -> int:
    torch.set_num_threads(1)
    model = "Tiny" if options.quick else "SmolLM2-135M"
    missing = why_no_text(options.text) or ("" if options.quick else why_missing(model, options.cache))
    case = Case(f"{model}, {options.steps} steps", functools.partial(measure, model, options), missing)
    settings = f"steps {options.steps}, text {options.text.name}"
    return run_cases(options, [case], settings=settings, write_report=write_report)


def measure(name: str, options: Namespace) -> list[Row]:
    """Returns one row for each way to generate.

    Raises:
        MELoRAError: if the adapter changes no text, or if a text or a logit of a way differs from torch's.
    """
    workshop = Workshop(options.cache, olive="")
    tokenizer = AutoTokenizer.from_pretrained(workshop.model(name))
    prompts = [tokenizer(text).input_ids for text in (TINY_PROMPTS if options.quick else PROMPTS)]
    model = load_model(workshop.model(name))
    written = {TORCH_BASE: by_torch(model, prompts)}
    melora_fx.rewrite(model, "all-linear", CONFIG)
    torch.manual_seed(0)
    train_adapter(model, read_windows(options.text, tokenizer)[0], options.steps)
    written[TORCH] = by_torch(model, prompts)
    if written[TORCH].tokens == written[TORCH_BASE].tokens:
        raise MELoRAError("the adapter changes no text")
    with tempfile.TemporaryDirectory(dir=options.cache) as folder:
        for way, found in by_graphs(model, prompts, Path(folder)):
            print(f"    {way}", flush=True)
            written[way] = found
    texts = _joined(tokenizer.decode(prompt) for prompt in prompts)
    return [row_of(way, written, tokenizer) | {"prompts": texts} for way in written]


def by_torch(model: Any, prompts: Sequence[Sequence[int]]) -> Written:
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    tokens, logits = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        inputs = {TOKENS: ids, MASK: torch.ones_like(ids)}
        found = model.eval().generate(**inputs, **settings, output_logits=True, return_dict_in_generate=True)
        tokens.append(_without_end(found.sequences[0, len(prompt) :].tolist(), _end_tokens(model)))
        logits.append(torch.cat(found.logits).numpy())
    return Written(tokens, logits)


def by_graphs(model: Any, prompts: Sequence[Sequence[int]], folder: Path) -> Iterator[tuple[str, Written]]:
    """Exports the model in each form; yields the name of each way and what it generated."""
    tokens = torch.arange(8).view(2, -1) + 3
    example = {TOKENS: tokens, MASK: torch.ones_like(tokens)}
    ends = _end_tokens(model)
    melora_fx.save_adapter(model, folder / "adapter")
    for kind, way in KINDS.items():
        graph = folder / kind / "model.onnx"
        export_onnx(model, example, graph, adapter=kind, target="ort-cpu", use_cache=True, verify=False)  # type: ignore[arg-type]
        native = None
        if kind == "swap":
            native = folder / "own.onnx_adapter"
            write_ort_adapter(folder / "adapter", graph, native)
        for name, adapter in ((way, native), *([(BASE, None)] if native else [])):
            yield name, by_our_loop(graph, prompts, adapter, ends)
            yield f"{name}, onnxruntime-genai", by_genai(graph.parent, prompts, adapter, ends)
        shutil.rmtree(graph.parent)  # half a gigabyte


def by_our_loop(graph: Path, prompts: Sequence[Sequence[int]], adapter: Path | None, ends: Sequence[int]) -> Written:
    """Generates all texts at once, as `exporters.generate` does."""
    steps: list[np.ndarray] = []

    def choose(logits: np.ndarray) -> np.ndarray:
        steps.append(logits)
        return most_likely(logits)

    decoder = CachedDecoder(OrtRunner(graph, threads=1), len(prompts), adapter)
    found = [*new_tokens(decoder, prompts, [NEW_TOKENS] * len(prompts), ends=ends, choose=choose)]
    tokens = [[token for token in text if token is not None] for text in zip(*found, strict=True)]
    return Written(tokens, [np.stack(rows) for rows in zip(*steps, strict=True)])


def by_genai(folder: Path, prompts: Sequence[Sequence[int]], adapter: Path | None, ends: Sequence[int]) -> Written:
    """Generates the texts one by one, with the settings in the folder."""
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))
    tokens, logits = [], []
    for prompt in prompts:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt) + NEW_TOKENS, batch_size=1)
        generator = genai.Generator(model, parameters)
        if adapter is not None:
            adapters = genai.Adapters(model)
            adapters.load(str(adapter), "own")
            generator.set_active_adapter(adapters, "own")
        generator.append_tokens(np.array(prompt, np.int32))
        steps = []
        while not generator.is_done():
            steps.append(np.array(generator.get_logits()).reshape(-1))
            generator.generate_next_token()
        new = [*map(int, generator.get_sequence(0))][len(prompt) :]
        tokens.append(_without_end(new, ends))
        logits.append(np.stack(steps))
    return Written(tokens, logits)


def row_of(way: str, written: Mapping[str, Written], tokenizer: Any) -> Row:
    """Returns the row of a way, compared with torch with the adapter or without it.

    Raises:
        MELoRAError: if a text differs from torch's, or a logit by more than `TOLERANCE`.
    """
    found, expected = written[way], written[TORCH_BASE if way.startswith((BASE, TORCH_BASE)) else TORCH]
    same = [ours == theirs for ours, theirs in zip(found.tokens, expected.tokens, strict=True)]
    difference = max(
        float(np.abs(ours[: len(theirs)] - theirs[: len(ours)]).max())
        for ours, theirs in zip(found.logits, expected.logits, strict=True)
    )
    if not all(same) or difference > TOLERANCE:
        raise MELoRAError(f"{way}: {sum(same)} of {len(same)} texts equal torch's, logits differ by {difference:.2g}")
    return {
        "side": way,
        "same_texts": f"{sum(same)} of {len(same)}",
        "tokens": sum(map(len, found.tokens)),
        "max_logit": max(float(np.abs(logits).max()) for logits in expected.logits),
        "max_logit_difference": difference,
        "texts": _joined(tokenizer.decode(tokens) for tokens in found.tokens),
    }


def _joined(texts: Iterable[str]) -> str:
    """Joins the texts for one cell, each on one line."""
    return _BETWEEN.join(" ".join(text.split()) for text in texts)


def _without_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    return [*itertools.takewhile(lambda token: token not in ends, tokens)]


def _end_tokens(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


def write_report(rows: Sequence[Mapping[str, str]], folder: Path) -> None:
    """Writes generation.md."""
    first = rows[0]
    sides = {row["side"]: row for row in rows}
    table = [
        (row["side"], row["same_texts"], row["tokens"], f"{float(row['max_logit_difference']):.1e}")
        for row in rows
        if row["side"] not in (TORCH, TORCH_BASE)
    ]
    lines = [
        "# Texts of an exported decoder",
        "",
        f"{written_by('generation', rows)}. {first['case']} on {first['settings'].rpartition(' ')[2]}, float32, all "
        f"linears adapted ({CONFIG.num_blocks} blocks of rank {CONFIG.rank}). Each text is compared "
        f"with that of transformers' `generate` (greedy, at most {NEW_TOKENS} tokens), and its logits at every step; "
        f"the largest logit is {float(sides[TORCH]['max_logit']):.0f}.",
        "",
        *markdown_table(("way", "texts equal to torch's", "tokens", "largest difference of a logit"), table),
        "",
        "| prompt | base | with the adapter |",
        "|---|---|---|",
    ]
    cells = first["prompts"], sides[TORCH_BASE]["texts"], sides[TORCH]["texts"]
    texts = [cell.split(_BETWEEN) for cell in cells]
    lines += [f"| {' | '.join(three)} |" for three in zip(*texts, strict=True)]
    (folder / "generation.md").write_text("\n".join(lines) + "\n")
