"""Private distillation: every epsilon that is printed holds; docs/privacy.md has the threat models.

Each teacher carries a provenance; the recipes accept only the combinations for which a guarantee
holds, and one `Ledger` composes all stages.
"""

from fastdistill.distill.private import committee, selection, shards
from fastdistill.distill.private.accounting import epsilon, noise_for
from fastdistill.distill.private.answers import Answers
from fastdistill.distill.private.ledger import BudgetExceeded, Ledger
from fastdistill.distill.private.mechanism import Mechanism
from fastdistill.distill.private.provenance import (
    DisjointShards,
    DPTrained,
    NoGuarantee,
    NonPrivate,
    Public,
)
from fastdistill.distill.private.recipes import (
    Labels,
    dp_student,
    dp_teacher,
    gradient_perturbation,
    knowledge_perturbation,
)
from fastdistill.distill.private.training import DPSGD, Training, dp_train

__all__ = [
    "Answers",
    "DPSGD",
    "Labels",
    "Training",
    "committee",
    "selection",
    "shards",
    "dp_student",
    "dp_teacher",
    "dp_train",
    "gradient_perturbation",
    "knowledge_perturbation",
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
