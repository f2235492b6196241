"""What happens around an iteration: teacher weights, panel, record, checkpoints, export."""

from skillsd.callbacks.budget import EnvStepBudget
from skillsd.callbacks.export import AdapterExport, export_adapter
from skillsd.callbacks.log import RunLog
from skillsd.callbacks.panel import Panel
from skillsd.callbacks.resume import RunCheckpoint
from skillsd.callbacks.teacher import TeacherSync

__all__ = ["AdapterExport", "EnvStepBudget", "Panel", "RunCheckpoint", "RunLog", "TeacherSync", "export_adapter"]
