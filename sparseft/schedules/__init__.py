"""Choosing or drawing anew while training: objects that watch an optimizer's steps."""

from sparseft.schedules.base import Schedule
from sparseft.schedules.child_tuning_f import ChildTuningF
from sparseft.schedules.diff_pruning import DiffPruning
from sparseft.schedules.dps import DPS
from sparseft.schedules.dps_mix import DPSMix
from sparseft.schedules.drop_grow import DropGrow
from sparseft.schedules.lt_sft import LTSFT
from sparseft.schedules.mixout import Mixout
from sparseft.schedules.refresh import Refresh

__all__ = ["DPS", "ChildTuningF", "DPSMix", "DiffPruning", "DropGrow", "LTSFT", "Mixout", "Refresh", "Schedule"]
