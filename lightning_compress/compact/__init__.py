"""Compact blocks of the literature, and how they take the place of dense convolutions."""

from lightning_compress.compact.blocks import BLOCKS as BLOCKS
from lightning_compress.compact.blocks import CompactBlock as CompactBlock
from lightning_compress.compact.blocks import DepthwiseSeparable as DepthwiseSeparable
from lightning_compress.compact.blocks import Fire as Fire
from lightning_compress.compact.blocks import InvertedResidual as InvertedResidual
from lightning_compress.compact.blocks import ShuffleUnit as ShuffleUnit
from lightning_compress.compact.blocks import channel_shuffle as channel_shuffle
from lightning_compress.compact.conversion import convert as convert
from lightning_compress.compact.conversion import convert_with_report as convert_with_report
