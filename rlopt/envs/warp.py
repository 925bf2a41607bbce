"""``backend=warp``: Gymnasium's MuJoCo tasks of version 5 with the physics on the GPU, by mujoco-warp.

Thousands of worlds are stepped by one captured graph of ``frame_skip`` physics steps; observations, rewards and ends
are torch functions on the same device and stream, on memory that both share. A step never waits for the host.

How it differs from ``backend=native`` and from Gymnasium:

- the physics is float32, and contact makes trajectories chaotic, so only the first steps agree closely. Where a steep
  capsule meets the floor, mujoco-warp 3.17 turns the friction pyramid otherwise than MuJoCo does, so Ant parts from
  Gymnasium's at its first contacts;
- Humanoid and HumanoidStandup ask for MuJoCo's PGS solver, which mujoco-warp lacks: they run with Newton, which changes
  their dynamics slightly (a warning says so). Compare scores with care;
- first states have Gymnasium's law but other draws (``rlopt.envs.streams``);
- a world whose state is no longer finite, or which overflows mujoco-warp's buffers of contacts and constraints, begins
  anew: its row has ``valid`` false, and ``restarts`` counts it. A full buffer of contacts is shared by all worlds;
- on a GPU the order of atomic additions is free, so a restored run goes on within rounding, not bit for bit.

One step has the latency of hundreds of kernels whatever the number of worlds: for few environments take ``native``.
mujoco-warp compiles its kernels when first used, which takes up to a minute, and keeps them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlopt.envs.streams import RowStreams
from rlopt.envs.torch_env import Outcome, TorchEnv
from rlopt.envs.warp_tasks import TASKS, WarpTask
from rlopt.types import Obs, RloptError, State
from rlopt.version import install

if TYPE_CHECKING:
    from rlopt.envs.factory import EnvRequest

_log = logging.getLogger(__name__)
_ENTRY_POINT = re.compile(r"gymnasium\.envs\.mujoco\.(\w+)_v5:\w+")
_PERSISTENT = ("qpos", "qvel", "qacc_warmstart")


class WarpPhysics:
    """N worlds of one model in mujoco-warp, and two captured graphs that step them.

    ``fields[name]`` are torch views of mujoco-warp's own arrays, (N, …) float32: writes are state writes.

    Args:
        model: a ``mujoco.MjModel``.
        num_envs: N.
        frame_skip: physics steps in one ``advance``.
        device: where it runs; the CPU is for development.
        derived: names of further fields.
    """

    def __init__(
        self, model: Any, num_envs: int, frame_skip: int, device: torch.device, derived: tuple[str, ...]
    ) -> None:
        import warp as wp

        wp.config.log_level = max(wp.config.log_level, wp.LOG_WARNING)  # not a line for each kernel that is loaded
        wp.init()
        import mujoco_warp as mjw

        self._wp, self._mjw = wp, mjw
        self._torch_device, self._device = device, wp.device_from_torch(device)
        with wp.ScopedDevice(self._device):
            self._model = mjw.put_model(model)
            self._model.opt.warn_overflow = 0  # each overflow is counted; printing from a kernel would flood the screen
            if device.type == "cuda":  # the solver's loop: a node of the graph where the driver knows such (12.4)
                self._model.opt.graph_conditional = wp.is_conditional_graph_supported()
            self._data = mjw.make_data(model, nworld=num_envs)
        self.fields: dict[str, Tensor] = {
            name: wp.to_torch(getattr(self._data, name)) for name in (*_PERSISTENT, "ctrl", *derived)
        }
        self._overflow: Tensor = wp.to_torch(self._data.overflow)
        kinds = mjw.OverflowType
        # Not fatal: a solver that ran out of iterations, or a collision that met a rougher answer.
        self._fatal = int(
            kinds.NEFC | kinds.NJMAX_NNZ | kinds.BROADPHASE | kinds.NARROWPHASE | kinds.CCD | kinds.HFIELD | kinds.NVMAX
        )
        self._skip, self._contact_forces = frame_skip, "cfrc_ext" in derived
        _log.info("loading mujoco-warp's kernels; the first time they are compiled, which takes up to a minute")
        self._advance = self._capture(self._steps)
        self._refresh = self._capture(self._forward)

    def _steps(self) -> None:
        self._data.overflow.zero_()
        for _ in range(self._skip):
            self._mjw.step(self._model, self._data)
        if self._contact_forces:
            self._mjw.rne_postconstraint(self._model, self._data)

    def _forward(self) -> None:
        self._mjw.forward(self._model, self._data)

    def _capture(self, work: Callable[[], None]) -> Any:
        """Return a graph of ``work``, which has run once before: what it compiles or allocates first cannot be
        captured."""
        with self._wp.ScopedDevice(self._device):
            work()
            self._wp.synchronize_device(self._device)
            with self._wp.ScopedCapture(device=self._device) as capture:
                work()
        if self._torch_device.type == "cuda":
            torch.cuda.synchronize(self._torch_device)
        return capture.graph

    def _launch(self, graph: Any) -> None:
        """On torch's current stream, so that it comes between the torch operations before and after."""
        cuda = self._torch_device.type == "cuda"
        self._wp.capture_launch(graph, stream=self._wp.stream_from_torch(self._torch_device) if cuda else None)

    def advance(self) -> Tensor:
        """Do ``frame_skip`` steps of all worlds; return the worlds (N,) bool whose buffers overflowed."""
        self._launch(self._advance)
        return (self._overflow & self._fatal).bool()

    def forward(self) -> None:
        """Compute what follows from positions, velocities and controls, without stepping."""
        self._launch(self._refresh)


class WarpEnv(TorchEnv):
    """N copies of one of Gymnasium's MuJoCo tasks; see the module. The state is positions, velocities, the solver's
    warm start, the place that the forward velocity is measured from, and the observation.

    Args:
        env: a Gymnasium environment of the task, from which model, weights and spaces are taken.
        task: the task's class.
        num_envs: N.
        device: where everything runs.
        **options: as ``TorchEnv``'s.

    Raises:
        RloptError: mujoco-warp cannot run the model.
    """

    dtype = torch.float32

    def __init__(self, env: Any, task: type[WarpTask], num_envs: int, *, device: torch.device, **options: Any) -> None:
        import mujoco

        env = env.unwrapped
        self.observation_space, self.action_space = env.observation_space, env.action_space
        super().__init__(num_envs, device=device, **options)
        model = env.model
        if model.na:
            raise RloptError(f"env={self.spec.id}: env.backend=warp cannot run actuators with a state; use native")
        if model.opt.solver == mujoco.mjtSolver.mjSOL_PGS:
            _log.warning("%s runs with MuJoCo's Newton solver instead of PGS, which mujoco-warp lacks", self.spec.id)
            model.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON
        if task.caveat:
            _log.warning("%s %s; compare scores with care", self.spec.id, task.caveat)
        self._task = task(env, self.device)
        try:
            self._physics = WarpPhysics(model, num_envs, env.frame_skip, self.device, task.derived)
        except NotImplementedError as e:
            raise RloptError(f"env={self.spec.id} cannot run on env.backend=warp ({e}); use env.backend=native") from e
        self._lost = torch.zeros((), dtype=torch.int64, device=self.device)

    @property
    def restarts(self) -> int:
        """Worlds that failed and began anew so far. Reading it waits for the device."""
        return int(self._lost)

    def initial(self, streams: RowStreams) -> dict[str, Tensor]:
        qpos, qvel = self._task.initial(streams)
        state = {"qpos": qpos, "qvel": qvel, "qacc_warmstart": torch.zeros_like(qvel)}
        if not self._task.derived:
            return self._complete(state)
        d = self._physics.fields
        self._load(state)
        d["ctrl"].zero_()
        self._physics.forward()
        # A copy of zeros: Gymnasium computes contact forces only after steps.
        return self._complete({**state, **{k: torch.zeros_like(d[k]) for k in d if k == "cfrc_ext"}})

    def dynamics(self, state: dict[str, Tensor], action: Tensor) -> Outcome:
        d = self._physics.fields
        self._load(state)
        d["ctrl"].copy_(action)
        overflow = self._physics.advance()
        after = self._complete({name: d[name] for name in _PERSISTENT})
        velocity = (after["measure"] - state["measure"]) / self._task.dt
        reward, terminated = self._task.outcome(d, action, velocity)
        finite = after["obs"].sum(1).isfinite() & after["qvel"].sum(1).isfinite() & reward.isfinite()
        broken = overflow | ~finite
        self._lost.add_((broken & ~self._ended).sum())
        return Outcome(after, reward, torch.zeros_like(broken) if terminated is None else terminated, None, broken)

    def observe(self, state: dict[str, Tensor]) -> Tensor:
        return state["obs"]

    def load_state_dict(self, state: State) -> Obs:
        """Continue where ``state_dict`` stood: bit for bit on the CPU, within rounding on a GPU."""
        return super().load_state_dict(state)

    def _load(self, state: dict[str, Tensor]) -> None:
        for name in _PERSISTENT:
            self._physics.fields[name].copy_(state[name])

    def _complete(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the state with what is read off it; fields that ``state`` lacks are the physics' present ones."""
        d = {**self._physics.fields, **state}
        kept = {name: d[name] for name in _PERSISTENT}
        return {**kept, "measure": self._task.measure(d), "obs": self._task.observe(d)}


def build(request: EnvRequest) -> WarpEnv:
    """Return the backend ``warp``.

    Raises:
        RloptError: not one of Gymnasium's MuJoCo tasks of version 5, wrappers, or mujoco-warp is missing.
    """
    spec = request.factory.spec
    match = _ENTRY_POINT.fullmatch(spec.entry_point) if isinstance(spec.entry_point, str) else None
    if match is None or match[1] not in TASKS:
        raise RloptError(
            f"env={request.id} does not run on env.backend=warp, which has Gymnasium's MuJoCo tasks of version 5 "
            "(HalfCheetah-v5 …); use env.backend=auto"
        )
    if request.factory.wrappers:
        raise RloptError("env.wrappers wrap single environments; env.backend=warp has none: use env.backend=sync")
    if request.factory.facts:
        raise RloptError("env.facts are read from info, of which env.backend=warp has none; use env.backend=sync")
    if request.factory.kwargs.get("render_mode") is not None:
        raise RloptError(f"env={request.id} draws no pictures on env.backend=warp; use env.backend=sync")
    try:
        import mujoco_warp  # noqa: F401
    except ImportError as e:
        raise RloptError(f"env={request.id} on env.backend=warp needs the package mujoco-warp; {install('gpu')}") from e
    env = request.factory()
    try:
        limit = env.spec.max_episode_steps if env.spec else None
        return WarpEnv(env, TASKS[match[1]], request.num_envs, **request.common, max_episode_steps=limit)
    finally:
        env.close()
