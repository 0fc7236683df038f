"""The steps of several texts: padding, end tokens, and no unnecessary step; the decoder is scripted."""

from typing import Any

import numpy as np

from exporters.generation.generate import new_tokens, padded


def test_padding_at_either_side() -> None:
    tokens, mask = padded([[5, 9], [7], [4, 8, 3]], left=True)
    assert tokens.tolist() == [[0, 5, 9], [0, 0, 7], [4, 8, 3]]
    assert mask.tolist() == [[0, 1, 1], [0, 0, 1], [1, 1, 1]]
    tokens, mask = padded([[5, 9], [7], [4, 8, 3]], left=False)
    assert tokens.tolist() == [[5, 9, 0], [7, 0, 0], [4, 8, 3]]
    assert mask.tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]


class Scripted:
    """Replaces a decoder: writes these tokens, one list for each text, and stores the tokens and masks that it gets."""

    def __init__(self, *texts: list[int]) -> None:
        self.texts = texts
        self.masks: list[list[list[int]]] = []
        self.tokens: list[list[list[int]]] = []

    def step(self, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        self.tokens.append(tokens.tolist())
        self.masks.append(mask.tolist())
        number = len(self.masks) - 1
        chosen = [text[number] if number < len(text) else 0 for text in self.texts]
        return np.eye(10)[chosen][:, None]


def test_steps_go_on_until_the_last_text_has_ended() -> None:
    decoder: Any = Scripted([5, 9, 6, 6], [7, 8, 9, 6], [4, 4, 4, 4])
    steps = [*new_tokens(decoder, [[1], [1, 2], [3]], [9, 9, 2], ends=[9])]
    assert steps == [[5, 7, 4], [None, 8, 4], [None, None, None]]
    assert decoder.tokens == [[[0, 1], [1, 2], [0, 3]], [[5], [7], [4]], [[0], [8], [4]]]
    assert decoder.masks[2] == [[0, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]


def test_no_step_is_made_that_nobody_reads() -> None:
    decoder: Any = Scripted([5, 6, 7])
    assert [*new_tokens(decoder, [[1]], [2])] == [[5], [6]]
    assert len(decoder.masks) == 2
    decoder = Scripted([9, 6, 7], [9, 6, 7])
    assert [*new_tokens(decoder, [[1], [2]], [5, 5], ends=[9])] == [[None, None]]
    assert len(decoder.masks) == 1
