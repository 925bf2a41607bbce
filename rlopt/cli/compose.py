"""From command-line overrides to a checked configuration. The only module that knows Hydra.

Hydra picks the files of the groups and merges them and the overrides into plain data; whether an option exists and fits
is decided by ``rlopt.training`` afterwards. So every value override is handed to Hydra as a forced one (``++``),
and ``agent.learning_rate=1e-3`` works although no file mentions it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from rlopt.cli.paths import config_dirs, group_files, shipped_configs
from rlopt.config import defaults, hint, nearest, refuse
from rlopt.loops.configuration import RESUMABLE, TrainConfig, train_config
from rlopt.registry import agent_names, get_agent, load_extensions, sampler_names
from rlopt.runs.run_folder import RunFolder
from rlopt.types import RloptError

EXAMPLE = "sac_pendulum"
"""The experiment that runs when neither an environment nor an experiment is named."""


def compose(overrides: Sequence[str], extra_dirs: Sequence[str] = ()) -> TrainConfig:
    """The configuration that ``overrides`` describe; ``extra_dirs`` are further folders of config groups.

    Raises RloptError in one line for whatever cannot be read, found or accepted.
    """
    parsed = _single(overrides)
    given = {o.key_or_group: o for o in parsed}
    if "resume" in given and given["resume"].value() is None:
        parsed = [o for o in parsed if o.key_or_group != "resume"]
    load_extensions()
    dirs = config_dirs(extra_dirs)
    groups = _groups(dirs)
    lines = [line for override in parsed for line in _for_hydra(override, groups)]
    agents = [str(given[key].value()) for key in ("agent", "agent.name") if key in given]
    if not given.keys() & {"experiment", "env", "env.id"} and set(agents) <= {"sac"}:
        lines.insert(0, f"experiment={EXAMPLE}")
    preset = "experiment" in given and "env" in given and str(given["env"].value()) in groups["env"]
    own = [line for line in lines if line.lstrip("+~").startswith(("env=", "env."))] if preset else []
    settings = _with_hydra(lines, dirs, own)
    if isinstance(folder := settings.get("run_dir"), str):
        settings["run_dir"] = os.path.expanduser(folder)
    try:
        return train_config(settings)
    except RloptError as error:
        if (better := _misfit(error, settings["experiment"], given)) is not None:
            raise better from error
        raise


def _misfit(error: RloptError, experiment: str | None, given: Mapping[str, Override]) -> RloptError | None:
    """Where ``error`` is of an option that the experiment sets and the user's own choice lacks, one that says so."""
    key, unknown, _ = str(error).partition(": no such option")
    group = key.partition(".")[0]
    chosen = [f"{k}={o.value()}" for k, o in given.items() if k in (group, f"{group}.name", f"{group}.id")]
    typed = any(f"{k}.".startswith(f"{key}.") or f"{key}.".startswith(f"{k}.") for k in given if k != group)
    if experiment is None or not unknown or "." not in key or not chosen or typed:
        return None
    return RloptError(
        f"experiment={experiment} does not fit {chosen[-1]}, which has no {key}; add '~{key}', or leave experiment out"
    )


def resume_request(overrides: Sequence[str]) -> tuple[Path, dict[str, Any]] | None:
    """The run folder that ``resume=`` names and the options changed beside it, or None where no run is resumed.

    Raises RloptError for an option that a resumed run keeps, and for a folder that holds no run.
    """
    parsed = _single(overrides)
    run = next((o.value() for o in reversed(parsed) if o.key_or_group == "resume"), None)
    if run is None:
        return None
    folder = Path(os.path.expanduser(str(run)))
    if not (folder / "config.yaml").is_file():
        near = nearest(folder.name, [p.parent.name for p in folder.parent.glob("*/config.yaml")])
        advice = f"; did you mean {folder.parent / near}?" if near else ""
        raise RloptError(f"resume={run}: no run lies there (no config.yaml){advice}")
    changes = OmegaConf.create({"log": RunFolder(folder).config().get("log", {})})
    for override in parsed:
        key = override.key_or_group
        if key == "resume":
            continue
        top = key.split(".")[0]
        if top not in TrainConfig.__dataclass_fields__:
            refuse(key, top, list(TrainConfig.__dataclass_fields__), "")
        if top not in RESUMABLE or override.is_delete():
            may = "total_steps, device, on_nonfinite and log.…"
            raise RloptError(f"{key}: a resumed run keeps its own; only {may} go with resume=")
        OmegaConf.update(changes, key, override.value(), force_add=True)
    return folder, {str(k): v for k, v in OmegaConf.to_container(changes).items()}  # type: ignore[union-attr]


def parse(overrides: Sequence[str]) -> list[Override]:
    """Overrides in Hydra's grammar, or one line about the first that is none."""
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            if "=" not in text:
                raise RloptError(f"{text}: expected OPTION=VALUE, such as env=HalfCheetah-v5") from error
            key = text.partition("=")[0]
            raise RloptError(f"{text}: the value cannot be read; write it in double quotes: '{key}=\"…\"'") from error
        if override.key_or_group == "resume" and override.is_delete():
            raise RloptError(f"{text}: leave resume out instead")
        if override.is_hydra_override():
            raise RloptError(f"{text}: Hydra writes nothing here; the run folder is run_dir=…")
        parsed.append(override)
    return parsed


def split(overrides: Sequence[str]) -> list[list[str]]:
    """The jobs of a multirun: the product of all overrides that list several values, the last one varying fastest.

    ``run_dir=D`` becomes ``D/0``, ``D/1`` and so on.
    """
    choices: dict[str, list[str]] = {}
    for override in parse(overrides):
        key = override.get_key_element()
        if not override.is_sweep_override():
            choices[key] = [override.input_line or ""]
        elif override.is_discrete_sweep():
            choices[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            raise RloptError(f"{override.input_line}: an interval cannot be run through; list its values")
    jobs = [list(job) for job in itertools.product(*choices.values())]
    if len(choices.get("run_dir", [])) == 1:
        folder = Path(str(parse(choices["run_dir"])[0].value()))
        jobs = [[_run_dir(folder / str(i)) if t.startswith("run_dir=") else t for t in job]
                for i, job in enumerate(jobs)]  # fmt: skip
    return jobs


def _run_dir(folder: Path) -> str:
    """``run_dir=…``, in quotes only where Hydra would read something else without them."""
    plain = f"run_dir={folder}"
    try:
        if parse([plain])[0].value() == str(folder):
            return plain
    except RloptError:
        pass
    return f"run_dir={_quote(str(folder))}"


def _single(overrides: Sequence[str]) -> list[Override]:
    parsed = parse(overrides)
    for override in parsed:
        if override.is_sweep_override():
            key = override.get_key_element()
            raise RloptError(f"{override.input_line}: several values; add --multirun to run each, or write {key}='…'")
    return parsed


def _groups(dirs: Sequence[Path]) -> dict[str, set[str]]:
    """Every config group and its options. What is registered needs no file: a name alone is a configuration."""
    names = {p.name for folder in dirs for p in folder.iterdir() if p.is_dir() and not p.name.startswith(("_", "."))}
    groups = {name: set(group_files(name, dirs)) for name in sorted(names)}
    for group, registered in (("agent", agent_names()), ("buffer", sampler_names())):
        options = groups.setdefault(group, set())
        for name in registered:
            if name not in options:
                ConfigStore.instance().store(group=group, name=name, node={"name": name}, provider="rlopt")
                options.add(name)
    return groups


def _for_hydra(override: Override, groups: Mapping[str, set[str]]) -> list[str]:
    """What Hydra is told: a group's option as it is, any other value as a forced one."""
    key, text = override.key_or_group, override.input_line or ""
    if key not in groups:
        return [text if override.is_delete() else "++" + text.lstrip("+")]
    if override.is_delete():
        raise RloptError(f"{text}: a group is not left out; choose another {key}")
    value = override.value()
    if isinstance(value, dict):
        raise RloptError(f"{text}: {key} takes a name; its options are set one by one, as in {key}.name=…")
    if isinstance(value, list) and key in ("agent", "env", "buffer"):
        each = ",".join(str(v) for v in value)
        raise RloptError(f"{text}: {key} takes one name; -m {key}={each} runs each")
    if value is None:
        if key == "experiment":
            return []
        raise RloptError(f"{text}: name one; `rlopt list {key}s` shows what there is")
    names = [str(v) for v in value] if isinstance(value, list) else [str(value)]
    unknown = [name for name in names if name not in groups[key]]
    if key == "env" and len(names) == 1 and unknown:
        return ["env=default", f"++env.id={_quote(names[0])}"]
    if unknown:
        raise RloptError(f"{text}: no such {key}; {hint(unknown[0], groups[key])}")
    return [text.lstrip("+")]


class _SearchPath(SearchPathPlugin):
    """Puts outside folders before the shipped one, so that a file of theirs wins over one of the same name."""

    dirs: Sequence[Path] = ()

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in reversed(self.dirs):
            search_path.prepend(provider="rlopt", path=f"file://{folder}")


def _with_hydra(lines: Sequence[str], dirs: Sequence[Path], env_lines: Sequence[str]) -> dict[str, Any]:
    """Compose, lay the agent's defaults underneath so that ``${agent.gamma}`` resolves, and resolve.

    ``env_lines`` are those of an environment's preset: Hydra would lay the experiment's environment over it, so it is
    composed apart.
    """
    Plugins.instance().register(_SearchPath)
    _SearchPath.dirs = [d for d in dirs if d != shipped_configs()]
    left_out = [line for line in lines if line.startswith("~") and "=" not in line]
    lines, env_lines = ([line for line in some if line not in left_out] for some in (lines, env_lines))
    try:
        with initialize_config_dir(str(shipped_configs()), job_name="rlopt", version_base="1.3"):
            composed = hydra_compose("train", lines, return_hydra_config=True)
            env = hydra_compose("train", env_lines).env if env_lines else composed.env
        chosen = composed.hydra.runtime.choices.get("experiment")
        tree = OmegaConf.to_container(composed, resolve=False)
        assert isinstance(tree, dict)
        settings: dict[str, Any] = {str(k): v for k, v in tree.items() if k != "hydra"}
        settings["env"] = OmegaConf.to_container(env, resolve=False)
        for line in left_out:
            _leave_out(settings, line[1:])
        settings["experiment"] = chosen if isinstance(chosen, str) and chosen != "null" else None
        agent = settings.get("agent")
        name = agent.get("name") if isinstance(agent, dict) else None
        if isinstance(name, str):
            settings["agent"] = OmegaConf.merge(defaults(get_agent(name).config_class), agent)
        merged = OmegaConf.merge(defaults(TrainConfig, without=("agent", "buffer")), settings)
        resolved = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise RloptError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    except (HydraException, YAMLError) as error:
        raise RloptError(" ".join(str(error).split())) from error
    finally:
        _SearchPath.dirs = ()
    assert isinstance(resolved, dict)
    return {str(k): v for k, v in resolved.items()}


def _leave_out(settings: dict[str, Any], key: str) -> None:
    """Delete a dotted key. Hydra itself does not find one whose value is null."""
    *groups, last = key.split(".")
    node: Any = settings
    for name in groups:
        node = node.get(name) if isinstance(node, dict) else None
    if not isinstance(node, dict) or last not in node:
        raise RloptError(f"~{key}: no file sets this option, so there is nothing to leave out")
    del node[last]


def _quote(text: str) -> str:
    return QuotedString(text=text, quote=Quote.single).with_quotes()
