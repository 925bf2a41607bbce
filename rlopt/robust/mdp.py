"""Tabular Markov decision processes and their Bellman operators.

Shape letters: S states, A actions. The operators are pure functions in the precision of their arguments (float64 in a
``TabularMDP``); leading axes, such as many instances at once, are carried along.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.envs.factory import EnvFactory, find_spec
from rlopt.robust.kernel import normalised, told
from rlopt.types import EnvSpec, RloptError


class TabularMDP:
    """A finite Markov decision process; the discount is the solver's.

    A state where episodes end is absorbing: it leads to itself with probability 1 and reward 0 under every action, so
    its value is 0. States beyond the observations of ``spec`` are allowed behind them; nobody ever acts there.

    Args:
        kernel: (S, A, S) probabilities p(s'|s, a).
        reward: (S, A) expected rewards r(s, a), or (S, A, S) rewards r(s, a, s'). Only the latter follow the mass that
            an adversary moves; to a solver that is not robust both are the same.
        initial: (S,) distribution of the first state. It and the kernel's rows sum to one; what is off by up to 1e-6,
            as float32 leaves it, is divided by its sum.
        spec: the environment it models, with Discrete observations and actions; by default of S states and A actions.
        device: where the tensors live, all float64.

    Raises:
        RloptError: shapes that do not fit, values that are not finite, rows that are no distributions.
    """

    def __init__(
        self,
        kernel: Any,
        reward: Any,
        initial: Any,
        spec: EnvSpec | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.kernel, self.reward, self.initial = (
            torch.as_tensor(x, dtype=torch.float64, device=device) for x in (kernel, reward, initial)
        )
        shape = tuple(self.kernel.shape)
        if len(shape) != 3 or shape[0] != shape[2] or 0 in shape:
            raise RloptError(f"kernel has shape {shape}; it must be (states, actions, states)")
        self.num_states, self.num_actions = shape[:2]
        if tuple(self.reward.shape) not in (shape[:2], shape):
            raise RloptError(
                f"reward has shape {tuple(self.reward.shape)}; this kernel needs {shape[:2]}, one per state and "
                f"action, or {shape}, one per next state too"
            )
        if tuple(self.initial.shape) != shape[:1]:
            raise RloptError(
                f"initial has shape {tuple(self.initial.shape)}; this kernel needs {shape[:1]}, one per state"
            )
        if not bool(self.reward.isfinite().all()):
            state, action = (~self.reward.isfinite()).nonzero()[0].tolist()[:2]
            raise RloptError(f"the reward of action {action} in state {state} is not finite; mend the model")
        rows, bad = normalised(self.kernel)
        if bool(bad.any()):
            state, action = bad.nonzero()[0].tolist()
            raise RloptError(f"kernel[{state}, {action}] is no distribution {told(self.kernel[state, action])}")
        first, bad = normalised(self.initial)
        if bool(bad):
            raise RloptError(f"initial is no distribution {told(self.initial)}")
        self.kernel, self.initial = rows, first
        self.spec = spec or EnvSpec("tabular", spaces.Discrete(self.num_states), spaces.Discrete(self.num_actions))
        self._check_spec()

    def _check_spec(self) -> None:
        observations, actions = self.spec.observation_space, self.spec.action_space
        if not (isinstance(observations, spaces.Discrete) and isinstance(actions, spaces.Discrete)):
            raise RloptError(f"a tabular model needs Discrete spaces, not {observations} and {actions}")
        if int(observations.n) > self.num_states or int(actions.n) != self.num_actions:
            raise RloptError(
                f"a model of {self.num_states} states and {self.num_actions} actions does not fit {observations} and "
                f"{actions}; give the spec of the environment it models"
            )

    def to(self, device: torch.device | str) -> TabularMDP:
        """Return the same model with its tensors on ``device``."""
        return TabularMDP(self.kernel, self.reward, self.initial, self.spec, device)


def expected_reward(kernel: Tensor, reward: Tensor) -> Tensor:
    """Return r(s, a) (…, S, A) of a reward (…, S, A), or of one per next state, which has the kernel's shape (…, S, A,
    S)."""
    return (kernel * reward).sum(-1) if reward.shape == kernel.shape else reward


def action_values(kernel: Tensor, reward: Tensor, gamma: float, value: Tensor) -> Tensor:
    """Return Q(s, a) = r(s, a) + γ Σ p(s'|s, a) V(s'): (…, S, A) from kernel (…, S, A, S) and value (…, S).

    Here and below, ``reward`` is (…, S, A), or (…, S, A, S) of the kernel's own shape (``expected_reward``).
    """
    return expected_reward(kernel, reward) + gamma * (kernel @ value[..., None, :, None]).squeeze(-1)


def bellman_policy(kernel: Tensor, reward: Tensor, gamma: float, policy: Tensor, value: Tensor) -> Tensor:
    """Return one backup (…, S) of the value (…, S) of the policy with probabilities π(a|s) (…, S, A)."""
    return (policy * action_values(kernel, reward, gamma, value)).sum(-1)


def greedy(action_value: Tensor) -> Tensor:
    """Return the deterministic policy (…, S, A) that takes the best action; of equally good ones the first."""
    best = action_value.argmax(-1, keepdim=True)
    return torch.zeros_like(action_value).scatter_(-1, best, 1.0)


def policy_value(kernel: Tensor, reward: Tensor, gamma: float, policy: Tensor) -> Tensor:
    """Return the value (…, S) of the policy (…, S, A): the solution of (I - γ P_π) v = r_π, by LU. Needs γ < 1."""
    transition = torch.einsum("...sa,...sat->...st", policy, kernel)
    identity = torch.eye(transition.shape[-1], dtype=transition.dtype, device=transition.device)
    income = (policy * expected_reward(kernel, reward)).sum(-1)
    value: Tensor = torch.linalg.solve(identity - gamma * transition, income)
    return value


def discounted_bounds(gamma: float, value: Tensor, backed_up: Tensor) -> tuple[Tensor, Tensor]:
    """Return bounds (…, S) on the fixed point of a backup T from one application, ``backed_up`` = T ``value`` (…, S
    each).

    Tv + γ/(1-γ) min(Tv - v) ≤ v* ≤ Tv + γ/(1-γ) max(Tv - v), for every monotone T with T(v + c) = Tv + γc, such as
    the Bellman operators of one policy and of the best one (MacQueen 1966; Puterman 1994, section 6.6). The value of
    the policy that attains Tv lies above the lower bound too. They hold up to rounding, and need γ < 1.
    """
    change = backed_up - value
    factor = gamma / (1.0 - gamma)
    return backed_up + factor * change.amin(-1, keepdim=True), backed_up + factor * change.amax(-1, keepdim=True)


def from_toy_text(id: str, kwargs: Mapping[str, Any] | None = None, device: torch.device | str = "cpu") -> TabularMDP:
    """Return the model inside a Gymnasium toy-text environment (FrozenLake, CliffWalking, Taxi): its
    ``env.unwrapped.P``.

    A transition that ends the episode leads to an absorbing state of value 0. Where every transition into a state ends
    the episode, that is the state itself; where only some do (Taxi), one more state is appended and those lead there.
    So values equal those of the real environment without its time limit, from every state of the table. The reward is
    r(s, a, s'), the mean over the table's entries of that transition: an adversary that moves mass moves it as well.

    Args:
        id: a registered environment.
        kwargs: its keyword arguments, such as ``is_slippery``.

    Raises:
        RloptError: an unknown environment, or one that shows no model.
    """
    env = EnvFactory(find_spec(id), dict(kwargs or {}))()
    try:
        inner: Any = env.unwrapped
        table, initial = getattr(inner, "P", None), getattr(inner, "initial_state_distrib", None)
        observations, actions = inner.observation_space, inner.action_space
        limit = env.spec.max_episode_steps if env.spec else None
    finally:
        env.close()
    discrete = isinstance(observations, spaces.Discrete) and isinstance(actions, spaces.Discrete)
    if table is None or initial is None or not discrete:
        raise RloptError(
            f"env={id} shows no transition table (P and initial_state_distrib); model-based agents need a toy-text "
            "environment such as FrozenLake-v1, CliffWalking-v1 or Taxi-v4"
        )
    n, k = int(observations.n), int(actions.n)
    entries = [
        (s, a, float(p), int(t), float(r), bool(done))
        for s in range(n)
        for a in range(k)
        for p, t, r, done in table[s][a]
        if p > 0.0
    ]
    ends = {t for *_, t, _, done in entries if done}
    passes = {t for s, _, _, t, _, done in entries if not done and s not in ends}
    mixed = bool(ends & passes)
    size = n + 1 if mixed else n
    kernel = torch.zeros(size, k, size, dtype=torch.float64)
    reward = torch.zeros_like(kernel)
    absorbing = [n] if mixed else sorted(ends)
    for s, a, p, t, r, done in entries:
        to = n if done and mixed else t
        kernel[s, a, to] += p
        reward[s, a, to] += p * r
    reward = torch.where(kernel > 0.0, reward / kernel.clamp(min=1e-300), 0.0)
    for s in absorbing:
        kernel[s], reward[s] = 0.0, 0.0
        kernel[s, :, s] = 1.0
    first = torch.zeros(size, dtype=torch.float64)
    first[:n] = torch.as_tensor(initial, dtype=torch.float64)
    return TabularMDP(kernel, reward, first, EnvSpec(id, observations, actions, limit), device)
