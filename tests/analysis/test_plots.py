import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from rlopt.analysis.plots import draw_run, draw_runs, format_steps
from rlopt.analysis.reference import reference
from rlopt.analysis.run_results import load_run
from rlopt.types import RloptError

MakeRun = Callable[..., Path]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, so that a test can ask what is in them."""
    figures: list[Figure] = []
    save = Figure.savefig

    def spy(self: Figure, *arguments: Any, **options: Any) -> None:
        figures.append(self)
        save(self, *arguments, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", spy)
    return figures


def _legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def _line(figure: Figure, label: str, axes: int = 0) -> tuple[list[float], list[float]]:
    (line,) = [line for line in figure.axes[axes].lines if line.get_label() == label]
    return list(line.get_xdata()), list(line.get_ydata())


def test_draw_run_shows_evaluations_training_and_references(
    tmp_path: Path, make_run: MakeRun, drawn: list[Figure]
) -> None:
    training = [(1000, -200.0), (2000, 0.0), (3000, 50.0)]
    folder = make_run("a", {5000: [10.0, 30.0], 10000: [100.0, 140.0]}, seed=4, training=training)
    draw_run(folder, tmp_path / "deep" / "curve.png")
    assert imread(tmp_path / "deep" / "curve.png").shape[2] == 4
    (figure,) = drawn
    label = "sac, seed 4: mean of 2 episodes, 95 % interval"
    assert _line(figure, label) == ([5000, 10000], [20.0, 120.0])
    assert _line(figure, "training episodes") == ([1000, 2000, 3000], [-200.0, 0.0, 50.0])
    assert _legend(figure)[2:] == ["Tianshou SAC (v3, 10 seeds)", "SimbaV2-repository SAC (v4, 10 seeds)"]
    # The published curves go on to a million steps; the axis ends where the run does.
    assert figure.axes[0].get_xlim() == (0, 10_000)
    assert figure.axes[0].get_ylim()[1] < 3000
    assert figure.axes[0].get_xlabel() == "environment steps"


def test_draw_run_averages_many_training_episodes(tmp_path: Path, make_run: MakeRun, drawn: list[Figure]) -> None:
    training = [(10 * i, float(i % 2)) for i in range(4000)]
    draw_run(make_run("a", {}, env="Pendulum-v1", training=training), tmp_path / "curve.png")
    steps, returns = _line(drawn[0], "training episodes")
    assert len(steps) == 400
    assert returns == [0.5] * 400


def test_draw_run_of_several_seeds_and_of_a_solver(tmp_path: Path, make_run: MakeRun, drawn: list[Figure]) -> None:
    folder = make_run("a", {}, env="Chain-v0", agent={"name": "value_iteration"})
    rows = ["step,episode,return,length,run", "1,0,1,9,0", "1,0,5,9,1", "2,0,7,9,0", "2,0,9,9,1"]
    (folder / "evaluations.csv").write_text("\n".join(rows) + "\n")
    draw_run(folder, tmp_path / "curve.png", unit="iterations")
    assert _line(drawn[0], "value_iteration (2 seeds)") == ([1, 2], [3.0, 8.0])
    assert drawn[0].axes[0].get_xlabel() == "iterations"


def test_draw_run_of_one_evaluation_of_one_episode(tmp_path: Path, make_run: MakeRun, drawn: list[Figure]) -> None:
    draw_run(make_run("a", {200: [-3.0]}, env="Pendulum-v1"), tmp_path / "curve.png")
    assert drawn[0].axes[0].lines[0].get_marker() == "o"


def test_nothing_to_draw_yet(tmp_path: Path, make_run: MakeRun) -> None:
    with pytest.raises(RloptError, match="no evaluation and no finished episode yet"):
        draw_run(make_run("a", {}), tmp_path / "curve.png")
    with pytest.raises(RloptError, match="none of these runs has an evaluation"):
        draw_runs([tmp_path / "a"], tmp_path / "curve.png")


@pytest.mark.parametrize("name", ["noext", "", "folder", "new/curve", "new/curve.foo"])
def test_a_picture_has_an_ending(name: str, tmp_path: Path, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run("run", {1000: [1.0, 2.0]})
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RloptError, match=f"^'{name}' is no picture's name; name a .png, .pdf or .svg file$"):
        draw_run(run, name)
    assert sorted(tmp_path.rglob("*")) == before


def test_draw_runs_groups_seeds_and_gives_panels(tmp_path: Path, make_run: MakeRun, drawn: list[Figure]) -> None:
    folders = [
        make_run("a0", {5000: [1.0, 3.0], 10000: [10.0]}, seed=0),
        make_run("a1", {5000: [4.0], 10000: [20.0], 15000: [40.0]}, seed=1),
        make_run("b0", {5000: [7.0]}, env="Pendulum-v1"),
    ]
    table = draw_runs([*folders, folders[0]], tmp_path / "out.png", title="All of them")
    (figure,) = drawn
    assert [axes.get_title() for axes in figure.axes] == ["HalfCheetah-v4", "Pendulum-v1"]
    assert figure.get_suptitle() == "All of them"
    # Aggregated where both seeds were evaluated; the longer one's thin line goes on.
    label = "sac (1\N{EN DASH}2 seeds)"
    assert _line(figure, label) == ([5000, 10000], [3.0, 15.0])
    assert max(line.get_xdata()[-1] for line in figure.axes[0].lines if line.get_linewidth() < 1) == 15000
    assert _line(figure, label, axes=1) == ([5000], [7.0])
    assert _legend(figure)[0] == label
    assert "bootstrap" in figure.legends[0].get_title().get_text()

    own = [row for row in table if row["name"] == "sac"]
    assert [(row["env"], row["step"], row["seeds"], row["mean"]) for row in own] == [
        ("HalfCheetah-v4", 10000, 2, 15.0),
        ("Pendulum-v1", 5000, 1, 7.0),
    ]
    assert own[0]["sd"] == pytest.approx(np.sqrt(50))
    assert (own[0]["iqm"], own[0]["low"], own[0]["high"]) == (15.0, 10.0, 20.0)
    assert np.isnan(own[1]["sd"]) and np.isnan(own[1]["low"])
    assert [row["name"] for row in table[1:3]] == [
        "Tianshou SAC (v3, 10 seeds)",
        "SimbaV2-repository SAC (v4, 10 seeds)",
    ]


def test_draw_runs_tables_the_steps_asked_for(tmp_path: Path, make_run: MakeRun) -> None:
    folder = make_run("a", {100_000: [5000.0], 110_000: [5500.0]})
    table = draw_runs([folder], tmp_path / "out.png", steps=[100_000, 500_000])
    assert [(row["name"].split()[0], row["step"]) for row in table] == [
        ("sac", 100_000),
        ("Tianshou", 100_000),
        ("Tianshou", 500_000),
        ("SimbaV2-repository", 100_000),
        ("SimbaV2-repository", 500_000),
    ]
    assert round(table[3]["mean"]) == 6156


def test_games_are_pooled_on_the_human_scale(tmp_path: Path, make_run: MakeRun, drawn: list[Figure]) -> None:
    """Breakout: 1.7 is random play, 30.5 a human's; Pong: -20.7 and 14.6."""
    for seed, (bricks, points) in enumerate([(30.5, 14.6), (59.3, 14.6)]):
        for name, returns in (("Breakout", {1000: [1.7], 2000: [bricks]}), ("Pong", {1000: [-20.7], 2000: [points]})):
            env: dict[str, object] = {"id": f"ALE/{name}-v5", "kwargs": {}, "protocol": "classic"}
            make_run(f"{name}{seed}", returns, seed=seed, env=env["id"])
            path = tmp_path / f"{name}{seed}" / "config.yaml"
            path.write_text(path.read_text().replace("  kwargs: {}", "  kwargs: {}\n  protocol: classic"))
    folders = sorted(path.parent for path in tmp_path.glob("*/config.yaml"))
    table = draw_runs(folders, tmp_path / "out.png", frames=True)
    (figure,) = drawn
    titles = ["ALE/Breakout-v5", "ALE/Pong-v5", "human-normalised, 2 games, classic"]
    assert [axes.get_title() for axes in figure.axes] == titles
    assert _line(figure, "sac (2 seeds)", axes=2) == ([4000, 8000], [0.0, 1.0])  # the middle of 1, 2, 1, 1
    assert _line(figure, "sac (2 seeds)", axes=1) == ([4000, 8000], [-20.7, 14.6])
    assert figure.axes[0].get_xlabel() == "emulator frames"
    pooled = table[-1]
    assert (pooled["env"], pooled["step"], pooled["seeds"], pooled["iqm"]) == (titles[2], 2000, 4, 1.0)
    assert pooled["mean"] == pytest.approx(1.25) and pooled["low"] <= 1.0 <= pooled["high"]
    other = make_run("other", {1000: [5.0]})
    with pytest.raises(RloptError, match="--frames counts an emulator's: HalfCheetah-v4 has none, or was"):
        draw_runs([other], tmp_path / "out.png", frames=True)


def test_frames_are_those_of_the_frame_skip_that_was_played_with(
    tmp_path: Path, make_run: MakeRun, drawn: list[Figure]
) -> None:
    for name in ("Breakout", "Pong"):
        for skip in (1, 8):
            folder = make_run(f"{name}{skip}", {1000: [1.7], 2000: [3.0]}, env=f"ALE/{name}-v5")
            path = folder / "config.yaml"
            text = path.read_text().replace("  kwargs: {}", f"  kwargs: {{frameskip: {skip}}}\n  protocol: dopamine")
            path.write_text(text)
    draw_runs(sorted(path.parent for path in tmp_path.glob("*/config.yaml")), tmp_path / "out.png", frames=True)
    ends: dict[str, set[int]] = {}
    for axes in drawn[0].axes:
        for line in axes.lines:
            ends.setdefault(str(line.get_label()), set()).add(int(max(line.get_xdata())))  # type: ignore[type-var]
    assert {label: found for label, found in ends.items() if "frameskip" in label} == {
        "sac, env.kwargs.frameskip=1 (1 seed)": {2000},
        "sac, env.kwargs.frameskip=8 (1 seed)": {16_000},
    }


def test_frames_of_a_game_without_a_protocol_are_not_known(tmp_path: Path, make_run: MakeRun) -> None:
    folder = make_run("raw", {1000: [5.0]}, env="ALE/Breakout-v5")
    with pytest.raises(RloptError, match=r"--frames .* was played without env\.protocol, which says how many"):
        draw_runs([folder], tmp_path / "out.png", frames=True)


def test_frames_of_dopamines_curves_and_of_a_game_without_human_score(
    tmp_path: Path, make_run: MakeRun, drawn: list[Figure]
) -> None:
    for name in ("Breakout", "AirRaid"):
        path = make_run(name, {1000: [5.0], 2000: [9.0]}, agent={"name": "dqn"}, env=f"ALE/{name}-v5") / "config.yaml"
        path.write_text(path.read_text().replace("  kwargs: {}", "  kwargs: {}\n  protocol: dopamine"))
    draw_runs([tmp_path / "Breakout", tmp_path / "AirRaid"], tmp_path / "out.png", frames=True)
    for axes in drawn[0].axes:
        published = next(line for line in axes.lines if str(line.get_label()).startswith("Dopamine dqn"))
        assert max(published.get_xdata()) == 200_000_000  # type: ignore[type-var]


def test_a_changed_protocol_is_another_one(tmp_path: Path, make_run: MakeRun) -> None:
    """Dopamine's curves are of sticky actions: nothing is shown beside a run without."""
    folder = make_run("a", {1000: [5.0]}, agent={"name": "dqn"}, env="ALE/Breakout-v5")
    path, found = folder / "config.yaml", []
    text = path.read_text()
    for kwargs in ("{}", "{repeat_action_probability: 0.0}"):
        path.write_text(text.replace("  kwargs: {}", f"  kwargs: {kwargs}\n  protocol: dopamine"))
        run = load_run(folder)
        found.append((run.protocol, len(reference(run.env_id, [run.agent], run.protocol))))
    assert found == [("dopamine", 1), ("dopamine (repeat_action_probability=0.0)", 0)]


def test_pyplot_is_not_used() -> None:
    source = Path(sys.modules[draw_run.__module__].__file__ or "").read_text(encoding="utf-8")
    assert "import matplotlib.pyplot" not in source and "from matplotlib import pyplot" not in source


@pytest.mark.parametrize(
    ("steps", "text"), [(0, "0"), (500, "500"), (25_000, "25k"), (100_000, "100k"), (1_500_000, "1.5M"), (3e6, "3M")]
)
def test_format_steps(steps: float, text: str) -> None:
    assert format_steps(steps) == text
