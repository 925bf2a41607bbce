"""What a language model is asked in a text game, and what its answer means.

Every step is a question of its own, with the last few steps in it, so that a long episode needs no long context (the
step-independent rollout of GiGPO's released code). The sentences are rlopt's; what they say, and in which order, is as
there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rlopt.envs.text.game import Seen
from rlopt.types import option

ACTION = re.compile(r"<action>(.*?)</action>", re.DOTALL)
THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
OPEN, CLOSE = "<action>", "</action>"
TAIL = 30
"""Characters at the end of an answer without tags that are taken for its action (released code)."""


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """What is asked."""

    prompt: str = option(
        "full",
        "full sentences, for models that have learnt a language; short: what is seen and what can be done, no more",
        choices=("full", "short"),
    )
    history: int = option(2, "earlier steps that a prompt tells", low=0)
    think: bool = option(True, "whether an answer reasons, between <think> tags, before it acts")


class Past(NamedTuple):
    """A step that was made."""

    text: str
    """What was seen."""
    action: str
    """What was done then."""


class Meant(NamedTuple):
    """What an answer means."""

    action: str
    valid: bool
    """Whether it has the tags that were asked for."""


def question(seen: Seen, past: Sequence[Past], c: PromptConfig, think: bool) -> str:
    """Return what is asked about ``seen``, after the steps ``past`` of the episode; with ``think``, to reason first."""
    told = past[len(past) - c.history :] if c.history else []
    offered = "\n".join(seen.admissible)
    if c.prompt == "short":
        done = "".join(f"Done: {step.action}\n" for step in told)
        return f"{seen.task}\n{done}{seen.text}\nActions:\n{offered}\nAnswer:\n"
    lines = [f"You act in a text game. {seen.task}"]
    if past:
        lines.append(f"You have taken {len(past)} step{'s' if len(past) > 1 else ''} so far.")
    if told:
        lines.append("The last of them, and what you saw before each:")
        first = len(past) - len(told) + 1
        for number, step in enumerate(told, first):
            lines.append(f"[step {number}] {step.text.strip()}\n[action {number}] {step.action}")
    lines += [f"You are at step {len(past) + 1}. What you see now:\n{seen.text.strip()}"]
    lines += [f"What you can do now:\n{offered}", ASKED_TO_THINK if think else ASKED]
    return "\n".join(lines)


ASKED = "Choose exactly one of these actions and write it between <action> and </action>."
ASKED_TO_THINK = (
    "First reason step by step about where you are and what helps, between <think> and </think>. Then choose exactly "
    "one of these actions and write it between <action> and </action>."
)


def answer(action: str, c: PromptConfig) -> str:
    """Return a whole answer that does ``action``, without a thought where one is asked for."""
    return f"{'<think></think>' if c.think else ''}{OPEN}{action}{CLOSE}"


def meaning(text: str, c: PromptConfig) -> Meant:
    """Return the action in an answer; of one without tags its last characters, which is not valid."""
    found = ACTION.search(text)
    thought = not c.think or THOUGHT.search(text) is not None
    action = text[-TAIL:] if found is None else found[1]
    return Meant(" ".join(action.split()).lower(), found is not None and thought)
