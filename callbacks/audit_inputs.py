"""What a `CompressionAudit` is given: references, data by name, and the share of the examples that a process has."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lightning_compress import manifest
from lightning_compress.audits.audit import default_audits
from lightning_compress.audits.context import Audit, AuditContext
from lightning_compress.audits.preparing import Request, check_kinds, prepare
from lightning_compress.audits.shares import shared
from lightning_compress.callbacks import teaching
from lightning_compress.callbacks.coordinator import Coordinator
from lightning_compress.distillation.following import EMATeacher
from lightning_compress.distillation.teachers import resolve_teacher_module
from lightning_compress.errors import CompressionError
from lightning_compress.isolation import isolated_rng

if TYPE_CHECKING:
    from lightning import LightningModule, Trainer


# ----------------------------------------------------------------------------------------------------------- arguments
def checked_audits(audits: Any, options: Mapping[str, Any], validation_tier: int) -> list[Audit] | None:
    """The audits as a list, or None for those of a tier.

    Args:
        audits: As the user gave them.
        options: Audit name -> arguments.
        validation_tier: What audits of a validation have at most.

    Raises:
        TypeError: If one is no audit.
        ValueError: If options are for no audit, or a validation has none.
    """
    found = None if audits is None else list(audits)
    wrong = [one for one in found or () if isinstance(one, type) or not _is_audit(one)]
    if wrong:
        raise TypeError(f"an audit has `name`, `family`, `tier` and `run(context)`; got {wrong[0]!r}")
    names = [one.name for one in (default_audits(2) if found is None else found)]
    unknown = sorted(set(options) - set(names))
    if unknown:
        raise ValueError(f"options are for {unknown}, and the audits are {names}")
    if found is not None and not any(one.tier <= validation_tier for one in found):
        raise ValueError(
            f"none of the audits {names} has a tier up to validation_tier={validation_tier}, so validations would "
            "audit nothing; raise validation_tier, or audit only at the end (every=0)"
        )
    return found


def _is_audit(one: Any) -> bool:
    return callable(getattr(one, "run", None)) and all(hasattr(one, name) for name in ("name", "family", "tier"))


def checked_references(references: Any) -> dict[str, list[Any]]:
    """Further models as lists.

    Raises:
        TypeError: If they are no mapping from texts to lists of models.
    """
    if not isinstance(references, Mapping | None) or not all(
        isinstance(group, str) and isinstance(several, Sequence) and not isinstance(several, str)
        for group, several in (references or {}).items()
    ):
        raise TypeError(f"references are lists of models by name, such as {{'tuned': [...]}}; got {references!r:.200}")
    for given in (given for several in (references or {}).values() for given in several):
        if given == "initial" or isinstance(given, EMATeacher | list | tuple | Mapping):
            raise TypeError(
                f"references are models that were trained already: paths, modules or functions; got {given!r:.80}"
            )
        teaching.check_type(given)
    check_kinds(references or {})
    return {group: list(several) for group, several in (references or {}).items()}


def named(source: Any, seed: int) -> Any:
    """What ``package.module:name`` names, called if it is a class or a function; anything but a text is left as it is.

    Args:
        source: Data, or its name.
        seed: Of what it draws; the random numbers of the training stay as they are.

    Raises:
        CompressionError: If there is no such thing.
    """
    if not isinstance(source, str):
        return source
    module, _, name = source.partition(":")
    with isolated_rng(seed):
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise CompressionError(f"{source!r} is no package.module:name that can be imported: {error}") from error
        return found() if callable(found) else found


# ---------------------------------------------------------------------------------------------------------- references
def reference_of(run: Coordinator, owner: str, given: Any, student: str) -> nn.Module:
    """The part of a reference that answers for the model's part.

    Args:
        run: The coordinator.
        owner: For messages.
        given: A path, a module, a function, or ``"initial"``.
        student: Name of the model's part.

    Raises:
        CompressionError: If it cannot be made, or is the model itself.
    """
    root = teaching.build(run, owner, given, student)
    if given == "initial" and not run.adapter.is_sharded:  # such copies have the weights from before sharding
        _take_weights(root, run.pl_module)
    mine = {id(parameter) for parameter in run.pl_module.parameters()}
    if any(id(parameter) in mine for parameter in root.parameters()):
        raise CompressionError(f"{owner}: the reference is the model itself; pass a copy (copy.deepcopy)")
    return resolve_teacher_module(root, student, run.pl_module)


def _take_weights(root: nn.Module, source: LightningModule) -> None:
    """The weights as they are now, unless shapes were changed at setup: then those from before stay."""
    state = manifest.without_auxiliary(source.state_dict(), root)
    own = root.state_dict()
    if {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in own.items()}:
        root.load_state_dict(state)


# ----------------------------------------------------------------------------------------------------------- processes
def prepared(request: Request, trainer: Trainer) -> tuple[AuditContext, list[str]]:
    """The context of an audit whose examples are dealt out to the processes of a Trainer, and what limits it.

    Where something does not belong together in the share of one process, all of them raise.

    Raises:
        CompressionError: Data and models do not belong together.
    """
    run = Coordinator.of(trainer)
    assert run is not None
    caveats: list[str] = []
    context = run.adapter.in_step(lambda: prepare(request, caveats))
    world = trainer.world_size
    if world == 1:
        return context, caveats

    def all_gather(value: Any) -> list[Any]:
        parts: list[Any] = [None] * world
        dist.all_gather_object(parts, value)
        return parts

    return shared(context, request, all_gather), list(
        dict.fromkeys(text for told in all_gather(caveats) for text in told)
    )


# ---------------------------------------------------------------------------------------------------------- a full disk
@contextmanager
def full_disk_is_a_warning(owner: str, what: str) -> Iterator[None]:
    """The training is done: what it gave is not lost because a report cannot be written."""
    try:
        yield
    except OSError as error:
        rank_zero_warn(f"{owner}: the scorecard could not be written {what} ({error}); it is in `audit.card`")
