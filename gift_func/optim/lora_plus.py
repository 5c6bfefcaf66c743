"""LoRA+: a larger learning rate for the factor B than for A."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..adapted_model import AdaptedModel
from ..errors import AdaptError


def lora_plus(
    adapted: AdaptedModel,
    *,
    lr: float,
    ratio: float = 16.0,
    weight_decay: float = 0.0,
    embedding_lr: float = 1e-6,
) -> list[dict[str, Any]]:
    """Parameter groups of LoRA+: `η_B = ratio · η_A`.

    B starts at zero and A does not, so that in wide networks one learning rate for both is too small for B.

    | parameter | learning rate | weight decay |
    |---|---|---|
    | `lora_B`, and vectors (DoRA's magnitude) | `lr · ratio` | `weight_decay` |
    | a bias or a norm's weight that is trained | `lr · ratio` | 0 |
    | tensors that adapt an embedding, also a tied one | `embedding_lr` | `weight_decay` |
    | the others: `lora_A`, other matrices | `lr` | `weight_decay` |

    Args:
        adapted: an adapted model with a `lora_B`.
        lr: the learning rate of A.
        ratio: how many times larger B's is, at least 1.
        weight_decay: that of all but biases and norms.
        embedding_lr: the learning rate of tensors that adapt embeddings.

    Returns:
        Groups for any optimizer of torch, in the table's order; empty ones are left out. Each trained parameter is in exactly
        one group.

    Raises:
        AdaptError: if no parameter has a `lora_B`, or a number is out of its range.

    Example:
        >>> import torch, gift_func as gf
        >>> adapted = gf.adapt(torch.nn.Linear(4, 4), gf.LoRA(rank=2))
        >>> optimizer = torch.optim.AdamW(gf.optim.lora_plus(adapted, lr=1e-4))
        >>> [(len(group["params"]), group["lr"]) for group in optimizer.param_groups]
        [(1, 0.0016), (1, 0.0001)]

    References:
        Hayou et al., LoRA+: Efficient Low Rank Adaptation of Large Models, 2024 (arXiv:2402.12354). The groups are those
        of PEFT's `create_loraplus_optimizer`, but for norms other than LayerNorm, whose weights it decays, and for
        DoRA's magnitude of an embedding, which it trains at B's rate.
    """
    for name, value, least in [("lr", lr, 0), ("ratio", ratio, 1), ("embedding_lr", embedding_lr, 0)]:
        if not value >= least:
            raise AdaptError(f"{name} is a number of at least {least}, got {name}={value!r}")
    if not weight_decay >= 0:
        raise AdaptError(f"weight_decay is a number of at least 0, got weight_decay={weight_decay!r}")
    if not any("lora_B" in parameter.names for parameter in adapted.adapted_parameters):
        raise AdaptError("LoRA+ is about methods that train a lora_B, such as gf.LoRA, and nothing is adapted by one")
    groups: dict[str, dict[str, Any]] = {
        "b": {"params": [], "lr": lr * ratio, "weight_decay": weight_decay},
        "undecayed": {"params": [], "lr": lr * ratio, "weight_decay": 0.0},
        "embedding": {"params": [], "lr": embedding_lr, "weight_decay": weight_decay},
        "others": {"params": [], "lr": lr, "weight_decay": weight_decay},
    }
    places = adapted.copy_pool.outline.places
    seen: set[int] = set()
    for adapted_parameter in adapted.adapted_parameters:
        embeds = any(isinstance(module, (nn.Embedding, nn.EmbeddingBag)) for module, _ in places[adapted_parameter.name])
        for local, name in adapted_parameter.names.items():
            parameter = adapted.adapter[name]
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            if embeds:
                kind = "embedding"
            elif parameter.ndim == 1 and local in ("", "diff"):
                kind = "undecayed"
            else:
                kind = "b" if local == "lora_B" or parameter.ndim == 1 else "others"
            groups[kind]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]
