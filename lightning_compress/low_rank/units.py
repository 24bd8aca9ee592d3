"""The weights of a model that can be factored, and why others cannot."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_compress import recurrent, replacing
from lightning_compress.low_rank.attention import LowRankMultiheadAttention, projection_weights
from lightning_compress.low_rank.building import dense_shape
from lightning_compress.low_rank.factorization import METHODS, Method, Shape
from lightning_compress.low_rank.modules import Factored
from lightning_compress.low_rank.recurrent import LowRankRecurrent
from lightning_compress.targets import Pattern, first_and_last, get_submodule_clean, named_modules_clean, select
from lightning_compress.targets import wrapped_module as wrapped_module

ConvMethod = Literal["channel", "spatial", "tucker", "cp"]
CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED: tuple[type[nn.Module], ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
COMPOSITES: tuple[type[nn.Module], ...] = (LowRankMultiheadAttention, LowRankRecurrent)
KINDS: tuple[type[nn.Module], ...] = (
    nn.Linear, *CONVOLUTIONS, *_TRANSPOSED, nn.Embedding, nn.MultiheadAttention, nn.LSTM, nn.GRU, nn.RNN,
)  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """One weight that can be factored.

    Args:
        layer: Clean name of the layer.
        part: Which of its weights: ``"weight"``, ``"q"`` or ``"weight_ih_l0"``, for example.
        method: Name of the method.
        shape: Shape of the dense weight.
        groups: Groups of the convolution, or gates.
    """

    layer: str
    part: str
    method: str
    shape: Shape
    groups: int = 1

    @property
    def name(self) -> str:
        """Layer and part."""
        return self.layer if self.part == "weight" else f"{self.layer}.{self.part}"

    @property
    def algebra(self) -> Method:
        """The method itself."""
        return METHODS[self.method]

    @property
    def full(self) -> tuple[int, ...]:
        """Ranks at which nothing is lost."""
        return self.algebra.full(self.shape, self.groups)


def find_units(
    root: nn.Module,
    targets: Sequence[Pattern] | Pattern = ("*",),
    exclude: Sequence[Pattern] | Pattern = (),
    method: ConvMethod = "channel",
    keep_first_last: bool = True,
    ran: Collection[str] | None = None,
) -> tuple[list[Unit], dict[str, str]]:
    """The weights to factor, in order, and for the layers that are kept the reason.

    Args:
        root: The possibly wrapped model.
        targets: Name patterns or types.
        exclude: Name patterns or types to leave out.
        method: For convolutions with a kernel; where it does not fit, ``"channel"`` is used.
        keep_first_last: Whether the first and the last layer of the model stay dense.
        ran: Clean names of modules in the order in which an example call ran them, if known.

    Raises:
        CompressionError: If a pattern matches nothing, or nothing is left.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
        >>> units, kept = find_units(net)
        >>> [unit.name for unit in units], kept["0"]
        (['1'], 'it is the first layer')
    """
    inside = _inside(root)
    chosen = {n: m for n, m in select(root, targets, exclude, kinds=KINDS).items() if n not in inside}
    kept: dict[str, str] = {}
    if keep_first_last:
        every = [name for name in select(root, kinds=KINDS) if name not in inside]
        first, *last = first_and_last([n for n in ran if n in every] if ran is not None else every) or ("", "")
        kept |= {first: "it is the first layer", **{name: "it is the last layer" for name in last}}
    kept = {name: reason for name, reason in kept.items() if name in chosen}
    kept |= _of_other_kinds(root, targets, exclude, inside)
    units: list[Unit] = []
    uses = replacing.uses(root)
    for name, module in chosen.items():
        reason = kept.get(name) or why_not(root, name, module, uses)
        if reason is None:
            units += units_of(name, module, method)
        else:
            kept[name] = reason
    return units, kept


def _of_other_kinds(
    root: nn.Module, targets: Sequence[Pattern] | Pattern, exclude: Sequence[Pattern] | Pattern, inside: Collection[str]
) -> dict[str, str]:
    """Why layers stay dense that have a weight, and are none of the kinds known here."""
    matched = select(root, targets, exclude, kinds=(nn.Module,))
    found = {}
    for name, module in matched.items():
        weight = module._parameters.get("weight")
        known = isinstance(module, KINDS) or name in inside or weight is None or is_lazy(weight)
        if not known and weight is not None and weight.dim() > 1:
            found[name] = f"it is a {type(module).__name__}, and what that computes is not known here"
    return found


def units_of(name: str, module: nn.Module, method: ConvMethod = "channel") -> list[Unit]:
    """The weights of one dense layer."""
    if isinstance(module, nn.MultiheadAttention):
        into = {"q": module.embed_dim, "k": module.kdim, "v": module.vdim, "out": module.embed_dim}
        return [Unit(name, part, "svd", (module.embed_dim, width)) for part, width in into.items()]
    if isinstance(module, nn.RNNBase):
        gates = recurrent.gates(module)
        slots = [slot for slot in recurrent.weight_slots(module) if not slot.startswith("weight_hr")]
        return [Unit(name, slot, "gates", tuple(getattr(module, slot).shape), gates) for slot in slots]
    shape = dense_shape(module)
    if isinstance(module, nn.Embedding):
        return [Unit(name, "weight", "embedding", shape)]
    if isinstance(module, nn.Linear):
        return [Unit(name, "weight", "svd", shape)]
    groups = int(module.groups)  # type: ignore[arg-type]
    fits = {"channel": True, "tucker": True, "spatial": len(shape) == 4, "cp": len(shape) == 4 and groups == 1}
    pointwise = all(size == 1 for size in shape[2:])
    return [Unit(name, "weight", method if fits[method] and not pointwise else "channel", shape, groups)]


def factored_parts(root: nn.Module) -> dict[str, dict[str, tuple[str, Factored]]]:
    """The factored weights that a model has: by layer and part the clean name and the module of the factors."""
    found: dict[str, dict[str, tuple[str, Factored]]] = {}
    for name, module in named_modules_clean(root):
        if isinstance(module, COMPOSITES):
            parts = {n: (f"{name}.{n}", m) for n, m in module._modules.items() if isinstance(m, Factored)}
            found[name] = parts
    within = {full for parts in found.values() for full, _ in parts.values()}
    for name, module in named_modules_clean(root):
        if isinstance(module, Factored) and name not in within:
            found[name] = {"weight": (name, module)}
    return {name: parts for name, parts in found.items() if parts}


def unit_of(layer: str, part: str, module: Factored) -> Unit:
    """The unit that a factored weight stands for."""
    return Unit(layer, part, module.method_name, module.shape, module.groups)


def weight_of(root: nn.Module, unit: Unit, whole: Mapping[str, Tensor] | None = None) -> Tensor:
    """The dense weight of a unit, whether its layer is dense or factored.

    Args:
        root: The model.
        unit: The unit.
        whole: Parameters by clean name, where the model itself holds only parts of them.
    """
    module = get_submodule_clean(root, unit.layer)
    parts = factored_parts_of(unit.layer, module)
    named: Any = _Stored(root) if whole is None else whole
    if unit.part in parts:
        prefix, factored = parts[unit.part]
        weights = [named[f"{prefix}.{index}.weight"].detach() for index in range(len(factored))]
        factors = unit.algebra.from_weights(weights, unit.shape, unit.groups)
        return unit.algebra.merge(factors, unit.shape, unit.groups)
    if isinstance(module, nn.MultiheadAttention):
        own = {name: named[f"{unit.layer}.{name}"] for name, _ in module.named_parameters()}
        return projection_weights(module, own)[unit.part].detach()
    weight: Tensor = named[f"{unit.layer}.{unit.part}" if unit.layer else unit.part]
    return weight.detach()


def factored_parts_of(name: str, module: nn.Module) -> dict[str, tuple[str, Factored]]:
    """As `factored_parts`, of one layer."""
    if isinstance(module, Factored):
        return {"weight": (name, module)}
    if isinstance(module, COMPOSITES):
        return {n: (f"{name}.{n}", m) for n, m in module._modules.items() if isinstance(m, Factored)}
    return {}


class _Stored:
    """Parameters of a model by clean name."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root

    def __getitem__(self, name: str) -> Tensor:
        owner, _, attribute = name.rpartition(".")
        value: Tensor = getattr(get_submodule_clean(self.root, owner), attribute)
        return value


def _inside(root: nn.Module) -> set[str]:
    """Layers that are parts of others: small layers, and the output projection of attention."""
    found: set[str] = set()
    for name, module in named_modules_clean(root):
        if isinstance(module, (Factored, *COMPOSITES, nn.MultiheadAttention)):
            found |= {f"{name}.{n}" if name else n for n, _ in named_modules_clean(module) if n}
    return found


def why_not(root: nn.Module, name: str, module: nn.Module, uses: Mapping[int, int]) -> str | None:
    """Why a layer cannot be factored; ``None`` if it can."""
    if not name:
        return "it is the model itself, and nothing holds it that could hold its factors"
    if isinstance(module, _TRANSPOSED):
        return "transposed convolutions have no factored form here"
    weights: Sequence[str] = ("weight",)
    if isinstance(module, nn.RNNBase):
        weights = recurrent.weight_slots(module)
    elif isinstance(module, nn.MultiheadAttention):
        weights = ()
    return replacing.why_not(root, name, module, KINDS, uses, weights) or _why_not_kind(module)


def _why_not_kind(module: nn.Module) -> str | None:
    groups = int(getattr(module, "groups", 1))
    if isinstance(module, CONVOLUTIONS) and groups > 1 and module.in_channels == groups:
        return "it is a depthwise convolution, which has nothing to factor"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm bounds rows that a factored embedding does not have"
    return None
