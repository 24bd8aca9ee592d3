"""How a program is called: nested arguments to a flat list of tensors, and results back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils._pytree import tree_flatten, tree_unflatten

_CONSTANT = object()


class Signature:
    """The arguments and results of an exported program.

    Args:
        program: The program; it keeps the structure of the arguments it was exported with.
    """

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        example = program.example_inputs
        self._names = tuple(example[1]) if example is not None else ()
        self._inputs = program.call_spec.in_spec
        self._outputs = program.call_spec.out_spec
        specs = [spec for spec in program.graph_signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]
        self._constants = [spec.arg.value if isinstance(spec.arg, ConstantArgument) else _CONSTANT for spec in specs]
        given = [spec for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
        self._is_tensor = [not isinstance(spec.arg, ConstantArgument) for spec in given]

    def tensors(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors of a call, in the order of the program's inputs, detached and on the CPU.

        Raises:
            TypeError: The arguments are not arranged as those the program was exported with.
        """
        if set(kwargs) != set(self._names):
            raise TypeError(
                f"the program takes {self._described()}; got the keyword arguments {sorted(kwargs) or 'none'}"
            )
        flat, spec = tree_flatten((tuple(args), {name: kwargs[name] for name in self._names}))
        if spec != self._inputs:
            raise TypeError(
                f"the program takes {self._described()}, arranged as when it was exported; got {len(args)} positional "
                "arguments, or other nested values"
            )
        found = [leaf for leaf, is_tensor in zip(flat, self._is_tensor, strict=True) if is_tensor]
        wrong = next((leaf for leaf in found if not isinstance(leaf, Tensor)), None)
        if wrong is not None:
            raise TypeError(f"the program takes a tensor where {wrong!r:.80} was given")
        return [tensor.detach().to("cpu") for tensor in found]

    def result(self, tensors: Sequence[Any]) -> Any:
        """What the program returns, made of its tensors."""
        left = iter(tensors)
        flat = [next(left) if value is _CONSTANT else value for value in self._constants]
        return tree_unflatten(flat, self._outputs)

    @property
    def count(self) -> int:
        """Number of tensors that the program returns."""
        return sum(value is _CONSTANT for value in self._constants)

    def _described(self) -> str:
        positional = len(self._inputs.children()[0].children()) if self._inputs.children() else 0
        named = f" and the keyword arguments {list(self._names)}" if self._names else ""
        return f"{positional} positional arguments{named}"


def flat_module(program: torch.export.ExportedProgram) -> torch.fx.GraphModule:
    """The program as a module that takes and returns flat lists of tensors, with its weights inside."""
    module = program.module(check_guards=False)
    assert isinstance(module, torch.fx.GraphModule)
    module.graph.set_codegen(torch.fx.graph.CodeGen())
    for node in list(module.graph.nodes):
        if node.op == "placeholder" and not isinstance(node.meta.get("val"), Tensor) and not node.users:
            module.graph.erase_node(node)  # a constant argument, which tracing has put into the graph
    output = module.graph.output_node()
    leaves = tree_flatten(output.args[0])[0]
    output.args = (tuple(leaf for leaf in leaves if isinstance(leaf, torch.fx.Node)),)
    module.recompile()
    return module
