"""What happens around an iteration: memory plan, teacher weights, panel, record, warnings, checkpoints, export."""

from lightning.pytorch import Callback

from skillsd.callbacks.budget import EnvStepBudget
from skillsd.callbacks.diagnostics import Diagnostics
from skillsd.callbacks.export import AdapterExport, export_adapter
from skillsd.callbacks.log import RunLog
from skillsd.callbacks.memory import MemoryPlan
from skillsd.callbacks.panel import Panel
from skillsd.callbacks.progress import ProgressLog
from skillsd.callbacks.resume import RunCheckpoint
from skillsd.callbacks.teacher import TeacherSync
from skillsd.callbacks.trackio import TrackioLogger
from skillsd.callbacks.watchdog import PeerWatch

__all__ = [
    "AdapterExport",
    "Callback",
    "Diagnostics",
    "EnvStepBudget",
    "MemoryPlan",
    "Panel",
    "PeerWatch",
    "ProgressLog",
    "RunCheckpoint",
    "RunLog",
    "TeacherSync",
    "TrackioLogger",
    "export_adapter",
]
