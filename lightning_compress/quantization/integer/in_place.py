"""Graphs without operators that write to tensors, made in a second where the general way takes ten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx


def without_writes(module: fx.GraphModule) -> bool:
    """Replace operators such as `relu_` and `add_` by those that return a new tensor.

    Args:
        module: An exported graph; edited, unless `False` is returned.

    Returns:
        Whether that was safe: nothing reads the written memory later by another name.
    """
    order = {node: place for place, node in enumerate(module.graph.nodes)}
    memory = _memory(module)
    swaps: list[tuple[fx.Node, Callable[..., Any]]] = []
    for node in module.graph.nodes:
        if not _writes(node):
            continue
        plain = _plain(node.target)
        if plain is None or not _is_private(node, order, memory):
            return False
        swaps.append((node, plain))
    for node, plain in swaps:
        written = node.args[0]
        assert isinstance(written, fx.Node)
        node.target = plain
        for reader in [user for user in written.users if order[user] > order[node]]:
            reader.replace_input_with(written, node)
    return True


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _plain(target: Any) -> Callable[..., Any] | None:
    """`aten.relu_.default` -> `aten.relu.default`, if there is one that takes the same arguments."""
    packet = target._schema.name.split("::")[1]
    arguments = target._schema.arguments
    only_first = [a.alias_info is not None and a.alias_info.is_write for a in arguments] == [
        True, *(False for _ in arguments[1:])
    ]  # fmt: skip
    if target.namespace != "aten" or not packet.endswith("_") or not only_first:
        return None
    plain = getattr(getattr(torch.ops.aten, packet.removesuffix("_"), None), target._overloadname, None)
    if plain is None or [a.name for a in plain._schema.arguments] != [a.name for a in arguments]:
        return None
    found: Callable[..., Any] = plain
    return found


def _memory(module: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """For each node, the first of those that may share its memory."""
    first: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        sources = _aliased(node)
        first[node] = first[sources[0]] if sources else node
        for other in sources[1:]:  # an operator that may return one of several: they count as one
            old = first[other]
            first.update({n: first[node] for n, f in first.items() if f is old})
    return first


def _aliased(node: fx.Node) -> list[fx.Node]:
    if node.op != "call_function" or not node.all_input_nodes:
        return []
    if not isinstance(node.target, torch._ops.OpOverload):
        return list(node.all_input_nodes)  # getitem and the like
    schema = node.target._schema
    named = zip((a for a in schema.arguments if not a.kwarg_only), node.args, strict=False)
    found = [value for a, value in named if a.alias_info is not None and isinstance(value, fx.Node)]
    # Composite operators may return their input without saying so.
    if not found and node.target._can_decompose() and isinstance(node.args[0], fx.Node):
        return [node.args[0]] if node.target not in _FRESH else []
    return found


_FRESH = (
    torch.ops.aten.conv1d.default, torch.ops.aten.conv2d.default, torch.ops.aten.conv3d.default,
    torch.ops.aten.linear.default, torch.ops.aten.batch_norm.default, torch.ops.aten.layer_norm.default,
    torch.ops.aten.group_norm.default, torch.ops.aten.max_pool2d.default, torch.ops.aten.conv2d.padding,
    torch.ops.aten.conv_transpose2d.input, torch.ops.aten.adaptive_avg_pool2d.default, torch.ops.aten.matmul.default,
)  # fmt: skip


def _is_private(node: fx.Node, order: dict[fx.Node, int], memory: dict[fx.Node, fx.Node]) -> bool:
    """Whether only the written node itself is read after the write."""
    written = node.args[0]
    if not isinstance(written, fx.Node) or written.op in ("get_attr", "placeholder"):
        return False
    place = order[node]
    for other, first in memory.items():
        if first is not memory[written] or order[other] > place or other is node:
            continue
        if other is not written and any(order[user] > place for user in other.users):
            return False
        if other is not written and other.op in ("get_attr", "placeholder"):
            return False
    return True
