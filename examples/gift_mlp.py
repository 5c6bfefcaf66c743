"""GIFt's tutorial, first half, line by line: an MLP, saving and loading, and strategies of one's own.

GIFt (https://github.com/qiauil/GIFt) changes the network it is given: `enable_fine_tuning(mlp, strategy)` replaces its
layers, its `parameters()` and its `state_dict()`. Here `adapted = adapt(mlp, strategy)` gives a second model, and the
first one stays bit for bit what it was; the last section proves that. Run it: `python examples/gift_mlp.py`.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import gift_func.factories as fts
from gift_func import Full, adapt
from gift_func.strategies import DeBugStrategy, FineTuningStrategy, LoRAFullFineTuningStrategy
from gift_func.utils import num_trainable_parameters, trainable_parameters

torch.manual_seed(0)

# --- 1. A neural network


class MLP(nn.Module):
    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int) -> None:
        super().__init__()
        self.input_dim = input_dim
        self.hidden_dim = hidden_dim
        self.output_dim = output_dim
        self.num_layers = num_layers
        self.layers = nn.ModuleList()
        self.layers.append(nn.Linear(input_dim, hidden_dim))
        for _ in range(num_layers - 1):
            self.layers.append(nn.Linear(hidden_dim, hidden_dim))
        self.layers.append(nn.Linear(hidden_dim, output_dim))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.num_layers):
            x = self.layers[i](x)
            x = self.relu(x)
        x = self.layers[-1](x)
        return x


def census(model: nn.Module) -> tuple[list[object], list[Tensor]]:
    """What the model is (objects, flags, gradients, hooks, tree) and a copy of every value, to compare with later."""
    facts: list[object] = [repr(model)]
    for name, module in model.named_modules():
        hooks = [id(hook) for key, found in module.__dict__.items() if "hooks" in key for hook in found or ()]
        facts += [name, id(module), type(module), module.training, sorted(module.__dict__), hooks]
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    for name, tensor in tensors.items():
        facts += [name, id(tensor), tensor.requires_grad, id(tensor.grad)]
    return facts, [tensor.detach().clone() for tensor in tensors.values()]


def unchanged(model: nn.Module, before: tuple[list[object], list[Tensor]]) -> bool:
    facts, values = census(model)
    return facts == before[0] and all(map(torch.equal, values, before[1]))


mlp = MLP(1, 100, 1, 5)
mlp_before = census(mlp)
print("Network before adapting:", mlp)
print("Number of trainable parameters:", num_trainable_parameters(mlp))
assert num_trainable_parameters(mlp) == 40_701

# --- 2. Adapting it takes a single line

adapted = adapt(mlp, LoRAFullFineTuningStrategy())
print("Network after adapting:", adapted)
print("Number of trainable parameters after adapting:", num_trainable_parameters(adapted))
assert num_trainable_parameters(adapted) == 3_006

# An adapted model's parameters are the adapter's and nothing else, so an optimizer is made as for any module.
optimizer = torch.optim.Adam(adapted.parameters(), lr=0.001)
assert [id(p) for p in adapted.parameters()] == [id(p) for p in trainable_parameters(adapted)]

x = torch.linspace(-1, 1, 64).unsqueeze(1)
losses = []
for _ in range(30):
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(adapted(x), torch.sin(3 * x))
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"Loss: {losses[0]:.4f} -> {losses[-1]:.4f}")
assert losses[-1] < losses[0]

# --- 3. Save and load: the adapter's tensors under the names that GIFt gives them

state_dict = adapted.adapter_state_dict()
print(state_dict.keys())
assert list(state_dict) == [f"layers.{i}.lora_{letter}" for i in range(6) for letter in "BA"]

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "mlp.pt"
    torch.save(state_dict, path)
    again = adapt(mlp, LoRAFullFineTuningStrategy())
    print(again.load_adapter_state_dict(torch.load(path, weights_only=True)))
assert torch.equal(again(x), adapted(x))
assert not torch.equal(adapted(x), mlp(x))

# --- 4. A strategy is any iterable of (check, action)


class ExampleMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_model = nn.Linear(1, 10)
        self.mid_model = MLP(10, 10, 10, 2)
        self.out_model = nn.Linear(10, 1)

    def forward(self, x: Tensor) -> Tensor:
        # GIFt's text says `return self.mlp(x)`: there is no such attribute, so its example cannot be called.
        out: Tensor = self.out_model(self.mid_model(self.in_model(x)))
        return out


example_mlp = ExampleMLP()
example_before = census(example_mlp)
print("Example MLP:", example_mlp)

Check = Callable[[nn.Module, str, str, str, nn.Module], bool]
Action = Callable[[nn.Module, str, str, str, nn.Module], None]
visited: list[tuple[str, str, str]] = []


class ExampleStrategy:
    """Replaces every linear layer by a convolution."""

    def __init__(self) -> None:
        def check_function(
            parent_module: nn.Module, name: str, global_name: str, class_name: str, layer_obj: nn.Module
        ) -> bool:
            return class_name == "Linear"

        def action_function(
            parent_module: nn.Module, name: str, global_name: str, class_name: str, layer_obj: nn.Module
        ) -> None:
            print("Parent Module", parent_module)
            print("Layer name:", name)
            print("Global name:", global_name)
            print("Class name:", class_name)
            print("Layer object:", layer_obj)
            print("_" * 50)
            visited.append((name, global_name, class_name))
            assert isinstance(layer_obj, nn.Linear)
            # The parent is that of a private copy: to set its attribute changes nothing of `example_mlp`.
            setattr(parent_module, name, nn.Conv2d(layer_obj.in_features, layer_obj.out_features, kernel_size=3))

        self.check_actions: list[tuple[Check, Action]] = [(check_function, action_function)]

    def __len__(self) -> int:
        return len(self.check_actions)

    def __getitem__(self, index: int) -> tuple[Check, Action]:
        return self.check_actions[index]


convolutional = adapt(example_mlp, ExampleStrategy())
# From outside to inside: what GIFt's text prints is what this prints (tests/adapting/test_gift.py compares them).
assert visited == [
    ("in_model", "in_model", "Linear"),
    *[(str(i), f"mid_model.layers.{i}", "Linear") for i in range(3)],
    ("out_model", "out_model", "Linear"),
]

# The new layers' parameters are the adapter; the network that they make takes images now.
assert {"in_model.weight", "in_model.bias", "mid_model.layers.2.weight"} <= set(convolutional.adapter)
image = torch.randn(2, 1, 16, 16)
convolutional(image).sum().backward()
assert convolutional(image).shape == (2, 1, 6, 6)
assert convolutional.adapter["in_model.weight"].grad is not None

# --- 5. The same with the helper class, whose actions have parameters


class ExampleStrategy2(FineTuningStrategy):
    def __init__(self, kernel_size: int = 3) -> None:
        default_action_paras = {"conv_para": {"kernel_size": 3}}
        customized_action_paras = {"conv_para": {"kernel_size": kernel_size}}
        checks_actions_parnames = [
            (
                fts.c_cname_func("Linear"),
                fts.a_replace_func(
                    lambda layer_obj, kernel_size: nn.Conv2d(
                        layer_obj.in_features, layer_obj.out_features, kernel_size=kernel_size
                    )
                ),
                "conv_para",
            )
        ]
        super().__init__(checks_actions_parnames, default_action_paras, customized_action_paras)


print(adapt(example_mlp, ExampleStrategy2()))
assert adapt(example_mlp, ExampleStrategy2(kernel_size=5)).adapter["out_model.weight"].shape == (1, 10, 5, 5)

# The parameters of a strategy can be read, and kept apart from it.
print(ExampleStrategy2().paras())
print(LoRAFullFineTuningStrategy().paras())
assert ExampleStrategy2().paras() == {"conv_para": {"kernel_size": 3}}
assert LoRAFullFineTuningStrategy().paras() == {
    "lora_paras": {"rank": 3, "lora_alpha": None, "lora_dropout": 0.0, "train_bias": False}
}

# Strategies add up (at each module the first check that holds decides), and one for debugging tells what checks find.
input_layer = FineTuningStrategy([(fts.c_name_func("in_model"), fts.a_adapt_func(Full()))])
mixed = adapt(example_mlp, DeBugStrategy(input_layer + LoRAFullFineTuningStrategy(rank=2)))
assert list(mixed.adapter)[:4] == ["in_model.weight", "in_model.bias", "mid_model.layers.0.lora_B", "mid_model.layers.0.lora_A"]

# --- 6. The user's models are what they were

assert unchanged(mlp, mlp_before)
assert unchanged(example_mlp, example_before)
assert num_trainable_parameters(mlp) == 40_701
print("Both models are bit for bit what they were.")
