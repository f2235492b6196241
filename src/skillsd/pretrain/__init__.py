"""Where agents come from: behaviour cloning of solver demonstrations."""

from skillsd.pretrain.cloning import Cloning, DemonstrationData
from skillsd.pretrain.demonstrations import DemonstrationSettings

__all__ = ["Cloning", "DemonstrationData", "DemonstrationSettings"]
