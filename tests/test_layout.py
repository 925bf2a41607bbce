"""What is distributed: one top-level module, its configurations inside, a command that works anywhere."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import CORE

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs a checkout")


def run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    words = [str(word) for word in command]
    return subprocess.run(
        words, cwd=cwd, env={**clean, **env}, capture_output=True, text=True, timeout=500, check=False
    )


def test_the_readme_begins_with_the_two_commands_and_ci_runs_the_second() -> None:
    first_screen = (ROOT / "README.md").read_text().splitlines()[:20]
    commands = [line for line in first_screen if line.startswith("pip install -c constraints.txt -e ")]
    assert len(commands) == 2
    assert commands[0].endswith("&& python train.py")
    assert commands[1].endswith("&& pytest -n 2")
    pattern = re.search(r"grep -E '([^']+)' README\.md", (ROOT / ".ci" / "run").read_text())
    assert pattern is not None
    found = [line for line in (ROOT / "README.md").read_text().splitlines() if re.search(pattern[1], line)]
    assert found == [commands[1]]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_every_requirement_and_the_extras_of_the_readme_are_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", line) for line in lines)
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(one for extra in extras.values() for one in extra)]
    names = {re.split(r"[\[<>=!~; ]", one)[0].lower().replace("_", "-") for one in wanted}
    assert names <= pinned, f"constraints.txt lacks {sorted(names - pinned)}"
    for used in re.findall(r'-e "\.\[([a-z0-9,]+)\]"', (ROOT / "README.md").read_text()):
        assert set(used.split(",")) <= set(extras)


def test_rlopt_imports_from_a_checkout_without_bare_names(tmp_path: Path) -> None:
    """Other distributions own the top-level names `agents`, `buffers` and `envs`."""
    for name in ("agents", "buffers", "envs", "configs"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not ours')\n")
    code = (
        "import sys, rlopt.agents, rlopt.buffers, rlopt.envs, rlopt.cli.train\n"
        "print(sorted({'agents', 'buffers', 'envs', 'configs'} & set(sys.modules)))"
    )
    done = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_train_py_runs_in_a_checkout_that_is_not_installed(tmp_path: Path) -> None:
    done = run(sys.executable, ROOT / "train.py", "--print-config", "env=Hopper-v5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "id: Hopper-v5" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_core_of_the_tests_has_a_little_of_every_folder() -> None:
    core = {Path(name).parent.as_posix() for name in CORE if (ROOT / "tests" / name).is_file()}
    assert len(CORE) == sum((ROOT / "tests" / name).is_file() for name in CORE)
    assert core >= {path.name for path in (ROOT / "tests").iterdir() if (ROOT / "rlopt" / path.name).is_dir()}


def definitions() -> dict[str, list[str]]:
    """Return where each module and class of rlopt is named, by its name without regard to case and underscores."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "rlopt").rglob("*.py")):
        where = path.relative_to(ROOT).as_posix()
        if path.stem not in ("__init__", "__main__"):
            found.setdefault(path.stem, []).append(where)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(where)
    return found


SHARED_NAMES = {
    "base": "what the other modules of its folder have in common",
    "language": "language models: the network, and the policy that writes with it",
    "env": "the vector environment of the backend whose folder it is in",
    "evaluate": "the command, and what it calls",
    "group": "groups of episodes: the loop that runs them, and what agents share that learn from them",
    "replay": "the replay buffer, and the loop that fills and draws from it",
    "rollout": "a rollout, and the loop that collects it",
    "Nets": "the networks that an agent's losses are made of",
    "Work": "what the stages of one update of an agent read",
    "PrioritizedReshuffledSampler": "the same sampler, for TorchRL",
    "ReshuffledSampler": "the same sampler, for TorchRL",
    "Samples": "what an agent's minibatches are cut from",
}


def test_no_two_modules_or_classes_of_one_name_mean_different_things() -> None:
    shared = {name: where for name, where in definitions().items() if len(where) > 1 and name not in SHARED_NAMES}
    assert not shared, "give one of them a name that says what it is (or add a line to SHARED_NAMES)"


NO_VERB = re.compile(
    r"""(?x) [^A-Z]  # a shape, a symbol, a word in backticks
    | (?: The|A|An|This|That|What|Whether|Which|Who|Why|How|When|Where|If|One|Two|All|Every|Each|Any|No|None|Of|From|For
    |   As|At|By|In|On|To|With|After|Before|Until|Always|Never|Called|Raises|Returns|Makes|Whose|Soft|Same|Other )\b"""
)
"""How docstrings begin that begin with no verb."""


def test_docstrings_of_public_functions_begin_with_a_verb() -> None:
    """Return …, Draw …, Refuse …: what the function does, before what it does it to."""
    found = []
    for path in sorted((ROOT / "rlopt").rglob("*.py")):
        body = ast.parse(path.read_text()).body
        inner = [node for part in body if isinstance(part, ast.ClassDef) for node in part.body]
        for node in (*body, *inner):
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or node.decorator_list:
                continue  # properties are what they are called
            text = ast.get_docstring(node)
            if text and NO_VERB.match(text):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {text.splitlines()[0]}")
    assert not found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by the hatchling that is installed here, so that no package registry is asked."""
    out = tmp_path_factory.mktemp("wheel")
    done = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("rlopt_torch-*.whl"))


def test_the_wheel_holds_rlopt_alone_with_its_configurations(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"rlopt"}
    shipped = {name.removeprefix("rlopt/configs/") for name in names if name.startswith("rlopt/configs/")}
    assert shipped == {p.relative_to(ROOT / "configs").as_posix() for p in (ROOT / "configs").rglob("*.yaml")}
    sources = {
        p.relative_to(ROOT).as_posix() for p in (ROOT / "rlopt").rglob("*") if p.suffix in (".py", ".typed", ".csv")
    }
    assert sources <= set(names)


def test_the_installed_command_works_outside_a_checkout(wheel: Path, tmp_path: Path) -> None:
    """Installed into an empty folder without its requirements, which come from the environment of these tests."""
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    installed = run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", site, wheel, cwd=elsewhere)
    assert installed.returncode == 0, installed.stderr
    command = site / "bin" / "rlopt"
    listed = run(command, "list", "experiments", cwd=elsewhere, PYTHONPATH=str(site))
    assert "sac_halfcheetah_v4" in listed.stdout, listed.stderr
    words = (
        "env=Pendulum-v1",
        "total_steps=60",
        "agent.warmup_steps=30",
        "eval.episodes=1",
        "agent.network.hidden=[8]",
        "agent.fused=false",  # nothing to compile
    )
    trained = run(command, "train", *words, "run_dir=out", cwd=elsewhere, PYTHONPATH=str(site))
    assert trained.returncode == 0, trained.stderr
    assert (elsewhere / "out" / "policy" / "policy.json").is_file()
    assert [p.name for p in elsewhere.iterdir()] == ["out"]


@pytest.mark.slow
def test_a_clean_virtual_environment_installs_and_runs_it(wheel: Path, tmp_path: Path) -> None:
    """With its requirements, at the pinned versions, from the package registry."""
    venv.create(tmp_path / "venv", with_pip=True, symlinks=True)
    scripts = tmp_path / "venv" / "bin"
    pinned = ROOT / "constraints.txt"
    done = run(scripts / "python", "-m", "pip", "install", "-c", pinned, wheel, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    listed = run(scripts / "rlopt", "train", "--print-config", "env=CartPole-v1", cwd=tmp_path)
    assert "id: CartPole-v1" in listed.stdout, listed.stderr
