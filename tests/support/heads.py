"""Every head class that transformers has for some architectures. In their tiny configurations only heads have certain
sizes: the numbers of labels, of tokens and of projected features.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import transformers as hf
from transformers.models.auto import modeling_auto

import melora_fx
from melora_fx import MELoRAConfig

V, LABELS, PROJECTED = 53, 7, 11
HEAD_SIZES = {1, 2, 4, LABELS, LABELS + 1, PROJECTED, V}
"""Rows of heads: scores, starts and ends, boxes, labels, labels plus "no object", projected features and tokens."""

CONFIG = MELoRAConfig(rank=2, num_blocks=4)

_LAYERS = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 24, "intermediate_size": 36}
_TEXT = _LAYERS | {"vocab_size": V, "max_position_embeddings": 40}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_VISION = _LAYERS | {"image_size": 16, "patch_size": 8}
_PAIR = {"d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2} | {
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 36,
    "decoder_ffn_dim": 36,
}
_BACKBONE = {
    "hidden_sizes": [8, 12, 12, 12],
    "depths": [1, 1, 1, 1],
    "embedding_size": 8,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}

ARCHITECTURES = {
    "bert": _TEXT,
    "roberta": _TEXT | {"pad_token_id": 0},
    "distilbert": {"vocab_size": V, "dim": 24, "n_layers": 1, "n_heads": 2, "hidden_dim": 36},
    "albert": _TEXT | {"embedding_size": 12},
    "electra": _TEXT | {"embedding_size": 12},
    "deberta-v2": _TEXT,
    "modernbert": _TEXT | _TOKENS | {"cls_token_id": 1, "sep_token_id": 2},
    "bart": _PAIR | _TOKENS | {"vocab_size": V, "decoder_start_token_id": 2, "forced_eos_token_id": 2},
    "t5": {"vocab_size": V, "d_model": 24, "d_kv": 12, "d_ff": 36, "num_layers": 1, "num_heads": 2}
    | {"decoder_start_token_id": 0},
    "fsmt": _PAIR | _TOKENS | {"langs": ["en", "de"], "src_vocab_size": V, "tgt_vocab_size": V},
    "gpt2": _TOKENS | {"vocab_size": V, "n_embd": 24, "n_layer": 1, "n_head": 2, "n_positions": 40},
    "llama": _TEXT | _TOKENS | {"num_key_value_heads": 1},
    "xlnet": {"vocab_size": V, "d_model": 24, "n_layer": 1, "n_head": 2, "d_inner": 36},
    "vit": _VISION,
    "detr": _PAIR
    | {"d_model": 64, "encoder_attention_heads": 8}  # its masks need it
    | {"use_timm_backbone": False, "num_queries": 5, "backbone_config": hf.ResNetConfig(**_BACKBONE)},
    "wav2vec2": _LAYERS
    | {"vocab_size": V, "conv_dim": (12,), "conv_stride": (2,), "conv_kernel": (3,), "num_feat_extract_layers": 1}
    | {"classifier_proj_size": PROJECTED, "num_conv_pos_embedding_groups": 2, "codevector_dim": 12}
    | {"proj_codevector_dim": 12}
    | {"tdnn_dim": (16, 16), "tdnn_kernel": (1, 1), "tdnn_dilation": (1, 1), "xvector_output_dim": 12},
    "whisper": _PAIR
    | {"vocab_size": V, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 20}
    | {"classifier_proj_size": PROJECTED, "decoder_start_token_id": 2, "suppress_tokens": None}
    | _TOKENS,
    "clip": {"text_config": _TEXT | _TOKENS, "vision_config": _VISION, "projection_dim": 12},
    "blip": {"text_config": _TEXT | _TOKENS, "vision_config": _VISION, "projection_dim": 12},
}
"""Maps transformers' name of each architecture to the options of its configuration."""


HEADING = "## Heads"

Row = tuple[str, str, str]
"""Class; its heads; other linears outside the base model, which are adapted. Numbers in names are N."""


@dataclass(frozen=True)
class Found:
    """The result of "all-linear" for a head class. `sizes`: rows of all sites. `reasons`: why others are skipped."""

    heads: tuple[str, ...]
    adapted_outside: tuple[str, ...]
    sizes: frozenset[int]
    reasons: tuple[str, ...]


def head_classes(architecture: str) -> list[str]:
    """Returns the classes that transformers' mappings have for an architecture, except base models."""
    mappings = [value for name, value in vars(modeling_auto).items() if re.fullmatch("MODEL_.*_MAPPING_NAMES", name)]
    listed = [mapping[architecture] for mapping in mappings if architecture in mapping]
    names = [name for entry in listed for name in ([entry] if isinstance(entry, str) else entry)]
    return sorted({name for name in names if re.search("For[A-Z]|Head", name)})


CLASSES = {name: architecture for architecture in ARCHITECTURES for name in head_classes(architecture)}
"""Maps each class to its architecture."""


def build(name: str) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    architecture = CLASSES[name]
    num_labels = 2 if "QuestionAnswering" in name else LABELS
    config = hf.AutoConfig.for_model(architecture, **ARCHITECTURES[architecture], num_labels=num_labels)
    return getattr(hf, name)(config).eval()


def find(name: str) -> Found:
    model = build(name)
    report = melora_fx.match(model, "all-linear", CONFIG)
    bodies = [path for path, module in model.named_modules() if path and isinstance(module, hf.PreTrainedModel)]
    sites = [site.name for site in report.sites]
    return Found(
        _short(report.heads),
        _short(site for site in sites if not any(site.startswith(f"{body}.") for body in bodies)),
        frozenset(site.out_features for site in report.sites),
        tuple(reason for _, reason in report.skipped),
    )


def _short(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(re.sub(r"\b\d+\b", "N", name) for name in names))


def row(name: str, found: Found) -> Row:
    return name, _cell(found.heads), _cell(found.adapted_outside)


def _cell(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "-"


def documented_heads(page: str) -> dict[str, Row]:
    """Maps each class to its row in the page."""
    lines = page.partition(HEADING)[2].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| `")]
    return {name.strip("`"): (name.strip("`"), heads, adapted) for name, heads, adapted in rows}


def section() -> str:
    """Returns the page's section on heads."""
    rows = "\n".join(
        f"| `{name}` | {heads} | {adapted} |" for name, heads, adapted in (row(name, find(name)) for name in CLASSES)
    )
    return f"""{HEADING}

The linears that "all-linear" leaves out of every head class that transformers' auto mappings have for
{len(ARCHITECTURES)} architectures: output embeddings, linears that share a weight with an embedding, and linears that
the class adds to its base model. A class with output embeddings has pretrained layers before them, which are adapted.
`keep_trainable` trains a head; its name in `targets` adapts it. `tests/matching/test_left_out_heads.py` checks every
row.

| class | left out | adapted outside the base model |
|---|---|---|
{rows}"""
