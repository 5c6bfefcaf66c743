"""kohya's and LyCORIS's files: what LyCORIS saves, we load; what we save, LyCORIS loads; and both compute the same."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import gift_func as gf
from gift_func.interop.kohya import Decomposed, GivenLoKr, WeightIA3, load, metadata, save
from gift_func.testing import check

lycoris = pytest.importorskip("lycoris")
logging.getLogger("LyCORIS").setLevel(logging.ERROR)


class Net(nn.Module):
    """All that LyCORIS adapts: linear layers, convolutions of one to three dimensions, norms; names that need care."""

    def __init__(self) -> None:
        super().__init__()
        self.plane = nn.Conv2d(4, 8, 3, padding=1)
        self.group_norm = nn.GroupNorm(2, 8)
        self.point = nn.Conv2d(8, 6, 1)
        self.line = nn.Conv1d(6, 8, 3)
        self.body = nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 6, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        h = self.point(torch.tanh(self.group_norm(self.plane(x))))
        found: Tensor = self.body(torch.tanh(self.line(h.flatten(2))).mean(-1))
        return found


class Space(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 4, (1, 3, 2))
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.grouped(torch.tanh(self.conv(x)).mean(2))
        return found


X = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(1))
X3 = torch.randn(2, 2, 3, 6, 6, generator=torch.Generator().manual_seed(2))


def net(kind: Callable[[], Any] = Net) -> Any:
    torch.manual_seed(0)
    return kind().eval()


def theirs(model: nn.Module, **options: Any) -> Any:
    """LyCORIS's network on a copy of the model, applied, its tensors random; the copy is `network.host`."""
    host = copy.deepcopy(model)
    network = lycoris.create_lycoris(host, 1.0, **{"linear_dim": 2, "linear_alpha": 1, "train_norm": False, **options})
    network.apply_to()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    network.eval()
    object.__setattr__(network, "host", host)
    return network


def theirs_reading(
    model: nn.Module, tensors: Mapping[str, Tensor], options: Mapping[str, Any], strict: bool = True
) -> nn.Module:
    """A copy of the model to which LyCORIS applies a file's tensors, every one of them, and if strict no others."""
    tucker = any("lora_mid" in name or "_t1" in name or "_t2" in name for name in tensors)
    host = copy.deepcopy(model)
    network = lycoris.create_lycoris(host, 1.0, **{"linear_dim": 2, "linear_alpha": 1, **options, "use_tucker": tucker})
    full = options.get("algo") == "full"
    if not full:
        network.apply_to()
    for lora in network.loras:  # a change in full is read before it is applied
        network.add_module(lora.lora_name, lora)
    missing, unexpected = network.load_state_dict(dict(tensors), strict=False)
    assert unexpected == []
    assert not strict or missing == []
    if full:
        network.apply_to()
    network.eval()
    return host


def written(network: Any, path: Path, **changes: Any) -> Path:
    """The network's file, as LyCORIS writes it."""
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in network.state_dict().items()}
    save_file({**tensors, **changes}, path)
    return path


ALGOS: dict[str, dict[str, Any]] = {
    "lora": {"algo": "lora"},
    "lora, alpha is rank": {"algo": "lora", "linear_alpha": 2},
    "lora, tucker": {"algo": "lora", "use_tucker": True},
    "lora, scalar": {"algo": "lora", "use_scalar": True},
    "dora": {"algo": "lora", "dora_wd": True},
    "dora, tucker": {"algo": "lora", "dora_wd": True, "use_tucker": True},
    "dora of inputs": {"algo": "lora", "dora_wd": True, "wd_on_output": False},
    "loha": {"algo": "loha"},
    "loha, tucker": {"algo": "loha", "use_tucker": True},
    "loha, decomposed": {"algo": "loha", "dora_wd": True},
    "loha, decomposed by input": {"algo": "loha", "dora_wd": True, "wd_on_output": False, "use_tucker": True},
    "lokr": {"algo": "lokr", "linear_dim": 1},
    "lokr, factor": {"algo": "lokr", "linear_dim": 1, "factor": 2},
    "lokr, both": {"algo": "lokr", "linear_dim": 1, "decompose_both": True, "factor": 4},
    "lokr, tucker": {"algo": "lokr", "linear_dim": 1, "use_tucker": True, "factor": 2},
    "lokr, full": {"algo": "lokr", "linear_dim": 1, "full_matrix": True},
    "lokr, unbalanced": {"algo": "lokr", "linear_dim": 1, "unbalanced_factorization": True},
    "lokr, decomposed": {"algo": "lokr", "linear_dim": 1, "dora_wd": True},
    "lokr, decomposed by input": {"algo": "lokr", "linear_dim": 1, "dora_wd": True, "wd_on_output": False},
    "diag-oft": {"algo": "diag-oft"},
    "diag-oft, rescaled": {"algo": "diag-oft", "rescaled": True},
    "diag-oft, bounded": {"algo": "diag-oft", "constraint": 0.02},
    "ia3": {"algo": "ia3"},
    "full": {"algo": "full"},
    "lora and norms": {"algo": "lora", "train_norm": True},
    "full and norms": {"algo": "full", "train_norm": True},
}


@pytest.mark.parametrize("options", ALGOS.values(), ids=ALGOS.keys())
def test_what_lycoris_saves_we_load_and_save_for_it(options: dict[str, Any], tmp_path: Path) -> None:
    """Both ways, by LyCORIS's own layers: its file means the same here, and ours of it the same there."""
    model = net()
    network = theirs(model, **options)
    expected = network.host(X)
    assert (expected - model(X)).abs().max() > 0.01
    adapted = load(model, written(network, tmp_path / "theirs.safetensors"))
    torch.testing.assert_close(adapted(X), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapted.merge()(X), expected, rtol=1e-5, atol=1e-5)

    save(adapted, tmp_path / "ours.safetensors")
    ours = load_file(tmp_path / "ours.safetensors")
    if not options.get("use_tucker") or options["algo"] != "lora":  # its kernel is written, for which LyCORIS needs no core
        before = load_file(tmp_path / "theirs.safetensors")
        assert {name: (t.shape, t.dtype) for name, t in ours.items()} == {
            name: (t.shape, t.dtype) for name, t in before.items()
        }
    torch.testing.assert_close(theirs_reading(model, ours, options)(X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"dora_wd": True}, {"algo": "loha", "use_tucker": True}, {"algo": "full"}])
def test_three_dimensions_and_groups(options: dict[str, Any], tmp_path: Path) -> None:
    model = net(Space)
    network = theirs(model, **options)
    adapted = load(model, written(network, tmp_path / "file.safetensors"))
    torch.testing.assert_close(adapted(X3), network.host(X3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("on_input", [False, True])
def test_ia3_scales_the_weight_alone(on_input: bool, tmp_path: Path) -> None:
    linear = nn.Linear(4, 6)
    model = nn.Sequential(linear)
    module = lycoris.modules.ia3.IA3Module("lycoris_0", copy.deepcopy(linear), train_on_input=on_input)
    factor = torch.randn(module.weight.shape)
    save_file({"lycoris_0.weight": factor, "lycoris_0.on_input": torch.tensor(int(on_input))}, tmp_path / "f")
    module.weight.data.copy_(factor)
    adapted, x = load(model, tmp_path / "f"), torch.randn(3, 4)
    torch.testing.assert_close(adapted(x), module(x))
    scaled = (x * (1 + factor)) @ linear.weight.mT if on_input else (x @ linear.weight.mT) * (1 + factor)
    torch.testing.assert_close(adapted(x), scaled + linear.bias)
    save(adapted, tmp_path / "ours")
    torch.testing.assert_close(load_file(tmp_path / "ours"), load_file(tmp_path / "f"))


def factors(out: int, width: int, rank: int = 2, *sides: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    up, down = (
        torch.randn(out, rank, *[1 for _ in sides], generator=generator),
        torch.randn(rank, width, *sides, generator=generator),
    )
    return {"lora_up.weight": up, "lora_down.weight": down}


def file_of(path: Path, **modules: Mapping[str, Tensor]) -> Path:
    save_file({f"{called}.{name}": tensor for called, own in modules.items() for name, tensor in own.items()}, path)
    return path


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (0.0, 1.0), (2.0, 1.0), (1.0, 0.5), (3.0, 1.5)])
def test_alpha_by_the_formula(alpha: float | None, scale: float, tmp_path: Path) -> None:
    """W + alpha/rank · up·down, with alpha = rank where there is none."""
    linear, own = nn.Linear(5, 7), factors(7, 5)
    more = {} if alpha is None else {"alpha": torch.tensor(alpha)}
    adapted = load(linear, file_of(tmp_path / "f", lycoris={**own, **more}))
    expected = linear.weight + scale * own["lora_up.weight"] @ own["lora_down.weight"]
    torch.testing.assert_close(adapted.merge().weight, expected)


@pytest.mark.parametrize("algo", ["loha", "lokr"])
def test_where_lycoris_merges_the_scale_twice(algo: str, tmp_path: Path) -> None:
    """Its layers apply alpha/rank once, as its paper and its functional API do, and `merge_to` squares it."""
    model, x = net(), X
    network = theirs(model, algo=algo, linear_dim=2, linear_alpha=1, factor=2)
    adapted = load(model, written(network, tmp_path / "f"))
    torch.testing.assert_close(adapted(x), network.host(x), rtol=1e-5, atol=1e-5)
    merged = {lora.lora_name: lora.get_diff_weight()[0] for lora in network.loras}
    after: Any = adapted.merge()
    change = after.body[0].weight - model.body[0].weight
    torch.testing.assert_close(merged["lycoris_body_0"], change / 2, rtol=1e-4, atol=1e-5)


def test_a_linear_layer_and_a_convolution_of_size_one_are_stored_alike(tmp_path: Path) -> None:
    own = factors(6, 4)
    wide = {name: tensor[..., None, None] for name, tensor in own.items()}
    for model, x in (
        (nn.Sequential(nn.Linear(4, 6)), torch.randn(2, 4)),
        (nn.Sequential(nn.Conv2d(4, 6, 1)), torch.randn(2, 4, 3, 3)),
    ):
        flat, tall = (load(model, file_of(tmp_path / "f", lycoris_0=tensors)) for tensors in (own, wide))
        assert (flat(x) - model(x)).abs().max() > 0.1
        torch.testing.assert_close(flat(x), tall(x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_element_type_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    own = {name: tensor.to(dtype) for name, tensor in {**factors(6, 4), "alpha": torch.tensor(1.0)}.items()}
    adapted = load(nn.Sequential(nn.Linear(4, 6)), file_of(tmp_path / "f", lycoris_0=own))
    assert {p.dtype for p in adapted.parameters()} == {dtype}
    save(adapted, tmp_path / "ours")
    ours = load_file(tmp_path / "ours")
    assert all(torch.equal(ours[f"lycoris_0.{name}"].to(dtype), tensor) for name, tensor in own.items())
    own["dora_scale"] = torch.rand(1, 4, dtype=torch.float32)
    mixed = load(nn.Sequential(nn.Linear(4, 6, dtype=dtype)), file_of(tmp_path / "f", lycoris_0=own))
    assert {p.dtype for p in mixed.parameters()} == {torch.promote_types(dtype, torch.float32)}


def test_several_models_in_one_file(tmp_path: Path) -> None:
    both = nn.ModuleDict({"unet": nn.Sequential(nn.Linear(4, 6)), "text": nn.ModuleDict({"te": nn.Linear(3, 2)})})
    path = file_of(tmp_path / "f", lora_unet_0=factors(6, 4), lora_te_te=factors(2, 3))
    prefix = {"lora_unet": "unet", "lora_te": "text"}
    adapted = load(both, path, prefix=prefix)
    assert sorted(adapted.adapter) == ["text.te.lora_A", "text.te.lora_B", "unet.0.lora_A", "unet.0.lora_B"]
    save(adapted, tmp_path / "ours", prefix=prefix)
    ours = load_file(tmp_path / "ours")
    assert {name: t for name, t in ours.items() if "alpha" not in name}.keys() == load_file(path).keys()
    alone = load(both["unet"], path, prefix={"lora_unet": "", "lora_te": None})
    assert list(alone.adapter) == ["0.lora_B", "0.lora_A"]
    with pytest.raises(gf.FileError, match=r"for several models: lora_te, lora_unet.*prefix="):
        load(both["unet"], path)
    with pytest.raises(gf.FileError, match="'lora_te_te', and no module of this model is called so after 'lora_unet'"):
        load(both["unet"], path, prefix="lora_unet")
    with pytest.raises(gf.FileError, match=r"leads to a module 'unett'.*nearest are 'unet'"):
        load(both, path, prefix={"lora_unet": "unett", "lora_te": "text"})
    inner = {"lora_unet_0": None, "lora_te": None, "lora_unet": ""}
    with pytest.raises(gf.FileError, match="adapts nothing but what is to be passed over"):
        load(both["unet"], path, prefix=inner)
    text: Any = both["text"]
    deeper = load(text["te"], path, prefix={"lora_te_te": "", "lora_unet": None})  # a model within the file's
    assert list(deeper.adapter) == ["lora_B", "lora_A"]
    with pytest.raises(gf.FileError, match="adapts nothing but what is to be passed over"):
        load(both, path, prefix={"lora_unet": None, "lora_te": None})
    with pytest.raises(gf.AdaptError, match=r"no prefix leads to the module 'text\.te'"):
        save(adapted, tmp_path / "other", prefix={"lora_unet": "unet"})


def test_names_that_underscores_make_one(tmp_path: Path) -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.my_lin = nn.Linear(4, 6)
            self.my = nn.ModuleDict({"lin": nn.Linear(4, 6)})

    model = Twins()
    with pytest.raises(gf.FileError, match=r"'lycoris_my_lin', which may be any of 'my_lin', 'my\.lin'"):
        load(model, file_of(tmp_path / "f", lycoris_my_lin=factors(6, 4)))
    with pytest.raises(gf.AdaptError, match=r"'my\.lin' and 'my_lin' would both be 'lycoris_my_lin'"):
        save(gf.adapt(model, {"my.lin": gf.LoRA(rank=1)}), tmp_path / "ours")
    shared = nn.Sequential(nn.Linear(4, 4))
    shared.append(shared[0])
    adapted = load(shared, file_of(tmp_path / "g", lycoris_0=factors(4, 4)))
    assert list(adapted.adapter) == ["0.lora_B", "0.lora_A"]
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(gf.FileError, match=r"adapts '1\.weight' alone, and in this model it is one with 0\.weight"):
        load(tied, file_of(tmp_path / "g", lycoris_1=factors(4, 4)))


LINEAR = {"lora_up.weight": torch.ones(6, 2), "lora_down.weight": torch.ones(2, 4)}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "GLoRA": ({"lycoris_0": {"a1.weight": torch.ones(2, 2)}}, r"lycoris_0 holds GLoRA.*\(a1\.weight\), which has no place"),
    "T-LoRA": ({"lycoris_0": {"lambda_layer": torch.ones(2, 2)}}, "holds T-LoRA"),
    "BOFT": ({"lycoris_0": {"oft_blocks": torch.zeros(1, 3, 2, 2)}}, "holds a BOFT of outputs"),
    "oft_diag": ({"lycoris_0": {"oft_diag": torch.zeros(3, 2, 2)}}, "an early diag-OFT"),
    "lokr_t1": ({"lycoris_0": {"lokr_t1": torch.zeros(2, 2)}}, "a core in its first factor"),
    "PEFT's": ({"lycoris_0": {"lora_A.weight": torch.zeros(2, 2)}}, r"gf\.interop\.peft"),
    "split": ({"lycoris_0": {"lora_down.0.weight": torch.zeros(2, 2)}}, "LoRA of several parts"),
    "unknown": ({"lycoris_0": {"lora_dwn.weight": torch.ones(2, 4)}}, r"'lora_dwn\.weight', which is no kind.*lora_down"),
    "part": ({"lycoris_0": {**LINEAR, "w_norms": torch.ones(2)}}, "holds LoRA, and 'w_norms' is no part of it"),
    "two": ({"lycoris_0": {**LINEAR, "diff": torch.ones(6, 4)}}, "holds both LoRA and a change in full"),
    "lack": ({"lycoris_0": {"lora_up.weight": torch.ones(6, 2)}}, r"lacks lycoris_0\.lora_down\.weight"),
    "shape": ({"lycoris_0": {**LINEAR, "lora_up.weight": torch.ones(5, 2)}}, r"lora_B of shape \(6, 2\), and has \(5, 2\)"),
    "rank": ({"lycoris_0": {**LINEAR, "lora_up.weight": torch.ones(6, 3)}}, r"lora_B of shape \(6, 2\), and has \(6, 3\)"),
    "vector": ({"lycoris_0": {**LINEAR, "lora_up.weight": torch.ones(6)}}, r"a factor of a product, and has the shape \(6,\)"),
    "type": ({"lycoris_0": {**LINEAR, "lora_up.weight": torch.ones(6, 2, dtype=torch.int8)}}, "is of torch.int8"),
    "alpha": ({"lycoris_0": {**LINEAR, "alpha": torch.ones(2)}}, r"alpha is to be one number.*\(2,\)"),
    "dora": ({"lycoris_0": {**LINEAR, "dora_scale": torch.ones(3, 1)}}, r"is to be \(6, 1\) for outputs, or \(1, 4\)"),
    "lokr ranks": (
        {"lycoris_0": {"lokr_w1_a": torch.ones(2, 1), "lokr_w1_b": torch.ones(1, 2), "lokr_w2_a": torch.ones(3, 2),
                       "lokr_w2_b": torch.ones(2, 2)}},
        r"ranks \[1, 2\]",
    ),
    "lokr shape": ({"lycoris_0": {"lokr_w1": torch.ones(4, 2), "lokr_w2": torch.ones(2, 2)}}, r"multiples of \(4, 2\)"),
    "mid": ({"lycoris_0": {**LINEAR, "lora_mid.weight": torch.ones(2, 3, 3, 3)}}, "2 channels on both sides"),
    "core": (
        {"lycoris_0": {f"hada_{name}": torch.ones(2, 2) for name in "w1_a w1_b w2_a w2_b t1 t2".split()}},
        r"'0\.weight' by LoHa.*but for 'hada_t1'",
    ),
    "core beside a whole": (
        {"lycoris_0": {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(3, 2), "lokr_t2": torch.ones(1, 1)}},
        "but for 'lokr_t2'",
    ),
    "no module": ({"lycoris_00": LINEAR}, "'lycoris_00', and no module.*nearest are 'lycoris_0'"),
    "no bias": ({"lycoris_1": {"diff_b": torch.ones(2)}}, "changes the bias of '1', which has none"),
    "norm": ({"lycoris_2": {**LINEAR}}, "for '2', a LayerNorm, and such files adapt"),
    "prefix": ({"something_0": LINEAR}, "'something_0', which begins with none of lycoris"),
    "nothing": ({}, "adapts nothing"),
    "oft": ({"lycoris_0": {"oft_blocks": torch.zeros(2, 2, 2)}}, r"oft_blocks of shape \(3, 2, 2\), and has \(2, 2, 2\)"),
    "blocks": ({"lycoris_0": {"oft_blocks": torch.zeros(2, 2)}}, r"is to be \(blocks, size, size\)"),
}  # fmt: skip


def test_lycoris_makes_a_network_of_our_file(tmp_path: Path) -> None:
    """Its own reader, which needs no options: dimension and alpha are the file's."""
    model = net()
    adapted = moved(gf.adapt(model, gf.LoRA(rank=3, alpha=5)))
    save(adapted, tmp_path / "f.safetensors")
    host = copy.deepcopy(model)
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(tmp_path / "f.safetensors"), host)
    network.apply_to()
    torch.testing.assert_close(host(X), adapted(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("modules", "words"), BAD.values(), ids=BAD.keys())
def test_what_is_refused_and_how(modules: dict[str, Any], words: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2, bias=False), nn.LayerNorm(2))
    with pytest.raises(gf.FileError, match=words):
        load(model, file_of(tmp_path / "f.safetensors", **modules))


def test_damaged_files(tmp_path: Path) -> None:
    model, path = nn.Sequential(nn.Linear(4, 6)), tmp_path / "f.safetensors"
    with pytest.raises(gf.FileError, match="there is no file"):
        load(model, path)
    data = file_of(path, lycoris_0=LINEAR).read_bytes()
    for broken in (data[:-3], data[:20], b"", b"\xff" * 64):
        path.write_bytes(broken)
        with pytest.raises(gf.FileError, match="damaged or is no safetensors file"):
            load(model, path)
    torch.save({"lycoris_0.lora_up.weight": torch.ones(2)}, path)
    with pytest.raises(gf.FileError, match="is a pickle, which is not read"):
        load(model, path)
    save_file({"alpha": torch.ones(1)}, path)
    with pytest.raises(gf.FileError, match="'alpha', and a kohya file's names are"):
        load(model, path)


OURS: dict[str, tuple[Any, dict[str, Any]]] = {
    "rslora": (gf.LoRA(rank=2, alpha=3, rslora=True), {"linear_alpha": 3 * 2**0.5}),
    "dora": (gf.DoRA(rank=2), {"dora_wd": True, "linear_alpha": 2}),
    "loha": (gf.LoHa(rank=2, alpha=1, use_effective_conv2d=True), {"algo": "loha"}),
    "lokr": (gf.LoKr(rank=1, alpha=0.5), {"algo": "lokr", "linear_dim": 1, "linear_alpha": 0.5}),
    "lokr, whole": (gf.LoKr(rank=8, alpha=2), {"algo": "lokr", "full_matrix": True}),
    "oft": (
        gf.OFT(2, side="output", rescale=True, coft=True, eps=0.05),
        {"algo": "diag-oft", "rescaled": True, "constraint": 0.05},
    ),
    "shared oft": (gf.OFT(2, side="output", block_share=True), {"algo": "diag-oft"}),
    "norms": (
        {"*norm.*": gf.NormTuning(), "body.1.bias": gf.Full(), "body.0": gf.LoRA(rank=2)},
        {"train_norm": True, "linear_alpha": 2},
    ),
}


@pytest.mark.parametrize("name", OURS)
def test_what_we_train_lycoris_reads(name: str, tmp_path: Path) -> None:
    """Fresh adapters of our own methods, moved from their start; LyCORIS takes alpha from its options, not from a file."""
    model, (method, options) = net(), OURS[name]
    adapted = moved(gf.adapt(model, method, generator=torch.Generator().manual_seed(0)))
    save(adapted, tmp_path / "f", metadata={"ss_base_model_version": "ours"})
    again = load(model, tmp_path / "f")
    torch.testing.assert_close(again(X), adapted(X), rtol=1e-5, atol=1e-5)
    read = theirs_reading(model, load_file(tmp_path / "f"), options, strict=name != "norms")
    torch.testing.assert_close(read(X), adapted(X), rtol=1e-5, atol=1e-5)


def moved(adapted: gf.AdaptedModel) -> gf.AdaptedModel:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return adapted.eval()


def test_whole_parameters_are_written_as_changes(tmp_path: Path) -> None:
    model = net()
    rules = {"body.0.*": gf.Full(), "line.bias": gf.Diff(scale=2.0), "point.weight": gf.Diff(), "body.1.*": gf.NormTuning()}
    adapted = moved(gf.adapt(model, rules))
    save(adapted, tmp_path / "f")
    held = load_file(tmp_path / "f")
    assert {name: tuple(tensor.shape) for name, tensor in held.items()} == {
        "lycoris_body_0.diff": (12, 8), "lycoris_body_0.diff_b": (12,), "lycoris_body_1.b_norm": (12,),
        "lycoris_body_1.w_norm": (12,), "lycoris_line.diff": (8, 6, 3), "lycoris_line.diff_b": (8,),
        "lycoris_point.diff": (6, 8, 1, 1),
    }  # fmt: skip
    assert not held["lycoris_line.diff"].any()
    torch.testing.assert_close(load(model, tmp_path / "f")(X), adapted(X), rtol=1e-6, atol=1e-6)


REFUSED: dict[str, tuple[Any, str]] = {
    "VeRA": (gf.VeRA(rank=2), "no place for VeRA, which adapts"),
    "input OFT": ({"body.0": gf.OFT(4)}, r"'body\.0\.weight' has its inputs turned"),
    "IA3 and its bias": ({"body.0": gf.IA3()}, "bias.*LyCORIS scales the weight alone. Use"),
    "pissa": ({"body.0": gf.LoRA(rank=2, init="pissa")}, "starts at parts of W"),
    "balanced": ({"plane": gf.LoRA(rank=2, conv="balanced")}, "factored as conv='balanced'"),
    "bias beside": ({"body.0": gf.LoRA(rank=2, train_bias=True)}, "is trained beside another change"),
    "bias of LoRA": ({"body.0.bias": gf.Full(), "body.0.weight": gf.IA3(side="input")}, "is trained beside another change"),
}


@pytest.mark.parametrize(("rules", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_written(rules: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(gf.AdaptError, match=words):
        save(gf.adapt(net(), rules), tmp_path / "f")
    assert not list(tmp_path.iterdir())


def test_what_has_no_place_in_a_file(tmp_path: Path) -> None:
    model = nn.ModuleDict({"emb": nn.Embedding(5, 4), "lin": nn.Linear(4, 4)})
    with pytest.raises(gf.AdaptError, match=r"'emb\.weight' of a Embedding has no place"):
        save(gf.adapt(model, {"emb": gf.LoRA(rank=1)}), tmp_path / "f")
    below = gf.adapt(model, {"lin": gf.LoRA(rank=1)})
    with pytest.raises(gf.AdaptError, match="adapted on top of another adapter"):
        save(gf.adapt(below, {"lin": gf.LoRA(rank=1)}), tmp_path / "f")
    model["emb"].weight = nn.Parameter(torch.randn(4, 4))
    model["lin"].weight = model["emb"].weight
    with pytest.raises(gf.AdaptError, match=r"'emb\.weight' is one with lin\.weight"):
        save(gf.adapt(model, {"emb": gf.LoRA(rank=1)}), tmp_path / "f")
    norm = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    adapted = gf.adapt(norm, {"0": gf.LoRA(rank=1)})
    adapted(torch.randn(3, 4))
    with pytest.raises(gf.AdaptError, match=r"the buffer '1\.num_batches_tracked' differs"):
        save(adapted, tmp_path / "f")
    with pytest.raises(gf.AdaptError, match="on the meta device"):
        save(gf.adapt(nn.Sequential(nn.Linear(4, 4, device="meta")), gf.LoRA(rank=1)), tmp_path / "f")


def test_metadata(tmp_path: Path) -> None:
    adapted = gf.adapt(net(), gf.LoRA(rank=4, alpha=2))
    save(adapted, tmp_path / "f", metadata={"ss_base_model_version": "ours"})
    found = metadata(tmp_path / "f")
    expected = {
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": "4",
        "ss_network_alpha": "2",
        "ss_base_model_version": "ours",
    }
    assert expected.items() <= found.items()
    assert json.loads(found["ss_network_args"]) == {"algo": "lora"}
    data = (tmp_path / "f").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert start % 8 == 0
    assert found["sshs_model_hash"] == hashlib.sha256(data[start:]).hexdigest()
    with safe_open(tmp_path / "f", framework="pt") as file:
        assert dict(file.metadata()) == found
    save(adapted, tmp_path / "g", metadata={"ss_base_model_version": "ours"})
    assert (tmp_path / "g").read_bytes() == data
    save(gf.adapt(net(), {"plane": gf.LoRA(rank=4), "body.0": gf.DoRA(rank=2)}), tmp_path / "f")
    assert metadata(tmp_path / "f")["ss_network_dim"] == "Dynamic"
    assert json.loads(metadata(tmp_path / "f")["ss_network_args"]) == {"algo": "lora", "dora_wd": "True"}


def test_the_model_is_untouched_and_native_files_hold_what_was_read(tmp_path: Path) -> None:
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("dora of inputs", "loha, decomposed", "lokr, unbalanced", "lokr, decomposed", "ia3"):
        adapted = load(model, written(theirs(model, **ALGOS[name]), tmp_path / "f"))
        gf.save_adapter(adapted, tmp_path / "native")
        torch.testing.assert_close(gf.load_adapter(model, tmp_path / "native")(X), adapted(X), rtol=0, atol=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


METHODS: list[tuple[gf.Method, list[str]]] = [
    (Decomposed(gf.LoRA(rank=2), side="input"), ["linear square", "conv1d"]),
    (Decomposed(gf.LoHa(rank=2)), ["linear", "conv2d"]),
    (GivenLoKr(rank=1, first=(2, 2)), ["linear", "conv2d grouped"]),
    (WeightIA3(), ["linear"]),
]


@pytest.mark.parametrize(("method", "hosts"), METHODS, ids=str)
def test_the_methods_obey_the_laws(method: gf.Method, hosts: list[str]) -> None:
    check(method, hosts)


def test_what_is_decomposed() -> None:
    for of, words in (
        (gf.DoRA(), "is of a LoRA, LoHa or LoKr"),
        (gf.LoRA(dropout=0.1), "without dropout"),
        (gf.LoRA(init="olora"), "no part"),
    ):
        with pytest.raises(gf.AdaptError, match=words):
            Decomposed(of)
    with pytest.raises(gf.AdaptError, match="side is one of"):
        Decomposed(gf.LoRA(), side="left")  # type: ignore[arg-type]
    with pytest.raises(gf.AdaptError, match="the weight of a Linear, Conv1d"):
        gf.adapt(nn.Sequential(nn.Embedding(4, 4)), {"0": Decomposed(gf.LoRA())})
    with pytest.raises(gf.AdaptError, match=r"multiples of \(5, 1\)"):
        gf.adapt(nn.Linear(4, 4), {"weight": GivenLoKr(first=(5, 1))})
