"""Random reshuffling put to its paper's own test: the samplers of each agent, game by game and over all games.

    python experiments/reshuffling.py --root runs/rr_minatar --out results/rr_minatar
    python experiments/reshuffling.py --root runs/rr_atari --out results/rr_atari --window 500000
    python experiments/reshuffling.py --evaluations results/rr_minatar/evaluations.csv --out again
    python experiments/reshuffling.py --counts results/rr_minatar

Reads what ``rlopt queue`` made of ``jobs/rr_minatar.yaml`` or ``jobs/rr_atari.yaml``, finished or not, and writes
``table.csv``, ``games.csv``, ``table.md``, ``evaluations.csv`` and a figure for each update ratio. Of each game and
update ratio the arms of one agent are compared at the last step at which all of their seeds were evaluated, by each
seed's mean over its evaluations in the window before; seeds are paired. A seed that is less than half as far as the
furthest one has only begun: it is left out until then, and told. With ``--evaluations``, seeds of which the root has no
run, or one that went less far, are taken from an ``evaluations.csv`` written before, so that a table can be made again,
or an arm added, without training the rest once more. Over games, those that are at one step: interquartile means of
normalised scores with intervals of a bootstrap stratified by game, the probability that a run beats one of the baseline
on the same game, and how often the sampler draws a transition in its life.

Scores are normalised so that random play is 0 and, on Atari, a human is 1; on MinAtar, which has no human scores, 1 is
the mean of DQN with uniform replay at one update per four steps, in these very runs.

``--counts`` needs no runs: it writes ``counts.csv``, how often each sampler really draws a transition in its life,
beside what is expected of it (a few seconds).
"""

from __future__ import annotations

import argparse
import functools
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from rlopt.analysis.curves import Curve, merge
from rlopt.analysis.plots import draw_panels, format_steps
from rlopt.analysis.run_results import EvaluationCurve, Run, load_run
from rlopt.analysis.statistics import (
    Array,
    bootstrap_interval,
    iqm,
    mean_interval,
    normalise,
    probability_of_improvement,
)
from rlopt.analysis.tables import read_csv, write_csv
from rlopt.buffers import (
    DistinctSampler,
    LAPSampler,
    PrioritizedReshuffledSampler,
    PrioritizedSampler,
    ReshuffledSampler,
    Sampler,
    UniformSampler,
)
from rlopt.envs.atari.scores import RANDOM_HUMAN, game_of
from rlopt.types import RloptError

BASELINES = ("uniform", "LAP")
"""Of C51 and DQN, of double DQN with LAP."""
MINATAR_RANDOM = {"Breakout": 0.38, "Asterix": 0.48, "SpaceInvaders": 3.97}
"""Mean score of random play: 1000 episodes, seeds 0 to 999, minatar 1.0.15 with its minimal actions (standard errors
0.02, 0.03 and 0.10)."""
REFERENCE = ("dqn", "uniform", "1 in 4")
RESAMPLES = 20_000

COLUMNS = ["agent", "updates", "environment", "sampler", "seed", "step", "return"]
"""Of ``evaluations.csv``."""

Setting = tuple[str, str, str]
"""Agent, update ratio, environment."""
Arms = dict[str, list[EvaluationCurve]]


def arm_of(run: Run) -> str:
    """Return what a run's sampler is called in the paper's tables."""
    name, stratified = str(run.config["buffer.name"]), bool(run.config.get("buffer.stratified", False))
    words = {
        "reshuffled": "RR-C", "lap": "LAP", "prioritized": "LAP, stratified" if stratified else "LAP",
        "prioritized_reshuffled": "RR-M, stratified" if stratified else "RR-M",
    }  # fmt: skip
    return words.get(name, name)


def game_in(environment: str) -> str:
    """Return ``Breakout`` of ``MinAtar/Breakout-v1``."""
    return environment.rpartition("/")[2].rpartition("-v")[0]


def trained(root: Path) -> dict[Setting, Arms]:
    """Return the evaluations of a queue's runs by setting and arm.

    Raises:
        RloptError: there is none, or two of one arm and seed.
    """
    found: dict[Setting, Arms] = {}
    for path in sorted(root.glob("*/seed*/config.yaml")):
        run = load_run(path.parent)
        if run.evaluations:
            updates, steps = run.config["agent.update_ratio"]
            arms = found.setdefault((run.agent, f"{updates} in {steps}", run.env_id), {})
            own = arms.setdefault(arm_of(run), [])
            if twice := {e.seed for e in own} & {e.seed for e in run.evaluations}:
                told = f"{root} has seed {min(twice)} of {run.agent} with {arm_of(run)} on {run.env_id} twice"
                raise RloptError(f"{told}; give {run.folder} a root of its own")
            own += run.evaluations
    if not found:
        raise RloptError(f"{root} has no run with an evaluation yet (looked for {root}/<name>/seed<seed>)")
    return found


def written(path: Path) -> dict[Setting, Arms]:
    """Return what ``summarise`` wrote as ``evaluations.csv``, by setting and arm.

    Raises:
        RloptError: the file is missing or another table.
    """
    table = read_csv(path)
    if [*table] != COLUMNS:
        raise RloptError(f"{path} is no evaluations.csv of this program, whose columns are {', '.join(COLUMNS)}")
    found: dict[Setting, Arms] = {}
    for agent, updates, environment, sampler, seed, step, mean in zip(*table.values(), strict=True):
        if not isinstance(seed, int) or not isinstance(step, int) or not isinstance(mean, int | float):
            raise RloptError(f"{path}: {seed}, {step}, {mean} is no seed, step and return; make the file again")
        if not re.fullmatch(r"\d+ in \d+", str(updates)):
            raise RloptError(f"{path}: {updates} is no update ratio such as 1 in 4; make the file again")
        own = found.setdefault((str(agent), str(updates), str(environment)), {}).setdefault(str(sampler), [])
        if not own or own[-1].seed != seed:
            own.append(EvaluationCurve(seed))
        if seed in [e.seed for e in own[:-1]] or own[-1].steps[-1:] >= [step]:
            raise RloptError(f"{path}: step {step} of {agent} with {sampler}, seed {seed}, is not in order, or twice")
        own[-1].steps.append(step)
        own[-1].returns.append([float(mean)])
    return found


def find(root: Path | None, evaluations: Path | None) -> tuple[dict[Setting, Arms], bool]:
    """Return the evaluations by setting and arm, the baseline first, and whether they are on MinAtar. Of a seed that
    both have, that which went further counts, the root's where they are level.

    Raises:
        RloptError: there is none, or there are some on MinAtar and some on Atari.
    """
    found = trained(root) if root is not None else {}
    for setting, arms in (written(evaluations) if evaluations is not None else {}).items():
        for name, known in arms.items():
            own = found.setdefault(setting, {}).setdefault(name, [])
            seeds = {e.seed: e for e in sorted((*known, *own), key=lambda e: e.steps[-1])}
            own[:] = [seeds[seed] for seed in sorted(seeds)]
    if not found:
        raise RloptError(f"{evaluations} has no row")
    minatar = {environment.lower().startswith("minatar/") for _, _, environment in found}
    if len(minatar) > 1:
        where = " and ".join(str(path) for path in (root, evaluations) if path is not None)
        raise RloptError(f"{where}: some of it is on MinAtar and some on Atari; summarise each by itself")
    order = sorted(found, key=lambda setting: (setting[0], int(setting[1].rpartition(" ")[2]), setting[2]))
    sorted_arms = {
        key: dict(sorted(found[key].items(), key=lambda item: (item[0] not in BASELINES, item[0]))) for key in order
    }
    return sorted_arms, minatar.pop()


def curve(name: str, game: str, seeds: Sequence[EvaluationCurve]) -> Curve:
    return merge(name, game, [(e.steps, e.means) for e in seeds])


def begun(arms: Arms) -> list[tuple[str, int]]:
    """Return arm and seed of what is less than half as far as the furthest, or not trained at all."""
    reached = [(name, e.seed, e.steps[-1]) for name, seeds in arms.items() for e in seeds]
    furthest = max(step for _, _, step in reached)
    return [(name, seed) for name, seed, step in reached if 2 * step < furthest or not step]


def finals(arms: Arms, game: str, window: int) -> tuple[int, dict[str, dict[int, float]]]:
    """Return the last step at which every seed of every arm was evaluated, and by arm each seed's mean in the window
    before it, without those that have only ``begun``.

    Raises:
        RloptError: there is no such step.
    """
    out = begun(arms)
    kept = {name: own for name, seeds in arms.items() if (own := [e for e in seeds if (name, e.seed) not in out])}
    shared = set.intersection(*({*e.steps} for own in kept.values() for e in own))
    if not shared - {0}:
        raise RloptError(f"the runs on {game} share no step of evaluation; let the queue go on")
    step = max(shared)
    scores: dict[str, dict[int, float]] = {}
    for name, own in kept.items():
        means = curve(name, game, own).window(step, window)
        assert means is not None
        scores[name] = dict(zip([e.seed for e in own], map(float, means), strict=True))
    return step, scores


def anchors(
    found: dict[Setting, tuple[int, dict[str, dict[int, float]]]], minatar: bool
) -> dict[str, tuple[float, float]]:
    """Return {environment: (score that is 0, score that is 1)}; those without are left out, and those whose reference
    is not as far as what is measured by it."""
    known: dict[str, tuple[float, float]] = {}
    furthest = {env: max(found[key][0] for key in found if key[2] == env) for _, _, env in found}
    for (agent, ratio, env), (step, scores) in found.items():
        game = game_in(env)
        if not minatar:
            if (atari := game_of(f"ALE/{game}-v5")) is not None:
                known[env] = RANDOM_HUMAN[atari]
        elif game in MINATAR_RANDOM and (agent, ratio) == (REFERENCE[0], REFERENCE[2]):
            own = scores.get(REFERENCE[1]) if step == furthest[env] else None
            if own and np.mean([*own.values()]) > MINATAR_RANDOM[game]:
                known[env] = MINATAR_RANDOM[game], float(np.mean([*own.values()]))
    return known


def summarise(root: Path | None, evaluations: Path | None, out: Path, window: int) -> str:
    """Write the results folder; return the table."""
    runs, minatar = find(root, evaluations)
    trained_on = {key: arms for key, arms in runs.items() if len(begun(arms)) < sum(map(len, arms.values()))}
    if not trained_on:
        raise RloptError(f"{root or evaluations} has only evaluations of untrained policies; let the queue go on")
    found = {setting: finals(arms, game_in(setting[2]), window) for setting, arms in trained_on.items()}
    scale = anchors(found, minatar)
    furthest: dict[tuple[str, str], int] = {}
    for (agent, ratio, _), (step, _) in found.items():
        furthest[agent, ratio] = max(step, furthest.get((agent, ratio), 0))
    head = ["agent", "updates", "game", "at", "sampler", "seeds", "score", "normalised", "paired difference",
            "P(better than the baseline)"]  # fmt: skip
    rows: list[list[object]] = []
    pooled: dict[tuple[str, str], dict[str, list[tuple[Array, Array, Array | None]]]] = {}
    for (agent, ratio, env), (step, scores) in found.items():
        game, base = game_in(env), next((name for name in scores if name in BASELINES), None)
        for name, own in scores.items():
            values = np.array([*own.values()])
            spread = values.std(ddof=1) if len(values) > 1 else math.nan
            row = [agent, ratio, game, format_steps(step), name, len(values), f"{values.mean():.1f} ± {spread:.1f}"]
            scaled = normalise(values, *scale[env]) if env in scale else np.full(len(values), math.nan)
            row.append(f"{scaled.mean():.2f}" if env in scale else "")
            against = None if base is None or name == base else np.array([*scores[base].values()])
            if base is None or against is None:
                row += ["", ""]
            else:
                gap = np.array([own[seed] - scores[base][seed] for seed in own if seed in scores[base]])
                row.append(f"{mean_interval(gap):+.2f}" if len(gap) else "")
                row.append(str(probability_of_improvement(values, against, resamples=RESAMPLES)))
            rows.append(row)
            if step == furthest[agent, ratio]:
                pooled.setdefault((agent, ratio), {}).setdefault(name, []).append((scaled, values, against))
    lines = [_line(head), "|---" * len(head) + "|", *map(_line, rows), ""]
    over = ["agent", "updates", "games", "sampler", "IQM of normalised scores", "P(better than the baseline)",
            "draws in a life", "their variance", "variance of drawn - expected"]  # fmt: skip
    lines += [_line(over), "|---" * len(over) + "|"]
    totals: list[list[object]] = []
    for (agent, ratio), arms in pooled.items():
        whole = max(map(len, arms.values()))
        for name, games in arms.items():
            scaled = [own for own, _, _ in games]  # of all of these games, or of none
            middle = (
                ""
                if len(games) < whole or np.isnan(np.concatenate(scaled)).any()
                else str(bootstrap_interval(scaled, iqm, resamples=RESAMPLES))
            )
            pairs = [(values, against) for _, values, against in games if against is not None]
            better = ""
            if len(pairs) == len(games):
                better = str(probability_of_improvement(*map(list, zip(*pairs, strict=True)), resamples=RESAMPLES))
            mean, variance, _, _, missed = uses(name, ratio)
            totals.append([agent, ratio, len(games), name, middle, better, mean, variance, missed])
    lines += [*map(_line, totals), "", _note(window, minatar)]
    for (agent, ratio, env), arms in runs.items():
        if out_of := begun(arms):
            names = ", ".join(f"{name} seed {seed}" for name, seed in out_of)
            lines.append(f"\nLeft out of {agent}, {ratio}, {game_in(env)}, as only begun: {names}.")
    for (agent, ratio, env), (step, _) in found.items():
        if step < (last := furthest[agent, ratio]):
            told = f"{game_in(env)}, at {format_steps(step)} of {format_steps(last)}"
            lines.append(f"\nNot among the games of {agent}, {ratio}: {told}.")
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "table.csv", head, rows)
    write_csv(out / "games.csv", over, totals)
    write_csv(
        out / "evaluations.csv",
        COLUMNS,
        [
            [*setting, name, e.seed, step, f"{mean:.10g}"]
            for setting, arms in runs.items()
            for name, seeds in arms.items()
            for e in seeds
            for step, mean in zip(e.steps, e.means, strict=True)
        ],
    )
    text = "\n".join(lines)
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    for ratio in dict.fromkeys(setting[1] for setting in runs):
        panels = {
            f"{agent}, {game_in(env)}": [curve(name, game_in(env), seeds) for name, seeds in arms.items()]
            for (agent, own, env), arms in runs.items()
            if own == ratio
        }
        draw_panels(panels, out / f"curves_{ratio.replace(' ', '')}.png", f"updates per step: {ratio}")
    return text


def _note(window: int, minatar: bool) -> str:
    one = "the mean of DQN with uniform replay at one update in four steps" if minatar else "a human"
    return (
        f"Score: each seed's mean over its evaluations in the {format_steps(window)} steps before, mean ± sd over"
        f" seeds. Normalised: 0 is random play, 1 {one}. Paired difference: to uniform, or LAP, with the same seed,"
        " mean and Student's 95 % interval. Other intervals: 95 %, of a bootstrap stratified by game. Draws in a life:"
        " how often a transition is drawn between being written and overwritten, by the sampler alone, on a full ring"
        " of 2,000 with minibatches of 32 (of"
        " priorities: α 0.6, floor 0.01, errors drawn from a log-normal distribution)."
    )


# ---- how often a transition is drawn


def count_uses(sampler: Sampler, per_step: float, capacity: int = 2_000, batch: int = 32, seed: int = 0) -> list[float]:
    """Return what a sampler does on a full ring: mean, variance, least and most of how often a transition is drawn
    between being written and overwritten, and the variance of that minus how often it should have been.

    ``per_step`` minibatches are drawn per transition written. Errors are those of a heavy-tailed distribution, the
    same for a slot whenever it is drawn.
    """
    g = torch.Generator().manual_seed(seed)
    sampler.bind(capacity, torch.device("cpu"), seed)
    drawn, wanted = torch.zeros(capacity, dtype=torch.float64), torch.zeros(capacity, dtype=torch.float64)
    masses = isinstance(sampler, PrioritizedSampler)
    mass = torch.ones(capacity, dtype=torch.float64)
    uses: list[float] = []
    gaps: list[float] = []
    owed, largest = 0.0, 1.0
    for step in range(6 * capacity):
        slot = step % capacity
        if step >= 3 * capacity:  # the first lives began while the ring was filling
            uses.append(float(drawn[slot]))
            gaps.append(float(drawn[slot] - wanted[slot]))
        drawn[slot] = wanted[slot] = 0.0
        mass[slot] = largest if masses else 1.0
        sampler.wrote(slot, 1, None)
        owed += per_step if step >= capacity else 0.0
        while owed >= 1.0:
            owed -= 1.0
            wanted += batch * mass / mass.sum()
            index, _ = sampler.sample(batch, capacity)
            drawn.index_add_(0, index, torch.ones(batch, dtype=torch.float64))
            if isinstance(sampler, PrioritizedSampler):
                error = torch.empty(batch).log_normal_(-3.0, 1.0, generator=g)
                sampler.update_priority(index, error)
                mass[index] = error.double().clamp(min=sampler.floor).add(sampler.epsilon).pow(sampler.alpha)
                largest = max(largest, float(mass[index].max()))
    values = np.array(uses)
    return [values.mean(), values.var(), values.min(), values.max(), float(np.var(gaps))]


SAMPLERS = {
    "uniform": UniformSampler,
    "distinct": DistinctSampler,
    "RR-C": ReshuffledSampler,
    "LAP": lambda: LAPSampler(0.6, 0.01),
    "LAP, stratified": lambda: PrioritizedSampler(0.6, 0.0, None, 0.0, 0.01, stratified=True),
    "RR-M": PrioritizedReshuffledSampler,
    "RR-M, stratified": lambda: PrioritizedReshuffledSampler(stratified=True),
}


@functools.cache
def uses(name: str, ratio: str) -> list[str]:
    """Return what ``count_uses`` says of a sampler, by its name in the paper's tables, at "1 in 4"."""
    updates, _, steps = ratio.split()
    make = SAMPLERS.get(name)
    return [""] * 5 if make is None else [f"{x:.2f}" for x in count_uses(make(), int(updates) / int(steps))]


def counts(out: Path) -> str:
    """Write ``counts.csv`` and return it as a table."""
    out.mkdir(parents=True, exist_ok=True)
    head = ["sampler", "draws per life", "mean", "variance", "least", "most", "variance of drawn - expected"]
    rows = [[name, 32 // every, *uses(name, f"1 in {every}")] for every in (4, 16) for name in SAMPLERS]
    write_csv(out / "counts.csv", head, rows)
    return "\n".join([_line(head), "|---" * len(head) + "|", *map(_line, rows)])


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Summarise the runs of rr_minatar or rr_atari.")
    parser.add_argument("--window", type=int, default=100_000, help="steps over whose evaluations scores are averaged")
    parser.add_argument("--root", type=Path, help="the queue's --root")
    parser.add_argument("--evaluations", type=Path, help="an earlier evaluations.csv, for arms that the root has not")
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--counts", type=Path, help="write counts.csv into this folder, and nothing else")
    given = parser.parse_args(arguments)
    try:
        if given.counts is not None:
            print(counts(given.counts))
            return 0
        if given.out is None or (given.root is None and given.evaluations is None):
            parser.error("--out with --root, --evaluations or both, or --counts")
        print(summarise(given.root, given.evaluations, given.out, given.window))
    except RloptError as e:
        print(e, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
