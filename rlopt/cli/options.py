"""``rlopt train --options``: every option of a configuration, with its value and what it means."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from rlopt.config import join, plain
from rlopt.loops.configuration import TrainConfig
from rlopt.registry import get_agent, get_sampler


def print_options(config: TrainConfig) -> None:
    """Print one line per option: name, value, help, range or choices. Groups follow the top level."""
    rows = [*option_rows(config, "", skip=("agent", "buffer"))]
    for group, chosen, cls in (
        ("agent", config.agent, get_agent(str(config.agent.name))),
        ("buffer", config.buffer, get_sampler(config.buffer.name)),
    ):
        rows += [(group, str(chosen.name), _summary(cls)), *option_rows(chosen, group, skip=("name",))]
    rows.append(
        ("resume", "null", "a run folder to go on with; beside it only total_steps, device, on_nonfinite and log.…")
    )
    width, values = max(len(r[0]) for r in rows), max(min(len(r[1]), 24) for r in rows)
    for name, value, help_text in rows:
        print(f"{name:<{width}}  {value:<{values}}  {help_text}".rstrip())


def option_rows(obj: Any, where: str, skip: tuple[str, ...] = ()) -> Iterator[tuple[str, str, str]]:
    """Yield the dotted name, the value and the help, with range and choices, of every option of a configuration."""
    for f in dataclasses.fields(obj):
        if f.name in skip:
            continue
        value, key = getattr(obj, f.name), join(where, f.name)
        if dataclasses.is_dataclass(value):
            yield from option_rows(value, key)
        else:
            yield key, _text(value), f.metadata.get("help", "") + _bounds(f.metadata)


def _bounds(metadata: Mapping[str, Any]) -> str:
    low, high, above, choices = (metadata.get(k) for k in ("low", "high", "above", "choices"))
    words = [f"at least {low:.10g}" if low is not None else "", f"above {above:.10g}" if above is not None else ""]
    words.append(f"at most {high:.10g}" if high is not None else "")
    words.append("one of " + ", ".join(map(str, choices)) if choices else "")
    needs = [f"{name}={plain(one)}" for name, wanted in (metadata.get("needs") or {}).items() for one in wanted]
    words.append("counts with " + " or ".join(needs).replace("None", "null") if needs else "")
    found = ", ".join(w for w in words if w)
    return f" [{found}]" if found else ""


def _text(value: Any) -> str:
    shown = plain(value)
    return "null" if shown is None else str(shown).lower() if isinstance(shown, bool) else str(shown)


def _summary(cls: type[Any]) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0] if cls.__doc__ else ""
