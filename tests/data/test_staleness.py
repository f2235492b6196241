"""Training on rollouts that were sampled elsewhere, and earlier: short fits against fake servers."""

import threading
from typing import Any

import lightning as L
import pytest
import torch
from tests.engines.fake_server import serving
from tests.sokoban import ENV, KWARGS
from tests.tolerance import ROUNDING
from tests.training import quiet_trainer

from skillsd.data import RolloutData
from skillsd.engines.noise import stream_key
from skillsd.errors import ConfigError
from skillsd.module import SkillSD
from skillsd.objective import Objective
from skillsd.optimizer import OptimizerSettings
from skillsd.policy import TokenSequence
from skillsd.rollout import RolloutSettings

SHAPED = KWARGS | {"distance_reward": 0.1, "invalid_penalty": 0.1, "splits": {"train": {"short": 4}, "test": {"short": 1}}}
"""Rewards that differ within each group; an epoch has two iterations."""


class Look(L.Callback):
    """Keeps of every iteration the batch, the student's version at its start, the gradient asked for by hand, and that of training."""

    def __init__(self) -> None:
        self.batches, self.versions, self.wanted, self.grads, self.metrics = [], [], [], [], []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        engine = trainer.datamodule.collector.engine
        self.batches.append(batch)
        self.versions.append(getattr(engine.snapshot("student"), "name", ""))
        self.wanted.append(gradients(module, batch))

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.grads.append(torch.cat([p.grad.flatten() for p in module.policy.student_parameters()]))
        self.metrics.append(dict(outputs["metrics"]))

    @property
    def played(self) -> list[Any]:
        return [t for batch in self.batches for g in batch for t in g.trajectories]


def gradients(module: Any, groups: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 3, 4 and 12 by hand, with what the rollout recorded as the old policy; and the same as if it were today's."""
    policy, found = module.policy, []
    rows = [(g, t) for g in groups for t in g.trajectories]
    n = sum(t.n_actions for _, t in rows)
    for stale in (True, False):
        loss = torch.zeros(())
        for g, t in rows:
            s, mask = TokenSequence(g.student_prompts[t.member], t.token_ids, t.action_mask), torch.tensor(t.action_mask)
            logp = policy.score("student", [s]).logp[0][mask]
            teacher = policy.score("teacher", [s]).logp[0][mask].detach()
            ratio = (logp - (torch.tensor(t.logprobs)[mask] if stale else logp.detach())).exp()
            reward = torch.tensor([x.reward for x in g.trajectories])
            a = (t.reward - reward.mean()) / (reward.std() + 1e-8) if reward.std() > 0 else torch.zeros(())
            ell = logp - teacher
            loss = loss - torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a).sum() / n
            loss = loss + 0.5 * (ratio * ((-ell).exp() - 1 + ell)).sum() / n
        found.append(torch.cat([x.flatten() for x in torch.autograd.grad(loss, policy.student_parameters())]))
    return found[0], found[1]


@pytest.fixture
def fit(make_policy, tmp_path):
    def run(epochs: int = 1, lr: float = 1e-3, look: Look | None = None, **rollout: Any) -> Look:
        policy, look = make_policy(), look or Look()
        module = SkillSD(policy.settings, Objective(distillation_weight=0.5), OptimizerSettings(lr=lr, gradient_clip_norm=0.0))
        module.policy = policy
        settings = RolloutSettings(max_turn_tokens=2, max_rows=8, **rollout)
        data = RolloutData(ENV, SHAPED, batch_tasks=2, group_size=2, rollout=settings)
        quiet_trainer(look, max_epochs=epochs, default_root_dir=tmp_path).fit(module, datamodule=data)
        return look

    return run


def used(servers: Any, look: Look) -> list[set[str]]:
    """The versions that each iteration's turns were asked of."""
    models = {b["vllm_xargs"]["skillsd_key"]: b["model"] for s in servers for b in s.asked}
    return [
        {models[str(stream_key(0, "rollout", j, g.task.task_id, t.member))] for g in batch for t in g.trajectories}
        for j, batch in enumerate(look.batches)
    ]


@pytest.fixture
def new_threads():
    """Threads of rollouts that this test has left behind; others may have hung one on purpose."""
    before = set(threading.enumerate())
    return lambda: [t for t in threading.enumerate() if t.name in ("rollout", "environment") and t not in before]


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).norm() <= 1e-4 * b.norm())


def test_without_staleness_it_is_the_default_engine(fit, tiny_model):
    own = fit()
    with serving(tiny_model("qwen3"), 2) as servers:
        theirs = fit(engine="servers", servers=[s.url for s in servers])
    for a, b in zip(own.played, theirs.played, strict=True):
        assert (a.token_ids, a.turns, a.reward) == (b.token_ids, b.turns, b.reward)
        assert a.logprobs == pytest.approx(b.logprobs, abs=ROUNDING)
    assert used(servers, theirs) == [{v} for v in theirs.versions] and len(set(theirs.versions)) == 2
    assert all(m["policy/logp_drift_max"] < ROUNDING for m in theirs.metrics)
    assert all(not s.adapters for s in servers) and all(len(s.loads) == 2 for s in servers)


@pytest.mark.parametrize("staleness", [1, 2])
def test_rollouts_lag_by_the_staleness_and_the_loss_knows_it(fit, tiny_model, staleness, new_threads):
    """Iteration j is sampled with the version after j - s updates, over an epoch's end too; the loss knows, and the drift shows it."""
    with serving(tiny_model("qwen3")) as (server,):
        look = fit(epochs=2, lr=1e-2, engine="servers", servers=[server.url], staleness=staleness, env_workers=1)
    v = look.versions
    assert len(set(v)) == 4 and used([server], look) == [{v[max(0, j - staleness)]} for j in range(4)]
    assert server.loads == v[: 4 - staleness], "none is launched beyond the run's end"
    for j, (grad, (wanted, fresh), m) in enumerate(zip(look.grads, look.wanted, look.metrics, strict=True)):
        assert close(grad, wanted) and close(fresh, wanted) == (j == 0)
        assert (m["policy/logp_drift"] > 1e-3) == (j > 0)
    assert not new_threads()


def test_the_next_rollout_runs_during_the_update(fit, tiny_model):
    """The next iteration's turns are answered while this one's update has not begun."""
    with serving(tiny_model("qwen3")) as (server,):
        look, ahead = Look(), []

        def wait(trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                (future,) = [play.__self__ for _, _, play in trainer.datamodule._stream._launched.values()]
                future.result(30)
                ahead.append(len(server.asked))

        look.on_train_batch_start = wait
        look.on_train_batch_end = lambda *_: ahead.append(len(server.asked))
        fit(look=look, engine="servers", servers=[server.url], staleness=1, env_workers=1)
        assert ahead[0] == ahead[1] == ahead[2] > 2 * 2 * 2, "and there is no third iteration"


@pytest.mark.parametrize("when", ["foreground", "background"])
def test_losing_the_last_server_ends_the_run(fit, tiny_model, when, new_threads):
    """A line that says what to do; nothing hangs, whoever was waiting for it."""
    with serving(tiny_model("qwen3")) as (server,):
        look, staleness = Look(), int(when == "background")
        look.on_train_batch_start = lambda *_: server.kill()
        look.on_train_batch_end = lambda *_: None
        with pytest.raises(ConfigError, match=rf"no server is left \({server.url}: .*the run's last checkpoint stands"):
            fit(look=look, engine="servers", servers=[server.url], staleness=staleness, env_workers=staleness)
    assert not new_threads()


def test_an_error_ends_the_rollout_in_the_background(fit, tiny_model, new_threads):
    """The rollout in the background ends, though a server takes its time."""
    hold = threading.Event()
    with serving(tiny_model("qwen3")) as (server,):
        look = Look()

        def stop(*_: Any) -> None:
            server.before = lambda body: hold.wait(20)
            raise SystemExit(3)

        look.on_train_batch_start = stop
        with pytest.raises(SystemExit):
            fit(look=look, engine="servers", servers=[server.url], staleness=2, env_workers=1)
        hold.set()
    assert not new_threads()
