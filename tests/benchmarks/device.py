"""The same questions on a Llama with random weights, of sizes that need an accelerator: `--device cuda`.

There weights are bfloat16 and times are CUDA events'; with `--device cpu` the quick run tries the rows on a tiny one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

import gift_func as gf

from .decode import cache_name, next_token
from .measure import Calls, Case, Counts, Scale
from .pairs import peft_family, quiet
from .together import shuffled, stepping

LINEARS = gf.select.type_(nn.Linear)
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 128},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""How much two outputs that should be equal may differ, as a part of their norm.

In bfloat16, rounding grows over the layers: with 32 of them and random weights, two correct orders of the same sums differ
by 2 to 6 % of the norm, and single numbers by more. The rows are checked closely in float32, on the CPU.
"""


@dataclass(frozen=True)
class Place:
    """A network and where it runs.

    Attributes:
        size: a name of `SIZES`.
        device: torch's name of it.
    """

    size: str
    device: str

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.device == "cpu" else torch.bfloat16

    def ids(self, rows: int, length: int) -> Tensor:
        """Random tokens."""
        most: int = SIZES[self.size]["vocab_size"]
        return torch.randint(0, most, (rows, length), generator=torch.Generator().manual_seed(rows)).to(self.device)

    def adapted(self, method: gf.Method, seed: int = 0) -> gf.AdaptedModel:
        """The network adapted in every linear layer, all trained tensors away from zero."""
        made = gf.adapt(base(self), {LINEARS: method}, generator=torch.Generator(self.device).manual_seed(seed))
        generator = torch.Generator(self.device).manual_seed(seed + 1)
        with torch.no_grad():
            for tensor in made.trainable_parameters():
                noise = torch.randn(tensor.shape, generator=generator, device=self.device)
                tensor.add_(0.02 * noise.to(tensor.dtype))
        return made

    def family(self, size: int) -> dict[str, gf.AdaptedModel]:
        """LoRAs that differ in every tensor, by name."""
        return {f"a{index}": self.adapted(gf.LoRA(rank=16), index) for index in range(size)}

    def check(self, what: str, found: Tensor, wanted: Tensor, plain: Tensor) -> None:
        """Two routes lead to one output, which is not what the network computes without an adapter.

        Args:
            plain: what it computes without one.
        """
        check_close(what, found.float(), wanted.float(), plain.float(), TOLERANCE[self.dtype])


def check_close(what: str, found: Tensor, wanted: Tensor, plain: Tensor, tolerance: float) -> None:
    """Refuse outputs that differ, and adapters that change the output by little more than the two routes differ."""
    size, off, moved = ((wanted - other).norm().item() for other in (torch.zeros_like(wanted), found, plain))
    if not off <= tolerance * size:
        raise AssertionError(f"{what} differ by {off / size:.1e} of their norm; {tolerance:g} is allowed")
    if not moved >= max(5 * off, 0.01 * size):
        raise AssertionError(
            f"{what} differ by {off / size:.1e} of their norm, and the adapters change them by {moved / size:.1e}: "
            "equality would say nothing"
        )


@cache
def llama(place: Place) -> nn.Module:
    """The network, frozen. The one asked for last is kept."""
    import transformers

    quiet()
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(place.dtype)
    try:
        with torch.device(place.device):
            network: Any = transformers.LlamaModel(transformers.LlamaConfig(**SIZES[place.size]))
    finally:
        torch.set_default_dtype(before)
    made: nn.Module = network.requires_grad_(False).train()
    return made


@cache
def base(place: Place) -> gf.FrozenBase:
    return gf.FrozenBase.of(llama(place))


def sharing(model: nn.Module) -> nn.Module:
    """A copy of a network by the very same tensors."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def floor(place: Place) -> nn.Module:
    """The frozen network, whose backward carries gradients to what the embedding gives."""
    made = sharing(llama(place))
    made.get_submodule("embed_tokens").register_forward_hook(
        lambda _module, _args, out: out.requires_grad_() if torch.is_grad_enabled() else None
    )
    return made


def states(model: Callable[..., Any], tokens: Tensor, **extra: Any) -> Tensor:
    found: Tensor = model(input_ids=tokens, use_cache=False, **extra).last_hidden_state
    return found


def training(model: nn.Module, tokens: Tensor) -> Callable[[], object]:
    """A step of plain SGD at a rate of 0."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return steps(lambda: states(model, tokens), trained)


def steps(forward: Callable[[], Tensor], trained: Sequence[nn.Parameter]) -> Callable[[], object]:
    cotangents = [torch.ones_like(forward().detach())]
    return stepping(lambda: [forward()], trained or [nn.Parameter(torch.zeros(()))], cotangents)


def peft_of(place: Place, method: gf.Method, ours: gf.AdaptedModel) -> nn.Module:
    """PEFT's model of the same adapter around the same tensors."""
    import tempfile

    from .pairs import read_by_peft

    with tempfile.TemporaryDirectory() as folder:
        gf.interop.peft.save(ours, folder)
        return read_by_peft(sharing(llama(place)), folder).train()


def step(method: gf.Method, place: Place, scale: Scale) -> Case:
    """A training step by one method."""
    tokens = place.ids(4, 512) if scale.full else place.ids(2, 8)
    ours = place.adapted(method)
    theirs = peft_of(place, method, ours)
    with torch.no_grad():
        place.check("outputs", states(ours, tokens), states(theirs, tokens), states(llama(place), tokens))
    calls = {"ours": training(ours, tokens), "PEFT": training(theirs, tokens), "floor": training(floor(place), tokens)}
    return Case(calls, facts={"tokens": tokens.numel()})


def together(place: Place, scale: Scale) -> Case:
    """A step of many adapters, each on its own sequence: mapped, mixed, and in PEFT one after another."""
    size, length = (32, 64) if scale.full else (3, 8)
    tokens, adapters = place.ids(size, length), place.family(size)
    ens, bank = gf.stack(adapters.values()), gf.AdapterBank(adapters).train()
    theirs = peft_family_of(place, {"a0": adapters["a0"]})
    members = list(range(size))
    with torch.no_grad():
        wanted = torch.cat([states(adapter, row) for adapter, row in zip(adapters.values(), tokens.split(1), strict=True)])
        plain = states(llama(place), tokens)
        place.check("mapped", states(ens.map, tokens.unsqueeze(1)).squeeze(1), wanted, plain)
        place.check("mixed", states(ens.mix, tokens, members=members), wanted, plain)
        place.check("mixed by a bank", states(bank, tokens, adapters=list(adapters)), wanted, plain)
    alone = [training(theirs, row) for row in tokens.split(1)]

    def in_turn() -> None:
        for one in alone:
            one()

    stacked, separate = list(ens.trainable_parameters()), list(bank.trainable_parameters())
    calls: Calls = {
        "ours, mapped": steps(lambda: states(ens.map, tokens.unsqueeze(1)), stacked),
        "ours, mixed": steps(lambda: states(ens.mix, tokens, members=members), stacked),
        "ours, a bank": steps(lambda: states(bank, tokens, adapters=list(adapters)), separate),
        "PEFT": in_turn,
        "floor": training(floor(place), tokens),
    }
    mine = ("ours, mapped", "ours, mixed", "ours, a bank")
    ratios = [(key, other) for key in mine for other in ("PEFT", "floor")]
    return Case(calls, ratios, {"adapters": size, "tokens": tokens.numel()}, note="PEFT: one after another")


def mixed(decoding: bool, place: Place, scale: Scale) -> Case:
    """Inference on a batch whose samples all use different adapters: whole prompts, or the next token by a cache."""
    size, length = (32, 32) if scale.full else (3, 8)
    adapters = place.family(size)
    names = shuffled(adapters)
    bank = gf.AdapterBank(adapters).eval()
    theirs = peft_family_of(place, adapters).eval()
    contenders: dict[str, Callable[..., Any]] = {
        "ours": partial(bank, adapters=names), "PEFT": partial(theirs, adapter_names=names), "base": bank.base,
    }  # fmt: skip
    prompts, token = place.ids(size, 16), place.ids(size, 1)
    tokens = place.ids(size, length)
    calls: Calls = {}
    found = {}
    for key, forward in contenders.items():
        with torch.no_grad():
            if decoding:
                cache, name = forward(input_ids=prompts, use_cache=True).past_key_values, cache_name(llama(place))
                found[key] = forward(input_ids=token, use_cache=True, **{name: cache}).last_hidden_state
                calls = {**calls, key: next_token(forward, token, cache, name)}
            else:
                found[key] = states(forward, tokens)
                calls = {**calls, key: torch.no_grad()(partial(states, forward, tokens))}
    place.check("outputs", found["ours"], found["PEFT"], found["base"])
    return Case(calls, (("ours", "PEFT"), ("ours", "base")), {"adapters": size, "tokens": size if decoding else tokens.numel()})


def peft_family_of(place: Place, adapters: dict[str, gf.AdaptedModel]) -> Any:
    return peft_family(sharing(llama(place)), adapters, share=True).to(place.dtype)


def rows(device: str, full: bool) -> dict[str, Callable[[Scale], Case | Counts]]:
    """The rows on a device."""
    made: dict[str, Callable[[Scale], Case | Counts]] = {}
    for size in ("135M", "1B", "8B") if full else ("tiny",):
        place = Place(size, device)
        made[f"{size}/LoRA step"] = partial(step, gf.LoRA(rank=16), place)
        made[f"{size}/DoRA step"] = partial(step, gf.DoRA(rank=16), place)
        made[f"{size}/32 adapters, training"] = partial(together, place)
        made[f"{size}/32 adapters, inference"] = partial(mixed, False, place)
        made[f"{size}/32 adapters, decode"] = partial(mixed, True, place)
    return made
