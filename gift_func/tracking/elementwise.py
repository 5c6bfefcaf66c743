"""Functions that treat every element by itself: samples stay where broadcasting puts them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .layout import KEY, LOST, SampleAxis, Tag
from .table import TOLERANT, Args, Batch, Kwargs, aligned, broadcast, contract, follows, functions, only_first, tag_of, tensors

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


@follows(" ".join([*_BOTH, *(f"{name}_" for name in _BOTH), _DUNDERS, _OPERATORS]))
def elementwise(batch: Batch, args: Args, kwargs: Kwargs, result: Any) -> Any:
    """Arguments aligned from the right; all that carry samples must carry them alike."""
    if not isinstance(result, Tensor):
        # torch.where(mask): positions, which are data to index with. What they pick has an owner of its own.
        return None
    if not kwargs and len(args) == 1:
        return tag_of(args[0])
    # The usual case, one tagged argument of the result's own shape, without the general rule's cost.
    shape = result.shape
    found: Tag = None
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            rows = value.__dict__.get(KEY)
            if rows is not None and rows is not found:
                if found is not None or value.shape != shape or type(rows) is not SampleAxis:
                    return broadcast(tensors(args, kwargs), shape, batch)
                found = rows
    return found


TOLERANT.update(functions("where"))


@follows(_UNARY, tolerant=True)
def unary(batch: Batch, args: Args, kwargs: Kwargs, result: Any) -> Tag:
    """Only the first argument counts; a tensor given for its element type, say, has no part in the values."""
    return tag_of(args[0] if args else next(iter(kwargs.values())))


@follows("bucketize isin prelu", tolerant=True)
def by_table(batch: Batch, args: Args, kwargs: Kwargs, result: Any) -> Tag:
    """The first argument counts, and no other may be of the batch."""
    return only_first(args, kwargs)[1]


@follows(_CONSTANT, tolerant=True)
def constant(batch: Batch, args: Args, kwargs: Kwargs, result: Any) -> Tag:
    """Nothing of the batch's values is in the result, or only positions to index with."""
    return None


@follows("full_like fill_ fill", tolerant=True)
def filled(batch: Batch, args: Args, kwargs: Kwargs, result: Any) -> Tag:
    """A constant, unless the value that fills is of the batch."""
    return LOST if any(tag_of(value) is not None for value in tensors(args[1:], kwargs)) else None


@follows("copy_", tolerant=True)
def copied(batch: Batch, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """What was there before is gone."""
    return aligned(args[1] if len(args) > 1 else kwargs["src"], result.shape, batch)


@follows(_LOSSES)
def loss(batch: Batch, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Elementwise unless it is reduced, as it is by default."""
    return elementwise(batch, args, kwargs, result) if kwargs.get("reduction") == "none" else LOST


@follows("cross_entropy nll_loss")
def classes(batch: Batch, args: Args, kwargs: Kwargs, result: Tensor) -> Tag:
    """Classes lie along axis 1 of the input, and of the target if it has as many axes."""
    scores = args[0]
    if kwargs.get("reduction") != "none" or scores.dim() < 2:
        return LOST
    target = args[1] if len(args) > 1 else kwargs["target"]
    out = list(range(result.dim()))
    inside = [*out[:1], "class", *out[1:]]
    return contract([(scores, inside), (target, inside if target.dim() == scores.dim() else out)], out, result.shape, batch)
