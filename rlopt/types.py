"""The nouns every part of rlopt shares: observations, environment specifications, and what acting and updating return.

Shape letters used in docstrings throughout the package:
N environments, B minibatch, D features, A action dimensions, R runs, L sequence length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from gymnasium import spaces
from torch import Tensor

Space = spaces.Space[Any]
"""Any Gymnasium space."""

Obs = Tensor | dict[str, Tensor]
"""A batch of observations: one tensor (N, …), or a flat dict of them (nested keys joined with ``/``)."""

Carry = dict[str, Tensor] | None
"""What must travel from one step to the next (recurrent state, a budget), leaves (N, …); None where nothing must."""

Metrics = dict[str, Tensor]
"""What a loss or an update tells beside its value: 0-d tensors, or (B,) where a docstring says so."""

State = dict[str, Any]
"""A state tree: nested dicts and lists of tensors, numbers, strings, booleans and None. Nothing else is ever saved."""


class RloptError(Exception):
    """A mistake of the user's, told in one clear line that names the fix. The command line prints it and exits with
    2."""


@dataclass(frozen=True)
class EnvSpec:
    """What an environment is, independent of how many copies of it run.

    ``observation_space`` is a Box, Discrete, MultiDiscrete or MultiBinary, or a flat ``spaces.Dict`` of those;
    ``action_space`` a Box, Discrete or MultiDiscrete. With several agents both describe one agent, padded to one shape.
    """

    id: str
    observation_space: Space
    action_space: Space
    episode_limit: int | None = None
    """Steps after which an episode is truncated, where the environment declares it."""
    agents: tuple[str, ...] = ()
    """Names of the agents; empty for a single-agent environment (whose tensors then carry no agent axis)."""
    state_space: Space | None = None
    """The global state of a multi-agent environment, where it has one."""
    shared_reward: bool = True
    action_mask: bool = False
    """Whether observations carry the availability of discrete actions under the key ``action_mask``."""


class Step(NamedTuple):
    """What one vector step returns. Three different facts are three different flags: ``terminated`` cuts the bootstrap,
    ``ended`` says that an episode ended, ``valid`` that the row is a transition at all."""

    obs: Obs
    """(N, …) act on this next."""
    next_obs: Obs
    """(N, …) where the transition led: the true last observation where an episode ended."""
    reward: Tensor
    """(N,) float32, raw."""
    terminated: Tensor
    """(N,) bool: the bootstrap is cut here."""
    truncated: Tensor
    """(N,) bool: a limit ended the episode; the bootstrap goes on."""
    ended: Tensor
    """(N,) bool: ``obs`` is the first of a new episode."""
    valid: Tensor
    """(N,) bool: False where the row is no transition (a replaced worker, a surplus row)."""
    info: dict[str, Tensor]


class Act(NamedTuple):
    """What an agent answers to a batch of observations."""

    action: Tensor
    """(N, A) in environment units, or (N,) int64."""
    carry: Carry = None
    """What must travel to the next step; None for feed-forward agents. The collector owns it."""
    extras: dict[str, Tensor] = {}
    """{name: (N, …)} to be stored with the transition, as declared by ``agent.extra_fields``."""


class Update(NamedTuple):
    """What one update returns. Reading a metric is the caller's business: the update never waits for the device."""

    metrics: Metrics
    """0-d tensors."""
    priority: Tensor | None = None
    """(B,) new priorities of the batch, for samplers that use them."""


class Episode(NamedTuple):
    """One finished episode."""

    total_reward: float
    """Undiscounted sum of raw rewards."""
    length: int
    """Environment steps."""
    run: int = 0


@dataclass
class Clock:
    """What every schedule reads."""

    env_steps: int = 0
    """Transitions collected so far, warm-up included (or a solver's iterations)."""
    updates: int = 0
    """Gradient updates applied so far."""

    def state_dict(self) -> State:
        return {"env_steps": self.env_steps, "updates": self.updates}

    def load_state_dict(self, state: State) -> None:
        self.env_steps, self.updates = int(state["env_steps"]), int(state["updates"])


def map_obs(fn: Callable[[Tensor], Tensor], obs: Obs) -> Obs:
    """Apply ``fn`` to every leaf of an observation."""
    return {k: fn(v) for k, v in obs.items()} if isinstance(obs, dict) else fn(obs)


def map_obs2(fn: Callable[[Tensor, Tensor], Tensor], a: Obs, b: Obs) -> Obs:
    """Apply ``fn`` leaf by leaf to two observations of one structure."""
    if isinstance(a, dict):
        assert isinstance(b, dict)
        return {k: fn(v, b[k]) for k, v in a.items()}
    assert isinstance(b, Tensor)
    return fn(a, b)


def begin_anew(carry: Carry, initial: Carry, ended: Tensor) -> Carry:
    """Return ``carry`` with the rows of ``initial`` where ``ended`` (N,): where an episode ended, the next one must
    remember nothing of it."""
    if carry is None:
        return None
    assert initial is not None
    return {k: torch.where(ended.view(-1, *[1] * (x.dim() - 1)), initial[k], x) for k, x in carry.items()}


def next_carry(before: Carry, after: Carry, initial: Carry, ended: Tensor, valid: Tensor) -> Carry:
    """Return the carry to act on after a vector step: the one ``after`` the action, that ``before`` it where the row
    stood still (neither ``valid`` nor ``ended``, (N,) each), the ``initial`` one where an episode ended or was lost."""
    return begin_anew(begin_anew(after, before, ~valid), initial, ended)


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device``, without waiting for it where ``x`` comes from the CPU. (The way back must be waited for.)"""
    return x.to(device, non_blocking=device.type != "cpu")


def on_host(*rows: Tensor) -> list[Tensor]:
    """Rows (N,) of one device, flags and numbers that float64 holds, on the CPU: one wait instead of one each."""
    if rows[0].device.type == "cpu":
        return list(rows)
    packed = torch.stack([row.double() for row in rows]).cpu()
    return [numbers.to(row.dtype) for numbers, row in zip(packed, rows, strict=True)]


def obs_leaves(space: Space) -> dict[str, Space]:
    """The leaf spaces of a flat observation space; a single space is the leaf named ``""``."""
    return dict(space.spaces) if isinstance(space, spaces.Dict) else {"": space}


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[Any, ...] | None = None,
) -> Any:
    """A dataclass field of a configuration, with the facts that ``rlopt.config.build`` checks.

    ``low``/``high`` are inclusive bounds, ``above`` an exclusive lower one, ``choices`` the words allowed.
    A mutable or nested default is given as a zero-argument factory.
    """
    meta = {"help": help, "low": low, "high": high, "above": above, "choices": choices}
    if callable(default):
        return field(default_factory=default, metadata=meta)
    return field(default=default, metadata=meta)


def resolve_device(device: str | torch.device) -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as e:
        raise RloptError(f"device={device!r} is no torch device; use auto, cpu, cuda or cuda:0") from e
    if found.type == "cuda" and not torch.cuda.is_available():
        raise RloptError(f"device={device} asks for a GPU, but torch sees none; use device=cpu or device=auto")
    if found.type != "cpu":
        try:
            torch.zeros(1, device=found).item()
        except Exception as e:  # backends that are not there raise whatever they like
            raise RloptError(f"device={device} cannot be used on this machine; use auto, cpu, cuda or cuda:0") from e
    return found
