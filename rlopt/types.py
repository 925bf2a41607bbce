"""The nouns every part of rlopt shares: observations, environment specifications, and what acting and updating return.

Shape letters used in docstrings throughout the package:
N environments, B minibatch, D features, A action dimensions, R runs, L sequence length, n agents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.config import option as option  # noqa: PLC0414 - the name that everybody uses
from rlopt.errors import RloptError as RloptError  # noqa: PLC0414

Space = spaces.Space[Any]
"""Any Gymnasium space."""

Obs = Tensor | dict[str, Tensor]
"""A batch of observations: one tensor (N, …), or a flat dict of them (nested keys joined with ``/``)."""

Carry = dict[str, Tensor] | None
"""What must travel from one step to the next (recurrent state, a budget), leaves (N, …); None where nothing must."""

MASKS = ("action_mask", "alive", "exact")
"""Names of MultiBinary leaves that say what can be done, who acts, and (bits of a hash) in which true state: bool
tensors, read by no encoder, never normalised."""

Metrics = dict[str, Tensor]
"""What a loss or an update tells beside its value: 0-d tensors, or (B,) where a docstring says so."""

State = dict[str, Any]
"""A state tree: nested dicts and lists of tensors, numbers, strings, booleans and None. Nothing else is ever saved."""


COLUMNS = ("step", "episode", "return", "length", "run")
"""What tables say of every episode; no fact has one of these names."""


class AgentSpaces(NamedTuple):
    """One agent's own spaces, unpadded."""

    observation: Space
    """Of its leaf ``obs`` alone, or a ``spaces.Dict`` of its leaves by their names in the joint space."""
    action: Space
    """Box (A,), Discrete, or MultiDiscrete (heads,)."""


@dataclass(frozen=True)
class EnvSpec:
    """What an environment is, independent of how many copies of it run.

    ``observation_space`` is a Box, Discrete, MultiDiscrete or MultiBinary, or a flat ``spaces.Dict`` of those;
    ``action_space`` a Box, Discrete or MultiDiscrete.

    **Several agents** are the first axis (n, …) of these joint spaces, and of every leaf but ``state`` (and
    ``state/…``), which only critics see: Box (S,), or Box (n, S) where each agent has a state of its own.
    ``action_mask``, MultiBinary (n, K), says which discrete actions each agent can take (of several heads side by
    side), ``alive``, MultiBinary (n,), who still acts. The action space is Box (n, A), or MultiDiscrete (n,) or
    (n, heads). What an agent lacks is padded with zeros (a padded head has one action, 0). ``rlopt.joint`` takes joint
    tensors apart and puts them together.

    Raises:
        RloptError: the spaces do not fit the agents.
    """

    id: str
    observation_space: Space
    action_space: Space
    episode_limit: int | None = None
    """Steps after which an episode is truncated, where the environment declares it."""
    agents: tuple[str, ...] = ()
    """Names of the agents; empty for a single-agent environment (whose tensors then carry no agent axis)."""
    agent_spaces: tuple[AgentSpaces, ...] = ()
    """Each agent's own spaces; by default its rows of the joint ones."""
    reward_shape: tuple[int, ...] = ()
    """``()`` for one reward, ``(n,)`` where the agents are paid apart."""
    derived: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """{leaf: index}: leaves that are a gather of the leaf ``state``, so that nothing needs to store them. ``index`` has
    the leaf's shape (nested tuples) and counts the entries of the flattened state; -1 is a padded 0."""
    frame_stack: int | None = None
    """Frames that uint8 images hold along their first axis, the newest last; None where they are not stacked."""
    facts: tuple[str, ...] = ()
    """Names of the entries (N,) of ``Step.info`` that say, where an episode ended, what it was beside its return."""

    def __post_init__(self) -> None:
        fix = partial(object.__setattr__, self)  # frozen, but lists and arrays are welcome
        fix("agents", tuple(self.agents))
        fix("reward_shape", tuple(self.reward_shape))
        fix("facts", _names(self.id, self.facts))
        fix("derived", {key: _nested_tuples(index) for key, index in self.derived.items()})
        _check_joint(self)
        pairs = self.agent_spaces or [self._row_spaces(i) for i in range(len(self.agents))]
        fix("agent_spaces", tuple(AgentSpaces(*pair) for pair in pairs))
        _check_own(self)

    def _row_spaces(self, i: int) -> AgentSpaces:
        leaves = {key: row_space(leaf, i) for key, leaf in seen_leaves(self).items()}
        observation = leaves["obs"] if leaves.keys() == {"obs"} else spaces.Dict(leaves)
        return AgentSpaces(observation, row_space(self.action_space, i))

    def of_agent(self, agent: int | str) -> EnvSpec:
        """Return what one agent, by number or name, may see and do: a single-agent environment with its own spaces.

        Raises:
            RloptError: there is no such agent.
        """
        i = self.agents.index(agent) if agent in self.agents else agent
        if not (isinstance(i, int) and 0 <= i < len(self.agents)):
            known = ", ".join(self.agents) or "none: this is a single-agent environment"
            raise RloptError(f"{self.id} has no agent {agent!r}; its agents are {known}")
        own = self.agent_spaces[i]
        return EnvSpec(
            f"{self.id}/{self.agents[i]}",
            own.observation,
            own.action,
            self.episode_limit,
            frame_stack=self.frame_stack,
        )


class Step(NamedTuple):
    """What one vector step returns. Three different facts are three different flags: ``terminated`` cuts the bootstrap,
    ``ended`` says that the episode is over, ``valid`` that the row is a transition at all. The table of what they mean
    together is that of ``rlopt.envs.vector.VectorEnv``."""

    obs: Obs
    """(N, …) act on this next."""
    next_obs: Obs
    """(N, …) where the transition led: the true last observation where an episode ended."""
    reward: Tensor
    """(N,) or (N, n) float32, raw."""
    terminated: Tensor
    """(N,) bool: the bootstrap is cut here (also by a lost life, where a protocol says so)."""
    truncated: Tensor
    """(N,) bool: a limit ended the episode; the bootstrap goes on."""
    ended: Tensor
    """(N,) bool: the episode's last row, with and without autoreset."""
    valid: Tensor
    """(N,) bool: False where the row is no transition (an episode that was lost, a surplus row)."""
    info: dict[str, Tensor]
    """{name: (N, …)}. The ``spec.facts`` (N,) are there where a row has ended; in other rows they are what is told so
    far, which counts where an evaluation is cut off, or NaN."""


class Act(NamedTuple):
    """What an agent answers to a batch of observations."""

    action: Tensor
    """(N, …), of the action space's shape: in environment units, or int64; of a team (N, n, …)."""
    carry: Carry = None
    """What must travel to the next step; None for feed-forward agents. The collector owns it."""
    extras: dict[str, Tensor] = {}
    """{name: (N, …)} to be stored with the transition, as declared by ``agent.extra_fields``."""
    facts: dict[str, Tensor] = {}
    """{name: (N,)} numbers whose sum over an episode is one of ``Episode.facts`` (calls of a switch, …)."""


class Update(NamedTuple):
    """What one update returns. Reading a metric is the caller's business: the update never waits for the device."""

    metrics: Metrics
    """0-d tensors."""
    priority: Tensor | dict[str, Tensor] | None = None
    """(B,) new priorities of the batch, for samplers that use them; of several batches by name."""


class Episode(NamedTuple):
    """One finished episode."""

    total_reward: float
    """Undiscounted sum of raw rewards."""
    length: int
    """Environment steps."""
    run: int = 0
    facts: Mapping[str, float] = {}
    """What it was beside its return, by name: the environment's (success, kind of task), the agent's, and
    ``return/AGENT`` where agents are paid apart."""


@dataclass
class Clock:
    """What every schedule reads."""

    env_steps: int = 0
    """Transitions collected so far, warm-up included (or a solver's iterations). A loop moves it; in a loop of one's
    own it may stay 0."""
    updates: int = 0
    """Gradient updates applied so far."""
    acted: int = 0
    """Observations that the agent has acted on, not counting its most likely actions."""

    @property
    def steps(self) -> int:
        """The environment steps that warm-up and schedules count: ``env_steps``, or ``acted`` where nobody has moved
        that."""
        return self.env_steps or self.acted

    def state_dict(self) -> State:
        acted = {} if self.env_steps else {"acted": self.acted}
        return {"env_steps": self.env_steps, "updates": self.updates, **acted}

    def load_state_dict(self, state: State) -> None:
        self.env_steps, self.updates = int(state["env_steps"]), int(state["updates"])
        self.acted = int(state.get("acted", 0))


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
    """Return ``x`` on ``device``, without waiting for it where ``x`` comes from the CPU. (The way back must be waited
    for.)"""
    return x.to(device, non_blocking=device.type != "cpu")


def on_host(*rows: Tensor) -> list[Tensor]:
    """Return rows (N,) of one device, flags and numbers that float64 holds, on the CPU: one wait instead of one
    each."""
    if not rows or rows[0].device.type == "cpu":
        return list(rows)
    packed = torch.stack([row.double() for row in rows]).cpu()
    return [numbers.to(row.dtype) for numbers, row in zip(packed, rows, strict=True)]


def obs_leaves(space: Space) -> dict[str, Space]:
    """Return the leaf spaces of a flat observation space; a single space is the leaf named ``""``."""
    return dict(space.spaces) if isinstance(space, spaces.Dict) else {"": space}


def one_line(space: Space | None) -> str:
    """Return a space for a message of one line (long bounds print as several)."""
    return " ".join(str(space).split())


def shape_of(space: Space) -> tuple[int, ...]:
    """Return the shape of one element; that of Discrete is ()."""
    return tuple(space.shape or ())


def tensor_dtype(space: Space) -> torch.dtype:
    """Return the type of tensors of a translated observation space: float32, uint8, int64, or bool of masks."""
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        return torch.int64
    if isinstance(space, spaces.MultiBinary):
        return torch.bool
    return torch.uint8 if space.dtype == np.uint8 else torch.float32


def binary(shape: tuple[int, ...]) -> spaces.MultiBinary:
    """Return a MultiBinary space; Gymnasium holds those of (3,) and of 3 for different ones."""
    return spaces.MultiBinary(shape[0] if len(shape) == 1 else shape)


def is_mask(key: str, space: Space) -> bool:
    """Return whether a leaf of an observation is one of the ``MASKS``."""
    return key in MASKS and isinstance(space, spaces.MultiBinary)


def is_state(key: str) -> bool:
    """Return whether a leaf of several agents' observation is (part of) the state, which only critics see."""
    return key.partition("/")[0] == "state"


def encoded_leaves(space: Space) -> dict[str, Space]:
    """Return the leaves of an observation space that an encoder reads: all but the masks."""
    return {key: leaf for key, leaf in obs_leaves(space).items() if not is_mask(key, leaf)}


def seen_leaves(spec: EnvSpec) -> dict[str, Space]:
    """Return the leaves of a joint observation that agents see rows of: all but the state and ``alive``."""
    leaves = obs_leaves(spec.observation_space)
    return {key: leaf for key, leaf in leaves.items() if not is_state(key) and key != "alive"}


def own_leaves(space: Space) -> dict[str, Space]:
    """Return the leaves of an agent's own observation space by their names in the joint one."""
    return dict(space.spaces) if isinstance(space, spaces.Dict) else {"obs": space}


def own_index(i: int, shape: tuple[int, ...]) -> tuple[int | slice, ...]:
    """Return the index of agent i's own entries, of ``shape``, in a joint array (n, …)."""
    return (i, *(slice(size) for size in shape))


def row_space(joint: Space, i: int, shape: tuple[int, ...] | None = None) -> Space:
    """Return agent i's row of a joint space (n, …), cut to ``shape`` where it is padded."""
    shape = shape_of(joint)[1:] if shape is None else shape
    where: Any = own_index(i, shape)
    if isinstance(joint, spaces.Box):
        return spaces.Box(joint.low[where], joint.high[where], dtype=joint.dtype.type)
    if isinstance(joint, spaces.MultiBinary):
        return binary(shape)
    assert isinstance(joint, spaces.MultiDiscrete)
    if not shape:
        return spaces.Discrete(joint.nvec[i], start=joint.start[i])
    return spaces.MultiDiscrete(joint.nvec[where], start=joint.start[where])


def action_count(space: Space) -> int:
    """Return how many discrete actions there are, of several heads side by side: the length of an action mask."""
    return int(space.n if isinstance(space, spaces.Discrete) else np.sum(getattr(space, "nvec", 0)))


def _names(env_id: str, facts: Sequence[str]) -> tuple[str, ...]:
    """Return the names of facts, which will be columns of tables beside others."""
    names = () if isinstance(facts, str) else tuple(facts)
    if isinstance(facts, str) or not all(isinstance(name, str) and name for name in names):
        raise RloptError(f"{env_id}: facts={facts!r} must be a list of names, such as [success]")
    if taken := sorted(name for name in set(names) if name in COLUMNS or names.count(name) > 1):
        raise RloptError(f"{env_id}: a fact cannot be called {taken[0]}, which another column is; give it another name")
    return names


def _check_joint(spec: EnvSpec) -> None:
    """Refuse joint spaces that do not fit the agents."""
    leaves, action, n = obs_leaves(spec.observation_space), spec.action_space, len(spec.agents)
    for key, index in spec.derived.items():
        _check_derived(spec.id, key, np.asarray(index), leaves)
    if not n:
        if spec.agent_spaces or spec.reward_shape:
            raise RloptError(f"{spec.id}: agent_spaces and reward_shape are for several agents; name those in agents")
        return
    if len(set(spec.agents)) != n or not all(spec.agents):
        raise RloptError(f"{spec.id}: agents must have names of their own, not {', '.join(map(repr, spec.agents))}")
    if spec.reward_shape not in ((), (n,)):
        raise RloptError(f"{spec.id}: reward_shape={spec.reward_shape} must be () or ({n},) with {n} agents")
    if not isinstance(spec.observation_space, spaces.Dict):
        raise RloptError(f"{spec.id}: {n} agents see a Dict of leaves ({n}, …), not {one_line(leaves[''])}")
    for key, leaf in leaves.items():
        shape = shape_of(leaf)
        every, kind = shape[:1] == (n,), type(leaf)
        if is_state(key):
            fits = kind is spaces.Box and (len(shape) == 1 or (every and len(shape) == 2))
            wanted = f"Box (S,) or ({n}, S)"
        elif key == "alive":
            wanted, fits = f"MultiBinary ({n},)", kind is spaces.MultiBinary and shape == (n,)
        elif key == "action_mask":
            wanted, fits = f"MultiBinary ({n}, K)", kind is spaces.MultiBinary and every and len(shape) == 2
        else:
            wanted, fits = f"of shape ({n}, …), as there are {n} agents", every
        if not fits:
            raise RloptError(f"{spec.id}: the leaf {key} must be {wanted}, not {one_line(leaf)}")
    if not seen_leaves(spec).keys() - set(MASKS):
        raise RloptError(f"{spec.id}: its agents see nothing but masks; give them a leaf ({n}, …) such as obs")
    axes = {spaces.Box: (2,), spaces.MultiDiscrete: (1, 2)}.get(type(action), ())
    if shape_of(action)[:1] != (n,) or len(shape_of(action)) not in axes:
        wanted = f"Box ({n}, A), MultiDiscrete ({n},) or MultiDiscrete ({n}, heads)"
        raise RloptError(f"{spec.id}: {n} agents act in {wanted}, not in {one_line(action)}")


def _check_derived(name: str, key: str, index: Any, leaves: dict[str, Space]) -> None:
    state, leaf = leaves.get("state"), leaves.get(key)
    if not isinstance(state, spaces.Box) or not isinstance(leaf, spaces.Box) or key == "state":
        raise RloptError(f"{name}: derived says that {key!r} is a gather of the leaf 'state'; both must be Boxes")
    if index.shape != leaf.shape or index.dtype.kind != "i":
        raise RloptError(f"{name}: derived[{key!r}] must hold whole numbers of shape {leaf.shape}, not {index.shape}")
    if index.size and not -1 <= index.min() <= index.max() < np.prod(state.shape):
        raise RloptError(f"{name}: derived[{key!r}] points outside the state, which has {np.prod(state.shape)} entries")


def _check_own(spec: EnvSpec) -> None:
    """Refuse agents whose own spaces do not fit the joint ones."""
    joint, action = seen_leaves(spec), spec.action_space
    if len(spec.agent_spaces) != len(spec.agents):
        raise RloptError(f"{spec.id}: agent_spaces are of {len(spec.agent_spaces)} agents, not of {len(spec.agents)}")
    for i, (name, own) in enumerate(zip(spec.agents, spec.agent_spaces, strict=True)):
        leaves, count = own_leaves(own.observation), action_count(own.action)
        for key, leaf in leaves.items():
            if key not in joint or not _is_row(leaf, joint[key], i, bounds=False):
                words = f"{name}'s {key}, {one_line(leaf)}, does not fit the joint {one_line(joint.get(key))}"
                raise RloptError(f"{spec.id}: {words}")
        if not leaves.keys() - set(MASKS):
            raise RloptError(f"{spec.id}: {name} sees nothing; give it a leaf such as obs")
        if not _is_row(own.action, action, i, bounds=True):
            words = f"{name}'s actions, {one_line(own.action)}, do not fit the joint {one_line(action)}"
            raise RloptError(f"{spec.id}: {words}")
        if "action_mask" in joint and ("action_mask" not in leaves or leaves["action_mask"].shape != (count,)):
            raise RloptError(f"{spec.id}: {name} has {count} discrete actions; its own action_mask must be as long")


def _is_row(own: Space, joint: Space, i: int, bounds: bool) -> bool:
    """Return whether ``own`` is agent i's row of ``joint``, or the beginning of it; of a Box perhaps with other
    bounds."""
    shape, rest = shape_of(own), shape_of(joint)[1:]
    if len(shape) != len(rest) or any(a > b for a, b in zip(shape, rest, strict=True)):
        return False
    row = row_space(joint, i, shape)
    if isinstance(row, spaces.Box) and not bounds:
        return type(own) is type(row) and own.dtype == row.dtype
    return bool(own == row)


def _nested_tuples(index: Any) -> Any:
    """Return an array, a tensor or nested lists as nested tuples."""
    tree = index.tolist() if hasattr(index, "tolist") else index
    return tuple(_nested_tuples(part) for part in tree) if isinstance(tree, list | tuple) else tree


def resolve_device(device: str | torch.device) -> torch.device:
    """Return ``auto`` is CUDA where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as e:
        raise RloptError(f"device={device!r} is no torch device; use auto, cpu, cuda or cuda:0") from e
    if found.type == "cuda" and not torch.cuda.is_available():
        raise RloptError(f"device={device} asks for a GPU, but torch sees none; use device=cpu or device=auto")
    if found.type == "cpu":
        if found.index:
            raise RloptError(f"device={device} is no device: there is one CPU; use device=cpu (and threads=N)")
        return torch.device("cpu")
    try:
        torch.zeros(1, device=found).item()
    except Exception as e:  # backends that are not there raise whatever they like
        raise RloptError(f"device={device} cannot be used on this machine; use auto, cpu, cuda or cuda:0") from e
    return found
