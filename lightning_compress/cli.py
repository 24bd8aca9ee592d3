"""`lightning-compress audit` and `lightning-compress compare`: audits of models that were saved, without a program."""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_compress.audits.audit import audit
from lightning_compress.audits.comparison import Comparison, compare_cards
from lightning_compress.audits.handles import InputSpace
from lightning_compress.audits.replicates import ReplicatedComparison, compare_replicates
from lightning_compress.audits.scorecard import Scorecard
from lightning_compress.errors import CompressionError
from lightning_compress.loading import load_from_checkpoint
from lightning_compress.quantization.integer.artifact import Int8Artifact
from lightning_compress.writing import whole

COMMANDS = ("audit", "compare")
_FURTHER = ("members", "nonmembers", "ood", "calibration")


def main(args: Sequence[str]) -> int:
    """Run a command.

    Args:
        args: The command and its arguments.

    Returns:
        The exit status: 0, or 1 if a gate says FAIL, or 2 if what was asked for cannot be done.

    Example:
        >>> main(["compare", "no_such_file.json"])
        2
    """
    options = _parser().parse_args(list(args))
    try:
        return _audit(options) if options.command == "audit" else _compare(options)
    except (CompressionError, ValueError, TypeError, OSError) as error:
        print(f"lightning-compress {options.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lightning-compress")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("audit", help="compare a compressed model with the dense one it came from")
    model = "a checkpoint (.ckpt), an integer artefact (.pt2), or pkg:factory, a function that returns a module"
    one.add_argument("--dense", required=True, help=model)
    one.add_argument("--compressed", required=True, help=model)
    one.add_argument("--twin", help="for integer models: the model that gives gradients, likewise")
    one.add_argument("--model", help="pkg:LitNet, the class that the checkpoints are of")
    one.add_argument("--data", required=True, help="pkg:Data, a class or function that gives held-out data")
    one.add_argument("--members", help="pkg:train_data, training examples without augmentation, for privacy audits")
    one.add_argument("--nonmembers", help="pkg:data, examples that were not trained on; default: those of --data")
    one.add_argument("--ood", help="pkg:data, inputs of another distribution")
    one.add_argument("--calibration", help="pkg:data, what the compressed model was calibrated with")
    kinds = "tuned: the dense model trained on; dense, compressed: of other seeds; evaluator: judges inversions"
    one.add_argument("--reference", action="append", default=[], metavar="KIND=MODEL", help=f"may be repeated. {kinds}")
    one.add_argument("--space", nargs=2, type=float, metavar=("LOW", "HIGH"), help="range of the raw inputs")
    one.add_argument("--mean", nargs="+", type=float, help="normalisation that is not part of the model")
    one.add_argument("--std", nargs="+", type=float)
    one.add_argument("--normalized", action="store_true", help="the data is normalised by --mean and --std")
    one.add_argument("--task", help="default: what answers and targets look like")
    one.add_argument("--tier", type=int, default=1, choices=(0, 1, 2), help="0: seconds, 1: a minute, 2: minutes")
    one.add_argument("--examples", type=int, default=1000)
    one.add_argument("--privacy-examples", type=int, default=20_000, help="of members and of non-members, at most")
    one.add_argument("--batch-size", type=int, default=256, help="examples a call")
    one.add_argument("--seconds", type=float, help="time for all audits; what is cut short says so")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--margin", action="append", default=[], metavar="FAMILY.METRIC=VALUE", help="may be repeated")
    one.add_argument(
        "--weight", action="append", default=[], metavar="AXIS=VALUE", help="in the index; may be repeated"
    )
    one.add_argument(
        "--option", action="append", default=[], metavar="AUDIT.ARGUMENT=VALUE",
        help="an argument of one audit, such as robustness.eps=0.03; may be repeated",
    )  # fmt: skip
    one.add_argument("--no-cost", action="store_true", help="measure neither bytes, operations, latency nor memory")
    one.add_argument("--name", help="of the compressed model, for the card")
    one.add_argument("--energy", action="store_true", help="measure joules too; without it, where codecarbon is there")
    one.add_argument("--cache", help="a folder that keeps what the dense model did, for the next audit against it")
    one.add_argument("--report", action="append", default=[], help=".html, .json or .md; may be repeated")
    many = commands.add_parser("compare", help="put scorecards beside each other")
    many.add_argument("cards", nargs="+", help="JSON files that an audit wrote")
    many.add_argument("--by", help="FAMILY.METRIC or index; default: the metric of the task")
    many.add_argument("--cost", default="file_bytes", help="file_bytes, zipped_bytes, macs, latency, ...")
    many.add_argument("--replicates", action="store_true", help="cards of one name are the same model of other seeds")
    many.add_argument("--report", help="an HTML file")
    return parser


def _audit(options: argparse.Namespace) -> int:
    for report in options.report:  # before minutes of work, not after
        if Path(report).suffix not in (".html", ".json", ".md"):
            raise ValueError(f"a report ends in .html, .json or .md; got {report!r}")
    space = None
    if options.space is not None:
        space = InputSpace(options.space[0], options.space[1], options.mean, options.std)
    elif options.mean is not None or options.std is not None:
        raise ValueError("--mean and --std need --space, the range of the raw inputs")
    card = audit(
        _model(options.dense, options.model),
        _model(options.compressed, options.model),
        _made(options.data),
        twin=None if options.twin is None else _model(options.twin, options.model),
        **{name: _made(source) for name in _FURTHER if (source := getattr(options, name)) is not None},
        references=_references(options.reference, options.model),
        space=space,
        normalized=options.normalized,
        task=options.task,
        tier=options.tier,
        examples=options.examples,
        privacy_examples=options.privacy_examples,
        seconds=options.seconds,
        seed=options.seed,
        cache=options.cache,
        energy=options.energy or None,
        margins=dict(_number("margin", "family.metric=0.02", text) for text in options.margin),
        weights=dict(_number("weight", "axis=2", text) for text in options.weight) or None,
        options=_options(options.option),
        batch_size=options.batch_size,
        cost=not options.no_cost,
        identity={"name": options.name or Path(options.compressed).name, "reference": Path(options.dense).name},
    )
    for gate in card.gates:
        print(f"{gate.axis:14}{gate.verdict:14}{gate.reason}")
    for caveat in card.caveats:
        print(f"note: {caveat}")
    for report in options.report:
        print(f"written: {card.save(report)}")
    return 1 if card.verdict == "FAIL" else 0


def _compare(options: argparse.Namespace) -> int:
    cards = [Scorecard.load(path) for path in options.cards]
    if options.replicates and options.by:
        raise ValueError("--by ranks single cards; with --replicates every axis is shown")
    found: Comparison | ReplicatedComparison = (
        compare_replicates(cards, options.cost)
        if options.replicates
        else compare_cards(cards, options.by, options.cost)
    )
    print(found.to_text())
    if options.report:
        target = Path(options.report)
        with whole(target) as partial:
            partial.write_text(found.to_html(), encoding="utf-8")
        print(f"written: {target}")
    return 0


def _model(source: str, cls: str | None) -> Any:
    if ":" in source and not Path(source).exists():
        made = _made(source)
        return made.eval() if isinstance(made, nn.Module) else made
    if Path(source).suffix == ".pt2":
        return Int8Artifact.load(source)
    if cls is None:
        raise ValueError(f"--model pkg:LitNet has to say which class {source!r} is a checkpoint of")
    return load_from_checkpoint(_named(cls), source, map_location=torch.device("cpu"))


def _made(source: str) -> Any:
    found = _named(source)
    return found() if callable(found) and not isinstance(found, nn.Module) else found


def _named(source: str) -> Any:
    """What `package.module:name` names, from the working directory or installed."""
    module, _, name = source.partition(":")
    if not name:
        raise ValueError(f"expected package.module:name; got {source!r}")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{source!r} cannot be imported: {error}") from error


def _references(given: Sequence[str], cls: str | None) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for text in given:
        kind, _, source = text.partition("=")
        if not source:
            raise ValueError(f"a reference is written as kind=model, such as tuned=tuned.ckpt; got {text!r}")
        found.setdefault(kind, []).append(_model(source, cls))
    return found


def _options(given: Sequence[str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for text in given:
        name, _, value = text.partition("=")
        audit_name, _, argument = name.partition(".")
        if not (audit_name and argument and value):
            raise ValueError(f"an option is written as audit.argument=value, such as robustness.eps=0.03; got {text!r}")
        own = found.setdefault(audit_name, {})
        try:
            own[argument] = ast.literal_eval(value)
        except (ValueError, SyntaxError):  # a word
            own[argument] = value
    return found


def _number(what: str, example: str, text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError as error:
        raise ValueError(f"a {what} is written as {example}; got {text!r}") from error
