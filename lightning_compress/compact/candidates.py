"""The convolutions that a block can take the place of, why others stay, and what an example call shows of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_compress import replacing
from lightning_compress.compact.blocks import CompactBlock
from lightning_compress.targets import Pattern, first_and_last, get_submodule_clean, named_modules_clean, select

LAYERS: tuple[type[nn.Module], ...] = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear,
)  # fmt: skip
ELEMENTS = 2**23  # of recorded inputs for each layer; what would be more is left out


def find(
    root: nn.Module,
    targets: Sequence[Pattern] | Pattern = ("*",),
    exclude: Sequence[Pattern] | Pattern = (),
    keep_first_last: bool = True,
    ran: Collection[str] | None = None,
) -> tuple[dict[str, nn.Conv2d], dict[str, str]]:
    """Dense convolutions with a kernel, in order, and for those that are kept the reason.

    Args:
        root: The possibly wrapped model.
        targets: Name patterns or types.
        exclude: Name patterns or types to leave out.
        keep_first_last: Whether the first and the last layer of the model stay.
        ran: Clean names of layers in the order in which a call ran them, if known.

    Raises:
        CompressionError: If a pattern matches nothing, or nothing is left.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 2))
        >>> found, kept = find(net)
        >>> list(found), kept
        (['1'], {'0': 'it is the first layer', '2': 'it is 1 x 1, so there is no kernel to take apart'})
    """
    inside = {
        f"{name}.{inner}" if name else inner
        for name, module in named_modules_clean(root) if isinstance(module, CompactBlock)
        for inner, _ in named_modules_clean(module)
    }  # fmt: skip
    chosen = select(root, targets, exclude, kinds=(nn.Conv2d,))
    kept: dict[str, str] = {name: "it is part of a compact block already" for name in chosen if name in inside}
    if keep_first_last:
        every = [name for name in select(root, kinds=LAYERS) if name not in inside]
        first, *last = first_and_last([n for n in ran if n in every] if ran else every) or ("", "")
        ends = {first: "it is the first layer", **{name: "it is the last layer" for name in last}}
        kept |= {name: reason for name, reason in ends.items() if name in chosen}
    used = replacing.uses(root)
    found: dict[str, nn.Conv2d] = {}
    for name, module in chosen.items():
        reason = kept.get(name) or _why_not(root, name, module, used)
        if reason is None and ran is not None and name not in ran:
            reason = "the example call never ran it"
        if reason is None:
            found[name] = module  # type: ignore[assignment]
        else:
            kept[name] = reason
    return found, {name: kept[name] for name in chosen if name in kept}


def _why_not(root: nn.Module, name: str, module: Any, used: Mapping[int, int]) -> str | None:
    if not name:
        return "it is the model itself, and nothing holds it that could hold a block"
    reason = replacing.why_not(root, name, module, (nn.Conv2d,), used)
    if reason is not None:
        return reason
    if module.groups > 1:
        return "it has groups, so it is no dense convolution"
    if all(size == 1 for size in module.kernel_size):
        return "it is 1 x 1, so there is no kernel to take apart"
    return None


# ------------------------------------------------------------------------------------------------------- what it gets
@dataclass
class Recorded:
    """What calls of a model showed of its layers.

    Attributes:
        order: Clean names of all layers that ran, in order.
        inputs: Of the layers of interest, batches (N, C, H, W).
        positions: Of their input and output, added up over the first call.
        cut: Layers of which some inputs were left out, to save memory.
    """

    order: list[str] = field(default_factory=list)
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    positions: dict[str, tuple[int, int]] = field(default_factory=dict)
    cut: set[str] = field(default_factory=set)

    @contextmanager
    def watching(self, root: nn.Module, layers: Collection[str], keep: bool = True) -> Iterator[None]:
        """Look at the calls inside the block.

        Args:
            root: The possibly wrapped model.
            layers: Clean names of the layers of interest.
            keep: Whether to keep their inputs.
        """
        every = {name for name, module in named_modules_clean(root) if isinstance(module, LAYERS)}
        with ExitStack() as hooks:
            for name in sorted(every | set(layers)):
                module = get_submodule_clean(root, name)
                hooks.callback(module.register_forward_hook(self._hook(name, name in layers, keep)).remove)
            yield

    def _hook(self, name: str, wanted: bool, keep: bool) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if name not in self.order:
                self.order.append(name)
            if not wanted or not args or not isinstance(args[0], Tensor):
                return
            x = args[0].detach()
            x = x if x.dim() == 4 else x[None]
            self.positions.setdefault(name, (x[:, 0].numel(), output.numel() // max(1, int(output.shape[-3]))))
            if keep:
                self._keep(name, x)

        return hook

    def _keep(self, name: str, x: Tensor) -> None:
        have = self.inputs.setdefault(name, [])
        room = ELEMENTS - sum(batch.numel() for batch in have)
        count = min(len(x), max(room // max(1, x[0].numel()), 0 if have else 1))
        if count < len(x):
            self.cut.add(name)
        if count:
            have.append(x[:count].clone())
