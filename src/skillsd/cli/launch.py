"""Commands that a configuration describes: fit, pretrain, validate, export, play, serve. Importing this loads torch and Lightning."""

from __future__ import annotations

import logging
import os
import warnings

from transformers.utils import logging as transformers_logging

from skillsd.callbacks.run_config import SaveRunConfig
from skillsd.cli.arguments import Request
from skillsd.cli.configured import CLI, EXPERIMENT, PRETRAINING
from skillsd.cli.owner import RunOwner
from skillsd.cli.values import prepare_parsers
from skillsd.trainer import Trainer


def quiet() -> None:
    """Leave the terminal to the progress bar and the table."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    known = ("num_workers", "eval mode at the start", "activation_checkpointing", "transfer_batch_to_device", "manual optimization")
    for text in (
        *known,
        "args parameter",
        "litlogger",
        "treespec",
        "no last checkpoint available",
        "dirpath has changed",
        "exists and is not empty",
        "The AccumulateGrad node's stream",  # DDP is made beside the stream that trains; the engine waits for both
    ):
        warnings.filterwarnings("ignore", message=f"(?s).*{text}")


def launch(request: Request) -> None:
    """Run the command of a request.

    Raises:
        ConfigError: something in its files or flags cannot be.
    """
    quiet()
    prepare_parsers()
    model, data = PRETRAINING if request.command == "pretrain" else EXPERIMENT
    with RunOwner() as owner:
        CLI(
            request=request,
            owner=owner,
            model_class=model,
            datamodule_class=data,
            trainer_class=Trainer,
            auto_configure_optimizers=False,
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"parser_mode": "omegaconf+", "prog": "skillsd", "exit_on_error": False},
        )
