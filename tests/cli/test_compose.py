"""From overrides to a checked configuration."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from rlopt.cli.compose import compose, resume_request, split
from rlopt.config import to_dict
from rlopt.loops.configuration import TrainConfig
from rlopt.registry import agent_names, sampler_names
from rlopt.training import train_config
from rlopt.training.config_files import config_dirs, group_files
from rlopt.training.setup import resolve_config
from rlopt.types import RloptError

EXPERIMENTS = sorted(group_files("experiment", config_dirs()))


def mistake(*overrides: str, dirs: tuple[str, ...] = ()) -> str:
    with pytest.raises(RloptError) as caught:
        compose(overrides, dirs)
    text = str(caught.value)
    assert "\n" not in text
    return text


def write(folder: Path, name: str, text: str) -> str:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(textwrap.dedent(text))
    return str(folder)


def test_without_a_word_it_is_the_pendulum_example() -> None:
    config = compose([])
    assert (config.experiment, config.env.id, config.agent.name) == ("sac_pendulum", "Pendulum-v1", "sac")
    assert config.total_steps < 20_000


@pytest.mark.parametrize(
    "override",
    ["env=Pendulum-v1", "env.id=Pendulum-v1", "agent=sac_2018", "agent.name=sac_2018", "experiment=null"],
)
def test_the_example_steps_back_as_soon_as_something_else_is_named(override: str) -> None:
    config = compose([override])
    assert config.experiment is None
    assert config.total_steps == TrainConfig().total_steps


def test_any_registered_id_is_an_environment_without_a_file() -> None:
    assert compose(["env=HalfCheetah-v5"]).env.id == "HalfCheetah-v5"
    assert compose(["env=ALE/Breakout-v5"]).env.id == "ALE/Breakout-v5"
    assert compose(["env=my_module:MyEnv-v0"]).env.id == "my_module:MyEnv-v0"


def test_options_of_the_agent_that_no_file_mentions_can_be_set() -> None:
    agent = compose(["env=Hopper-v5", "agent.learning_rate=1e-3", "agent.network.hidden=[64,64]"]).agent
    assert (agent.learning_rate, agent.network.hidden, agent.tau) == (1e-3, (64, 64), 0.005)


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_keyword_arguments_of_the_environment_are_open(prefix: str) -> None:
    assert compose(["env=Hopper-v5", f"{prefix}env.kwargs.frame_skip=2"]).env.kwargs == {"frame_skip": 2}


def test_wrappers_are_names_or_mappings() -> None:
    text = "env.wrappers=[RescaleAction,{class: TimeLimit, kwargs: {max_episode_steps: 7}}]"
    assert compose(["env=Hopper-v5", text]).env.wrappers == (
        "RescaleAction",
        {"class": "TimeLimit", "kwargs": {"max_episode_steps": 7}},
    )


def test_interpolation_reaches_defaults_that_no_file_mentions() -> None:
    assert compose(["env=Hopper-v5", "env.kwargs.x=${agent.gamma}", "seed=5", "env.kwargs.y=${seed}"]).env.kwargs == {
        "x": 0.99,
        "y": 5,
    }


def test_a_schedule_without_its_length_lasts_the_whole_run() -> None:
    config = resolve_config(compose(["env=Hopper-v5", "agent.lr_schedule=linear", "total_steps=7_000"]))
    assert config.agent.schedule_steps == 7_000


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("agent.learning_rte=1e-3", "agent.learning_rte: no such option; did you mean agent.learning_rate?"),
        ("learning_rate=1e-3", "learning_rate: no such option; did you mean agent.learning_rate?"),
        ("episodes=3", "episodes: no such option; did you mean eval.episodes?"),
        ("agnt=sac", "agnt: no such option; did you mean agent?"),
        ("resum=runs/a", "resum: no such option; did you mean resume?"),
        ("agent=sca", "agent=sca: no such agent; did you mean sac?"),
        ("buffer=unifrom", "buffer=unifrom: no such buffer; did you mean uniform?"),
        ("experiment=sac_hoper_v4", "experiment=sac_hoper_v4: no such experiment; did you mean sac_hopper_v4?"),
        ("env.bakend=sync", "env.bakend: no such option; did you mean env.backend?"),
        ("agent.batch_size=many", "agent.batch_size: expected a whole number, got 'many'"),
        ("agent.tau=0", "agent.tau: must be above 0, got 0"),
        ("on_nonfinite=halt", "on_nonfinite: no such choice 'halt'; choose from skip, stop"),
        ("total_steps=0", "total_steps: must be at least 1, got 0"),
        ("seed=1,2", "seed=1,2: several values; add --multirun to run each, or write seed='…'"),
        ("halfcheetah", "halfcheetah: expected OPTION=VALUE, such as env=HalfCheetah-v5"),
        ("hydra.run.dir=x", "hydra.run.dir=x: Hydra writes nothing here; the run folder is run_dir=…"),
        (
            "agent={name: sac}",
            "agent={name: sac}: agent takes a name; its options are set one by one, as in agent.name=…",
        ),
        ("agent=[sac,sac_2018]", "agent=[sac,sac_2018]: agent takes one name; -m agent=sac,sac_2018 runs each"),
        ("~agent", "~agent: a group is not left out; choose another agent"),
        ("~agent.x", "~agent.x: no file sets this option, so there is nothing to leave out"),
        ("env=null", "env=null: name one; `rlopt list envs` shows what there is"),
        ("agent.gamma=${seeed}", "agent.gamma: Interpolation key 'seeed' not found"),
        ("run_dir=a b [", "run_dir=a b [: the value cannot be read; write it in double quotes: 'run_dir=\"…\"'"),
    ],
)
def test_a_mistake_is_one_line(override: str, line: str) -> None:
    assert mistake(override) == line


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_says_what_to_expect(name: str) -> None:
    config = compose([f"experiment={name}"])
    assert config.experiment == name
    head = group_files("experiment", config_dirs())[name].read_text()
    assert "expected:" in head and "published" in head


@pytest.mark.parametrize("name", [n for n in EXPERIMENTS if re.search("_v[45]", n)])
def test_an_experiment_of_a_published_result_is_what_its_name_says(name: str) -> None:
    config = compose([f"experiment={name}"])
    _, task, version = name.split("_")[:3]
    assert config.env.id.lower() == f"{task}-{version}"
    head = group_files("experiment", config_dirs())[name].read_text()
    for word in ("paper:", "published:", "seeds:", "expected:"):
        assert f"# {word}" in head
    assert config.total_steps == 1_000_000
    if not name.startswith("sac"):
        return
    assert config.agent.warmup_steps == 10_000
    tianshou = name.endswith("tianshou")
    assert config.agent.learning_rate == (1e-3 if tianshou else 3e-4)
    assert config.agent.temperature == (0.2 if tianshou else None)


def test_the_five_tasks_have_both_versions() -> None:
    tasks = ("halfcheetah", "hopper", "walker2d", "ant", "humanoid")
    assert {f"sac_{task}_{version}" for task in tasks for version in ("v4", "v5")} <= set(EXPERIMENTS)


def test_overrides_win_over_an_experiment() -> None:
    config = compose(["experiment=sac_hopper_v4", "env=Ant-v4", "agent.learning_rate=1e-2", "total_steps=5"])
    assert (config.env.id, config.agent.learning_rate, config.total_steps) == ("Ant-v4", 1e-2, 5)


@pytest.mark.parametrize(
    ("words", "id", "kwargs"),
    [
        (["experiment=sac_hopper_v4", "env=mycheetah"], "HalfCheetah-v5", {"frame_skip": 3}),
        (["env=mycheetah", "experiment=sac_hopper_v4", "env.kwargs.frame_skip=4"], "HalfCheetah-v5", {"frame_skip": 4}),
        (["experiment=tilted", "env=mycheetah"], "HalfCheetah-v5", {"frame_skip": 3}),
        (["experiment=tilted", "env=garnet", "agent.gamma=0.5"], "Garnet-v0", {"gamma": 0.5, "seed": 0}),
        (["experiment=tilted"], "Pendulum-v1", {"g": 9.0}),
        (["experiment=tilted", "env.kwargs.g=8.0"], "Pendulum-v1", {"g": 8.0}),
    ],
)
def test_a_typed_environment_wins_over_that_of_an_experiment(
    words: list[str], id: str, kwargs: Mapping[str, object], tmp_path: Path
) -> None:
    outside = write(tmp_path, "env/mycheetah.yaml", "id: HalfCheetah-v5\nkwargs: {frame_skip: 3}\n")
    write(tmp_path, "experiment/tilted.yaml", "# @package _global_\nenv: {id: Pendulum-v1, kwargs: {g: 9.0}}\n")
    config = compose(words, [outside])
    assert (config.env.id, config.env.kwargs) == (id, kwargs)


def test_an_experiment_that_does_not_fit_the_typed_agent_says_how_to_go_on() -> None:
    words = ["experiment=sac_hopper_v4", "agent=sac_2018"]
    assert mistake(*words) == (
        "experiment=sac_hopper_v4 does not fit agent=sac_2018, which has no agent.temperature; "
        "add '~agent.temperature', or leave experiment out"
    )
    config = compose([*words, "~agent.temperature"])
    assert (config.agent.name, config.agent.warmup_steps) == ("sac_2018", 10_000)
    own = mistake(*words, "~agent.temperature", "agent.lerning_rate=1")
    assert own == "agent.lerning_rate: no such option; did you mean agent.learning_rate?"


def test_a_run_folder_below_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert compose(["run_dir='~/run'"]).run_dir == "/somewhere/run"
    assert compose(["run_dir='~nobody-at-all/run'"]).run_dir == "~nobody-at-all/run"
    with pytest.raises(RloptError, match="no run lies there"):
        resume_request(["resume='~nobody-at-all/run'"])


def test_every_shipped_agent_and_buffer_has_a_file_with_its_source() -> None:
    dirs = config_dirs()
    for group, names in (("agent", agent_names()), ("buffer", sampler_names())):
        files = group_files(group, dirs)
        for name in names:
            assert files[name].read_text().startswith("# "), f"configs/{group}/{name}.yaml needs its provenance"


def test_a_configuration_survives_being_written_and_read() -> None:
    config = compose(["experiment=sac_ant_v5", "env.wrappers=[RescaleAction]", "threads=2"])
    assert train_config(yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config


def test_an_outside_folder_adds_configurations_and_wins_over_shipped_ones(tmp_path: Path) -> None:
    outside = write(tmp_path, "agent/sac_slow.yaml", "name: sac\nlearning_rate: 1e-5\n")
    write(tmp_path, "env/Pond-v0.yaml", "id: Pendulum-v1\nkwargs: {g: 9.0}\n")
    write(tmp_path, "agent/sac.yaml", "name: sac\ntau: 0.5\n")
    write(tmp_path, "experiment/mine.yaml", "# @package _global_\ndefaults:\n  - override /agent: sac_slow\nseed: 9\n")
    assert compose(["env=Pond-v0"], [outside]).env.kwargs == {"g": 9.0}
    assert compose(["env=Pond-v0"], [outside]).agent.tau == 0.5
    config = compose(["experiment=mine"], [outside])
    assert (config.seed, config.agent.learning_rate) == (9, 1e-5)
    assert compose(["env=Hopper-v5"]).agent.tau == 0.005  # nothing of it stays behind
    assert mistake("agent=sac_slwo", dirs=(outside,)) == "agent=sac_slwo: no such agent; did you mean sac_slow?"


def test_an_outside_folder_must_exist_and_hold_what_can_be_read(tmp_path: Path) -> None:
    assert mistake("env=Hopper-v5", dirs=(str(tmp_path / "no"),)) == f"--config-dir {tmp_path / 'no'}: no such folder"
    outside = write(tmp_path, "agent/torn.yaml", "name: [sac\n")
    assert "torn" in mistake("agent=torn", dirs=(outside,))


def test_a_sampler_that_is_only_registered_is_a_buffer_with_checked_options(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlopt import registry

    class Sampler:
        def __init__(self, alpha: float = 0.6) -> None:
            self.alpha = alpha

    monkeypatch.setitem(registry.SAMPLERS, "mine", Sampler)
    config = compose(["env=Hopper-v5", "buffer=mine", "buffer.alpha=1", "buffer.capacity=10"])
    given = {"name": "mine", "capacity": 10, "device": "auto", "alpha": 1.0}
    assert given.items() <= to_dict(config.buffer).items()
    assert config.buffer.make_sampler().alpha == 1.0
    assert mistake("buffer=mine", "buffer.alhpa=1") == "buffer.alhpa: no such option; did you mean buffer.alpha?"


def test_several_values_are_split_into_jobs_the_last_varying_fastest() -> None:
    assert split(["env=Hopper-v5,Ant-v5", "seed=range(0,2)", "agent.network.hidden=[8,8]"]) == [
        ["env=Hopper-v5", "seed=0", "agent.network.hidden=[8,8]"],
        ["env=Hopper-v5", "seed=1", "agent.network.hidden=[8,8]"],
        ["env=Ant-v5", "seed=0", "agent.network.hidden=[8,8]"],
        ["env=Ant-v5", "seed=1", "agent.network.hidden=[8,8]"],
    ]


def test_jobs_get_run_folders_of_their_own(tmp_path: Path) -> None:
    jobs = split([f"run_dir='{tmp_path}/a b'", "seed=3,4"])
    configs = [compose(["env=Hopper-v5", *job]) for job in jobs]
    assert [(c.run_dir, c.seed) for c in configs] == [(f"{tmp_path}/a b/0", 3), (f"{tmp_path}/a b/1", 4)]


def test_an_interval_is_no_list_of_jobs() -> None:
    with pytest.raises(RloptError, match="interval"):
        split(["agent.gamma=interval(0,1)"])


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(compose(["env=Hopper-v5", "log.every=7"]))))
    return folder


def test_resume_may_change_the_length_the_device_and_logging(run_folder: Path) -> None:
    found = resume_request([f"resume={run_folder}", "total_steps=2e6", "log.tensorboard=false", "device=cpu"])
    assert found == (
        run_folder,
        {"total_steps": 2e6, "log.tensorboard": False, "device": "cpu"},
        None,
    )
    assert found is not None and found.env is None


def test_the_environment_of_a_resumed_run_may_be_named(run_folder: Path) -> None:
    """That is the user's word that it may be imported."""
    for word in ("env=Hopper-v5", "env.id=Hopper-v5"):
        found = resume_request([f"resume={run_folder}", word])
        assert found is not None and found.env == "Hopper-v5"


@pytest.mark.parametrize(
    "override", ["agent.gamma=0.9", "seed=1", "env=Ant-v5", "agent=sac", "~log.every", "run_dir=x"]
)
def test_resume_names_what_it_may_not_change(run_folder: Path, override: str) -> None:
    key = override.lstrip("~").partition("=")[0]
    with pytest.raises(
        RloptError, match=f"^{key}: a resumed run keeps its own; only total_steps, device, on_nonfinite"
    ):
        resume_request([f"resume={run_folder}", override])


def test_resume_of_nothing_says_what_lies_near(run_folder: Path) -> None:
    with pytest.raises(RloptError, match=r"no run lies there \(no config.yaml\); did you mean .*runs/first\?"):
        resume_request([f"resume={run_folder.parent}/frist"])


def test_resume_null_is_a_new_run() -> None:
    words = ["env=Hopper-v5", "resume=null"]
    assert resume_request(words) is None
    assert compose(words) == compose(words[:1])
    assert compose(["resume=null"]) == compose([])
