"""Policies on a model hub, here a stand-in on this machine: what is pushed, what is loaded, and what goes wrong."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import rlopt
from rlopt import hub
from rlopt.cli import main
from rlopt.cli.compose import compose
from rlopt.hub import Address, parse_address
from rlopt.policy import load_policy, save_policy
from rlopt.runs.run_folder import RunFolder
from rlopt.training.model_card import training_command
from rlopt.training.sharing import push
from rlopt.types import RloptError
from tests.cli.command_line import SHORT, python, refused
from tests.hub_server import TOKEN, Hub, serving
from tests.training.evaluated import policy_for


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pushed") / "run"
    assert main(["train", *SHORT, "eval.every=30", "seed=3", f"run_dir={folder}"]) == 0
    return folder


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The client takes its address when it is imported, which another test of this process may have done."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serving() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        template = found.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield found


def metadata(card: bytes) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.decode().split("---\n")[1])
    return found


def test_a_push_is_loaded_and_evaluated_elsewhere_to_the_same_score(
    server: Hub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a stranger in a process of his own, who knows neither the key of the one who pushed nor the run."""
    assert main(["push", str(run), "hub:someone/pendulum", "--episodes", "3"]) == 0
    assert f"pushed: {server.url}/someone/pendulum" in capsys.readouterr().out
    assert server.messages == ["rlopt: sac on Pendulum-v1"]
    files = server.files("someone/pendulum")
    code = (
        "import json, rlopt, sys\n"
        "policy = rlopt.load_policy('hub:someone/pendulum')\n"
        "print(json.dumps(policy([0.6, 0.8, 1.0]).tolist()))\n"
        "from rlopt.cli import main\n"
        "sys.exit(main(['evaluate', 'hub:someone/pendulum', '--episodes', '3', '--json', 'found.json']))\n"
    )
    env = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": ""}
    env |= dict.fromkeys(("XDG_STATE_HOME", "LOCALAPPDATA"), str(tmp_path / "other"))
    done = python("-c", code, cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[0]) == load_policy(run)(np.array([0.6, 0.8, 1.0])).tolist()
    assert json.loads((tmp_path / "found.json").read_text()) == json.loads(files["evaluation.json"])
    assert set(files) == {
        ".gitattributes", "README.md", "curve.png", "evaluation.json", "policy/policy.json", "policy/state.json",
        "policy/tensors.safetensors", "run/config.yaml", "run/evaluations.csv", "run/versions.json",
    }  # fmt: skip
    fetched = {path.name for path in tmp_path.glob("home/hub/models--*/snapshots/*/**/*") if path.is_file()}
    assert fetched == {"policy.json", "state.json", "tensors.safetensors"}, "and nothing else"
    assert not [request for request in server.requests if "xet" in request]
    about = metadata(files["README.md"])
    assert about["library_name"] == "rlopt" and {"sac", "Pendulum-v1", "reinforcement-learning"} <= set(about["tags"])
    (metric,) = about["model-index"][0]["results"][0]["metrics"]
    assert metric["value"].startswith(f"{json.loads(files['evaluation.json'])['mean']:.2f} +/- ")


def test_the_cards_command_is_the_runs(run: Path, tmp_path: Path) -> None:
    assert main(["push", str(run), "hub:a/b", "--episodes", "0", "--dry-run", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    told = yaml.safe_load((tmp_path / "out" / "run" / "config.yaml").read_text())
    assert str(run.parent) not in "".join(
        p.read_text() for p in (tmp_path / "out").rglob("*") if p.suffix in (".md", ".yaml")
    )
    command = training_command(told)
    assert command is not None and command in card and "seed=3" in command and "pushed without an evaluation" in card
    composed = compose(shlex.split(command)[2:])
    assert (composed.agent.network.hidden, composed.total_steps, composed.seed) == ((8,), 60, 3)
    assert composed.env.id == "Pendulum-v1" and "model-index" not in metadata(card.encode())
    wrapped = {**told, "env": {**told["env"], "wrappers": [{"class": "TimeLimit", "kwargs": {"max_episode_steps": 5}}]}}
    words = shlex.split(training_command(wrapped) or "")[2:]
    assert compose(words).env.wrappers == ({"class": "TimeLimit", "kwargs": {"max_episode_steps": 5}},)


def test_the_best_policy_is_measured_in_other_episodes(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["push", str(run), "hub:a/b@v1", "--policy", "best", "--episodes", "2", "--dry-run", str(out)]) == 0
    assert json.loads((out / "evaluation.json").read_text())["seed"] == 1_000_003
    assert "rlopt evaluate hub:a/b@v1 --episodes 2 --seed 1000003" in (out / "README.md").read_text()


def test_a_dry_run_lists_what_would_go_and_overwrites_nothing(run: Path, tmp_path: Path) -> None:
    done = push(run, "hub:a/b", episodes=1, dry_run=tmp_path / "out")
    assert done.page is None and len(done.evaluations) == 1
    assert done.files == {p.relative_to(tmp_path / "out").as_posix(): p.stat().st_size
                          for p in (tmp_path / "out").rglob("*.*")}  # fmt: skip
    with pytest.raises(RloptError, match="is there and not empty; name a new folder"):
        push(run, "hub:a/b", dry_run=tmp_path / "out")


def test_several_runs_are_pushed_together(server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for r in range(2):
        save_policy(
            policy_for("Pendulum-v1", r), tmp_path / "both" / f"run{r}", {"env": {"id": "Pendulum-v1"}, "seed": r}
        )
    assert main(["push", str(tmp_path / "both"), "hub:user/both", "--episodes", "1"]) == 0
    files = server.files("user/both")
    assert {"policy/run0/policy.json", "policy/run1/policy.json"} < set(files)
    assert "hub:user/both/policy/run0" in files["README.md"].decode()
    assert [found["seed"] for found in json.loads(files["evaluation.json"])] == [0, 1]
    capsys.readouterr()
    assert main(["evaluate", "hub:user/both", "--episodes", "1", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(files["evaluation.json"])
    assert rlopt.load_policy("hub:user/both/policy/run1").meta["seed"] == 1
    with pytest.raises(RloptError, match="holds the policies of several runs"):
        rlopt.load_policy("hub:user/both")
    with pytest.raises(RloptError, match=r"hub:user/both/policy/run9: the repository has no policy there"):
        rlopt.load_policy("hub:user/both/policy/run9")


def test_branches_films_and_what_a_new_push_leaves(server: Hub, run: Path, tmp_path: Path) -> None:
    film = tmp_path / "film.mp4"
    film.write_bytes(b"film")
    push(run, "hub:user/p", episodes=0, video=film, message="first")
    server.files("user/p")["notes.md"] = b"the owner's"
    push(run, "hub:user/p", episodes=0)
    assert "replay.mp4" not in server.files("user/p") and server.files("user/p")["notes.md"] == b"the owner's"
    push(run, "hub:user/p@with-film", episodes=0, video=film)
    assert server.files("user/p", "with-film")["replay.mp4"] == b"film" and "replay.mp4" not in server.files("user/p")
    assert server.messages[0] == "first"
    assert rlopt.load_policy("hub:user/p@with-film").spec.id == "Pendulum-v1"
    sha = server.branches["user/p"]["main"]
    assert rlopt.load_policy(f"hub:user/p@{sha}").spec.id == "Pendulum-v1"


def test_private_is_private_or_refused(server: Hub, run: Path) -> None:
    push(run, "hub:user/mine", episodes=0, private=True)
    assert server.private["user/mine"]
    push(run, "hub:user/ours", episodes=0)
    with pytest.raises(RloptError, match="hub:user/ours is there and public; make it private in its settings"):
        push(run, "hub:user/ours", episodes=0, private=True)


def test_without_a_network_the_cache_serves(
    run: Path, server: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    push(run, "hub:user/p", episodes=0)
    rlopt.load_policy("hub:user/p")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert rlopt.load_policy("hub:user/p").spec.id == "Pendulum-v1"
    assert "hub:user/p: the hub cannot be reached" in caplog.text and "what was fetched before is taken" in caplog.text
    with pytest.raises(RloptError, match="hub:user/q: the hub cannot be reached and the policy is not in its cache"):
        rlopt.load_policy("hub:user/q")
    with pytest.raises(RloptError, match="HF_HUB_OFFLINE is set"):
        push(run, "hub:user/p", episodes=0)


def test_a_strangers_policy_imports_nothing(server: Hub, tmp_path: Path) -> None:
    save_policy(policy_for("Pendulum-v1"), tmp_path / "p", {"env": {"id": "antigravity:Pendulum-v1"}})
    files = {f"policy/{path.name}": path.read_bytes() for path in (tmp_path / "p").iterdir()}
    server.commit("user/bad", "main", {**files, "policy/config.yaml": b"seed: 0", "run.py": b"raise SystemExit"})
    server.private["user/bad"] = False
    with pytest.raises(RloptError, match=r"names a module \(antigravity:Pendulum-v1\), .*--trust"):
        rlopt.training.sharing.evaluate_path("hub:user/bad", 1)
    assert rlopt.load_policy("hub:user/bad").spec.id == "Pendulum-v1"
    assert not list((tmp_path / "cache").rglob("config.yaml")) and not list((tmp_path / "cache").rglob("*.py"))
    with pytest.raises(RloptError, match=r"names a module"):
        push(tmp_path / "p", "hub:user/again", episodes=0)


def test_a_link_in_a_run_is_not_pushed(run: Path, tmp_path: Path) -> None:
    secret, other = tmp_path / "secret", tmp_path / "other"
    secret.write_text("secret")
    other.mkdir()
    for path in run.iterdir():
        if path.is_dir():
            os.symlink(path, other / path.name)  # links to folders are refused too
        elif path.name != "curve.png":
            (other / path.name).write_bytes(path.read_bytes())
    (other / "curve.png").symlink_to(secret)
    with pytest.raises(RloptError, match="is a link"):
        push(other, "hub:a/b", episodes=0, dry_run=tmp_path / "out")


# Mistakes


def test_addresses() -> None:
    assert parse_address("hub:a/b") == Address("a/b")
    assert parse_address("hub:a/b@v1.0") == Address("a/b", "", "v1.0")
    assert parse_address("hub:a/b/policy/run0@feature/x") == Address("a/b", "policy/run0", "feature/x")
    assert str(parse_address("hub:a/b/policy/run0@x")) == "hub:a/b/policy/run0@x"
    for wrong in (
        "hub:a",
        "hub:",
        "hub:a/b@",
        "hub:a/../b",
        "hub:a/b/../../c",
        "hub:a b/c",
        "hub:a/b@../x",
        "hub:/a/b",
    ):
        with pytest.raises(RloptError, match="write hub:user/name"):
            parse_address(f"hub:{wrong}")


FAILURES = [
    (r"repos/create", 401, "the hub knows no such token (401); run `hf auth login`, or set HF_TOKEN"),
    (r"repos/create", 403, "the token may not do that (403: as the test wants it); take one with the right to write"),
    (r"/commit/", 413, "the hub refused (HTTP 413: as the test wants it); try again later"),
]  # fmt: skip


@pytest.mark.parametrize(("request_", "status", "words"), FAILURES)
def test_a_refused_push_is_one_line(
    server: Hub, run: Path, capsys: pytest.CaptureFixture[str], request_: str, status: int, words: str
) -> None:
    server.fails = (request_, status)
    said = refused(["push", str(run), "hub:user/p", "--episodes", "0"], capsys)
    assert said.startswith(f"hub:user/p: {words}")


def test_what_is_not_there_is_one_line(
    server: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(["evaluate", "hub:user/missing"], capsys)
    assert said.startswith(
        "hub:user/missing: there is no such repository, or it is private; check the name, or run `hf"
    )
    push(run, "hub:user/p", episodes=0)
    assert "it has no revision v9" in refused(["evaluate", "hub:user/p@v9"], capsys)
    assert "no name for a repository" in refused(["evaluate", "hub:user/a--b"], capsys)
    assert "pushed to a whole repository, hub:a/b" in refused(["push", str(run), "hub:a/b/policy"], capsys)
    assert "no run folder with policy_best/" in refused(
        ["push", str(run / "policy"), "hub:a/b", "--policy", "best"], capsys
    )
    assert "there is no such mp4 file" in refused(["push", str(run), "hub:a/b", "--video", "none.mp4"], capsys)
    assert "give episodes" in refused(["push", str(run), "hub:a/b", "--episodes", "0", "--video"], capsys)
    monkeypatch.setenv("HF_TOKEN", "")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "nowhere")
    assert "hub:user/p: you are not logged in; run `hf auth login`" in refused(["push", str(run), "hub:user/p"], capsys)


@pytest.mark.parametrize("request_", ["repos/create", "GET /api/models/user/p"])
def test_a_hub_that_does_not_answer_is_not_waited_for(
    server: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, request_: str
) -> None:
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    server.fails = (request_, 0)
    with pytest.raises(RloptError, match="hub:user/p: the hub cannot be reached"):
        push(run, "hub:user/p", episodes=0) if "create" in request_ else rlopt.load_policy("hub:user/p")


def test_a_hub_that_is_not_there_is_one_line(run: Path, server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RloptError, match=r"hub:user/p: the hub cannot be reached \(.*\); check the network"):
        push(run, "hub:user/p", episodes=0)


def test_without_the_package_its_extra_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RloptError, match=r'hub:a/b needs huggingface_hub .*"\.\[hub\]"'):
        rlopt.load_policy("hub:a/b")


def test_the_runs_configuration_is_not_signed_on_the_hub(run: Path, tmp_path: Path) -> None:
    push(run, "hub:a/b", episodes=0, dry_run=tmp_path / "out")
    assert not RunFolder(tmp_path / "out" / "run").settings().own
