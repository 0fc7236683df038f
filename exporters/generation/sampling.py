"""Chooses the next token of each text: the most likely one, or one drawn at random."""

import numpy as np


def most_likely(logits: np.ndarray) -> np.ndarray:
    """Returns the index of the largest logit of each row, (batch, vocabulary) → (batch,)."""
    chosen: np.ndarray = logits.argmax(-1)
    return chosen


def draw(logits: np.ndarray, temperature: float, top_p: float, generator: "np.random.Generator") -> np.ndarray:
    """Draws one index per row, (batch, vocabulary) → (batch,), with the probabilities softmax(logits / temperature),
    from the smallest set of tokens with a total probability of at least `top_p`.
    """
    wide = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature leaves only the most likely tokens
        scaled = (wide - wide.max(-1, keepdims=True)) / temperature
    order = np.argsort(-scaled, axis=-1, kind="stable")
    sorted_logits = np.take_along_axis(scaled, order, -1)
    weights = np.exp(sorted_logits)
    weights /= weights.sum(-1, keepdims=True)
    before = weights.cumsum(-1) - weights
    weights[before >= top_p] = 0
    bounds = weights.cumsum(-1)
    points = generator.random((len(logits), 1)) * bounds[:, -1:]
    places = (bounds <= points).sum(-1, keepdims=True)
    chosen: np.ndarray = np.take_along_axis(order, places, -1)[:, 0]
    return chosen
