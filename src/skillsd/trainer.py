"""Lightning's Trainer with `pretrain`, `export`, `play` and `serve`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L

from skillsd.analysis.gif import Gif
from skillsd.analysis.play import play_model, play_scripted
from skillsd.callbacks.export import export_adapter
from skillsd.engines.serve import serve
from skillsd.engines.settings import EngineSettings
from skillsd.errors import ConfigError
from skillsd.files.checkpoint import LAST, newest_good, read_checkpoint, step_of
from skillsd.files.durable import check_replaceable, writing
from skillsd.files.paths import read_path
from skillsd.files.run_folder import (
    ADAPTER_KIND,
    CHECKPOINTS,
    check_format,
    check_not_of_run,
    checkpoint_folder,
    has_checkpoint,
    read_record,
)
from skillsd.policy import PolicySettings


class Trainer(L.Trainer):
    """Devices, epochs, callbacks and loggers of a run: Lightning's Trainer, which can also export, pre-train, play and serve.

    Attributes:
        skillsd_config: The resolved configuration, for the loggers.
    """

    skillsd_config: dict[str, Any]

    def fit(self, *args: Any, **kwargs: Any) -> None:
        """Train an agent with Skill-SD or another method, or go on with a run whose folder is named."""
        super().fit(*args, **kwargs)

    def validate(self, *args: Any, **kwargs: Any) -> Any:
        """Play the panel, the held-out tasks, with an agent or with a run's newest checkpoint."""
        return super().validate(*args, **kwargs)

    def export(self, model: L.LightningModule, datamodule: L.LightningDataModule, out: str, ckpt_path: str | None = "last") -> None:
        """Write a checkpoint's student as a PEFT folder.

        Args:
            model: The module.
            datamodule: Not used.
            out: Folder to write.
            ckpt_path: The checkpoint; `last` is the run folder's newest.
        """
        if ckpt_path is None:
            raise ConfigError("ckpt_path is null: an adapter is exported from a checkpoint: name one, or `last`.")
        folder = read_path(out, "out")
        check_not_of_run(folder, "out")
        check_replaceable(folder, "out", ADAPTER_KIND)  # before the model is loaded
        path, steps = _restore(self, model, ckpt_path)
        print(f"weights: {describe_weights(model, path)}")
        with writing(folder, "out"):
            print(f"adapter: {export_adapter(model.policy, folder, steps, 'out')}")

    def pretrain(self, model: L.LightningModule, datamodule: L.LightningDataModule, ckpt_path: str | None = None) -> None:
        """Clone demonstrations of the environment's solver.

        Args:
            model: The module.
            datamodule: The demonstrations.
            ckpt_path: Must be null: pre-training writes its model when it ends, and no checkpoints.
        """
        if ckpt_path is not None:
            raise ConfigError("ckpt_path: pre-training has no checkpoints to go on from: leave it out.")
        self.fit(model, datamodule=datamodule)

    def play(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule,
        policy: str = "model",
        level: int | None = None,
        task: str | None = None,
        skill: bool = False,
        gif: str | None = None,
        ckpt_path: str | None = None,
    ) -> None:
        """Print one episode, turn by turn.

        Args:
            model: The module.
            datamodule: The tasks.
            policy: `model` (greedy), `oracle` (the environment's own solution) or an agent of the environment; the last two load no model.
            level: Index of the panel's task; 0 if neither it nor `task` is given.
            task: Instead of `level`, the task_id of a task of the panel or the training split.
            skill: Put the task's skill in front: the bank's, or one made from the environment's own solution.
            gif: File to write the episode to as an animation, of an environment that draws.
            ckpt_path: A checkpoint; the default is the run folder's newest, if it has one. null plays the policy as it starts.
        """
        if policy != "model":
            if skill:
                raise ConfigError(f"skill: --policy {policy} reads no prompt, so a skill would change nothing: leave out --skill.")
            if ckpt_path is not None:
                raise ConfigError(f"ckpt_path: --policy {policy} loads no model: leave out --ckpt_path.")
        with Gif(gif, datamodule) as animation:
            if policy != "model":
                play_scripted(datamodule, policy, level, task, animation)
                return
            path = None
            if ckpt_path is not None:
                path, _ = _restore(self, model, ckpt_path)
            else:
                model.configure_model()
            play_model(self, model, datamodule, level, task, skill, animation, describe_weights(model, path))

    def serve(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule,
        python: str | None = None,
        host: str = "127.0.0.1",
        port: int = 8000,
        log_file: str | None = None,
    ) -> None:
        """Start a vLLM server for the rollouts of a fit with the same configuration, and stay until Ctrl-C.

        Args:
            model: The module: its policy's base is served.
            datamodule: Its rollout settings name the server's API key, and its staleness.
            python: Interpreter of the environment that vLLM is installed in. Default: the one that runs skillsd.
            host: Address to listen on; 0.0.0.0 is every network of this machine, whose users can then load any folder as an adapter.
            port: Port to listen on.
            log_file: File for what vLLM prints. Default: vllm-PORT.log in the present folder.
        """
        policy, rollout = getattr(model, "settings", None), getattr(datamodule, "rollout", None)
        if not isinstance(policy, PolicySettings) or not isinstance(rollout, EngineSettings):
            raise ConfigError("model, data: only an experiment's policy and rollout can be served: skillsd serve -c sokoban, say.")
        file = read_path(log_file or f"vllm-{port}.log", "log_file")
        serve(policy, rollout, self.strategy.root_device, python or sys.executable, host, port, file)


def describe_weights(model: Any, path: str | Path | None) -> str:
    """Which weights a command uses, for people: a checkpoint and its iteration, or the policy as it starts."""
    if path is None:
        settings = getattr(model, "settings", None)  # a module of one's own may have none
        start = getattr(getattr(settings, "lora", None), "init", None)
        name = getattr(settings, "model", type(model).__name__)
        return f"{name}{f' with the adapter {start}' if start else ''}, as it starts (no checkpoint)"
    step = step_of(Path(path))
    return str(path) if step is None else f"{path}, iteration {step}"


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run folder that is whole; None where none was ever written.

    Raises:
        ConfigError: One was written and none is there, none is whole, or the folder is of another format.
    """
    check_format(folder)
    record = read_record(folder)
    return newest_good(checkpoint_folder(folder, record)) if has_checkpoint(folder, record) else None


def named_checkpoint(folder: Path, ckpt_path: str) -> Path:
    """The checkpoint that a command is to use.

    Args:
        folder: The run folder.
        ckpt_path: A path, or `last` for the run folder's own.

    Raises:
        ConfigError: It is not there.
    """
    path = last_checkpoint(folder) or folder / CHECKPOINTS / LAST if ckpt_path == "last" else read_path(ckpt_path, "ckpt_path")
    if not path.is_file():
        raise ConfigError(f"ckpt_path: no checkpoint at {path}: name one, or run `skillsd fit` first.")
    return path


def _restore(trainer: L.Trainer, model: Any, ckpt_path: str) -> tuple[Path, int]:
    path = named_checkpoint(Path(trainer.default_root_dir), ckpt_path)
    checkpoint = read_checkpoint(path)
    model.configure_model()
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"])
    return path, int(checkpoint["global_step"])
