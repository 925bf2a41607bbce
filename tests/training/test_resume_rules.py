"""What a resumed run may change, what it refuses, and what it settles."""

import shutil
from dataclasses import replace

import pytest
import torch
import yaml

from rlopt.loops.configuration import agent_config
from rlopt.runs.manifest import read_manifest
from rlopt.runs.run_folder import RunFolder
from rlopt.training.setup import begin, resume
from rlopt.types import RloptError
from tests.training.test_resume import config, run_to_end


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 60 steps."""
    run = tmp_path_factory.mktemp("finished") / "run"
    run_to_end(begin(config("sac", run, total_steps=60)))
    return run


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "moved")


def edit(run, *path, value):
    """Change one option of ``config.yaml`` by hand."""
    file = run / "config.yaml"
    settings = yaml.safe_load(file.read_text())
    inner = settings
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file.write_text(yaml.safe_dump(settings))


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("agent", "gamma"), 0.9, "agent.gamma is 0.9, but the run was trained with 0.99"),
        (("agent", "network", "hidden"), [16], r"agent.network.hidden is \[16\], but .* with \[16, 16\]"),
        (("agent", "name"), "sac_2018", "agent.name is sac_2018, but the run was trained with sac"),
        (("env", "kwargs", "g"), 9.81, "env.kwargs.g is 9.81, but the run was trained without it"),
        (("seed",), 4, "seed is 4, but the run was trained with 3"),
        (("eval", "every"), None, "eval.every is None, but the run was trained with 50"),
    ],
)
def test_a_configuration_changed_by_hand_is_refused(run, path, value, told):
    if path == ("agent", "name"):  # whose options are others
        edit(run, "agent", value={"name": value})
    else:
        edit(run, *path, value=value)
    with pytest.raises(RloptError, match=told) as refused:
        resume(run, {"total_steps": 80})
    assert "\n" not in str(refused.value) and str(run / "config.yaml") in str(refused.value)


def test_what_may_change_may_change_by_hand_too(run):
    edit(run, "total_steps", value=70)
    edit(run, "log", "every", value=10)
    edit(run, "run_dir", value="elsewhere")
    assert run_to_end(resume(run, {})).step == 70


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_a_run_does_not_silently_outlive_its_learning_rate(tmp_path, final, caplog):
    plain = {"name": "sac", "network": {"hidden": [8]}, "warmup_steps": 100, "fused": False}
    run = tmp_path / "run"
    settings = config("sac", run, total_steps=20)
    agent = agent_config({**plain, "lr_schedule": "linear", "final_learning_rate": final})
    run_to_end(begin(replace(settings, agent=agent)))
    assert resume_to(run, 20) == 20
    if final == 0.0:
        with pytest.raises(RloptError, match=r"^total_steps=30: this run's learning rate is 0 from step 20 on .*line"):
            resume(run, {"total_steps": 30})
        edit(run, "total_steps", value=30)
        with pytest.raises(RloptError, match="begin a new run"):
            resume(run, {})
        RunFolder.open(run).close()
    else:
        assert resume_to(run, 30) == 30
        assert "from step 20 on the learning rate stays at 0.1 of what it began with (linear)" in caplog.text


def resume_to(run, total_steps):
    return run_to_end(resume(run, {"total_steps": total_steps})).step


def test_an_option_that_an_older_file_lacks_is_no_change(run):
    settings = yaml.safe_load((run / "config.yaml").read_text())
    del settings["agent"]["gamma"], settings["eval"]["episodes"]
    settings["eval"] = {**settings["eval"], "episodes": 2}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    resume(run, {}).close()


def test_a_checkpoint_without_a_configuration_is_taken_as_it_is(run, monkeypatch):
    from rlopt.runs import checkpoint

    monkeypatch.setattr(
        checkpoint, "read_manifest", lambda folder: read_manifest(folder).__class__(
            **{**read_manifest(folder).__dict__, "config": None}
        )
    )  # fmt: skip
    edit(run, "agent", "gamma", value=0.9)
    resume(run, {}).close()


def test_an_open_device_is_settled_and_written(run):
    resume(run, {"device": "auto"}).close()
    written = yaml.safe_load((run / "config.yaml").read_text())["device"]
    assert written == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_run_killed_before_its_first_checkpoint_begins_again_and_says_so(tmp_path, caplog):
    trainer = begin(config("sac", tmp_path / "run", total_steps=60))
    trainer.loop.advance()
    trainer.close()
    trainer.folder.close()
    again = resume(tmp_path / "run", {})
    assert again.loop.step == 0
    assert f"{tmp_path / 'run'} has no checkpoint yet: it begins again at step 0" in caplog.messages
    run_to_end(again)


def test_a_run_whose_checkpoints_are_gone_is_not_begun_again(run):
    rows = (run / "evaluations.csv").read_bytes()
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(RloptError, match="has been trained, but its checkpoints are gone; begin a new run"):
        resume(run, {"total_steps": 80})
    assert (run / "evaluations.csv").read_bytes() == rows
