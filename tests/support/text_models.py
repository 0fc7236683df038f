"""Tiny model folders with their own tokenizers, and texts that they can learn to distinguish."""

import csv
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

_WORDS = {
    "animals": ["cat", "dog", "horse", "cow", "sheep", "goat", "duck", "hen", "pig", "mouse"],
    "food": ["bread", "cheese", "apple", "soup", "rice", "honey", "butter", "salt", "egg", "cake"],
    "travel": ["train", "boat", "plane", "road", "ticket", "harbour", "station", "bridge", "map", "wheel"],
}


def sentences(count: int) -> list[tuple[str, str]]:
    """Returns (text, label) pairs: the words decide the label, and a number makes each text unique."""
    generator = random.Random(0)
    rows = []
    for number in range(count):
        label = generator.choice(sorted(_WORDS))
        words = generator.choices(_WORDS[label], k=generator.randint(2, 6))
        rows.append((f"{number} {' '.join(words)}", label))
    return rows


def write_csv(path: Path, count: int) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *sentences(count)])
    return path


def word_pieces() -> Any:
    """Returns a tokenizer like BERT's: its first ids are [PAD], [UNK], [CLS], [SEP] and [MASK]."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        [text for text, _ in sentences(300)], trainers.WordPieceTrainer(vocab_size=200, special_tokens=special)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def byte_pairs(*, around: bool, **names: str) -> Any:
    """Returns a tokenizer like RoBERTa's (tokens `around` a text) or GPT-2's; `names`: special tokens, by their ids."""
    special = list(dict.fromkeys(names.values()))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [text for text, _ in sentences(300)], trainers.BpeTrainer(vocab_size=400, special_tokens=special)
    )
    if around:
        ends = [(name, special.index(name)) for name in (names["bos_token"], names["eos_token"])]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{ends[0][0]} $A {ends[1][0]}", special_tokens=ends
        )
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def _roberta_pairs() -> Any:
    return byte_pairs(around=True, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@dataclass(frozen=True)
class TextModel:
    """`build(vocabulary)` returns a model as it is pretrained, without a head that classifies."""

    build: Callable[[int], Any]
    tokenizer: Callable[[], Any]

    def write(self, folder: Path, *, as_bin: bool = False) -> Path:
        """Writes the model and its tokenizer to a folder, the weights in model.safetensors or pytorch_model.bin."""
        torch.manual_seed(0)
        tokenizer = self.tokenizer()
        model = self.build(len(tokenizer))
        with torch.no_grad():  # larger than new weights, as if pretrained, so that words change the output
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(8)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if as_bin:
            (folder / "model.safetensors").unlink()
            torch.save(model.state_dict(), folder / "pytorch_model.bin")
        return folder


_H = 32
_ENCODER = {
    "hidden_size": _H,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
_DISTILBERT = {"dim": _H, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "max_position_embeddings": 40}
_GPT2 = {"n_embd": _H, "n_layer": 2, "n_head": 2, "n_positions": 40, "bos_token_id": 0, "eos_token_id": 0}
_LLAMA = _ENCODER | {"num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": True}

TEXT_MODELS: dict[str, TextModel] = {
    "bert": TextModel(lambda size: hf.BertForMaskedLM(hf.BertConfig(vocab_size=size, **_ENCODER)), word_pieces),
    "distilbert": TextModel(
        lambda size: hf.DistilBertForMaskedLM(hf.DistilBertConfig(vocab_size=size, **_DISTILBERT)), word_pieces
    ),
    "roberta": TextModel(
        lambda size: hf.RobertaForMaskedLM(hf.RobertaConfig(vocab_size=size, **_ENCODER)), _roberta_pairs
    ),
    "albert": TextModel(
        lambda size: hf.AlbertForMaskedLM(
            hf.AlbertConfig(vocab_size=size, **_ENCODER, embedding_size=16, num_hidden_groups=1)
        ),
        word_pieces,
    ),
    "mpnet": TextModel(lambda size: hf.MPNetForMaskedLM(hf.MPNetConfig(vocab_size=size, **_ENCODER)), _roberta_pairs),
    "gpt2": TextModel(
        lambda size: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=size, **_GPT2)),
        lambda: byte_pairs(around=False, eos_token="<|endoftext|>"),
    ),
    "llama": TextModel(
        lambda size: hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=size, **_LLAMA)),
        lambda: byte_pairs(around=False, bos_token="<s>", eos_token="</s>"),
    ),
}
"""The architectures that people use with `melora-fx train` and `demo`, as their checkpoints are published."""


def held_out_accuracy(runner: Any, folder: Path, texts: Any) -> float:
    """Returns the accuracy of a runner on the held-out texts, one by one, with the tokenizer of a folder."""
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    hits = [
        int(runner.run(dict(tokenizer([text], return_tensors="pt")))["logits"].argmax()) == label
        for text, label in texts.held_out
    ]
    return sum(hits) / len(hits)
