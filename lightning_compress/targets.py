"""From name patterns to modules and parameters, under whatever wraps them.

Clean names are the names of the user's own model: `layer1.conv`, whether a strategy, the compiler or activation
checkpointing wrapped the whole model or a part of it. All records (manifests, masks, example calls) use them.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from lightning_compress.errors import CompressionError

Pattern = str | type

# A wrapper registers the module that it wraps under one of these names.
_WRAPPED = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")
# These say `module`, which is a good name for a user's submodule too, so here the class decides.
_REPLICAS = ("DistributedDataParallel", "DataParallel")


def wrapped_module(module: nn.Module) -> nn.Module | None:
    """The module directly inside a wrapper (DDP, FSDP, `torch.compile`, checkpointing); `None` if it is no wrapper."""
    for name in _WRAPPED:
        if isinstance(inner := module._modules.get(name), nn.Module):
            return inner
    if any(cls.__name__ in _REPLICAS for cls in type(module).__mro__):
        return module._modules.get("module")
    return None


def unwrap(module: nn.Module) -> nn.Module:
    """The user's own module inside any number of wrappers.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> unwrap(nn.DataParallel(layer)) is layer
        True
    """
    while (inner := wrapped_module(module)) is not None:
        module = inner
    return module


def is_metric(module: nn.Module) -> bool:
    """Whether a module is a torchmetrics metric.

    Example:
        >>> is_metric(nn.Linear(1, 1))
        False
    """
    torchmetrics = sys.modules.get("torchmetrics")  # not imported: no metric exists, and importing it takes seconds
    return torchmetrics is not None and isinstance(module, torchmetrics.Metric)


def clean_name(name: str, root: nn.Module | None = None) -> str:
    """The name of a module, parameter or buffer in the user's own model.

    Names that only wrappers use are dropped wherever they stand. `module` is dropped where `root` has a (distributed)
    data-parallel wrapper at that place, and never by its text alone: it may be the user's own name.

    Args:
        name: Dotted name, relative to `root`.
        root: The possibly wrapped model that the name belongs to; needed only under (distributed) data parallel.

    Returns:
        The clean name; empty for the root itself.

    Example:
        >>> clean_name("_fsdp_wrapped_module.layer1._orig_mod.conv.weight")
        'layer1.conv.weight'
        >>> clean_name("module.fc.weight")
        'module.fc.weight'
        >>> clean_name("module.fc.weight", root=nn.DataParallel(nn.Sequential()))
        'fc.weight'
    """
    kept: list[str] = []
    here = root
    for part in filter(None, name.split(".")):
        inner = None if here is None else wrapped_module(here)
        child = None if here is None else here._modules.get(part)
        if part not in _WRAPPED and (inner is None or child is not inner):
            kept.append(part)
        here = child
    return ".".join(kept)


def named_modules_clean(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Clean names and the user's own modules, wrappers left out; like `named_modules`, each module once.

    Example:
        >>> [name for name, _ in named_modules_clean(nn.Sequential(nn.Linear(1, 1), nn.ReLU()))]
        ['', '0', '1']
    """
    seen: set[int] = set()

    def walk(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        module = unwrap(module)
        if id(module) in seen:
            return
        seen.add(id(module))
        yield prefix, module
        for name, child in module._modules.items():
            if child is not None:
                yield from walk(f"{prefix}.{name}" if prefix else name, child)

    return walk("", root)


def named_parameters_clean(root: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Clean names and parameters; like `named_parameters`, tied parameters once, under their first name.

    Under FSDP1 with `use_orig_params=False` the parameters are flat, belong to wrappers and are not listed.

    Example:
        >>> [name for name, _ in named_parameters_clean(nn.Sequential(nn.Linear(1, 1)))]
        ['0.weight', '0.bias']
    """
    seen: set[int] = set()
    for prefix, module in named_modules_clean(root):
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{prefix}.{name}" if prefix else name, parameter


def get_submodule_clean(root: nn.Module, name: str, *, keep_wrappers: bool = False) -> nn.Module:
    """The module of a clean name.

    Args:
        root: The possibly wrapped model.
        name: Clean name; empty for the root. Every name of a shared module works.
        keep_wrappers: Return the outermost wrapper at that place instead of the user's module.

    Raises:
        CompressionError: If there is no such module.

    Example:
        >>> get_submodule_clean(nn.Sequential(nn.Linear(1, 1)), "0")
        Linear(in_features=1, out_features=1, bias=True)
    """
    outer = root
    for part in filter(None, name.split(".")):
        child = unwrap(outer)._modules.get(part)
        if child is None:
            raise CompressionError(f"The model has no module {name!r}.{_near(name, _names(root))}")
        outer = child
    return outer if keep_wrappers else unwrap(outer)


def select(
    root: nn.Module,
    targets: Sequence[Pattern] | Pattern = ("*",),
    exclude: Sequence[Pattern] | Pattern = (),
    *,
    kinds: tuple[type[nn.Module], ...],
    ran: Collection[str] | None = None,
) -> dict[str, nn.Module]:
    """The modules that a technique works on.

    A pattern is a glob over clean names (`"layer*.conv1"`; `*` crosses dots), the name of a class (`"Conv2d"`) or a
    class. It matches a module, or anything above it: `"head"` and `"layer4"` select everything inside, and so does
    `nn.TransformerEncoderLayer`. Left out are `_lc_*` modules (our own), torchmetrics metrics and what is inside
    them, and modules that did not run.

    Args:
        root: The possibly wrapped model.
        targets: What to select.
        exclude: What to leave out of that. Each pattern must match something in the model, of any kind.
        kinds: Classes that the technique can handle.
        ran: Clean names of the modules that an example call used; `None` if unknown.

    Returns:
        Clean name to module, in the order of definition.

    Raises:
        CompressionError: If a pattern matches nothing, or nothing is left.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> list(select(model, exclude=("2",), kinds=(nn.Linear,)))
        ['0']
    """
    wanted, unwanted = as_patterns("targets", targets), as_patterns("exclude", exclude)
    lines = _lineages(root)
    usable = {name: line for name, line in lines.items() if isinstance(line[-1][1], kinds)}
    candidates = {name: line for name, line in usable.items() if ran is None or name in ran}
    for pattern in wanted:
        if not any(_matches(pattern, line) for line in candidates.values()):
            raise CompressionError(_no_match(pattern, lines, usable, kinds))
    for pattern in unwanted:
        if not any(_matches(pattern, line) for line in lines.values()):
            raise CompressionError(
                f"exclude={_show(pattern)} matches no module of this model.{_near_pattern(pattern, lines)}"
            )
    chosen = {n: line for n, line in candidates.items() if any(_matches(pattern, line) for pattern in wanted)}
    left = {n: line[-1][1] for n, line in chosen.items() if not any(_matches(pattern, line) for pattern in unwanted)}
    if not left:
        raise CompressionError(
            f"Nothing is left to work on: exclude={_show_all(unwanted)} leaves out all {len(chosen)} modules that "
            f"targets={_show_all(wanted)} selects ({_some(chosen)}). Narrow exclude or widen targets."
        )
    return left


def first_and_last(names: Iterable[str]) -> tuple[str, ...]:
    """The first and the last of some names in execution order, once each; empty if there are none.

    Example:
        >>> first_and_last(["stem", "body", "head"]), first_and_last(["only"])
        (('stem', 'head'), ('only',))
    """
    ordered = list(names)
    return tuple(dict.fromkeys((ordered[0], ordered[-1]))) if ordered else ()


_Line = list[tuple[str, nn.Module]]  # a module and all above it, root first


def _lineages(root: nn.Module) -> dict[str, _Line]:
    """Every module of the user's model with its parents; ours and metrics are left out with all they contain."""
    lines: dict[str, _Line] = {}
    for name, module in named_modules_clean(root):
        parent, _, own = name.rpartition(".")
        above = lines.get(parent) if name else []
        if above is not None and not own.startswith("_lc_") and not is_metric(module):
            lines[name] = [*above, (name, module)]
    return lines


def _matches(pattern: Pattern, line: _Line) -> bool:
    if isinstance(pattern, type):
        return any(isinstance(module, pattern) for _, module in line)
    if any(fnmatchcase(name, pattern) for name, _ in line[1:] or line):
        return True
    return any(pattern in _class_names(module) for _, module in line)


def _class_names(module: nn.Module) -> set[str]:
    return {cls.__name__ for cls in type(module).__mro__ if cls not in (nn.Module, object)}


def as_patterns(argument: str, patterns: Sequence[Pattern] | Pattern) -> tuple[Pattern, ...]:
    """Patterns as a user gives them, one or several, checked as far as that is possible without a model.

    Args:
        argument: How the argument is called.
        patterns: What was given for it.

    Raises:
        TypeError: If something is neither a name nor a class.
        ValueError: If there are no targets.

    Example:
        >>> as_patterns("targets", "layer*")
        ('layer*',)
    """
    if not isinstance(patterns, str | type | Sequence | Collection):
        raise TypeError(f"{argument} takes names and classes; found {patterns!r} of {type(patterns).__name__}.")
    listed = (patterns,) if isinstance(patterns, str | type) else tuple(patterns)
    for pattern in listed:
        if not isinstance(pattern, str | type):
            raise TypeError(f"{argument} takes names and classes; found {pattern!r} of {type(pattern).__name__}.")
    if argument == "targets" and not listed:
        raise ValueError('targets=() selects nothing; leave it at ("*",) to select everything.')
    return listed


def _no_match(
    pattern: Pattern, lines: dict[str, _Line], usable: dict[str, _Line], kinds: tuple[type[nn.Module], ...]
) -> str:
    kind_names = ", ".join(kind.__name__ for kind in kinds)
    if idle := [name for name, line in usable.items() if _matches(pattern, line)]:
        return (
            f"targets={_show(pattern)} matches only modules that the example call never ran: {_some(idle)}. Pass "
            f"example_inputs= that reach them, or leave them out."
        )
    if other := [line for line in lines.values() if _matches(pattern, line)]:
        found = _some(f"{line[-1][0] or 'the root'} ({type(line[-1][1]).__name__})" for line in other)
        return f"targets={_show(pattern)} matches {found}, but none of these is one of {kind_names}."
    return f"targets={_show(pattern)} matches no module of this model.{_near_pattern(pattern, usable or lines)}"


def _near_pattern(pattern: Pattern, lines: dict[str, _Line]) -> str:
    names = {name for line in lines.values() for name, _ in line if name}
    kinds = {type(line[-1][1]).__name__ for line in lines.values()}
    if isinstance(pattern, type):
        return f" Classes in it: {_some(sorted(kinds))}."
    return _near(pattern.replace("*", "").strip("."), sorted(names | kinds))


def _near(name: str, known: Collection[str]) -> str:
    lowered = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.5)
    if close:
        return f" Did you mean {' or '.join(repr(lowered[match]) for match in close)}?"
    return f" Names in it: {_some(sorted(known))}."


def _names(root: nn.Module) -> list[str]:
    return [name for name, _ in named_modules_clean(root) if name]


def _some(items: Iterable[str], most: int = 6) -> str:
    listed = list(items)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return (", ".join(listed[:most]) or "none") + more


def _show(pattern: Pattern) -> str:
    return repr(pattern) if isinstance(pattern, str) else pattern.__name__


def _show_all(patterns: Iterable[Pattern]) -> str:
    return f"({', '.join(_show(pattern) for pattern in patterns)})"
