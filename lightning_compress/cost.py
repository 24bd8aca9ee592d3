"""What a model costs: parameters, non-zeros, multiply-accumulates, stored bytes, latency, live memory.

Nothing here changes the model: modes, buffers, gradients and random generators are as they were afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_compress._macs import Call as Call
from lightning_compress._macs import MacsReport as MacsReport
from lightning_compress._macs import Runnable as Runnable
from lightning_compress._macs import count_macs as count_macs
from lightning_compress._running import Latency as Latency
from lightning_compress._running import LatencyRatio as LatencyRatio
from lightning_compress._running import LiveBytes as LiveBytes
from lightning_compress._running import latency as latency
from lightning_compress._running import latency_ratio as latency_ratio
from lightning_compress.ranks import Ranks
from lightning_compress.targets import clean_name


def _own(name: str) -> bool:
    """Whether the tensor belongs to the user's model; `_lc_*` helpers (projectors, taps) are not shipped."""
    return not any(part.startswith("_lc_") for part in name.split("."))


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((clean_name(name, model), p) for name, p in model.named_parameters() if _own(name))


def _local(tensor: Tensor) -> Tensor:
    to_local = getattr(tensor, "to_local", None)  # a DTensor: count the part that lives here
    return tensor.detach() if to_local is None else to_local().detach()


def _nonzeros(tensors: Sequence[Tensor], ranks: Ranks) -> int:
    whole, sharded = 0, 0
    for tensor in tensors:
        count = int(torch.count_nonzero(_local(tensor)))
        if hasattr(tensor, "to_local"):
            sharded += count
        else:
            whole += count
    if ranks.size > 1:  # every rank takes part, even one that holds no element
        sharded = int(ranks.reduce(torch.tensor(sharded), "sum"))
    return whole + sharded


def count_parameters(model: nn.Module) -> int:
    """Number of parameter elements; a shared parameter counts once, a sharded one with its full size.

    Helper modules that callbacks attach (`_lc_*`) are left out.

    Example:
        >>> import torch
        >>> from lightning_compress.cost import count_parameters
        >>> count_parameters(torch.nn.Linear(3, 2))
        8
    """
    return sum(p.numel() for _, p in _parameters(model))


def count_nonzeros(model: nn.Module, ranks: Ranks | None = None) -> int:
    """Number of parameter elements that are not exactly zero, counted like `count_parameters`.

    Args:
        model: The model.
        ranks: The group over which DTensor parameters are spread. Without it only the local part of them is counted.

    Example:
        >>> import torch
        >>> from lightning_compress.cost import count_nonzeros
        >>> layer = torch.nn.Linear(3, 2, bias=False)
        >>> _ = torch.nn.init.ones_(layer.weight)[0].detach().zero_()
        >>> count_nonzeros(layer)
        3
    """
    return _nonzeros([p for _, p in _parameters(model)], ranks or Ranks())


def layer_sparsity(model: nn.Module, ranks: Ranks | None = None) -> dict[str, float]:
    """Fraction of exact zeros, in [0, 1], of the weights of each layer.

    A layer's weights are its own parameters with two or more dimensions (all matrices of an LSTM, no biases, no
    norms). A shared weight is listed under the first layer that owns it.

    Args:
        model: The model.
        ranks: The group over which DTensor parameters are spread.

    Returns:
        Clean layer name -> sparsity, in the model's order.

    Example:
        >>> import torch
        >>> from lightning_compress.cost import layer_sparsity
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
        >>> layer_sparsity(net)
        {'0': 0.0}
    """
    layers: dict[str, list[Tensor]] = {}
    for name, parameter in _parameters(model):
        if parameter.dim() >= 2 and parameter.numel():
            layers.setdefault(name.rpartition(".")[0], []).append(parameter)
    group = ranks or Ranks()
    return {name: 1 - _nonzeros(own, group) / sum(p.numel() for p in own) for name, own in layers.items()}


def _storages(tensor: Tensor) -> Iterator[tuple[Any, int]]:
    """Yields (identity of the storage, bytes of it that the tensor uses)."""
    if hasattr(tensor, "to_local"):  # a file holds the whole tensor, whatever the sharding
        yield id(tensor), tensor.numel() * tensor.element_size()
    elif is_traceable_wrapper_subclass(tensor):  # packed formats: what is stored are the inner tensors
        for attribute in tensor.__tensor_flatten__()[0]:
            yield from _storages(getattr(tensor, attribute))
    elif tensor.layout is torch.sparse_coo:
        for part in (tensor._indices(), tensor._values()):
            yield from _storages(part)
    elif tensor.layout is not torch.strided:
        compressed = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
        rows = (tensor.crow_indices, tensor.col_indices) if compressed else (tensor.ccol_indices, tensor.row_indices)
        for read in (*rows, tensor.values):
            yield from _storages(read())
    else:
        pointer = tensor.untyped_storage().data_ptr()
        yield pointer or id(tensor), tensor.numel() * tensor.element_size()


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the tensors that a checkpoint of the model holds: its state dict, each shared storage once.

    Counts every dtype with its own width, packed tensor subclasses and sparse layouts by the tensors inside them, and
    nothing for a file's own header. `_lc_*` helpers and non-tensor extra state are left out.

    Example:
        >>> import torch
        >>> from lightning_compress.cost import stored_bytes
        >>> stored_bytes(torch.nn.Linear(3, 2)), stored_bytes(torch.nn.Linear(3, 2).half())
        (32, 16)
    """
    used: dict[Any, int] = {}
    limit: dict[Any, int] = {}
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor) and _own(name)}
    seen: set[tuple[Any, ...]] = set()
    for tensor in state.values():
        for key, size in _storages(tensor):
            view = (key, tensor.storage_offset(), size) if tensor.layout is torch.strided else (key, size)
            if view in seen:  # the same tensor under two names
                continue
            seen.add(view)
            used[key] = used.get(key, 0) + size
            if type(tensor) is Tensor and tensor.layout is torch.strided:
                limit[key] = tensor.untyped_storage().nbytes()
    return sum(min(size, limit.get(key, size)) for key, size in used.items())


@dataclass(frozen=True)
class Cost:
    """The size and the compute of a model, as plain numbers.

    Attributes:
        parameters: Parameter elements.
        nonzeros: Parameter elements that are not exactly zero.
        macs: Multiply-accumulates of the example call; None when no call was given.
        bytes: Bytes of the state dict's tensors.

    Example:
        >>> import torch
        >>> from lightning_compress.cost import Cost
        >>> Cost.measure(torch.nn.Linear(3, 2))
        Cost(parameters=8, nonzeros=8, macs=None, bytes=32)
    """

    parameters: int
    nonzeros: int
    macs: int | None
    bytes: int

    @classmethod
    def measure(cls, model: nn.Module, call: Runnable | None = None, ranks: Ranks | None = None) -> Cost:
        """Measures a model.

        Args:
            model: The model.
            call: An example call, for the multiply-accumulates.
            ranks: The group over which DTensor parameters are spread.

        Example:
            >>> import torch
            >>> from lightning_compress.cost import Call, Cost
            >>> Cost.measure(torch.nn.Linear(4, 2, bias=False), Call(torch.zeros(3, 4))).macs
            24
        """
        macs = None if call is None else count_macs(model, call).total
        return cls(count_parameters(model), count_nonzeros(model, ranks), macs, stored_bytes(model))

    def to_dict(self) -> dict[str, int]:
        """The numbers that were measured, by name."""
        values = {"parameters": self.parameters, "nonzeros": self.nonzeros, "macs": self.macs, "bytes": self.bytes}
        return {name: value for name, value in values.items() if value is not None}


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Lays rows out as plain text: the first column to the left, the others to the right.

    Args:
        columns: The headings.
        rows: One value a column each; numbers are shortened to four digits, whole numbers get thousands separators,
            None becomes "-".

    Raises:
        ValueError: A row has more or fewer values than there are columns.

    Example:
        >>> from lightning_compress.cost import table
        >>> print(table(["layer", "parameters"], [["conv", 1024], ["fc", 10]]))
        layer  parameters
        -----  ----------
        conv        1,024
        fc             10
    """
    cells = [list(columns)]
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"a row has {len(row)} values for {len(columns)} columns: {list(row)!r}")
        cells.append([_cell(value) for value in row])
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    cells.insert(1, ["-" * width for width in widths])
    lines = ("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in cells)
    return "\n".join(lines)
