"""The folder where a command is typed: its modules can be named, and stand for nothing that is installed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.cli.command_line import python

SHADOWS = ("matplotlib", "ale_py", "torch", "numpy", "gymnasium", "yaml", "hydra", "rich", "tensorboard", "mujoco")
MODULE = """
import gymnasium
from gymnasium.envs.classic_control import PendulumEnv
gymnasium.register("Here-v0", entry_point=PendulumEnv, max_episode_steps=5)
"""
TINY = [
    "total_steps=12",
    "agent.warmup_steps=6",
    "agent.batch_size=4",
    "agent.network.hidden=[4]",
    "agent.fused=false",
    "eval.episodes=1",
    "run_dir=run",
    "buffer.capacity=50",
    "device=cpu",
]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with the user's environment and with modules that are called like installed ones."""
    (tmp_path / "mine.py").write_text(MODULE)
    for name in SHADOWS:
        (tmp_path / f"{name}.py").write_text(f"open('imported', 'a').write('{name} ')\nraise SystemExit(7)\n")
    return tmp_path


@pytest.mark.parametrize("module", ["rlopt", "rlopt.cli"])
def test_installed_packages_win_over_what_lies_around(here: Path, module: str) -> None:
    assert "Pendulum-v1" in python("-m", module, "list", "envs", "Pend", cwd=here).stdout.split()
    assert not (here / "imported").exists()


def test_modules_of_the_current_folder_are_found_and_nothing_is_shadowed(here: Path) -> None:
    """By a training, which a multirun starts as a process of its own, and by its picture."""
    trained = python("-m", "rlopt.cli", "train", *TINY, "env=mine:Here-v0", "-m", "run_dir=runs", cwd=here)
    assert trained.returncode == 0, trained.stderr
    assert (here / "runs" / "0" / "curve.png").is_file()
    assert not (here / "imported").exists()


def test_a_folder_on_the_users_path_stays_where_the_user_put_it(here: Path) -> None:
    """PYTHONPATH is the user's wish."""
    (here / "first").mkdir()
    (here / "first" / "mine.py").write_text(MODULE.replace("Here", "First"))
    code = (
        "import sys; from rlopt.cli import main; main(['list', 'buffers']); import mine; print(mine.__file__);"
        "print([p for p in sys.path if p in ('', sys.argv[1])])"
    )
    wished = [str(here / "first"), os.environ.get("PYTHONPATH", ""), str(Path(__file__).parents[2])]
    path = os.pathsep.join(filter(None, wished))  # an empty entry would be the current folder
    done = python("-c", code, here, cwd=here, PYTHONPATH=path)
    assert done.stdout.splitlines()[-2:] == [str(here / "first" / "mine.py"), str([str(here)])], done.stderr
