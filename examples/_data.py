"""The quickstart's data: the sentences of the package chatterbot-corpus, by language and topic."""

from __future__ import annotations

import importlib.util
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from torch import Tensor

# Files of the corpus that have one subject ("conversations", "trivia" and "gossip" have none). The order is the head's.
TOPICS = (
    "ai botprofile compliment emotion food games greetings health history humor "
    "language literature money movies politics proverbs psychology science sports unilab"
).split()
ALIASES = {"sport": "sports", "history_brasil": "history", "linguistic_knowledge": "language"}
SEED, BATCH = 0, 32

Encode = Callable[[list[str]], dict[str, Tensor]]


class Row(NamedTuple):
    """A sentence and the number of its topic."""

    text: str
    topic: int


class Split(NamedTuple):
    """A language's sentences."""

    train: list[Row]
    held_out: list[Row]


def package_folder(name: str) -> Path:
    """Where a package's files lie; it is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f'quickstart needs the package {name}: pip install "gift_func[demo]"')
    return Path(spec.submodule_search_locations[0])


def read(language: str) -> Split:
    """A language's sentences, 70 % of the conversations to train on and 30 % held out."""
    conversations: dict[str, list[Row]] = {}
    for file in sorted((package_folder("chatterbot_corpus") / "data" / language).glob("*.yml")):
        topic = ALIASES.get(file.stem, file.stem)
        if topic in TOPICS:
            for said in yaml.safe_load(file.read_text(encoding="utf8"))["conversations"]:
                # A question and its first two answers: a few questions have dozens, and would make most of the data.
                rows = [Row(" ".join(str(text).split()), TOPICS.index(topic)) for text in said[:3]]
                conversations.setdefault(plain(rows[0].text), []).extend(rows)
    # Split by question, so that no answer is held out whose question was trained on, and drop what comes twice.
    questions = sorted(conversations)
    random.Random(SEED).shuffle(questions)
    cut = round(0.3 * len(questions))
    seen = {""}
    halves: list[list[Row]] = []
    for half in (questions[cut:], questions[:cut]):
        fresh = {plain(row.text): row for question in half for row in conversations[question] if plain(row.text) not in seen}
        seen.update(fresh)
        halves.append(list(fresh.values()))
    return Split(*halves)


def plain(text: str) -> str:
    """What makes two texts the same one."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def batches(
    rows: list[Row], encode: Encode, shuffle: random.Random | None = None
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Batches of sentences of like length (short ones should not wait for the padding of long ones), and their topics."""
    jitter = shuffle.random if shuffle else lambda: 0.0
    ordered = sorted(rows, key=lambda row: len(row.text) + 8 * jitter())
    chunks = [ordered[start : start + BATCH] for start in range(0, len(ordered), BATCH)]
    if shuffle:
        shuffle.shuffle(chunks)
    for chunk in chunks:
        yield encode([row.text for row in chunk]), torch.tensor([row.topic for row in chunk])


def majority(split: Split) -> float:
    """Accuracy of always answering the language's most frequent topic."""
    top = Counter(row.topic for row in split.train).most_common(1)[0][0]
    return sum(row.topic == top for row in split.held_out) / len(split.held_out)
