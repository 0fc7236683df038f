"""The text that the study of language trains on, and its windows of tokens.

`botocore` (Apache-2.0) contains Amazon's documentation of each of its services: some 440 documents of prose about an
API, 5 million tokens. A custom text is a file; each hundredth of its lines counts as a document.
"""

import gzip
import html
import json
import random
import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from melora_fx import MELoRAError

BOTOCORE = "botocore"
WINDOW = 128
SHORTEST = 100
"""Least number of characters of a paragraph; shorter ones are phrases such as "The name of the resource."."""
HELD_OUT_SHARE = 0.05
"""Share of the documents that is held out; as many serve to choose learning rates."""
NUM_HELD_OUT = 256
"""Largest number of windows of either."""


def read_documents(text: str) -> dict[str, str]:
    """Returns documents by name, with paragraphs separated by line breaks; each paragraph appears only once.

    Args:
        text: "botocore", or the path of a file.
    """
    found = _services() if text == BOTOCORE else _hundredths(Path(text))
    seen: set[str] = set()
    documents: dict[str, list[str]] = {}
    for name, paragraphs in found:
        new = [paragraph for paragraph in dict.fromkeys(paragraphs) if paragraph not in seen]
        seen.update(new)
        documents.setdefault(name, []).extend(new)
    return {name: "\n".join(document) for name, document in documents.items() if document}


def _services() -> Iterator[tuple[str, list[str]]]:
    """Yields each version of each service under the service's name, so no version of a held-out one is trained on."""
    spec = find_spec("botocore")
    assert spec is not None
    assert spec.origin is not None
    for path in sorted((Path(spec.origin).parent / "data").glob("*/*/service-2.json*")):
        content = path.read_bytes()
        service = json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)
        texts = (" ".join(html.unescape(re.sub(r"<[^>]+>", " ", each)).split()) for each in _documentation(service))
        yield path.parts[-3], [text for text in texts if len(text) >= SHORTEST]


def _documentation(value: Any) -> Iterator[str]:
    """Yields every string with the key "documentation", at any depth."""
    if isinstance(value, dict):
        for key, each in value.items():
            if key == "documentation" and isinstance(each, str):
                yield each
            else:
                yield from _documentation(each)
    elif isinstance(value, list):
        for each in value:
            yield from _documentation(each)


def _hundredths(path: Path) -> Iterator[tuple[str, list[str]]]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    size = -(-len(lines) // 100)
    for start in range(0, len(lines), size):
        yield f"lines {start}", lines[start : start + size]


def windows(documents: dict[str, str], tokenize: Callable[[str], list[int]]) -> dict[str, torch.Tensor]:
    """Returns windows (count, WINDOW) of token ids in int32: "train", "choice" and "held out", of different documents.

    Raises:
        MELoRAError: if the text is too short for a window of each.
    """
    names = sorted(documents)
    random.Random(0).shuffle(names)
    count = max(1, round(HELD_OUT_SHARE * len(names)))
    parts = {"held out": names[:count], "choice": names[count : 2 * count], "train": names[2 * count :]}
    cut = {
        part: torch.cat([_cut(tokenize(documents[name])) for name in chosen] or [_cut([])])
        for part, chosen in parts.items()
    }
    if short := [part for part, found in cut.items() if not len(found)]:
        raise MELoRAError(f"the text is too short: no window of {WINDOW} tokens goes to {' and to '.join(short)}")
    generator = torch.Generator().manual_seed(0)
    for part in ("held out", "choice"):
        order = torch.randperm(len(cut[part]), generator=generator)
        cut[part] = cut[part][order[:NUM_HELD_OUT]].contiguous()
    return cut


def _cut(tokens: list[int]) -> torch.Tensor:
    return torch.tensor(tokens[: len(tokens) // WINDOW * WINDOW], dtype=torch.int32).view(-1, WINDOW)
