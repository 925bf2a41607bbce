"""What language models say, and how likely they say it: sampling with a cache, log-probabilities of what was said, and
the choice among given answers.

Everything random comes in as uniform numbers, so that what a row says depends on its own stream, not on a global one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlopt.nn.distributions import IMPOSSIBLE
from rlopt.nn.language import LanguageModel

Tokens = list[int]
TAIL = 12
"""Tokens at the end of an answer in which the words are looked for that end it."""


class Said(NamedTuple):
    """One answer."""

    tokens: Tokens
    log_prob: list[float]
    """Of each token, under the distribution that it was drawn from."""


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows of tokens flush right as (B, L), where there are tokens, (B, L), and positions (B, L)."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=device)
    there = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return tokens, there, (there.cumsum(1) - 1).clamp(min=0)


def packs(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Return the indices of rows, in their order, in parts of at most ``limit`` tokens each with padding to the longest
    of the part; a longer row is one of its own."""
    found: list[list[int]] = []
    longest = 0
    for at, length in enumerate(lengths):
        longest = max(longest, length)
        if not found or (len(found[-1]) + 1) * longest > limit:
            found.append([])
            longest = length
        found[-1].append(at)
    return found


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: Sequence[Tokens],
    longest: int,
    noise: Tensor | None = None,
    temperature: float = 1.0,
    until: str | None = None,
) -> list[Said]:
    """Return an answer to each of B prompts: up to the token that ends a text, to the text ``until`` (both included),
    or to ``longest`` tokens.

    Args:
        noise: (B, ``longest``) float64 in [0, 1), row b's own numbers; None for the most likely tokens.
        temperature: what logits are divided by, above 0.
    """
    tokens, there, position = left_padded(prompts, model.pad, model.device)
    found = [Said([], []) for _ in prompts]
    alive = list(range(len(prompts)))
    rows = torch.arange(len(prompts), device=model.device)  # of the cache, by prompt
    out = model.network(tokens, attention_mask=there, position_ids=position, use_cache=True, logits_to_keep=1)
    cache, position = out.cache, position[:, -1:]
    for t in range(longest):
        log_prob = torch.log_softmax(out.logits[:, -1].float() / temperature, -1)
        if noise is None:
            token = log_prob.argmax(-1)
        else:  # the inverse of the distribution function
            below = log_prob.double().exp().cumsum(-1)
            wanted = noise[:, t].to(model.device)[rows].unsqueeze(1) * below[:, -1:]
            token = torch.searchsorted(below, wanted, right=True).squeeze(1).clamp(max=log_prob.shape[1] - 1)
        chosen = log_prob.gather(1, token.unsqueeze(1)).squeeze(1).tolist()
        over = []
        for at, (b, number) in enumerate(zip(rows.tolist(), token.tolist(), strict=True)):
            if b not in alive:
                continue
            found[b].tokens.append(number)
            found[b].log_prob.append(chosen[at])
            if number == model.end or (until is not None and until in model.decode(found[b].tokens[-TAIL:])):
                over.append(b)
        alive = [b for b in alive if b not in over]
        if not alive or t + 1 == longest:
            break
        token, position = token.unsqueeze(1), position + 1
        there = torch.cat((there, torch.ones_like(token)), 1)
        if 2 * len(alive) <= len(rows):  # who has said all is not asked any longer
            kept = torch.tensor([at for at, b in enumerate(rows.tolist()) if b in alive], device=model.device)
            rows, token, position, there = rows[kept], token[kept], position[kept], there[kept]
            cache.batch_select_indices(kept)
        out = model.network(
            token, attention_mask=there, position_ids=position, cache=cache, use_cache=True, logits_to_keep=1
        )
    return found


def token_terms(
    model: LanguageModel, prompts: Sequence[Tokens], answers: Sequence[Tokens], temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return the log-probability (J,) of every token of B answers to their prompts, one answer after the other, and the
    entropy (J,) of what it was drawn from."""
    tokens, there, position = left_padded(
        [p + a for p, a in zip(prompts, answers, strict=True)], model.pad, model.device
    )
    longest = max(map(len, answers))
    # Answers end at the right edge, so that logits are made of no more than their columns.
    out = model.network(
        tokens, attention_mask=there, position_ids=position, use_cache=False, logits_to_keep=longest + 1
    )
    at = [b * longest + j for b, a in enumerate(answers) for j in range(longest - len(a), longest)]
    index = torch.tensor(at, device=model.device)
    logits = out.logits[:, :-1].flatten(0, 1).index_select(0, index).float() / temperature
    log_prob = torch.log_softmax(logits, -1)
    chosen = log_prob.gather(1, tokens[:, -longest:].flatten().index_select(0, index).unsqueeze(1)).squeeze(1)
    return chosen, -(log_prob.exp() * log_prob).sum(-1)


def choice_log_probs(
    model: LanguageModel,
    prompts: Sequence[Tokens],
    choices: Sequence[Sequence[Tokens]],
    normalised: bool = True,
    temperature: float = 1.0,
    shared: bool = True,
) -> Tensor:
    """Return log π (B, K) over the ``choices`` of answers that each of B prompts has, padded where one has fewer: the
    softmax of the answers' log-probabilities.

    Args:
        normalised: divide an answer's log-probability by its tokens, since long ones are less likely by their length.
        temperature: what scores are divided by.
        shared: read each prompt once, and its answers behind its cache; otherwise once for each answer.
    """
    flat = [(b, answer) for b, own in enumerate(choices) for answer in own]
    owner = torch.tensor([b for b, _ in flat], device=model.device)
    lengths = torch.tensor([len(answer) for _, answer in flat], device=model.device)
    if shared:
        score = _behind_cache(model, prompts, [answer for _, answer in flat], owner)
    else:
        token, _ = token_terms(model, [prompts[b] for b, _ in flat], [answer for _, answer in flat])
        of = torch.repeat_interleave(torch.arange(len(flat), device=model.device), lengths, output_size=len(token))
        score = token.new_zeros(len(flat)).index_add(0, of, token)
    score = (score / lengths if normalised else score) / temperature
    place = torch.tensor([k for own in choices for k in range(len(own))], device=model.device)
    table = score.new_full((len(choices), max(map(len, choices))), IMPOSSIBLE)
    return torch.log_softmax(table.index_put((owner, place), score), -1)


def _behind_cache(model: LanguageModel, prompts: Sequence[Tokens], answers: Sequence[Tokens], owner: Tensor) -> Tensor:
    """Return log-probabilities (S,) of answers to the prompts that ``owner`` (S,) numbers."""
    tokens, there, position = left_padded(prompts, model.pad, model.device)
    out = model.network(tokens, attention_mask=there, position_ids=position, use_cache=True, logits_to_keep=1)
    first = torch.tensor([answer[0] for answer in answers], device=model.device).unsqueeze(1)
    score: Tensor = torch.log_softmax(out.logits[:, -1].float(), -1)[owner].gather(1, first).squeeze(1)
    longest = max(map(len, answers)) - 1
    if longest == 0:
        return score
    ids: Any = torch.tensor([a + [model.pad] * (longest + 1 - len(a)) for a in answers], device=model.device)
    real = torch.tensor([[1] * len(a) + [0] * (longest + 1 - len(a)) for a in answers], device=model.device)
    cache = out.cache
    cache.batch_select_indices(owner)
    after = model.network(
        ids[:, :-1], attention_mask=torch.cat((there[owner], real[:, :-1]), 1), cache=cache, use_cache=True,
        position_ids=position[owner, -1:] + 1 + torch.arange(longest, device=model.device),
    )  # fmt: skip
    log_prob = torch.log_softmax(after.logits.float(), -1).gather(2, ids[:, 1:].unsqueeze(2)).squeeze(2)
    return score + (log_prob * real[:, 1:]).sum(1)
