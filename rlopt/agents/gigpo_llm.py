"""Group-in-group policy optimisation of language models (Feng, Xue, Liu and An 2025, "Group-in-Group Policy
Optimization for LLM Agent Training", arXiv 2505.10978), which act in text games by what they write.

An action is a whole answer; its advantage, by the estimators of ``group_advantages``, is that of each of its tokens,
whose ratios are clipped one by one (eq. 9). With ``agent.answers=score`` the model writes nothing: it is asked how
likely each possible action is, and chooses. What was said is learnt from token by token as it was said; no text is ever
tokenised again.

A model that solves nothing learns nothing from groups: demonstrations can teach it first (``agent.warm_start``).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlopt.agents.anchors import anchor_key, text_anchors
from rlopt.agents.base import Agent
from rlopt.agents.group_advantages import (
    ANCHORED,
    Rows,
    anchor_groups,
    group_advantages,
    group_metrics,
    similar_groups,
)
from rlopt.agents.surrogate import GroupPolicyConfig, policy_loss
from rlopt.agents.text_rollout import TextEpisode, TextTurn
from rlopt.allocation import refuse_unless_free
from rlopt.buffers import minibatches
from rlopt.buffers.transition import make_reward_transform
from rlopt.nn import OptimiserConfig
from rlopt.nn.generation import choice_log_probs, packs, token_terms
from rlopt.nn.language import LanguageConfig, make_language_model
from rlopt.policy import EvaluationMode
from rlopt.policy.language import AnswerConfig, LanguagePolicy
from rlopt.random import derive_seed
from rlopt.types import Metrics, RloptError, State, Update, option

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GiGPOLLMConfig(GroupPolicyConfig, AnswerConfig, LanguageConfig):
    """Options of GiGPO for language models; defaults are the paper's, or the released code's where it is silent."""

    learning_rate: float = option(1e-6, "learning rate", above=0.0)
    kl_coefficient: float = option(0.01, "β: weight of the divergence from the policy at the start", low=0.0)
    temperature: float = option(1.0, "temperature of what is learnt from", above=0.0)
    anchor: str = option(
        "observation",
        "what steps have in common that are compared: observation, state (task, look, inventory), admissible (the "
        "observation and what can be done), exact; or what register_anchor named",
        needs=ANCHORED,
    )
    anchor_history: int = option(0, "earlier observations that must agree as well", low=0, needs=ANCHORED)
    similarity: float | None = option(
        None,
        "observations count as one that are alike by this ratio of Ratcliff and Obershelp (released code: 0.9)",
        above=0.0,
        high=1.0,
        needs=ANCHORED,
    )
    aggregation: str = option(
        "token-mean",
        "what counts alike in a loss: every token of a minibatch, every answer (seq-mean-token-mean), or every answer "
        "by its length (seq-mean-token-sum)",
        choices=("token-mean", "seq-mean-token-mean", "seq-mean-token-sum"),
    )
    invalid_penalty: float = option(0.1, "what an answer without the tags asked for costs", low=0.0)
    penalty: str = option(
        "reward",
        "where that is paid: in the reward (paper), or by the scores of this one step alone (local, released code)",
        choices=("reward", "local"),
    )
    warm_start: int = option(
        0, "rounds of demonstrations at most, of agent.groups tasks each, before the first rollout", low=0
    )
    warm_success: float | None = option(
        None, "share of solved episodes from which on demonstrations are enough (null: all rounds)", above=0.0, high=1.0
    )
    warm_every: int = option(5, "rounds between looks at that share", low=1)
    warm_epochs: int = option(1, "passes over a round's demonstrations", low=1)
    warm_learning_rate: float | None = option(None, "learning rate of demonstrations (null: learning_rate)", above=0.0)
    warm_noise: float = option(
        0.0, "share of demonstrated steps that teach some other possible action, so that choices stay open", low=0.0,
        high=1.0,
    )  # fmt: skip
    shown_groups: int | None = option(
        1, "groups of each rollout that are written to trajectories.jsonl (null: all)", low=0
    )
    optimiser: OptimiserConfig = option(
        lambda: OptimiserConfig(name="adamw", weight_decay=0.01), "optimiser of whatever is trained"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.estimator == "ppo":
            raise RloptError("agent.estimator=ppo: language models have no critic here; choose another estimator")
        if self.similarity is not None and (self.anchor != "observation" or self.anchor_history or self.nested):
            raise RloptError(
                "agent.similarity compares observations alone; leave out anchor, anchor_history and nested"
            )
        if self.noise != "shared":
            raise RloptError(f"agent.noise={self.noise}: text games draw nothing after their beginning; leave it out")
        if not self.warm_start and (self.warm_success is not None or self.warm_learning_rate is not None):
            raise RloptError("agent.warm_success and warm_learning_rate are of demonstrations; give agent.warm_start")


class GiGPOLLM(Agent):
    """GiGPO, GRPO, RLOO, step-wise groups or REINFORCE for language models."""

    name: ClassVar[str] = "gigpo_llm"
    loop: ClassVar[str] = "text"
    config_class = GiGPOLLMConfig
    config: GiGPOLLMConfig
    evaluation_mode = EvaluationMode(deterministic=False)

    def build(self) -> None:
        c = self.config
        self.model = make_language_model(c, derive_seed(self.seed, "init", "model"), self.device)
        self._tell_size()
        self.weights = self.persist("weights", self.model.flat)
        self.optimiser = self.add_optimiser("optimiser", self.model.flat, c.learning_rate)
        self.model.collect_into(self.optimiser.grad)
        # Of adapters this is the model without them, unless demonstrations came first.
        self.reference = self.persist("reference", self.model.flat.clone()) if c.kl_coefficient else None
        self.base = self.persist("base", self.model.frozen_digest()) if self.model.adapted else None
        self.key = anchor_key(c.anchor)
        self.warming = self.persist("warming", torch.tensor(c.warm_start > 0))
        """() bool, on the CPU: whether demonstrations are still learnt from."""

    def _tell_size(self) -> None:
        """Say how much memory and disk this needs, before it is taken.

        Raises:
            RloptError: there is not enough memory.
        """
        c, model = self.config, self.model
        whole = sum(p.numel() * p.element_size() for p in model.network.parameters())
        trained = 4 * model.flat.numel()
        copies = 3 + (c.kl_coefficient > 0.0)  # gradient, two moments, reference
        kept = trained * (copies if c.kl_coefficient else 3)
        sizes = [f"{x / 2**20:,.0f} MiB" for x in (whole + copies * trained, kept, whole + trained * model.adapted)]
        log.info(
            "%s: %s parameters, %s of them trained; memory %s besides what a batch needs, a checkpoint %s, an exported "
            "policy %s",
            c.model, f"{sum(p.numel() for p in model.network.parameters()):,}", f"{model.flat.numel():,}", *sizes,
        )  # fmt: skip
        way_out = "give agent.lora, or a smaller agent.model"
        refuse_unless_free(copies * trained, "what trains the model", way_out, self.device)
        most = getattr(model.base.config, "max_position_embeddings", None)
        wanted = c.max_prompt + (c.max_tokens if c.answers == "generate" else 0)
        if most is not None and wanted > most:
            raise RloptError(
                f"agent.max_prompt and agent.max_tokens are {wanted} tokens together, more than {c.model} reads "
                f"({most}); lower them"
            )

    @property
    def policy(self) -> LanguagePolicy:
        return LanguagePolicy(self.spec, self.model, self.config)

    def rate(self) -> float:
        c = self.config
        warm = c.warm_learning_rate is not None and bool(self.warming)
        return c.warm_learning_rate / c.learning_rate if warm and c.warm_learning_rate else 1.0

    # Learning from groups

    def update(self, batch: Sequence[TextEpisode]) -> Update:
        """Learn from one rollout; on the host, as micro-batches are cut by the lengths of what was said."""
        c = self.config
        episodes = [episode for episode in batch if episode.complete]
        turns = [turn for episode in episodes for turn in episode.turns]
        rows = self.rows(episodes)
        self.open_update(reward=rows.reward)
        advantage = group_advantages(rows, c.gamma, c).float().to(self.device)
        metrics = group_metrics(rows, c.gamma) | self._about(turns)
        tokens = [_count(turn) for turn in turns]
        first = _starts(tokens)
        # One minibatch is its own past: its ratios are 1. Of several, what the same pass over the same tokens says
        # counts, not what was noted while they were written, since a cache rounds otherwise.
        several = c.epochs > 1 or len(turns) > c.batch_size
        before = self.log_probs(turns) if several else None
        reference = None
        if self.reference is not None:
            with self.model.instead(self.reference):
                reference = self.log_probs(turns)
        losses: Metrics = {}
        for chosen in minibatches(len(turns), c.epochs, c.batch_size, self.update_generator):
            self.optimiser.grad.zero_()
            losses = {}
            for part, weight in self._micro_batches(chosen.tolist(), turns):
                log_prob, entropy = self.terms([turns[i] for i in part])
                at = torch.cat([torch.arange(first[i], first[i] + tokens[i]) for i in part]).to(self.device)
                counts = torch.tensor([tokens[i] for i in part], device=self.device)
                of = torch.tensor(part, device=self.device).repeat_interleave(counts, output_size=len(at))
                old = log_prob.detach() if before is None else before[at]
                loss, found = policy_loss(
                    log_prob, entropy, old, advantage[of], None if reference is None else reference[at], c, weight
                )
                loss.backward()  # type: ignore[no-untyped-call]
                losses = {name: losses.get(name, 0.0) + value for name, value in found.items()}
            self.descend("policy", self.optimiser, losses["policy_loss"], None)
            self.end_update()
        return Update(metrics | losses)

    def rows(self, episodes: Sequence[TextEpisode]) -> Rows:
        """Return the steps of whole episodes as estimators compare them, on the host."""
        c = self.config
        pairs = [(i, turn) for i, episode in enumerate(episodes) for turn in episode.turns]
        owner = torch.tensor([i for i, _ in pairs])
        group = torch.tensor([episode.group for episode in episodes])
        reward = torch.tensor([turn.reward for _, turn in pairs], dtype=torch.float64)
        transform = make_reward_transform(c.reward)
        reward = reward if transform is None else transform(reward)
        charged = c.invalid_penalty * torch.tensor([not turn.answer.valid for _, turn in pairs], dtype=torch.float64)
        rows = Rows(reward, owner, group, penalty=charged)
        if c.penalty == "reward":
            rows = rows._replace(reward=reward - charged, penalty=None)
        if not c.anchored:
            return rows
        true = [turn.exact for _, turn in pairs]
        if None not in true:
            rows = rows._replace(exact=anchor_groups(true, group[owner]))
        if c.similarity is not None:
            texts = [turn.seen.text for _, turn in pairs]
            return rows._replace(anchors=(similar_groups(texts, group[owner], c.similarity),))
        seen = [(turn.seen, turn.answer.action, turn.exact) for _, turn in pairs]
        anchors = text_anchors(seen, owner.tolist(), group[owner], self.key, c.anchor_history, c.nested)
        return rows._replace(anchors=anchors)

    def terms(self, turns: Sequence[TextTurn]) -> tuple[Tensor, Tensor]:
        """Return log π (J,) of every token that was said in B turns, one turn after the other, and the entropy (J,) of
        what it was drawn from; of choices J is B."""
        c, answers = self.config, [turn.answer for turn in turns]
        prompts = [answer.prompt for answer in answers]
        with self._precise():
            if c.answers == "generate":
                return token_terms(self.model, prompts, [answer.tokens for answer in answers], c.temperature)
            choices = [answer.choices for answer in answers]
            log_prob = choice_log_probs(self.model, prompts, choices, c.normalised, c.temperature)
        chosen = torch.tensor([[answer.chosen] for answer in answers], device=self.device)
        return log_prob.gather(1, chosen).squeeze(1), -(log_prob.exp() * log_prob).sum(1)

    @torch.no_grad()
    def log_probs(self, turns: Sequence[TextTurn]) -> Tensor:
        """Return log π (J,) of every token of all turns."""
        found: list[Tensor] = [torch.empty(0)] * len(turns)
        for part, _ in self._micro_batches(list(range(len(turns))), turns):
            pieces = torch.split(self.terms([turns[i] for i in part])[0], [_count(turns[i]) for i in part])
            for i, piece in zip(part, pieces, strict=True):
                found[i] = piece
        return torch.cat(found)

    def _micro_batches(self, picked: list[int], turns: Sequence[TextTurn]) -> Iterator[tuple[list[int], Tensor]]:
        """Yield a minibatch in parts that are read at once, each with what its tokens (J,) count in the minibatch's
        mean."""
        c = self.config
        order = sorted(picked, key=lambda i: (_length(turns[i]), i))  # equal lengths pad least
        total = sum(_count(turns[i]) for i in picked)
        for part in packs([_length(turns[i]) for i in order], c.tokens_at_once):
            rows = [order[at] for at in part]
            counts = [_count(turns[i]) for i in rows]
            each = {
                "token-mean": [1.0 / total for _ in counts],
                "seq-mean-token-mean": [1.0 / (len(picked) * n) for n in counts],
                "seq-mean-token-sum": [1.0 / len(picked) for _ in counts],
            }[c.aggregation]
            weight = [x for x, n in zip(each, counts, strict=True) for _ in range(n)]
            yield rows, torch.tensor(weight, device=self.device)

    @contextmanager
    def _precise(self) -> Iterator[None]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            yield

    def _about(self, turns: Sequence[TextTurn]) -> Metrics:
        """Return shares and means of a rollout's steps."""
        numbers = {
            "invalid": [not turn.answer.valid for turn in turns],
            "impossible": [turn.answer.action not in turn.seen.admissible for turn in turns],
            "answer_tokens": [len(turn.answer.tokens) for turn in turns],
            "prompt_tokens": [len(turn.answer.prompt) for turn in turns],
        }
        return {name: torch.tensor(found, dtype=torch.float32).mean() for name, found in numbers.items()}

    # Learning from demonstrations

    def imitate(self, turns: Sequence[TextTurn]) -> Update:
        """Learn what was said in ``turns`` by heart (maximum likelihood)."""
        c = self.config
        loss = torch.zeros(())
        for chosen in minibatches(len(turns), c.warm_epochs, c.batch_size, self.update_generator):
            self.open_update()
            self.optimiser.grad.zero_()
            loss = torch.zeros((), device=self.device)
            for part, weight in self._micro_batches(chosen.tolist(), turns):
                log_prob, _ = self.terms([turns[i] for i in part])
                one = -(log_prob * weight).sum()
                one.backward()  # type: ignore[no-untyped-call]
                loss += one.detach()
            self.descend("imitation", self.optimiser, loss, None)
            self.end_update()
        return Update({"imitation_loss": loss})

    def end_warm_start(self) -> None:
        """Begin to learn from rewards: with a fresh optimiser, away from what is known now."""
        self.warming.fill_(False)
        self.optimiser.count.zero_()
        for x in self.optimiser.state.values():
            x.zero_()
        if self.reference is not None:
            self.reference.copy_(self.model.flat)

    def load_state_dict(self, state: State) -> None:
        if self.base is not None and not torch.equal(state["base"].cpu(), self.base.cpu()):
            raise RloptError(f"agent.model={self.config.model} is no longer the model that these adapters belong to")
        super().load_state_dict(state)


def _count(turn: TextTurn) -> int:
    """Return how many log-probabilities a turn has: one for each token, of a choice one."""
    return 1 if turn.answer.choices else len(turn.answer.tokens)


def _length(turn: TextTurn) -> int:
    """Return the tokens that are read for a turn."""
    answer = turn.answer
    if answer.choices:
        return len(answer.choices) * (len(answer.prompt) + max(map(len, answer.choices)))
    return len(answer.prompt) + len(answer.tokens)


def _starts(lengths: Sequence[int]) -> list[int]:
    """Return where each of pieces begins that lie one after the other."""
    found, at = [], 0
    for length in lengths:
        found.append(at)
        at += length
    return found
