"""The modules that sit in a slot of a layer and quantize what passes: one small class per kind of grid.

A quantizer holds float32 ranges ``lo`` and ``hi`` (buffers) or learned steps (parameters), never integers: an average
of weights over time (EMA, SWA) would freeze integer zero points while scales move. Scales and zero points are derived
in each forward pass, without reading a value back from the device. Whether it computes (``enabled``) or watches
(``observing``) are plain attributes that a schedule sets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.quantization import functional as qf
from lightning_compress.quantization.layout import Layout
from lightning_compress.quantization.observers import Observer
from lightning_compress.quantization.range_search import mse_weight_range
from lightning_compress.quantization.spec import Of, QuantSpec

NEVER_OBSERVED = (
    "has seen no data, so it has no range: let it observe at least one training batch before quantization starts, or "
    "exclude the layer"
)


def make(
    spec: QuantSpec, shape: Sequence[int], of: Of = "weights", gates: int = 1, axis: int = 0, groups: int = 1
) -> Quantizer:
    """The quantizer for a spec.

    Args:
        spec: What to quantize to.
        shape: Shape of the weight; of no importance for activations.
        of: ``"weights"`` or ``"activations"``.
        gates: Gates of a recurrent weight, stacked along dimension 0 (4 for LSTM, 3 for GRU).
        axis: Dimension of the output channels, 1 for transposed convolutions.
        groups: Groups of a transposed convolution.

    Returns:
        A quantizer that computes nothing until ``enabled`` is set.

    Raises:
        CompressionError: If the shape cannot be divided into the groups that the spec wants.
        ValueError: If the spec leaves no grid.

    Example:
        >>> quantizer = make(QuantSpec(bits=4, granularity="channel", observer="minmax", narrow=True), (2, 3))
        >>> quantizer.fake_quantize(torch.tensor([[0.7, -0.26, 0.0], [7.0, 1.4, 1.6]]))
        tensor([[ 0.7000, -0.3000,  0.0000],
                [ 7.0000,  1.0000,  2.0000]])
    """
    # These build on this module, so they come in only now.
    from lightning_compress.quantization.trained_quantizers import KINDS

    layout = Layout() if of == "activations" else Layout.of(spec, shape, gates=gates, axis=axis, groups=groups)
    if spec.method == "alternating":
        from lightning_compress.quantization.multibit import MultiBitQuantizer

        return MultiBitQuantizer(spec, layout, of)
    if spec.dynamic:
        return DynamicQuantizer(spec, layout, of)
    if spec.method == "range":
        return RangeQuantizer(spec, layout, of)
    return KINDS[spec.method](spec, layout, of)


class Quantizer(nn.Module):
    """Base of all quantizers: passes tensors through unchanged until it is enabled.

    Args:
        spec: What to quantize to.
        layout: Which elements share a scale.
        of: ``"weights"`` or ``"activations"``.

    Attributes:
        enabled: Whether it quantizes.
        observing: Whether it collects ranges; only in training mode, and only if it `follows_data`.
        signed: Whether its integers are signed; ``None`` while that depends on data that nobody has seen yet.
        observer: What collects ranges, or ``None``.
    """

    def __init__(self, spec: QuantSpec, layout: Layout, of: Of) -> None:
        super().__init__()
        self.spec = spec
        self.layout = layout
        self.of = of
        self.enabled = False
        self.observing = False
        self.signed: bool | None = self._sign_of_spec()
        self.observer: Observer | None = None

    def _sign_of_spec(self) -> bool | None:
        if self.spec.signed is not None:
            return self.spec.signed
        if self.of == "weights" or self.spec.dynamic:
            return True
        return None if self.spec.symmetric else False

    def forward(self, x: Tensor) -> Tensor:
        """The quantized tensor if it is enabled, else the tensor itself."""
        if self.observing and self.training and self.observer is not None:
            self.observer.update(x.detach())
        return self.fake_quantize(x) if self.enabled else x

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Round to the grid, with gradients as the method has them.

        Args:
            x: Tensor of any float type.

        Returns:
            A tensor like `x`.
        """
        raise NotImplementedError

    def scale_zero_point(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scales and whole-numbered zero points, float32, of the layout's size.

        Args:
            x: The weight, which quantizers that follow it need.

        Raises:
            CompressionError: If there is no integer grid, or `x` is needed.
        """
        raise CompressionError(f"{self.spec.method} of {self.spec.bits} bits is no grid of 8-bit integers")

    def integers(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is stored: ``(q - zero_point) * scale`` is the quantized tensor.

        Args:
            x: The tensor.

        Returns:
            Integers (int8, or uint8 if they are not signed) of the shape of `x`, scales (float32) and zero points
            (int64) of the layout's size (dynamic ranges: that broadcast).

        Raises:
            CompressionError: If there is no integer grid.
        """
        x = x.detach()
        scale, zero_point = self.scale_zero_point(x)
        rows = self.layout.rows(x)
        spread = self.layout.spread(scale, rows), self.layout.spread(zero_point, rows)
        q = qf.quantize(rows, *spread, *self.levels)
        return self.layout.back(q, x), scale, zero_point.long()

    def dequantize(self, q: Tensor, scale: Tensor | None = None, zero_point: Tensor | None = None) -> Tensor:
        """The numbers that integers stand for, float32.

        Args:
            q: Integers, as `integers` returns them.
            scale: Their scales; by default those of this quantizer, which one that follows a weight does not have.
            zero_point: Their zero points.
        """
        if scale is None:
            scale, zero_point = self.scale_zero_point()
        rows = self.layout.rows(q)
        zero = None if zero_point is None else self.layout.spread(zero_point, rows)
        return self.layout.back(qf.dequantize(rows, self.layout.spread(scale, rows), zero), q)

    def commit(self, lo: Tensor, hi: Tensor) -> None:
        """Set the range, in place.

        Args:
            lo: Lower ends, of the layout's size.
            hi: Upper ends.

        Raises:
            CompressionError: If this kind has no range, or one is not finite.
        """
        own = self._buffers
        if "lo" not in own:
            raise CompressionError(
                f"a quantizer of {self.of} with method {self.spec.method!r} and observer {self.spec.observer!r} keeps "
                "no range; for a weight's range of your own, use observer='mse'"
            )
        if not bool((torch.isfinite(lo) & torch.isfinite(hi)).all()):
            raise CompressionError(f"a range is not finite: from {lo.tolist()} to {hi.tolist()}")
        with torch.no_grad():
            for name, value in self._ends(lo, hi).items():
                target = self.get_buffer(name)
                target.copy_(value.reshape(-1).expand(target.numel()).reshape(target.shape))

    def initial(self, x: Tensor | None = None) -> dict[str, Tensor]:
        """What its buffers and parameters begin with when quantization starts, by name; `signed` is decided as well.

        Args:
            x: The weight, whole; ``None`` for activations, whose observer has seen data.

        Raises:
            CompressionError: If nothing has been observed.
        """
        return {}

    def initialize(self, x: Tensor | None = None) -> None:
        """Write what `initial` returns."""
        with torch.no_grad():
            for name, value in self.initial(x).items():
                target = self._parameters[name] if name in self._parameters else self._buffers[name]
                assert target is not None
                target.copy_(value.reshape(target.shape))

    def following(self, keep: Mapping[int, Tensor]) -> dict[str, dict[int, Tensor]]:
        """What to keep of its own tensors when the weight is cut.

        Args:
            keep: Kept indices of the weight by dimension.

        Returns:
            Kept indices by tensor and dimension.

        Raises:
            CompressionError: If its groups would no longer be those of the smaller weight.
        """
        if self.layout.kind == "tensor":
            return {}
        if self.layout.kind != "channel" or self.layout.groups > 1:
            raise CompressionError(
                f"a weight with one scale for each {self.layout.kind} cannot lose channels; use granularity='channel', "
                "or cut before quantizers are attached"
            )
        index = keep.get(self.layout.axis)
        own = [*self._parameters, *self._buffers]
        return {} if index is None else {name: {0: index} for name in own}

    @property
    def levels(self) -> tuple[int, int]:
        """The lowest and the highest integer.

        Raises:
            CompressionError: If they depend on data that nobody has seen yet.
        """
        if self.signed is None:
            self._decide_sign()
        return self._levels(bool(self.signed))

    def _levels(self, signed: bool) -> tuple[int, int]:
        return self.spec.levels(signed)

    @property
    def needs_data(self) -> bool:
        """Whether it has to observe activations before it can compute."""
        return self.observer is not None

    @property
    def follows_data(self) -> bool:
        """Whether observing does anything now: learned steps begin with what was observed, then go their own way."""
        return self.observer is not None and not (self.enabled and self.spec.is_learned)

    @property
    def has_range(self) -> bool:
        """Whether it can compute: it needs no data, has seen some, or a range was set (read back from the device)."""
        if self.observer is None or self.observer.seen:
            return True
        return bool((self.get_buffer("lo") != 0).any() | (self.get_buffer("hi") != 0).any())

    def forget(self) -> None:
        """Forget what it has observed, and before it computes the sign that follows from that too."""
        if self.observer is not None:
            self.observer = Observer(self.spec)
        if not self.enabled:
            self.signed = self._sign_of_spec()

    def _observe(self) -> None:
        """For activations with ranges: an observer and the two buffers that hold what it found."""
        self.observer = Observer(self.spec)
        self._add_ends()

    def _add_ends(self) -> None:
        self.register_buffer("lo", torch.zeros(self.layout.size))
        self.register_buffer("hi", torch.zeros(self.layout.size))

    def _observed(self) -> tuple[Tensor, Tensor]:
        """The range that was observed, or set; also decides about the sign."""
        if not self.has_range:
            raise CompressionError(f"a quantizer of {self.of} {NEVER_OBSERVED}")
        lo, hi = self.get_buffer("lo"), self.get_buffer("hi")
        if self.observer is not None and self.observer.seen:
            found = self.observer.range()
            lo, hi = (lo.new_full(lo.shape, end) for end in found)
        if not self.enabled:
            self.signed = self._sign_of_spec()
        if self.signed is None:
            self.signed = bool((lo < 0).any())
        return lo, hi

    def _decide_sign(self) -> None:
        self._observed()

    def _ends(self, lo: Tensor, hi: Tensor) -> dict[str, Tensor]:
        """The range as it is stored: it contains zero, and says by itself whether a symmetric one has a sign."""
        lo, hi = lo.float().clamp(max=0.0), hi.float().clamp(min=0.0)
        sign = self.signed if self.enabled else self._sign_of_spec()
        return {"lo": torch.zeros_like(lo) if self.spec.symmetric and sign is False else lo, "hi": hi}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        """Ranges stay float32 when a model is cast: half precision has no more digits than the integers have."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        spec = self.spec
        size = "" if self.layout.size == (1,) else f" x {'x'.join(map(str, self.layout.size))}"
        return f"{spec.method}, {spec.bits} bits, {spec.granularity}{size}, enabled={self.enabled}"


class RangeQuantizer(Quantizer):
    """Rounds within a range, with a straight-through gradient (Jacob et al., CVPR 2018).

    The range of a weight is that of the weight itself in each call, or is searched once (``observer="mse"``) and kept
    in buffers; that of an activation is what the observer found.

    Args:
        spec: What to quantize to.
        layout: Which elements share a scale.
        of: ``"weights"`` or ``"activations"``.
    """

    def __init__(self, spec: QuantSpec, layout: Layout, of: Of) -> None:
        super().__init__(spec, layout, of)
        if of == "activations":
            self._observe()
        elif spec.observer == "mse":
            self._add_ends()
        if of == "weights" and self.levels[1] == 0:
            raise ValueError(f"{spec.bits} bit with a sign has no positive code; use method='binary' for weights")

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See `Quantizer.fake_quantize`."""
        qmin, qmax = self.levels
        rows = self.layout.rows(x)
        scale, zero_point = (self.layout.spread(v, rows) for v in self.scale_zero_point(x))
        if self.spec.symmetric and "lo" not in self._buffers and qmin < 0:
            # The scale comes from the largest element, so that nothing is clipped and every gradient passes.
            value = qf.exact(rows.detach()).mul(scale.reciprocal()).round_().mul_(scale)
            return qf.straight_through(x, self.layout.back(value, x))
        zero = None if self.spec.symmetric else zero_point
        return self.layout.back(qf.fake_quantize(rows, scale, zero, qmin, qmax), x)

    def scale_zero_point(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Quantizer.scale_zero_point`."""
        lo, hi = self._range(x)
        if not self.spec.symmetric:
            return qf.affine_qparams(lo, hi, *self.levels, self.spec.power_of_two)
        scale = qf.symmetric_qparams(lo, hi, *self.levels, self.spec.power_of_two)
        return scale, torch.zeros_like(scale)

    def initial(self, x: Tensor | None = None) -> dict[str, Tensor]:
        """See `Quantizer.initial`: a searched range of a weight, the observed one of an activation."""
        if self.of == "activations":
            return self._ends(*self._observed())
        if "lo" not in self._buffers:
            return {}
        if x is None:
            raise CompressionError("the range of a weight is searched on the weight, and none was given")
        lo, hi = mse_weight_range(x.detach(), self.layout, self.spec, self.levels)
        return {"lo": lo, "hi": hi}

    def _range(self, x: Tensor | None) -> tuple[Tensor, Tensor]:
        if "lo" in self._buffers:
            return self.get_buffer("lo"), self.get_buffer("hi")
        if x is None:
            raise CompressionError("the scale of a weight follows the weight, and none was given; pass the weight")
        return self.layout.extremes(self.layout.rows(x.detach()))


class DynamicQuantizer(Quantizer):
    """Takes the range from the tensor in each call: one per token (all but the last dimension) or per sample.

    Args:
        spec: What to quantize to.
        layout: Not used.
        of: ``"activations"``.
    """

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See `Quantizer.fake_quantize`."""
        scale, zero_point = self.scale_zero_point(x)
        zero = None if self.spec.symmetric else zero_point
        return qf.fake_quantize(x, scale, zero, *self.levels)

    def scale_zero_point(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Quantizer.scale_zero_point`; of the shape of `x` with 1 in the dimensions that share a scale."""
        if x is None:
            raise CompressionError("a dynamic range is that of a tensor, and none was given")
        x = x.detach()
        first = min(1, x.dim() - 1)
        dims = (-1,) if self.spec.granularity == "token" else tuple(range(first, x.dim()))
        lo, hi = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
        if not self.spec.symmetric:
            return qf.affine_qparams(lo, hi, *self.levels, self.spec.power_of_two)
        scale = qf.symmetric_qparams(lo, hi, *self.levels, self.spec.power_of_two)
        return scale, torch.zeros_like(scale)
