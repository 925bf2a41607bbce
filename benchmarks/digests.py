"""Digests of one short run of every agent: proof that a change of the code left every number as it was.

    python benchmarks/digests.py --checkout ../before --out before.json
    python benchmarks/digests.py --checkout . --out after.json --only sac,drpg
    python benchmarks/digests.py --compare before.json after.json

Each case is a training by the command line of a checkout, in a process of its own; nothing of the package is imported.
Digested are the run folder's tensors (the newest checkpoint with its replay segments, the best agent, the policies),
the numbers in the checkpoint's ``state.json``, and the tables without their wall-clock columns and without the
evaluation of the untrained policy, which older checkouts did not make. Tensors and numbers are
compared as multisets of values: what they are called does not matter, and what is new (``+``) is no difference. Both
sides belong on one machine, since another processor may round otherwise. Needs the extras ``mujoco`` and ``atari``.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CLOCK = {"steps_per_second", "env_seconds", "learn_seconds"}
"""Columns that no two runs share."""
TABLES = ("metrics.csv", "episodes.csv", "evaluations.csv")
LIMIT = 900
"""Seconds that one case may take."""

RUN = "seed=3 threads=1 device=cpu log.tensorboard=false checkpoint.minutes=null"
ACT = "total_steps=300 log.every=70 eval.every=150 eval.episodes=2"
SMALL = f"{ACT} agent.network.hidden=[16,16] agent.batch_size=8 agent.warmup_steps=40"
SAC = f"agent=sac env=Pendulum-v1 {SMALL}"
HOPPER = f"agent=sac env=Hopper-v5 env.kwargs.max_episode_steps=70 {SMALL} num_envs=3"
DISCRETE = f"agent=sac_discrete env=CartPole-v1 {SMALL}"
TEAM = f"env=rlopt.envs.counting:rlopt/CountTeam-v0 env.kwargs.length=4 {SMALL}"
Q = f"env=CartPole-v1 {SMALL} agent.epsilon_steps=100 agent.target_every=60"
SCREEN = (
    "env.kwargs={frameskip:1,max_episode_steps:30} buffer.capacity=60 buffer.frame_stack=4 "
    "env.wrappers=[{class:AtariPreprocessing,kwargs:{noop_max:0}},{class:FrameStackObservation,kwargs:{stack_size:4}}] "
    "agent.update_ratio=[1,4] total_steps=90"
)
PPO = f"agent=ppo {ACT} agent.network.hidden=[16] agent.rollout_steps=32 agent.batch_size=16 agent.epochs=2"
TEAM_PPO = PPO.removeprefix("agent=ppo ") + " env=rlopt.envs.counting:rlopt/CountTeam-v0 env.kwargs.length=4"
REINFORCE = f"agent=reinforce {ACT} agent.network.hidden=[16] agent.groups=2 agent.group_size=2"
GIGPO = "agent=gigpo agent.network.hidden=[] agent.groups=2 agent.group_size=4 agent.batch_size=16"
DEEP = f"{SMALL} num_envs=4 env.backend=torch"
SEARCH = "agent.adversary_every=60 agent.bag=3 agent.search={candidates:5,episodes:2,rounds:2}"
BOX = "agent.box={m:[0.5,1.5],l:[0.5,1.5]}"
GARNET = "env=garnet total_steps=30 env.kwargs.states=6 env.kwargs.actions=4 env.kwargs.branching=3"
SA, S = f"{GARNET} env.kwargs.instances=3", f"{GARNET} env.kwargs.rectangular=s"

CASES = {
    "sac": SAC,
    "sac-eager": f"{SAC} agent.fused=false",
    "sac-tanh": f"{SAC} agent.network.activation=tanh",
    "sac-wide": f"{SAC} agent.network.hidden=[64,64] agent.batch_size=64",
    "sac-two-threads": f"{SAC} agent.network.hidden=[64,64] agent.batch_size=64 threads=2",
    "sac-ring": f"{SAC} buffer.capacity=70",
    "sac-disk": f"{SAC} buffer.capacity=150 buffer.device=disk",
    "sac-distinct": f"{SAC} buffer=distinct",
    "sac-reshuffled": f"{SAC} buffer=reshuffled buffer.capacity=150 num_envs=3",
    "sac-prioritized": f"{SAC} buffer=prioritized buffer.capacity=150 buffer.anneal_draws=400",
    "sac-lap": f"{SAC} buffer=lap",
    "sac-pal": f"{SAC} agent.td_loss=pal",
    "sac-prioritized-reshuffled": f"{SAC} buffer=prioritized_reshuffled buffer.capacity=150 buffer.beta=0.4 num_envs=3",
    "sac-n-step": f"{SAC} agent.n_step=3",
    "sac-n-step-eager": f"{SAC} agent.n_step=3 agent.fused=false num_envs=3",
    "sac-sync": f"{SAC} num_envs=3 env.backend=sync",
    "sac-async": f"{SAC} num_envs=3 env.backend=async",
    "sac-torch": f"{SAC} num_envs=3 env.backend=torch agent.update_ratio=[1,4]",
    "sac-native": f"{HOPPER} env.backend=native",
    "sac-runs": f"{SAC} num_runs=2",
    "sac-runs-clipped": f"{SAC} num_runs=2 num_envs=2 agent.max_grad_norm=1.0 buffer=prioritized_reshuffled",
    "sac-overlap": f"{SAC} overlap=true num_envs=2",
    "sac-bf16": f"{SAC} precision=bf16 agent.network.hidden=[32,32]",
    "sac-bf16-eager": f"{SAC} precision=bf16 agent.network.hidden=[32,32] agent.fused=false",
    "sac-normalized": f"{HOPPER} env.normalize_obs=true env.normalize_reward=true agent.update_ratio=[2,5]",
    "sac-policy-delay": f"{SAC} agent.policy_delay=2",
    "sac-linear-schedule": f"{SAC} agent.lr_schedule=linear agent.final_learning_rate=0.1",
    "sac-cosine-schedule": f"{SAC} agent.lr_schedule=cosine agent.schedule_steps=200",
    "sac-adamw": f"{SAC} agent.optimiser.name=adamw agent.optimiser.weight_decay=0.01",
    "sac-sgd": f"{SAC} agent.optimiser.name=sgd",
    "sac-clipped": f"{SAC} agent.max_grad_norm=0.5",
    "sac-clipped-eager": f"{SAC} agent.max_grad_norm=0.5 agent.fused=false",
    "sac-fixed-temperature": f"{SAC} agent.temperature=0.2",
    "sac-images": f"agent=sac env=ALE/Breakout-v5 {SMALL} {SCREEN} env.kwargs.continuous=true",
    "sac-2018": f"agent=sac_2018 env=Pendulum-v1 {SMALL}",
    "sac-2018-n-step": f"agent=sac_2018 env=Pendulum-v1 {SMALL} agent.n_step=3 num_envs=2 buffer=prioritized",
    "sac-discrete": DISCRETE,
    "sac-discrete-average": f"{DISCRETE} agent.average_critics=true agent.critic_entropy=false buffer=reshuffled",
    "sac-discrete-runs": f"{DISCRETE} num_runs=2 num_envs=2",
    "sac-discrete-gru": (
        f"{DISCRETE} agent.network.memory=gru buffer=prioritized buffer.sequence_length=6 buffer.burn_in=2 num_envs=2"
    ),
    "sac-discrete-images": f"agent=sac_discrete env=ALE/Breakout-v5 {SMALL} {SCREEN}",
    "hasac": f"agent=hasac {TEAM} env.kwargs.actions=box",
    "masac": f"agent=masac {TEAM} env.kwargs.actions=heads agent.expectation=exact",
    "isac": f"agent=isac {TEAM}",
    "iql": f"agent=iql {TEAM} env.kwargs.actions=discrete",
    "vdn": f"agent=vdn {TEAM} env.kwargs.actions=discrete",
    "qmix": f"agent=qmix {TEAM} env.kwargs.actions=discrete agent.mixing_units=4",
    "mansa": f"agent=mansa {TEAM} env.kwargs.actions=discrete agent.budget=3",
    "hatd3": f"agent=hatd3 {TEAM} env.kwargs.actions=box num_envs=2",
    "matd3": f"agent=matd3 {TEAM} env.kwargs.actions=box",
    "dqn": f"agent=dqn {Q}",
    "c51": f"agent=c51 {Q} agent.atoms=11 buffer=distinct",
    "ddqn-lap": f"agent=ddqn_lap {Q} agent.target_counts=env_steps num_runs=2",
    "qr-dqn": f"agent=qr_dqn {Q} agent.atoms=8 agent.double=true num_envs=2",
    "rainbow": f"agent=rainbow {Q} agent.atoms=11",
    "ippo": f"agent=ippo {TEAM_PPO} agent.share_parameters=true",
    "mappo": f"agent=mappo {TEAM_PPO} env.kwargs.actions=box",
    "happo": f"agent=happo {TEAM_PPO} env.kwargs.actions=heads",
    "td3": f"agent=td3 env=Pendulum-v1 {SMALL}",
    "ppo": f"{PPO} env=Pendulum-v1 num_envs=2",
    "ppo-discrete-normalized": f"{PPO} env=CartPole-v1 env.normalize_obs=true env.normalize_reward=true",
    "ppo-gru": f"{PPO} env=CartPole-v1 num_envs=2 agent.network.memory=gru agent.batch_size=32",
    "reinforce": f"{REINFORCE} env=CartPole-v1",
    "reinforce-box": f"{REINFORCE} env=Pendulum-v1 agent.horizon=40 agent.entropy_coefficient=0.01",
    "reinforce-whole-episodes": f"{REINFORCE} env=CartPole-v1 agent.credit=episode agent.max_grad_norm=0.5",
    "gigpo": f"{GIGPO} env=FrozenLake-v1",
    "drpg-deep": f"agent=drpg_deep env=Pendulum-v1 {DEEP} {SEARCH} {BOX}",
    "drpg-deep-uniform": f"agent=drpg_deep env=Pendulum-v1 {DEEP} {BOX} agent.adversary=uniform",
    "drpg-deep-nominal": f"agent=drpg_deep env=Pendulum-v1 {DEEP} {BOX} agent.adversary=nominal",
    "drpg-deep-discrete": f"agent=drpg_deep_discrete env=CartPole-v1 {DEEP} {SEARCH} agent.box={{length:[0.3,0.9]}}",
    "value-iteration": "agent=value_iteration env=FrozenLake-v1 total_steps=300 log.every=70 eval.every=150",
    "drpg": f"agent=drpg {SA}",
    "drpg-s": f"agent=drpg {S} agent.start=random agent.step_decay=10",
    "drpg-softmax": f"agent=drpg {SA} agent.parametrisation=softmax",
    "drpg-gradient": f"agent=drpg {S} agent.inner=gradient agent.inner_limit=50",
    "drpg-inventory": "agent=drpg env=inventory total_steps=10",
    "robust-value-iteration": f"agent=robust_value_iteration {SA}",
    "robust-value-iteration-grid": "agent=robust_value_iteration env=grid_world total_steps=50",
    "robust-modified-policy-iteration": f"agent=robust_modified_policy_iteration {S}",
    "robust-modified-policy-iteration-swim": "agent=robust_modified_policy_iteration env=river_swim total_steps=20",
    "partial-policy-iteration": f"agent=partial_policy_iteration {SA}",
    "partial-policy-iteration-s": f"agent=partial_policy_iteration {S}",
    "partial-policy-iteration-machine": "agent=partial_policy_iteration env=machine_replacement total_steps=20",
    "robust-mirror-descent": f"agent=robust_mirror_descent {SA}",
    "robust-mirror-descent-s": f"agent=robust_mirror_descent {S}",
    **{
        f"robust-value-iteration-{name}": f"agent=robust_value_iteration {GARNET} agent.ambiguity={name}"
        for name in ("l1", "state_l1", "linf", "kl", "chi2", "contamination")
    },
}
"""The options of each run, beside ``RUN``."""


def run_case(name: str, checkout: Path) -> dict[str, Any]:
    """Train the case in a temporary folder; its digest, or ``{"error": the last line of the output}``."""
    options = dict(option.split("=", 1) for option in f"{RUN} {CASES[name]}".split())  # the last of a key counts
    with tempfile.TemporaryDirectory(prefix="digests-") as folder:
        run = Path(folder) / "run"
        given = [f"{key}={value}" for key, value in options.items()]
        try:
            done = python(checkout, [str(checkout / "train.py"), *given, f"run_dir={run}"], Path(folder))
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {LIMIT} s"}
        output = (done.stdout + done.stderr).strip()
        return {"error": output.rpartition("\n")[2] or f"status {done.returncode}"} if done.returncode else digest(run)


def python(checkout: Path, arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a process that imports the package from ``checkout``."""
    variables = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=LIMIT, check=False,
    )  # fmt: skip


def digest(run: Path) -> dict[str, Any]:
    """Read a run folder: tables by column, hashes of tensors and one name of each, numbers by path."""
    newest = max((run / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    found: list[tuple[str, str]] = []
    for path in sorted(run.rglob("*.safetensors")):
        if path.parent == newest or not path.parent.name.startswith("step-"):
            found += [(value, f"{path.relative_to(run).parent}/{name}") for name, value in tensors(path)]
    return {
        "tables": {name: columns(run / name) for name in TABLES if (run / name).is_file()},
        "tensors": sorted(value for value, _ in found),
        "numbers": dict(numbers(json.loads((newest / "state.json").read_text(encoding="utf-8")))),
        "names": dict(sorted(found)),
    }


def tensors(path: Path) -> Iterator[tuple[str, str]]:
    """Yield name and SHA-256 (of type, shape and bytes) of every tensor in a safetensors file."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            head = f"{entry['dtype']} {entry['shape']} ".encode()
            yield name, hashlib.sha256(head + data[start + begin : start + end]).hexdigest()


def numbers(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield path and value of every number in a state, also of those written as digits.

    Left out are seconds, and the generators of spaces: nothing is drawn from them, and some begin with the system's
    entropy.
    """
    if isinstance(tree, dict | list):
        if isinstance(tree, dict) and tree.get("#") == "space":
            return
        for key, child in tree.items() if isinstance(tree, dict) else enumerate(tree):
            if key not in CLOCK:
                yield from numbers(child, f"{path}/{key}")
    elif isinstance(tree, int | float) or (isinstance(tree, str) and (tree.isdecimal() or path.endswith("/$float"))):
        yield path, tree


def columns(path: Path) -> dict[str, list[str]]:
    """Read the cells of a table by column, without the wall clock's, of what lies behind the first step."""
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    rows = [row for row in rows if row[header.index("step")] != "0"]
    return {name: [row[i] for row in rows] for i, name in enumerate(header) if name not in CLOCK}


def collect(checkout: Path, names: list[str], jobs: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run the named cases, ``jobs`` at a time, and yield each one's digest.

    Raises:
        SystemExit: the processes would import the package from elsewhere.
    """
    checkout = checkout.resolve()
    told = python(checkout, ["-c", "import rlopt; print(rlopt.__file__)"], checkout)
    if checkout not in Path(told.stdout.strip()).parents:
        raise SystemExit(f"rlopt would not be imported from {checkout}: {told.stdout}{told.stderr}")

    def one(name: str) -> dict[str, Any]:
        begin = time.monotonic()
        made = run_case(name, checkout)
        what = made.get("error") or f"{len(made['tensors'])} tensors, {len(made['numbers'])} numbers"
        print(f"{name:40} {time.monotonic() - begin:5.1f} s  {what}", file=sys.stderr, flush=True)
        return made

    with ThreadPoolExecutor(jobs) as pool:
        yield from zip(names, pool.map(one, names), strict=True)


def compare(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Print one line per case; whether all of ``before`` is in ``after``."""
    equal = True
    for name in {**before, **after}:
        if name not in before:
            lost, more = [], ["+ new case"]
        elif name not in after:
            lost, more = ["not run after"], []
        else:
            lost, more = difference(before[name], after[name])
            more = more if lost else ["equal", *more]
        equal = equal and not lost
        print(f"{name:40} {'; '.join([*lost, *more])}")
    return equal


def difference(before: dict[str, Any], after: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Find what of ``before`` is not in ``after`` any more, and what ``after`` has beside it."""
    for side, case in (("before", before), ("after", after)):
        if "error" in case:
            return [f"failed {side}: {case['error']}"], []
    lost, more = [], []
    for kind in ("tensors", "numbers"):
        own, other = (Counter(value for value, _ in labelled(case, kind)) for case in (before, after))
        if gone := own - other:
            names = list(dict.fromkeys(name for value, name in labelled(before, kind) if value in gone))
            dots = " …" if len(names) > 3 else ""
            lost.append(f"{gone.total()} of {own.total()} {kind} missing ({', '.join(names[:3])}{dots})")
        if new := other - own:
            more.append(f"+{new.total()} {kind}")
    for table in {**before["tables"], **after["tables"]}:
        old, new = (case["tables"].get(table, {}) for case in (before, after))
        lost += [f"{table}: {name} {parting(old[name], new.get(name))}" for name in old if old[name] != new.get(name)]
        more += [f"+{table}: {name}" for name in new if name not in old]
    return lost, more


def labelled(case: dict[str, Any], kind: str) -> list[tuple[str, str]]:
    """List the values to compare, as text, each with a name to tell it by."""
    if kind == "tensors":
        return [(value, case["names"][value]) for value in case[kind]]
    return [(repr(value), path) for path, value in case[kind].items()]


def parting(old: list[str], new: list[str] | None) -> str:
    """Say where two columns part."""
    if new is None:
        return "is gone"
    at = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), None)
    return f"({len(old)} → {len(new)} rows)" if at is None else f"(row {at}: {old[at]} → {new[at]})"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkout", type=Path, default=Path(__file__).parents[1], help="folder that holds train.py")
    parser.add_argument("--out", type=Path, help="JSON file for the digests")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"), help="two files of digests")
    parser.add_argument("--only", help="these cases, comma-separated, in place of all")
    parser.add_argument("--jobs", type=int, choices=(1, 2), default=2, help="runs side by side")
    given = parser.parse_args(arguments)
    names = given.only.split(",") if given.only else list(CASES)
    if given.compare:
        sides = [json.loads(path.read_text(encoding="utf-8")) for path in given.compare]
        if given.only:
            sides = [{name: side[name] for name in names if name in side} for side in sides]
        return 0 if compare(*sides) else 1
    if given.out is None:
        parser.error("give --out FILE.json, or --compare BEFORE.json AFTER.json")
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"no case is called {unknown[0]}; there are {', '.join(CASES)}")
    found: dict[str, dict[str, Any]] = {}
    for name, digest in collect(given.checkout, names, given.jobs):  # kept one by one: an interrupted hour is not lost
        found[name] = digest
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 1 if any("error" in case for case in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
