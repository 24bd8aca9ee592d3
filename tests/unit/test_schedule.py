"""Schedules: where events lie, what values they give, and that nothing drifts."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.errors import CompressionError
from lightning_compress.schedule import (
    Decisions,
    ResolvedSchedule,
    ResolvedValue,
    Schedule,
    Scheduled,
)

CURVES = ["cubic", "linear", "exponential", "cosine", "step", "constant"]
CASES = [
    # arguments of Schedule, total, steps per epoch, events
    ({"begin": "10%", "end": "50%", "every": 10}, 100, 25, (10, 20, 30, 40, 50)),
    ({"begin": 0.1, "end": 0.5, "every": "20%"}, 100, None, (10, 30, 50)),
    ({"begin": "1 epoch", "end": "3 epochs"}, 100, 25, (25, 50, 75)),
    ({"begin": "0.5 epochs", "end": "100%", "every": "1 epoch"}, 100, 25, (12, 37, 62, 87)),
    ({}, 100, 25, (10, 35, 60, 85)),
    ({"begin": 0, "every": 50}, 100, None, (0, 50)),  # a point at step 100 would leave no step
    ({"begin": 0, "every": 33}, 100, None, (0, 33, 66, 99)),
    ({"begin": 99, "every": 1}, 100, None, (99,)),
    ({"begin": "10%", "every": "1 epoch"}, 20, 20, (2,)),  # shorter than one `every`: one shot
    ({"begin": 5, "end": 15, "every": 5}, None, None, (5, 10, 15)),
    ({"begin": 5, "end": 15, "every": 5}, math.inf, None, (5, 10, 15)),
    ({"begin": 1, "end": "1 step", "every": 1}, 10, None, (1,)),
    ({"begin": "20%", "curve": "constant"}, 10, None, (2,)),
    ({"begin": 3, "curve": "constant"}, None, None, (3,)),
    ({"begin": 0, "end": "10%", "every": "1%"}, 30, None, (0, 1, 2, 3)),  # 1 % is less than a step: every step
    ({"begin": "10%", "end": "30%", "every": 3}, 30, None, (3, 6, 9)),  # 10 % of 30 is 3, not 2.9999
]


@pytest.mark.parametrize(("arguments", "total", "per_epoch", "events"), CASES)
def test_events(arguments, total, per_epoch, events):
    assert Schedule(**arguments).resolve(total, per_epoch).events == events


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"end": 1}, "Which one"),
        ({"end": 1.0}, "Which one"),
        ({"end": True}, "Which one"),
        ({"begin": 1.0}, "strictly between"),
        ({"begin": 0.0}, "strictly between"),
        ({"begin": float("nan")}, "strictly between"),
        ({"begin": -1}, "negative"),
        ({"begin": "110%"}, "at most 100%"),
        ({"begin": "soon"}, "not understood"),
        ({"begin": "5"}, "not understood"),
        ({"begin": "-5%"}, "not understood"),
        ({"begin": "1.5 steps"}, "whole"),
        ({"every": 0}, "at least one step"),
        ({"every": "0 epochs"}, "at least one step"),
        ({"begin": 10, "end": 5}, "before the begin"),
        ({"begin": "50%", "end": 0.4}, "before the begin"),
        ({"curve": "square"}, "choose one of"),
    ],
)
def test_wrong_values_are_refused_at_once(arguments, words):
    with pytest.raises(ValueError, match=words):
        Schedule(**arguments)


@pytest.mark.parametrize("value", [True, None, [1], torch.tensor(1)])
def test_wrong_types_are_refused(value):
    with pytest.raises(TypeError, match="expected a number of steps"):
        Schedule(begin=value)


@pytest.mark.parametrize(
    ("arguments", "total", "per_epoch", "words"),
    [
        ({}, None, 25, "length of the run"),
        ({}, -1, 25, "length of the run"),
        ({}, 0, 25, "length of the run"),
        ({"begin": 5, "every": 1}, math.inf, 25, "ends with the run"),
        ({"begin": 5, "end": 10}, None, math.inf, "number of steps in an epoch"),
        ({"begin": 100, "every": 1}, 100, None, "nothing would be trained"),
        ({"begin": "100%", "every": 1}, 100, None, "nothing would be trained"),
        ({"begin": 50, "end": "10%", "every": 1}, 100, None, "before its begin"),
    ],
)
def test_what_cannot_be_resolved_says_why(arguments, total, per_epoch, words):
    with pytest.raises(CompressionError, match=words):
        Schedule(**arguments).resolve(total, per_epoch)


@pytest.mark.parametrize(
    ("arguments", "total", "events"),
    [
        ({}, 1, (0,)),
        ({}, 3, (0, 1, 2)),
        ({"begin": "60%", "curve": "constant"}, 3, (0,)),
        ({"begin": 1000, "end": 2000, "every": 1000}, 5, (0, 1)),
        ({}, None, (0,)),
    ],
)
def test_fast_dev_run_compresses(arguments, total, events):
    plan = Schedule(**arguments).resolve(total, total, fast_dev_run=True)
    assert plan.events == events
    assert plan.value(events[-1], 0.0, 0.9) == 0.9


def test_cubic_is_the_formula_of_the_paper():
    plan = Schedule(begin=0, end=90, every=10).resolve(100, None)
    initial, final = 0.1, 0.9
    for index, event in enumerate(plan.events):
        expected = final + (initial - final) * (1 - (index + 1) / 10) ** 3  # Zhu & Gupta 2017, equation 1
        assert plan.value(event, initial, final) == pytest.approx(expected, rel=1e-12)


def test_exponential_keeps_a_constant_share_at_99_percent():
    plan = Schedule(begin=0, end=9, every=1, curve="exponential").resolve(10, None)
    kept = [1.0] + [1 - plan.value(step, 0.0, 0.99) for step in plan.events]
    for before, after in itertools.pairwise(kept):
        assert after / before == pytest.approx(0.01**0.1, rel=1e-9)


def test_cosine_and_step():
    plan = ResolvedSchedule((0, 5, 10, 15), "cosine", 20)
    assert plan.value(5, 0.0, 1.0) == pytest.approx(0.5)
    plan = ResolvedSchedule((0, 5, 10, 15), "step", 20)
    assert [plan.value(s, 0.0, 1.0) for s in (0, 4, 5, 10, 15, 19)] == [0.25, 0.25, 0.5, 0.75, 1.0, 1.0]


plans = st.builds(
    lambda begin, span, every, total, curve: Schedule(begin, begin + span + 2, every, curve).resolve(
        begin + total + 1, None
    ),
    st.integers(0, 50),
    st.integers(0, 60),
    st.integers(1, 20),
    st.integers(0, 80),
    st.sampled_from(CURVES),
)
numbers = st.floats(-1e6, 1e6)


@given(plans, numbers, numbers)
@settings(max_examples=60, deadline=None)
def test_values_are_monotone_piecewise_constant_and_exact_at_the_ends(plan, initial, final):
    values = [plan.value(step, initial, final) for step in range(plan.total)]
    sign = 1 if final >= initial else -1
    assert all(sign * (b - a) >= 0 for a, b in itertools.pairwise(values))
    assert all(v == initial for v in values[: plan.events[0]])
    assert all(v == final for v in values[plan.events[-1] :])
    assert plan.events[-1] <= plan.total - 1
    changes = {step for step in range(1, plan.total) if values[step] != values[step - 1]}
    assert changes <= set(plan.events)


@given(plans)
@settings(max_examples=40, deadline=None)
def test_every_event_is_due_once_and_resuming_changes_nothing(plan):
    done = []
    for step in range(plan.total):
        plan = ResolvedSchedule.from_dict(plan.to_dict())  # as if the run stopped before every step
        for event in plan.due(step, done):
            assert event == step
            done.append(event)
    assert tuple(done) == plan.events


pauses = st.lists(st.tuples(st.integers(0, 120), st.integers(0, 15)), max_size=4)


@given(plans, pauses)
@settings(max_examples=80, deadline=None)
def test_pauses_shift_what_comes_after(plan, pauses):
    plan = ResolvedSchedule(plan.events, plan.curve)  # no limit
    decisions = Decisions({"step": s, "name": "pause", "outcome": n} for s, n in pauses)
    planned = plan.planned(decisions)
    assert list(planned) == sorted(set(planned))
    first = min((s for s, _ in pauses), default=10**9)
    horizon = planned[-1] + 3
    for step in range(horizon):
        reached = sum(at <= step for at in planned)
        expected = plan.value(plan.events[reached - 1], 0.0, 1.0) if reached else 0.0
        assert plan.value(step, 0.0, 1.0, decisions) == expected
        if step <= first:  # a decision does not change the past
            assert plan.value(step, 0.0, 1.0, decisions) == plan.value(step, 0.0, 1.0)
    assert plan.value(horizon, 0.0, 1.0, decisions) == 1.0


def test_a_pause_holds_back_later_events_only():
    plan = ResolvedSchedule((10, 20, 30), "linear", total=50)
    decisions = Decisions([{"step": 19, "name": "pause", "outcome": 5}])
    assert plan.planned(decisions) == (10, 25, 35)
    assert plan.due(24, [10], decisions) == []
    assert plan.due(25, [10], decisions) == [20]
    decisions.record(24, "pause", 5)
    assert plan.planned(decisions) == (10, 30, 40)


def test_a_pause_that_leaves_the_run_is_refused_and_room_says_how_much():
    plan = ResolvedSchedule((10, 20, 30), "linear", total=50)
    assert plan.room(15) == 19
    assert plan.room(30) is None
    decisions = Decisions([{"step": 15, "name": "pause", "outcome": 19}])
    assert plan.planned(decisions)[-1] == 49
    assert plan.room(40, decisions) == 0
    with pytest.raises(CompressionError, match="room"):
        plan.planned(Decisions([{"step": 15, "name": "pause", "outcome": 20}]))


def test_a_rejected_event_holds_the_previous_value_and_never_fires_again():
    plan = ResolvedSchedule((10, 20, 30), "linear", total=50)
    decisions = Decisions([{"step": 25, "name": "reject", "outcome": 20}])
    assert plan.due(26, [10], decisions) == []
    assert plan.value(24, 0.0, 0.9, decisions) == pytest.approx(0.6)  # what really happened
    assert plan.value(25, 0.0, 0.9, decisions) == plan.value(10, 0.0, 0.9)
    assert plan.value(30, 0.0, 0.9, decisions) == 0.9
    decisions.record(31, "reject", 30)
    assert plan.value(49, 0.0, 0.9, decisions) == plan.value(10, 0.0, 0.9)


@given(plans, pauses, st.lists(st.tuples(st.integers(0, 120), st.integers(0, 10)), max_size=3), st.integers(0, 150))
@settings(max_examples=60, deadline=None)
def test_later_decisions_never_rewrite_earlier_values(plan, pauses, rejects, cut):
    plan = ResolvedSchedule(plan.events, plan.curve)
    records = [{"step": s, "name": "pause", "outcome": n} for s, n in pauses]
    records += [{"step": s, "name": "reject", "outcome": plan.events[i % len(plan.events)]} for s, i in rejects]
    whole = Decisions(records)
    known = Decisions.from_list(r for r in whole.to_list() if r["step"] <= cut)
    for step in range(cut + 1):
        assert plan.value(step, 0.0, 1.0, whole) == plan.value(step, 0.0, 1.0, known)


def test_decisions_of_another_owner_do_not_count():
    decisions = Decisions()
    decisions.record(5, "pruning/pause", 7)
    decisions.record(5, "audit/pause", 1)
    decisions.record(6, "pruning/table", {"fast": [1, 2.0, torch.ones(2)]})
    plan = ResolvedSchedule((10,), "linear", 30)
    assert plan.planned(decisions.of("pruning")) == (17,)
    assert plan.planned(decisions.of("other")) == (10,)
    assert len(decisions) == 3
    assert [d.name for d in decisions] == ["pruning/pause", "audit/pause", "pruning/table"]
    assert decisions.find("pruning/pause", step=4) is None
    assert decisions.find("pruning/pause", step=5).outcome == 7
    assert len(decisions.all("audit/pause")) == 1


def test_decisions_are_plain_data_and_keep_history(tmp_path):
    table = {"fast": [1, 2]}
    decisions = Decisions()
    decisions.record(0, "latency", table)
    table["fast"].append(3)
    assert decisions.find("latency").outcome == {"fast": [1, 2]}
    torch.save(decisions.to_list(), tmp_path / "d.pt")
    again = Decisions.from_list(torch.load(tmp_path / "d.pt", weights_only=True))
    assert again.to_list() == decisions.to_list()
    with pytest.raises(TypeError, match="tuple"):
        decisions.record(0, "latency", (1, 2))
    with pytest.raises(ValueError, match="0 or more"):
        decisions.record(-1, "latency", 1)
    with pytest.raises(ValueError, match="pause"):
        decisions.record(1, "a/pause", -2)


@pytest.mark.parametrize("curve", CURVES)
def test_scheduled_numbers(curve):
    value = Scheduled(4.0, 1.0, Schedule(begin=10, end=30, every=10, curve=curve)).resolve(100, None)
    assert ResolvedValue.from_dict(value.to_dict()) == value
    values = [value.value(step) for step in range(100)]
    assert values == sorted(values, reverse=True)
    assert values[9] == 4.0
    assert values[30:] == [1.0] * 70
    if curve not in ("step", "constant"):
        assert values[10] == 4.0
        assert len(set(values[10:31])) == 21  # glides at every step
    paused = Decisions([{"step": 20, "name": "pause", "outcome": 7}])
    assert [value.value(step, paused) for step in range(107)] == values[:21] + [values[20]] * 7 + values[21:100]


def test_scheduled_ends_exactly_at_the_last_step_and_in_a_short_run():
    default = Scheduled(1.0, 0.0)
    value = default.resolve(50, None)
    assert (value.value(0), value.value(49)) == (1.0, 0.0)
    assert value.value(24) > 0
    assert default.resolve(1, 1, fast_dev_run=True).value(0) == 0.0
    assert [default.resolve(3, 3, fast_dev_run=True).value(s) for s in range(3)] == [1.0, 0.5, 0.0]
    with pytest.raises(ValueError, match="finite"):
        Scheduled(1.0, math.inf)


def test_from_a_config_file():
    jsonargparse = pytest.importorskip("jsonargparse")

    class Technique:
        def __init__(self, schedule: Schedule = Schedule(), weight: Scheduled | float = 1.0):  # noqa: B008
            self.schedule, self.weight = schedule, weight

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Technique, "t")
    text = 'schedule: {begin: 0.1, end: "50%", every: 2 epochs, curve: linear}'
    weight = "weight: {initial: 1.0, final: 0.0, schedule: {begin: 0, every: 1, end: 10, curve: step}}"
    config = parser.instantiate(parser.parse_string(f"t:\n  {text}\n  {weight}\n"))
    assert config.t.schedule == Schedule(0.1, "50%", "2 epochs", "linear")
    assert config.t.weight == Scheduled(1.0, 0.0, Schedule(0, 10, 1, "step"))
    config = parser.instantiate(parser.parse_args(["--t.schedule.begin=500", "--t.schedule.end=20%"]))
    assert (config.t.schedule.begin, config.t.schedule.end) == (500, "20%")
    with pytest.raises(Exception, match="curve"):
        parser.parse_string("t:\n  schedule: {curve: square}\n")
