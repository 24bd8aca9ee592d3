"""What two processes do in the tests of attacks: each attacks its share, and the shares come together."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_compress.audits.attacks import Oracle, apgd, example_seeds, pgd, random_noise, square
from lightning_compress.audits.context import AuditContext, alone
from lightning_compress.audits.corruption_robustness import CorruptionRobustness
from lightning_compress.audits.guard import audit_context
from lightning_compress.audits.handles import InputSpace, ModelHandle
from lightning_compress.audits.robustness import Robustness
from lightning_compress.audits.tasks import Classification

UNIT, COUNT = InputSpace(0.0, 1.0), 22
ATTACKS = {"pgd": pgd, "apgd": apgd, "square": square, "noise": random_noise}
SETTINGS: dict[str, dict[str, Any]] = {"pgd": {"steps": 8}, "apgd": {"steps": 8}, "square": {"queries": 8}}


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(288, 5)).requires_grad_(False)
    model[0].weight *= 4
    model[0].bias.copy_(-model[0].weight.sum((1, 2, 3)) / 2)
    return model


def share(rank: int, world: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.rand(COUNT, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return x[rank::world], net(0)(x).argmax(1)[rank::world], torch.arange(COUNT)[rank::world]


def points(rank: int = 0, world: int = 1, batch_size: int = 64) -> dict[str, Tensor]:
    x, y, ids = share(rank, world)
    given: dict[str, Any] = {"eps": 0.06, "space": UNIT, "seeds": example_seeds(ids)}
    found = {}
    for name, attack in ATTACKS.items():
        for norm in ("linf", "l2"):
            common = {**given, "norm": norm, "eps": 0.06 if norm == "linf" else 0.25, **SETTINGS.get(name, {})}
            found[f"{name}_{norm}"] = attack(Oracle(net(0), batch_size), x, y, **common)
    return found


def audited(rank: int = 0, world: int = 1, batch_size: int = 64) -> dict[str, Any]:
    x, y, ids = share(rank, world)

    def all_gather(value: Any) -> list[Any]:
        parts: list[Any] = [None] * world
        dist.all_gather_object(parts, value)
        return parts

    handles = [ModelHandle(net(seed).eval(), space=UNIT) for seed in (0, 1)]
    context = AuditContext(*handles, Classification(), x, y, ids, all_gather=alone if world == 1 else all_gather)
    found = {}
    with audit_context(*context.modules):
        for audit in (
            Robustness(eps=0.06, steps=6, queries=6, sanity=False, batch_size=batch_size),
            CorruptionRobustness(severities=[1, 5], batch_size=batch_size),
        ):
            result = audit.run(context)
            found[audit.name] = {
                "per_example": result.per_example,
                "metrics": [(m.name, m.value, m.lo, m.hi, m.paired.delta, m.n) for m in result.metrics if m.paired],
            }
    return found


def of_a_rank() -> dict[str, Any]:
    dist.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    rank, world = dist.get_rank(), dist.get_world_size()
    return {"points": points(rank, world, batch_size=7), "audits": audited(rank, world, batch_size=7)}
