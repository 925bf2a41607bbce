"""Exported policies: the network that acts, the statistics it sees through, and nothing that only training needs.

A policy folder holds ``policy.json`` (what it is, how it was trained, the checksums of the rest) and a state tree of
``rlopt.state`` (weights and frozen statistics). Loading one runs none of its code: the kind of network is a word of the
closed registry ``rlopt.nn.make_actor``, and sizes are compared with the weights present before anything is allocated.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rlopt import __version__
from rlopt.envs.normalize import Normalizer
from rlopt.envs.spaces import ActionCodec, Leaf, ObservationCodec, space_from_json, space_to_json
from rlopt.files import digest_file, replace_folder, write_file
from rlopt.nn.actors import Actor, make_actor
from rlopt.nn.module import build_seeded
from rlopt.registry import load_extensions
from rlopt.state import CorruptCheckpoint, load_state, read_json, save_state, tag_floats, untag_floats
from rlopt.types import Act, EnvSpec, Obs, RloptError, State, map_obs, on_device, resolve_device

FORMAT = 1
"""Version of the folder's layout; newer ones are refused."""
DESCRIPTION = "policy.json"
MAX_DESCRIPTION_BYTES = 1 << 25
MAX_SPACE_ELEMENTS = 1 << 24
"""Numbers in one observation or action, all leaves together: a 4096 x 4096 image."""
MAX_OPTION_ITEMS = 256
"""Entries of a list or mapping among a network's options."""


class Policy:
    """Observations in, actions out. Never takes part in a gradient.

    ``act`` is for loops (batched tensors as a ``VectorEnv`` gives them); calling the policy is for everyone else. A
    policy shares its network with whoever made it, so ``agent.policy`` always acts with the current weights.
    """

    def __init__(self, spec: EnvSpec, actor: Actor, normalizer: Normalizer | None = None) -> None:
        self.spec = spec
        self.actor = actor
        self.normalizer = normalizer
        self.meta: dict[str, Any] = {}
        """How it was trained, as JSON: of a loaded policy, what ``save_policy`` was told."""
        self._generator: torch.Generator | None = None
        self._observations: ObservationCodec | None = None
        self._actions: ActionCodec | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        for tensor in (*self.actor.parameters(), *self.actor.buffers()):
            return tensor.device
        return torch.device("cpu")

    def to(self, device: str | torch.device) -> Policy:
        """A copy on ``device`` that shares nothing with this one."""
        other = Policy(self.spec, copy.deepcopy(self.actor).to(resolve_device(device)))
        if self.normalizer is not None:
            other.normalizer = _load_statistics(self.spec, _statistics(self.normalizer), other.device)
        other.meta = copy.deepcopy(self.meta)
        return other

    @torch.no_grad()
    def act(
        self, obs: Obs, carry: Any = None, deterministic: bool = True, generator: torch.Generator | None = None
    ) -> Act:
        """Actions on the policy's device for observations (N, …), which are brought there; statistics are read, never
        updated.

        Random actions draw from ``generator`` or, without one, from a stream of the policy's own that no seed repeats.
        """
        device = self.device
        obs = map_obs(lambda x: on_device(x, device), obs)
        if self.normalizer is not None:
            obs = self.normalizer.normalize_obs(obs)
        if generator is None and not deterministic:
            generator = self._own_generator()
        return Act(self.actor.act(obs, deterministic, generator), carry)

    def __call__(self, obs: Any, deterministic: bool = True, generator: torch.Generator | None = None) -> Any:
        """The action for one observation, or the actions for a batch, as the environment itself gives and takes them.

        ``obs`` holds NumPy arrays, numbers or tensors, nested like the environment's observations or flat with keys
        joined by ``/``; one leading axis more than the space has makes it a batch. The answer is a tensor (on the
        observation's device) if any of it was a tensor, else a NumPy array of the action space's dtype and shape; for
        one observation and a Discrete action space a Python int.

        Raises:
            RloptError: wrong keys, shapes or dtypes, or an index outside its space.
        """
        if self._observations is None or self._actions is None:
            self._observations = ObservationCodec(self.spec.observation_space)
            self._actions = ActionCodec(self.spec.action_space)
        values = _flatten(obs, self._observations)
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
        action = self.act(tree, deterministic=deterministic, generator=generator).action
        array = self._actions.batch(action, 1 if n is None else n)
        if source is not None:
            out = torch.from_numpy(array).to(source)
            return out[0] if n is None else out
        if n is not None:
            return array
        return int(array[0]) if self._actions.discrete else array[0]

    def _own_generator(self) -> torch.Generator:
        if self._generator is None or self._generator.device != self.device:
            self._generator = torch.Generator(device=self.device)
            self._generator.seed()
        return self._generator


# What users hand in


def _flatten(obs: Any, codec: ObservationCodec) -> dict[str, Any]:
    """The leaves of a nested observation by their joined keys."""
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
    if surplus := found.keys() - wanted:
        raise RloptError(f"the observation has {_words(surplus)} too many; this policy sees {_words(wanted)}")
    return found


def _leaf_tensor(leaf: Leaf, value: Any, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, int | None]:
    """One leaf as a batch (N, …) on ``device``, and N, or None where it is a single observation (then N = 1)."""
    shape = tuple(leaf.space.shape or ())
    try:
        x = value.detach() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError) as e:
        raise RloptError(f"this policy sees {_describe(leaf)}, not {type(value).__name__}") from e
    batched = x.dim() == len(shape) + 1
    if tuple(x.shape[1:] if batched else x.shape) != shape:
        many = "(N" + "".join(f", {n}" for n in shape) + ")"
        raise RloptError(f"this policy sees {_describe(leaf)}: {shape}, or {many} for a batch, not {tuple(x.shape)}")
    if not dtype.is_floating_point and (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool):
        raise RloptError(f"this policy sees {_describe(leaf)}: whole numbers ({dtype}), not {x.dtype}")
    if not dtype.is_floating_point:
        _check_range(leaf, x)
    x = x.to(device=device, dtype=dtype)
    return (x, x.shape[0]) if batched else (x.unsqueeze(0), None)


def _check_range(leaf: Leaf, x: Tensor) -> None:
    """Indices outside their space would be an obscure failure of the device, or another's image wrapped around."""
    start: Any = getattr(leaf.space, "start", 0)
    size: Any = 256  # uint8
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


# Folders


def save_policy(policy: Policy, path: Path | str, meta: Mapping[str, Any] | None = None) -> None:
    """Write ``policy`` as the folder ``path``; a crash at any moment leaves the old one or the new one, whole.

    ``meta`` is JSON, or numbers that JSON lacks (inf, NaN), that says how it was trained (``policy.meta`` by default).

    Raises:
        OSError: if the disk fails or is full; what was there before is untouched.
        RloptError: if ``path`` holds something else than a policy, which would be lost.
    """
    path = Path(os.path.abspath(path))
    if path.exists() and not (path / DESCRIPTION).is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise RloptError(f"{path} is there and is no policy; name another folder for this one")
    staged = path.with_name(f".{path.name}.new")
    shutil.rmtree(staged, ignore_errors=True)
    state: State = {
        "actor": dict(policy.actor.state_dict()),
        "normalizer": None if policy.normalizer is None else _statistics(policy.normalizer),
    }
    description = {
        "format": FORMAT,
        "rlopt": __version__,
        "kind": policy.actor.kind,
        "options": policy.actor.options,
        "spec": spec_to_json(policy.spec),
        "meta": tag_floats(policy.meta if meta is None else meta),
    }
    try:
        digests = save_state(staged, state)
        description["files"] = {name: {"bytes": d.bytes, "sha256": d.sha256} for name, d in digests.items()}
        text = json.dumps(description, indent=1, allow_nan=False)
        write_file(staged / DESCRIPTION, [text.encode()])
        replace_folder(staged, path)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


_REFUSED = (
    TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError, AssertionError, RuntimeError,
    MemoryError, OSError,
)  # fmt: skip
"""What building from a description that makes no sense may raise."""


def load_policy(path: Path | str, device: str | torch.device = "cpu") -> Policy:
    """The policy in a policy folder, or the last one (``policy/``) of a run folder.

    Raises:
        RloptError: there is none, or it is damaged, hostile, or written by a newer rlopt.
    """
    folder = find_policy(path)
    target = resolve_device(device)
    try:
        policy = _load(folder, target)
    except CorruptCheckpoint:
        raise
    except RloptError as e:
        raise RloptError(f"{folder}: {e}") from e
    except _REFUSED as e:
        raise _damaged(folder, e) from e
    return policy


def find_policy(path: Path | str) -> Path:
    """The policy folder that ``path`` means: itself, or ``path/policy`` of a run folder.

    Raises:
        RloptError: there is none.
    """
    whole = Path(os.path.abspath(path))  # "." has no name
    for folder in (whole, whole / "policy"):
        if (found := _described(folder)) is not None:
            return found
    if not whole.exists():
        raise RloptError(f"{path} does not exist; give a policy folder or a run folder")
    if runs := run_policies(whole):
        raise RloptError(f"{path} holds the policies of several runs; name one of them, such as {runs[0]}")
    raise RloptError(f"{path} holds no policy; give a folder with {DESCRIPTION} in it, or a run folder with policy/")


def run_policies(path: Path | str) -> list[Path]:
    """The policies ``run0``, ``run1`` … of a run folder, or of its ``policy/``, that holds several; else nothing."""
    whole = Path(os.path.abspath(path))
    for folder in (whole, whole / "policy"):
        each = (folder / f"run{r}" for r in itertools.count())
        if runs := list(itertools.takewhile(lambda one: _described(one) is not None, each)):
            return runs
    return []


def _described(folder: Path) -> Path | None:
    """The policy in ``folder``. A crash in the middle of an overwrite leaves the old one under the name that
    ``replace_folder`` gives it."""
    both = (folder, folder.with_name(f".{folder.name}.old"))
    return next((candidate for candidate in both if (candidate / DESCRIPTION).is_file()), None)


def _load(folder: Path, device: torch.device) -> Policy:
    data = _read_description(folder)
    spec = spec_from_json(data["spec"])
    for name, recorded in data["files"].items():
        if name not in ("state.json", "tensors.safetensors"):
            raise ValueError(f"it names the file {str(name)[:40]!r}")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{name} is missing")
        if digest_file(folder / name)._asdict() != recorded:
            raise ValueError(f"{name} is not the file that was saved")
    state = load_state(folder)
    weights: Any = state["actor"]
    _check_options(data["options"], 0)
    load_extensions()  # networks of installed packages, which the description may name
    with torch.device("meta"):
        shapes = make_actor(data["kind"], spec.observation_space, spec.action_space, data["options"]).state_dict()
    _check_tensors(weights, shapes, "the network has")
    # The weights drawn here are overwritten at once; drawing them must not move torch's global generator.
    actor = build_seeded(
        lambda: make_actor(data["kind"], spec.observation_space, spec.action_space, data["options"]), 0
    )
    assert isinstance(actor, Actor)
    actor.load_state_dict(weights, strict=True)
    actor.to(device).requires_grad_(False).eval()
    normalizer = None
    if state["normalizer"] is not None:
        normalizer = _load_statistics(spec, state["normalizer"], device)
    policy = Policy(spec, actor, normalizer)
    policy.meta = untag_floats(data["meta"])
    return policy


def _read_description(folder: Path) -> dict[str, Any]:
    if (folder / DESCRIPTION).stat().st_size > MAX_DESCRIPTION_BYTES:
        raise ValueError(f"{DESCRIPTION} is larger than {MAX_DESCRIPTION_BYTES} bytes")
    data = read_json(folder / DESCRIPTION)
    wanted = {"format": int, "kind": str, "options": dict, "spec": dict, "meta": dict, "files": dict}
    if not isinstance(data, dict) or not isinstance(data.get("format"), int):
        raise ValueError(f"{DESCRIPTION} does not describe a policy")
    if data["format"] > FORMAT:
        raise RloptError(f"this policy has format {data['format']}, this rlopt reads up to {FORMAT}; upgrade rlopt")
    for key, kind in wanted.items():
        if not isinstance(data.get(key), kind):
            raise ValueError(f"{DESCRIPTION} has no {key!r}")
    return data


def _check_options(value: Any, depth: int) -> None:
    """Refuse networks of absurdly many layers, which even without memory for their weights take for ever to build."""
    if depth > 8 or (isinstance(value, (dict, list, str)) and len(value) > MAX_OPTION_ITEMS):
        raise ValueError("its network has absurdly many options")
    if isinstance(value, (dict, list)):
        for child in value.values() if isinstance(value, dict) else value:
            _check_options(child, depth + 1)


def _check_tensors(found: Any, wanted: Mapping[str, Tensor], owner: str) -> None:
    """Exactly these tensors, of these shapes and dtypes."""
    if not isinstance(found, dict):
        raise ValueError("it holds no tensors")
    if missing := wanted.keys() - found.keys():
        raise ValueError(f"the tensor {sorted(missing)[0]!r} is missing")
    if surplus := found.keys() - wanted.keys():
        raise ValueError(f"the tensor {sorted(surplus)[0]!r} belongs nowhere")
    for name, like in wanted.items():
        tensor = found[name]
        if not isinstance(tensor, Tensor) or tensor.shape != like.shape or tensor.dtype != like.dtype:
            got = f"{tuple(tensor.shape)} {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"the tensor {name!r} is {got}; {owner} {tuple(like.shape)} {like.dtype}")


def _damaged(folder: Path, error: BaseException) -> RloptError:
    said = " ".join(str(error).split())[:200] or type(error).__name__
    return CorruptCheckpoint(f"{folder} is damaged, not a policy that rlopt wrote: {said}")


def _statistics(normalizer: Normalizer) -> State:
    """What a policy sees through: nothing about rewards, nothing that would let the statistics go on growing."""
    return {
        "clip": normalizer.clip,
        "epsilon": normalizer.epsilon,
        "moments": {key: moments.state_dict() for key, moments in normalizer.moments.items()},
    }


def _load_statistics(spec: EnvSpec, state: State, device: torch.device) -> Normalizer:
    clip, epsilon, saved = float(state["clip"]), float(state["epsilon"]), state["moments"]
    normalizer = Normalizer(spec, obs=bool(saved), reward=False, clip=clip, epsilon=epsilon, device=device)
    if saved.keys() != normalizer.moments.keys():
        raise ValueError("its statistics are of other observations")
    for key, moments in normalizer.moments.items():
        _check_tensors(saved[key], moments.state_dict(), "the statistics have")
        moments.load_state_dict(saved[key])
    return normalizer


# Specifications


def spec_to_json(spec: EnvSpec) -> dict[str, Any]:
    """An ``EnvSpec`` as JSON."""
    return {
        "id": spec.id,
        "observation_space": space_to_json(spec.observation_space),
        "action_space": space_to_json(spec.action_space),
        "episode_limit": spec.episode_limit,
        "agents": list(spec.agents),
        "state_space": None if spec.state_space is None else space_to_json(spec.state_space),
        "shared_reward": spec.shared_reward,
        "action_mask": spec.action_mask,
    }


def spec_from_json(data: Mapping[str, Any]) -> EnvSpec:
    """The ``EnvSpec`` that ``spec_to_json`` described.

    Raises:
        RloptError: a damaged description, or spaces too large to be meant.
        KeyError, TypeError, ValueError: something is missing or of the wrong type.
    """
    described = [data["observation_space"], data["action_space"], data["state_space"]]
    if sum(_elements(space, 0) for space in described if space is not None) > MAX_SPACE_ELEMENTS:
        raise ValueError(f"its spaces hold more than {MAX_SPACE_ELEMENTS} numbers")
    limit = data["episode_limit"]
    return EnvSpec(
        id=str(data["id"]),
        observation_space=space_from_json(data["observation_space"]),
        action_space=space_from_json(data["action_space"]),
        episode_limit=None if limit is None else int(limit),
        agents=tuple(str(name) for name in data["agents"]),
        state_space=None if data["state_space"] is None else space_from_json(data["state_space"]),
        shared_reward=bool(data["shared_reward"]),
        action_mask=bool(data["action_mask"]),
    )


def _elements(space: Any, depth: int) -> int:
    """Numbers in an element of a described space, found without building the space."""
    if not isinstance(space, dict) or depth > 8:
        raise ValueError("a space is an object of its own")
    if isinstance(children := space.get("spaces"), dict):
        return sum(_elements(child, depth + 1) for child in children.values())
    shape = space.get("shape", [])
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape) or len(shape) > 8:
        raise ValueError("a shape is a list of whole numbers")
    return math.prod(shape)
