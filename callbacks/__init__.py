"""The Lightning layer of lightning-compress: one callback a technique."""

if __name__ != "lightning_compress.callbacks":
    raise ImportError(
        f"this folder is imported as {__name__!r}; import `lightning_compress.callbacks` instead, "
        "otherwise every class would exist twice and `isinstance` checks would fail"
    )

from lightning_compress.callbacks.adversarial import AdversarialTraining as AdversarialTraining
from lightning_compress.callbacks.assistants import AssistantDistillation as AssistantDistillation
from lightning_compress.callbacks.audit import CompressionAudit as CompressionAudit
from lightning_compress.callbacks.audit_gate import AuditGate as AuditGate
from lightning_compress.callbacks.audit_repair import AuditRepair as AuditRepair
from lightning_compress.callbacks.base import CompressionCallback as CompressionCallback
from lightning_compress.callbacks.candidates import DrawnAssistant as DrawnAssistant
from lightning_compress.callbacks.capacity_gap import CapacityGap as CapacityGap
from lightning_compress.callbacks.channel_pruning import ChannelPruning as ChannelPruning
from lightning_compress.callbacks.compact import CompactConversion as CompactConversion
from lightning_compress.callbacks.distillation import Distillation as Distillation
from lightning_compress.callbacks.joint import JointCompression as JointCompression
from lightning_compress.callbacks.learned_bits import LearnedBitWidths as LearnedBitWidths
from lightning_compress.callbacks.low_rank import LowRank as LowRank
from lightning_compress.callbacks.monitor import CompressionMonitor as CompressionMonitor
from lightning_compress.callbacks.mutual import MutualDistillation as MutualDistillation
from lightning_compress.callbacks.post_training import PostTrainingQuantization as PostTrainingQuantization
from lightning_compress.callbacks.pruning import Pruning as Pruning
from lightning_compress.callbacks.quantization import QuantizationAwareTraining as QuantizationAwareTraining
from lightning_compress.callbacks.resume import ExactResume as ExactResume
from lightning_compress.callbacks.routes import RouteDistillation as RouteDistillation
from lightning_compress.callbacks.routes import SaveRoute as SaveRoute
from lightning_compress.callbacks.several_fits import distill_chain as distill_chain
from lightning_compress.callbacks.shared_distillation import SharedDistillation as SharedDistillation
