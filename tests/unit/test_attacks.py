"""Attacks as pure functions: budgets, invariance, and what they must find."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from lightning_compress.audits.attacks import (
    Oracle,
    apgd,
    apgd_targeted,
    embedding_pgd,
    example_seeds,
    fgsm,
    goals,
    noise,
    pgd,
    random_noise,
    robustness_curve,
    square,
    transfer_matrix,
)
from lightning_compress.audits.attacks.auto_pgd import _checkpoints
from lightning_compress.audits.attacks.threat import ball
from lightning_compress.audits.handles import InputSpace
from lightning_compress.errors import CompressionError

UNIT = InputSpace(0.0, 1.0)
ATTACKS = {
    "fgsm": fgsm,
    "pgd": partial(pgd, steps=6),
    "pgd_last": partial(pgd, steps=4, keep="last"),
    "pgd_far": partial(pgd, steps=4, stop=False),
    "apgd": partial(apgd, steps=12, loss="scaled_ce"),
    "apgd_restarts": partial(apgd, steps=6, restarts=2, loss="margin"),
    "apgd_targeted": partial(apgd_targeted, steps=5, targets=2),
    "square": partial(square, queries=12),
    "noise": partial(random_noise, samples=3),
    "gaussian": partial(random_noise, samples=2, kind="gaussian"),
}


def small(shape: tuple[int, ...] = (1, 6, 6), classes: int = 4, seed: int = 0) -> nn.Module:
    """Its classes change in the middle of the inputs, so that some examples are near to a boundary."""
    torch.manual_seed(seed)
    width = torch.Size(shape).numel()
    net = nn.Sequential(nn.Flatten(), nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, classes)).requires_grad_(False)
    net[1].weight *= 3
    net[1].bias.copy_(-net[1].weight.sum(1) / 2)
    net[3].bias.zero_()
    return net


def problem(shape: tuple[int, ...] = (1, 6, 6), count: int = 13, classes: int = 4, seed: int = 1):
    net = small(shape, classes)
    x = torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))
    return net, x, net(x).argmax(1), example_seeds(range(count))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_stays_inside_and_does_not_depend_on_the_batch(name: str, norm: str) -> None:
    net, x, y, seeds = problem()
    eps = {"linf": 0.04, "l2": 0.2}[norm]
    run = partial(ATTACKS[name], eps=eps, norm=norm, space=UNIT)
    whole = run(Oracle(net, 64), x, y, seeds=seeds)
    assert bool(ball(x, eps, norm, UNIT).contains(whole).all())
    assert bool((whole != x).any())
    sevens = run(Oracle(net, 7), x, y, seeds=seeds)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    mixed = torch.cat([run(Oracle(net, 64), x[part], y[part], seeds=seeds[part]) for part in order.split(5)])
    assert torch.equal(whole, sevens)
    assert torch.equal(whole[order], mixed)
    others = run(Oracle(net, 64), x, y, seeds=example_seeds(range(len(x)), seed=1))
    if name != "fgsm":
        assert not torch.equal(whole, others)  # the control: other seeds are other results


def drawn_for_a_batch(oracle: Oracle, x: torch.Tensor, y: torch.Tensor, restarts: int = 2, **given: Any):
    """PGD as it is mostly written: batch after batch, and `torch.rand` gives each restart of a batch its start."""
    torch.manual_seed(0)
    parts = []
    for places in torch.arange(len(x)).split(oracle.batch_size):
        some, points = x[places], []
        for _ in range(restarts):
            start = some + given["eps"] * (2 * torch.rand(some.shape) - 1)
            points.append(pgd(oracle, some, y[places], start=start, seeds=example_seeds(places), **given))
        fell = (oracle(points[0]).argmax(1) != y[places]).view(-1, *[1] * (x.dim() - 1))
        parts.append(torch.where(fell, points[0], points[1]))
    return torch.cat(parts)


def test_a_start_that_is_drawn_for_a_batch_depends_on_it() -> None:
    """The control of the test above: the same comparison tells an attack that draws for a batch."""
    net, x, y, seeds = problem()
    given: dict[str, Any] = {"eps": 0.04, "norm": "linf", "space": UNIT, "steps": 4, "keep": "last"}
    ours = [pgd(Oracle(net, size), x, y, seeds=seeds, restarts=2, **given) for size in (64, 7)]
    theirs = [drawn_for_a_batch(Oracle(net, size), x, y, **given) for size in (64, 7)]
    again = drawn_for_a_batch(Oracle(net, 7), x, y, **given)
    assert torch.equal(ours[0], ours[1])
    assert not torch.equal(theirs[0], theirs[1])
    assert torch.equal(theirs[1], again)  # it is the batch, not chance


def test_a_batch_of_another_size_is_another_calculation() -> None:
    """The control of the first: without rows filled up, the last bit may depend on the size of the batch."""
    net, x, y, seeds = problem((1, 16, 16), 23)
    calls: list[int] = []

    def counted(points: torch.Tensor) -> torch.Tensor:
        calls.append(len(points))
        return net(points)

    apgd(Oracle(counted, 7, align=8), x, y, eps=0.02, space=UNIT, seeds=seeds, steps=3)
    assert {size % 8 for size in calls} == {0}
    calls.clear()
    apgd(Oracle(counted, 7, align=1), x, y, eps=0.02, space=UNIT, seeds=seeds, steps=3)
    assert max(calls) == 7


def test_noise_belongs_to_the_example() -> None:
    seeds = example_seeds([4, 8, 15])
    assert torch.equal(noise.normal(seeds, (2, 3))[1:], noise.normal(example_seeds([8, 15]), (2, 3)))
    assert not torch.equal(noise.uniform(seeds, (5,))[0], noise.uniform(seeds, (5,))[1])
    assert not bool((noise.derive(seeds, "a") == noise.derive(seeds, "b")).any())
    assert bool((example_seeds(["a", "b"], 1) == example_seeds(["a", "b"], 1)).all())
    with pytest.raises(CompressionError, match="occur more than once"):
        example_seeds([1, 1])
    with pytest.raises(CompressionError, match="whole numbers"):
        example_seeds(torch.rand(3))


def test_noise_has_its_distribution() -> None:
    seeds = torch.arange(400)
    drawn, bell = noise.uniform(seeds, (500,), -1, 1).double(), noise.normal(seeds, (500,)).double()
    assert abs(float(drawn.mean())) < 0.005
    assert float(drawn.var()) == pytest.approx(1 / 3, abs=0.005)
    assert abs(float(bell.mean())) < 0.01
    assert float((bell**4).mean()) == pytest.approx(3, abs=0.1)
    neighbours = (drawn[:, 1:] * drawn[:, :-1]).mean(), (drawn[1:] * drawn[:-1]).mean()
    assert all(abs(float(value)) < 0.005 for value in neighbours)
    counts = torch.bincount(noise.integers(seeds, 7, (300,)).flatten(), minlength=7) / 120_000
    assert float((counts - 1 / 7).abs().max()) < 0.005


def test_the_steps_of_apgd_are_checked_where_the_paper_says() -> None:
    assert list(_checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert list(_checkpoints(5)) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["apgd", "pgd", "square"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_of_a_linear_classifier_they_find_what_there_is(name: str, norm: str) -> None:
    """Two classes and no bounds: an example falls if and only if its margin is below eps times the dual norm."""
    torch.manual_seed(0)
    net = nn.Linear(12, 2).requires_grad_(False)
    x, wide = torch.randn(24, 12), InputSpace(-100.0, 100.0)
    z = net(x)
    y, weight = z.argmax(1), (net.weight[0] - net.weight[1]).double()
    dual = weight.abs().sum() if norm == "linf" else weight.norm()
    distance = (z[:, 0] - z[:, 1]).double().abs() / dual
    eps = float(distance.median())
    attack = {"apgd": partial(apgd, steps=25, loss="margin"), "pgd": pgd, "square": partial(square, queries=100)}[name]
    found = attack(net, x, y, eps=eps, norm=norm, space=wide, seeds=example_seeds(range(24)))
    fell = net(found).argmax(1) != y
    slack = {"apgd": 1e-3, "pgd": 0.02, "square": 0.6}[name]
    assert bool(fell[distance < eps * (1 - slack)].all())
    assert not bool(fell[distance > eps * (1 + 1e-4)].any())


@pytest.mark.parametrize("loss", ["scaled_ce", "dlr", "margin"])
def test_the_scale_of_logits_changes_nothing(loss: str) -> None:
    net, x, y, seeds = problem()
    run = partial(apgd, x=x, y=y, eps=0.05, space=UNIT, seeds=seeds, steps=8, loss=loss)
    assert torch.equal(run(net), run(lambda points: net(points) * 1024))


def test_cross_entropy_as_published_is_fooled_by_the_scale() -> None:
    """The control of the test above."""
    net, x, y, seeds = problem()
    right = [
        int(
            (
                net(apgd(lambda p, s=s: net(p) * s, x, y, eps=0.05, space=UNIT, seeds=seeds, steps=8)).argmax(1) == y
            ).sum()
        )
        for s in (1, 1e5)
    ]
    assert right[1] > right[0]


@pytest.mark.parametrize("shape", [(9,), (2, 5), (1, 4, 4)])
@pytest.mark.parametrize(("classes", "losses"), [(1, ["scaled_ce", "margin"]), (2, ["ce"]), (3, ["dlr", "targeted"])])
def test_few_classes_one_example_and_tables(shape: tuple[int, ...], classes: int, losses: list[str]) -> None:
    net = small(shape, classes)
    x = torch.rand(1, *shape)
    y = goals.logits_of(net(x)).argmax(1)
    for loss in losses:
        common = {"eps": 0.9, "space": UNIT, "seeds": example_seeds([7])}
        attack = partial(apgd_targeted, targets=9) if loss == "targeted" else partial(apgd, loss=loss)
        found = attack(net, x, y, steps=5, **common)
        assert found.shape == x.shape
    found = square(net, x, y, eps=0.9, space=UNIT, seeds=example_seeds([7]), queries=5)
    assert found.shape == x.shape


def test_what_fell_is_not_asked_again() -> None:
    net, x, y, seeds = problem(count=30)
    wrong = (y + 1) % 4
    oracle = Oracle(net)
    assert torch.equal(pgd(oracle, x, wrong, eps=0.1, space=UNIT, seeds=seeds), x)
    assert (oracle.rows, oracle.gradient_rows) == (30, 0)
    oracle = Oracle(net)
    pgd(oracle, x, y, eps=0.0, space=UNIT, seeds=seeds, steps=3)
    assert oracle.rows == 30 * 5  # nobody falls: clean, three steps, and the last look
    oracle = Oracle(net)
    pgd(oracle, x, y, eps=0.5, space=UNIT, seeds=seeds, steps=20)
    assert oracle.rows < 30 * 10


def test_fixed_entries_and_units() -> None:
    torch.manual_seed(0)
    low, high = torch.tensor([0.0, 0.0, -5.0]), torch.tensor([1.0, 1000.0, 5.0])
    space = InputSpace(low, high, mutable=torch.tensor([True, True, False]))
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).requires_grad_(False)
    x = low + torch.rand(12, 3) * (high - low)
    y, seeds = net(x).argmax(1), example_seeds(range(12))
    for attack in (fgsm, pgd, apgd, partial(square, queries=10), random_noise):
        for norm in ("linf", "l2"):
            found = attack(net, x, y, eps=0.1, norm=norm, space=space, seeds=seeds, scale=high - low)
            change = (found - x) / (high - low)
            assert torch.equal(found[:, 2], x[:, 2])
            size = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
            assert float(size.max()) <= 0.1 + 1e-5


def test_gradients_of_squares_that_underflow_still_have_a_direction() -> None:
    around = ball(torch.full((1, 4), 0.5), 0.1, "l2", UNIT)
    direction = around.direction(torch.full((1, 4), 1e-30))
    assert float(direction.norm()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.rand(4, 1, 6, 6) * 3}, "outside the declared bounds"),
        ({"x": torch.zeros(4, 1, 6, 6, dtype=torch.int64)}, "Attack embeddings instead"),
        ({"y": torch.tensor([0, 1, 2, 4])}, "Labels go from 0 to 4"),
        ({"y": torch.rand(4)}, "Labels are whole numbers"),
        ({"eps": -1.0}, "not negative"),
        ({"norm": "l1"}, "is not one of"),
        ({"loss": "hinge"}, "is not one of"),
        ({"seeds": torch.rand(4)}, "int64 seeds"),
        ({"steps": 0}, "have to be positive"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    net, x, y, seeds = problem(count=4)
    arguments = {"x": x, "y": y, "eps": 0.1, "space": UNIT, "seeds": seeds, **change}
    with pytest.raises(CompressionError, match=message):
        apgd(net, **arguments)


def test_a_model_without_gradients_is_no_robust_model() -> None:
    net, x, y, seeds = problem(count=6)

    def rounded(points: torch.Tensor) -> torch.Tensor:
        return (net(points).detach() * 8).round() / 8

    for attack in (fgsm, pgd, apgd, apgd_targeted):
        with pytest.raises(CompressionError, match="gives no gradient"):
            attack(rounded, x, y, eps=0.1, space=UNIT, seeds=seeds)
    found = square(rounded, x, y, eps=0.5, space=UNIT, seeds=seeds, queries=40)
    assert bool((rounded(found).argmax(1) != y).any())


def test_outputs_that_are_not_finite_are_an_error() -> None:
    net, x, y, seeds = problem(count=3)
    with pytest.raises(CompressionError, match="NaN or infinite"):
        apgd(lambda p: net(p) * torch.tensor(float("nan")), x, y, eps=0.1, space=UNIT, seeds=seeds)


def test_dlr_needs_three_classes() -> None:
    net = small(classes=2)
    x = torch.rand(3, 1, 6, 6)
    with pytest.raises(CompressionError, match="Use loss='margin'"):
        apgd(net, x, net(x).argmax(1), eps=0.1, space=UNIT, seeds=example_seeds(range(3)), loss="dlr")


def test_modes_of_the_caller_change_nothing() -> None:
    net, x, y, seeds = problem(count=5)
    run = partial(apgd, net, eps=0.1, space=UNIT, seeds=seeds, steps=4)
    plain = run(x, y)
    with torch.inference_mode():
        assert torch.equal(run(x.clone(), y.clone()), plain)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        found = run(x, y)
    assert torch.equal(found, plain)
    assert found.grad_fn is None


def test_regression_and_many_positions() -> None:
    torch.manual_seed(0)
    x = torch.rand(5, 8)
    net = nn.Linear(8, 1).requires_grad_(False)
    goal = goals.regression(0.05)
    found = pgd(net, x, net(x), eps=0.3, space=UNIT, seeds=example_seeds(range(5)), loss=goal)
    assert bool(goal.fallen(net(found), net(x)).all())
    image = torch.rand(3, 2, 5, 5)
    conv = nn.Conv2d(2, 3, 3, padding=1).requires_grad_(False)
    y = conv(image).argmax(1)
    y[:, 0] = goals.IGNORED
    many = goals.positions(0.9)
    found = apgd(conv, image, y, eps=0.9, space=UNIT, seeds=example_seeds(range(3)), steps=30, loss=many)
    before, after = many.value(conv(image), y), many.value(conv(found), y)
    assert float(after.min()) > 0.5 > float(before.max())


def test_a_curve_has_the_outcomes_of_a_loop_for_a_third_of_the_price() -> None:
    net, x, y, seeds = problem(count=48)
    radii = [0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1]
    attack, oracle, loop, rows = partial(apgd, steps=12, loss="margin"), Oracle(net), [], 0
    curve = robustness_curve(attack, oracle, x, y, radii=radii, space=UNIT, seeds=seeds)
    for radius in radii:
        plain = Oracle(net)
        points = attack(plain, x, y, eps=radius, space=UNIT, seeds=seeds, stop=False)
        loop.append(net(points).argmax(1) == y)
        rows += plain.rows
    assert torch.equal(curve.robust, torch.stack(loop, 1))
    assert 0.1 < float(curve.robust.double().mean()) < 0.9  # something happens
    assert rows >= 3 * oracle.rows == 3 * curve.rows
    accuracy = curve.accuracy
    area = torch.trapezoid(accuracy, torch.tensor([0.0, *radii], dtype=torch.float64)) / radii[-1]
    assert float(curve.area.mean()) == pytest.approx(float(area), abs=1e-6)
    with pytest.raises(CompressionError, match="ascending"):
        robustness_curve(attack, net, x, y, radii=[0.2, 0.1], space=UNIT, seeds=seeds)


def test_transfer_of_a_model_to_itself_is_its_own_attack() -> None:
    net, x, y, seeds = problem(count=20)
    other = small(seed=5)
    attack = partial(pgd, eps=0.05, space=UNIT, seeds=seeds, stop=False)
    found = transfer_matrix({"a": net, "b": other}, {"a": net, "b": other}, x, y, attack)
    assert sorted(found.robust) == [("a", "a"), ("a", "b"), ("b", "a"), ("b", "b")]
    assert found.rate("a", "a") < found.rate("b", "a")


class Tokens(nn.Module):
    """Token ids and a mask; positions are embedded too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places, self.head = nn.Embedding(20, 8), nn.Embedding(6, 8), nn.Linear(8, 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        h = torch.tanh(self.words(input_ids) + self.places(torch.arange(input_ids.shape[1])))
        mask = attention_mask[..., None].to(h)
        return {"logits": self.head((h * mask).sum(1) / mask.sum(1))}


def test_embeddings_of_token_models() -> None:
    net = Tokens().requires_grad_(False)
    ids = torch.randint(1, 20, (9, 6), generator=torch.Generator().manual_seed(0))
    ids[:, 4:] = 0
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    y, seeds = net(**inputs)["logits"].argmax(1), example_seeds(range(9))
    found, view = embedding_pgd(net, inputs, y, eps=1.0, seeds=seeds, fixed=(0,), batch_size=4)
    rows = torch.arange(9)
    assert view.name == "words"
    assert torch.equal(view(view.vectors, rows=rows), net(**inputs)["logits"])
    assert torch.equal(found[:, 4:], view.vectors[:, 4:])
    assert int((view(found, rows=rows).argmax(1) == y).sum()) < 5
    again, _ = embedding_pgd(net, inputs, y, eps=1.0, seeds=seeds, fixed=(0,), batch_size=64)
    assert torch.equal(found, again)
    with pytest.raises(CompressionError, match="nothing to move"):
        embedding_pgd(net, inputs, y, eps=1.0, seeds=seeds, fixed=tuple(range(20)))
    with pytest.raises(CompressionError, match="0 embeddings"):
        embedding_pgd(nn.Linear(6, 3), ids.float(), y, eps=1.0, seeds=seeds)
