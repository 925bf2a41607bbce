"""Runs that differ in one word: curves, final returns, and how often one beats another.

    python experiments/compare_runs.py --root runs/sac_replay --out results/sac_replay
    python experiments/compare_runs.py --root runs/pendulum_replay --window 3000 --out results/sac_replay/pendulum
    python experiments/compare_runs.py --by precision --root runs/sac_precision --out results/sac_precision
    python experiments/compare_runs.py --by agent --root runs/teams_mpe --out results/teams_mpe
    python experiments/compare_runs.py --by optimiser --root runs/optimisers --window 3000 --out results/optimisers
    python experiments/compare_runs.py --redraw --by precision --out results/sac_precision

Reads what ``rlopt queue`` made of ``jobs/sac_replay.yaml`` and the like, finished or not. Runs of one task and one
update ratio that differ in their buffer (or precision, optimiser or agent) are compared at the last step at which all
of them were evaluated: every seed's mean over its evaluations in the window before. Writes
``evaluations.csv``, ``table.csv``, ``table.md`` and ``curves.png``, which ``--redraw`` draws anew from the first alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rlopt.analysis.curves import WINDOW, Curve, merge
from rlopt.analysis.plots import draw_panels, format_steps
from rlopt.analysis.run_results import Run, load_run
from rlopt.analysis.statistics import Array, bootstrap_interval, iqm, probability_of_improvement
from rlopt.analysis.tables import read_csv, write_csv
from rlopt.types import RloptError

WORDS = {
    "buffer": ("buffer.name", "uniform"),
    "precision": ("precision", "float32"),
    "overlap": ("overlap", "false"),
    "optimiser": ("agent.optimiser.name", "adam"),
    "agent": ("agent.name", "hasac"),
}
"""What may differ: the option, and the baseline. Agents are compared whatever their update ratios."""
RESAMPLES = 20_000
EACH_ITS_OWN = "each agent's own"

Setting = tuple[str, str]
"""Task and update ratio."""


def find(root: Path, option: str) -> dict[Setting, dict[str, list[Run]]]:
    """Runs with an evaluation by setting and value of ``option``, seeds in order.

    Raises:
        RloptError: there is none.
    """
    found: dict[Setting, dict[str, list[Run]]] = {}
    for path in sorted(root.glob("*/seed*/config.yaml")):
        run = load_run(path.parent)
        if run.evaluations:
            setting = run.env_id, EACH_ITS_OWN if option == "agent.name" else _ratio(run)
            found.setdefault(setting, {}).setdefault(_value(run, option), []).append(run)
    if not found:
        raise RloptError(f"{root} has no run with an evaluation yet (looked for {root}/<name>/seed<seed>)")
    for arms in found.values():
        for runs in arms.values():
            runs.sort(key=lambda run: int(run.config["seed"]))
    return found


def _ratio(run: Run) -> str:
    updates, steps = run.config["agent.update_ratio"]
    return f"{updates} update per {steps} steps" if steps > 1 else "1 update per step"


def _number(value: float, sign: str = "") -> str:
    """Return a return with so many decimals as its size lets one care for."""
    text = f"{value:{sign}.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 3}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _value(run: Run, option: str) -> str:
    """Return what a run has for ``option``; of an optimiser from elsewhere also whether it is cautious, which is no
    class of its own."""
    value = str(run.config[option]).lower().removeprefix("pytorch_optimizer:")
    cautious = option == "agent.optimiser.name" and run.config.get("agent.optimiser.kwargs.cautious")
    return f"cautious {value}" if cautious else value


def seeds(runs: Sequence[Run]) -> list[int]:
    return [e.seed for run in runs for e in run.evaluations]


def curve(name: str, env_id: str, runs: Sequence[Run]) -> Curve:
    return merge(name, env_id, [(e.steps, e.means) for run in runs for e in run.evaluations])


def finals(arms: dict[str, list[Run]], env_id: str, width: int) -> tuple[int, dict[str, Array]]:
    """The last step at which every seed of every buffer was evaluated, and each seed's window mean there.

    Raises:
        RloptError: there is none.
    """
    shared = set.intersection(*({*e.steps} for runs in arms.values() for run in runs for e in run.evaluations))
    if not shared:
        raise RloptError(f"the runs on {env_id} share no step of evaluation; let the queue go on")
    step = max(shared)
    scores = {name: curve(name, env_id, runs).window(step, width) for name, runs in arms.items()}
    return step, {name: s for name, s in scores.items() if s is not None}


def paired(arms: dict[str, list[Run]], scores: dict[str, Array], name: str, baseline: str) -> Array:
    """Differences to the baseline over the seeds that both have."""
    mine, base = (dict(zip(seeds(arms[n]), scores[n], strict=True)) for n in (name, baseline))
    return np.array([mine[s] - base[s] for s in mine if s in base])


def compare(root: Path, out: Path, word: str = "buffer", window: int = WINDOW) -> str:
    """Write the results folder; returns the table."""
    option, baseline = WORDS[word]
    found = find(root, option)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[list[object]] = []
    heads = ["task", "updates", "at", word, "seeds", "return", "paired difference", f"P(better than {baseline})"]
    text = [_line(heads), "|---" * len(heads) + "|"]
    pooled: dict[str, dict[str, list[tuple[Array, Array]]]] = {}
    for (env_id, ratio), arms in found.items():
        step, scores = finals(arms, env_id, window)
        for name, own in scores.items():
            against, difference = "", ""
            if name != baseline and baseline in scores:
                gap = paired(arms, scores, name, baseline)
                difference = _number(gap.mean(), "+") + (f" ± {_number(gap.std(ddof=1))}" if len(gap) > 1 else "")
                if min(len(own), len(scores[baseline])) > 1:  # of two runs nobody can tell
                    against = str(probability_of_improvement(own, scores[baseline], resamples=RESAMPLES))
                    pooled.setdefault(ratio, {}).setdefault(name, []).append((own, scores[baseline]))
            spread = own.std(ddof=1) if len(own) > 1 else float("nan")
            told = _number(own.mean()) + (f" ± {_number(spread)}" if len(own) > 1 else "")
            text.append(_line([env_id, ratio, format_steps(step), name, len(own), told, difference, against]))
            interval = [f"{x:.6g}" for x in bootstrap_interval(own, iqm, resamples=RESAMPLES)]
            rows.append([env_id, ratio, step, name, len(own), f"{own.mean():.6g}", f"{spread:.6g}", *interval])
            rows[-1] += [difference, against]
    text += [
        "",
        f"Return: mean over the evaluations of the {format_steps(window)} steps before, mean ± sd over seeds. Paired"
        f" difference: to {baseline}, same seed. P: the chance that a run beats one with {baseline}, with its"
        " 95 % bootstrap interval.",
        "",
    ]
    for ratio, arms_of in pooled.items():
        for name, pairs in arms_of.items():
            if len(pairs) < 2:
                continue
            p = probability_of_improvement([x for x, _ in pairs], [y for _, y in pairs], resamples=RESAMPLES)
            text.append(f"- {ratio}, {len(pairs)} tasks pooled: P({name} better than {baseline}) = {p}")
            rows.append([f"{len(pairs)} tasks", ratio, "", name, "", "", "", "", "", "", "", str(p)])
    head = ["env", "updates", "step", word, "seeds", "mean", "sd", "iqm", "low", "high", "paired difference",
            "probability of improvement"]  # fmt: skip
    write_csv(out / "table.csv", head, rows)
    write_csv(
        out / "evaluations.csv",
        ["env", "updates", word, "seed", "step", "return"],
        [
            [env_id, ratio, name, e.seed, step, f"{mean:.6g}"]
            for (env_id, ratio), arms in found.items()
            for name, runs in arms.items()
            for run in runs
            for e in run.evaluations
            for step, mean in zip(e.steps, e.means, strict=True)
        ],
    )
    (out / "table.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    panels = {
        _title(env_id, ratio): [curve(name, env_id, runs) for name, runs in arms.items()]
        for (env_id, ratio), arms in found.items()
    }
    draw_panels(panels, out / "curves.png")
    return "\n".join(text)


def redraw(out: Path, word: str = "buffer") -> None:
    """Draw ``curves.png`` anew from the ``evaluations.csv`` beside it.

    Raises:
        RloptError: there is none, or it compares something else.
    """
    table = read_csv(out / "evaluations.csv")
    if missing := {"env", "updates", word, "seed", "step", "return"} - {*table}:
        raise RloptError(f"{out / 'evaluations.csv'} has no column {', '.join(sorted(missing))}; name another --by")
    panels: dict[tuple[str, str], dict[str, dict[int, tuple[list[int], list[float]]]]] = {}
    columns = (table[name] for name in ("env", "updates", word, "seed", "step", "return"))
    for env_id, ratio, name, seed, step, mean in zip(*columns, strict=True):
        arms = panels.setdefault((str(env_id), str(ratio)), {})
        own = arms.setdefault(str(name), {}).setdefault(int(seed), ([], []))
        own[0].append(int(step))
        own[1].append(float(mean))
    drawn = {
        _title(env_id, ratio): [merge(name, env_id, list(of_seeds.values())) for name, of_seeds in arms.items()]
        for (env_id, ratio), arms in panels.items()
    }
    draw_panels(drawn, out / "curves.png")


def _title(env_id: str, ratio: str) -> str:
    return env_id if ratio == EACH_ITS_OWN else f"{env_id}, {ratio}"


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare runs that differ in one word.")
    parser.add_argument("--by", choices=WORDS, default="buffer", help="the word")
    parser.add_argument("--window", type=int, default=WINDOW, help="steps over whose evaluations returns are averaged")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--root", type=Path, help="the queue's --root")
    source.add_argument("--redraw", action="store_true", help="only draw curves.png anew, from OUT/evaluations.csv")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    given = parser.parse_args(arguments)
    try:
        if given.redraw:
            redraw(given.out, given.by)
            print(given.out / "curves.png")
            return 0
        print(compare(given.root, given.out, given.by, given.window))
    except RloptError as e:
        print(e, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
