"""Networks that run in steps: `generate` of a transformers model, and forwards that are generators."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..tracking.replay import DivergedError
from ..tracking.sample_axis import SampleAxis, TrackSamples, Untracked, sample_axis_of, tag
from .plan import Plan, RecordedPath
from .routing import ApartError
from .samples import kind_of, output_axis
from .segments import Segments

MAIN = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "input_features", "pixel_values")
"""The names of the arguments that may be the input of a transformers model."""
INPUTS = {
    "input_ids": 2, "inputs_embeds": 3, "decoder_input_ids": 2, "decoder_inputs_embeds": 3, "attention_mask": 2,
    "decoder_attention_mask": 2, "encoder_attention_mask": 2, "position_ids": 2, "token_type_ids": 2, "input_features": 3,
    "pixel_values": 4,
}  # fmt: skip
"""Arguments with a first axis of samples and beams, and their number of dimensions."""


def stepped(steps: Generator[Any, Any, Any], size: int) -> Generator[Any, Any, Any]:
    """A network's generator, with samples tracked in each of its steps but not between them."""
    answer: Any = None
    while True:
        try:
            with TrackSamples(size):
                made = steps.send(answer)
        except StopIteration as end:
            return _untagged(end.value)
        answer = yield _untagged(made)


def _untagged(made: Any) -> Any:
    """Untagged aliases of an output's tensors; the tensors keep their tags, since the network may use them again."""
    leaves, spec = tree_flatten(made)
    return tree_unflatten([leaf if output_axis(leaf) is None else tag(leaf, None) for leaf in leaves], spec)


@contextmanager
def stepping(module: nn.Module, plan: Plan, segments: Segments) -> Iterator[None]:
    """Tags the inputs of each call of the network while `generate` runs; their first axis is of samples and beams.

    A call of a kind that was tracked before uses the recorded path.
    """
    active: list[tuple[object, TrackSamples | None]] = []

    def before(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if active:  # an encoder that the network calls itself
            active.append((None, None))
            return args, kwargs
        main = next((kwargs[name] for name in MAIN if isinstance(kwargs.get(name), Tensor)), None)
        inner = 0 if main is None else main.shape[0] // segments.size
        kind = (
            called is module,
            inner,
            *(kind_of([value], None) for value in kwargs.values() if isinstance(value, Tensor)),
            tuple(kwargs),
        )
        path = plan.paths.get(kind)
        segments.expect(None if path is None else path.uses)
        if path is not None:
            active.append((kind, None))
            return args, kwargs
        given = dict(kwargs)
        for name, value in kwargs.items():
            dims = INPUTS.get(name)
            if name == "encoder_outputs":
                leaves, spec = tree_flatten(value)
                given[name] = tree_unflatten([_tagged(leaf, 3, segments.size, inner) for leaf in leaves], spec)
            elif dims is not None:
                given[name] = _tagged(value, dims, segments.size, inner)
            elif isinstance(value, Tensor) and isinstance(sample_axis_of(value), Untracked):
                given[name] = tag(value, None)
        mode = TrackSamples(segments.size)
        mode.__enter__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        active.append((kind, mode))
        return args, given

    def after(_: nn.Module, args: Any, output: Any) -> None:
        kind, mode = active.pop()
        if mode is not None:
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            if segments.uses is not None and output is not None and not (mode.depends_on_values or mode.answers):
                plan.paths[kind] = RecordedPath(tuple(segments.uses), ())

    encoder = _encoder_of(module)
    hooks = []
    for called in (module,) if encoder is None else (module, encoder):
        hooks.append(called.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(called.register_forward_hook(after, always_call=True))
    try:
        yield
    except DivergedError:
        raise ApartError from None
    finally:
        for hook in hooks:
            hook.remove()


def _encoder_of(module: Any) -> nn.Module | None:
    """The encoder, which `generate` runs by itself first; None if there is none."""
    if not getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        return None
    found = module.get_encoder()
    return found if isinstance(found, nn.Module) else None


def _tagged(value: Any, dims: int, size: int, inner: int) -> Any:
    """A tensor of so many dimensions whose first axis is of samples and beams, tagged; anything else untagged."""
    if not isinstance(value, Tensor):
        return value
    if value.ndim == dims and inner and value.shape[0] == size * inner:
        return tag(value, SampleAxis(0, inner))
    return value if sample_axis_of(value) is None else tag(value, None)
