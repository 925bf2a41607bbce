"""What every loop is built from: environments, evaluation, statistics, as a configuration describes them."""

from __future__ import annotations

import torch

from rlopt.envs import Normalizer, VectorEnv, make_env
from rlopt.envs.factory import Env, EnvFactory, find_spec, said
from rlopt.envs.make import find_backend, resolve_backend, stepping_device
from rlopt.loops.configuration import EnvConfig, TrainConfig
from rlopt.loops.evaluation import Evaluator
from rlopt.types import RloptError


def environment(
    config: TrainConfig, num_envs: int, device: torch.device, stream: str, autoreset: bool, evaluation: bool = False
) -> VectorEnv:
    """Return ``num_envs`` copies of the configured environment, with seeds from the random stream ``stream``; for
    ``evaluation`` as ``env.evaluation`` changes it."""
    e = config.env.for_evaluation() if evaluation else config.env
    if e.kwargs:
        _try_arguments(e)
    return make_env(
        e.id,
        num_envs,
        seed=config.seed,
        backend=e.backend,
        device=device,
        autoreset=autoreset,
        kwargs=e.kwargs,
        wrappers=e.wrappers,
        facts=e.facts,
        timeout=e.timeout,
        stream=stream,
        evaluation=evaluation,
        protocol=e.protocol,
    )


def _try_arguments(env: EnvConfig) -> None:
    """Take a step with the environment's arguments: those of a wrong type or value are often met only then.

    Raises:
        RloptError: that fails.
    """
    backend = resolve_backend(env.id, env.backend, kwargs=env.kwargs, wrappers=env.wrappers, facts=env.facts)
    if backend == "async":
        backend = "sync"  # no need of a worker
    trial = make_env(env.id, 1, backend=backend, kwargs=env.kwargs, wrappers=env.wrappers, stream="trial")
    try:
        trial.reset()
        trial.spec.action_space.seed(0)
        trial.step(torch.as_tensor(trial.spec.action_space.sample())[None])
    except RloptError:
        raise
    except Exception as e:
        raise RloptError(f"env={env.id} does not run with env.kwargs={env.kwargs}: {said(e)}") from e
    finally:
        trial.close()


def evaluator(config: TrainConfig, device: torch.device) -> Evaluator:
    """Return an evaluator on environments of its own.

    Away from the CPU several runs are evaluated at once, where environments are rows of one simulation: a step there
    costs about the same for one run's rows and for all. On the CPU it would gain little, and its vector instructions
    round a row's sine differently by its place in the batch.
    """
    together = config.num_runs > 1 and device.type != "cpu" and find_backend(config.env.backend).batched
    e, env = config.eval, config.env.for_evaluation()

    def make(n: int) -> VectorEnv:
        backend = resolve_backend(env.id, env.backend, kwargs=env.kwargs, wrappers=env.wrappers, facts=env.facts)
        home = stepping_device(backend, device)
        return environment(config, n, home, "evaluation", autoreset=False, evaluation=True)

    return Evaluator(make, config.seed, together, e.max_steps, e.mode, e.epsilon)


def one_environment(config: TrainConfig) -> Env:
    """Return one more of the run's environments, wrappers included, for what only it knows (rewards of other goals)."""
    e = config.env
    return EnvFactory(find_spec(e.id), e.kwargs, e.wrappers)()


def normalizer(config: TrainConfig, env: VectorEnv, gamma: float, device: torch.device) -> Normalizer | None:
    """Return new statistics of what the configuration normalises; None where that is nothing."""
    e, word = config.env, getattr(config.agent, "reward", "raw")
    if e.normalize_reward and word not in ("auto", "raw"):
        raise RloptError(f"agent.reward={word} and env.normalize_reward both change what is learnt from; choose one")
    if not (e.normalize_obs or e.normalize_reward):
        return None
    return Normalizer(env.spec, e.normalize_obs, e.normalize_reward, gamma, runs=config.num_runs, device=device)
