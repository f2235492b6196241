"""skillsd: train multi-turn LLM agents with Skill-SD (arXiv:2604.10674). Importing this loads neither torch nor lightning."""

from skillsd._conf import conf_dir

__version__ = "0.1.0"

__all__ = ["__version__", "conf_dir"]
