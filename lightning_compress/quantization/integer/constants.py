"""Parts of a graph whose value is known before it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from lightning_compress.quantization.integer.qdq import origin_of

_RANDOM = (torch.Tag.nondeterministic_seeded,)


class Constants:
    """Values of nodes that read nothing but the module's own tensors, or nothing at all.

    Args:
        module: The graph module; values are remembered, so ask anew after its tensors have changed.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self._module = module
        self._known: dict[fx.Node, bool] = {}
        self._values: dict[fx.Node, Any] = {}
        for node in module.graph.nodes:  # in order, so that no node waits for a long chain of others
            self.is_constant(node)

    def is_constant(self, node: Any) -> bool:
        """Whether the value is known."""
        if not isinstance(node, fx.Node):
            return True
        if node not in self._known:
            self._known[node] = self._decide(node)
        return self._known[node]

    def _decide(self, node: fx.Node) -> bool:
        if node.op == "get_attr":
            return True
        if node.op != "call_function":
            return False
        tags = getattr(node.target, "tags", ())
        return not any(tag in tags for tag in _RANDOM) and all(self.is_constant(n) for n in node.all_input_nodes)

    def value(self, node: fx.Node, instead: Mapping[fx.Node, Any] | None = None) -> Any:
        """The value of a constant node.

        Args:
            node: The node.
            instead: Values to compute with in place of those of some nodes.
        """
        if instead is not None:
            if node in instead:
                return instead[node]
            if node.op == "call_function":
                args, kwargs = map_arg((node.args, node.kwargs), lambda n: self.value(n, instead))
                assert callable(node.target)
                return node.target(*args, **kwargs)
        if node not in self._values:
            if node.op == "get_attr":
                found: Any = self._module
                for part in str(node.target).split("."):
                    found = getattr(found, part)
            else:
                args, kwargs = map_arg((node.args, node.kwargs), self.value)
                assert callable(node.target)
                with torch.no_grad():
                    found = node.target(*args, **kwargs)
            self._values[node] = found.detach() if isinstance(found, Tensor) else found
        return self._values[node]

    def source(self, node: fx.Node) -> str:
        """The name of the first parameter of the model that a constant node was made of."""
        while node.op != "get_attr":
            if not node.all_input_nodes:
                return node.name  # made of nothing, such as `arange`
            node = node.all_input_nodes[0]
        return origin_of(self._module, str(node.target))
