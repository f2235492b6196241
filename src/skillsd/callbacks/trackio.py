"""Lightning has loggers for W&B and MLflow, and none for Trackio; this is one."""

from __future__ import annotations

import importlib
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from skillsd.errors import ConfigError


class TrackioLogger(Logger):
    """Gives a run's numbers to Trackio (https://github.com/gradio-app/trackio), which keeps them on this machine: `trackio show`.

    Args:
        project: The project that the run is listed under.
        run_name: Its name there. Default: Trackio makes one up. A run of that name goes on, as a resumed fit does.

    Raises:
        ConfigError: trackio is not installed.
    """

    def __init__(self, project: str = "skillsd", run_name: str | None = None) -> None:
        super().__init__()
        try:
            self._trackio: Any = importlib.import_module("trackio")
        except ModuleNotFoundError as e:
            raise ConfigError("trainer.logger: TrackioLogger needs trackio: pip install trackio.") from e
        self.project, self.run_name = project, run_name
        self._run: Any = None

    @property
    def name(self) -> str:
        return self.project

    @property
    def version(self) -> str | None:
        return self.run_name

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        self._begin(dict(params) if isinstance(params, Mapping) else vars(params))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._begin({})
        self._run.log(dict(metrics), step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _begin(self, config: dict[str, Any]) -> None:
        """Open the run when there is something to write: a run that is refused before leaves nothing behind."""
        if self._run is None:
            self._run = self._trackio.init(project=self.project, name=self.run_name, config=config, resume="allow", embed=False)
