"""PEFT's directories: what PEFT saves, we load; what we save, PEFT loads; the bytes are the same."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import gift_func as gf
from gift_func.interop.peft import load, save

peft = pytest.importorskip("peft")

pytestmark = [
    # What PEFT has to say about the cases, all of them meant.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

IDS = torch.tensor([[0, 3, 5, 5, 1], [9, 7, 2, 3, 0]])


class MLP(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20, bias=bias)
        self.norm = nn.BatchNorm1d(20)
        self.lin1 = nn.Linear(20, 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.lin1(self.norm(torch.tanh(self.lin0(x))))
        return found


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MLP() for _ in range(3))
        self.lin0 = nn.Linear(2, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.lin0(layer(x))
        return x


class EmbConv1D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
        self.emb = nn.Embedding(10, 8)
        self.conv1d = pytorch_utils.Conv1D(6, 8)
        self.lin0 = nn.Linear(6, 2)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.lin0(torch.tanh(self.conv1d(self.emb(ids))))
        return found


class Conv(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module], **options: Any) -> None:
        super().__init__()
        self.conv = kind(4, 6, 3, **options)
        self.second = kind(6, 4, 1)
        self.lin0 = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.lin0(self.second(torch.tanh(self.conv(x))).flatten(2).mean(-1))
        return found


class MHA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(10, 2)
        self.lin0 = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x.unsqueeze(1)
        found: Tensor = self.lin0(self.mha(h, h, h)[0].squeeze(1))
        return found


class Experts(nn.Module):
    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = transposed
        shapes = [(4, 10, 6), (4, 3, 10)] if transposed else [(4, 6, 10), (4, 10, 3)]
        self.gate_up_proj, self.down_proj = (nn.Parameter(torch.randn(*shape) / 3) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        up: Tensor = self.gate_up_proj if self.is_transposed else self.gate_up_proj.mT
        down: Tensor = self.down_proj if self.is_transposed else self.down_proj.mT
        gate, value = (x @ up).chunk(2, -1)
        found: Tensor = ((torch.tanh(gate) * value) @ down).mean(0)
        return found


class MoE(nn.Module):
    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 10)
        self.experts = Experts(transposed)
        self.lin1 = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.lin1(self.experts(self.lin0(x)))
        return found


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(10, 8)
        self.lin0 = nn.Linear(8, 2)

    def get_output_embeddings(self) -> None:
        return None

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.lin0(self.embed_tokens(ids))
        return found


def x_of(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


X = x_of(5, 10)
Model = Callable[[], nn.Module]
MODELS: dict[str, tuple[Model, Tensor]] = {
    "mlp": (MLP, X),
    "deep": (Deep, X),
    "embconv1d": (EmbConv1D, IDS),
    "conv1d": (lambda: Conv(nn.Conv1d, stride=2), x_of(2, 4, 9)),
    "conv2d": (lambda: Conv(nn.Conv2d, padding=1), x_of(2, 4, 6, 6)),
    "conv2d_groups": (lambda: Conv(nn.Conv2d, groups=2), x_of(2, 4, 6, 6)),
    "conv1d_groups": (lambda: Conv(nn.Conv1d, groups=2, stride=2), x_of(2, 4, 9)),
    "conv3d": (lambda: Conv(nn.Conv3d), x_of(2, 4, 4, 4, 4)),
    "mha": (MHA, X),
    "moe": (MoE, X),
    "moe_transposed": (lambda: MoE(True), X),
    "text": (Text, IDS),
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("mlp", {"target_modules": "lin0"}),
    ("mlp", {"target_modules": ["lin0"]}),
    ("mlp", {"target_modules": ["lin1"], "lora_alpha": 3, "use_rslora": True}),
    ("mlp", {"target_modules": ["lin0", "lin1"], "r": 4, "lora_dropout": 0.1}),
    ("mlp", {"target_modules": "all-linear", "exclude_modules": ["lin1"]}),
    ("mlp", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("mlp", {"target_modules": ["lin0"], "modules_to_save": ["lin1", "norm"]}),
    ("mlp", {"target_modules": ["lin0"], "modules_to_save": ["lin1"], "bias": "all"}),
    ("mlp", {"target_modules": ["lin0"], "bias": "lora_only"}),
    ("mlp", {"target_modules": ["lin0"], "bias": "all"}),
    ("mlp", {"target_modules": ["lin0", "lin1"], "lora_bias": True, "lora_alpha": 32}),
    ("mlp", {"target_modules": ["lin0", "lin1"], "rank_pattern": {"lin1": 2}, "alpha_pattern": {"lin.": 5}}),
    ("mlp", {"target_modules": ["lin0", "lin1"], "init_lora_weights": "orthogonal"}),
    ("mlp", {"target_parameters": ["lin0.weight"]}),
    ("mlp", {"target_parameters": ["lin0.weight", "lin1.weight"], "r": 2}),
    ("mlp", {"target_modules": ["lin0"], "target_parameters": ["lin1.weight"]}),
    ("mlp", {"target_modules": ["lin0", "lin1"], "use_dora": True}),
    ("mlp", {"target_modules": ["lin0"], "use_dora": True, "use_rslora": True, "lora_alpha": 3}),
    ("deep", {"target_modules": ["lin0"]}),
    ("deep", {"target_modules": r"layers\.\d\.lin1"}),
    ("deep", {"target_modules": ["lin0", "lin1"], "layers_to_transform": [0, 2]}),
    ("deep", {"target_modules": ["lin1"], "layers_to_transform": 1, "layers_pattern": "layers"}),
    ("deep", {"target_modules": ["layers.1.lin0"], "rank_pattern": {r"layers\.1\.lin0": 3}}),
    (
        "deep",
        {"target_modules": ["lin0"], "rank_pattern": {"^lin0": 3, r"layers\.1\.lin0": 5}, "modules_to_save": ["layers.2"]},
    ),
    ("embconv1d", {"target_modules": ["emb"]}),
    ("embconv1d", {"target_modules": ["conv1d"], "fan_in_fan_out": True}),
    ("embconv1d", {"target_modules": ["emb", "conv1d"], "r": 3, "lora_alpha": 5}),
    ("embconv1d", {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [3, 7]}}),
    ("embconv1d", {"target_modules": ["emb", "conv1d"], "use_dora": True}),
    ("conv1d", {"target_modules": ["conv"]}),
    ("conv1d", {"target_modules": ["conv", "lin0"], "use_dora": True}),
    ("conv2d", {"target_modules": ["conv"]}),
    ("conv2d", {"target_modules": ["conv", "second", "lin0"], "r": 4, "lora_bias": True}),
    ("conv2d", {"target_modules": ["conv", "lin0"], "use_dora": True}),
    ("conv2d_groups", {"target_modules": ["conv"], "r": 4}),
    ("conv2d_groups", {"target_modules": ["conv", "lin0"], "r": 2, "lora_alpha": 7}),
    ("conv1d_groups", {"target_modules": ["conv"], "r": 4}),
    ("conv3d", {"target_modules": ["conv", "second"]}),
    ("conv3d", {"target_modules": ["conv"], "use_dora": True}),
    ("mha", {"target_modules": ["mha"]}),
    ("mha", {"target_modules": ["mha", "lin0"], "r": 4, "lora_alpha": 2}),
    ("mha", {"target_modules": ["mha"], "bias": "all"}),
    ("mha", {"target_modules": ["mha"], "modules_to_save": ["lin0"], "rank_pattern": {"mha": 3}}),
    ("moe", {"target_parameters": ["gate_up_proj"], "target_modules": []}),
    ("moe", {"target_parameters": ["experts.down_proj", "gate_up_proj"], "target_modules": ["lin0"], "r": 3, "lora_alpha": 5}),
    ("moe", {"target_parameters": ["down_proj", "gate_up_proj"], "rank_pattern": {"experts.down_proj": 2}}),
    ("moe_transposed", {"target_parameters": ["gate_up_proj", "down_proj"], "r": 2}),
    ("moe_transposed", {"target_parameters": ["down_proj", "lin0.weight"]}),
    ("text", {"target_modules": ["lin0"], "trainable_token_indices": [3, 9, 0]}),
    ("text", {"target_modules": ["embed_tokens", "lin0"]}),
    ("text", {"target_modules": ["lin0"], "modules_to_save": ["embed_tokens"]}),
]
EVERY = pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{name}-{options}"[:90] for name, options in CASES])


def model_of(name: str) -> tuple[nn.Module, Tensor]:
    make, x = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return model, x


def theirs_of(model: nn.Module, config: Any, directory: Path) -> Any:
    """PEFT's model with random weights that change the output, saved."""
    torch.manual_seed(1)
    made = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.requires_grad or "trainable_tokens_delta" in name:
                parameter.add_(torch.randn_like(parameter) * (0.05 if name.endswith("bias") else 0.2))
    made.save_pretrained(directory)
    return made


def read(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "adapter_config.json").read_text())
    return found


def weights(directory: Path) -> bytes:
    return (directory / "adapter_model.safetensors").read_bytes()


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5, rtol=1e-5)


@EVERY
def test_lora_from_peft_and_back(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, x = model_of(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    theirs = theirs_of(model, peft.LoraConfig(**options), tmp_path / "theirs")
    ours = load(model, tmp_path / "theirs")
    with torch.no_grad():
        wanted = theirs(x)
        assert not torch.allclose(wanted, model(x), atol=1e-2)
        assert close(ours(x), wanted)
        save(ours, tmp_path / "ours")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
        assert close(again(x), wanted)
        assert torch.equal(load(model, tmp_path / "ours")(x), ours(x))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    kept = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    extra = [key for key in kept if "original_module" in key or "modules_to_save" in key or "embed_tokens.base_layer" in key]
    if not extra:  # what PEFT writes besides is no part of the adapter
        assert weights(tmp_path / "ours") == weights(tmp_path / "theirs")
    saved = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    save_file(saved, tmp_path / "again.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "again.safetensors").read_bytes() == weights(tmp_path / "ours")
    assert all(torch.equal(saved[key], kept[key]) for key in saved)
    config = read(tmp_path / "ours")
    assert config.keys() == read(tmp_path / "theirs").keys()
    assert (tmp_path / "ours" / "adapter_config.json").read_text() == json.dumps(config, indent=2, sort_keys=True)


OTHERS: list[tuple[str, str, dict[str, Any]]] = [
    ("IA3", "mlp", {"target_modules": ["lin0", "lin1"], "feedforward_modules": ["lin1"]}),
    ("IA3", "deep", {"target_modules": ["lin0"], "feedforward_modules": []}),
    ("IA3", "conv2d", {"target_modules": ["conv", "lin0"], "feedforward_modules": ["conv"]}),
    ("IA3", "embconv1d", {"target_modules": ["conv1d"], "feedforward_modules": [], "modules_to_save": ["lin0"]}),
    ("LoHa", "mlp", {"target_modules": ["lin0", "lin1"], "r": 3, "alpha": 5, "rank_pattern": {"lin1": 2}}),
    ("LoHa", "conv2d", {"target_modules": ["conv", "lin0"], "use_effective_conv2d": True}),
    ("LoHa", "conv1d", {"target_modules": ["conv"], "modules_to_save": ["lin0"]}),
    ("LoKr", "mlp", {"target_modules": ["lin0"], "r": 2, "alpha": 4}),
    ("LoKr", "mlp", {"target_modules": ["lin0", "lin1"], "r": 2, "decompose_both": True, "decompose_factor": 4}),
    ("LoKr", "conv2d", {"target_modules": ["conv"], "r": 1, "use_effective_conv2d": True}),
    ("OFT", "mlp", {"target_modules": ["lin0"], "oft_block_size": 5}),
    ("OFT", "mlp", {"target_modules": ["lin0", "lin1"], "r": 2, "oft_block_size": 0, "use_cayley_neumann": False}),
    ("OFT", "mlp", {"target_modules": ["lin0"], "oft_block_size": 5, "block_share": True, "bias": "all"}),
    ("OFT", "conv2d", {"target_modules": ["conv"], "oft_block_size": 9}),
    ("BOFT", "mlp", {"target_modules": ["lin0", "lin1"], "boft_block_size": 5}),
    ("BOFT", "mlp", {"target_modules": ["lin1"], "boft_block_num": 4, "boft_block_size": 0, "bias": "boft_only"}),
    ("BOFT", "conv2d", {"target_modules": ["conv"], "boft_block_size": 6}),
    ("OFT", "embconv1d", {"target_modules": ["emb"], "oft_block_size": 4}),
    ("C3A", "mlp", {"target_modules": ["lin0", "lin1"], "block_size": 2, "block_size_pattern": {"lin0": 10}}),
    ("FourierFT", "mlp", {"target_modules": ["lin0", "lin1"], "n_frequency": 30, "n_frequency_pattern": {"lin1": 9}}),
    ("FourierFT", "deep", {"target_modules": ["lin1"], "n_frequency": 30, "n_frequency_pattern": {"1.lin1": 9}}),
    ("FourierFT", "embconv1d", {"target_modules": ["conv1d"], "n_frequency": 30, "random_loc_seed": 3, "scaling": 20.0}),
    ("Hira", "mlp", {"target_modules": ["lin0", "lin1"], "r": 4, "rank_pattern": {"lin1": 2}}),
    ("Hira", "conv2d", {"target_modules": ["conv"], "r": 2}),
    ("Hira", "embconv1d", {"target_modules": ["emb", "conv1d"], "r": 2}),
    ("Vera", "mlp", {"target_modules": ["lin0", "lin1"], "r": 4, "d_initial": 0.3}),
    ("Vera", "mlp", {"target_modules": ["lin0"], "r": 4, "save_projection": False, "projection_prng_key": 3}),
    ("Vera", "embconv1d", {"target_modules": ["conv1d"], "r": 4, "bias": "vera_only"}),
    ("Miss", "mlp", {"target_modules": ["lin0", "lin1"], "r": 2}),
    ("Miss", "mlp", {"target_modules": ["lin0"], "r": 5, "mini_r": 4, "init_weights": "mini"}),
    ("Miss", "mlp", {"target_modules": ["lin0", "lin1"], "r": 2, "init_weights": "bat", "bias": "all"}),
    ("AdaLora", "mlp", {"target_modules": ["lin0", "lin1"], "init_r": 4, "target_r": 2, "total_step": 9, "lora_alpha": 20}),
    ("AdaLora", "conv2d", {"target_modules": ["conv"], "init_r": 3, "target_r": 2, "total_step": 9, "lora_alpha": 20}),
    ("AdaLora", "embconv1d", {"target_modules": ["conv1d"], "init_r": 3, "target_r": 2, "total_step": 9, "lora_alpha": 20}),
    ("HRA", "mlp", {"target_modules": ["lin0", "lin1"], "r": 4}),
    ("HRA", "mlp", {"target_modules": ["lin0"], "r": 3, "apply_GS": True}),
    ("HRA", "conv2d", {"target_modules": ["conv"], "r": 2}),
    ("Shira", "mlp", {"target_modules": ["lin0"], "r": 2, "random_seed": 5}),
    ("Shira", "mlp", {"target_modules": ["lin0"], "r": 2, "modules_to_save": ["lin1"]}),
    ("LNTuning", "mlp", {"target_modules": ["norm"]}),
    ("LNTuning", "deep", {"target_modules": ["norm"], "exclude_modules": ["layers.1.norm"]}),
    ("TrainableTokens", "text", {"token_indices": [3, 9], "target_modules": ["embed_tokens"]}),
    ("TrainableTokens", "embconv1d", {"token_indices": [0], "target_modules": ["emb"]}),
]
OTHER_IDS = [f"{kind}-{name}-{options}"[:90] for kind, name, options in OTHERS]


@pytest.mark.parametrize(("kind", "name", "options"), OTHERS, ids=OTHER_IDS)
def test_other_methods_from_peft_and_back(kind: str, name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, x = model_of(name)
    theirs = theirs_of(model, getattr(peft, f"{kind}Config")(**options), tmp_path / "theirs")
    ours = load(model, tmp_path / "theirs")
    # PEFT's OFT of a convolution turns overlapping patches and adds them up; what it merges is the formula.
    merges = kind == "OFT" and name.startswith("conv")
    with torch.no_grad():
        wanted = (copy.deepcopy(theirs).merge_and_unload() if merges else theirs)(x)
        assert not torch.allclose(wanted, model(x), atol=1e-3)
        assert close(ours(x), wanted)
        save(ours, tmp_path / "ours")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
        assert close((again.merge_and_unload() if merges else again)(x), wanted)
        assert torch.equal(load(model, tmp_path / "ours")(x), ours(x))
    if options.get("save_projection", True):
        assert weights(tmp_path / "ours") == weights(tmp_path / "theirs")
    assert read(tmp_path / "ours").keys() == read(tmp_path / "theirs").keys()


# What is refused, and why: nothing is read by halves, and no key that would change the output is passed over.


def edited(directory: Path, model: nn.Module, **changes: Any) -> Path:
    """A LoRA directory with some keys of its config changed."""
    save(gf.adapt(model, {"lin0": gf.LoRA(rank=2)}), directory)
    config = {**read(directory), **changes}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"use_qalora": True}, "sets use_qalora=True, which changes what the adapter computes"),
    ({"alora_invocation_tokens": [1, 2]}, r"sets alora_invocation_tokens=\[1, 2\]"),
    ({"arrow_config": {"top_k": 2}}, "sets arrow_config="),
    ({"kasa_config": {"beta": 1}}, "sets kasa_config="),
    ({"monteclora_config": {"n": 1}}, "sets monteclora_config="),
    ({"velora_config": {"n": 1}}, "sets velora_config="),
    ({"use_bdlora": {"n": 1}}, "sets use_bdlora="),
    ({"layer_replication": [[0, 1]]}, "sets layer_replication="),
    ({"megatron_config": {"n": 1}}, "sets megatron_config="),
    ({"init_lora_weights": "corda"}, "'corda': PEFT rewrites the base's weights"),
    ({"init_lora_weights": "lora_ga"}, "'lora_ga': PEFT rewrites"),
    ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4': PEFT rewrites .* the file does not say to what"),
    (
        {"use_unheard_of": True},
        r"use_unheard_of=True, and LORA has no such key here; .* pass ignore=\('use_unheard_of',\)",
    ),
    ({"r": "2"}, "has r='2', which is not what LORA has there"),
    ({"target_modules": 3}, "has target_modules=3, which is not what LORA has there"),
    ({"bias": "some"}, "has bias='some', which is none of none, all, lora_only"),
    ({"peft_type": "PROMPT_TUNING"}, "is of peft_type 'PROMPT_TUNING'; supported are LORA, ADALORA, BOFT"),
    ({"target_modules": None}, "neither target_modules nor target_parameters"),
    ({"target_modules": ["lin1"]}, r"lacks 'base_model.model.lin1.lora_A.weight', which its config asks for; the nearest are"),
    ({"target_modules": ["lin0", "lin1"]}, r"lacks 'base_model.model.lin1.lora_A.weight'"),
    ({"target_modules": ["nowhere"]}, r"holds 'base_model.model.lin0.lora_A.weight' \(one of 2 such\)"),
    ({"target_modules": ["lin0", "norm"]}, "targets 'norm', a BatchNorm1d, which LoRA cannot adapt"),
    ({"target_modules": "lin0("}, "does not fit the model: missing \\)"),
    ({"r": 3}, r"has shape \(3, 10\) in this adapter and \(2, 10\) in the state"),
    ({"r": 0}, "rank of at least 1, got rank=0"),
    ({"lora_bias": True}, r"lacks 'base_model.model.lin0.lora_B.bias'"),
    ({"use_dora": True}, r"lacks 'base_model.model.lin0.lora_magnitude_vector'"),
    ({"modules_to_save": ["lin1"]}, r"lacks 'base_model.model.lin1.weight'"),
    ({"target_parameters": ["lin0.weight"]}, "'lin0' is targeted as a module and by 'weight'"),
    ({"trainable_token_indices": {"lin1": [1]}}, "trainable_token_indices wants"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[str(changes)[:60] for changes, _ in REFUSED])
def test_configs_that_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    model, _ = model_of("mlp")
    with pytest.raises(gf.FileError, match=message):
        load(model, edited(tmp_path, model, **changes))


def test_keys_can_be_passed_over_by_name(tmp_path: Path) -> None:
    model, x = model_of("mlp")
    directory = edited(tmp_path, model, unsloth_fixed=True, runtime_config={"ephemeral_gpu_offload": True})
    assert torch.equal(load(model, directory, ignore=["unsloth_fixed"])(x), model(x))


def test_a_minimal_config_is_enough(tmp_path: Path) -> None:
    model, x = model_of("mlp")
    theirs = theirs_of(model, peft.LoraConfig(target_modules=["lin0"], r=4), tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["lin0"], "r": 4}')
    assert close(load(model, tmp_path)(x), theirs(x))


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "missing", "pickle"])
def test_damaged_weight_files(damage: str, tmp_path: Path) -> None:
    model, _ = model_of("mlp")
    path = edited(tmp_path, model) / "adapter_model.safetensors"
    data = path.read_bytes()
    if damage in ("missing", "pickle"):
        path.unlink()
        if damage == "pickle":
            (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n")
        message = "as a pickle, adapter_model.bin, which is not read" if damage == "pickle" else "there is no file"
    else:
        path.write_bytes({"truncated": data[:-9], "garbage": b"\x00" * 64, "empty": b""}[damage])
        message = "is damaged or is no safetensors file"
    with pytest.raises(gf.FileError, match=message):
        load(model, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no file"),
        ("{", "is no JSON file"),
        ("[]", "is no PEFT config: it has no peft_type"),
        ("{}", "is no PEFT config: it has no peft_type"),
    ],
)
def test_damaged_configs(text: str | None, message: str, tmp_path: Path) -> None:
    model, _ = model_of("mlp")
    path = edited(tmp_path, model) / "adapter_config.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(gf.FileError, match=message):
        load(model, tmp_path)


def test_a_folder_above_names_the_adapters_below(tmp_path: Path) -> None:
    model, _ = model_of("mlp")
    edited(tmp_path / "fr", model)
    with pytest.raises(gf.FileError, match="named adapters in folders of their own: fr"):
        load(model, tmp_path)


def test_an_embedding_that_the_file_brings_along(tmp_path: Path) -> None:
    model, x = model_of("text")
    theirs = theirs_of(model, peft.LoraConfig(target_modules=["embed_tokens"]), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.embed_tokens.base_layer.weight"
    assert close(load(model, tmp_path)(x), theirs(x))
    save_file({**tensors, key: tensors[key] + 1}, path, metadata={"format": "pt"})
    with pytest.raises(gf.FileError, match=r"holds a weight 'base_model.model.embed_tokens.base_layer.weight'.* differs"):
        load(model, tmp_path)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.lin = nn.Linear(8, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.lin(self.embed(ids)))
        return found


TYING: list[dict[str, Any]] = [
    {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "ensure_weight_tying": True},
    {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
    {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4], "ensure_weight_tying": True},
]


@pytest.mark.parametrize("options", TYING, ids=[str(options)[:90] for options in TYING])
def test_tied_embeddings_of_transformers(options: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 40, (2, 6))
    theirs = theirs_of(model, peft.LoraConfig(**options), tmp_path / "theirs")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "theirs").eval()
    ours = load(model, tmp_path / "theirs")
    with torch.no_grad():
        assert not torch.allclose(ours(ids).logits, model(ids).logits, atol=1e-3)
        assert close(ours(ids).logits, theirs(ids).logits)
        if "modules_to_save" in options:
            with pytest.raises(gf.AdaptError, match=r"is tied to what is outside of 'model.embed_tokens'"):
                save(ours, tmp_path / "ours")
            return
        save(ours, tmp_path / "ours")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
        assert close(again(ids).logits, theirs(ids).logits)
        assert torch.equal(load(model, tmp_path / "ours")(ids).logits, ours(ids).logits)


def test_one_use_of_a_tied_parameter_is_refused(tmp_path: Path) -> None:
    model = Tied()
    theirs_of(model, peft.LoraConfig(target_modules=["head"]), tmp_path)
    with pytest.raises(gf.FileError, match=r"adapts 'head.weight' alone, and in this model it is one with embed.weight"):
        load(model, tmp_path)
    with pytest.raises(gf.AdaptError, match=r"'embed.weight' is one with head.weight, and PEFT would adapt one"):
        save(gf.adapt(model, {"head": gf.LoRA()}), tmp_path)


UNSAVED: list[tuple[str, Any, str]] = [
    ("mlp", gf.SVDiff(), "this adapter is of SVDiff"),
    ("mlp", {"lin0": gf.LoRA(), "lin1": gf.SHiRA(rank=1)}, "this adapter is of LoRA, SHiRA"),
    ("mlp", {"lin0": gf.LoRA(dropout=0.1), "lin1": gf.LoRA()}, "has one dropout for all places, and the adapter has 0.0, 0.1"),
    ("mlp", {"lin0": gf.LoRA(), "lin1": gf.DoRA()}, "has one use_dora for all places"),
    ("mlp", {"lin0": gf.LoRA(), "norm.weight": gf.Diff()}, "no place for the change of 'norm.weight'|LoRA's own scale"),
    ("conv2d", {"conv": gf.LoRA(conv="balanced")}, "as conv='kernel' does, and not as conv='balanced'"),
    ("conv2d_groups", {"conv": gf.LoRA()}, "mixes its groups, as gf.MixingLoRA's does"),
    ("moe", {"experts.down_proj": gf.LoRA(dropout=0.1)}, "no dropout where parameters are targeted by name"),
    ("mha", {"mha.in_proj_weight": gf.LoRA(rank=2), "mha.out_proj": gf.LoRA(rank=3)}, "one rank for 'mha' for all places"),
    ("mha", {"mha": gf.DoRA()}, "PEFT has no DoRA for nn.MultiheadAttention"),
    ("mlp", {"lin0": gf.OFT(5, side="output")}, "turns inputs, and this one has side='output'"),
    ("conv3d", {"conv": gf.LoHa()}, "adapts weights of Linear, Conv1d, Conv2d, and not 'conv.weight' of a Conv3d"),
]


@pytest.mark.parametrize(("name", "strategy", "message"), UNSAVED, ids=[message[:50] for *_, message in UNSAVED])
def test_what_the_format_cannot_say_is_refused(name: str, strategy: Any, message: str, tmp_path: Path) -> None:
    adapted = gf.adapt(model_of(name)[0], strategy)
    with pytest.raises(gf.AdaptError, match=message):
        save(adapted, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_statistics_that_changed_need_a_place(tmp_path: Path) -> None:
    model, x = model_of("mlp")
    adapted = gf.adapt(model, {"lin0": gf.LoRA()}).train()
    adapted(x)
    with pytest.raises(gf.AdaptError, match=r"the buffer 'norm.num_batches_tracked' differs from the base's"):
        save(adapted, tmp_path / "none")
    adapted = gf.adapt(model, {"lin0": gf.LoRA(), "norm": gf.Full()}).train()
    adapted(x)
    save(adapted, tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    assert close(again(x), adapted.eval()(x))


def test_on_top_of_another_adapter_is_refused(tmp_path: Path) -> None:
    model, _ = model_of("mlp")
    with pytest.raises(gf.AdaptError, match="on top of another adapter"):
        save(gf.adapt(gf.adapt(model, gf.LoRA()), gf.LoRA()), tmp_path)
    with pytest.raises(gf.AdaptError, match="belongs to the model itself"):
        save(gf.adapt(nn.Linear(2, 2), gf.LoRA(rank=1)), tmp_path)


def noisy(adapted: gf.AdaptedModel) -> gf.AdaptedModel:
    generator = torch.Generator().manual_seed(3)
    state = adapted.adapter_state_dict()
    for name, p in adapted.named_trainable_parameters():
        state[name] = p.detach() + 0.2 * torch.randn(p.shape, generator=generator)
    return adapted.with_adapter(state)


OURS: list[tuple[str, Any]] = [
    ("mlp", gf.LoRA(rank=3)),
    ("mlp", gf.LoRA(rank=4, alpha=2.5, rslora=True, rank_pattern={"lin1": 2}, train_bias=True)),
    ("mlp", {"lin0": gf.LoRA(rank=2, alpha=3, rslora=True), "lin1": gf.LoRA(rank=4, alpha=2)}),
    ("mlp", {"lin0": gf.LoRA(rank=2), "norm": gf.Full(), "lin1": gf.Full()}),
    ("mlp", {"lin0": gf.LoRA(rank=2), "*.bias": gf.Full()}),
    ("deep", {"lin0": gf.LoRA(rank=2), "layers.1.lin0": gf.LoRA(rank=3)}),
    ("deep", {"layers.1.*.weight": gf.LoRA(rank=2), "layers.2.lin0": gf.Full()}),
    ("mha", gf.LoRA(rank=2)),
    ("mha", {"mha.in_proj_weight": gf.LoRA(rank=2)}),
    ("mha", {"mha.out_proj": gf.LoRA(rank=2)}),
    ("moe", {"experts.*": gf.LoRA(rank=2), "lin1": gf.LoRA(rank=3)}),
    ("moe", {"experts.gate_up_proj": gf.LoRA(rank=2), "experts.down_proj": gf.LoRA(rank=3, alpha=1)}),
    ("conv2d", gf.LoRA(rank=2)),
    ("conv2d_groups", {"conv": gf.MixingLoRA(rank=4, alpha=3), "lin0": gf.LoRA(rank=2)}),
    ("embconv1d", {"emb": gf.LoRA(rank=2), "conv1d": gf.LoRA(rank=2)}),
    ("embconv1d", {"emb": gf.TrainableTokens([5, 3]), "conv1d": gf.LoRA(rank=2)}),
    ("embconv1d", {"emb": gf.TrainableTokens([5, 3])}),
    ("mlp", gf.DoRA(rank=2, alpha=5)),
    ("mlp", gf.NormTuning()),
    ("deep", {"layers.1.lin0": gf.IA3(), "lin0": gf.IA3(side="input")}),
    ("mlp", {"lin0": gf.AdaLoRA(rank=2, alpha=6), "lin1": gf.AdaLoRA(rank=5, alpha=15)}),
    ("mlp", {"lin0": gf.LoHa(rank=2), "lin1": gf.LoHa(rank=3, alpha=1)}),
]


@pytest.mark.parametrize(("name", "strategy"), OURS, ids=[f"{name}-{strategy}"[:90] for name, strategy in OURS])
def test_ours_is_read_by_peft(name: str, strategy: Any, tmp_path: Path) -> None:
    model, x = model_of(name)
    adapted = noisy(gf.adapt(model, strategy, generator=torch.Generator().manual_seed(0)))
    save(adapted, tmp_path, task_type="FEATURE_EXTRACTION", base_model="somewhere/base")
    config = read(tmp_path)
    assert (config["task_type"], config["base_model_name_or_path"]) == ("FEATURE_EXTRACTION", "somewhere/base")
    with torch.no_grad():
        assert not torch.allclose(adapted(x), model(x), atol=1e-3)
        assert torch.allclose(load(model, tmp_path)(x), adapted(x), atol=1e-6)
    theirs = peft.PeftModel(copy.deepcopy(model), peft.PeftConfig.from_pretrained(tmp_path)).eval()
    found = peft.set_peft_model_state_dict(theirs, load_file(tmp_path / "adapter_model.safetensors"))
    assert not found.unexpected_keys
    assert close(theirs(x), adapted(x))


def test_a_half_precision_base_keeps_the_files_element_type(tmp_path: Path) -> None:
    model, x = model_of("mlp")
    theirs_of(model.bfloat16(), peft.LoraConfig(target_modules=["lin0"]), tmp_path / "theirs")
    ours = load(model, tmp_path / "theirs")
    assert ours.adapter["lin0.lora_A"].dtype == torch.float32
    assert ours(x.bfloat16()).dtype == torch.bfloat16
    save(ours, tmp_path / "ours")
    assert weights(tmp_path / "ours") == weights(tmp_path / "theirs")


@pytest.mark.parametrize("options", [{"dilation": 2}, {"padding": 1, "padding_mode": "circular"}])
def test_where_peft_is_wrong_the_formula_holds(options: dict[str, Any], tmp_path: Path) -> None:
    # PEFT's thin convolution knows neither dilation nor padding mode; what it merges is the formula.
    torch.manual_seed(0)
    model, x = Conv(nn.Conv2d, **options).eval(), x_of(2, 4, 8, 8)
    theirs = theirs_of(model, peft.LoraConfig(target_modules=["conv"]), tmp_path)
    ours = load(model, tmp_path)
    assert close(ours(x), theirs.merge_and_unload()(x))


def test_peft_counts_an_attentions_out_proj_twice(tmp_path: Path) -> None:
    # PEFT merges the change of out_proj into the weight, and then has the layer merge it again. Its files mean that.
    model, x = model_of("mha")
    save(noisy(gf.adapt(model, {"mha.out_proj": gf.LoRA(rank=2)})), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    ours = load(model, tmp_path)
    key = "base_model.model.mha.base_layer.out_proj.lora_B.weight"
    assert torch.equal(ours.adapter["mha.out_proj.lora_B"], 2 * tensors[key])
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    assert close(theirs(x), ours(x))


def test_transformers_models(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=20)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 40, (2, 6))
    options = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "trainable_token_indices": [3, 7]}
    theirs = theirs_of(model, peft.LoraConfig(**options), tmp_path / "theirs")
    ours = load(model, tmp_path / "theirs")
    with torch.no_grad():
        assert close(ours(ids).logits, theirs(ids).logits)
        save(ours, tmp_path / "ours", task_type="CAUSAL_LM")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
        assert close(again(ids).logits, theirs(ids).logits)
    assert weights(tmp_path / "ours") == weights(tmp_path / "theirs")
    assert read(tmp_path / "ours")["fan_in_fan_out"]
    path = tmp_path / "theirs" / "adapter_config.json"
    path.write_text(json.dumps({**read(tmp_path / "theirs"), "target_modules": "all-linear"}))
    assert torch.equal(load(model, tmp_path / "theirs")(ids).logits, ours(ids).logits)


@pytest.mark.parametrize(("init", "name"), [("pissa", "mlp"), ("pissa", "embconv1d"), ("olora", "mlp")])
def test_files_whose_start_was_taken_out_of_the_base(init: str, name: str, tmp_path: Path) -> None:
    model, x = model_of(name)
    target = "lin0" if name == "mlp" else "conv1d"
    options: dict[str, Any] = {"target_modules": [target], "r": 3, "lora_alpha": 5, "init_lora_weights": init}
    theirs = theirs_of(model, peft.LoraConfig(**options), tmp_path / "theirs")
    ours = load(model, tmp_path / "theirs")
    with torch.no_grad():
        assert close(ours(x), theirs(x))
        assert not torch.allclose(ours(x), model(x), atol=1e-2)
        save(ours, tmp_path / "ours")
        assert read(tmp_path / "ours")["init_lora_weights"] is True
        again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
        assert close(again(x), ours(x))
        assert close(load(model, tmp_path / "ours")(x), ours(x))


def test_peft_itself_is_not_needed(tmp_path: Path) -> None:
    code = "import gift_func, sys; assert not {'peft', 'transformers', 'numpy.testing'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


JUNK: list[Any] = [None, True, "(", -1, 1.5, 10**9, [[1]], ["x"], {"lin0": "b"}, {"(": 1}]
FUZZED = {kind: (name, options) for kind, name, options in OTHERS} | {
    "Lora": ("mlp", {"target_modules": ["lin0"], "use_dora": True, "modules_to_save": ["lin1"], "bias": "all"})
}


@pytest.mark.parametrize("kind", FUZZED)
def test_a_config_with_anything_in_it_loads_or_is_refused(kind: str, tmp_path: Path) -> None:
    name, options = FUZZED[kind]
    model, _ = model_of(name)
    theirs_of(model, getattr(peft, f"{kind}Config")(**options), tmp_path)
    config, path = read(tmp_path), tmp_path / "adapter_config.json"
    refused = 0
    for key in config:
        for junk in JUNK:
            path.write_text(json.dumps({**config, key: junk}))
            try:
                load(model, tmp_path)
            except gf.FileError:
                refused += 1
    assert refused > len(config)


@pytest.mark.parametrize("key", ["lin0.lora_A.weight", "base_model.model.", "base_model.model.lin0.lora_C.weight", "x"])
def test_a_tensor_that_nothing_asks_for_is_refused(key: str, tmp_path: Path) -> None:
    model, _ = model_of("mlp")
    path = edited(tmp_path, model) / "adapter_model.safetensors"
    save_file({**load_file(path), key: torch.zeros(2)}, path, metadata={"format": "pt"})
    with pytest.raises(gf.FileError, match=f"holds '{key}' .one of 1 such., and nothing in its config"):
        load(model, tmp_path)
