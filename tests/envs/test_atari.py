"""Atari games under their protocols: what is stored, what is hidden, what is counted, and exact continuation.

The traps are those of ale-py's vector environment: it restarts the whole game where ``episodic_life`` asks for a lost
life, and so on. ``test_atari_reference`` holds the rest against the old wrappers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

from rlopt.buffers import ReplayBuffer
from rlopt.envs import make_env
from rlopt.envs.atari.scores import ATARI_10, RANDOM_HUMAN, game_of, human_normalised
from rlopt.envs.make import resolve_backend
from rlopt.loops.configuration import build_config
from rlopt.loops.episodes import EpisodeCounter
from rlopt.training import train_config
from rlopt.training.setup import make_loop, resolve_config
from rlopt.types import RloptError

pytest.importorskip("ale_py.vector_env")


def _env(game: str = "Breakout", n: int = 1, **more: Any) -> Any:
    return make_env(f"ALE/{game}-v5", n, **more)


def _actions(env: Any, seed: int = 0) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(int(env.spec.action_space.n), (env.num_envs,), generator=generator)


def _same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a[:7], b[:7], strict=True))


def _run(env: Any, steps: int, acts: Iterator[Tensor]) -> list[Any]:
    return [env.step(next(acts)) for _ in range(steps)]


# Protocols


def test_a_game_simply_runs_as_its_id_registers_it() -> None:
    env = _env(n=2)
    assert env.protocol.name == "dopamine" and env.spec.facts == ("human_normalised",)
    assert env.spec.observation_space == gymnasium.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    assert (env.spec.frame_stack, env.spec.episode_limit, env.spec.action_space.n) == (4, 27_000, 4)
    obs = env.reset()
    assert obs.shape == (2, 4, 84, 84) and obs.dtype == torch.uint8
    assert not obs[:, :3].any() and obs[:, 3].any()  # a stack begins with black frames
    assert env.noops.tolist() == [0, 0]
    steps = _run(env, 120, _actions(env))
    assert all(bool(step.valid.all()) for step in steps)  # nothing is hidden
    assert all(torch.equal(step.terminated, step.ended) for step in steps)  # a lost life is no end
    assert sorted(env.lives.tolist()) != [5, 5]
    full: Any = make_env("BreakoutNoFrameskip-v4", 1, kwargs={"full_action_space": True, "stack_num": 2})
    assert full.spec.action_space.n == 18 and full.spec.frame_stack == 2 and full.protocol.name == "classic"
    env.close()
    full.close()


@pytest.mark.parametrize(
    ("given", "backend", "protocol", "reward"),
    [
        ({"id": "ALE/Pong-v5"}, "atari", "dopamine", "clip"),
        ({"id": "ALE/Pong-v5", "protocol": "classic"}, "atari", "classic", "sign"),
        ({"id": "PongNoFrameskip-v4"}, "atari", "classic", "sign"),
        ({"id": "ALE/Pong-v5", "wrappers": ["AtariPreprocessing"]}, "sync", None, "raw"),
        ({"id": "CartPole-v1"}, "sync", None, "raw"),
    ],
)
def test_the_word_decides_what_is_made_of_rewards(
    given: dict[str, Any], backend: str, protocol: str | None, reward: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        config = resolve_config(build_config({"agent": {"name": "sac_discrete"}, "env": given}))
    found: Any = config.agent
    assert (config.env.backend, config.env.protocol, found.reward) == (backend, protocol, reward)
    says = "is played by env.protocol=" in caplog.text
    assert says == (backend == "atari" and "protocol" not in given)
    agent = {"name": "sac_discrete", "reward": "raw"}
    kept: Any = resolve_config(build_config({"agent": agent, "env": given})).agent
    assert kept.reward == "raw"  # what is given wins


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"protocol": "clasic"}, "env.protocol='clasic' is unknown; did you mean classic?"),
        ({"protocol": "CLASSIC"}, "did you mean classic?"),
        ({"protocol": ""}, "env.protocol='' is unknown; choose"),
        ({"protocol": "classic,dopamine"}, "is unknown"),
        ({"protocol": "../dopamine"}, "did you mean dopamine?"),
        ({"id": "CartPole-v1", "protocol": "classic"}, "env=CartPole-v1 is no Atari game"),
        ({"protocol": "classic", "wrappers": ["AtariPreprocessing"]}, "leave env.wrappers out"),
        ({"protocol": "classic", "backend": "sync"}, "backend=sync has no protocols; use backend=atari"),
        ({"protocol": "classic", "kwargs": {"difficulty": 1}}, "env.kwargs.difficulty is none of the backend atari"),
        ({"kwargs": {"difficulty": 1}}, "env.backend=sync plays the game as Gymnasium does, in raw frames"),
        ({"kwargs": {"stack_nums": 3}}, "did you mean stack_num?"),
        ({"facts": ["lives"]}, "env.facts are read from info, which backend=atari leaves out; env.backend=sync plays"),
        ({"backend": "atari", "id": "CartPole-v1"}, "is no Atari game"),
        ({"backend": "atari", "facts": ["lives"]}, "env.facts are read from info"),
        (
            {"backend": "atari", "kwargs": {"episodic_life": True}},
            "episodic_life is what env.protocol decides",
        ),
        ({"backend": "atari", "kwargs": {"noops_max": 3}}, "did you mean noop_max?"),
        ({"kwargs": {"noop_max": -1}}, "env.kwargs.noop_max=-1: expected"),
        ({"kwargs": {"stack_num": 2.5}}, "env.kwargs.stack_num=2.5: expected a whole number"),
        ({"kwargs": {"repeat_action_probability": 2}}, "expected a number from 0 to 1"),
        ({"kwargs": {"full_action_space": "yes"}}, "expected true or false"),
    ],
)
def test_hostile_words(given: dict[str, Any], words: str) -> None:
    with pytest.raises(RloptError) as caught:
        make_env(**{"id": "ALE/Pong-v5", **given})
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_hostile_words_of_a_configuration() -> None:
    for word in ("clasic", "none", "0"):
        with pytest.raises(RloptError, match=r"env\.protocol: no such choice"):
            build_config({"env": {"id": "ALE/Pong-v5", "protocol": word}})
    with pytest.raises(RloptError, match=r"env\.protocol: expected"):
        build_config({"env": {"id": "ALE/Pong-v5", "protocol": ["classic"]}})


@pytest.mark.parametrize(
    ("evaluation", "words"),
    [
        ({"facts": ["lives"]}, "env.evaluation: env.facts are read from info"),
        ({"wrappers": ["AtariPreprocessing"]}, "env.evaluation: a protocol brings its own preprocessing"),
        ({"kwargs": {"obs_type": "ram"}}, "env.evaluation: env.kwargs.obs_type is none of the backend atari"),
    ],
)
def test_evaluations_do_not_take_the_protocol_from_training(evaluation: dict[str, Any], words: str) -> None:
    def resolved(**env: Any) -> Any:
        env = {"id": "ALE/Pong-v5", "evaluation": evaluation, **env}
        return resolve_config(build_config({"agent": {"name": "dqn"}, "env": env})).env

    with pytest.raises(RloptError) as caught:
        resolved()
    assert words in str(caught.value) and "; env.backend=sync plays" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert resolved(backend="sync").backend == "sync"
    assert resolved(wrappers=["AtariPreprocessing"]).backend == "sync"
    assert resolved(id="CartPole-v1", evaluation={"facts": ["x"]}, backend="auto").backend == "sync"


# The traps


def test_a_lost_life_goes_on_with_hidden_steps_until_the_game_is_over() -> None:
    """Traps 1 to 3: the game is not begun anew, the row after a life is not dropped as a reset row would be, and FIRE
    is pressed."""
    env = _env(protocol="classic", kwargs={"noop_max": 0}, seed=1)
    obs, acts = env.reset(), _actions(env)
    buffer = ReplayBuffer(400, env.spec.observation_space, env.spec.action_space, frame_stack=4)
    counter, lives, stored, episodes = EpisodeCounter(env.spec, 1), [5], 0, []
    while not episodes:
        action = next(acts)
        step = env.step(action)
        if step.valid[0]:
            buffer.add(obs, action, step.reward, step.next_obs, step.terminated, step.truncated, step.ended)
            stored += 1
            played = env.state_dict()["played"][0] % 128
            assert step.ended[0] or int(played[-1]) == int(action)  # what is stored is what was done
        else:
            assert not (step.terminated[0] or step.truncated[0] or step.ended[0] or step.reward[0])
        if step.terminated[0] and not step.ended[0]:
            assert env.hidden == [[0, 1, 2]]
            assert (step.obs[0] == step.obs[0, 3]).all()  # the stack begins anew, the true last one is next_obs
            assert torch.equal(step.next_obs[0, :3], obs[0, 1:])
        if int(env.lives[0]) != lives[-1]:
            lives.append(int(env.lives[0]))
        obs = step.obs
        episodes += counter.count(step).values()
    assert lives == [5, 4, 3, 2, 1, 5]
    assert (episodes[0].length, buffer.transitions) == (stored, stored)
    assert episodes[0].facts["human_normalised"] == pytest.approx((episodes[0].total_reward - 1.7) / 28.8)
    assert env.hidden == [[1, 2]]  # a game begins with FIRE too
    (beside,) = buffer.side_stores().values()
    assert beside.capacity_rows <= 6  # beside the ring: the last frame of each life, no stacks
    env.close()


def test_evaluation_plays_the_same_way_but_lives_are_no_ends() -> None:
    train, evaluation = (_env(protocol="classic", evaluation=word, seed=1) for word in (False, True))
    train.reset()
    evaluation.reset()
    lost = 0
    for action, _ in zip(_actions(train), range(130), strict=False):
        one, two = train.step(action), evaluation.step(action)
        assert torch.equal(one.obs, two.obs) and torch.equal(one.valid, two.valid)
        lost += int(one.terminated[0])
        assert torch.equal(two.terminated, two.ended)
    assert lost >= 2
    train.close()
    evaluation.close()


def test_rewards_are_the_games_own_and_those_of_hidden_steps_are_not_lost() -> None:
    """Trap 4: clipping hides scores."""
    env = _env("SpaceInvaders", protocol="classic", seed=3)
    env.reset()
    steps = _run(env, 120, _actions(env))
    assert {float(step.reward[0]) for step in steps} > {0.0, 5.0}
    env._owed[0], env._owing = 30.0, True  # as if a shot of the life before had hit
    step = env.step(torch.tensor([0]))
    while not step.valid[0]:
        assert step.reward[0] == 0
        step = env.step(torch.tensor([0]))
    assert step.reward[0] >= 30 and env._owed[0] == 0
    env.close()


def test_sticky_actions_are_those_of_the_protocol_and_not_of_the_id() -> None:
    """Trap 5: the registered id and the bare class have different ones. Without them a game is its actions."""
    seen: dict[str, list[Any]] = {}
    for word in ("classic", "dopamine"):
        for seed in (1, 2):
            env = _env("Breakout", protocol=word, kwargs={"noop_max": 0})
            env.reset(seeds=[seed])
            seen.setdefault(word, []).append(_run(env, 60, _actions(env))[-1].obs)
            env.close()
    assert torch.equal(*seen["classic"])
    assert not torch.equal(*seen["dopamine"])


def test_games_begin_with_up_to_thirty_noops_or_none() -> None:
    """Trap 6."""
    env = _env("Pong", 2, protocol="classic", kwargs={"max_episode_steps": 3})
    begun: set[int] = set()
    env.reset()
    for _ in range(90):
        step = env.step(torch.tensor([0, 0]))
        assert torch.equal(step.ended, step.truncated)
        begun |= set(env.noops.tolist())
    assert min(begun) <= 2 and 28 <= max(begun) <= 30
    obs = env.reset()
    assert (obs[:, :3] == obs[:, 3:]).all()  # and with copies of their first frame
    env.close()


def test_a_cut_off_game_shows_its_true_last_frame() -> None:
    """Trap 7: there the emulator's own limit shows a mixture of older frames, from which learning would bootstrap."""
    short, long = (_env("Pong", protocol="dopamine", kwargs={"max_episode_steps": k}) for k in (30, 60))
    short.reset(seeds=[1])
    long.reset(seeds=[1])
    for k, action in zip(range(1, 31), _actions(short), strict=False):
        one, two = short.step(action), long.step(action)
        assert torch.equal(one.next_obs, two.next_obs)
        assert bool(one.truncated[0]) == bool(one.ended[0]) == (k == 30) and not one.terminated[0]
    assert not torch.equal(one.obs, one.next_obs) and not one.obs[0, :3].any()
    short.close()
    long.close()


def test_an_action_that_a_game_does_not_have_is_refused_and_not_waited_for() -> None:
    """Trap 8: the emulator's threads want whole numbers of one type, and of the game's."""
    env = _env("Pong", 2)
    env.reset()
    with pytest.raises(RloptError, match=r"has the actions 0 to 5, not \[0, 6\]"):
        env.step(torch.tensor([0, 6]))
    with pytest.raises(RloptError, match="have shape"):
        env.step(torch.tensor([0]))
    with pytest.raises(RloptError, match="takes no options"):
        env.reset(options={"reset_mask": 1})
    assert env.step(torch.tensor([0, 5])).valid.all()
    env.close()


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({}, 27_000),
        ({"max_num_frames_per_episode": 400, "max_episode_steps": 5000}, 100),
        ({"max_num_frames_per_episode": 400, "max_episode_steps": 30}, 30),
        ({"max_num_frames_per_episode": 400, "frameskip": 2}, 200),
        ({"max_episode_steps": 40_000}, 40_000),
        ({"max_num_frames_per_episode": 3}, 1),
    ],
)
def test_the_smaller_of_the_given_limits_holds(given: dict[str, int], steps: int) -> None:
    env = _env("Pong", kwargs=given)
    assert env.spec.episode_limit == env._limit == steps
    env.close()


def test_without_autoreset_a_game_that_is_over_waits() -> None:
    env = _env(n=2, protocol="classic", autoreset=False, kwargs={"max_episode_steps": 50, "noop_max": 0})
    env.reset(seeds=[1, 2])
    counter, done, last = EpisodeCounter(env.spec, 2), {}, None
    acts = _actions(env)
    for _ in range(60):
        step = env.step(next(acts))
        done |= counter.count(step)
        if len(done) == 2 and last is None:
            last = step.obs
    assert last is not None and torch.equal(step.obs, last) and torch.equal(step.obs, step.next_obs)
    assert not (step.valid.any() or step.ended.any())
    assert {e.length for e in done.values()} <= set(range(30, 49))  # hidden steps are the limit's, not the episode's
    obs = env.reset(mask=torch.tensor([True, False]))
    assert torch.equal(obs[1], last[1]) and not torch.equal(obs[0], last[0])
    valid = [env.step(next(acts)).valid.tolist() for _ in range(3)]
    assert valid == [[False, False], [False, False], [True, False]]
    env.close()


def test_ppo_neither_learns_from_hidden_rows_nor_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    loop: Any = make_loop(
        train_config({
            "agent": "ppo", "env": "ALE/Breakout-v5", "env.protocol": "classic", "num_envs": 2, "total_steps": 201,
            "device": "cpu", "threads": 1, "agent.rollout_steps": 32, "agent.batch_size": 32, "agent.epochs": 1,
            "agent.network.encoder": "flatten", "agent.network.hidden": [8],
        })
    )  # fmt: skip
    env, made, learnt = loop.env, list[Any](), list[Any]()
    step, samples = env.step, loop.agent.samples

    def stepped(action: Tensor) -> Any:
        obs, found = loop.obs, step(action)
        told = torch.tensor([played[-1] % 128 for played in env._played])
        made.append((obs, action, told, found.reward, found.terminated & ~found.ended, found.valid))
        return found

    def sampled(*args: Any) -> Any:
        learnt.append(samples(*args))
        return learnt[-1]

    monkeypatch.setattr(env, "step", stepped)
    monkeypatch.setattr(loop.agent, "samples", sampled)
    episodes: list[Any] = []
    while loop.step < loop.total_steps:
        episodes += loop.advance().episodes
    obs, action, told, reward, lost, valid = (torch.cat(rows) for rows in zip(*made, strict=True))
    assert (~valid & (told == 1)).sum() >= 4 and not torch.equal(told[~valid], action[~valid])  # FIRE was pressed
    assert lost[valid].sum() >= 2 and not lost[~valid].any()
    assert loop.step == loop.agent.clock.env_steps == sum(len(rows.value) for rows in learnt) == 201
    assert sum(e.length for e in episodes) + int(loop.counter.lengths.sum()) == 201
    obs, action, told, reward, lost = (x[valid][:201] for x in (obs, action, told, reward, lost))
    assert torch.equal(torch.cat([rows.obs for rows in learnt]), obs)
    assert torch.equal(torch.cat([rows.sample for rows in learnt]), action) and torch.equal(action, told)
    target = torch.cat([rows.target for rows in learnt])
    torch.testing.assert_close(target[lost], reward[lost].sign(), rtol=0.0, atol=1e-5)  # there the bootstrap is cut
    loop.close()


# Continuation


@pytest.mark.parametrize("protocol", ["classic", "dopamine"])
def test_a_saved_game_continues_bit_for_bit(protocol: str) -> None:
    """Rows were seeded at different times, games were lost, cut off and begun again by their own random numbers."""
    env, other = (_env(n=2, protocol=protocol, seed=s, kwargs={"max_episode_steps": 90}) for s in (3, 4))
    env.reset()
    acts = _actions(env)
    _run(env, 40, acts)
    env.reset(mask=torch.tensor([False, True]))
    _run(env, 110, acts)
    state = env.state_dict()
    assert [len(played) for played in state["played"]] == [150, 110]
    assert any((played >= 128).any() for played in state["played"])
    other.load_state_dict(state)
    for action in (next(acts) for _ in range(40)):
        assert _same(env.step(action), other.step(action))
    env.close()
    other.close()


def test_a_row_gets_its_next_seed_after_a_while_and_nothing_is_left_of_what_was_before() -> None:
    from rlopt.envs.atari.env import AtariGames
    from rlopt.envs.atari.protocols import DOPAMINE

    env, other = (AtariGames("pong", 2, DOPAMINE, max_episode_steps=8, reseed_after=20, seed=s) for s in (1, 2))
    env.reset()
    acts = _actions(env)
    _run(env, 24, acts)
    seeds: list[int] = env.state_dict()["seeds"]  # type: ignore[index]
    assert [len(played) for played in env.state_dict()["played"]] == [0, 0]  # type: ignore[index]
    other.reset()
    _run(other, 5, acts)
    assert torch.equal(env.reset(mask=torch.zeros(2, dtype=torch.bool)), other.reset(seeds=seeds))  # type: ignore[arg-type]
    for action in (next(acts) for _ in range(20)):
        assert _same(env.step(action), other.step(action))
    env.close()
    other.close()


def test_a_state_of_another_game_or_emulator_is_refused() -> None:
    env, other = _env("Pong"), _env("Breakout")
    env.reset()
    _run(env, 5, _actions(env))
    state = env.state_dict()
    with pytest.raises(RloptError, match="the saved state is of 1 copies of pong, not of 1 of breakout"):
        other.load_state_dict(state)
    state["played"][0][2] = 3
    state["frame"] += 1
    env.load_state_dict(state)
    with pytest.raises(RloptError, match="played again, the game is another"):
        env.step(torch.tensor([0]))
    env.load_state_dict({**state, "played": state["played"]})
    env.reset(seeds=[1])  # what is begun anew needs no replay
    env.step(torch.tensor([0]))
    env.close()
    other.close()


def test_a_game_is_drawn_in_colour_by_an_emulator_that_follows() -> None:
    cv2 = pytest.importorskip("cv2")
    env = _env("Pong", protocol="dopamine", autoreset=False)
    with pytest.raises(RloptError, match="autoreset=False and begun"):
        env.render()
    env.reset(seeds=[5])
    acts = _actions(env)
    for steps in (0, 30, 40):
        obs = [step.obs for step in _run(env, steps, acts)][-1] if steps else env.reset(seeds=[5])
        picture = env.render()
        assert picture.shape == (210, 160, 3) and picture.dtype == np.uint8
        grey = cv2.resize(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), (84, 84), interpolation=cv2.INTER_AREA)
        off = np.abs(grey.astype(int) - obs[0, -1].numpy().astype(int)) > 20
        assert off.sum() < 20  # the brighter of two frames shows what moves twice
    env.close()


# Scores


def test_the_score_so_far_is_known_of_a_game_that_an_evaluation_cuts_off() -> None:
    env = _env(n=2, autoreset=False)
    env.reset()
    counter = EpisodeCounter(env.spec, 2)
    for step in _run(env, 150, _actions(env)):
        counter.count(step)
    found = [counter.episode(i) for i in range(2)]
    assert any(e.total_reward > 0 for e in found)
    for e in found:
        assert e.facts["human_normalised"] == pytest.approx((e.total_reward - 1.7) / 28.8)


def test_human_normalised_scores() -> None:
    assert len(RANDOM_HUMAN) == 57 and set(ATARI_10) <= set(RANDOM_HUMAN)
    assert human_normalised("breakout", 1.7) == 0.0 and human_normalised("breakout", 30.5) == 1.0
    assert human_normalised("skiing", -4336.9) == pytest.approx(1.0) and human_normalised("adventure", 3.0) is None
    names = ["ALE/MsPacman-v5", "MsPacmanNoFrameskip-v4", "ALE/Adventure-v5", "CartPole-v1"]
    assert [game_of(name) for name in names] == ["ms_pacman", "ms_pacman", None, None]
    registered = {spec.kwargs["game"] for spec in gymnasium.registry.values() if spec.namespace == "ALE"}
    assert set(RANDOM_HUMAN) <= registered
    assert resolve_backend("ALE/Pong-v5") == "atari"
