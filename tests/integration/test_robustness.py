"""Robustness of trained networks: integers, large logits, other libraries, other batches."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from attack_nets import EPS, UNIT, context, dense, digits, examples, handle, int8
from torch import Tensor, nn

from lightning_compress.audits import robustness
from lightning_compress.audits.attacks import Oracle, apgd, apgd_targeted, pgd, robustness_curve, square
from lightning_compress.audits.attacks.noise import derive
from lightning_compress.audits.attacks.with_autoattack import autoattack
from lightning_compress.audits.attacks.with_torchattacks import KNOWN, torchattacks_attack
from lightning_compress.audits.audit import run_audits
from lightning_compress.audits.context import AuditContext, Budget
from lightning_compress.audits.corruption_robustness import CorruptionRobustness
from lightning_compress.audits.corruptions import SEVERITIES, corrupt, names
from lightning_compress.audits.embedding_robustness import EmbeddingRobustness
from lightning_compress.audits.guard import audit_context
from lightning_compress.audits.handles import InputSpace, ModelHandle
from lightning_compress.audits.results import AuditResult
from lightning_compress.audits.robustness import Robustness
from lightning_compress.audits.robustness_curve import RobustnessCurve
from lightning_compress.audits.scorecard import Scorecard
from lightning_compress.audits.tasks import Classification, Regression
from lightning_compress.errors import CompressionError
from lightning_compress.isolation import isolated_rng

COMMON: dict[str, Any] = {"eps": EPS, "space": UNIT}
SMALL: dict[str, Any] = {"eps": EPS, "steps": 10, "queries": 40, "sanity": False}


@pytest.fixture(autouse=True)
def _nobody_draws_from_us():
    with isolated_rng(0):
        yield


def run(audit: Any, given: AuditContext) -> AuditResult:
    with audit_context(*given.modules, seed=given.seed):
        result: AuditResult = audit.run(given)
    assert AuditResult.from_dict(result.to_dict()).metrics[0].name == result.metrics[0].name
    return result


def right(model: Any, points: Tensor, y: Tensor) -> Tensor:
    return model(points).argmax(1) == y


# ------------------------------------------------------------------------------------------------------ other libraries
def test_pgd_is_that_of_torchattacks() -> None:
    torchattacks = pytest.importorskip("torchattacks", reason="pip install --no-deps torchattacks==3.5.1")
    x, y, seeds = examples(40)
    net = dense()
    for steps, alpha in ((1, 0.1), (8, 0.02)):
        theirs = torchattacks.PGD(net, eps=EPS, alpha=alpha, steps=steps, random_start=False)(x, y)
        ours = pgd(net, x, y, **COMMON, seeds=seeds, steps=steps, alpha=alpha, loss="ce", start=x, keep="last")
        assert torch.equal(ours, theirs)
    start = (x + 0.05 * torch.randn_like(x)).clamp(0, 1)
    kept = pgd(net, x, y, **COMMON, seeds=seeds, steps=3, alpha=0.02, loss="ce", start=start, keep="last")
    assert not torch.equal(
        kept, pgd(net, x, y, **COMMON, seeds=seeds, steps=3, alpha=0.02, loss="ce", start=x, keep="last")
    )


@pytest.mark.parametrize("name", ["dense", "pruned", "int8", "int8, half", "int8, fifth"])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.06), ("l2", 0.3)])
def test_apgd_finds_as_much_as_theirs(name: str, norm: str, eps: float) -> None:
    """At most one point, one example here, above torchattacks' and pyautoattack's APGD of as many steps."""
    pytest.importorskip("torchattacks", reason="pip install --no-deps torchattacks==3.5.1")
    pytest.importorskip("pyautoattack", reason="pip install pyautoattack")
    x, y, seeds = examples(100)
    model = handle(name)
    given: dict[str, Any] = {"eps": eps, "norm": norm, "space": UNIT, "seeds": seeds}
    with audit_context(*model.modules):
        ours = right(model.predict, apgd(model.differentiable, x, y, steps=20, **given), y)
        theirs = torchattacks_attack("APGD", model.differentiable, x, y, steps=20, scale_logits=False, **given)
    assert 5 < int(ours.sum()) < 80
    assert int(ours.sum()) <= int(right(model.predict, theirs, y).sum()) + 1
    if name in ("dense", "pruned", "int8"):
        with audit_context(*model.modules):
            published = autoattack(model.differentiable, x, y, attacks=["apgd-ce"], scale_logits=False, **given)
            long = right(model.predict, apgd(model.differentiable, x, y, steps=100, **given), y)
        assert int(long.sum()) <= int(right(model.predict, published, y).sum()) + 1


def test_every_attack_of_torchattacks_by_name() -> None:
    """None leaves the ball, moves the model's modes, gradients or random numbers, prints, or depends on eps = 0."""
    pytest.importorskip("torchattacks", reason="pip install --no-deps torchattacks==3.5.1")
    x, _, seeds = examples(3)
    coloured = InputSpace(-1.0, 3.0)  # so that attacks written for three channels run too, and for another range
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(100, 4))
    net[1].eval()  # frozen, in a model that trains
    images = x.expand(-1, 3, -1, -1) * 4 - 1
    labels = net.eval()(images).argmax(1)
    net.train()
    net[1].eval()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    for name, known in KNOWN.items():
        if name in ("AutoAttack", "SparseFool"):
            continue  # minutes
        for norm in known.norms:
            before = torch.get_rng_state()
            more = {"popsize": 4} if name == "OnePixel" else {"restarts": 2} if name == "Pixle" else {}
            more = {"nb_sample": 4} if name == "SPSA" else more
            eps = {"linf": 0.2, "l2": 1.0, "l0": 3.0}[norm]
            found = torchattacks_attack(
                name, net, images, labels, eps=eps, norm=norm, space=coloured, seeds=seeds, steps=2, **more
            )
            change = (found - images).flatten(1)
            size = {"linf": change.abs().amax(1), "l2": change.norm(dim=1)}.get(norm, torch.zeros(1))
            assert float(size.max()) <= eps * (1 + 1e-5), name
            assert float(found.min()) >= -1, name
            assert float(found.max()) <= 3, name
            assert torch.equal(before, torch.get_rng_state()), name
            assert [m.training for m in net] == [True, False, True, True, True], name
            assert bool((net[0].weight.grad == 1).all()), name
            assert found.grad_fn is None, name


def test_faults_of_torchattacks_cannot_pass() -> None:
    torchattacks = pytest.importorskip("torchattacks", reason="pip install --no-deps torchattacks==3.5.1")
    x, y, seeds = examples(12)
    artifact, _ = int8()
    model = ModelHandle(artifact, space=UNIT)
    given: dict[str, Any] = {**COMMON, "seeds": seeds}
    for name in ("PGD", "CW", "EADL1", "DeepFool", "FAB"):  # some of these would report a robust model
        with pytest.raises(CompressionError, match="no gradient"):
            torchattacks_attack(name, model.predict, x, y, **given)
    with pytest.raises(CompressionError, match="outside the declared bounds"):
        torchattacks_attack("PGD", dense(), (x - 0.5) / 0.5, y, **given)
    with pytest.raises(CompressionError, match="is none of"):
        torchattacks_attack("PGDD", dense(), x, y, **given)
    # Of large logits theirs finds next to nothing, in the view it finds as much as of usual ones.
    plain = right(dense(), torchattacks_attack("PGD", dense(), x, y, **given), y)
    large = right(dense(), torchattacks_attack("PGD", lambda p: dense()(p) * 1000, x, y, **given), y)
    naive = torchattacks.PGD(nn.Sequential(dense(), Times(1000)).eval(), eps=EPS, alpha=0.005, steps=50)(x, y)
    assert int(large.sum()) <= int(plain.sum()) + 1
    assert int(right(dense(), naive, y).sum()) > int(plain.sum()) + 1


class Times(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, z: Tensor) -> Tensor:
        return z * self.by


# ------------------------------------------------------------------------------------------------------------- integers
def test_of_an_integer_model_no_more_is_reported_than_the_worst_of_its_attacks() -> None:
    model = handle("int8")
    x, y, seeds = examples(64)
    result = run(Robustness(**SMALL), context(model))
    metric = result["robust_accuracy"]
    given: dict[str, Any] = {**COMMON, "seeds": seeds}
    with audit_context(*model.modules):
        alone = {
            "ste": apgd(model.differentiable, x, y, steps=10, loss="scaled_ce", **given),
            "twin": pgd(int8()[1], x, y, stop=False, **given),
            "dense": pgd(dense(), x, y, stop=False, **given),
            "square": square(model.predict, x, y, queries=40, **given),
        }
        shares = {name: float(right(model.predict, points, y).double().mean()) for name, points in alone.items()}
        naive = float(right(model.predict, x, y).double().mean())
    assert metric.value <= min(shares.values()) + 1 / 64
    assert metric.value < naive - 0.3  # the control: an attack that sees no gradient leaves the clean accuracy
    assert (metric.threat["via"], metric.trusted) == ("ste", True), [c for c in metric.trust if not c.ok]
    assert {"apgd-ce", "apgd-dlr", "transfer from dense", "transfer from twin", "square"} <= set(
        metric.threat["attacks"]
    )
    pairs = {(row[0], row[1]) for row in next(a for a in result.artifacts if a["name"] == "transfer")["rows"]}
    assert pairs == {(a, b) for a in ("dense", "compressed", "twin") for b in ("dense", "compressed", "twin")}


def test_stock_cw_calls_integers_robust_and_nothing_here_does() -> None:
    """Its norm term has a gradient, so nothing raises, nothing moves, and the clean accuracy comes out as robust."""
    torchattacks = pytest.importorskip("torchattacks", reason="pip install --no-deps torchattacks==3.5.1")
    x, y, seeds = examples(32)
    model = handle("int8")

    class Ships(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return model.deployed.run(images)

    attack = torchattacks.CW(Ships().eval(), steps=20)
    attack.set_device("cpu")
    points = attack(x, y)
    assert float((points - x).abs().max()) < 1e-6
    clean, said = (float(right(model.predict, images, y).double().mean()) for images in (x, points))
    assert said == clean
    assert (
        float((torchattacks.CW(dense(), steps=20)(x, y) - x).abs().max()) > 0.01
    )  # of a model with a gradient it does
    for given in (Ships().eval(), model.predict):
        with pytest.raises(CompressionError, match="no gradient"):
            torchattacks_attack("CW", given, x, y, **COMMON, seeds=seeds)
    assert run(Robustness(**SMALL), context(model, 32))["robust_accuracy"].value < said - 0.3


def test_an_integer_model_without_a_twin_is_not_trusted() -> None:
    result = run(Robustness(**SMALL), context(ModelHandle(int8()[0], space=UNIT), 24))
    metric = result["robust_accuracy"]
    assert metric.verdict == "UNTRUSTED"
    assert {check.check for check in metric.trust if not check.ok} >= {"gradient", "white_box"}
    assert "square" in metric.threat["attacks"]  # and still it was attacked


class Deep:
    """An audit of tier 2."""

    name, family, tier = "deep", "robustness", 2

    def run(self, given: AuditContext) -> AuditResult:
        return AuditResult(self.name)


def test_targeted_attacks_count_and_run_in_audits_of_tier_two() -> None:
    given = context(handle("pruned"), 48)
    few = {**SMALL, "eps": 0.08, "steps": 1, "queries": 1}
    without, aimed = run(Robustness(**few), given), run(Robustness(**few, targets=3), given)
    assert "apgd-targeted" not in without["robust_accuracy"].threat["attacks"]
    assert "apgd-targeted" in aimed["robust_accuracy"].threat["attacks"]
    x, y, seeds = examples(48)
    for name in ("dense", "compressed"):
        model = getattr(given, name)
        before, after = (torch.tensor(result.per_example[f"{name}_robust"]) for result in (without, aimed))
        assert bool((after <= before).all())
        # The oracle: what fell to it alone, towards each class in turn.
        stood = right(model.predict, x, y) & (before > 0)
        seeds_of = derive(seeds, "apgd-targeted")
        points = apgd_targeted(model.differentiable, x, y, eps=0.08, space=UNIT, seeds=seeds_of, steps=1, targets=3)
        assert bool((after[stood & ~right(model.predict, points, y)] == 0).all())
    left = {row[1]: row[2] for row in aimed.artifacts[0]["rows"] if row[0] == "dense"}
    assert left["apgd-targeted"] < left["apgd-dlr"]  # it found what the others had left standing
    for audits, attacks in (([Robustness(**few)], False), ([Robustness(**few), Deep()], True)):
        _, results = run_audits(given, audits, [])
        assert ("apgd-targeted" in results[0]["robust_accuracy"].threat["attacks"]) == attacks
        assert results[0].params["targets"] == 3 * attacks


def test_attacks_of_other_libraries_are_rungs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchattacks", reason="pip install --no-deps torchattacks==3.5.1")
    pytest.importorskip("pyautoattack", reason="pip install --no-deps pyautoattack")
    first = partial(autoattack, attacks=["apgd-ce"])  # the other three take half a minute
    monkeypatch.setattr(robustness, "autoattack", first)
    given = context(handle("pruned"), 12)
    few = {**SMALL, "eps": 0.05, "steps": 5, "queries": 1, "sanity": False}
    without = run(Robustness(**few), given)
    found = run(Robustness(**few, foreign=["PGD", "pyautoattack"]), given)
    assert found["robust_accuracy"].threat["attacks"][-2:] == ["PGD", "pyautoattack"]
    x, y, seeds = examples(12)
    theirs = first(given.compressed.differentiable, x, y, eps=0.05, space=UNIT, seeds=seeds)
    stands = right(given.compressed.predict, theirs, y)
    before, after = (torch.tensor(result.per_example["compressed_robust"]) for result in (without, found))
    assert bool((after <= before).all())
    assert bool((after[~stands] == 0).all())
    with pytest.raises(CompressionError, match="linf"):
        run(Robustness(**few, foreign=["PGDL2"]), given)
    with pytest.raises(ValueError, match="list of names"):
        Robustness(foreign="CW")


class Leak(nn.Module):
    """Integers with a thin float path beside them: its gradient exists and is useless."""

    def __init__(self) -> None:
        super().__init__()
        self.net = dense()
        self.thin = nn.Linear(49, 10)
        with isolated_rng(1):
            nn.init.normal_(self.thin.weight)

    def forward(self, x: Tensor) -> Tensor:
        return (self.net(x) * 8).round().detach() / 8 + 1e-3 * self.thin(x.flatten(1))


def test_a_useless_gradient_is_not_trusted() -> None:
    result = run(Robustness(**SMALL), context(ModelHandle(Leak().eval(), space=UNIT), 32))
    failed = [check.check for check in result["robust_accuracy"].trust if not check.ok]
    assert "gradient" in failed
    assert result["robust_accuracy"].verdict == "UNTRUSTED"


# --------------------------------------------------------------------------------------------------------------- logits
@pytest.mark.parametrize("scale", [1000.0])
def test_the_scale_of_logits_does_not_make_a_model_robust(scale: float) -> None:
    large = ModelHandle(nn.Sequential(dense(), Times(scale)).eval(), space=UNIT)
    result = run(Robustness(**SMALL), context(large))
    metric = result["robust_accuracy"]
    assert abs(metric.paired.delta) <= 0.02
    assert metric.trusted
    assert any("has no gradient left" in warning for warning in result.warnings)
    x, y, seeds = examples(64)  # the control: plain PGD believes it
    fooled = pgd(large.differentiable, x, y, **COMMON, seeds=seeds, steps=10, loss="ce")
    assert float(right(large.predict, fooled, y).double().mean()) > metric.value + 0.3


# --------------------------------------------------------------------------------------------------------------- audits
def test_a_model_against_itself() -> None:
    for audit in (Robustness(eps=EPS, steps=10, queries=40), CorruptionRobustness(severities=[1, 5])):
        result = run(audit, context(handle("dense"), 48))
        for metric in result.metrics:
            assert metric.paired.delta == 0, metric.name
            assert metric.verdict in ("PASS", "INCONCLUSIVE", None), metric
        assert result.metrics[0].trusted, [c for c in result.metrics[0].trust if not c.ok]
    assert result["mean_corruption_error"].value == 1


def test_the_audit_leaves_no_trace_and_repeats_itself() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(100, 10)
    )
    net.train()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    before, rng = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    given = context(ModelHandle(net, space=UNIT), 24)
    first, second = run(Robustness(**SMALL), given), run(Robustness(**{**SMALL, "batch_size": 7}), given)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert net.training
    assert bool((net[0].weight.grad == 1).all())
    assert torch.equal(rng, torch.get_rng_state())
    assert first.per_example == second.per_example
    assert first["robust_accuracy"].value == second["robust_accuracy"].value


def test_sanity_checks_fail_where_they_should() -> None:
    class Wobbly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls = dense(), 0

        def forward(self, x: Tensor) -> Tensor:
            object.__setattr__(self, "calls", self.calls + 1)
            return self.net(x) + (self.calls % 2) * 5 * torch.linspace(0, 1, 10)

    failed = run(Robustness(**{**SMALL, "sanity": True}), context(ModelHandle(Wobbly().eval(), space=UNIT), 24))
    assert "deterministic" in {c.check for c in failed["robust_accuracy"].trust if not c.ok}

    class Masked(nn.Module):
        """Sees its input in steps, with the gradient of what it would be without: autograd points the wrong way."""

        def forward(self, x: Tensor) -> Tensor:
            z = dense()(x)
            return z.detach() - 0.5 * (z - z.detach())

    masked = run(Robustness(**{**SMALL, "queries": 150}), context(ModelHandle(Masked().eval(), space=UNIT), 32))
    names_of = {c.check for c in masked["robust_accuracy"].trust if not c.ok}
    assert "gradient" in names_of
    assert names_of & {"white_box_beats_square", "white_box_beats_transfer from dense"}


def test_the_curve_of_two_models() -> None:
    result = run(RobustnessCurve([0.02, 0.05, 0.1, 0.2], steps=10), context(handle("pruned"), 48))
    metric, curve = result["auc"], result.artifacts[0]
    first, *_ = curve["series"]
    assert first["name"] == "dense"
    assert first["points"][0] == [0.0, pytest.approx(sum(right(dense(), *examples(48)[:2]).tolist()) / 48)]
    for series in curve["series"]:
        radii, heights = zip(*series["points"], strict=True)
        assert all(a >= b for a, b in itertools.pairwise(heights))
        area = torch.trapezoid(torch.tensor(heights), torch.tensor(radii)) / 0.2
        assert min(abs(float(area) - value) for value in (metric.value, metric.paired.reference)) < 1e-6
    assert metric.paired.lo <= metric.paired.delta <= metric.paired.hi
    assert metric.trusted, [c for c in metric.trust if not c.ok]
    page = Scorecard({"name": "net"}, results=[result]).to_html()
    assert page.count("<polyline") == 2  # what it found can be drawn


def test_a_curve_costs_a_third_of_a_loop_with_the_same_outcomes() -> None:
    x, y, seeds = examples(64)
    radii = [0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15]
    attack, oracle = partial(apgd, steps=20, loss="scaled_ce"), Oracle(dense())
    curve = robustness_curve(attack, oracle, x, y, radii=radii, space=UNIT, seeds=seeds)
    plain, thrifty = 0, 0
    for place, radius in enumerate(radii):
        naive, sparing = Oracle(dense()), Oracle(dense())
        attack(naive, x, y, eps=radius, space=UNIT, seeds=seeds, stop=False)
        points = attack(sparing, x, y, eps=radius, space=UNIT, seeds=seeds)
        assert torch.equal(right(dense(), points, y), curve.robust[:, place])
        plain, thrifty = plain + naive.rows, thrifty + sparing.rows
    assert plain >= 3 * oracle.rows
    assert thrifty > oracle.rows  # less even than a loop whose fallen examples drop out


def test_tables_few_classes_and_regression() -> None:
    torch.manual_seed(0)
    x = torch.rand(32, 5) * torch.tensor([1.0, 10.0, 100.0, 1.0, 1.0])
    space = InputSpace(torch.zeros(5), torch.tensor([1.0, 10.0, 100.0, 1.0, 1.0]))
    for classes in (2, 3):
        nets = [nn.Sequential(Scaled(space), nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, classes)) for _ in range(2)]
        y = nets[0](x).argmax(1)
        handles = [ModelHandle(net, space=space) for net in nets]
        given = AuditContext(*handles, Classification(), x, y, torch.arange(32))
        result = run(Robustness(steps=5, queries=20), given)
        assert result["robust_accuracy"].threat["unit"] == "range of each entry"
        assert result["robust_accuracy"].n == 32
        run(CorruptionRobustness(), given)
    nets = [nn.Sequential(Scaled(space), nn.Linear(5, 1)) for _ in range(2)]
    y = nets[0](x).detach()
    given = AuditContext(*(ModelHandle(n, space=space) for n in nets), Regression(0.01), x, y, torch.arange(32))
    result = run(Robustness(steps=5, queries=20, sanity=False), given)
    assert result["robust_accuracy"].paired.reference < 1  # the reference is right without an attack
    one = AuditContext(*handles, Classification(), x[:1], given.targets[:1, 0].long() * 0, torch.arange(1))
    assert run(Robustness(steps=5, queries=20, sanity=False), one)["robust_accuracy"].n == 1


class Scaled(nn.Module):
    def __init__(self, space: InputSpace) -> None:
        super().__init__()
        self.register_buffer("high", torch.as_tensor(space.high))

    def forward(self, x: Tensor) -> Tensor:
        return x / self.high


def test_a_budget_that_ends_is_said() -> None:
    ticks = iter(range(1000))
    budget = Budget(seconds=0.5, clock=lambda: float(next(ticks)))
    given = context(handle("dense"), 300, budget=budget)
    result = run(CorruptionRobustness(["contrast"], [1]), given)
    assert result["corruption_accuracy"].n == 256
    assert result["corruption_accuracy"].truncated
    assert "256 of 300" in result.warnings[0]


def test_inputs_that_cannot_be_attacked() -> None:
    given = context(handle("dense"), 8)
    with pytest.raises(CompressionError, match="outside the declared bounds"):
        run(Robustness(**SMALL), replace(given, inputs=given.inputs * 2 - 0.5))
    with pytest.raises(CompressionError, match="classifiers"):
        run(RobustnessCurve(), replace(given, task=Regression(1.0)))
    without = [replace(h, space=None) for h in (given.dense, given.compressed)]
    with pytest.raises(CompressionError, match="needs the bounds"):
        run(CorruptionRobustness(), replace(given, dense=without[0], compressed=without[1]))


def test_token_models_get_a_bound() -> None:
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Embedding(11, 8), nn.Flatten(), nn.Linear(40, 3)).eval() for _ in range(2)]
    ids = torch.randint(0, 11, (20, 5))
    y = nets[0](ids).argmax(1)
    given = AuditContext(*(ModelHandle(net) for net in nets), Classification(), ids, y, torch.arange(20))
    result = run(Robustness(), given)
    metric = result["embedding_accuracy"]
    assert metric.paired.reference < 1
    assert metric.note.startswith("a bound")
    assert metric.trusted
    wide = run(EmbeddingRobustness(3.0), given)["embedding_accuracy"]
    assert wide.paired.reference < metric.paired.reference
    curve = RobustnessCurve(steps=1)
    assert (curve.asks(given), Robustness().asks(given)) == (0, 0)  # no time is forecast for what cannot be done
    with pytest.raises(CompressionError, match="tokens"):
        run(curve, given)


# ---------------------------------------------------------------------------------------------------------- corruptions
def test_corruptions_hurt_more_with_severity_and_do_not_depend_on_the_batch() -> None:
    x, y, seeds = examples(64)
    clean = float(right(dense(), x, y).double().mean())
    for name in names(x):
        changes = []
        for severity in SEVERITIES:
            found = corrupt(x, name, severity, space=UNIT, seeds=seeds)
            assert float(found.min()) >= 0, name
            assert float(found.max()) <= 1, name
            part = corrupt(x[5:9], name, severity, space=UNIT, seeds=seeds[5:9])
            torch.testing.assert_close(part, found[5:9], rtol=0, atol=1e-6)
            changes.append(float((found - x).square().mean()))
        assert changes == sorted(changes), name
        assert changes[0] > 0 or name == "pixelate", name  # 95 % of 7 pixels are 6, but 90 % too
        assert float(right(dense(), found, y).double().mean()) <= clean + 0.05, name
    large = torch.rand(2, 3, 64, 64)
    for name in names(large):
        assert corrupt(large, name, 3, space=UNIT, seeds=seeds[:2]).shape == large.shape
    with pytest.raises(CompressionError, match="is none of"):
        corrupt(x, "fog", 1, space=UNIT, seeds=seeds)
    with pytest.raises(CompressionError, match="from 1 to 5"):
        corrupt(x, "contrast", 6, space=UNIT, seeds=seeds)


def test_digits_are_what_they_were() -> None:
    x, y = digits()
    assert (len(x), tuple(x.shape[1:]), int(y.max())) == (5000, (1, 7, 7), 9)
    found = apgd_targeted(dense(), *examples(8)[:2], **COMMON, seeds=examples(8)[2], steps=5, targets=3)
    assert found.shape == (8, 1, 7, 7)
