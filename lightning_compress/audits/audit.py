"""`lc.audit`: run the audits on two models and put what they found on one scorecard."""

from __future__ import annotations

from lightning_compress.audits.context import Audit as Audit
from lightning_compress.audits.context import AuditContext as AuditContext
from lightning_compress.audits.context import Budget as Budget
