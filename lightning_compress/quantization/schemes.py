"""Named schemes of the literature: what weights and activations become, and which steps of the toolbox go before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_compress.quantization.plan import FirstLast, resolve
from lightning_compress.quantization.spec import PRESETS, QuantSpec, parse

STEPS = ("equalization", "smoothing", "gptq", "adaround", "batch_norm", "bias_correction")
"""Steps of the toolbox, in the order in which they are done."""

_ACTIVATIONS = QuantSpec(symmetric=False, observer="mse")
_WEIGHTS = QuantSpec(granularity="tensor", observer="mse", narrow=True)
_CHANNELS = QuantSpec(granularity="channel", observer="mse", narrow=True)


@dataclass(frozen=True)
class Scheme:
    """What the layers of a model become, and the steps that go before.

    Args:
        weights: For all weights.
        activations: For all inputs of layers.
        first_last: What the first and the last layer get instead: `"same"`, `"int8"` or `"float"`.
        steps: Steps of the toolbox, of `STEPS`.
        plan: `{pattern: choice}` for single layers.
    """

    weights: QuantSpec | None
    activations: QuantSpec | None
    first_last: FirstLast = "same"
    steps: tuple[str, ...] = ()
    plan: Mapping[str, Any] = field(default_factory=dict)

    def layers(
        self, model: nn.Module, targets: Sequence[Any] = ("*",), exclude: Sequence[Any] = ()
    ) -> dict[str, dict[str, QuantSpec]]:
        """What each layer of a model gets.

        Args:
            model: The model.
            targets: Name patterns or types of layers.
            exclude: Name patterns or types to leave out.

        Returns:
            `{layer name: {slot: spec}}`.

        Raises:
            CompressionError: If a pattern matches nothing, or nothing is left.

        Example:
            >>> net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
            >>> SCHEMES["nagel_w4a8_adaround"].layers(net)["1"]["weight"].bits
            4
        """
        return resolve(model, self.weights, self.activations, self.plan, self.first_last, targets, exclude)


def _preset(name: str) -> Scheme:
    preset = PRESETS[name]
    return Scheme(parse(preset.weights, "weights"), parse(preset.activations, "activations"), preset.first_last)


SCHEMES: dict[str, Scheme] = {
    **{name: _preset(name) for name in PRESETS},
    # Krishnamoorthi: Quantizing deep convolutional networks for efficient inference (2018), section 3: weights affine
    # for each channel, activations affine for each tensor, ranges from minimum and maximum.
    "krishnamoorthi_asymmetric_per_channel": Scheme(
        QuantSpec(symmetric=False, granularity="channel", observer="minmax"),
        QuantSpec(symmetric=False, observer="ema"),
    ),
    # Nagel et al.: A White Paper on Neural Network Quantization (2021), section 3.7, the pipeline for 8 bits:
    # equalization, symmetric weights and affine activations, both with MSE ranges, bias correction.
    "nagel_w8a8_per_tensor": Scheme(_WEIGHTS, _ACTIVATIONS, steps=("equalization", "bias_correction")),
    # The same with one scale for each output channel.
    "nagel_w8a8_per_channel": Scheme(_CHANNELS, _ACTIVATIONS, steps=("equalization", "bias_correction")),
    # The same for 4-bit weights, where AdaRound takes the place of bias correction.
    "nagel_w4a8_adaround": Scheme(
        QuantSpec(bits=4, granularity="channel", observer="mse", narrow=True),
        _ACTIVATIONS,
        "int8",
        steps=("equalization", "adaround"),
    ),
}
"""Presets, and `krishnamoorthi_asymmetric_per_channel`, `nagel_w8a8_per_tensor`, `nagel_w8a8_per_channel`,
`nagel_w4a8_adaround`."""


def read_scheme(value: str | Scheme | Mapping[str, Any]) -> Scheme:
    """What a user wrote for a scheme.

    Args:
        value: A name, a `Scheme`, or a plan `{pattern: choice}` for the layers that it matches.

    Raises:
        ValueError: If the name is unknown or a step is.
        TypeError: If it is something else.

    Example:
        >>> read_scheme("nagel_w8a8_per_tensor").steps
        ('equalization', 'bias_correction')
    """
    if isinstance(value, str):
        if value not in SCHEMES:
            raise ValueError(f"scheme={value!r} is not known; use a plan, a Scheme, or one of {', '.join(SCHEMES)}")
        return SCHEMES[value]
    if isinstance(value, Mapping):
        return Scheme(None, None, plan=dict(value))
    if not isinstance(value, Scheme):
        raise TypeError(f"scheme is a name, a plan or a Scheme; got {value!r:.80}")
    return value


def ordered(steps: Sequence[str]) -> tuple[str, ...]:
    """Steps in the order in which they are done.

    Raises:
        ValueError: If one is unknown.

    Example:
        >>> ordered(("bias_correction", "equalization"))
        ('equalization', 'bias_correction')
    """
    listed = (steps,) if isinstance(steps, str) else tuple(steps)
    for step in listed:
        if step not in STEPS:
            raise ValueError(f"{step!r} is no step; steps are {', '.join(STEPS)}")
    return tuple(step for step in STEPS if step in listed)
