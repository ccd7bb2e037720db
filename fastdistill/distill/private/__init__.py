"""Private distillation: every epsilon that is printed holds; docs/privacy.md has the threat models.

Each teacher carries a provenance; the recipes accept only the combinations for which a guarantee
holds, and one `Ledger` composes all stages.
"""

from fastdistill.distill.private.accounting import epsilon, noise_for
from fastdistill.distill.private.ledger import BudgetExceeded, Ledger
from fastdistill.distill.private.mechanism import Mechanism
from fastdistill.distill.private.provenance import (
    DisjointShards,
    DPTrained,
    NoGuarantee,
    NonPrivate,
    Public,
)

__all__ = [
    "BudgetExceeded",
    "DPTrained",
    "DisjointShards",
    "Ledger",
    "Mechanism",
    "NoGuarantee",
    "NonPrivate",
    "Public",
    "epsilon",
    "noise_for",
]
