"""The demo's texts: real utterances by topic."""

import sys

import pytest

from exporters.demo.data import load_topics
from melora_fx import MELoRAError


def test_topics_are_real_labelled_texts() -> None:
    pytest.importorskip("chatterbot_corpus", reason="the demo's texts are in a separate pip package")
    texts = load_topics()
    assert {"science", "money", "trivia"} <= set(texts.labels)
    assert len(texts.train) > 800
    assert 0.18 < len(texts.held_out) / (len(texts.train) + len(texts.held_out)) < 0.22
    assert not {text for text, _ in texts.train} & {text for text, _ in texts.held_out}
    assert {label for _, label in texts.held_out} == set(range(len(texts.labels)))
    assert texts == load_topics(), "the split is fixed"


def test_no_data_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "chatterbot_corpus", None)
    with pytest.raises(MELoRAError, match=r"melora_fx\[demo\]"):
        load_topics()
