"""Compress models while Lightning trains them: prune, distil, load and export."""

from typing import Any

from lightning_compress.audits.audit import audit as audit
from lightning_compress.audits.handles import InputSpace as InputSpace
from lightning_compress.audits.handles import ModelHandle as ModelHandle
from lightning_compress.audits.scorecard import Scorecard as Scorecard
from lightning_compress.compact.conversion import convert as convert
from lightning_compress.cost import Cost as Cost
from lightning_compress.decisions import Decisions as Decisions
from lightning_compress.distillation.attribution import AttributionMatching as AttributionMatching
from lightning_compress.distillation.caching import TeacherCache as TeacherCache
from lightning_compress.distillation.capacity_gap import GapRule as GapRule
from lightning_compress.distillation.decoupled import DIST as DIST
from lightning_compress.distillation.decoupled import DKD as DKD
from lightning_compress.distillation.dense import DenseKD as DenseKD
from lightning_compress.distillation.dense import ResponseKD as ResponseKD
from lightning_compress.distillation.features import Hint as Hint
from lightning_compress.distillation.following import EMATeacher as EMATeacher
from lightning_compress.distillation.following import Ensemble as Ensemble
from lightning_compress.distillation.following import Snapshots as Snapshots
from lightning_compress.distillation.heads import Head as Head
from lightning_compress.distillation.heads import Regression as Regression
from lightning_compress.distillation.heads import Specialists as Specialists
from lightning_compress.distillation.information import CRD as CRD
from lightning_compress.distillation.information import VID as VID
from lightning_compress.distillation.losses import KD as KD
from lightning_compress.distillation.losses import kd_loss as kd_loss
from lightning_compress.distillation.pairing import pair_layers as pair_layers
from lightning_compress.distillation.relations import AT as AT
from lightning_compress.distillation.relations import PKT as PKT
from lightning_compress.distillation.relations import RKD as RKD
from lightning_compress.distillation.relations import SP as SP
from lightning_compress.distillation.replay import Replayed as Replayed
from lightning_compress.distillation.review import Review as Review
from lightning_compress.distillation.tokens import TokenKL as TokenKL
from lightning_compress.errors import CompressionError as CompressionError
from lightning_compress.exporting import export as export
from lightning_compress.loading import load as load
from lightning_compress.loading import load_from_checkpoint as load_from_checkpoint
from lightning_compress.loading import strip as strip
from lightning_compress.manifest import materialize as materialize
from lightning_compress.manual import ManualBackward as ManualBackward
from lightning_compress.quantization.integer.artifact import Int8Artifact as Int8Artifact
from lightning_compress.quantization.post_training import quantize as quantize
from lightning_compress.quantization.spec import QuantSpec as QuantSpec
from lightning_compress.schedule import Schedule as Schedule
from lightning_compress.schedule import Scheduled as Scheduled
from lightning_compress.search.complementary import complementary as complementary
from lightning_compress.terms import LossTerm as LossTerm


def __getattr__(name: str) -> Any:
    # The callbacks need Lightning, which plain PyTorch users of the engine may not want to wait for.
    if name == "callbacks":
        import importlib

        return importlib.import_module("lightning_compress.callbacks")
    raise AttributeError(f"module 'lightning_compress' has no attribute {name!r}")
