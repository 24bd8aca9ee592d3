"""Does compression hide the training data, or show it? Membership attacks on dense, pruned and rounded digits.

A small network overfits half of scikit-learn's 1797 digits, of which a tenth have wrong labels; it is then pruned to
20 % of its weights and trained on, or rounded to 4 bits. Each model is attacked by thresholds, by RMIA with one
reference model, by LiRA with shadows that are compressed alike, and by an attacker who holds both models. The control
is LiRA against the same compressed models with the same shadows as they were before they were compressed. Inversion is
judged by a model that was trained on other digits. Mean and standard deviation over seeds.

Run: python benchmarks/privacy.py [--seeds 3] [--shadows 8] [--steps 200]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import nn

from lightning_compress.audits.context import AuditContext
from lightning_compress.audits.data import Examples
from lightning_compress.audits.guard import audit_context
from lightning_compress.audits.handles import InputSpace, ModelHandle
from lightning_compress.audits.privacy.inversion import Inversion
from lightning_compress.audits.privacy.membership import Membership
from lightning_compress.audits.privacy.shadow_models import LikelihoodRatio
from lightning_compress.audits.tasks import Classification

SPACE = InputSpace(0.0, 1.0)
Shrink = Callable[[nn.Module, Examples, int], nn.Module]


def data(seed: int) -> Examples:
    """Digits in random order; a tenth of the labels are wrong."""
    raw = load_digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(raw.target), generator=generator)
    x = torch.tensor(raw.images, dtype=torch.float32)[order, None] / 16
    y = torch.tensor(raw.target)[order]
    wrong = torch.rand(len(y), generator=generator) < 0.1
    return Examples(x, torch.where(wrong, (y + 1) % 10, y), torch.arange(len(y)))


def train(net: nn.Module, examples: Examples, seed: int, steps: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    kept = [(p, (p != 0).float()) for p in net.parameters() if p.dim() > 1 and bool((p == 0).any())]
    for _ in range(steps):
        i = torch.randint(len(examples), (128,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(examples.inputs[i]), examples.targets[i]).backward()
        optimizer.step()
        with torch.no_grad():
            for weight, mask in kept:
                weight.mul_(mask)
    return net.eval()


def dense(examples: Examples, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return train(net, examples, seed, 400)


def pruned(net: nn.Module, examples: Examples, seed: int) -> nn.Module:
    small = copy.deepcopy(net)
    with torch.no_grad():
        for weight in (p for p in small.parameters() if p.dim() > 1):
            weight.mul_(weight.abs() > weight.abs().flatten().quantile(0.8))
    return train(small, examples, seed, 60)


def rounded(net: nn.Module, examples: Examples, seed: int) -> nn.Module:
    small = copy.deepcopy(net)
    with torch.no_grad():
        for weight in (p for p in small.parameters() if p.dim() > 1):
            step = weight.abs().amax(1, keepdim=True) / 7
            weight.copy_((weight / step).round() * step)
    return small.eval()


def measure(shrink: Shrink, seed: int, shadows: int, steps: int) -> dict[str, float]:
    """All attacks on one pair of models; `name` is of the compressed model, `dense_name` of the dense one."""
    pool = data(seed)
    members, others, rest = pool[slice(0, 600)], pool[slice(600, 1200)], pool[slice(1200, None)]
    first = dense(members, 100 + seed)
    kept: dict[int, nn.Module] = {}  # dense shadows
    second, outside = shrink(first, members, seed), shrink(dense(rest, 200 + seed), rest, seed)

    def factory(number: int, examples: Examples) -> tuple[nn.Module, nn.Module]:
        kept[number] = net = dense(examples, 1000 * (seed + 1) + number)
        return net, shrink(net, examples, number)

    handles = [ModelHandle(net, space=SPACE) for net in (first, second, outside)]
    context = AuditContext(
        handles[0], handles[1], Classification(), others.inputs, others.targets, others.ids, seed=seed,
        members=members, nonmembers=others, references={"out": [handles[2]], "evaluator": [handles[2]]},
    )  # fmt: skip
    values: dict[str, float] = {}
    audits = (Membership(), LikelihoodRatio(factory, shadows), Inversion(restarts=2, steps=steps))
    with audit_context(*context.modules, seed=seed):
        for audit in audits:
            started = time.perf_counter()
            for metric in audit.run(context).metrics:
                if metric.value is not None and metric.paired is not None:
                    values[metric.name], values[f"reference_{metric.name}"] = metric.value, metric.paired.reference
            values[f"seconds_{audit.name}"] = time.perf_counter() - started
        for metric in LikelihoodRatio(lambda number, _: kept[number], shadows).run(context).metrics:
            if metric.value is not None:
                values[f"uncompressed_{metric.name}"] = metric.value
    return values


SHOWN = (
    "gap_attack", "auc", "rmia_auc", "both_models_auc", "lira_auc", "lira_both_auc", "lira_tpr_at_10_percent",
    "white_box_recognised", "confidences_recognised",
)  # fmt: skip


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} +- {statistics.stdev(values) if len(values) > 1 else 0.0:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shadows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    result: dict[str, dict[str, float]] = {}
    for name, shrink in (("pruned to 20 %", pruned), ("rounded to 4 bits", rounded)):
        runs = [measure(shrink, seed, arguments.shadows, arguments.steps) for seed in range(arguments.seeds)]
        print(f"\n{name}: reference (dense; for both_models the compressed one alone), compressed")
        for metric in SHOWN:
            pair = [[run[key] for run in runs] for key in (f"reference_{metric}", metric)]
            print(f"  {metric:24s} {spread(pair[0])}   {spread(pair[1])}")
        print("  the same with shadows that were not compressed, and what the others find more:")
        for metric in ("lira_auc", "lira_tpr_at_10_percent"):
            pair = [[run[key] for run in runs] for key in (f"uncompressed_{metric}", metric)]
            more = [right - wrong for wrong, right in zip(*pair, strict=True)]
            print(f"  {metric:24s} {spread(pair[0])}   {spread(more)}")
        for audit in ("membership", "likelihood_ratio", "inversion"):
            print(f"  seconds, {audit}: {spread([run[f'seconds_{audit}'] for run in runs])}")
        result[name] = {key: statistics.mean([run[key] for run in runs]) for key in runs[0]}
    print(json.dumps({"name": "privacy", "seeds": arguments.seeds, "shadows": arguments.shadows, "means": result}))


if __name__ == "__main__":
    main()
