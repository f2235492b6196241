"""What Trackio receives, seen by a module that stands for it."""

import sys
from types import SimpleNamespace

import pytest

from skillsd.callbacks import TrackioLogger
from skillsd.errors import ConfigError


def test_trackio_gets_settings_numbers_and_an_end(monkeypatch):
    said = []
    run = SimpleNamespace(log=lambda metrics, step: said.append((metrics, step)), finish=lambda: said.append("finished"))
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=lambda **given: said.append(given) or run))
    logger = TrackioLogger(project="p", run_name="r")
    assert said == [] and (logger.name, logger.version) == ("p", "r")
    logger.log_hyperparams({"lr": 1})
    logger.log_metrics({"loss": 0.5}, 3)
    logger.finalize("success")
    logger.finalize("success")
    begun, *rest = said
    assert (begun["project"], begun["name"], begun["config"], begun["resume"]) == ("p", "r", {"lr": 1}, "allow")
    assert rest == [({"loss": 0.5}, 3), "finished"]


def test_without_trackio_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match=r"trainer\.logger"):
        TrackioLogger()
