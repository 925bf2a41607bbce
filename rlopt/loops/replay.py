"""Off-policy learning: step the environments, store, and update at an exact ratio."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Any, Self

import torch

from rlopt.agents.base import Agent, ReplayAgentConfig
from rlopt.buffers import ReplayBuffer, Sampler
from rlopt.buffers.samplers.per_run import RunSamplers
from rlopt.buffers.samplers.sequence import CARRY
from rlopt.envs import Normalizer, VectorEnv
from rlopt.envs.atari import Protocol
from rlopt.envs.make import stepping_device
from rlopt.loops import construction
from rlopt.loops.base import Progress
from rlopt.loops.captured import CapturedUpdate, has_graphs, slots_of, why_eager
from rlopt.loops.configuration import TrainConfig
from rlopt.loops.evaluation import Evaluator
from rlopt.loops.metrics import MetricSums, add_metrics
from rlopt.loops.stepping import SteppingLoop
from rlopt.registry import get_agent, get_sampler
from rlopt.state import RowLog
from rlopt.types import RloptError, State, resolve_device

log = logging.getLogger(__name__)


class ReplayLoop(SteppingLoop):
    """Drives an agent that learns from a replay buffer.

    One ``advance`` is one vector step and the updates it owes: ``update_ratio = (u, s)`` means u updates for every s
    transitions after ``first_update``, as an exact integer debt that is saved with everything else.

    With ``overlap`` the environments step in a thread of their own while the updates owed so far are made: the
    transitions of a step are learnt from one step later, and the policy that acts has seen one step's updates less. The
    last step pays all that is owed.
    """

    modes = ("num_envs", "num_runs", "overlap", "precision", "update_mode", "buffer")

    def __init__(
        self,
        agent: Agent,
        env: VectorEnv,
        buffer: ReplayBuffer,
        total_steps: int,
        evaluator: Evaluator | None = None,
        normalizer: Normalizer | None = None,
        seed: int = 0,
        overlap: bool = False,
        update_mode: str = "eager",
    ) -> None:
        assert isinstance(agent.config, ReplayAgentConfig)
        super().__init__(agent, env, total_steps, evaluator, normalizer, seed)
        self.config: ReplayAgentConfig = agent.config
        self.buffer = buffer
        self.owed = 0
        self.captured: CapturedUpdate | None = None
        if update_mode == "captured":
            self.captured = CapturedUpdate(agent, buffer, self.config.batch_size * agent.runs, normalizer)
        self._aside = ThreadPoolExecutor(1, "rlopt-env") if overlap else None
        self._cut = False

    @classmethod
    def from_config(cls, config: TrainConfig, **more: Any) -> Self:
        """Do what ``build`` says; ``more`` are further arguments of the constructor."""
        device, options = resolve_device(config.device), config.agent
        assert isinstance(options, ReplayAgentConfig)
        runs, rows = config.num_runs, config.num_runs * config.num_envs
        home = stepping_device(config.env.backend, device)
        env = construction.environment(config, rows, home, "env", autoreset=True)
        try:
            agent = get_agent(str(options.name))(
                env.spec, options, seed=config.seed, device=device, runs=runs, precision=config.precision
            )
            buffer = _buffer(config, options, agent, env)
            normalizer = construction.normalizer(config, env, options.gamma, device)
            return cls(
                agent,
                env,
                buffer,
                config.total_steps,
                construction.evaluator(config, device),
                normalizer,
                config.seed,
                config.overlap,
                _update_mode(config, agent),
                **more,
            )
        except BaseException:
            env.close()
            raise

    @classmethod
    def decide(cls, config: TrainConfig, protocol: Protocol | None) -> dict[str, Any]:
        """Return what any loop decides, how long ε falls, and the critics' loss."""
        decided, options = super().decide(config, protocol), config.agent
        assert isinstance(options, ReplayAgentConfig)
        if getattr(options, "epsilon_steps", 0) is None:
            decided["epsilon_steps"] = max(1, config.total_steps // 10)
        chooses = getattr(config.buffer, "over", config.buffer.name)  # of hindsight the sampler below it
        own, sampler = options.auto_td_loss, getattr(get_sampler(chooses), "td_loss", None)
        if own is None and sampler is not None:
            raise RloptError(
                f"buffer={chooses} belongs with a loss of residuals, and agent={options.name} has another; "
                "use buffer=prioritized"
            )
        floor = getattr(config.buffer, "floor", 1.0)
        if options.td_loss == "auto" and own is not None:
            decided["td_loss"] = sampler or own
            if sampler == "huber":
                decided["td_threshold"] = floor
        elif sampler == options.td_loss == "huber" and floor != options.td_threshold:
            log.warning(
                "buffer.floor=%g with agent.td_threshold=%g: for buffer=%s they are one number; give buffer.floor=%g "
                "agent.td_threshold=%g, unless they are to differ",
                floor, options.td_threshold, chooses, floor, floor,
            )  # fmt: skip
        return decided

    def advance(self) -> Progress:
        begin = perf_counter()
        obs, seen = self._see()
        act = self.agent.act(seen, self.carry)
        action = act.action.to(self.env.device)
        metrics: MetricSums = {}
        updates, aside_seconds = 0, 0.0
        if self._aside is None:
            step = self.env.step(action)
        else:
            stepping = self._aside.submit(self.env.step, action)
            middle = perf_counter()
            updates = self._learn(metrics)
            aside_seconds = perf_counter() - middle
            step = stepping.result()
        extras = self._extras(act)
        moved = step.valid  # a row that is one too many to be stored has moved too
        step, valid, count = self._accept(step)
        if count or bool(step.ended.any()):  # not where every row is surplus
            with torch.no_grad():
                self.buffer.add(
                    obs,
                    action,
                    step.reward,
                    step.next_obs,
                    step.terminated,
                    step.truncated,
                    step.ended,
                    valid,
                    **extras,
                )
        if self.normalizer is not None:
            self.normalizer.observe(obs, step)
        episodes = list(self._go_on(act, step, moved, count).values())
        learning = self.step - max(self.step - count, self.config.first_update)
        self.owed += max(learning, 0) * self.config.update_ratio[0]
        middle = perf_counter()
        if self._aside is None or self.step >= self.total_steps:
            updates += self._learn(metrics)
        learn_seconds = perf_counter() - middle + aside_seconds
        return Progress(episodes, metrics, updates, middle - begin - aside_seconds, learn_seconds)

    def _learn(self, metrics: MetricSums) -> int:
        """Make the updates that are owed; their number."""
        updates, self.owed = divmod(self.owed, self.config.update_ratio[1])
        for _ in range(updates):
            if self.captured is not None:
                update, index = self.captured(), self.captured.index
            else:
                batch = self.buffer.sample(self.config.batch_size * self.runs)
                if self.normalizer is not None:
                    batch = self.normalizer.normalize_batch(batch)
                update, index = self.agent.update(batch), slots_of(batch)
            self.buffer.update_priority(index, update.priority)
            add_metrics(metrics, update.metrics)
        return updates

    def updates_left(self) -> float:
        updates, steps = self.config.update_ratio
        learning = self.total_steps - max(self.step, self.config.first_update)
        return (self.owed + max(learning, 0) * updates) / steps

    def idle_reason(self) -> str | None:
        updates, steps = self.config.update_ratio
        first = self.config.first_update
        if (self.total_steps - first) * updates >= steps:
            return None
        option = "warmup_steps" if self.config.learning_starts is None else "learning_starts"
        return f"total_steps={self.total_steps} is over before the first update (agent.{option}={first})"

    def _drop_episodes(self) -> None:
        self._cut = True

    def state_dict(self) -> State:
        return {**super().state_dict(), "owed": self.owed, "buffer": self.buffer.state_dict()}

    def load_state_dict(self, state: State) -> None:
        self.owed = int(state["owed"])
        self.buffer.load_state_dict(state["buffer"])
        super().load_state_dict(state)

    def rows_restored(self) -> None:
        """Go on once the buffer's rows are back: an empty row keeps windows from crossing a dropped episode.

        Raises RloptError where rows were lost and what is left is less than a minibatch.
        """
        if self.buffer.forgotten and self.buffer.transitions < self.config.batch_size * self.runs:
            raise RloptError(
                f"only {self.buffer.transitions} transitions are left of the replay buffer, less than a minibatch; "
                "start again in a new run_dir"
            )
        if self._cut:
            self.buffer.add_cut()
            self._cut = False

    def close(self) -> None:
        if self._aside is not None:
            self._aside.shutdown()
        super().close()

    def row_logs(self) -> dict[str, RowLog]:
        side = {f"replay-frames-{name}": store for name, store in self.buffer.side_stores().items()}
        return {"replay": self.buffer, **side}


def _buffer(config: TrainConfig, options: ReplayAgentConfig, agent: Agent, env: VectorEnv) -> ReplayBuffer:
    """Return the replay buffer of every run, with a sampler for each, or several where the agent draws so."""
    b, spec = config.buffer, env.spec
    remembers = any(name.startswith(CARRY) for name in agent.extra_fields)
    if b.sequence_length is not None and not remembers:
        fix = "give agent.network.memory=gru, or leave it out" if agent.supports_memory else "leave it out"
        raise RloptError(
            f"buffer.sequence_length={b.sequence_length}: agent={agent.name} learns from single transitions; {fix}"
        )
    if b.sequence_length is None and remembers:
        raise RloptError(
            "agent.network.memory=gru: it is learnt from slices; give their length, buffer.sequence_length=40"
        )

    def sampler() -> Sampler:
        runs: list[Sampler] = [b.make_sampler() for _ in range(config.num_runs)]
        every = runs[0] if len(runs) == 1 else RunSamplers(runs, env.num_envs)
        return b.stand_over(every, lambda: construction.one_environment(config))

    place: torch.device | str = b.device
    if b.device != "disk":
        place = agent.device if b.device == "auto" else resolve_device(b.device)
    return ReplayBuffer(
        b.capacity * config.num_runs,
        spec.observation_space,
        spec.action_space,
        num_envs=env.num_envs,
        sampler={name: sampler() for name in agent.draws} if agent.draws else sampler(),
        n_step=options.n_step,
        gamma=options.gamma,
        extra_fields=agent.extra_fields,
        device=place,
        seed=config.seed,
        frame_stack=spec.frame_stack if b.frame_stack is None else b.frame_stack,
        folder=b.folder,
        batch_device=agent.device,
        reward_transform=options.reward,
        reward_shape=spec.reward_shape,
        derived=spec.derived,
        masks={name: mask for name, mask in agent.draws.items() if mask is not None},
        planned=config.total_steps * config.num_runs,
    )


def _update_mode(config: TrainConfig, agent: Agent) -> str:
    """Return ``captured`` where it was asked for, or on a GPU where nothing stands against it."""
    if config.update_mode == "captured" and not has_graphs(agent.device):
        log.info("update_mode=captured on %s: the same calls as on a GPU, but no graph", agent.device)
    if config.update_mode != "auto":
        return config.update_mode
    if not has_graphs(agent.device):
        return "eager"
    reason = why_eager(agent)
    if reason is not None:
        log.info("updates are not captured: %s", reason)
    return "eager" if reason else "captured"
