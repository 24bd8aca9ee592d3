"""Quantizers beyond observed ranges: learned steps, and grids of their own."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.quantization import functional as qf
from lightning_compress.quantization import learned, lowbit
from lightning_compress.quantization.layout import Layout
from lightning_compress.quantization.quantizers import Quantizer, RangeQuantizer
from lightning_compress.quantization.spec import Of, QuantSpec


class StepQuantizer(Quantizer):
    """Learned steps (LSQ, Esser et al., ICLR 2020), and for affine activations a learned offset (LSQ+, 2020).

    Attributes:
        step: Learned steps, of the layout's size.
        offset: Learned offset in the units of the activation, or absent.

    Args:
        spec: What to quantize to.
        layout: Which elements share a step.
        of: ``"weights"`` or ``"activations"``.
    """

    def __init__(self, spec: QuantSpec, layout: Layout, of: Of) -> None:
        super().__init__(spec, layout, of)
        self.step = nn.Parameter(torch.ones(layout.size))
        self.has_offset = of == "activations" and not spec.symmetric
        if self.has_offset:
            self.offset = nn.Parameter(torch.zeros(layout.size))
        if of == "activations":
            self._observe()
        if self.signed and self.levels[1] == 0:
            raise ValueError(
                f"{spec.bits} bit with a sign has no positive code to learn a step for; use 2 bits or more"
            )

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See `Quantizer.fake_quantize`."""
        rows = self.layout.rows(x)
        step = self.layout.spread(self.step, rows)
        factor, two = self._gradient_scale(x), self.spec.power_of_two
        if self.has_offset:
            return learned.lsq_plus(x, step, self.offset, *self.levels, factor, two)
        return self.layout.back(learned.lsq(rows, step, *self.levels, factor, two), x)

    def _gradient_scale(self, x: Tensor) -> float | None:
        """For activations N is the number of features of one sample: no batch size or number of ranks matters."""
        if self.of == "weights" or x.dim() < 2:
            return None
        return float((math.prod(x.shape[1:]) * self.levels[1]) ** -0.5)

    def scale_zero_point(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Quantizer.scale_zero_point`; needs no tensor."""
        scale = learned.step_scale(self.step.detach(), self.spec.power_of_two)
        if not self.has_offset:
            return scale, torch.zeros_like(scale)
        return scale, learned.offset_zero_point(self.offset.detach(), scale, *self.levels)

    def initial(self, x: Tensor | None = None) -> dict[str, Tensor]:
        """The papers' beginnings.

        LSQ: ``2 * mean|x| / sqrt(qmax)`` (section 2.1). LSQ+ weights: ``max|mean +- 3 std| / 2 ** (bits - 1)``
        (equation 8); LSQ+ activations: the observed range (the paper minimizes the squared error: ``observer="mse"``).
        """
        if self.of == "activations":
            return self._from_observer()
        if x is None:
            raise CompressionError("the step of a weight begins with the weight, and none was given")
        rows = self.layout.rows(x.detach().float())
        dims = self.layout.dims(rows) or tuple(range(rows.dim()))
        if self.spec.method == "lsq":
            step = 2 * rows.abs().mean(dims) / math.sqrt(self.levels[1])
        else:
            mean, spread = rows.mean(dims), 3 * rows.std(dims, correction=0)
            step = (mean.abs() + spread) / 2 ** (self.spec.bits - 1)  # the larger of |mean - 3 std| and |mean + 3 std|
        return {"step": step.reshape(self.layout.now).clamp(min=qf.SMALLEST_SCALE)}

    def _from_observer(self) -> dict[str, Tensor]:
        lo, hi = self._observed()
        ends = self._ends(lo, hi)
        if self.signed and self.levels[1] == 0:
            raise CompressionError(
                f"an activation is negative in places, and {self.spec.bits} bit with a sign has no positive code; use "
                "2 bits or more, or symmetric=False"
            )
        if self.has_offset:
            scale, zero_point = qf.affine_qparams(ends["lo"], ends["hi"], *self.levels)
            return {**ends, "step": scale, "offset": -zero_point * scale}
        mean = None if self.observer is None else self.observer.mean_size()
        if self.spec.method == "lsq" and mean is not None:
            step = torch.full_like(lo, 2 * mean / math.sqrt(self.levels[1]))
        else:
            step = qf.symmetric_qparams(ends["lo"], ends["hi"], *self.levels)
        return {**ends, "step": step.clamp(min=qf.SMALLEST_SCALE)}


class PactQuantizer(Quantizer):
    """A learned clipping value (PACT, Choi et al., 2018); symmetric around zero for signed activations.

    Attributes:
        alpha: Learned clipping value, of the layout's size.

    Args:
        spec: What to quantize to.
        layout: Which elements share a clipping value.
        of: ``"activations"``.
    """

    def __init__(self, spec: QuantSpec, layout: Layout, of: Of) -> None:
        super().__init__(spec, layout, of)
        self.alpha = nn.Parameter(torch.ones(layout.size))
        self._observe()

    def _levels(self, signed: bool) -> tuple[int, int]:
        top = self.spec.levels(signed)[1]
        return (-top if signed else 0), top  # -alpha and alpha are both codes

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See `Quantizer.fake_quantize`."""
        return learned.pact(x, self.alpha, *self.levels, power_of_two=self.spec.power_of_two)

    def scale_zero_point(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Quantizer.scale_zero_point`; needs no tensor."""
        scale = learned.step_scale(self.alpha.detach().float() / self.levels[1], self.spec.power_of_two)
        return scale, torch.zeros_like(scale)

    def initial(self, x: Tensor | None = None) -> dict[str, Tensor]:
        """The clipping value begins at the end of the observed range."""
        lo, hi = self._observed()
        ends = self._ends(lo, hi)
        if self.levels[1] == 0:
            raise CompressionError(
                "an activation is negative in places, and 1 bit has no room for a sign; use 2 or more"
            )
        size = torch.maximum(ends["hi"], -ends["lo"]) if self.signed else ends["hi"]
        return {**ends, "alpha": size.clamp(min=qf.SMALLEST_SCALE * self.levels[1])}


class DorefaQuantizer(Quantizer):
    """DoReFa-Net (Zhou et al., 2016): weights in [-1, 1], activations clipped to [0, 1].

    Args:
        spec: What to quantize to; one scale for the whole tensor.
        layout: Not used: the paper has one range for a layer.
        of: ``"weights"`` or ``"activations"``.
    """

    def __init__(self, spec: QuantSpec, layout: Layout, of: Of) -> None:
        super().__init__(spec, Layout(), of)
        self.signed = of == "weights"

    def _levels(self, signed: bool) -> tuple[int, int]:
        top = 2**self.spec.bits - 1
        return (-top if signed else 0), top  # of weights only odd integers, and the 0 of a masked one

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See `Quantizer.fake_quantize`."""
        return (lowbit.dorefa_weight if self.of == "weights" else lowbit.dorefa_activation)(x, self.spec.bits)

    def scale_zero_point(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Quantizer.scale_zero_point`; one bit needs the weight."""
        if self.of == "weights" and self.spec.bits == 8:
            raise CompressionError(
                "DoReFa weights of 8 bits are odd integers up to 255, which int8 does not hold; use 7"
            )
        if self.of == "weights" and self.spec.bits == 1:
            if x is None:
                raise CompressionError("the scale of a binary weight follows the weight, and none was given")
            scale = lowbit.binary_scale(x.detach(), None)
        else:
            device = None if x is None else x.device
            scale = torch.full((1,), 1 / self.levels[1], device=device)
        return scale, torch.zeros_like(scale)

    def integers(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Quantizer.integers`."""
        if self.of == "activations":
            return super().integers(x)
        scale, zero_point = self.scale_zero_point(x)
        x = x.detach()
        codes = x.sign() if self.spec.bits == 1 else lowbit.dorefa_codes(x, self.spec.bits)
        return codes.to(torch.int8), scale, zero_point.long()


class CodeQuantizer(Quantizer):
    """Binary (XNOR-Net, Rastegari et al., 2016) and ternary (TWN, Li et al., 2016) weights.

    Args:
        spec: What to quantize to.
        layout: Which elements share a scale.
        of: ``"weights"``.
    """

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See `Quantizer.fake_quantize`."""
        rows = self.layout.rows(x)
        function = lowbit.binary_weight if self.spec.method == "binary" else lowbit.ternary_weight
        return self.layout.back(function(rows, self.layout.dims(rows)), x)

    def scale_zero_point(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Quantizer.scale_zero_point`."""
        if x is None:
            raise CompressionError("the scale of a binary or ternary weight follows the weight, and none was given")
        scale = self._codes(x)[1]
        return scale, torch.zeros_like(scale)

    def integers(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Quantizer.integers`."""
        codes, scale = self._codes(x)
        return codes, scale, torch.zeros_like(scale, dtype=torch.int64)

    def _codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.layout.rows(x.detach())
        dims = self.layout.dims(rows)
        if self.spec.method == "binary":
            codes, scale = rows.sign(), lowbit.binary_scale(rows, dims)
        else:
            codes, scale = lowbit.ternary_codes(rows, dims)
        return self.layout.back(codes, x).to(torch.int8), scale.reshape(self.layout.now)


class Float8Quantizer(RangeQuantizer):
    """8-bit floating point with a scale that maps the range onto that of the format (Micikevicius et al., 2022).

    Args:
        spec: What to quantize to.
        layout: Which elements share a scale.
        of: ``"weights"`` or ``"activations"``.
    """

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See `Quantizer.fake_quantize`."""
        rows = self.layout.rows(x)
        return self.layout.back(lowbit.float8(rows, self.layout.spread(self._scale(x), rows), self.spec.method), x)

    def scale_zero_point(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Refused: floats have no integer grid."""
        return Quantizer.scale_zero_point(self, x)

    def integers(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Refused: floats have no integer grid."""
        raise CompressionError("8-bit floats have no integer grid; export them as floats, or use bits=8 integers")

    def _scale(self, x: Tensor | None) -> Tensor:
        lo, hi = self._range(x)
        size = torch.maximum(hi, -lo).float() / lowbit.FLOAT8_MAX[self.spec.method]
        size = size.clamp(min=qf.SMALLEST_SCALE)
        return qf.power_of_two_scale(size) if self.spec.power_of_two else size


KINDS: dict[str, type[Quantizer]] = {
    "lsq": StepQuantizer,
    "lsq+": StepQuantizer,
    "pact": PactQuantizer,
    "dorefa": DorefaQuantizer,
    "binary": CodeQuantizer,
    "ternary": CodeQuantizer,
    "fp8_e4m3": Float8Quantizer,
    "fp8_e5m2": Float8Quantizer,
}
