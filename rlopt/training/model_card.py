"""The card of a policy on a model hub: what it is, what it scores, how it was trained, and how it is loaded."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rlopt.analysis.plots import format_steps
from rlopt.analysis.run_results import EvaluationCurve, evaluations, flatten
from rlopt.config import plain
from rlopt.errors import RloptError
from rlopt.hub import FOLDER, Address
from rlopt.policy import Policy
from rlopt.training import presets
from rlopt.training.config_files import config_dirs, group_files
from rlopt.training.evaluate import Evaluation
from rlopt.training.setup import resolve_config
from rlopt.version import __version__, install

ROWS = 10
"""Evaluations of the training that are tabled."""
_OF_THE_MACHINE = ("run_dir", "resume", "device", "threads", "log.", "checkpoint.", "buffer.device", "buffer.folder")


@dataclass(frozen=True)
class Card:
    """What a card tells of."""

    address: Address
    policies: Sequence[Policy]
    evaluations: Sequence[Evaluation]
    """One for each policy, or none."""
    given_seed: int | None
    """The seed of their episodes, None where it is each policy's own."""
    run: Path | None
    """The folder with what is told of the run."""
    settings: Mapping[str, Any]
    """The run's configuration; empty without one."""
    curve: bool
    film: str | None


def model_card(card: Card) -> str:
    """Return the card as Markdown below metadata in YAML."""
    meta = card.policies[0].meta
    agent, env_id = str(meta.get("agent", "policy")), _env_id(card)
    step = meta.get("step")
    trained = f", after {format_steps(step)} steps" if isinstance(step, int) else ""
    parts = [
        f"---\n{yaml.safe_dump(_metadata(card, agent, env_id), sort_keys=False, allow_unicode=True)}---\n",
        f"# {agent} on {env_id}\n\nA policy of rlopt {__version__}{trained}.\n",
        _score(card),
        _use(card),
        f"## Film\n\n[The first episode]({card.film})\n" if card.film else "",
        _training(card),
        _versions(card),
    ]
    return "\n".join(part for part in parts if part)


def training_command(settings: Mapping[str, Any]) -> str | None:
    """Return the shortest command that gives a run's ``settings``, apart from what is of its machine: its experiment
    or its agent, environment and buffer, and the options that differ from theirs. None where rlopt no longer knows
    them."""
    own = flatten(dict(settings))
    name = own.get("experiment")
    if isinstance(name, str) and name in group_files("experiment", config_dirs()):
        words = {"experiment": name}
    else:
        named = {"agent": own.get("agent.name"), "env": own.get("env.id"), "buffer": own.get("buffer.name")}
        words = {group: word for group, word in named.items() if isinstance(word, str)}
    try:
        usual = flatten(plain(resolve_config(presets.train_config({**words, "device": "cpu"}))))
    except RloptError:
        return None
    differ = {
        key: value
        for key, value in own.items()
        if usual.get(key) != value and key != "experiment" and not key.startswith(_OF_THE_MACHINE)
    }
    options = [f"{key}={_written(value)}" for key, value in {**words, **differ}.items()]
    return shlex.join(["rlopt", "train", *options])


def _written(value: Any) -> str:
    """Return a value in the grammar of command lines."""
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_written(inner)}" for key, inner in value.items()) + "}"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        try:
            (read,) = presets.parse([f"x={value}"])
            if read.value() == value:
                return value
        except RloptError:
            pass
        return presets.quote(value)
    return repr(value)


def _env_id(card: Card) -> str:
    return card.evaluations[0].env_id if card.evaluations else card.policies[0].spec.id


def _metadata(card: Card, agent: str, env_id: str) -> dict[str, Any]:
    """Return what hubs read, in the words that Stable-Baselines3's models have and users search for."""
    tags = ["reinforcement-learning", "deep-reinforcement-learning", "rlopt", agent, env_id]
    found: dict[str, Any] = {"library_name": "rlopt", "pipeline_tag": "reinforcement-learning", "tags": tags}
    if card.evaluations:
        mean, spread = _overall(card)
        metrics = [{"type": "mean_reward", "name": "mean_reward", "value": f"{mean:.2f} +/- {spread:.2f}"}]
        for name in card.evaluations[0].facts:
            value = float(np.mean([e.facts[name] for e in card.evaluations if name in e.facts]))
            metrics.append({"type": name, "name": name, "value": f"{value:.4g}"})
        task = {"type": "reinforcement-learning", "name": "reinforcement-learning"}
        data = {"type": env_id.replace("/", "-"), "name": env_id}
        found["model-index"] = [{"name": agent, "results": [{"task": task, "dataset": data, "metrics": metrics}]}]
    return found


def _overall(card: Card) -> tuple[float, float]:
    """Return the mean return, and the standard deviation over episodes, or over the means of several policies."""
    means = [evaluation.mean for evaluation in card.evaluations]
    if len(means) > 1:
        return float(np.mean(means)), float(np.std(means, ddof=1))
    only = card.evaluations[0]
    return only.mean, 0.0 if len(only.episodes) < 2 else only.std


def _score(card: Card) -> str:
    if not card.evaluations:
        return "It was pushed without an evaluation.\n"
    facts = list(card.evaluations[0].facts)
    head = ["policy", "mean return", "95 % interval", "sd", "lowest", "highest", "episodes", *facts]
    rows = []
    for i, (policy, found) in enumerate(zip(card.policies, card.evaluations, strict=True)):
        name = f"run{i}, seed" if len(card.policies) > 1 else "seed"
        low, high = found.interval
        spread = ["", ""] if len(found.episodes) < 2 else [f"{low:.2f} to {high:.2f}", f"{found.std:.2f}"]
        ends = [f"{found.min:.2f}", f"{found.max:.2f}", str(len(found.episodes))]
        told = [f"{found.facts[fact]:.4g}" if fact in found.facts else "" for fact in facts]
        rows.append([f"{name} {policy.meta.get('seed')}", f"{found.mean:.2f}", *spread, *ends, *told])
    words = ["rlopt", "evaluate", str(card.address), "--episodes", str(len(card.evaluations[0].episodes))]
    how = "Episodes have seeds of their own, apart from those of training."
    if card.given_seed is not None:
        words += ["--seed", str(card.given_seed)]
        how = "The policy was chosen by its evaluations in training; this score is from episodes of other seeds."
    return (
        f"## Score\n\n{_table(head, rows)}\n{how} Each episode is in `evaluation.json`. Again:\n\n"
        f"```bash\n{shlex.join(words)}\n```\n"
    )


def _use(card: Card) -> str:
    several = len(card.policies) > 1
    address = str(card.address._replace(folder=f"{FOLDER}/run0") if several else card.address)
    begin, call = "", "action = policy(obs)  # obs as the environment gives it, one or a batch"
    if card.policies[0].recurrent:
        begin, call = "carry = policy.initial_carry()\n", "action, carry = policy(obs, carry)"
    return (
        f"## Use\n\nNeeds rlopt with its extra `hub` ({install('hub')}).\n\n"
        f"```python\nimport rlopt\n\npolicy = rlopt.load_policy({json.dumps(address)})\n{begin}{call}\n```\n\n"
        "Loading runs no code: weights are safetensors, everything else is JSON.\n"
    )  # fmt: skip


def _training(card: Card) -> str:
    if card.run is None:
        return ""
    command = training_command(card.settings)
    parts = ["## Training\n"]
    if command is not None:
        parts.append(f"```bash\n{command}\n```\n")
    parts.append("All options are in `run/config.yaml`, all evaluations in `run/evaluations.csv`.\n")
    if card.curve:
        parts.append("![learning curve](curve.png)\n")
    seed = card.settings.get("seed")
    curves = evaluations(card.run, seed if isinstance(seed, int) else 0)
    if curves:
        parts.append(_learning(curves))
    return "\n".join(parts)


def _learning(curves: Sequence[EvaluationCurve]) -> str:
    steps = curves[0].steps
    kept = sorted({round(i) for i in np.linspace(0, len(steps) - 1, min(ROWS, len(steps)))})
    head = ["step", *(f"return, seed {curve.seed}" for curve in curves)]
    by_step = [dict(zip(curve.steps, curve.means, strict=True)) for curve in curves]
    rows = [
        [format_steps(steps[i]), *(f"{found[steps[i]]:.1f}" if steps[i] in found else "" for found in by_step)]
        for i in kept
    ]
    return _table(head, rows)


def _versions(card: Card) -> str:
    path = None if card.run is None else card.run / "versions.json"
    try:
        found = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    if not found or not isinstance(found, dict):
        return ""
    return f"## Versions\n\n{_table(['', 'trained with'], [[str(k), str(v)] for k, v in found.items()])}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)
