"""Adherence-aware advice: a machine that may advise a human, who may not listen (Chen, Li, Sun and Wang 2024, ICLR,
arXiv 2310.00817).

In state s and step h the machine advises an action or *defers*. Deferred to, the human follows his own π^H_h. Advised,
he obeys with probability θ(s, a) and else acts for himself. Given θ, this is an MDP with one action more: defer. The
paper's equation (1) for the one who does not obey could not be read; two forms are offered: ``mixture`` draws from π^H,
``conditional`` from π^H without the action refused. Only the first makes the optimal value rise with θ everywhere.

Shape letters: H steps, S states, A actions, R independent runs (any leading axes).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlopt.random import numpy_generator
from rlopt.types import RloptError

FORMS = ("mixture", "conditional")


class Plan(NamedTuple):
    """An optimal advice policy."""

    value: Tensor
    """(…, H + 1, S) expected reward to come, costs of advice deducted; 0 at the end."""
    advice: Tensor
    """(…, H, S) int64: the action to advise, A to defer."""
    advices: Tensor
    """(…, H + 1, S) expected number of advices still to be given."""


class AdviceModel:
    """The world and the human.

    Args:
        kernel: (S, A, S). reward: (S, A). human: π^H as (S, A) or (H, S, A).
        horizon: H. initial: (S,) (default: state 0).
        form: what happens to a refused advice, ``mixture`` or ``conditional``.
    """

    def __init__(
        self, kernel: Any, reward: Any, human: Any, horizon: int, initial: Any = None, form: str = "mixture"
    ) -> None:
        self.kernel, self.reward, policy = (torch.as_tensor(x, dtype=torch.float64) for x in (kernel, reward, human))
        s, a = self.num_states, self.num_actions = self.reward.shape
        if tuple(self.kernel.shape) != (s, a, s) or policy.shape[-2:] != (s, a):
            raise RloptError(f"kernel must be ({s}, {a}, {s}) and human ({s}, {a}) or ({horizon}, {s}, {a})")
        if form not in FORMS:
            raise RloptError(f"form={form!r}: choose {' or '.join(FORMS)}")
        for law, name in ((self.kernel, "kernel"), (policy, "human")):
            if not bool(((law >= 0.0).all(-1) & ((law.sum(-1) - 1.0).abs() <= 1e-9)).all()):
                raise RloptError(f"{name} has rows that are no distributions")
        self.horizon, self.form = horizon, form
        self.human = policy.expand(horizon, s, a)
        start = torch.eye(s, dtype=torch.float64)[0] if initial is None else initial
        self.initial = torch.as_tensor(start, dtype=torch.float64)

    def refused(self, h: int) -> Tensor:
        """Return (S, A, A) the law of what is done in step h when advice a (second axis) is refused."""
        pi = self.human[h]
        law = pi[:, None, :].expand(self.num_states, self.num_actions, self.num_actions)
        if self.form == "mixture":
            return law
        keep = 1.0 - torch.eye(self.num_actions, dtype=torch.float64)
        rest = (law * keep).sum(-1, keepdim=True)
        # Who would do nothing but what he is advised does it even when he does not listen.
        return torch.where(rest > 0.0, law * keep / rest.clamp(min=1e-300), 1.0 - keep)

    def executed(self, h: int, theta: Tensor) -> Tensor:
        """Return (…, S, A + 1, A) the law of the action done, for every advice and for deferring (last), at adherence
        ``theta`` (…, S, A)."""
        obeyed = torch.eye(self.num_actions, dtype=torch.float64)
        advised = theta[..., None] * obeyed + (1.0 - theta[..., None]) * self.refused(h)
        deferred = self.human[h][:, None, :].expand(*theta.shape[:-2], self.num_states, 1, self.num_actions)
        return torch.cat([advised, deferred], -2)

    def plan(self, theta: Tensor, beta: float = 0.0) -> Plan:
        """Plan by backward induction at a known adherence (…, S, A); every advice costs ``beta``. Ties defer."""
        return self._plan(theta[None], beta)

    def plan_robust(self, low: Tensor, high: Tensor, beta: float = 0.0) -> Plan:
        """Return the best plan when adherence may be anything in [low, high] (S, A), chosen anew by an adversary.

        Each row of the induced kernel is then a segment, an (s,a)-rectangular set, and linear in θ: an end is worst.
        """
        return self._plan(torch.stack([low, high]), beta)

    def _plan(self, thetas: Tensor, beta: float) -> Plan:
        """``thetas`` (T, …, S, A): each advice is worth the least of its T values."""
        lead = thetas.shape[1:-2]
        value = [torch.zeros(*lead, self.num_states, dtype=torch.float64)]
        count, advice = [value[0]], []
        for h in reversed(range(self.horizon)):
            now = self.reward + torch.einsum("sat,...t->...sa", self.kernel, value[-1])
            later = torch.einsum("sat,...t->...sa", self.kernel, count[-1])
            laws = self.executed(h, thetas)
            q, index = (laws * now[..., None, :]).sum(-1).min(0)
            q[..., :-1] -= beta
            best = q[..., :-1].max(-1)
            # Deferring where advice gains nothing beyond rounding.
            defer = q[..., -1] >= best.values - 1e-12
            choice = torch.where(defer, self.num_actions, best.indices)
            chosen = (
                (laws * later[..., None, :]).sum(-1).gather(0, index[None])[0].gather(-1, choice[..., None])[..., 0]
            )
            value.append(q.gather(-1, choice[..., None])[..., 0])
            count.append(chosen + (choice < self.num_actions))
            advice.append(choice)
        return Plan(torch.stack(value[::-1], -2), torch.stack(advice[::-1], -2), torch.stack(count[::-1], -2))

    def worth(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """Return (…,) value and expected number of advices of a plan from the first state on."""
        return (plan.value[..., 0, :] * self.initial).sum(-1), (plan.advices[..., 0, :] * self.initial).sum(-1)

    def evaluate(self, theta: Tensor, advice: Tensor) -> Tensor:
        """Return (…,) the expected reward of the advice (…, H, S) at adherence ``theta`` (S, A)."""
        value = torch.zeros(*advice.shape[:-2], self.num_states, dtype=torch.float64)
        for h in reversed(range(self.horizon)):
            now = self.reward + torch.einsum("sat,...t->...sa", self.kernel, value)
            q = (self.executed(h, theta) * now[..., None, :]).sum(-1)
            value = q.gather(-1, advice[..., h, :, None])[..., 0]
        return (value * self.initial).sum(-1)


def breakpoints(model: AdviceModel, theta: Tensor, most: float | None = None) -> list[tuple[float, float, float]]:
    """Return all pieces of V*_β over 0 ≤ β ≤ ``most``, as (β where it begins, V there, expected advices on it).

    V*_β, the best reward less β per advice, is convex, falling and piecewise linear in β with minus the number of
    advices as slope, so the tangents of two plans meet at a kink or under a further piece (Eisner and Severance 1976).
    ``most`` defaults to where advice never pays: H times the widest reward.
    """
    end = most if most is not None else model.horizon * float(model.reward.max() - model.reward.min()) + 1.0

    def at(beta: float) -> tuple[float, float]:
        value, count = model.worth(model.plan(theta, beta))
        return float(value), float(count)

    pieces: dict[float, tuple[float, float]] = {}

    def search(b0: float, v0: float, n0: float, b1: float, v1: float, n1: float) -> None:
        if n0 - n1 <= 1e-12:
            return
        meet = (v1 - v0 + n1 * b1 - n0 * b0) / (n1 - n0)
        meet = min(max(meet, b0), b1)
        value, count = at(meet)
        if value <= v0 - n0 * (meet - b0) + 1e-10:  # the tangents meet on the curve: a kink
            pieces[meet] = (value, n1)
            return
        search(b0, v0, n0, meet, value, count)
        search(meet, value, count, b1, v1, n1)

    v0, n0 = at(0.0)
    v1, n1 = at(end)
    search(0.0, v0, n0, end, v1, n1)
    pieces.setdefault(0.0, (v0, n0))
    return [(beta, *pieces[beta]) for beta in sorted(pieces)]


def best_within_budget(model: AdviceModel, theta: Tensor, budget: float) -> tuple[float, float]:
    """Return the most reward with at most ``budget`` expected advices, and the price β of an advice at which it is had.

    Lagrangian duality (a linear program, so without a gap): min_β V*_β + β·budget, attained at a breakpoint.
    """
    if budget < 0.0:
        raise RloptError(f"budget={budget:g}: must be at least 0")
    return min((value + beta * budget, beta) for beta, value, _ in breakpoints(model, theta))


class Learning(NamedTuple):
    """What learning adherence led to."""

    value: Tensor
    """(episodes, R) the true value of the advice followed in each episode."""
    optimum: float
    """That of the best advice at the true adherence."""
    estimate: Tensor
    """(R, S, A) the final optimistic estimates."""


def ucb_ad(
    model: AdviceModel, theta: Tensor, episodes: int, runs: int = 1, delta: float = 0.1, seed: int = 0,
    optimistic: bool = True,
) -> Learning:  # fmt: skip
    """Run UCB-AD: kernel and human known, adherence not. R runs side by side, each an episode at a time.

    θ̄ = min(1, k/n + √(log(2 S A H E/δ)/(2 n))) from n advices and k obediences in (s, a), backward induction on θ̄, an
    episode of its advice. Optimism is sound because the optimal value rises with θ (deferring is always there). The
    constant inside the logarithm is a union bound, not the paper's own. Whether the human obeyed is seen.

    Args:
        theta: (S, A) the true adherence, used to simulate. optimistic: False follows k/n alone (1/2 where n = 0).
    """
    s, a = theta.shape
    rng = numpy_generator(seed, "ucb_ad")
    asked, obeyed = torch.zeros(runs, s, a, dtype=torch.float64), torch.zeros(runs, s, a, dtype=torch.float64)
    rows = torch.arange(runs)
    scale = np.log(2.0 * s * a * model.horizon * episodes / delta)
    refused = [model.refused(h) for h in range(model.horizon)]
    estimate = torch.ones_like(asked)
    values: list[Tensor] = []
    for _ in range(episodes):
        mean = torch.where(asked > 0.0, obeyed / asked.clamp(min=1.0), 0.5)
        bonus = (scale / (2.0 * asked.clamp(min=1e-9))).sqrt()
        estimate = (mean + bonus).clamp(max=1.0) if optimistic else mean
        advice = model.plan(estimate).advice
        values.append(model.evaluate(theta, advice))
        state = _draw(rng, model.initial.expand(runs, s))
        for h in range(model.horizon):
            told = advice[rows, h, state]
            gives = told < a
            action = told.clamp(max=a - 1)
            obeys = gives & (torch.from_numpy(rng.random(runs)) < theta[state, action])
            law = torch.where(gives[:, None], refused[h][state, action], model.human[h][state])
            done = torch.where(obeys, action, _draw(rng, law))
            asked[rows, state, action] += gives
            obeyed[rows, state, action] += obeys
            state = _draw(rng, model.kernel[state, done])
    best = float(model.worth(model.plan(theta))[0])
    return Learning(torch.stack(values), best, estimate)


def _draw(rng: np.random.Generator, law: Tensor) -> Tensor:
    """(R,) one index of each row of ``law`` (R, n)."""
    cumulative = law.cumsum(-1)
    uniform = torch.from_numpy(rng.random(len(law))) * cumulative[:, -1]
    return (cumulative <= uniform[:, None]).sum(-1)


def flappy_bird(
    height: int = 7, width: int = 20, human: str = "greedy", form: str = "mixture"
) -> tuple[AdviceModel, Tensor]:
    """Return a bird on a grid that flies up or down past three pipes, with a human and his true adherence (S, A).

    Built after the description of the paper's experiment; the layout and the humans are our own. Every step moves the
    bird one column on and one row up or down, with 0.1 the other way; it earns 1 for each step survived. Pipes stand in
    columns 5, 10 and 15 with a gap of three rows, low, high and low. The ``greedy`` human steers to the middle of the
    nearest gap only in the two columns before it and flutters at random elsewhere; the ``fixed`` one goes up with 0.6.
    He obeys with 0.9 in the upper half and 0.7 in the lower one.
    """
    if human not in ("greedy", "fixed"):
        raise RloptError(f"human={human!r}: choose greedy or fixed")
    gaps = {5: height - 2, 10: 1, 15: height - 2}  # column: middle row of the gap, counted from the top
    dead, n = height * width, height * width + 1
    kernel, reward, policy = np.zeros((n, 2, n)), np.zeros((n, 2)), np.full((n, 2), 0.5)
    kernel[dead, :, dead] = 1.0
    for row in range(height):
        for column in range(width):
            s = row * width + column
            for a, p_up in ((0, 0.9), (1, 0.1)):
                for step, p in ((-1, p_up), (1, 1.0 - p_up)):
                    r, c = row + step, min(column + 1, width - 1)
                    alive = 0 <= r < height and (c not in gaps or abs(r - gaps[c]) <= 1)
                    kernel[s, a, r * width + c if alive else dead] += p
                    reward[s, a] += p * alive
            ahead = [c for c in gaps if column < c <= column + 2]
            if human == "fixed":
                policy[s] = 0.6, 0.4
            elif ahead:
                policy[s] = (0.9, 0.1) if row > gaps[ahead[0]] else (0.1, 0.9)
    theta = np.full((n, 2), 0.7)
    theta[: (height // 2) * width] = 0.9
    start = np.eye(n)[(height // 2) * width]
    return AdviceModel(kernel, reward, policy, width, start, form), torch.from_numpy(theta)
