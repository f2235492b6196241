"""A path is read once, where it comes in."""

from __future__ import annotations

from argparse import Namespace

import pytest

from skillsd.errors import ConfigError
from skillsd.files.paths import read_path, read_paths
from skillsd.policy import LoraSettings, PolicySettings


def test_paths_of_a_configuration(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    logger = Namespace(init_args=Namespace(save_dir="~/run", name="~"))
    config = Namespace(
        fit=Namespace(trainer=Namespace(default_root_dir="~/run", callbacks=[Namespace(init_args=Namespace(dirpath="~"))], logger=logger)),
        data={"tasks_file": "~/tasks.jsonl", "env_kwargs": {"out": "~/x"}, "template": "~/ {skill}"},
        ckpt_path="./a",
    )
    read_paths(config)
    assert config.fit.trainer.default_root_dir == logger.init_args.save_dir == "/home/me/run" and logger.init_args.name == "~"
    assert config.fit.trainer.callbacks[0].init_args.dirpath == "/home/me" and config.ckpt_path == "./a"
    assert config.data == {"tasks_file": "/home/me/tasks.jsonl", "env_kwargs": {"out": "~/x"}, "template": "~/ {skill}"}


def test_paths_of_a_policy(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    settings = PolicySettings("~/m1", lora=LoraSettings(init="~/a"), chat_template="~/t.jinja")
    assert (settings.model, settings.lora.init, settings.chat_template) == ("/home/me/m1", "/home/me/a", "/home/me/t.jinja")
    settings = PolicySettings("./m1", lora=LoraSettings(init="nano-recover"), chat_template="qwen3")
    assert (settings.model, settings.lora.init, settings.chat_template) == ("./m1", "nano-recover", "qwen3")


def test_a_home_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"^out: ~nobody-of-this-name/x"):
        read_path("~nobody-of-this-name/x", "out")
