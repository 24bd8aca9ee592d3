"""How callbacks come by whole networks beside the user's: copies, modules and factories."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_compress.callbacks import exchange, teaching
from lightning_compress.distillation.company import CompanySource
from lightning_compress.distillation.peers import (
    Network,
    Networks,
    check_apart,
    copies,
    only_child,
    seed_of,
    substitute,
)
from lightning_compress.errors import CompressionError
from lightning_compress.isolation import isolated_rng
from lightning_compress.targets import get_submodule_clean, unwrap

if TYPE_CHECKING:
    from lightning_compress.callbacks.company import Company
    from lightning_compress.callbacks.coordinator import Coordinator


def check_type(peers: Any) -> None:
    """Refuse what makes no peers.

    Raises:
        TypeError: With what was found.
        ValueError: If there would be none.
    """
    if isinstance(peers, int) and not isinstance(peers, bool):
        if peers < 1:
            raise ValueError(f"peers is a number of other networks, at least 1; got {peers}")
        return
    listed = peers if isinstance(peers, list | tuple) else [peers]
    if not listed:
        raise ValueError("peers is an empty list; give one or more")
    for one in listed:
        if not (isinstance(one, nn.Module) or teaching.is_factory(one)) or isinstance(one, type):
            raise TypeError(
                "peers is a number, a module, a function that makes one, 'package.module:function', or a list of "
                f"these; got {one!r:.80}"
            )


def count_of(peers: Any) -> int:
    """How many networks that makes."""
    if isinstance(peers, int):
        return peers
    return len(peers) if isinstance(peers, list | tuple) else 1


def build(owner: Company, run: Coordinator, peers: Any, student: str) -> Networks:
    """Make the networks.

    Args:
        owner: The callback.
        run: The coordinator.
        peers: As the user gave them.
        student: Clean name of the part whose outputs are compared.

    Raises:
        CompressionError: If one cannot be made, shares parameters, or could not be exported though that was asked for.
    """
    module = run.pl_module
    direct = [name for name, p in module._parameters.items() if p is not None]
    if run.adapter.is_sharded and direct:
        raise CompressionError(
            f"{owner.name}: {type(module).__name__} holds the parameter {direct[0]!r} itself, and under "
            f"{type(run.trainer.strategy).__name__} only submodules can change places; move it into a submodule"
        )
    if isinstance(peers, int):
        networks = copies(owner.unedited(run), peers, owner.seed, owner.name)
    else:
        listed = peers if isinstance(peers, list | tuple) else [peers]
        networks = [_network(owner, run, one, i, student) for i, one in enumerate(listed)]
    check_apart(owner.name, module, {f"network {i}": network for i, network in enumerate(networks, 1)})
    if owner.export == "best":
        like = Network(owner.unedited(run))
        exchange.check_alike(owner.name, {f"network {i}": (n, like) for i, n in enumerate(networks, 1)})
    return Networks(networks)


def _network(owner: Company, run: Coordinator, peer: Any, number: int, student: str) -> Network:
    title = f"{owner.name}: network {number + 1}"
    if isinstance(peer, nn.Module):
        made = copy.deepcopy(peer)  # the user's own stays as it is, for another fit
    else:
        with isolated_rng(seed_of(owner.name, owner.seed, number)):
            made = teaching.made(owner.name, peer, "peer")
    root = owner.unedited(run)
    if isinstance(unwrap(made), type(unwrap(run.pl_module))):
        lacking = [name for name in unwrap(root)._modules if name not in unwrap(made)._modules]
        if lacking:
            raise CompressionError(f"{title} has no {lacking[0]!r}, which the student's module has")
        return Network(made)
    place = student or only_child(root)
    if not place:
        raise CompressionError(
            f"{title} is a {type(made).__name__}, and {type(run.pl_module).__name__} has parameters in several places, "
            "so it is not clear which it is to stand for. Name one (student='model'), or give a "
            f"{type(run.pl_module).__name__}"
        )
    get_submodule_clean(root, place)
    substitute(root, place, made)
    return Network(root)


def pairs(source: CompanySource, number: int) -> dict[str, str]:
    """The children of a network and of the module; its own parameters last."""
    name = f"{source.child}.{number - 1}"
    network = unwrap(source.helper[number - 1])
    root = source.root._modules
    found = {f"{name}.{child}": child for child in network._modules if root.get(child) is not None}
    if any(True for _ in network.parameters(recurse=False)) or any(True for _ in network.buffers(recurse=False)):
        found = {name: ""}
    return found
