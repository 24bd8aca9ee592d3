"""Wrong types, ranges and near misses are refused where they are given, with what was found and what is meant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import lightning_compress as lc
from lightning_compress import manifest
from lightning_compress.callbacks import ChannelPruning, CompressionMonitor, Distillation, Pruning
from lightning_compress.errors import CompressionError
from lightning_compress.targets import select

NAN, INF = float("nan"), float("inf")
Case = tuple[str, Callable[[], Any], type[Exception], str]


def pruning(**arguments: Any) -> Callable[[], Any]:
    return lambda: Pruning(**{"sparsity": 0.5, **arguments})


def channels(**arguments: Any) -> Callable[[], Any]:
    return lambda: ChannelPruning(**arguments)


def distillation(**arguments: Any) -> Callable[[], Any]:
    return lambda: Distillation(**{"teacher": "a.ckpt", **arguments})


CASES: list[Case] = [
    *(
        (f"sparsity {bad!r}", pruning(sparsity=bad), ValueError, r"between 0 and 1 \(0.9 removes 90 %\); got")
        for bad in (None, 0, 1, 90, -0.5, NAN, "0.5", True)
    ),
    ("sparsity above the pattern", pruning(pattern="2:4", sparsity=0.9), ValueError, "removes at most 0.5; got.*0.9"),
    ("pattern near miss", pruning(pattern="unstructred"), ValueError, "did you mean 'unstructured'"),
    ("pattern in capitals", pruning(pattern="Filter"), ValueError, "did you mean 'filter'"),
    ("pattern 4:2", pruning(pattern="4:2"), ValueError, "keeps N of M weights, with 1 <= N < M; found '4:2'"),
    ("pattern block", pruning(pattern="block:0x4"), ValueError, '"block:RxC"; found'),
    ("pattern type", pruning(pattern=24), TypeError, '"2:4".*found 24 of int'),
    ("scope", pruning(scope="layer"), ValueError, "one of .'global', 'local'.; got 'layer'"),
    ("mode", pruning(mode="Hard"), ValueError, "one of .'hard', 'soft'.; got 'Hard'"),
    ("mask_gradients", pruning(mask_gradients="yes"), ValueError, "True, False or 'auto'; got 'yes'"),
    ("targets type", pruning(targets=(3,)), TypeError, "targets takes names and classes; found 3"),
    ("targets None", pruning(targets=None), TypeError, "targets takes names and classes; found None"),
    ("no targets", pruning(targets=()), ValueError, "selects nothing"),
    ("exclude type", pruning(exclude=7), TypeError, "exclude takes names and classes; found 7"),
    ("schedule word", pruning(schedule="setup"), TypeError, "schedule is a Schedule.*got 'setup'"),
    ("schedule dict", pruning(schedule={"begin": 1}), TypeError, "schedule is a Schedule"),
    ("schedule None", pruning(schedule=None), TypeError, "schedule says when"),
    ("name type", pruning(name=3), ValueError, "name is a text"),
    ("empty name", pruning(name=""), ValueError, "not empty"),
    ("argument", pruning(sparcity=0.5), TypeError, "sparcity"),
    ("no budget", channels(), ValueError, "exactly one of keep_macs, keep_parameters and ratio; got none"),
    ("two budgets", channels(keep_macs=0.5, ratio=0.5), ValueError, "exactly one of.*got.*ratio"),
    ("percent", channels(keep_macs=50), ValueError, r"keep_macs must lie in \(0, 1\]; got 50"),
    ("budget nan", channels(keep_parameters=NAN), ValueError, "keep_parameters must lie in.*got nan"),
    ("budget text", channels(keep_macs="0.5"), TypeError, "share of the dense model, such as 0.5; got '0.5'"),
    ("budget bool", channels(ratio=True), TypeError, "got True"),
    ("channels schedule word", channels(ratio=0.5, schedule="start"), ValueError, "a Schedule or 'setup'; got 'start'"),
    ("channels schedule None", channels(ratio=0.5, schedule=None), TypeError, "'setup' for one cut"),
    ("channels schedule number", channels(ratio=0.5, schedule=5), TypeError, "schedule is a Schedule"),
    ("channels scope", channels(ratio=0.5, scope="all"), ValueError, "'global', 'local'.*got 'all'"),
    ("round_to", channels(ratio=0.5, round_to=0), ValueError, "round_to is a whole number.*at least 1; got 0"),
    ("round_to float", channels(ratio=0.5, round_to=8.5), ValueError, "round_to.*got 8.5"),
    ("min_channels", channels(ratio=0.5, min_channels=0), ValueError, "min_channels.*got 0"),
    ("example text", channels(ratio=0.5, example_inputs="abc"), TypeError, "is a str; give a tensor, a tuple"),
    *(
        (f"teacher {bad!r:.20}", distillation(teacher=bad), TypeError, "checkpoint path, a module or 'initial'; got")
        for bad in (3, None, torch.nn.Linear)
    ),
    ("no losses", distillation(losses=[]), ValueError, "losses is empty"),
    ("one loss", distillation(losses=lc.KD()), TypeError, r"write losses=\[KD"),
    ("loss by name", distillation(losses=["kd"]), TypeError, "such as .KD.*got 'kd'"),
    ("loss class", distillation(losses=[lc.KD]), TypeError, "list of loss terms.*got <class"),
    ("task weight", distillation(task_weight=-1), ValueError, "task_weight is -1.*>= 0"),
    ("task weight text", distillation(task_weight="1"), TypeError, r"task_weight is a number, or a Scheduled"),
    ("placement", distillation(placement="gpu"), ValueError, "one of replicate, cpu, shard; got 'gpu'"),
    ("student type", distillation(student=3), TypeError, "name of a part of the module.*got 3"),
    ("dotted name", distillation(name="a.b"), ValueError, "no dots; got 'a.b'"),
    ("temperature 0", lambda: lc.KD(temperature=0), ValueError, "temperature of 'kd' is 0; it must be finite and > 0"),
    ("temperature text", lambda: lc.KD(temperature="4"), TypeError, "temperature is a number.*found '4'"),
    ("weight -1", lambda: lc.KD(weight=-1), ValueError, "weight is -1; it must be finite and >= 0"),
    ("weight inf", lambda: lc.KD(weight=INF), ValueError, "weight is inf"),
    ("weight schedule", lambda: lc.KD(weight=lc.Schedule()), TypeError, "a Scheduled.initial, final, schedule"),
    ("class_dim", lambda: lc.KD(class_dim=1.5), TypeError, "number of a dimension, such as 1 or -1; found 1.5"),
    ("term name", lambda: lc.KD(name="a.b"), ValueError, "no dots; found 'a.b'"),
    ("max_layers -1", lambda: CompressionMonitor(max_layers=-1), ValueError, "max_layers >= 0; got -1"),
    ("max_layers text", lambda: CompressionMonitor(max_layers="3"), TypeError, "whole number; got '3'"),
    ("float step", lambda: lc.Schedule(begin=1.0), ValueError, "Steps are written as an int"),
    ("end 1", lambda: lc.Schedule(end=1), ValueError, "Which one?"),
    ("negative step", lambda: lc.Schedule(begin=-1), ValueError, "a step cannot be negative"),
    ("every 0", lambda: lc.Schedule(every=0), ValueError, "at least one step"),
    ("words", lambda: lc.Schedule(begin="ten"), ValueError, 'not understood; give.*"10%"'),
    ("curve", lambda: lc.Schedule(curve="cubik"), ValueError, "'cubik'.*choose one of cubic, linear"),
    ("end before begin", lambda: lc.Schedule(begin=9, end=3), ValueError, "the end lies before the begin"),
    ("more than all", lambda: lc.Schedule(end="200%"), ValueError, "at most 100%"),
    ("begin None", lambda: lc.Schedule(begin=None), TypeError, "begin=None.*expected"),
    ("scheduled inf", lambda: lc.Scheduled(0, INF), ValueError, "both must be finite"),
    ("scheduled text", lambda: lc.Scheduled("a", 1), TypeError, "both are numbers"),
    ("scheduled schedule", lambda: lc.Scheduled(0, 1, "10%"), TypeError, "expected a Schedule"),
    ("export no module", lambda: lc.export(3, "a.safetensors"), TypeError, "model is a module; got 3"),
    ("export suffix", lambda: lc.export(net(), "a.onx"), ValueError, "'.onx'.*use one of safetensors, onnx, pt2"),
    ("export no suffix", lambda: lc.export(net(), "a"), ValueError, "use one of safetensors, onnx, pt2"),
    ("export format", lambda: lc.export(net(), "a.pt2", format="st"), ValueError, "format='st'.*use one of"),
    ("no class", lambda: lc.load_from_checkpoint(net(), "a.ckpt"), TypeError, "cls is a LightningModule class"),
    ("plain class", lambda: lc.load_from_checkpoint(torch.nn.Linear, "a"), TypeError, "plain module there is `load`"),
    ("prefix", lambda: lc.load(net(), "a.ckpt", prefix="net"), ValueError, "give prefix='net.'; found 'net'"),
]  # fmt: skip


def net() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))


@pytest.mark.parametrize(("make", "kind", "says"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_arguments(make: Callable[[], Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        make()


def test_patterns_with_near_misses() -> None:
    model = torch.nn.ModuleDict({"backbone": net(), "head": torch.nn.Linear(2, 2)})
    kinds = (torch.nn.Linear,)
    with pytest.raises(CompressionError, match=r"targets='backbon.0' matches no module.*Did you mean 'backbone.0'"):
        select(model, ("backbon.0",), kinds=kinds)
    with pytest.raises(CompressionError, match=r"exclude='Head' matches no module.*Did you mean 'head'"):
        select(model, exclude=("Head",), kinds=kinds)
    with pytest.raises(CompressionError, match=r"leaves out all 3 modules.*Narrow exclude or widen targets"):
        select(model, exclude=("backbone", "head"), kinds=kinds)
    with pytest.raises(CompressionError, match=r"matches backbone.1 \(ReLU\), but none of these is one of Linear"):
        select(model, ("backbone.1",), kinds=kinds)


def test_models_without_values_are_not_written() -> None:
    with torch.device("meta"):
        model = net()
    for name in ("a.safetensors", "a.pt2"):
        with pytest.raises(CompressionError, match=r"'0\.weight' is on the meta device, so it has no values"):
            lc.export(model, name, torch.zeros(1, 4))


def test_records_of_other_programs() -> None:
    for record, says in [
        ("x", "is a str, no dictionary"),
        ({"edits": []}, "has no version"),
        ({"version": 9, "edits": []}, "version 9.*update lightning-compress"),
        ({"version": 1, "edits": "x"}, "no list of dictionaries"),
        ({"version": 1, "edits": [{"kind": "magic.cut"}]}, "'magic.cut'.*does not know.*'channels.cut'"),
    ]:
        model = net()
        with pytest.raises(CompressionError, match=says):
            manifest.replay(model, record)  # type: ignore[arg-type]
        assert manifest.of(model)["edits"] == []
    assert manifest.replay(net(), {}) == 0  # a plain checkpoint
