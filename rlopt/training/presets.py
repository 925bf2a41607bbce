"""From words to a configuration: presets and files of config groups, as Hydra composes them, below what is given.

Hydra picks the files of the groups and merges them and the overrides into plain data; whether an option exists and fits
is decided afterwards, by ``rlopt.loops.configuration``. So every value override is handed to Hydra as a forced one
(``++``), and ``agent.learning_rate=1e-3`` works although no file mentions it. The only module, beside the grammar of
command lines in ``rlopt.cli.compose``, that knows Hydra.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

from rlopt.config import defaults, hint, over, plain
from rlopt.errors import RloptError
from rlopt.registry import agent_names, agent_presets, get_agent, load_extensions, sampler_names
from rlopt.training.config_files import config_dirs, group_files, shipped_configs
from rlopt.training.early import refuse_mistakes

if TYPE_CHECKING:  # which needs torch: a word that names nothing is told before that is imported
    from rlopt.loops.configuration import TrainConfig

GROUPS = ("experiment", "agent", "env", "buffer")
"""Options that a word chooses a file for."""


def train_config(options: Mapping[str, Any], config_dir: str | Path | Sequence[str | Path] = ()) -> TrainConfig:
    """Return the checked, complete configuration of a run from the same words as on the command line.

    ``options`` is a mapping of the options of ``TrainConfig``, nested (``{"agent": {"name": "sac", "tau": 0.01}}``) or
    dotted (``{"agent": "sac", "agent.tau": 0.01}``). Where ``experiment``, ``agent``, ``env`` or ``buffer`` is a word,
    it chooses a preset, a file of config groups or a registered name, and what is given beside it wins over that.

    Args:
        config_dir: further folders of config groups.

    Raises:
        RloptError: one line that names the option: unknown, of a wrong type, out of range, or not registered.
    """
    load_extensions()
    from rlopt.loops.configuration import build_config

    words, values = _sorted(options)
    if not words:
        return build_config(values)
    folders = [config_dir] if isinstance(config_dir, str | Path) else config_dir
    overrides = parse([f"{group}={quote(word)}" for group, word in words.items()])
    return compose(overrides, [str(folder) for folder in folders], values)


def _sorted(options: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the words that choose a file, by group, and all other options as nested mappings."""
    words: dict[str, str] = {}
    values: dict[str, Any] = {}
    for name, value in sorted(options.items(), key=lambda item: item[0].count(".")):
        if name in GROUPS and (isinstance(value, str) or value is None):
            words |= {} if value is None else {name: value}
            continue
        *groups, last = name.split(".")
        node = values
        for group in groups:
            node[group] = node = plain(node.get(group) or {})
        node[last] = value
    return words, values


def compose(
    overrides: Sequence[Override], extra_dirs: Sequence[str] = (), values: Mapping[str, Any] | None = None
) -> TrainConfig:
    """Return the configuration that ``overrides`` and, on top of them, ``values`` describe.

    Raises RloptError in one line for whatever cannot be found or accepted.
    """
    given = {o.key_or_group: o for o in overrides}
    dirs = config_dirs(extra_dirs)
    groups = _groups(dirs)
    lines = [line for override in overrides for line in _for_hydra(override, groups)]
    preset = "experiment" in given and "env" in given and str(given["env"].value()) in groups["env"]
    own = [line for line in lines if line.lstrip("+~").startswith(("env=", "env."))] if preset else []
    experiment = given["experiment"].value() if "experiment" in given else None
    try:
        settings = _with_hydra(lines, dirs, own, values or {})
        from rlopt.loops.configuration import build_config

        return build_config(settings)
    except RloptError as error:
        if (better := _misfit(error, experiment if isinstance(experiment, str) else None, given)) is not None:
            raise better from error
        raise


def check_words(overrides: Sequence[Override], extra_dirs: Sequence[str] = ()) -> None:
    """Raise RloptError where a word chooses what is not there; imports no torch."""
    groups = _groups(config_dirs(extra_dirs))
    for override in overrides:
        _for_hydra(override, groups)


def _misfit(error: RloptError, experiment: str | None, given: Mapping[str, Override]) -> RloptError | None:
    """Return where ``error`` is of an option that the experiment sets and the user's own choice lacks, one that says
    so."""
    key, unknown, _ = str(error).partition(": no such option")
    group = key.partition(".")[0]
    chosen = [f"{k}={o.value()}" for k, o in given.items() if k in (group, f"{group}.name", f"{group}.id")]
    typed = any(f"{k}.".startswith(f"{key}.") or f"{key}.".startswith(f"{k}.") for k in given if k != group)
    if experiment is None or not unknown or "." not in key or not chosen or typed:
        return None
    return RloptError(
        f"experiment={experiment} does not fit {chosen[-1]}, which has no {key}; add '~{key}', or leave experiment out"
    )


def parse(overrides: Sequence[str]) -> list[Override]:
    """Return overrides in Hydra's grammar, or raise one line about the first that is none."""
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
            raise RloptError(f"{text}: {_not_hydras(override.key_or_group)}")
        parsed.append(override)
    return parsed


def _not_hydras(key: str) -> str:
    """Return what is there in place of an option of Hydra's."""
    if key.startswith(("hydra/sweeper", "hydra/launcher", "hydra.sweep", "hydra.launcher")):
        return (
            "Hydra's sweepers and launchers run nothing here; `rlopt train -m KEY=A,B,C` runs each, and a search of "
            "your own calls rlopt.train"
        )
    return "Hydra writes nothing here; the run folder is run_dir=…"


def _groups(dirs: Sequence[Path]) -> dict[str, set[str]]:
    """Return every config group and its options. What is registered needs no file: a name alone is a configuration."""
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
    """Return what Hydra is told: a group's option as it is, any other value as a forced one."""
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
        return ["env=default", f"++env.id={quote(names[0])}"]
    if unknown:
        raise RloptError(f"{text}: no such {key}; {hint(unknown[0], groups[key])}")
    return [text.lstrip("+")]


class _SearchPath(SearchPathPlugin):
    """Puts outside folders before the shipped one, so that a file of theirs wins over one of the same name."""

    dirs: Sequence[Path] = ()

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in reversed(self.dirs):
            search_path.prepend(provider="rlopt", path=f"file://{folder}")


def _with_hydra(
    lines: Sequence[str], dirs: Sequence[Path], env_lines: Sequence[str], values: Mapping[str, Any]
) -> dict[str, Any]:
    """Compose, put ``values`` on top, lay the agent's defaults underneath so that ``${agent.gamma}`` resolves, and
    resolve.

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
        layers = [settings, plain(values)]
        if "torch" not in sys.modules:
            refuse_mistakes(over(settings, plain(values)))
        from rlopt.loops.configuration import TrainConfig

        under = defaults(TrainConfig, without=("agent", "buffer"))
        if isinstance(name := OmegaConf.select(OmegaConf.merge(*layers), "agent.name"), str):
            under["agent"] = over(defaults(get_agent(name).config_class), agent_presets(name).get("agent", {}))
        merged = OmegaConf.merge(under, *layers)
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


def quote(text: str) -> str:
    return QuotedString(text=text, quote=Quote.single).with_quotes()
