"""Log-probs of given tokens without the full-vocabulary tensor of a whole batch.

log pi(y) = z_y / T - logsumexp(z / T), with z the logits of the language-model head (and its soft cap where the
architecture has one). z is computed for `chunk` positions at a time and recomputed in the backward pass. So it is where a
student's and a teacher's whole distributions are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class Head:
    """The map from last hidden states [..., H] to logits [..., V] that `model.forward` applies.

    Covers a linear head with Gemma 2's final soft cap and Cohere/Granite style constant scales.
    """

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        self.model = model
        self.cap = getattr(config, "final_logit_softcapping", None)
        self.scale = getattr(config, "logit_scale", None) or (1.0 / (getattr(config, "logits_scaling", None) or 1.0))

    def __call__(self, hidden: Tensor) -> Tensor:
        linear = self.model.get_output_embeddings()  # looked up late: an adapter may have been put around it
        logits: Tensor = linear(hidden.to(linear.weight.dtype) if linear.weight.is_floating_point() else hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        return self.cap * torch.tanh(logits / self.cap) if self.cap is not None else logits

    def weight(self) -> Tensor | None:
        """[V, H] if the map is a frozen matrix and nothing else."""
        linear = self.model.get_output_embeddings()
        if type(linear) is not torch.nn.Linear or linear.bias is not None or self.scale != 1.0 or self.cap is not None:
            return None
        return None if linear.weight.requires_grad else linear.weight


def _chunk(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = head(hidden).float() / temperature
    lse = torch.logsumexp(logits, -1)
    logp = logits.gather(-1, targets[:, None]).squeeze(-1) - lse
    with torch.no_grad():
        p = torch.softmax(logits.detach(), -1)
        entropy = lse.detach() - (p * logits.detach()).sum(-1)
    return logp, entropy


def selected_logprobs(
    head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, temperature: float = 1.0, chunk: int = 2048
) -> tuple[Tensor, Tensor]:
    """Log-probs of `targets` and the entropy of the distribution they were drawn from.

    Args:
        head: See `Head`.
        hidden: Last hidden states at the positions that predict the targets, [N, H].
        targets: Token ids, int64 [N].
        temperature: Sampling temperature, > 0.
        chunk: Positions per piece.

    Returns:
        logp [N] float32 with gradient, entropy [N] float32 without; both in nats.
    """
    if not len(targets):
        zero = hidden.float().sum(-1) * 0.0
        return zero, zero.detach()
    parts = []
    for h, y in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        if torch.is_grad_enabled() and len(targets) > chunk:
            parts.append(checkpoint(_chunk, head, h, y, temperature, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_chunk(head, h, y, temperature))
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def compare(
    head: Callable[[Tensor], Tensor],
    student: Tensor,
    teacher: Tensor,
    divergence: Callable[[Tensor, Tensor], Tensor],
    temperature: float = 1.0,
    chunk: int = 2048,
) -> Tensor:
    """A divergence between two next-token distributions at each position, with gradient to the student alone.

    Args:
        head: One for both.
        student, teacher: Last hidden states [N, H].
        divergence: Takes two log-softmaxes (student's, teacher's) [n, V] to [n]; it is called again in the backward pass.
        temperature: Divides the logits of both, > 0.
        chunk: Positions per piece.

    Returns:
        [N], float32 (float64 where the head gives that), in the divergence's own unit.
    """

    def logp(hidden: Tensor) -> Tensor:
        z = head(hidden)
        return torch.log_softmax(z.to(torch.promote_types(z.dtype, torch.float32)) / temperature, -1)

    def piece(s: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            target = logp(t)
        return divergence(logp(s), target)

    if not len(student):
        return student.float().sum(-1) * 0.0
    many = torch.is_grad_enabled() and len(student) > chunk
    pieces = zip(student.split(chunk), teacher.split(chunk), strict=True)
    return torch.cat([checkpoint(piece, s, t, use_reentrant=False, preserve_rng_state=False) if many else piece(s, t) for s, t in pieces])
