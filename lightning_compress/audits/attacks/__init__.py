"""Attacks as pure functions: raw inputs in, raw inputs out, and the same result for an example in any batch."""

from __future__ import annotations

from lightning_compress.audits.attacks.auto_pgd import apgd as apgd
from lightning_compress.audits.attacks.auto_pgd import apgd_targeted as apgd_targeted
from lightning_compress.audits.attacks.curve import Curve as Curve
from lightning_compress.audits.attacks.curve import robustness_curve as robustness_curve
from lightning_compress.audits.attacks.embedding import EmbeddingView as EmbeddingView
from lightning_compress.audits.attacks.embedding import embedding_pgd as embedding_pgd
from lightning_compress.audits.attacks.goals import Goal as Goal
from lightning_compress.audits.attacks.noise import example_seeds as example_seeds
from lightning_compress.audits.attacks.oracle import Oracle as Oracle
from lightning_compress.audits.attacks.projected import pgd as pgd
from lightning_compress.audits.attacks.random_points import random_noise as random_noise
from lightning_compress.audits.attacks.single_step import fgsm as fgsm
from lightning_compress.audits.attacks.square_search import square as square
from lightning_compress.audits.attacks.threat import Ball as Ball
from lightning_compress.audits.attacks.transfer import Transfers as Transfers
from lightning_compress.audits.attacks.transfer import transfer_matrix as transfer_matrix
