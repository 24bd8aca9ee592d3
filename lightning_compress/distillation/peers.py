"""Networks that stand in for the one in the user's module, so that the user's own step trains them.

A `Network` holds what the module holds: children, parameters and buffers. Inside `standing_in` the module has the
network's contents instead of its own, and its ``training_step`` computes with them, whatever it calls.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.isolation import isolated_rng
from lightning_compress.targets import (
    clean_name,
    get_submodule_clean,
    is_metric,
    named_modules_clean,
    named_parameters_clean,
    unwrap,
)
from lightning_compress.terms import PREFIX

_REGISTRIES = ("_modules", "_parameters", "_buffers")


class Network(nn.ModuleDict):
    """The contents of a module, to stand in for those of another of its class.

    A `ModuleDict` because FSDP1 never wraps one by itself: it is not called, its parts are.

    Args:
        root: The module whose contents it takes over; our own ``_lc_*`` children are left out.

    Example:
        >>> class Lit(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = nn.Linear(2, 2)
        ...     def forward(self, x):
        ...         return self.net(x)
        >>> ours, other = Lit(), Network(Lit())
        >>> x = torch.ones(1, 2)
        >>> with standing_in(ours, other):
        ...     answer = ours(x)
        >>> bool((answer == other["net"](x)).all()), bool((ours(x) == answer).all())
        (True, False)
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        root = unwrap(root)
        children: Any = {k: v for k, v in root._modules.items() if not k.startswith(PREFIX)}
        self._modules.update(children)
        self._parameters.update(root._parameters)
        self._buffers.update(root._buffers)
        self._non_persistent_buffers_set = set(root._non_persistent_buffers_set)

    def part(self, name: str) -> nn.Module:
        """The module of a clean name; this network itself for ``""``."""
        return get_submodule_clean(self, name, keep_wrappers=True)


class Networks(nn.ModuleList):
    """Networks, or parts of them, that exist only during training; the helper module of a callback.

    What is frozen when it is made stays frozen.

    Args:
        modules: In the order in which they are numbered.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__(modules)
        self.frozen = frozenset(n for n, p in named_parameters_clean(self) if not p.requires_grad)

    def trained_parameters(self) -> list[nn.Parameter]:
        """Those that train while the networks do."""
        return [p for name, p in self.named_parameters() if clean_name(name) not in self.frozen]

    def shard_units(self) -> list[nn.Module]:
        """What FSDP2 shards: modules that are called, unlike containers of them."""
        return [unit for module in self for unit in _called(module)]


def _called(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return [unit for child in module.children() for unit in _called(child)]
    return [module] if next(module.parameters(), None) is not None else []


@contextmanager
def standing_in(root: nn.Module, network: nn.Module) -> Iterator[None]:
    """Give a module the contents of a network inside the block.

    The dictionaries themselves are exchanged: what the user's code assigns to a buffer meanwhile stays the network's.

    Args:
        root: The user's module.
        network: A `Network` made of a module of its class.
    """
    own = {name: root.__dict__[name] for name in _REGISTRIES}
    root.__dict__.update({name: network.__dict__[name] for name in _REGISTRIES})
    try:
        yield
    finally:
        root.__dict__.update(own)


@contextmanager
def hidden(root: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Keep children out of sight: a user's step that sums over ``self.parameters()`` means the student's.

    Args:
        root: The user's module.
        names: Names of children.
    """
    whole = root.__dict__["_modules"]
    root.__dict__["_modules"] = visible = {k: v for k, v in whole.items() if k not in names}
    before = dict(visible)
    try:
        yield
    finally:
        root.__dict__["_modules"] = whole
        whole.update({k: v for k, v in visible.items() if k not in before or before[k] is not v})


def reset_metrics(network: nn.Module) -> None:
    """Forget what metrics in a network have counted: its passes are not logged."""
    for module in network.modules():
        if is_metric(module):
            module.reset()  # type: ignore[operator]


# -- how a network begins ---------------------------------------------------------------------------------------------


def seed_of(*parts: object) -> int:
    """A seed in [0, 2**32) that depends on all parts and is the same in every process.

    A hash, because a user's model is often drawn with the seeds 0, 1, 2: a peer must not draw the same.

    Example:
        >>> seed_of("peers", 0, 1) != seed_of("peers", 0, 2)
        True
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


def reinitialize(module: nn.Module, seed: int, what: str = "a copy of the network") -> None:
    """Draw all trained parameters anew, and reset running statistics.

    Each submodule's ``reset_parameters`` is called, children first as in a constructor. What is frozen (a pretrained
    backbone) stays as it is. Random numbers outside are not touched.

    Args:
        module: What to draw anew, in place.
        seed: In [0, 2**32).
        what: For messages.

    Raises:
        CompressionError: If parameters belong to modules that cannot reset themselves.

    Example:
        >>> layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> reinitialize(layer, 7); reinitialize(other, 7)
        >>> bool((layer.weight == other.weight).all())
        True
    """
    parts = {name: part for name, part in named_modules_clean(module) if not is_metric(part)}
    whole = all(p.requires_grad for p in module.parameters())
    reset = {name: _reset_of(part) for name, part in parts.items() if _trains(part, whole)}
    trained = [name for name, p in named_parameters_clean(module) if p.requires_grad]
    left = [name for name in trained if reset.get(name.rpartition(".")[0]) is None]
    if left:
        owner = parts[left[0].rpartition(".")[0]]
        raise CompressionError(
            f"{what} is to begin with other random weights, and {type(owner).__name__}, which holds {left[0]!r}, has "
            "no `reset_parameters` to draw them. Define it (PyTorch's own layers do), or pass a function that makes "
            "the network (peers=[make_net])"
        )
    frozen = {id(p): p.detach().clone() for p in module.parameters() if not p.requires_grad}
    with isolated_rng(seed), torch.no_grad():
        for _, function in reversed(list(reset.items())):
            if function is not None:
                function()
        for p in module.parameters():
            if id(p) in frozen:
                p.copy_(frozen[id(p)])


def _trains(module: nn.Module, whole: bool) -> bool:
    """Whether a part is to be drawn anew: statistics of a frozen, pretrained part stay as well."""
    parameters = list(module.parameters())
    return any(p.requires_grad for p in parameters) if parameters else whole


def _reset_of(module: nn.Module) -> Callable[[], Any] | None:
    for name in ("reset_parameters", "_reset_parameters"):  # attention and transformers have the private one
        function = getattr(module, name, None)
        if callable(function):
            return function  # type: ignore[no-any-return]
    return None


def substitute(root: nn.Module, name: str, peer: nn.Module) -> None:
    """Put a peer in the place of a submodule, in a copy of the user's module."""
    parent, _, own = name.rpartition(".")
    unwrap(get_submodule_clean(root, parent, keep_wrappers=True))._modules[own] = peer


def only_child(root: nn.Module) -> str | None:
    """Name of the only child with parameters, if the module has no parameters besides."""
    children = [
        name for name, child in root.named_children()
        if not name.startswith(PREFIX) and next(child.parameters(), None) is not None
    ]  # fmt: skip
    direct = any(p is not None for p in root._parameters.values())
    return children[0] if len(children) == 1 and not direct else None


# -- what is refused --------------------------------------------------------------------------------------------------


def check_apart(owner: str, root: nn.Module, others: Mapping[str, nn.Module]) -> None:
    """Refuse networks that share parameters, or begin as another one does.

    Args:
        owner: For messages.
        root: The student's module, without the others in it.
        others: The other networks by what messages call them.

    Raises:
        CompressionError: It names the networks and a parameter.
    """
    holders: dict[int, tuple[str, str]] = {}
    values: dict[str, str] = {}
    for title, module in {"the student": root, **others}.items():
        for name, parameter in named_parameters_clean(module):
            if name.split(".")[0].startswith(PREFIX):
                continue
            if id(parameter) in holders:
                whose, other = holders[id(parameter)]
                raise CompressionError(
                    f"{owner}: {name!r} of {title} is {other!r} of {whose}; networks that share parameters would be "
                    "trained twice by each step. Pass separate modules (copy.deepcopy), or a function that makes them"
                )
            if parameter.is_meta:
                raise CompressionError(f"{owner}: {name!r} of {title} is on the meta device, so it has no values")
        holders |= {id(p): (title, n) for n, p in named_parameters_clean(module)}
        values[title] = digest_of(module)
        same = next((t for t in values if t != title and values[t] == values[title]), None)
        if same is not None:
            raise CompressionError(
                f"{owner}: {title} begins with the same weights as {same}, so they would answer alike for ever and "
                "teach each other nothing. Draw its weights anew, or pass a number of peers (peers=1)"
            )


def digest_of(module: nn.Module) -> str:
    """SHA-256 of the trained values, by name and shape; of the local part of sharded ones."""
    digest = hashlib.sha256()
    for name, parameter in sorted(named_parameters_clean(module)):
        if name.split(".")[0].startswith(PREFIX) or not parameter.requires_grad:
            continue
        value: Tensor = parameter.detach()
        value = value.to_local() if hasattr(value, "to_local") else value
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.cpu().double().contiguous().numpy().tobytes())
    return digest.hexdigest()


def copies(root: nn.Module, count: int, seed: int, owner: str) -> list[Network]:
    """Copies of the contents of a module, each with weights of its own.

    Args:
        root: A copy of the user's module that may be used up.
        count: How many.
        seed: The user's.
        owner: Makes the seeds different for two callbacks.
    """
    made = []
    for number in range(count):
        module = copy.deepcopy(root)
        reinitialize(module, seed_of(owner, seed, number), f"{owner}: peer {number + 1}")
        made.append(Network(module))
    return made
