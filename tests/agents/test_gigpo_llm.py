"""GiGPO for language models: what is learnt from which token, what counts as the same state, whole runs."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from rlopt.agents import Agent, register_anchor
from rlopt.agents.gigpo_llm import GiGPOLLM, GiGPOLLMConfig
from rlopt.agents.group_advantages import group_advantages, group_metrics
from rlopt.agents.text_rollout import TextEpisode, TextTurn
from rlopt.cli.log import log_shown
from rlopt.config import build, over
from rlopt.envs.text.game import Seen
from rlopt.loops.text import TextLoop
from rlopt.loops.text_play import Speaker, demonstration, play
from rlopt.policy import load_policy, save_policy
from rlopt.policy.language import AnswerConfig, LanguagePolicy, demonstrated, prompt_of
from rlopt.policy.prompts import Past, answer, meaning, question
from rlopt.random import numpy_generator, torch_generator
from rlopt.runs.run_folder import RunFolder
from rlopt.state import states_equal
from rlopt.training import resume
from rlopt.training.evaluate import evaluate_path
from rlopt.training.setup import begin, make_loop
from rlopt.types import RloptError
from tests.agents.cases import AGENTS, short_run
from tests.agents.corridor import Corridor
from tests.training.conftest import no_curve


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunFolder, "draw_curve", no_curve)


def run(**options: Any) -> Any:
    return short_run("gigpo_llm", agent=options)


def make_agent(**options: Any) -> GiGPOLLM:
    """Return an agent that knows the corridor's words."""
    loop = make_loop(run(**options))
    assert isinstance(loop, TextLoop)
    loop.close()
    return loop.agent


def rollout(agent: GiGPOLLM, seed: int = 0) -> list[TextEpisode]:
    """Return two groups of two episodes, some rewards made up."""
    c = agent.config
    speaker = Speaker(agent.model, c, c.temperature, [torch_generator(seed, "row", row) for row in range(4)])
    played = play([Corridor() for _ in range(4)], [0, 0, 1, 1], [0, 0, 1, 1], speaker, exact=True)
    return [
        one._replace(turns=[turn._replace(reward=float((n + t) % 3)) for t, turn in enumerate(one.turns)])
        for n, one in enumerate(played)
    ]


# Prompts and answers


SEEN = Seen("You are here.", "Find it.", "all", ("go east", "go west"))
PAST = [Past("a", "go 1"), Past("b", "go 2"), Past("c", "go 3")]


def test_a_question_tells_the_task_the_last_steps_and_what_can_be_done() -> None:
    c = build(AnswerConfig, {})
    asked = question(SEEN, PAST, c, think=True)
    parts = [
        "Find it.", "3 steps so far", "[step 2] b", "[action 2] go 2", "[step 3] c", "step 4", "You are here.",
        "go east\ngo west", "<think>", "<action>",
    ]  # fmt: skip
    places = [asked.index(part) for part in parts]
    assert places == sorted(places) and "[step 1]" not in asked
    first = question(SEEN, [], c, think=False)
    assert "so far" not in first and "<think>" not in first
    short = build(AnswerConfig, {"prompt": "short", "history": 1})
    assert question(SEEN, PAST, short, True) == (
        "Find it.\nDone: go 3\nYou are here.\nActions:\ngo east\ngo west\nAnswer:\n"
    )
    assert "Done" not in question(SEEN, PAST, build(AnswerConfig, {"prompt": "short", "history": 0}), True)


@pytest.mark.parametrize(
    ("text", "action", "valid"),
    [
        ("<think>so</think><action>Go  East</action>", "go east", True),
        ("<action>go east</action>", "go east", False),  # without a thought
        ("<think>x</think> go east", "<think>x</think> go east", False),
        ("<think>x</think>" + 40 * "y", 30 * "y", False),
    ],
)
def test_what_an_answer_means(text: str, action: str, valid: bool) -> None:
    assert meaning(text, build(AnswerConfig, {})) == (action, valid)


def test_demonstrated_answers_mean_what_they_do() -> None:
    for think in (True, False):
        c = build(AnswerConfig, {"think": think})
        assert meaning(answer("go east", c), c) == ("go east", True)


def test_long_prompts_are_refused_or_cut_on_the_left() -> None:
    agent = make_agent(max_prompt=10, long_prompts="cut")
    seen = Corridor().begin(0)
    whole = prompt_of(agent.model, seen, [], build(AnswerConfig, {"prompt": "short"}))
    assert prompt_of(agent.model, seen, [], agent.config) == whole[-10:]
    with pytest.raises(RloptError, match=r"more than agent\.max_prompt=10; raise it"):
        prompt_of(agent.model, seen, [], build(AnswerConfig, {"prompt": "short", "max_prompt": 10}))


# What is learnt


@pytest.mark.parametrize("answers", ["generate", "score"])
def test_the_first_ratios_are_one_and_the_gradient_is_the_policy_gradient(answers: str) -> None:
    """Of one minibatch, read in one part or in many: - mean over tokens of Â ∇ log π."""
    options = {"batch_size": 1000, "max_grad_norm": None, "kl_coefficient": 0.0}
    found = []
    for tokens_at_once in (10**6, 100):
        own = {**options, "tokens_at_once": tokens_at_once, "optimiser": {"name": "sgd", "beta1": 0.0}}
        agent = scoring(**own) if answers == "score" else make_agent(**own)
        episodes = rollout(agent)
        turns = [turn for one in episodes for turn in one.turns]
        advantage = group_advantages(agent.rows(episodes), agent.config.gamma, agent.config).float()
        terms = [agent.terms([turn])[0] for turn in turns]
        count = sum(len(x) for x in terms)
        loss = -sum((a * x).sum() for a, x in zip(advantage, terms, strict=True)) / count
        wanted = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, agent.model.trained)])
        before = agent.model.flat.clone()
        metrics = agent.update(episodes).metrics
        moved = (before - agent.model.flat) / agent.config.learning_rate
        assert torch.allclose(moved, wanted, atol=2e-2 * float(wanted.abs().max()))
        assert float(metrics["approx_kl"]) == 0.0 and float(metrics["clip_fraction"]) == 0.0
        assert agent.clock.updates == 1 and not agent.guard.first_bad()
        found.append(moved)
    assert torch.allclose(found[0], found[1], atol=2e-2 * float(found[0].abs().max()))


def scoring(**options: Any) -> GiGPOLLM:
    """Return an agent that chooses among the actions."""
    plain = make_agent()
    small = {name: value for name, value in AGENTS["gigpo_llm"].options.items() if "warm" not in name}
    del small["max_tokens"]
    own = over({**small, "answers": "score", "words": plain.config.words}, options)
    return GiGPOLLM(plain.spec, build(GiGPOLLMConfig, own))


@pytest.mark.parametrize(
    ("aggregation", "wanted"),
    [
        ("token-mean", [1 / 6] * 6),
        ("seq-mean-token-mean", [1 / 4] * 2 + [1 / 8] * 4),
        ("seq-mean-token-sum", [1 / 2] * 6),
    ],
)
def test_what_tokens_count(aggregation: str, wanted: list[float]) -> None:
    agent = make_agent(aggregation=aggregation)
    seen = Corridor().begin(0)
    turns = []
    for tokens in ([3, 4], [3, 4, 5, 6]):
        said = demonstrated(agent.model, agent.config, seen, [], "go east")._replace(tokens=tokens)
        turns.append(TextTurn(seen, said))
    ((part, weight),) = agent._micro_batches([1, 0], turns)
    assert part == [0, 1] and weight.tolist() == pytest.approx(wanted)


def test_several_minibatches_are_compared_with_what_was_before_the_first() -> None:
    agent = make_agent(epochs=2, batch_size=4, learning_rate=0.01, optimiser={"name": "sgd"})
    metrics = agent.update(rollout(agent)).metrics
    assert float(metrics["approx_kl"]) > 0.0 and agent.clock.updates > 2
    assert float(metrics["reference_kl"]) > 0.0


def test_what_was_sampled_is_what_is_learnt_from() -> None:
    agent = make_agent(temperature=0.6)
    turns = [turn for one in rollout(agent) for turn in one.turns]
    noted = torch.tensor([x for turn in turns for x in turn.answer.log_prob])
    assert torch.allclose(agent.log_probs(turns), noted, atol=1e-5)


def test_an_invalid_answer_is_paid_for_in_the_reward_or_by_itself_alone() -> None:
    for penalty in ("reward", "local"):
        agent = make_agent(penalty=penalty, invalid_penalty=0.5)
        episodes = rollout(agent)
        bad = episodes[0].turns[0].answer._replace(valid=False)
        good = [turn._replace(answer=turn.answer._replace(valid=True)) for turn in episodes[0].turns]
        episodes = [episodes[0]._replace(turns=[good[0]._replace(answer=bad), *good[1:]])]
        rows, rewards = agent.rows(episodes), [turn.reward for turn in good]
        charge = [0.5] + [0.0] * (len(good) - 1)
        if penalty == "local":
            assert rows.penalty is not None and rows.penalty.tolist() == charge and rows.reward.tolist() == rewards
        else:
            assert rows.penalty is None
            assert rows.reward.tolist() == [r - x for r, x in zip(rewards, charge, strict=True)]


def test_what_counts_as_the_same_state(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlopt.agents import anchors

    monkeypatch.setattr(anchors, "KEYS", dict(anchors.KEYS))
    register_anchor("first letter", lambda seen, info, past: (seen[0], len(past)))
    shown = [("a cat", "s1", ("x",)), ("a dog", "s1", ("x",)), ("a cat", "s2", ("y",)), ("a cat", "s1", ("x",))]
    agent = make_agent()
    answers = demonstrated(agent.model, agent.config, Corridor().begin(0), [], "go east")
    turns = [TextTurn(Seen(text, "", state, offered), answers, 1.0, state) for text, state, offered in shown]
    episodes = [TextEpisode(0, "", 0, turns[:2], True, True), TextEpisode(0, "", 0, turns[2:], True, True)]

    def same(**options: Any) -> list[int]:
        return make_agent(**options).rows(episodes).anchors[0].tolist()

    assert same() == [0, 1, 0, 0]
    assert same(anchor="state") == same(anchor="exact") == [0, 0, 1, 0]
    assert same(anchor="admissible") == [0, 1, 2, 0]
    assert same(anchor="first letter") == [0, 1, 0, 1]
    assert same(similarity=0.3) == [0, 0, 0, 0] and same(similarity=0.9) == [0, 1, 0, 0]
    assert same(anchor_history=1) == [0, 1, 0, 2]
    assert make_agent(estimator="grpo").rows(episodes).anchors == ()
    # The two true states that show "a cat" are told apart where the game tells them, and counted.
    assert float(group_metrics(agent.rows(episodes), 0.95)["aliasing"]) == 0.75
    untold = [one._replace(turns=[turn._replace(exact=None) for turn in one.turns]) for one in episodes]
    assert "aliasing" not in group_metrics(agent.rows(untold), 0.95)


# Demonstrations


def test_demonstrations_are_learnt_by_heart() -> None:
    agent = make_agent(warm_epochs=30, warm_learning_rate=0.01, kl_coefficient=0.1)
    game, draw = Corridor(), numpy_generator(0)
    shown = [demonstration(game, task, agent.model, agent.config, 0.0, draw) for task in (0, 1)]
    assert all(one.success and one.complete for one in shown)
    turns = shown[0].turns
    agent.imitate(turns)
    assert float(agent.log_probs(turns).min()) > math.log(0.8)
    agent.end_warm_start()
    assert float(agent.optimiser.count) == 0.0 and agent.rate() == 1.0
    assert agent.reference is not None and torch.equal(agent.reference, agent.model.flat)
    policy = agent.policy
    seen, past = game.begin(0), list[Past]()
    for _ in range(3):
        said = policy.answer(seen, past, deterministic=True)
        past.append(Past(seen.text, said.action))
        seen = game.act(said.action).seen
    assert [step.action for step in past] == ["go west", "go west", "take coin"]


def test_noise_changes_what_is_taught_not_what_is_done() -> None:
    agent = make_agent()
    shown = demonstration(Corridor(), 0, agent.model, agent.config, 1.0, numpy_generator(0))
    assert shown.success and all(turn.answer.action != "go west" for turn in shown.turns[:2])


# Runs


@pytest.mark.parametrize("at", [1, 4])  # in the middle of the demonstrations, and of learning from rewards
def test_a_run_goes_on_exactly(at: int) -> None:
    def after(loop: TextLoop, advances: int) -> Any:
        for _ in range(advances):
            loop.advance()
        return loop.state_dict()

    first, second = (make_loop(run(epochs=2)) for _ in range(2))
    state = after(first, at)
    assert bool(state["agent"]["warming"]) == (at == 1)
    second.load_state_dict(state)
    assert states_equal(after(second, 5 - at), after(first, 5 - at)) is None
    for loop in (first, second):
        loop.close()


def test_workers_change_nothing() -> None:
    loops = [make_loop(short_run("gigpo_llm", env={"backend": backend})) for backend in ("sync", "async")]
    for _ in range(4):
        for loop in loops:
            loop.advance()
    assert states_equal(*(loop.state_dict() for loop in loops)) is None
    for loop in loops:
        loop.close()


def test_a_run_tells_what_was_seen_said_and_paid_and_evaluates_the_same_again(tmp_path: Path) -> None:
    said: list[str] = []
    with log_shown(said.append), begin(short_run("gigpo_llm", tmp_path / "run", total_steps=120)) as trainer:
        result = trainer.run()
    assert re.match(
        r"tiny-qwen2: [\d,]+ parameters, .* memory 0 MiB besides what a batch needs, a checkpoint 0 MiB", said[0]
    )
    assert re.fullmatch(r"after 2 rounds of demonstrations \d+ % are solved", said[1])
    told = [json.loads(line) for line in (tmp_path / "run" / "trajectories.jsonl").read_text().splitlines()]
    assert [line["step"] for line in told] == sorted(line["step"] for line in told)
    assert {line["phase"] for line in told} == {"look", "rollout"} and {line["group"] for line in told} == {0}
    assert all(line["goal"].startswith("Find the coin") and len(line["turns"]) <= 6 for line in told)
    turn = told[-1]["turns"][0]
    assert set(turn) == {"seen", "said", "did", "valid", "possible", "paid"} and turn["seen"].startswith("You are")
    again = evaluate_path(tmp_path / "run", episodes=2)
    assert [e._asdict() for e in again.episodes] == [e._asdict() for e in result.evaluation]
    assert {"success", "success/west"} <= again.episodes[0].facts.keys()
    with resume(tmp_path / "run", {"total_steps": 150}) as trainer:
        trainer.run()
    more = [json.loads(line) for line in (tmp_path / "run" / "trajectories.jsonl").read_text().splitlines()]
    assert more[: len(told)] == told and len(more) > len(told)


def test_policies_are_saved_and_loaded(tmp_path: Path) -> None:
    agent = make_agent()
    save_policy(agent.policy, tmp_path / "p", {"step": 3})
    policy, seen = load_policy(tmp_path / "p"), Corridor().begin(0)
    assert isinstance(policy, LanguagePolicy) and policy.meta == {"step": 3} and policy.config.prompt == "short"
    draws = [torch.Generator().manual_seed(0) for _ in range(2)]
    mine, other = (p.answer(seen, generator=g) for p, g in zip((agent.policy, policy), draws, strict=True))
    assert mine.tokens == other.tokens
    with pytest.raises(RloptError, match="acts on words"):
        policy.act(torch.zeros(1, 2))
    assert policy.to("cpu").answer(seen, deterministic=True)[1] == policy.answer(seen, deterministic=True)[1]
    (tmp_path / "p" / "model" / "config.json").write_text("{}")
    with pytest.raises(RloptError, match=r"config\.json is not the file that was saved"):
        load_policy(tmp_path / "p")


def test_agents_are_saved_and_loaded(tmp_path: Path) -> None:
    agent = make_agent()
    agent.update(rollout(agent))
    agent.save(tmp_path / "agent")
    again = Agent.load(tmp_path / "agent")
    assert states_equal(again.state_dict(), agent.state_dict()) is None
    episodes = rollout(agent)
    for one in (agent, again):
        one.update(episodes)
    assert states_equal(again.state_dict(), agent.state_dict()) is None


def test_adapters_are_not_put_on_another_model() -> None:
    pytest.importorskip("peft")
    agent, state = make_agent(lora=2), make_agent(lora=2).state_dict()
    agent.load_state_dict(state)
    assert agent.model.flat.numel() == state["weights"].numel() < 5_000
    state["base"] = state["base"] + 1
    with pytest.raises(RloptError, match="no longer the model that these adapters belong to"):
        agent.load_state_dict(state)


def test_choices_by_score_learn_too() -> None:
    agent = scoring(learning_rate=0.01)
    episodes = rollout(agent)
    assert all(
        turn.answer.valid and turn.answer.action in turn.seen.admissible for one in episodes for turn in one.turns
    )
    before = agent.model.flat.clone()
    agent.update(episodes)
    assert not torch.equal(agent.model.flat, before) and agent.guard.first_bad() is None


def test_groups_without_a_difference_are_replaced() -> None:
    loop = make_loop(run(resample=2, warm_start=0, warm_success=None, warm_every=5))
    assert isinstance(loop, TextLoop)
    episodes, played = loop._collect_differing()  # nobody solves anything: three rollouts in vain
    assert loop.iteration == 3 and len(played) == 12 and len(episodes) == 4
    loop.close()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"agent": {"estimator": "ppo"}}, "have no critic here"),
        ({"agent": {"noise": "independent"}}, "draw nothing after their beginning"),
        ({"agent": {"similarity": 0.9, "anchor": "state"}}, "compares observations alone"),
        ({"agent": {"warm_start": 0}}, "are of demonstrations; give agent.warm_start"),
        ({"agent": {"max_prompt": 5_000}}, "more than tiny-qwen2 reads"),
        ({"agent": {"model": "/nowhere", "layers": 2, "width": 64}}, "there is no folder or GGUF file"),
        ({"env": {"id": "CartPole-v1"}}, "is no text game"),
        ({"env": {"normalize_obs": True}}, "has no such option"),
        ({"env": {"facts": ["speed"]}}, "tells success, success/west, success/east, and not speed"),
        ({"env": {"backend": "torch"}}, "are played in this process"),
        ({"env": {"timeout": 5.0}}, "is of workers; leave it out, or give env.backend=async"),
        ({"eval": {"epsilon": 0.1, "episodes": 2}}, "takes no random actions"),
        ({"num_envs": 3}, "has no such mode"),
    ],
)
def test_mistakes(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RloptError, match=said) as told:
        make_loop(short_run("gigpo_llm", **options))
    assert "\n" not in str(told.value)
