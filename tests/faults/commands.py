"""Command lines with mistakes in them: each is answered in one line, with code 2, and none with a traceback."""

from __future__ import annotations

import contextlib
import io
import random
import signal
from collections.abc import Iterator
from pathlib import Path

from rlopt.cli import main
from rlopt.config import option_names
from rlopt.loops.configuration import TrainConfig
from tests.faults.outcomes import Outcome

VALUES = (
    "abc", "", "-1", "0", "1e999", "nan", "null", "true", "[]", "[1,x]", "{}", "{a: 1}", "1.5", "99999999999999999999",
    "'", '"', "$$", "${x}", "${oc.env:HOME}", "a=b", "[[[[", "!!python/name:os.system", "ä", "../..", "~",
)  # fmt: skip
WRONG = [
    ["frobnicate"], ["train", "frobnicate"], ["train", "--frobnicate"], ["train", "=1"], ["train", "agent"],
    ["train", "agent=nobody"], ["train", "env=Nowhere-v0"], ["train", "env=no_such_module:Env"], ["train", "env=os:x"],
    ["train", "agent.gama=0.9"], ["train", "~agent.gamma"], ["train", "+agent.gamma=7"], ["train", "experiment=none"],
    ["train", "resume=/nowhere"], ["train", "resume=."], ["train", "resume=null", "agent=x"], ["train", "seed=1,2"],
    ["train", "-m", "seed=range(1,3)", "agent=x"], ["train", "-m", "seed=interval(0,1)"], ["train", "hydra/sweeper=x"],
    ["train", "--config-dir", "/nowhere"], ["train", "env.wrappers=[Nothing]", "--print-config"],
    ["evaluate"], ["evaluate", "/nowhere"], ["evaluate", "."], ["evaluate", ".", "--episodes", "0"],
    ["evaluate", ".", "--episodes", "x"], ["evaluate", ".", "--seed", "x"], ["evaluate", ".", "--device", "x"],
    ["evaluate", ".", "--grid", "m"], ["plot"], ["plot", "/nowhere"], ["plot", ".", "--at", "x"],
    ["list", "nothing"], ["list", "envs", "zzzzzz"], ["list", "agents", "x", "y"],
]  # fmt: skip
BASES = (["env=Pendulum-v1"], ["agent=ppo", "env=CartPole-v1"], ["agent=drpg", "env=garnet"], ["env=Hopper-v5"])
SHORT = [
    "total_steps=6", "eval.every=null", "eval.episodes=1", "eval.max_steps=3", "log.tensorboard=false",
]  # fmt: skip
TRAINED = (
    ["env=Pendulum-v1", *SHORT, "agent.warmup_steps=3", "agent.batch_size=2", "agent.network.hidden=[4]",
     "agent.fused=false", "buffer.capacity=50"],
    ["agent=ppo", "env=CartPole-v1", *SHORT, "agent.rollout_steps=4", "agent.batch_size=2", "agent.epochs=1"],
)  # fmt: skip
ELSEWHERE = ("run_dir", "buffer.folder", "resume")
"""Options that name a folder, which a wrong value would make anywhere."""
PATIENCE = 60
"""Seconds that a command may take."""


def run(count: int, chance: random.Random, folder: Path) -> Iterator[Outcome]:
    """The list above, and options with values that most of them do not take; every third line trains for a moment."""
    names = [*option_names(TrainConfig), "agent.gamma", "agent.network.hidden", "agent.learning_rate", "buffer.alpha"]
    lines = chance.sample(WRONG, min(len(WRONG), count))
    while len(lines) < count:
        words = [f"{chance.choice(names)}={chance.choice(VALUES)}" for _ in range(chance.choice([1, 1, 2]))]
        if len(lines) % 3 or any(word.startswith(ELSEWHERE) for word in words):
            lines.append(["train", *chance.choice(BASES), *words, "--print-config"])
        else:
            lines.append(["train", *chance.choice(TRAINED), f"run_dir=run{len(lines)}", *words])
    with contextlib.chdir(folder):
        for line in lines:
            yield _answered(line)


class _NoEnd(BaseException):
    pass


def _no_end(*_: object) -> None:
    raise _NoEnd


def _answered(line: list[str]) -> Outcome:
    out, err = io.StringIO(), io.StringIO()
    case = " ".join(line)
    before = signal.signal(signal.SIGALRM, _no_end)
    signal.alarm(PATIENCE)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(line)
    except _NoEnd:
        return Outcome("effect", case, f"no end within {PATIENCE} s")
    except Exception as e:
        return Outcome("traceback", case, f"{type(e).__name__}: {e}")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    said = err.getvalue()
    if code == 0:
        return Outcome("equal", case)
    wrong = "Traceback" in said or said.count("\n") != 1 or not said.startswith("error: ")
    return Outcome("traceback" if wrong else "refused", case, said.strip())
