"""The distillation term against exact expectations on a vocabulary of 7 (float64)."""

import pytest
import torch
from torch import Tensor

from skillsd.objective import Objective, k3, score, skill_sd

V = 7


@pytest.fixture
def dists() -> tuple[Tensor, Tensor, Tensor]:
    """Student's logits, teacher's log-probs, another old student's log-probs."""
    g = torch.Generator().manual_seed(3)
    z, tea, old = torch.randn(3, V, generator=g, dtype=torch.float64)
    return z.requires_grad_(), tea.log_softmax(-1), old.log_softmax(-1)


def gradient(loss: Tensor, z: Tensor) -> Tensor:
    return torch.autograd.grad(loss, z)[0]


def reverse_kl(z: Tensor, tea: Tensor) -> Tensor:
    stu = z.log_softmax(-1)
    return gradient((stu.exp() * (stu - tea)).sum(), z)


def forward_kl(z: Tensor, tea: Tensor) -> Tensor:
    return gradient((tea.exp() * (tea - z.log_softmax(-1))).sum(), z)


@pytest.mark.parametrize("estimator", [skill_sd, score])
@pytest.mark.parametrize("behaviour", ["student", "old student", "old teacher"])
def test_expected_gradient_is_reverse_kl(dists, estimator, behaviour):
    """Prop. 2 for whoever sampled: the student itself (first step), an older student (Eq. 12), the teacher (Eq. 13)."""
    z, tea, old = dists
    b = {"student": z.detach().log_softmax(-1), "old student": old, "old teacher": tea}[behaviour]
    loss = (b.exp() * estimator(z.log_softmax(-1), b, tea)).sum()
    torch.testing.assert_close(gradient(loss, z), reverse_kl(z, tea), atol=1e-6, rtol=0)


def test_detached_ratio_trains_forward_kl(dists):
    """With sg(rho) the expected gradient is that of KL(pi_tea || pi_stu), whatever the old student was: not what is wanted."""
    z, tea, old = dists
    logp = z.log_softmax(-1)
    for b in (old, logp.detach()):
        rho = (logp - b).exp().detach()
        wrong = gradient((b.exp() * rho * k3(logp - tea)).sum(), z)
        torch.testing.assert_close(wrong, forward_kl(z, tea), atol=1e-6, rtol=0)
        assert (wrong - reverse_kl(z, tea)).abs().max() > 1e-2
        logp = z.log_softmax(-1)


def test_score_has_the_same_gradient_per_token(dists):
    z, tea, old = dists
    for token in range(V):
        a, b = (gradient(f(z.log_softmax(-1), old, tea)[token], z) for f in (skill_sd, score))
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


def test_score_does_not_overflow():
    logp = torch.tensor([-200.0], requires_grad=True)
    old, tea = torch.tensor([-200.0]), torch.tensor([0.0])
    assert not gradient(skill_sd(logp, old, tea), logp).isfinite().all()  # exp(200) is not a float32
    torch.testing.assert_close(gradient(score(logp, old, tea), logp), torch.tensor([-200.0]))


@pytest.mark.parametrize("estimator", [skill_sd, score])
def test_no_gradient_where_teacher_is_student(dists, estimator):
    z, _, old = dists
    logp = z.log_softmax(-1)
    assert gradient(estimator(logp, old, logp.detach()).sum(), z).abs().max() == 0


@pytest.mark.parametrize("estimator", ["skill_sd", "score"])
def test_first_step_equals_a_token_advantage(estimator):
    """With one update a batch, L_GRPO + lambda L_SDL has the gradient of L_GRPO with A + lambda (log tea - log old)."""
    g = torch.Generator().manual_seed(0)
    logp = -torch.rand(3, 5, generator=g, dtype=torch.float64).requires_grad_()
    tea = -torch.rand(3, 5, generator=g, dtype=torch.float64)
    mask = torch.rand(3, 5, generator=g) < 0.7
    advantage = torch.randn(3, generator=g, dtype=torch.float64)
    n, lam = int(mask.sum()), 0.1
    both = Objective(distillation_weight=lam, estimator=estimator)
    got = gradient(both.total(both.terms(logp, logp.detach(), tea, mask, advantage), n), logp)

    ratio = (logp - logp.detach()).exp()
    token_advantage = advantage[:, None] + lam * (tea - logp.detach())
    want = gradient(-(ratio * token_advantage * mask).sum() / n, logp)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
