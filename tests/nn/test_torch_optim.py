"""Optimisers of other packages: over leaves as modules have them, guarded, resumed exactly, or refused in one line."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlopt.agents import Agent
from rlopt.buffers import Rollout
from rlopt.cli.compose import compose
from rlopt.loops.captured import why_eager
from rlopt.nn import NetworkConfig, OptimiserConfig, make_optimiser
from rlopt.nn.torch_optim import TorchOptimiser
from rlopt.registry import get_agent
from rlopt.training import train_config
from rlopt.training.setup import begin, make_loop, resolve_config, resume
from rlopt.training.trainer import Callback
from rlopt.types import RloptError
from tests.agents.cases import make_agent, make_batch

pytest.importorskip("pytorch_optimizer")
PACKAGE = "pytorch_optimizer"


def agent_with(name: str, kind: str = "sac_discrete", runs: int = 1, seed: int = 0, **options: Any) -> Agent:
    kwargs = options.pop("kwargs", {})
    optimiser = OptimiserConfig(name=name, kwargs=kwargs)
    return make_agent(kind, runs=runs, seed=seed, optimiser=optimiser, **options)


def learn(agent: Agent, first: int, updates: int = 3) -> None:
    for i in range(first, first + updates):
        agent.update(make_batch(agent, i, size=8 * agent.runs))


def optimiser_of(agent: Agent, net: str) -> TorchOptimiser:
    found = getattr(agent, f"{net}_optimiser")
    assert isinstance(found, TorchOptimiser)
    return found


# --- leaves


@pytest.mark.parametrize("runs", [1, 2])
def test_stacked_critics_are_leaves_of_their_own_and_matrices_are_as_in_a_linear_layer(runs: int) -> None:
    agent = agent_with("torch:Adam", runs=runs, network=NetworkConfig(hidden=(12,), norm="layer"))
    both = [(12, 4)] * 2 + [(12,)] * 2 + [(3, 12)] * 2 + [(3,)] * 2 + [(12,)] * 2 + [(12,)] * 2
    for leaves in optimiser_of(agent, "critic").leaves:
        assert [tuple(leaf.parameter.shape) for leaf in leaves] == both
        assert [leaf.hidden for leaf in leaves] == [True] * 2 + [False] * 10
        assert sum(leaf.parameter.numel() for leaf in leaves) == agent.critic.flat.shape[-1]
    assert len(optimiser_of(agent, "critic").leaves) == runs


@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
def test_torchs_classes_are_the_rules_of_the_same_name(runs: int, max_grad_norm: float | None) -> None:
    kwargs = {"betas": [0.8, 0.99], "eps": 1e-6}
    theirs = agent_with("torch:Adam", runs=runs, kwargs=kwargs, max_grad_norm=max_grad_norm)
    adam = OptimiserConfig(beta1=0.8, beta2=0.99, epsilon=1e-6)
    ours = make_agent("sac_discrete", runs=runs, optimiser=adam, max_grad_norm=max_grad_norm)
    for agent in (theirs, ours):
        learn(agent, 0, 8)
    for net in ("actor", "critic"):
        torch.testing.assert_close(getattr(theirs, net).flat, getattr(ours, net).flat, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(theirs.temperature.value, ours.temperature.value)


def test_each_run_has_an_instance_of_its_own() -> None:
    name = f"{PACKAGE}:AdamP"
    together, alone = agent_with(name, runs=2, seed=4), [agent_with(name, seed=4 + r) for r in range(2)]
    for i in range(3):
        batches = [make_batch(one, 10 * i + r) for r, one in enumerate(alone)]
        for one, batch in zip(alone, batches, strict=True):
            one.update(batch)
        joined = batches[0]._replace(**{
            field: torch.cat([getattr(batch, field) for batch in batches])
            for field in ("obs", "action", "reward", "next_obs", "terminated", "discount", "index")
        })  # fmt: skip
        together.update(joined)
    for r, one in enumerate(alone):
        torch.testing.assert_close(together.critic.flat[r], one.critic.flat, rtol=1e-4, atol=1e-5)


def test_muon_steps_hidden_matrices_of_every_critic_and_the_rest_by_adam() -> None:
    """An orthogonalised step has singular values near 1, whatever the gradient; both critics' apart."""
    kwargs = {"adamw_lr": 1e-4, "momentum": 0.0, "nesterov": False}
    agent = agent_with(f"{PACKAGE}:Muon", learning_rate=0.02, kwargs=kwargs)
    groups = optimiser_of(agent, "critic").stepping[0].param_groups
    assert [(group["use_muon"], group["lr"], len(group["params"])) for group in groups] == [
        (True, 0.02, 4), (False, 1e-4, 8)
    ]  # fmt: skip
    assert agent.temperature.optimiser.stepping[0].param_groups[0]["lr"] == 0.02
    hidden = agent.critic.params["body.layers.1.weight"].detach().clone()
    learn(agent, 0, 1)
    moved = (agent.critic.params["body.layers.1.weight"].detach() - hidden) / 0.02
    sizes = torch.linalg.svdvals(moved)  # ReLU leaves some units without a gradient
    assert (sizes[:, 0] < 1.3).all() and (sizes[:, :8] > 0.5).all()


def test_the_factor_of_a_schedule_and_a_rate_set_by_hand_scale_every_group() -> None:
    agent = agent_with(f"{PACKAGE}:Muon", lr_schedule="linear", schedule_steps=10, kwargs={"adamw_lr": 1e-4})
    optimiser = optimiser_of(agent, "critic")
    agent.clock.env_steps = 5
    optimiser.learning_rate *= 3.0
    learn(agent, 0, 1)
    rates = [group["lr"] for group in optimiser.stepping[0].param_groups]
    assert rates == pytest.approx([1.5 * 3e-4, 1.5e-4])
    agent.clock.env_steps = 10
    before = agent.critic.flat.clone()
    learn(agent, 1, 1)
    assert torch.equal(agent.critic.flat, before)


def test_a_step_that_is_skipped_changes_neither_weights_nor_state() -> None:
    agent = agent_with(f"{PACKAGE}:SOAP", runs=2)
    learn(agent, 0, 2)
    before, state = agent.critic.flat.clone(), optimiser_of(agent, "critic").state_dict()
    batch = make_batch(agent, 5, size=16)
    batch.reward[3] = torch.nan  # of the first run
    agent.update(batch)
    assert torch.equal(agent.critic.flat[0], before[0]) and not torch.equal(agent.critic.flat[1], before[1])
    after = optimiser_of(agent, "critic").state_dict()
    assert str(after["runs"][0]) == str(state["runs"][0]) and str(after["runs"][1]) != str(state["runs"][1])
    assert after["count"].tolist() == [2.0, 3.0] and agent.guard.first_bad() == "reward"


def test_what_is_frozen_stays_under_weight_decay() -> None:
    agent = agent_with(f"{PACKAGE}:Lion", kwargs={"weight_decay": 0.5})
    agent.critic.module.body.layers[0].requires_grad_(False)
    learn(agent, 0)
    fresh = agent_with(f"{PACKAGE}:Lion")
    same = {name: torch.equal(x, fresh.critic.params[name]) for name, x in agent.critic.params.items()}
    assert same == {name: "layers.0" in name for name in same}


def test_the_compiled_update_gives_way_and_arguments_reach_the_class() -> None:
    agents = [agent_with(f"{PACKAGE}:Lion", "sac", kwargs=kwargs) for kwargs in ({}, {"cautious": True})]
    assert all(agent.fused is None for agent in agents)
    for agent in agents:
        learn(agent, 0)
    assert not torch.equal(agents[0].actor.flat, agents[1].actor.flat)


def test_a_group_learner_takes_them_too() -> None:
    cls: Any = get_agent("reinforce")
    config = cls.config_class(groups=1, group_size=2, optimiser=OptimiserConfig(name="torch:Adagrad"))
    agent = cls(spaces.Box(-1, 1, (3,)), spaces.Discrete(2), config)
    before, yes = agent.actor.flat.clone(), torch.ones(1, 2, dtype=torch.bool)
    rollout = Rollout(
        torch.rand(1, 2, 3), torch.zeros(1, 2).long(), torch.rand(1, 2), None, yes, ~yes, yes, yes, {},
        torch.zeros(2).long(), yes[0],
    )  # fmt: skip
    agent.update(rollout)
    assert not torch.equal(agent.actor.flat, before)


# --- state


@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize("name", ["SOAP", "Muon", "Prodigy", "AdaFactor", "Shampoo"])
def test_a_fresh_agent_of_another_seed_continues_exactly(name: str, runs: int) -> None:
    straight, resumed = (agent_with(f"{PACKAGE}:{name}", runs=runs, seed=seed) for seed in (0, 1))
    learn(straight, 0, 7)
    state = straight.state_dict()
    learn(straight, 7, 6)
    resumed.load_state_dict(state)
    learn(resumed, 7, 6)
    assert str(straight.state_dict()) == str(resumed.state_dict())
    for net in ("actor", "critic", "target"):
        assert torch.equal(getattr(straight, net).flat, getattr(resumed, net).flat)


def test_a_run_goes_on_exactly_from_its_checkpoint(tmp_path: Path) -> None:
    """By the words of the command line; what the optimisers keep (lists of matrices, counts) comes back from files."""
    words = [
        "agent=sac_discrete", "env=CartPole-v1", "device=cpu", "total_steps=90", "agent.warmup_steps=40",
        "agent.batch_size=8", "agent.network.hidden=[8]", "agent.optimiser.name=pytorch_optimizer:SOAP",
        "agent.optimiser.kwargs.betas=[0.9,0.95]", "agent.optimiser.kwargs.precondition_frequency=3",
        "eval.every=null", "eval.episodes=1", "log.tensorboard=false", "checkpoint.every_steps=60",
    ]  # fmt: skip
    whole = begin(compose([*words, f"run_dir={tmp_path / 'whole'}"]))
    whole.run()
    part = begin(compose([*words, f"run_dir={tmp_path / 'part'}"]), [StopAt(70)])
    part.run()
    part.close()
    rest = resume(tmp_path / "part", {})
    rest.run()
    assert str(whole.loop.agent.state_dict()) == str(rest.loop.agent.state_dict())
    assert optimiser_of(whole.loop.agent, "actor").stepping[0].param_groups[0]["betas"] == (0.9, 0.95)
    for trainer in (whole, rest):
        trainer.close()


class StopAt(Callback):
    """Ends a run at a step, as Ctrl-C would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer: Any, progress: Any) -> bool:
        return bool(trainer.loop.step >= self.step)


# --- refusals


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (f"{PACKAGE}:SophiaH", "it needs gradients of gradients (create_graph)"),
        (f"{PACKAGE}:AdaHessian", "it needs gradients of gradients (create_graph)"),
        ("torch:LBFGS", "missing 1 required positional argument: 'closure'"),
        ("torch:Muon", "Muon only supports 2D parameters"),
        ("torch:SparseAdam", "does not support dense gradients"),
        (f"{PACKAGE}:Kron", "it draws from a global generator, which no checkpoint holds"),
        (f"{PACKAGE}:ScheduleFreeAdamW", "it acts with other weights than it trains"),
        (f"{PACKAGE}:ScalableShampoo", "it keeps a PreConditioner that cannot be saved"),
        (f"{PACKAGE}:AdamMini", "it is made of `model`, not of parameters"),
        (f"{PACKAGE}:SAM", "it has no learning rate"),
    ],
)
def test_a_class_that_cannot_be_used_is_refused_in_one_line(name: str, why: str) -> None:
    with pytest.raises(RloptError) as error:
        agent_with(name)
    told = str(error.value)
    assert told.startswith(f"agent.optimiser.name={name} cannot be used here: ") and why in told and "\n" not in told


@pytest.mark.parametrize(
    ("name", "kwargs", "told"),
    [
        ("torch:Adagard", {}, "agent.optimiser.name=torch:Adagard: no such class; did you mean Adagrad?"),
        ("jax:Adam", {}, "agent.optimiser.name=jax:Adam: give torch:CLASS or pytorch_optimizer:CLASS"),
        ("torch:Adam", {"beta": 0.9}, "agent.optimiser.kwargs.beta: no such option; did you mean"),
        ("torch:Adam", {"lr": 0.1}, "agent.optimiser.kwargs.lr: the learning rate is agent.learning_rate"),
        ("torch:Adam", {"betas": [2.0, 0.9]}, "Invalid beta parameter"),
        (f"{PACKAGE}:Lion", {"cautiuos": True}, "agent.optimiser.kwargs.cautiuos: no such option"),
        (f"{PACKAGE}:AccSGD", {"cautious": True}, "agent.optimiser.kwargs.cautious: no such option"),
    ],
)
def test_a_mistake_in_name_or_arguments_is_told_in_one_line(name: str, kwargs: dict[str, Any], told: str) -> None:
    with pytest.raises(RloptError) as error:
        agent_with(name, kwargs=kwargs)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_without_the_package_the_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(RloptError, match=r"needs pytorch-optimizer; .*pip install .*\[optim\]"):
        make_optimiser(torch.zeros(3), 0.1, OptimiserConfig(name=f"{PACKAGE}:Tiger"))


def test_global_generators_are_left_alone() -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    agent = agent_with(f"{PACKAGE}:EXAdam")
    learn(agent, 0, 1)
    for refused in ("DASH", "Gravity"):
        with pytest.raises(RloptError, match="global generator"):
            agent_with(f"{PACKAGE}:{refused}")
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def test_its_updates_are_not_captured_and_the_line_says_why() -> None:
    agent = agent_with(f"{PACKAGE}:Lion")
    assert why_eager(agent) == f"agent.optimiser.name={PACKAGE}:Lion steps on the host"
    options = {"agent": "sac", "agent.optimiser.name": "torch:Adagrad", "device": "cpu", "update_mode": "captured"}
    with pytest.raises(RloptError, match=r"captured cannot be: agent\.optimiser\.name=torch:Adagrad steps on"):
        make_loop(resolve_config(train_config(options)))
