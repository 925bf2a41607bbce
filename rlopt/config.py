"""Configurations: frozen dataclasses built from plain mappings, every mistake told in one line.

The dataclass is the one place where an option's name, type, default, range and help stand (``option``).
YAML files, overrides and programs all pass through ``build``, so a typo or a wrong type never reaches training.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import inspect
import math
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, Union

from rlopt.errors import RloptError

Config = typing.TypeVar("Config")
_MARK = "_built"
"""The attribute of what ``build`` has made."""


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[Any, ...] | None = None,
    needs: Mapping[str, tuple[Any, ...]] | None = None,
) -> Any:
    """Return a dataclass field of a configuration, with the facts that ``rlopt.config.build`` checks.

    ``low``/``high`` are inclusive bounds, ``above`` an exclusive lower one, ``choices`` the words allowed.
    ``needs`` says what the option counts with, {name of an option beside it: its values}: one of them at least, or a
    value that is not the default is refused. A mutable or nested default is given as a zero-argument factory.
    """
    meta = {"help": help, "low": low, "high": high, "above": above, "choices": choices, "needs": needs}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


def nearest(word: str, words: Iterable[str]) -> str | None:
    """Return the entry of ``words`` that ``word`` was most likely meant to be, or None where nothing is near."""
    by_lower = {w.lower(): w for w in words}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def hint(word: str, words: Collection[str]) -> str:
    """Return the end of an error line: the nearest right word, or else what there is to choose from."""
    near = nearest(word, words)
    if near is not None:
        return f"did you mean {near}?"
    return f"choose from {', '.join(sorted(words))}" if words else "there is none"


def build(cls: type[Config], mapping: Mapping[str, Any], where: str = "agent") -> Config:
    """Build the frozen dataclass ``cls`` from a mapping; options left out keep their defaults.

    Nested dataclasses are built from nested mappings. A float may be given as an integer or as text such as ``1e-3``
    (which YAML readers leave as text), an integer as a whole float (``1e6``), a tuple as a list.
    Raises RloptError, in one line that names the dotted option, for an unknown or missing option, a wrong type, a
    value out of range or not among the choices, one that has no effect beside the others (``needs``), and for whatever
    ``cls.__post_init__`` rejects by RloptError.
    """
    if not isinstance(mapping, Mapping):
        raise RloptError(f"{where or cls.__name__}: expected options (key: value), got {_shown(mapping)}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    types_ = typing.get_type_hints(cls)
    _refuse_unknown(mapping, fields, where, _nested_names(cls))
    values = {}
    for name, f in fields.items():
        key = join(where, name)
        if name in mapping:
            values[name] = checked_value(mapping[name], types_[name], f.metadata, key)
        elif _default(f) is dataclasses.MISSING:
            raise RloptError(f"{key}: must be given; add {key}=…")
    made = cls(**values)
    _refuse_idle(made, where)
    object.__setattr__(made, _MARK, True)  # gone in what dataclasses.replace makes of it
    return made


def checked(config: Config, where: str = "agent") -> Config:
    """Return ``config`` itself where ``build`` made it, else a checked copy of what was made by hand."""
    return config if hasattr(config, _MARK) else build(type(config), to_dict(config), where)


def changed(config: Config, where: str = "agent", **values: Any) -> Config:
    """Return ``config`` with other ``values``, checked."""
    return build(type(config), {**to_dict(config), **values}, where)


def with_arguments(cls: type[Config], target: type[Any]) -> type[Config]:
    """Return a subclass of the dataclass ``cls`` whose further options are the arguments of ``target``'s constructor
    that have defaults, with the help that the ``Args:`` of its docstring give."""
    types_ = typing.get_type_hints(target.__init__)
    told = _arguments(target)
    fields = [
        (name, types_.get(name, Any), option(partial(copy.deepcopy, default), told.get(name, "")))
        for name, default in call_options(target).items()
    ]
    made: type[Config] = dataclasses.make_dataclass(
        f"{cls.__name__}Of{target.__name__}", fields, bases=(cls,), namespace={"__module__": cls.__module__},
        frozen=True, kw_only=True,
    )  # fmt: skip
    return made


def _arguments(cls: type[Any]) -> dict[str, str]:
    """Return what the ``Args:`` of a class's docstring say of each."""
    found: dict[str, str] = {}
    name = ""
    _, _, text = (inspect.getdoc(cls) or "").partition("\nArgs:\n")
    for line in text.partition("\n\n")[0].splitlines():
        if line.startswith("        "):
            found[name] += " " + line.strip()
        else:
            name, _, what = line.strip().partition(": ")
            found[name] = what
    return found


def call_options(target: Callable[..., Any]) -> dict[str, Any]:
    """Return names and defaults of the optional keyword arguments of ``target``."""
    named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(target).parameters.values()
    return {p.name: plain(p.default) for p in parameters if p.kind in named and p.default is not p.empty}


def defaults(cls: type[Any], without: Collection[str] = ()) -> dict[str, Any]:
    """Return the defaults of a dataclass as plain data (nested dicts, lists for tuples), without options that have none
    and those named in ``without``."""
    found = {f.name: _default(f) for f in dataclasses.fields(cls) if f.init and f.name not in without}
    return {name: plain(value) for name, value in found.items() if value is not dataclasses.MISSING}


def default_of(cls: type[Any], name: str) -> Any:
    """Return the default of one option of a dataclass."""
    return _default(cls.__dataclass_fields__[name])


def over(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested options ``base`` with those of ``given`` in their place."""
    found = dict(base)
    for key, value in given.items():
        below = found.get(key)
        found[key] = over(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return found


def to_dict(obj: Any) -> dict[str, Any]:
    """Return a built configuration as plain data, ready for YAML or JSON; ``build`` turns it back into an equal
    object."""
    return {f.name: plain(getattr(obj, f.name)) for f in dataclasses.fields(obj) if f.init}


def plain(value: Any) -> Any:
    """Turn dataclasses to dicts, tuples to lists, paths to text; everything else as it is."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def option_names(cls: type[Any], where: str = "") -> list[str]:
    """Return dotted names of every option of a dataclass, nested ones included."""
    names = []
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            names += option_names(kind, join(where, name))  # type: ignore[arg-type]
        else:
            names.append(join(where, name))
    return names


def join(where: str, name: str) -> str:
    """Return a dotted option name."""
    return f"{where}.{name}" if where else name


def refuse(key: str, name: str, words: Collection[str], where: str, elsewhere: Iterable[str] = ()) -> typing.NoReturn:
    """Raise the one line for an unknown option: a near name in the same group, else the same name in another one."""
    dotted = {n.rsplit(".", 1)[-1]: n for n in elsewhere}
    near = _elsewhere_called(name, words, dotted) or nearest(name, words)
    if near is None:
        last = nearest(name, dotted)
        near = dotted[last] if last else None
    if near is not None:
        meant = near.removeprefix(".") if near.startswith(".") else join(where, near)
        raise RloptError(f"{key}: no such option; did you mean {meant}?")
    if not words:
        raise RloptError(f"{key}: no such option; {where} has none")
    raise RloptError(f"{key}: no such option; choose from {', '.join(join(where, w) for w in sorted(words))}")


CALLED: dict[str, tuple[str, ...]] = {
    "lr": ("learning_rate",),
    "actor_lr": ("actor_learning_rate", "learning_rate"),
    "alpha_lr": ("temperature_learning_rate",),
    "lr_actor": ("actor_learning_rate", "learning_rate"),
    "discount": ("gamma",),
    "polyak": ("tau",),
    "rho": ("tau",),
    "ent_coef": ("temperature", "entropy_coefficient"),
    "ent_weight": ("temperature", "entropy_coefficient"),
    "alpha": ("temperature",),
    "init_alpha": ("initial_temperature",),
    "vf_coef": ("value_coefficient",),
    "clip_range": ("clip",),
    "clip_coef": ("clip",),
    "n_epochs": ("epochs",),
    "update_epochs": ("epochs",),
    "n_steps": ("rollout_steps", "n_step"),
    "num_steps": ("rollout_steps", ".total_steps"),
    "lam": ("gae_lambda",),
    "lambda": ("gae_lambda",),
    "bs": ("batch_size",),
    "minibatch_size": ("batch_size",),
    "utd": ("update_ratio",),
    "utd_ratio": ("update_ratio",),
    "gradient_steps": ("update_ratio",),
    "train_freq": ("update_ratio",),
    "start_steps": ("warmup_steps",),
    "random_steps": ("warmup_steps",),
    "policy_frequency": ("policy_delay",),
    "policy_noise": ("target_noise",),
    "noise_clip": ("target_noise_clip",),
    "net_arch": ("network.hidden",),
    "hidden_sizes": ("network.hidden",),
    "layers": ("network.hidden",),
    "buffer_size": (".buffer.capacity",),
    "replay_size": (".buffer.capacity",),
    "size": ("capacity",),
    "total_timesteps": (".total_steps",),
    "steps": (".total_steps",),
    "timesteps": (".total_steps",),
    "n_envs": (".num_envs",),
    "n_seeds": (".num_runs",),
    "env_id": (".env",),
    "output_dir": (".run_dir",),
    "logdir": (".run_dir",),
    "eval_freq": (".eval.every",),
    "n_eval_episodes": (".eval.episodes",),
    "max_episode_steps": (".env.kwargs.max_episode_steps",),
    "capture_video": (".log.video_every",),
    "track": (".log.to",),
    "render_mode": (".env.kwargs.render_mode",),
}
"""What other libraries call an option: its name here in the same group, or, after a dot, its whole name."""


def _elsewhere_called(name: str, words: Collection[str], dotted: Mapping[str, str]) -> str | None:
    """Return what an option of another library is called here, where the chosen agent has that one."""
    known = CALLED.get(name.lower(), ())
    here = (word for word in known if word.startswith(".") or word.partition(".")[0] in words)
    return next(here, next((dotted[word] for word in known if word in dotted), None))


def _refuse_unknown(
    mapping: Mapping[str, Any], known: Collection[str], where: str, elsewhere: Iterable[str] = ()
) -> None:
    for name in mapping:
        if name not in known:
            refuse(join(where, str(name)), str(name), known, where, elsewhere)


def _refuse_idle(config: Any, where: str) -> None:
    """Refuse options away from their defaults without what they need beside them: they would be ignored in silence."""
    for f in dataclasses.fields(config):
        needs = f.metadata.get("needs")
        if not needs or any(getattr(config, name) in wanted for name, wanted in needs.items()):
            continue
        if (value := getattr(config, f.name)) == _default(f):
            continue
        words = [f"{join(where, name)}={_word(one)}" for name, wanted in needs.items() for one in wanted]
        given = "" if dataclasses.is_dataclass(value) else f"={_word(value)}"
        raise RloptError(
            f"{join(where, f.name)}{given} has no effect without {' or '.join(words)}; add that, or leave it out"
        )


def _word(value: Any) -> str:
    return value if isinstance(value, str) else _shown(value)


def _nested_names(cls: type[Any]) -> list[str]:
    return [name for name in option_names(cls) if "." in name]


def _default(f: dataclasses.Field[Any]) -> Any:
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return f.default


def checked_value(value: Any, kind: Any, metadata: Mapping[str, Any], key: str) -> Any:
    """Return ``value`` as ``kind``, inside the range and choices that ``option`` declared; else raise RloptError."""
    found, ok = _convert(value, kind, key)
    if not ok:
        raise RloptError(f"{key}: expected {_describe(kind)}, got {_shown(value)}")
    for element in found if isinstance(found, (list, tuple)) else (found,):
        # What somebody else's environment takes is not ours to know, but for what is no number at all.
        if kind is not Any or (isinstance(element, float) and math.isnan(element)):
            _check_element(element, metadata, key)
    return found


def _check_element(value: Any, metadata: Mapping[str, Any], key: str) -> None:
    choices = metadata.get("choices") or ()
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        _check_range(value, metadata, key)
    if choices and value is not None and value not in choices:
        raise RloptError(f"{key}: no such choice {_shown(value)}; {hint(str(value), [str(c) for c in choices])}")


def _told(number: float) -> str:
    """Return a number in a message: whole ones to the last digit."""
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


def _check_range(value: float, metadata: Mapping[str, Any], key: str) -> None:
    low, high, above = (metadata.get(k) for k in ("low", "high", "above"))
    if not math.isfinite(value):
        raise RloptError(f"{key}: expected a finite number, got {value:g}")
    if low is not None and value < low:
        raise RloptError(f"{key}: must be at least {_told(low)}, got {_told(value)}")
    if above is not None and value <= above:
        raise RloptError(f"{key}: must be above {_told(above)}, got {_told(value)}")
    if high is not None and value > high:
        raise RloptError(f"{key}: must be at most {_told(high)}, got {_told(value)}")


def _convert(value: Any, kind: Any, key: str) -> tuple[Any, bool]:
    """``value`` as ``kind`` and True, or anything and False; a mistake inside a nested option raises at once."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return plain(value), True
    if origin in (Union, types.UnionType):
        # What already has the type goes first, so that `float | str` keeps 1 a number and "auto" a word.
        for exact in (True, False):
            for member in args:
                if not exact or _is_exactly(value, member):
                    found, ok = _convert(value, member, key)
                    if ok:
                        return found, True
        return value, False
    if origin is Literal:
        return value, any(value == a and type(value) is type(a) for a in args)
    if dataclasses.is_dataclass(kind):
        made = isinstance(value, typing.cast(type, kind))
        return (checked(value, key) if made else build(kind, value, key)), True  # type: ignore[arg-type]
    if origin in (list, tuple):
        return _convert_sequence(value, origin, args, key)
    if kind in (list, tuple):
        return (kind(value), True) if isinstance(value, (list, tuple)) else (value, False)
    if kind is dict or origin is dict or origin is Mapping:
        if not isinstance(value, Mapping):
            return value, False
        element = args[1] if args else Any
        return {str(k): checked_value(v, element, {}, join(key, str(k))) for k, v in value.items()}, True
    return _convert_scalar(value, kind)


def _convert_sequence(value: Any, origin: Any, args: tuple[Any, ...], key: str) -> tuple[Any, bool]:
    if not isinstance(value, (list, tuple)):
        return value, False
    if origin is list or (len(args) == 2 and args[1] is Ellipsis):
        kinds = [args[0]] * len(value)
    else:
        kinds = list(args)
        if len(kinds) != len(value):
            return value, False
    return origin(
        checked_value(v, k, {}, f"{key}[{i}]") for i, (v, k) in enumerate(zip(value, kinds, strict=True))
    ), True


def _convert_scalar(value: Any, kind: Any) -> tuple[Any, bool]:
    if kind is type(None):
        return None, value is None
    if kind is bool or isinstance(value, bool):
        return value, kind is bool and isinstance(value, bool)
    if kind is float:
        if isinstance(value, (int, float)):
            return float(value), not math.isnan(value)
        number = _number(value)
        return number, number is not None and not math.isnan(number)
    if kind is int:
        number = value if isinstance(value, (int, float)) else _number(value)
        if isinstance(number, float) and number.is_integer():
            number = int(number)
        return number, isinstance(number, int)
    if kind is str:
        # A run folder or name such as `7` reads as a number.
        return str(value), isinstance(value, (str, int, Path)) and value != ""
    if kind is Path:
        return Path(str(value)), isinstance(value, (str, Path))
    return value, isinstance(kind, type) and isinstance(value, kind)


def _number(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, str) else None
    except ValueError:
        return None


def _is_exactly(value: Any, kind: Any) -> bool:
    origin = typing.get_origin(kind)
    if origin is Literal:
        return value in typing.get_args(kind)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is (origin or kind)


_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
    dict: "options (key: value)",
    Path: "a path",
}


def _describe(kind: Any) -> str:
    """Return what an option of this type looks like, in words."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(a) for a in args)
    if origin is Literal:
        return " or ".join(str(a) for a in args)
    if origin is tuple and args[-1] is not Ellipsis:
        return f"a list of {len(args)}: [{', '.join(_describe(a) for a in args)}]"
    if origin in (list, tuple):
        return f"a list, each {_describe(args[0])}"
    return _NAMES.get(origin or kind, getattr(kind, "__name__", str(kind)))


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return repr(value) if isinstance(value, str) else str(value)
