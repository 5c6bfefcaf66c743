"""Under torch.compile: how many graphs, and what a step costs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import gift_func as gf

from .measure import Case, Counts, Scale
from .pairs import check_same, family, mini_lm, peft_family
from .step import LINEARS, backward, cotangents_of, ids, outputs, training

Forward = Callable[..., Any]


class Graphs:
    """A compiler that counts what it is given, and runs it as it is."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, graph: torch.fx.GraphModule, _: Sequence[Tensor]) -> Callable[..., Any]:
        self.seen += 1
        return graph.forward


def graphs(scale: Scale) -> Counts:
    """Graphs that are made for three adapters of one shape in turn."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=64,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.BertModel(config).requires_grad_(False).train()
    tokens = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    adapters = family(model, LINEARS, 3, rank=2)
    theirs = peft_family(model, adapters).train()
    found = {}
    torch.compiler.reset()
    counter = Graphs()
    adapted = adapters["a0"]
    compiled: Forward = torch.compile(pure(adapted), fullgraph=True, backend=counter, dynamic=False)
    for adapter in adapters.values():
        params = {name: p.detach().clone().requires_grad_() for name, p in adapter.named_trainable_parameters()}
        check_same("compiled outputs", compiled(params, tokens), outputs(adapter, tokens))
    found["ours"] = [float(counter.seen)]
    torch.compiler.reset()
    counter = Graphs()
    compiled = torch.compile(theirs, backend=counter, dynamic=False)
    for name, adapter in adapters.items():
        theirs.set_adapter(name)
        check_same("compiled outputs of PEFT", outputs(compiled, tokens), outputs(adapter, tokens))  # type: ignore[arg-type]
    found["PEFT"] = [float(counter.seen)]
    torch.compiler.reset()
    return Counts("graphs", {**found, "one": [1.0]}, (("ours", "PEFT"), ("ours", "one")), targets={"ours/one": 1.0})


def pure(adapted: gf.AdaptedModel) -> Forward:
    """The adapted model as a function of its tensors."""

    def forward(params: dict[str, Tensor], tokens: Tensor) -> list[Tensor]:
        given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        found = gf.functional_call(adapted, params, (), given)
        return [found.last_hidden_state, found.pooler_output]

    return forward


def compiled_step(scale: Scale) -> Case:
    """A training step of LoRA on MiniLM, forward and backward compiled by inductor."""
    model, tokens = mini_lm(), ids(8, 128)
    adapters = family(model, LINEARS, 1)
    ours, theirs = adapters["a0"], peft_family(model, adapters).train()
    torch.compiler.reset()
    contenders: dict[str, Any] = {"ours": whole(ours), "PEFT": whole(theirs), "floor": whole(embedded(model))}
    with torch.no_grad():
        check_same("compiled outputs", outputs(contenders["ours"], tokens), outputs(contenders["PEFT"], tokens))
    cotangents = cotangents_of(ours, tokens)
    for compiled, plain in ((contenders["ours"], ours), (contenders["PEFT"], theirs)):
        gradients: list[list[Tensor]] = []
        for contender in (compiled, plain):
            backward(contender, tokens, cotangents)
            gradients.append([p.grad for p in plain.parameters() if p.grad is not None])
            plain.zero_grad()
        check_same("compiled gradients", gradients[0], gradients[1], 1e-3)
    calls = {key: training(contender, tokens) for key, contender in contenders.items()}
    calls["ours, eager"] = training(ours, tokens)
    ratios = (("ours", "PEFT"), ("ours", "floor"), ("ours", "ours, eager"))
    return Case(calls, ratios, {"tokens": tokens.numel()}, "whole model, inductor, fullgraph", targets={"ours/PEFT": 1.0})


def whole(model: nn.Module) -> Any:
    return torch.compile(model, fullgraph=True, dynamic=False)


def embedded(model: nn.Module) -> nn.Module:
    """The frozen model whose embeddings' outputs want a gradient: as `step.floor`, without a hook to trace."""
    made = copy.deepcopy(model)
    made.get_submodule("embeddings.LayerNorm").get_parameter("bias").requires_grad_()
    return made
