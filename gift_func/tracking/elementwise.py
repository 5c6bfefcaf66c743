"""Elementwise functions: the sample axis is where broadcasting puts it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .layout import TAG_KEY, UNTRACKED, SampleAxis, Tag
from .table import (
    TOLERANT,
    Args,
    BatchInfo,
    Kwargs,
    aligned,
    broadcast,
    contract,
    functions,
    only_first,
    rule_for,
    tag_of,
    tensors,
)

_ARITHMETIC = """
    add sub subtract mul multiply div divide true_divide floor_divide remainder fmod pow float_power rsub neg negative positive
    abs absolute sign sgn signbit square sqrt rsqrt reciprocal exp exp2 expm1 log log2 log10 log1p logaddexp logaddexp2 sin cos
    tan asin acos atan atan2 arctan2 arcsin arccos arctan sinh cosh tanh asinh acosh atanh arcsinh arccosh arctanh sinc erf erfc
    erfinv expit logit lgamma digamma xlogy xlog1py entr ndtr i0 i0e i1 floor ceil round trunc fix frac clamp clip clamp_min
    clamp_max maximum minimum fmax fmin lerp addcmul addcdiv where masked_fill nan_to_num hypot copysign ldexp deg2rad rad2deg
    gcd lcm heaviside nextafter conj conj_physical resolve_conj resolve_neg angle
    """.split()
_COMPARISONS = """
    eq ne lt le gt ge greater greater_equal less less_equal not_equal isclose isnan isinf isfinite isposinf isneginf isreal
    logical_and logical_or logical_xor logical_not bitwise_and bitwise_or bitwise_xor bitwise_not bitwise_left_shift
    bitwise_right_shift
    """.split()
_ACTIVATIONS = """
    relu relu6 elu selu celu gelu silu mish softplus softshrink hardshrink tanhshrink softsign sigmoid hardsigmoid hardswish
    hardtanh leaky_relu threshold logsigmoid rrelu
    """.split()
_OPERATORS = " ".join(
    f"__{prefix}{name}__"
    for name in "add sub mul truediv div floordiv mod pow and or xor lshift rshift".split()
    for prefix in "ri"
)
_DUNDERS = """
    __add__ __sub__ __mul__ __truediv__ __div__ __floordiv__ __mod__ __pow__ __and__ __or__ __xor__ __lshift__ __rshift__
    __neg__ __pos__ __abs__ __invert__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__
    """
_BOTH = [*_ARITHMETIC, *_COMPARISONS, *_ACTIVATIONS]
_UNARY = """
    clone contiguous detach alias to float double half bfloat16 int long short byte char bool cfloat cdouble type type_as
    cpu cuda requires_grad_ pin_memory dropout alpha_dropout feature_dropout feature_alpha_dropout dropout1d dropout2d dropout3d
    native_dropout tril triu bernoulli poisson one_hot .real .imag .data triu_ tril_ dropout_ alpha_dropout_ detach_
    """
_CONSTANT = """
    zeros_like ones_like empty_like rand_like randn_like randint_like new_zeros new_ones new_empty new_full new_tensor
    new_empty_strided zero_ normal_ uniform_ bernoulli_
    exponential_ random_ nonzero argwhere
    nonzero_static backward register_hook retain_grad
    """
_LOSSES = """
    mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits kl_div poisson_nll_loss
    soft_margin_loss hinge_embedding_loss gaussian_nll_loss
    """


@rule_for(" ".join([*_BOTH, *(f"{name}_" for name in _BOTH), _DUNDERS, _OPERATORS]))
def track_elementwise(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Any) -> Any:
    """Arguments are broadcast; those with a sample axis must have the same samples along it."""
    if not isinstance(result, Tensor):
        # torch.where(mask) returns positions, which are data to index with; `getitem` finds the samples of what they select.
        return None
    if not kwargs and len(args) == 1:
        return tag_of(args[0])
    # A short way for the usual case: one tagged argument, of the result's shape.
    shape = result.shape
    found: Tag = None
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            tag = value.__dict__.get(TAG_KEY)
            if tag is not None and tag is not found:
                if found is not None or value.shape != shape or type(tag) is not SampleAxis:
                    return broadcast(tensors(args, kwargs), shape, batch)
                found = tag
    return found


TOLERANT.update(functions("where"))


@rule_for(_UNARY, tolerant=True)
def track_unary(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Any) -> Tag:
    """The result's values depend on the first argument only, and not on a tensor given for its dtype, say."""
    return tag_of(args[0] if args else next(iter(kwargs.values())))


@rule_for("bucketize isin prelu", tolerant=True)
def track_by_table(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Any) -> Tag:
    """The first argument's sample axis; no other argument may have a tag."""
    return only_first(args, kwargs)[1]


@rule_for(_CONSTANT, tolerant=True)
def track_constant(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Any) -> Tag:
    """The result does not depend on the batch's values, or consists of positions to index with."""
    return None


@rule_for("full_like fill_ fill", tolerant=True)
def track_filled(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Any) -> Tag:
    """A constant, unless the fill value has a tag."""
    return UNTRACKED if any(tag_of(value) is not None for value in tensors(args[1:], kwargs)) else None


@rule_for("copy_", tolerant=True)
def track_copied(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """The source's samples; what the target contained before does not matter."""
    return aligned(args[1] if len(args) > 1 else kwargs["src"], result.shape, batch)


@rule_for(_LOSSES)
def track_loss(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Elementwise with `reduction="none"`; the default mixes the samples."""
    return track_elementwise(batch, args, kwargs, result) if kwargs.get("reduction") == "none" else UNTRACKED


@rule_for("cross_entropy nll_loss")
def track_classes(batch: BatchInfo, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Classes are on axis 1 of the input, and of the target if it has as many axes."""
    scores = args[0]
    if kwargs.get("reduction") != "none" or scores.dim() < 2:
        return UNTRACKED
    target = args[1] if len(args) > 1 else kwargs["target"]
    out = list(range(result.dim()))
    inside = [*out[:1], "class", *out[1:]]
    return contract([(scores, inside), (target, inside if target.dim() == scores.dim() else out)], out, result.shape, batch)
