"""The one place that knows how to reach parameters under Lightning's strategies (`capabilities` says what works).

Private torch and Lightning API is used in this file only; ``tests/integration/test_private_api.py`` fails when
upstream changes any of it.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_compress import manifest
from lightning_compress.callbacks.capabilities import CAPABILITIES, Kind, kind_of
from lightning_compress.errors import CompressionError
from lightning_compress.ranks import Ranks, ReduceOp
from lightning_compress.targets import clean_name

if TYPE_CHECKING:
    import lightning as L

T = TypeVar("T")


def requested_checkpoint(trainer: L.Trainer) -> str | None:
    """The checkpoint that `fit`, `validate`, `test` or `predict` was asked to load, during `setup`.

    `trainer.ckpt_path` is filled only later, and still holds the path of the stage before; until then the path is a
    local variable of ``Trainer._run``, found by that function's code object. What the user assigned is in it too.
    """
    path = _local_of_run(trainer, "ckpt_path", trainer.ckpt_path)
    return str(path) if path else None


def is_trusted(trainer: L.Trainer) -> bool:
    """Whether the user has Lightning unpickle everything in the checkpoint (``fit(..., weights_only=False)``)."""
    return _local_of_run(trainer, "weights_only", None) is False


def train_source(trainer: L.Trainer) -> Any:
    """What `fit` was given to train on: a loader, a datamodule, or the module; known from ``setup`` on."""
    return trainer.fit_loop._data_source.instance


def _local_of_run(trainer: L.Trainer, name: str, default: Any) -> Any:
    code, frame = type(trainer)._run.__code__, sys._getframe()
    while frame is not None:
        if frame.f_code is code:
            return frame.f_locals.get(name)
        frame = frame.f_back  # type: ignore[assignment]
    return default


def uses_spawn(trainer: L.Trainer) -> bool:
    """Whether worker processes are spawned or forked by the Trainer itself."""
    launcher = trainer.strategy.launcher
    return any(cls.__name__ == "_MultiProcessingLauncher" for cls in type(launcher).__mro__)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class StrategyAdapter:
    """How compression reaches the model under the Trainer's strategy.

    Args:
        trainer: The Trainer; its strategy may not be set up yet.

    Raises:
        CompressionError: If the strategy is unknown.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self.trainer = trainer
        self.kind: Kind = kind_of(trainer.strategy)

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds only a part of the parameters."""
        return self.kind in ("fsdp1", "fsdp2", "deepspeed")

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.trainer.strategy.root_device

    @property
    def world_size(self) -> int:
        """How many processes train."""
        return self.trainer.world_size

    def prepared(self, batch: Any) -> Any:
        """What `training_step` gets for a batch of the loader: its precision, the user's hooks, the device."""
        converted = self.trainer.precision_plugin.convert_input(batch)
        converted = self.trainer.lightning_module._on_before_batch_transfer(converted, dataloader_idx=0)
        return self.trainer.strategy.batch_to_device(converted, self.device)

    def require(self, feature: str, technique: str) -> None:
        """Refuse a feature that the strategy cannot offer.

        Raises:
            CompressionError: With the reason and the ways out.
        """
        verdict = CAPABILITIES[feature][self.kind]
        if verdict.refusal is not None:
            raise CompressionError(
                f"{technique} ({feature}) does not work with {type(self.trainer.strategy).__name__}: {verdict.refusal}"
            )

    # ------------------------------------------------------------------------------------------------ agreement
    def broadcast(self, data: T) -> T:
        """Rank 0's data, on every rank."""
        return self.trainer.strategy.broadcast(data) if self.world_size > 1 else data

    def decide(self, function: Callable[[], T]) -> T:
        """Run a decision on rank 0 and give its outcome to every rank; a refusal is raised on all ranks together.

        Raises:
            CompressionError: What `function` raised on rank 0.
        """
        if self.world_size == 1:
            return function()
        outcome: tuple[bool, Any] = (True, None)
        failed: Exception | None = None
        if self.trainer.global_rank == 0:
            try:
                outcome = (True, function())
            except Exception as error:  # raised below, after the other ranks were told
                failed = error
                own = str(error) if isinstance(error, CompressionError) else f"{type(error).__name__}: {error}"
                outcome = (False, own)
        done, value = self.broadcast(outcome)
        if failed is not None:
            raise failed
        if not done:
            raise CompressionError(value)
        return value  # type: ignore[no-any-return]

    def in_step(self, function: Callable[[], T]) -> T:
        """Run something on every rank; if it raises on any, all ranks raise, and none waits for another in vain.

        Raises:
            CompressionError: Where it went well, if it raised on another rank.
        """
        with self.all_or_none() as others:
            value = function()
            others()
        return value

    @contextmanager
    def all_or_none(self) -> Iterator[Callable[[], None]]:
        """A block whose first part may fail on some ranks; it ends with the call of what the block is given.

        Raises:
            CompressionError: In that call, if the first part raised on another rank.
        """
        met = False

        def meet(problem: str | None = None) -> None:
            nonlocal met
            met = True
            self.together(problem)

        try:
            yield meet
        except Exception as error:
            if not met and self.world_size > 1:
                with suppress(CompressionError):  # the error itself says more
                    meet(str(error))
            raise

    def agree(self, data: Any, what: str) -> None:
        """Check with one small collective that every rank wants the same; all ranks raise together if not.

        Raises:
            CompressionError: If the plain data differs between ranks.
        """
        if self.world_size == 1:
            return
        number = int(manifest.digest(data)[:14], 16)
        mine = torch.tensor([number, -number], dtype=torch.int64, device=self.device)
        dist.all_reduce(mine, op=dist.ReduceOp.MAX)
        if int(mine[0]) != -int(mine[1]):
            raise CompressionError(
                f"the ranks disagree on {what}; nothing was changed. Parameters or decisions differ between ranks: "
                "check that all ranks build the same model, and that nothing changes weights on one rank only"
            )

    def together(self, problem: str | None) -> None:
        """Raise on every rank if any rank has a problem.

        Raises:
            CompressionError: With this rank's problem, or naming the rank that had one.
        """
        if self.world_size > 1:
            bad = torch.tensor([-1 if problem is None else self.trainer.global_rank], device=self.device)
            dist.all_reduce(bad, op=dist.ReduceOp.MAX)
            if problem is None and int(bad) >= 0:
                problem = (
                    f"rank {int(bad)} failed, so nothing was done on this rank either; see the message of that one"
                )
        if problem is not None:
            raise CompressionError(problem)

    # ----------------------------------------------------------------------------------------------- parameters
    def parameters(self, root: nn.Module) -> dict[str, nn.Parameter]:
        """Parameters by clean name, as this process holds them (whole, or its shard)."""
        self.reshard()
        return {clean_name(name): p for name, p in root.named_parameters()}

    def local(self, parameter: Tensor) -> Tensor:
        """The part of a parameter that this process holds, sharing its memory."""
        return _local(parameter.detach())

    def reshard(self) -> None:
        """Shard again what a forward without backward left whole.

        FSDP2 keeps its root group whole after validation (pytorch#144289), and parameters read in that state are about
        to be thrown away.
        """
        if self.kind == "fsdp2":
            for module in self.trainer.lightning_module.modules():
                if hasattr(module, "reshard") and hasattr(module, "unshard"):
                    module.reshard()  # type: ignore[operator]

    def ranks(self) -> Ranks:
        """The group over which parameters are spread; replicas (DDP) count once."""
        if not self.is_sharded or self.world_size == 1:
            return Ranks()
        ops = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}

        def reduce(value: Tensor, op: ReduceOp) -> Tensor:
            moved = value.to(self.device, copy=True)
            dist.all_reduce(moved, op=ops[op])
            return moved.to(value.device)

        return Ranks(dist.get_rank(), dist.get_world_size(), reduce)

    def gather_rows(self, vector: Tensor) -> Tensor:
        """One vector of every process as the rows of a matrix; a collective.

        Args:
            vector: Of the same length and type on every rank, shape (n,).

        Returns:
            Shape (world size, n).
        """
        if self.world_size == 1:
            return vector[None]
        mine = vector.to(self.device)
        flat = torch.empty(self.world_size * mine.numel(), dtype=mine.dtype, device=mine.device)  # gloo wants it so
        dist.all_gather_into_tensor(flat, mine)
        return flat.view(self.world_size, -1).to(vector.device)

    def check_sharding(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Refuse parameters whose parts this adapter could not count once.

        Raises:
            CompressionError: For parameters that are not sharded, or sharded over more than one mesh dimension.
        """
        if self.kind != "fsdp2":
            return
        for name, parameter in parameters.items():
            mesh = getattr(parameter, "device_mesh", None)
            if mesh is None:
                raise CompressionError(
                    f"parameter {name!r} is not sharded, unlike {type(self.trainer.strategy).__name__} expects; "
                    "include its module in `fully_shard`, or exclude it from compression with `exclude=`"
                )
            if mesh.ndim != 1 or mesh.size() != self.world_size:
                raise CompressionError(
                    f"parameter {name!r} is sharded over a mesh of shape {tuple(mesh.shape)}; masks need one dimension "
                    "that holds all processes (no tensor parallelism, no hybrid sharding)"
                )

    @contextmanager
    def summoned(self, root: nn.Module, writeback: bool = False) -> Iterator[dict[str, Tensor]]:
        """Whole parameters by clean name, on every rank; meant for small reads, since it gathers.

        Args:
            root: The LightningModule.
            writeback: FSDP1 only: write changes back to the shards.
        """
        self.reshard()
        if self.kind == "fsdp1":
            from torch.distributed.fsdp import FullyShardedDataParallel

            model: Any = self.trainer.strategy.model
            with FullyShardedDataParallel.summon_full_params(model, writeback=writeback):
                yield {clean_name(name): p.detach() for name, p in root.named_parameters()}
        else:
            yield _Gathering({clean_name(name): p.detach() for name, p in root.named_parameters()})

    def write(self, target: Tensor, value: Tensor) -> None:
        """Write a whole value into a parameter or buffer, of which this process may hold a part only.

        Args:
            target: The parameter or buffer.
            value: The whole value, the same on every rank.
        """
        mesh: Any = getattr(target, "device_mesh", None)
        if mesh is not None:
            from torch.distributed.tensor import distribute_tensor

            placements = target.placements  # type: ignore[attr-defined]
            value = distribute_tensor(value.to(device=self.device, dtype=target.dtype), mesh, placements)
        target.copy_(value)

    def shard(self, root: nn.Module, full: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's part of whole boolean masks, by parameter name."""
        if self.kind == "fsdp1":
            return self._shard_flat(root, full)
        parameters = self.parameters(root)
        return {name: self._shard_one(parameters[name], mask) for name, mask in full.items()}

    def _shard_one(self, parameter: Any, mask: Tensor) -> Tensor:
        if not hasattr(parameter, "device_mesh"):
            return mask.to(parameter.device)
        from torch.distributed.tensor import distribute_tensor

        whole = mask.to(device=self.device, dtype=torch.uint8)
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements).to_local().bool()

    def _shard_flat(self, root: nn.Module, full: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # FSDP1 flattens and pads; the mask takes the same way as the weights by being written through their door.
        saved = {name: p.detach().clone() for name, p in self.parameters(root).items() if name in full}
        with self.summoned(root, writeback=True) as whole:
            for name, mask in full.items():
                whole[name].copy_(mask)
        parameters = self.parameters(root)
        shards = {name: parameters[name].detach() != 0 for name in full}
        for name, value in saved.items():
            parameters[name].detach().copy_(value)
        return shards

    def gather(self, root: nn.Module, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole boolean masks from every process's part; a collective under sharded strategies."""
        if self.kind == "fsdp1":
            return self._gather_flat(root, local)
        parameters = self.parameters(root) if self.kind == "fsdp2" else {}
        return {name: self._gather_one(parameters.get(name), mask) for name, mask in local.items()}

    def _gather_one(self, parameter: Any, mask: Tensor) -> Tensor:
        if parameter is None or not hasattr(parameter, "device_mesh"):
            return mask
        from torch.distributed.tensor import DTensor

        part = DTensor.from_local(
            mask.to(torch.uint8), parameter.device_mesh, parameter.placements,
            shape=parameter.shape, stride=parameter.stride(),
        )  # fmt: skip
        return part.full_tensor().bool()

    def _gather_flat(self, root: nn.Module, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parameters = self.parameters(root)
        saved = {name: parameters[name].detach().clone() for name in local}
        for name, mask in local.items():
            parameters[name].detach().copy_(mask)
        with self.summoned(root) as whole:
            full = {name: whole[name] != 0 for name in local}
        for name, value in saved.items():
            self.parameters(root)[name].detach().copy_(value)
        return full

    # ------------------------------------------------------------------------------------------------ structure
    def rewrap(self) -> None:
        """Rebuild the strategy's wrapper after parameters were replaced; on all ranks, at a step boundary."""
        if self.kind != "ddp":
            return
        strategy: Any = self.trainer.strategy
        strategy.model = strategy.lightning_module  # the last reference to the old wrapper goes, ...
        gc.collect()  # ... so that its reducer dies and takes its autograd hooks away
        strategy.configure_ddp()  # also registers communication hooks and broadcasts rank 0's values
        strategy._pl_static_graph_delay_done = False

    def check_structure(self) -> None:
        """Refuse launchers and options under which shapes cannot change.

        Raises:
            CompressionError: With the reason and the way out.
        """
        if uses_spawn(self.trainer):
            raise CompressionError(
                "this Trainer starts its workers by spawn or fork, and at the end of the fit its main process loads "
                "the smaller weights into the model of the original shape, which fails after all training is done. "
                "Use strategy='ddp' in a script"
            )
        if getattr(self.trainer.strategy, "_model_averaging_period", None) is not None:
            raise CompressionError(
                "post-local-SGD averaging (`model_averaging_period`) keeps lists of parameters and cannot follow a "
                "structural change; leave it out"
            )

    def shard_helpers(self, root: Any, helpers: Sequence[nn.Module]) -> None:
        """Shard our own trained modules as the user's are: under FSDP2 plain ones would drift apart between ranks."""
        if self.kind != "fsdp2":
            return
        from torch.distributed.fsdp import fully_shard

        for helper in helpers:
            # A helper that only holds modules says which of them are called.
            units = helper.shard_units() if hasattr(helper, "shard_units") else [helper]  # type: ignore[operator]
            for unit in units:
                if not hasattr(unit, "reshard"):
                    fully_shard(unit, mesh=root.device_mesh["data_parallel"])


class _Gathering(dict[str, Tensor]):
    """Whole tensors on access: a `DTensor` is gathered only when it is read."""

    def __getitem__(self, name: str) -> Tensor:
        value: Any = super().__getitem__(name)
        return value.full_tensor() if hasattr(value, "full_tensor") else value  # type: ignore[no-any-return]
