"""A service with two hundred adapters of one language model, of which memory holds some twenty-five.

Requests come in; four threads take eight at a time, whatever their adapters, and answer them in one pass. In production the
folder would hold what users trained; a new file counts as soon as it is there.
"""

from __future__ import annotations

import random
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

import gift_func as gf

torch.set_num_threads(1)  # the threads of the service share the processor's cores
torch.manual_seed(0)


class LanguageModel(nn.Module):
    def __init__(self, vocabulary: int = 512, width: int = 128, layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        logits: Tensor = self.head(self.layers(self.embed(ids), mask=mask, is_causal=True))
        return logits


# --- 1. A folder of two hundred adapters, of two strategies

model = LanguageModel().eval()
base, folder = gf.FrozenBase.of(model), tempfile.TemporaryDirectory()
store = gf.AdapterStore(base, folder.name, budget=4_000_000)
mixed: dict[str, gf.Method] = {"*.linear?": gf.LoRA(rank=8, init="random"), "*.norm?": gf.Full()}
for number in range(200):
    store.add(f"user/{number}", gf.adapt(base, mixed if number % 2 else gf.LoRA(rank=4, init="random")))
on_disk = sum(store.path(name).stat().st_size for name in store)
print(f"{len(store)} adapters, {on_disk / 1e6:.0f} MB on disk, at most 4 MB in memory")

# --- 2. Requests: most of few users, as it is in life; one in ten wants the model without an adapter

draw, shape = random.Random(0), (400, 16)
users = [None if draw.random() < 0.1 else f"user/{int(199 * draw.random() ** 8)}" for _ in range(shape[0])]
prompts = torch.randint(512, shape, generator=torch.Generator().manual_seed(1))
batches = [range(start, start + 8) for start in range(0, shape[0], 8)]


def answer(rows: range) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = store(prompts[rows.start : rows.stop], adapters=[users[i] for i in rows])
        return logits[:, -1]


# --- 3. Four threads serve them

start = time.perf_counter()
with ThreadPoolExecutor(4) as pool:
    answers = torch.cat(list(pool.map(answer, batches)))
seconds, counted = time.perf_counter() - start, store.counters
print(f"{shape[0] / seconds:.0f} requests per second; {counted.hits / (counted.hits + counted.misses):.0%} found in memory")
print(store)

# --- 4. Each answer is the one its adapter gives alone, and memory stayed within the budget

assert counted.bytes <= 4_000_000 < on_disk
with torch.inference_mode():
    for user in {name for name in users if name is not None}:
        mine = [i for i, name in enumerate(users) if name == user]
        alone = gf.load_adapter(base, store.path(user))
        torch.testing.assert_close(answers[mine], alone(prompts[mine])[:, -1], rtol=1e-4, atol=1e-4)
folder.cleanup()
