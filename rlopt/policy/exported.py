"""An exported policy: the network that acts, and the statistics it sees through."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.envs.normalize import Normalizer
from rlopt.envs.spaces import ActionCodec, Leaf, ObservationCodec
from rlopt.nn.actors import Actor
from rlopt.policy.frozen_statistics import frozen_statistics, load_statistics
from rlopt.policy.switching import SwitchingActor, state_leaves
from rlopt.policy.switching_apart import ApartSwitch
from rlopt.policy.team import TeamActor
from rlopt.types import (
    Act,
    Carry,
    EnvSpec,
    Obs,
    RloptError,
    map_obs,
    obs_leaves,
    on_device,
    resolve_device,
    seen_leaves,
)


class EvaluationMode(NamedTuple):
    """How a policy acts where it is evaluated. An agent says so (``Agent.evaluation_mode``), or the protocol of a run
    (``eval.mode``, ``eval.epsilon``); an exported policy remembers it."""

    deterministic: bool = True
    """The most likely actions; otherwise samples."""
    epsilon: float = 0.0
    """The fraction of actions that are uniformly random all the same (ε-greedy)."""


class Policy:
    """Observations in, actions out. Never takes part in a gradient.

    ``act`` is for loops (batched tensors as a ``VectorEnv`` gives them); calling the policy is for everyone else. A
    policy shares its network with whoever made it, so ``agent.policy`` always acts with the current weights.

    A ``recurrent`` policy remembers what it saw, and whoever asks it keeps its carry::

        carry = policy.initial_carry()
        while not over:
            action, carry = policy(obs, carry)

    A team's policy sees joint observations, of which it needs neither ``state`` nor ``alive``, and gives joint actions
    (N, n, …); ``policy.of_agent("agent_0")`` acts for one agent, with its own observation alone.
    """

    evaluation_mode = EvaluationMode()

    def __init__(self, spec: EnvSpec, actor: Actor, normalizer: Normalizer | None = None) -> None:
        self.spec = spec
        self.actor = actor
        self.normalizer = normalizer
        self.meta: dict[str, Any] = {}
        """How it was trained, as JSON: of a loaded policy, what ``save_policy`` was told."""
        self._generator: torch.Generator | None = None
        self._observations: ObservationCodec | None = None
        self._actions: ActionCodec | None = None
        self._ignored: set[str] = set()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        for tensor in (*self.actor.parameters(), *self.actor.buffers()):
            return tensor.device
        return torch.device("cpu")

    def to(self, device: str | torch.device) -> Policy:
        """Return a copy on ``device`` that shares nothing with this one."""
        other = Policy(self.spec, copy.deepcopy(self.actor).to(resolve_device(device)))
        if self.normalizer is not None:
            other.normalizer = load_statistics(self.spec, frozen_statistics(self.normalizer), other.device)
        other.meta, other.evaluation_mode = copy.deepcopy(self.meta), self.evaluation_mode
        return other

    @property
    def variants(self) -> dict[str, Policy]:
        """Further ways to act with the same networks, by name, which evaluations report beside this one: what they
        reach are facts ``NAME/…`` of the episodes with the same seeds."""
        found = {name: Policy(self.spec, actor, self.normalizer) for name, actor in self.actor.variants.items()}
        for policy in found.values():
            policy.evaluation_mode = self.evaluation_mode
        return found

    @property
    def recurrent(self) -> bool:
        """Whether actions depend on earlier observations, by a carry."""
        return self.initial_carry() is not None

    def initial_carry(self, rows: int = 1) -> Carry:
        """Return the carry with which ``rows`` episodes begin, leaves (rows, …) on the policy's device; None unless
        ``recurrent``. Where some of them end, ``rlopt.types.begin_anew`` gives them rows of it."""
        return self.actor.initial_carry(rows)

    @torch.no_grad()
    def act(
        self, obs: Obs, carry: Carry = None, deterministic: bool = True, generator: torch.Generator | None = None
    ) -> Act:
        """Return actions on the policy's device for observations (N, …), which are brought there, and the next carry;
        statistics are read, never updated.

        Random actions draw from ``generator`` or, without one, from a stream of the policy's own that no seed repeats.
        """
        device = self.device
        obs = map_obs(lambda x: on_device(x, device), obs)
        if self.normalizer is not None:
            obs = self.normalizer.normalize_obs(obs)
        if generator is None and (self.actor.draws or not deterministic):
            generator = self._own_generator()
        action, after = self.actor.act(obs, carry, deterministic, generator)
        return Act(action, after, facts=self.actor.facts(after))

    @torch.no_grad()
    def act_as(
        self, mode: EvaluationMode, obs: Obs, carry: Carry = None, generator: torch.Generator | None = None
    ) -> Act:
        """Return what ``act`` does where the policy is evaluated in ``mode``."""
        act = self.act(obs, carry, mode.deterministic, generator)
        if mode.epsilon == 0.0:
            return act
        generator = self._own_generator() if generator is None else generator
        rows, seen = len(act.action), map_obs(lambda x: on_device(x, self.device), obs)
        explores = torch.rand(rows, generator=generator, device=self.device) < mode.epsilon
        random = self.actor.uniform(rows, generator, seen)
        column = explores.view(-1, *[1] * (random.ndim - 1))
        return act._replace(action=torch.where(column, random, act.action))

    def __call__(
        self, obs: Any, carry: Carry = None, deterministic: bool = True, generator: torch.Generator | None = None
    ) -> Any:
        """Return the action for one observation, or the actions for a batch, as the environment itself gives and takes
        them; of a ``recurrent`` policy a pair of that and the next carry.

        ``obs`` holds NumPy arrays, numbers or tensors, nested like the environment's observations or flat with keys
        joined by ``/``; one leading axis more than the space has makes it a batch. The answer is a tensor (on the
        observation's device) if any of it was a tensor, else a NumPy array of the action space's dtype and shape; for
        one observation and a Discrete action space a Python int.

        Raises:
            RloptError: wrong keys, shapes or dtypes, an index outside its space, or a carry that is missing or unfit.
        """
        if self._observations is None or self._actions is None:
            seen, joint = seen_leaves(self.spec), self.spec.observation_space
            if self.actor.sees_state:
                seen = {**seen, **state_leaves(self.spec)}
            self._observations = ObservationCodec(spaces.Dict(seen) if self.spec.agents else joint)
            self._actions = ActionCodec(self.spec.action_space)
            self._ignored = obs_leaves(joint).keys() - seen.keys() if self.spec.agents else set()
        values = _flatten(obs, self._observations, self._ignored)
        source = next((v.device for v in values.values() if isinstance(v, Tensor)), None)
        dtypes = [torch.from_numpy(np.empty(0, dtype)).dtype for dtype in self._observations.dtypes]
        rows: set[int | None] = set()
        leaves: dict[str, Tensor] = {}
        for leaf, dtype in zip(self._observations.leaves, dtypes, strict=True):
            leaves[leaf.key], n = _leaf_tensor(leaf, values[leaf.key], dtype, self.device)
            rows.add(n)
        if len(rows) > 1:
            sizes = ", ".join("one" if n is None else f"a batch of {n}" for n in sorted(rows, key=lambda n: n or 0))
            raise RloptError(f"the parts of an observation must be one or equally many; these are {sizes}")
        n = rows.pop()
        tree: Obs = leaves[""] if self._observations.single else leaves
        _check_carry(carry, self.initial_carry(1 if n is None else n))
        act = self.act(tree, carry, deterministic, generator)
        action = self._answer(self._actions, act.action, n, source)
        return action if carry is None else (action, act.carry)

    @staticmethod
    def _answer(codec: ActionCodec, action: Tensor, n: int | None, source: torch.device | None) -> Any:
        """Return actions as the giver of ``n`` observations (None: of one) on ``source`` (None: in NumPy) expects
        them."""
        array = codec.batch(action, 1 if n is None else n)
        if source is not None:
            out = torch.from_numpy(array).to(source)
            return out[0] if n is None else out
        if n is not None:
            return array
        return int(array[0]) if codec.discrete else array[0]

    def of_agent(self, agent: int | str) -> Policy:
        """Return the policy of one agent, by number or name, which sees its own observation alone.

        It shares its network with this one; its statistics are those of now.

        Raises:
            RloptError: there is no such agent, or one network acts for the whole team at once.
        """
        spec = self.spec.of_agent(agent)
        if not isinstance(self.actor, TeamActor | SwitchingActor | ApartSwitch):
            raise RloptError(f"one network acts for all of {self.spec.id}'s agents at once; use the policy of the team")
        i = self.spec.agents.index(agent) if isinstance(agent, str) else agent
        normalizer = None if self.normalizer is None else self.normalizer.of_agent(i)
        one = Policy(spec, self.actor.of_agent(i), normalizer)
        one.meta = copy.deepcopy(self.meta)
        return one

    def _own_generator(self) -> torch.Generator:
        if self._generator is None or self._generator.device != self.device:
            self._generator = torch.Generator(device=self.device)
            self._generator.seed()
        return self._generator


# What users hand in


def _check_carry(carry: Any, wanted: Carry) -> None:
    """Exactly the leaves of ``wanted``; without a carry a memory would forget everything at every step, in silence."""
    if wanted is None and carry is not None:
        raise RloptError("this policy remembers nothing: call policy(obs), without a carry")
    if wanted is None:
        return
    if carry is None:
        raise RloptError(
            "this policy remembers what it saw, so keep its carry: begin an episode with "
            "carry = policy.initial_carry(), then action, carry = policy(obs, carry)"
        )
    found = {k: tuple(x.shape) for k, x in carry.items()} if isinstance(carry, dict) else type(carry).__name__
    if found != (shapes := {k: tuple(x.shape) for k, x in wanted.items()}):
        raise RloptError(
            f"the carry must be {shapes}, not {found}; begin episodes with policy.initial_carry(N), N the number of "
            "observations"
        )


def _flatten(obs: Any, codec: ObservationCodec, ignored: set[str]) -> dict[str, Any]:
    """Return the leaves of a nested observation by their joined keys. Those ``ignored`` may be there or not."""
    if codec.single:
        if isinstance(obs, Mapping):
            raise RloptError(f"this policy sees {_describe(codec.leaves[0])}, not a dictionary with {_words(obs)}")
        return {"": obs}
    if not isinstance(obs, (Mapping, tuple)):
        keys = _words([leaf.key for leaf in codec.leaves])
        raise RloptError(f"this policy sees a dictionary with {keys}, not {type(obs).__name__}")
    found: dict[str, Any] = {}

    def walk(node: Any, path: tuple[str, ...]) -> None:
        if isinstance(node, (Mapping, tuple)):
            for key, child in node.items() if isinstance(node, Mapping) else enumerate(node):
                walk(child, (*path, str(key)))
        else:
            found["/".join(path)] = node

    walk(obs, ())
    wanted = {leaf.key for leaf in codec.leaves}
    if missing := wanted - found.keys():
        raise RloptError(f"the observation lacks {_words(missing)}; this policy sees {_words(wanted)}")
    if surplus := found.keys() - wanted - ignored:
        raise RloptError(f"the observation has {_words(surplus)} too many; this policy sees {_words(wanted)}")
    return found


def _leaf_tensor(leaf: Leaf, value: Any, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, int | None]:
    """Return one leaf as a batch (N, …) on ``device``, and N, or None where it is a single observation (then N = 1)."""
    shape = tuple(leaf.space.shape or ())
    try:
        x = value.detach() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError) as e:
        raise RloptError(f"this policy sees {_describe(leaf)}, not {type(value).__name__}") from e
    batched = x.dim() == len(shape) + 1
    if tuple(x.shape[1:] if batched else x.shape) != shape:
        many = "(N" + "".join(f", {n}" for n in shape) + ")"
        raise RloptError(f"this policy sees {_describe(leaf)}: {shape}, or {many} for a batch, not {tuple(x.shape)}")
    unlike = x.is_floating_point() or x.is_complex() or (x.dtype == torch.bool != dtype)
    if not dtype.is_floating_point and unlike:
        raise RloptError(f"this policy sees {_describe(leaf)}: whole numbers ({dtype}), not {x.dtype}")
    if not dtype.is_floating_point:
        _check_range(leaf, x)
    x = x.to(device=device, dtype=dtype)
    return (x, x.shape[0]) if batched else (x.unsqueeze(0), None)


def _check_range(leaf: Leaf, x: Tensor) -> None:
    """Indices outside their space would be an obscure failure of the device, or another's image wrapped around."""
    start: Any = getattr(leaf.space, "start", 0)
    size: Any = 2 if isinstance(leaf.space, spaces.MultiBinary) else 256  # a mask, or uint8
    if isinstance(leaf.space, spaces.Discrete):
        size = leaf.space.n
    elif isinstance(leaf.space, spaces.MultiDiscrete):
        size = leaf.space.nvec
    first, last = torch.as_tensor(start), torch.as_tensor(start + size - 1)
    there = x.cpu().long()
    if bool(((there < first) | (there > last)).any()):
        raise RloptError(f"this policy sees {_describe(leaf)}, and an index lies outside of it")


def _describe(leaf: Leaf) -> str:
    text = " ".join(str(leaf.space).split())
    return text if not leaf.key else f"{text} as {leaf.key!r}"


def _words(keys: Any) -> str:
    return ", ".join(repr(str(key)) for key in sorted(map(str, keys))) or "nothing"
