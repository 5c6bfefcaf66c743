"""The quickstart's data: what people ask and answer, from the package chatterbot-corpus, by language."""

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

KINDS = ("question", "answer")
SEED, BATCH = 0, 32

Encode = Callable[[list[str]], dict[str, Tensor]]


class Row(NamedTuple):
    """A sentence and whether it was asked (0) or answered (1)."""

    text: str
    kind: int


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


def read(language: str, train: int = 640, held_out: int = 400) -> Split:
    """A language's sentences in lower case and without punctuation, which would give a question away.

    Args:
        language: a folder of the corpus.
        train: sentences to train on, at most.
        held_out: sentences to keep back, at most; 30 % of the conversations are theirs.
    """
    conversations: dict[str, list[Row]] = {}
    for file in sorted((package_folder("chatterbot_corpus") / "data" / language).glob("*.yml")):
        for asked, answered, *_ in (c for c in yaml.safe_load(file.read_text(encoding="utf8"))["conversations"] if len(c) > 1):
            rows = [Row(plain(str(asked)), 0), Row(plain(str(answered)), 1)]
            conversations.setdefault(rows[0].text, []).extend(rows)
    # Split by question, so that no answer is held out whose question was trained on, and drop what comes twice.
    questions = sorted(conversations)
    random.Random(SEED).shuffle(questions)
    cut = round(0.3 * len(questions))
    seen = {""}
    halves: list[list[Row]] = []
    for half, most in ((questions[cut:], train), (questions[:cut], held_out)):
        fresh = {row.text: row for question in half for row in conversations[question] if row.text not in seen}
        seen.update(fresh)
        halves.append(list(fresh.values())[:most])
    return Split(*halves)


def plain(text: str) -> str:
    """What makes two texts the same one."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def batches(
    rows: list[Row], encode: Encode, shuffle: random.Random | None = None
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Batches of sentences of like length (short ones should not wait for the padding of long ones), and their kinds."""
    jitter = shuffle.random if shuffle else lambda: 0.0
    ordered = sorted(rows, key=lambda row: len(row.text) + 8 * jitter())
    chunks = [ordered[start : start + BATCH] for start in range(0, len(ordered), BATCH)]
    if shuffle:
        shuffle.shuffle(chunks)
    for chunk in chunks:
        yield encode([row.text for row in chunk]), torch.tensor([row.kind for row in chunk])


def majority(split: Split) -> float:
    """Accuracy of always saying the more frequent kind."""
    top = Counter(row.kind for row in split.train).most_common(1)[0][0]
    return sum(row.kind == top for row in split.held_out) / len(split.held_out)
