"""What quantization really gains where: which schemes run as integers in which runtime, and how fast that was measured.

Plain data, so that a promise can be checked before hours are spent on it. The numbers are times faster than the same
runtime in float32, measured on an x86 CPU with VNNI (AMD EPYC, 2 threads, torch 2.14.1, onnxruntime 1.32, openvino
2026.4): convolutions on ResNet-18 with 8 images of 128 x 128; linear layers on a transformer encoder of 4 layers
(width 512, 4 sequences of 64); recurrent layers on a 2-layer LSTM (256 to 512, 1 sequence of 64).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_compress.errors import CompressionError
from lightning_compress.quantization.bits.choices import Choice
from lightning_compress.quantization.spec import QuantSpec

Runtime = Literal["inductor", "aoti", "onnxruntime", "openvino", "reference"]
Kind = Literal["conv", "linear", "recurrent", "embedding"]
Scheme = Literal["float", "int8_static", "int8_dynamic", "weight_only", "below_8_bits", "simulated"]
Goal = Literal["latency", "bytes", "bops"]


@dataclass(frozen=True)
class Gain:
    """What a scheme gains in a runtime.

    Args:
        faster: Whether latency falls.
        ratio: Times faster than float32 in the same runtime, where it was measured.
        note: Why, or under which condition.
    """

    faster: bool
    ratio: float | None = None
    note: str = ""


_FLOAT = Gain(False, 1.0, "nothing is quantized")
_STATIC = {
    ("inductor", "conv"): Gain(True, 3.33, "needs freezing and torchao's passes"),
    ("inductor", "linear"): Gain(True, 3.38, "needs freezing and torchao's passes"),
    ("aoti", "conv"): Gain(True, None, "the same kernels as inductor; needs freezing"),
    ("aoti", "linear"): Gain(True, None, "the same kernels as inductor; needs freezing"),
    ("onnxruntime", "conv"): Gain(True, 2.47, "with outputs quantized as well; inputs only: 1.1"),
    ("onnxruntime", "linear"): Gain(True, 1.56, "with outputs quantized as well; inputs only: 0.54"),
    ("openvino", "conv"): Gain(True, 2.56),
    ("openvino", "linear"): Gain(True, 2.97),
}
_DYNAMIC = {
    ("inductor", "linear"): Gain(True, 2.78, "torchao's kernels"),
    ("onnxruntime", "linear"): Gain(True, 1.74),
    ("onnxruntime", "recurrent"): Gain(False, 0.87, "DynamicQuantizeLSTM, noisy; 1.33 against PyTorch in float32"),
}
_UNMEASURED = Gain(False, None, "not measured, so nothing is promised")
_WEIGHT_ONLY = Gain(False, None, "weights are expanded to floating point before they are used")
_WEIGHT_ONLY_MEASURED = Gain(False, 0.97, _WEIGHT_ONLY.note)
_BELOW = "integers of fewer than 8 bits are stored and computed as int8: no faster, and no smaller in memory, than int8"
_SIMULATED = Gain(False, None, "computed in floating point; rounded for the accuracy only")
_REFERENCE = Gain(False, None, "shows what integers compute, not how fast")


def scheme_of(choice: Choice) -> Scheme:
    """How a choice is executed on an x86 CPU.

    Args:
        choice: What a layer gets.

    Example:
        >>> scheme_of(Choice(QuantSpec(granularity="channel"), None))
        'weight_only'
    """
    weight, entering = choice.weight, choice.input
    if weight is None:
        return "float" if entering is None else "simulated"
    if any(spec is not None and not _is_integer(spec) for spec in (weight, entering)):
        return "simulated"
    if entering is None:
        return "weight_only"
    if min(choice.bits) < 8:
        return "below_8_bits"
    return "int8_dynamic" if entering.dynamic else "int8_static"


def _is_integer(spec: QuantSpec) -> bool:
    return spec.method in ("range", "lsq", "lsq+", "pact")


def gain(choice: Choice, runtime: Runtime, kind: Kind) -> Gain:
    """What a choice gains for layers of a kind in a runtime.

    Args:
        choice: What a layer gets.
        runtime: Where it runs.
        kind: Of layer.

    Raises:
        ValueError: If the runtime or the kind is not known.

    Example:
        >>> from lightning_compress.quantization.bits.choices import choices
        >>> options = choices(["int8", "int4"], ["int8"])
        >>> gain(options["int8/int8"], "openvino", "conv").ratio
        2.56
        >>> gain(options["int4/int8"], "openvino", "conv").ratio is None
        True
    """
    if runtime not in get_args(Runtime):
        raise ValueError(f"runtime is one of {get_args(Runtime)}; got {runtime!r}")
    if kind not in get_args(Kind):
        raise ValueError(f"kind is one of {get_args(Kind)}; got {kind!r}")
    scheme = scheme_of(choice)
    if scheme == "float":
        return _FLOAT
    if scheme == "simulated":
        return _SIMULATED
    if runtime == "reference":
        return _REFERENCE
    if scheme == "weight_only" or kind == "embedding":
        return _WEIGHT_ONLY_MEASURED if (runtime, kind) == ("inductor", "linear") else _WEIGHT_ONLY
    if scheme == "int8_dynamic":
        return _DYNAMIC.get((runtime, kind), _UNMEASURED)
    static = _STATIC.get((runtime, kind), _UNMEASURED)
    if scheme == "below_8_bits" and static.faster:
        return Gain(True, None, _BELOW)
    return static


def check_promise(
    goal: Goal, options: Mapping[str, Choice], runtime: Runtime, kind: Kind = "conv", strict: bool = True
) -> list[str]:
    """Say which choices cannot do for a goal what their number of bits suggests.

    Args:
        goal: What the budget is about: seconds, bytes, or bit operations.
        options: The choices by name.
        runtime: Where the model will run.
        kind: Of the layers that matter most.
        strict: Whether a goal of latency raises; otherwise it warns.

    Returns:
        The reservations, one a line; empty if every choice keeps its promise.

    Raises:
        CompressionError: With `strict` and ``goal="latency"``, if there is any.
        ValueError: If the goal, the runtime or the kind is not known.

    Example:
        >>> from lightning_compress.quantization.bits.choices import choices
        >>> check_promise("latency", choices(["int8"], ["int8"]) | choices([None]), "openvino")
        []
    """
    if goal not in get_args(Goal):
        raise ValueError(f"goal is one of {get_args(Goal)}; got {goal!r}")
    found = [f"{name}: {why}" for name, choice in options.items() if (why := _reservation(goal, choice, runtime, kind))]
    if not found:
        return []
    text = "; ".join(found)
    if goal == "latency" and strict:
        raise CompressionError(
            f"a goal of latency in {runtime} cannot use these choices: {text}. Offer int8 for weights and activations, "
            "and floating point; for fewer bits set a budget of bytes or bops"
        )
    warnings.warn(f"{goal} in {runtime}: {text}", stacklevel=2)
    return found


def _reservation(goal: Goal, choice: Choice, runtime: Runtime, kind: Kind) -> str:
    scheme, found = scheme_of(choice), gain(choice, runtime, kind)
    if scheme == "float":
        return ""
    if goal == "latency":
        return found.note if scheme == "below_8_bits" or not found.faster else ""
    if goal == "bytes":
        fewer = choice.weight is not None and choice.weight.bits < 8
        return "smaller than int8 in a packed file only; every runtime here keeps int8 in memory" if fewer else ""
    return (
        "" if scheme in ("int8_static", "int8_dynamic") else "bit operations are a model of hardware that is not here"
    )


_COLUMNS: tuple[Runtime, ...] = ("inductor", "onnxruntime", "openvino")
_ROWS: tuple[tuple[str, Choice, Kind], ...] = (
    ("int8 static, convolutions", Choice(QuantSpec(), QuantSpec()), "conv"),
    ("int8 static, linear", Choice(QuantSpec(), QuantSpec()), "linear"),
    ("int8 dynamic, linear", Choice(QuantSpec(), QuantSpec(granularity="token", dynamic=True)), "linear"),
    ("int8 dynamic, recurrent", Choice(QuantSpec(), QuantSpec(granularity="token", dynamic=True)), "recurrent"),
    ("int8 weights only", Choice(QuantSpec(), None), "linear"),
    ("7 to 2 bits, weights or activations", Choice(QuantSpec(bits=4), QuantSpec()), "conv"),
    ("fp8, binary, ternary, multi-bit codes", Choice(QuantSpec(method="fp8_e4m3"), None), "linear"),
)


def markdown() -> str:
    """The table for the documentation: times faster than float32 in the same runtime, and the conditions.

    Example:
        >>> print(markdown().splitlines()[0])
        | | inductor | onnxruntime | openvino |
    """
    lines = [f"| | {' | '.join(_COLUMNS)} |", "|---|" + "---|" * len(_COLUMNS)]
    notes: list[str] = []
    for label, choice, kind in _ROWS:
        cells = [_cell(choice, gain(choice, runtime, kind), notes) for runtime in _COLUMNS]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {note}" for number, note in enumerate(notes, start=1))])


def _cell(choice: Choice, found: Gain, notes: list[str]) -> str:
    if scheme_of(choice) == "below_8_bits":
        text = "as int8"
    elif found.ratio is not None:
        text = f"{found.ratio:.2f}"
    else:
        text = "faster, not measured" if found.faster else "no gain"
    if not found.note:
        return text
    if found.note not in notes:
        notes.append(found.note)
    return f"{text} ({notes.index(found.note) + 1})"
