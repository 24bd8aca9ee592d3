"""What a tensor is quantized to, as plain data; the names that users write; presets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, NamedTuple, get_args

Method = Literal["range", "lsq", "lsq+", "pact", "dorefa", "binary", "ternary", "fp8_e4m3", "fp8_e5m2", "alternating"]
ObserverName = Literal["minmax", "ema", "percentile", "mse", "kl"]
Of = Literal["weights", "activations"]

_GRANULARITY = re.compile(r"tensor|channel|gate|token|sample|group:([1-9]\d*)")
_SHORT = re.compile(r"(int|lsq\+?|pact|dorefa|alternating|po2_)(\d+)")
_NAMES = (
    '"int8" (8 down to 1 bits), "lsq4", "lsq+4", "pact4", "dorefa2", "alternating2", "po2_8", "binary", "ternary", '
    '"fp8", "fp8_e5m2", "int8_dynamic" or "none"'
)


@dataclass(frozen=True)
class QuantSpec:
    """How a weight or an activation is quantized.

    Args:
        bits: Width of the integers, 1 to 8.
        symmetric: Whether the zero point is 0; otherwise the range is affine (its zero is still exactly zero).
        granularity: What shares one scale: ``"tensor"``; ``"channel"`` (dimension 0 of a weight; dimension 1 of a
            transposed convolution's); ``"group:N"`` (N consecutive inputs of an output channel); ``"gate"`` (of a
            recurrent weight); for dynamic activations ``"token"`` (all but the last dimension) or ``"sample"``.
        method: ``"range"`` rounds within an observed range, with a straight-through gradient (Jacob et al., CVPR
            2018); ``"lsq"`` learns the step (Esser et al., ICLR 2020), ``"lsq+"`` the offset as well (Bhalgat et al.,
            2020); ``"pact"`` learns the clipping value of activations (Choi et al., 2018); ``"dorefa"`` (Zhou et
            al., 2016); ``"binary"`` (Rastegari et al., 2016) and ``"ternary"`` (Li et al., 2016) weights;
            ``"fp8_e4m3"``, ``"fp8_e5m2"`` round to 8-bit floats; ``"alternating"`` are multi-bit codes (Xu et al.,
            ICLR 2018).
        observer: Which range: ``"minmax"``, ``"ema"`` (exponential moving average of minimum and maximum),
            ``"percentile"``, ``"mse"``, ``"kl"``. The range of a weight follows the weight (``"minmax"``), or is
            searched when quantization starts (``"mse"``).
        power_of_two: Round scales to powers of two.
        narrow: Leave out the lowest code of signed integers (-128 of 8 bits).
        signed: Whether symmetric integers have a sign; ``None`` decides by what was observed.
        dynamic: Take the range from the tensor itself in each call.
        percentile: Share of values inside the range of that observer, in percent.
        momentum: Of ``"ema"``: the weight of the old range, in [0, 1).

    Raises:
        ValueError: If an argument is out of range, or two of them do not go together.

    Example:
        >>> QuantSpec(bits=4, granularity="channel").levels(signed=True)
        (-8, 7)
    """

    bits: int = 8
    symmetric: bool = True
    granularity: str = "tensor"
    method: Method = "range"
    observer: ObserverName = "ema"
    power_of_two: bool = False
    narrow: bool = False
    signed: bool | None = None
    dynamic: bool = False
    percentile: float = 99.99
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or not 1 <= self.bits <= 8:
            raise ValueError(f"bits is a whole number from 1 to 8; got {self.bits!r}")
        for name, known in (("method", get_args(Method)), ("observer", get_args(ObserverName))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {known}; got {getattr(self, name)!r}")
        if not _GRANULARITY.fullmatch(str(self.granularity)):
            raise ValueError(
                f"granularity is 'tensor', 'channel', 'group:N', 'gate', 'token' or 'sample'; got {self.granularity!r}"
            )
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile lies between 50 and 100; got {self.percentile!r}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum lies in [0, 1); got {self.momentum!r}")
        self._check_pairs()

    def _check_pairs(self) -> None:
        if self.dynamic != (self.granularity in ("token", "sample")):
            raise ValueError(
                f"granularity={self.granularity!r} with dynamic={self.dynamic}: ranges per token or sample are taken "
                "from the tensor itself (dynamic=True), all others are not"
            )
        if self.dynamic and self.method not in ("range", "alternating"):
            raise ValueError(f"dynamic ranges leave nothing to learn; got method={self.method!r}")
        if self.bits == 1 and self.method == "range" and self.signed is not False and self.symmetric:
            raise ValueError("signed integers of 1 bit have only the codes -1 and 0; use method='binary'")
        if self.method == "alternating" and self.bits > 4:
            raise ValueError(f"alternating codes have 1 to 4 bits; got bits={self.bits}")

    @property
    def is_learned(self) -> bool:
        """Whether it has parameters that are trained."""
        return self.method in ("lsq", "lsq+", "pact")

    @property
    def group(self) -> int | None:
        """Size of a group of inputs that shares a scale."""
        return int(self.granularity[6:]) if self.granularity.startswith("group:") else None

    def levels(self, signed: bool) -> tuple[int, int]:
        """The lowest and highest integer.

        Args:
            signed: Whether there are negative ones.
        """
        if self.method == "binary":
            return -1, 1
        if self.method == "ternary":
            return -1, 1
        if not signed:
            return 0, 2**self.bits - 1
        low = -(2 ** (self.bits - 1))
        return (low + 1 if self.narrow and self.bits > 1 else low), max(2 ** (self.bits - 1) - 1, 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for manifests and checkpoints."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantSpec:
        """The inverse of `to_dict`.

        Raises:
            ValueError: If a key is unknown or a value is out of range.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ValueError(f"a quantization spec has no {unknown[0]!r}; it has {', '.join(sorted(known))}")
        return cls(**data)


_WEIGHT = QuantSpec(granularity="channel", observer="minmax", narrow=True)
_ACTIVATION = QuantSpec(symmetric=False)
_DYNAMIC = QuantSpec(granularity="token", dynamic=True)


def parse(value: QuantSpec | Mapping[str, Any] | str | None, of: Of) -> QuantSpec | None:
    """The spec that a user wrote.

    Args:
        value: A spec, its fields, or a name such as ``"int8"``, ``"lsq4"`` or ``"none"``.
        of: What it is for: names mean signed integers per channel for weights, affine ones per tensor for activations.

    Returns:
        The spec; ``None`` leaves the tensor as it is.

    Raises:
        ValueError: If it is not understood, or cannot be used for this.
        TypeError: If it is of another type.

    Example:
        >>> parse("int4", of="weights").granularity
        'channel'
    """
    if value is None or value == "none":
        return None
    if isinstance(value, str):
        value = _named(value, of)
    elif isinstance(value, Mapping):
        value = QuantSpec.from_dict(value)
    if not isinstance(value, QuantSpec):
        raise TypeError(f"{of} is a QuantSpec or a name: {_NAMES}; got {value!r}")
    return _fitting(value, of)


def _fitting(spec: QuantSpec, of: Of) -> QuantSpec:
    only = {
        "weights": ("dorefa", "binary", "ternary", "alternating", "range", "lsq", "lsq+", "fp8_e4m3", "fp8_e5m2"),
        "activations": ("pact", "dorefa", "alternating", "range", "lsq", "lsq+", "fp8_e4m3", "fp8_e5m2"),
    }[of]
    if spec.method not in only:
        raise ValueError(f"method {spec.method!r} is not for {of}; use one of {', '.join(only)}")
    if of == "weights" and spec.dynamic:
        raise ValueError("weights are known before they are used, so nothing about them is dynamic")
    if (of == "activations" and spec.granularity in ("channel", "gate")) or (of == "activations" and spec.group):
        raise ValueError(
            f"activations have one range (or one for each token or sample); got granularity={spec.granularity!r}, "
            "which no integer kernel can run"
        )
    if of == "weights" and spec.observer not in ("minmax", "mse"):
        return replace(spec, observer="minmax")
    return spec


def _named(name: str, of: Of) -> QuantSpec:
    base = _WEIGHT if of == "weights" else _ACTIVATION
    fixed = {
        "binary": replace(base, bits=1, method="binary"),
        "ternary": replace(base, bits=2, method="ternary"),
        "fp8": replace(base, method="fp8_e4m3", symmetric=True),
        "fp8_e4m3": replace(base, method="fp8_e4m3", symmetric=True),
        "fp8_e5m2": replace(base, method="fp8_e5m2", symmetric=True),
    }
    if name in fixed:
        return fixed[name]
    if name == "int8_dynamic" and of == "activations":
        return _DYNAMIC
    match = _SHORT.fullmatch(name)
    if match is None:
        raise ValueError(f"{of}={name!r} is not known; use a QuantSpec or one of {_NAMES}")
    kind, bits = match[1], int(match[2])
    if kind == "int":
        return replace(base, bits=bits)
    if kind == "po2_":
        return replace(base, bits=bits, symmetric=True, power_of_two=True)
    if kind == "alternating":
        codes = QuantSpec(bits=bits, method="alternating", granularity="channel")
        return codes if of == "weights" else replace(codes, granularity="token", dynamic=True)
    learned: Any = kind
    # The lowest code of few bits is worth too much to be left out; LSQ's own levels have it.
    narrow = base.narrow and bits == 8
    return replace(base, bits=bits, method=learned, symmetric=kind != "lsq+", narrow=narrow)


class Preset(NamedTuple):
    """Weights, activations, and what the first and the last layer get instead.

    Attributes:
        weights: Name for `parse`.
        activations: Name for `parse`.
        first_last: ``"same"``, ``"int8"`` or ``"float"``.
    """

    weights: str
    activations: str
    first_last: Literal["same", "int8", "float"]


PRESETS: dict[str, Preset] = {
    "int8_static": Preset("int8", "int8", "same"),
    "int8_dynamic": Preset("int8", "int8_dynamic", "same"),
    "w4a8": Preset("int4", "int8", "int8"),
    "w2a2_lsq": Preset("lsq2", "lsq2", "int8"),
    "fp8": Preset("fp8", "fp8", "same"),
}
