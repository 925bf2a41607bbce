"""Policies that write: a language model that is asked what to do in a text game.

Their folders hold the model in Hugging Face's format, ``model/`` (and ``adapter/``, where adapters were trained), which
programs without rlopt load as any other.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlopt.config import build
from rlopt.envs.text.game import Seen
from rlopt.files import Digest, adopt_files
from rlopt.nn.actors import Actor, Options
from rlopt.nn.generation import Tokens, choice_log_probs, generate, packs
from rlopt.nn.language import LanguageModel, load_language_model
from rlopt.policy.exported import EvaluationMode, Policy
from rlopt.policy.prompts import CLOSE, OPEN, Past, PromptConfig, answer, meaning, question
from rlopt.types import Act, Carry, EnvSpec, Obs, RloptError, option, resolve_device

FILES = re.compile(r"(?:model|adapter)/[A-Za-z0-9][A-Za-z0-9._-]*\.(?:json|safetensors|jinja|txt|model)")
"""What a policy's folder may hold beside its description: nothing that is a program or a pickle."""
GENERATED, SCORED = {"answers": ("generate",)}, {"answers": ("score",)}


@dataclass(frozen=True, kw_only=True)
class AnswerConfig(PromptConfig):
    """How a language model answers."""

    answers: str = option(
        "generate",
        "what acts: the words that the model writes, or one of the possible actions by how likely it writes it (score)",
        choices=("generate", "score"),
    )
    max_tokens: int = option(64, "tokens of an answer at most", low=1, needs=GENERATED)
    normalised: bool = option(
        True, "divide an action's log-probability by its tokens, else short ones win", needs=SCORED
    )
    max_prompt: int = option(2_048, "tokens of a prompt at most", low=1)
    long_prompts: str = option(
        "error", "what becomes of longer ones: error, or their beginning is left out (cut)", choices=("error", "cut")
    )
    evaluation_temperature: float = option(0.4, "temperature in evaluations", above=0.0)
    tokens_at_once: int = option(
        16_384, "tokens that are read at once, padding included: less needs less memory", low=1
    )

    @property
    def thinks(self) -> bool:
        """Whether answers reason before they act."""
        return self.think and self.answers == "generate"


class Answer(NamedTuple):
    """What a model was asked and said, token by token as it was, and what that means."""

    prompt: Tokens
    tokens: Tokens
    log_prob: list[float]
    """Of each token; of a choice, one number."""
    text: str
    action: str
    valid: bool
    """Whether it has the tags that were asked for."""
    choices: tuple[Tokens, ...] = ()
    """The answers that there were to choose from, where it is a choice."""
    chosen: int = 0


def prompt_of(model: LanguageModel, seen: Seen, past: Sequence[Past], c: AnswerConfig) -> Tokens:
    """Return the tokens of a question.

    Raises:
        RloptError: they are too many.
    """
    tokens = model.encode_question(question(seen, past, c, c.thinks))
    tokens += model.encode(OPEN) if c.answers == "score" else []
    if len(tokens) > c.max_prompt and c.long_prompts == "error":
        raise RloptError(
            f"a prompt has {len(tokens)} tokens, more than agent.max_prompt={c.max_prompt}; raise it, lower "
            "agent.history, or give agent.long_prompts=cut"
        )
    return tokens[-c.max_prompt :]


def choice_tokens(model: LanguageModel, action: str) -> Tokens:
    """Return what is written of an action behind the opening tag; its end is a token too, else one that another begins
    with would always be likelier."""
    return model.encode(action + CLOSE)


def demonstrated(model: LanguageModel, c: AnswerConfig, seen: Seen, past: Sequence[Past], action: str) -> Answer:
    """Return the answer that does ``action``, as if the model had given it."""
    prompt = prompt_of(model, seen, past, c)
    if c.answers == "generate":
        text = answer(action, c)
        return Answer(prompt, model.encode(text), [], text, action, True)
    choices = tuple(choice_tokens(model, words) for words in seen.admissible)
    if action not in seen.admissible:
        raise RloptError(f"a demonstration does {action!r}, which is not offered; give agent.answers=generate")
    chosen = seen.admissible.index(action)
    return Answer(prompt, choices[chosen], [], f"{OPEN}{action}{CLOSE}", action, True, choices, chosen)


@torch.no_grad()
def ask(
    model: LanguageModel,
    c: AnswerConfig,
    seen: Sequence[Seen],
    past: Sequence[Sequence[Past]],
    noise: Tensor | None,
    temperature: float,
) -> list[Answer]:
    """Return an answer of each of B episodes.

    Args:
        past: the steps before, of each.
        noise: (B, ``c.max_tokens``) float64 in [0, 1) (of choices (B, 1)); None for the likeliest answers.
    """
    prompts = [prompt_of(model, *pair, c) for pair in zip(seen, past, strict=True)]
    choices = (
        [[choice_tokens(model, words) for words in one.admissible] for one in seen] if c.answers == "score" else []
    )
    for one, own in zip(seen, choices, strict=False):
        if not own:
            raise RloptError(
                f"nothing can be done in this state, so agent.answers=score has no choice: {one.text[:80]}"
            )
    if choices:
        lengths = [len(own) * (len(p) + max(map(len, own))) for p, own in zip(prompts, choices, strict=True)]
    else:
        lengths = [len(p) + c.max_tokens for p in prompts]
    found: list[Answer] = []
    for part in packs(lengths, c.tokens_at_once):
        drawn = None if noise is None else noise[part]
        asked = [prompts[b] for b in part]
        if choices:
            found += _chosen(model, c, asked, [seen[b] for b in part], [choices[b] for b in part], drawn, temperature)
            continue
        for prompt, said in zip(asked, generate(model, asked, c.max_tokens, drawn, temperature, CLOSE), strict=True):
            text = model.decode(said.tokens)
            found.append(Answer(prompt, said.tokens, said.log_prob, text, *meaning(text, c)))
    return found


def _chosen(
    model: LanguageModel, c: AnswerConfig, prompts: list[Tokens], seen: list[Seen], choices: list[list[Tokens]],
    noise: Tensor | None, temperature: float,
) -> list[Answer]:  # fmt: skip
    log_prob = choice_log_probs(model, prompts, choices, c.normalised, temperature)
    if noise is None:
        chosen = log_prob.argmax(1)
    else:
        below = log_prob.double().exp().cumsum(1)
        chosen = torch.searchsorted(below, noise[:, :1].to(below.device) * below[:, -1:], right=True).squeeze(1)
        chosen = torch.minimum(chosen, torch.tensor([len(own) - 1 for own in choices], device=chosen.device))
    of = log_prob.gather(1, chosen.unsqueeze(1)).squeeze(1).tolist()
    return [
        Answer(prompt, own[k], [lp], f"{OPEN}{one.admissible[k]}{CLOSE}", one.admissible[k], True, tuple(own), k)
        for prompt, one, own, k, lp in zip(prompts, seen, choices, chosen.tolist(), of, strict=True)
    ]


class LanguageActor(Actor):
    """A language model as an actor: it acts on words, by ``LanguagePolicy``."""

    kind = "language"

    def __init__(self, model: LanguageModel, config: AnswerConfig) -> None:
        super().__init__()
        self.network, self.model, self.config = model.network, model, config

    @property
    def options(self) -> Options:  # type: ignore[override]
        """How it answers."""
        return {f.name: getattr(self.config, f.name) for f in fields(AnswerConfig)}

    def act(
        self, obs: Obs, carry: Carry = None, deterministic: bool = False, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Carry]:
        raise RloptError("this policy acts on words, not on tensors: policy.answer(seen, past)")


class LanguagePolicy(Policy):
    """A language model in a text game::

        policy, seen, past = load_policy("runs/…"), game.begin(task), []
        answer = policy.answer(seen, past)
        past.append(Past(seen.text, answer.action))
        moved = game.act(answer.action)

    ``policy.model`` is a ``LanguageModel``, its ``network`` and ``tokenizer`` are those of transformers.
    """

    evaluation_mode = EvaluationMode(deterministic=False)
    actor: LanguageActor

    def __init__(self, spec: EnvSpec, model: LanguageModel, config: AnswerConfig) -> None:
        super().__init__(spec, LanguageActor(model, config))
        self.model, self.config = model, config

    def answer(
        self,
        seen: Seen,
        past: Sequence[Past] = (),
        deterministic: bool = False,
        generator: torch.Generator | None = None,
    ) -> Answer:
        """Return what the model answers where it sees ``seen``, after the steps ``past``."""
        noise = None
        if not deterministic:
            generator = self._own_generator() if generator is None else generator
            noise = torch.rand(
                (1, self.config.max_tokens), generator=generator, dtype=torch.float64, device=generator.device
            )
        return ask(self.model, self.config, [seen], [past], noise, self.config.evaluation_temperature)[0]

    def act(
        self, obs: Obs, carry: Carry = None, deterministic: bool = True, generator: torch.Generator | None = None
    ) -> Act:
        """Refuse: it acts on words."""
        return Act(self.actor.act(obs)[0])

    def to(self, device: str | torch.device) -> LanguagePolicy:
        network = copy.deepcopy(self.model.network)
        for p in network.parameters():
            p.grad = None
        model = LanguageModel(network, self.model.tokenizer, resolve_device(device))
        other = LanguagePolicy(self.spec, model, self.config)
        other.meta, other.evaluation_mode = copy.deepcopy(self.meta), self.evaluation_mode
        return other

    def write(self, folder: Path) -> dict[str, Digest]:
        """Write the model into an empty folder; return what it wrote, by name."""
        self.model.save(folder)
        found = adopt_files(folder)
        for name in [name for name in found if not FILES.fullmatch(name)]:
            (folder / name).unlink()  # nothing that a policy needs
            del found[name]
        return found


def read_language_policy(
    folder: Path, spec: EnvSpec, options: Mapping[str, Any], device: torch.device
) -> LanguagePolicy:
    """Return the policy whose files, which have been verified, lie in ``folder``. Raises RloptError where it does not
    load."""
    model = load_language_model(folder, device)
    model.network.requires_grad_(False)
    return LanguagePolicy(spec, model, build(AnswerConfig, dict(options), "its options"))
