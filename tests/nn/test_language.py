"""Language models: one flat tensor, what is said and how likely, and what other programs load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlopt.types import RloptError

hf = pytest.importorskip("transformers")

from rlopt.config import build  # noqa: E402
from rlopt.nn.generation import choice_log_probs, generate, left_padded, token_terms  # noqa: E402
from rlopt.nn.language import (  # noqa: E402
    LanguageConfig,
    LanguageModel,
    find_model,
    load_language_model,
    make_language_model,
    pieces,
)

TEXT = "Task: take the coin, then go north.\n- <action>open door to north</action> (2 of 10)\n"
PROMPTS = ["take the coin", "go north.\n open door to north", "Task: take"]
WORDS = tuple(dict.fromkeys(piece for text in (TEXT, *PROMPTS, "coin", "open", "</action>") for piece in pieces(text)))


def tiny(seed: int = 0, **options: Any) -> LanguageModel:
    return make_language_model(build(LanguageConfig, {"words": WORDS, "width": 32, **options}), seed)


def prompts(model: LanguageModel) -> list[list[int]]:
    return [model.encode(text) for text in PROMPTS]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny()


# The model


def test_a_text_is_cut_and_joined_without_loss(model: LanguageModel) -> None:
    assert "".join(pieces(TEXT)) == TEXT
    tokens = model.encode(TEXT)
    assert len(tokens) == len(pieces(TEXT)) and model.decode(tokens) == TEXT
    assert model.decode([*model.encode("coin"), model.end]) == "coin"
    assert "<unk>" in model.tokenizer.decode(model.encode("take the xylophone"))


def test_weights_depend_on_the_seed_alone_and_the_global_stream_stays() -> None:
    before = torch.get_rng_state()
    assert torch.equal(tiny(3).flat, tiny(3).flat) and not torch.equal(tiny(3).flat, tiny(4).flat)
    assert torch.equal(torch.get_rng_state(), before)


def test_flat_holds_every_parameter_once_and_moves_them(model: LanguageModel) -> None:
    own = tiny()
    assert own.flat.numel() == sum(p.numel() for p in own.network.parameters())  # tied embeddings count once
    with torch.no_grad():
        own.flat.mul_(2.0)
    for mine, other in zip(own.network.parameters(), model.network.parameters(), strict=True):
        assert torch.equal(mine, 2.0 * other)


def test_gradients_gather_in_one_tensor() -> None:
    own = tiny()
    grad = torch.zeros_like(own.flat)
    own.collect_into(grad)
    loss = token_terms(own, prompts(own), [[3, 4], [5], [6, 7]])[0].sum()
    wanted = torch.autograd.grad(loss, own.trained, retain_graph=True)
    loss.backward()
    assert torch.equal(grad, torch.cat([g.reshape(-1) for g in wanted])) and grad.abs().sum() > 0
    loss = token_terms(own, prompts(own), [[3, 4], [5], [6, 7]])[0].sum()
    loss.backward()  # micro-batches add up
    assert torch.allclose(grad, 2.0 * torch.cat([g.reshape(-1) for g in wanted]))


@pytest.mark.parametrize("options", [{}, {"lora": 2}])
def test_other_programs_and_rlopt_load_what_was_saved(options: dict[str, Any], tmp_path: Path) -> None:
    if options:
        pytest.importorskip("peft")
    own = tiny(**options)
    with torch.no_grad():
        own.flat.add_(0.02 * torch.randn(own.flat.shape, generator=torch.Generator().manual_seed(0)))
    wanted = token_terms(own, prompts(own), [[3, 4], [5], [6, 7]])[0]
    own.save(tmp_path)
    again = load_language_model(tmp_path)
    assert prompts(again) == prompts(own)
    assert torch.allclose(token_terms(again, prompts(again), [[3, 4], [5], [6, 7]])[0], wanted, atol=1e-5)
    assert again.adapted == bool(options) and torch.equal(again.flat, own.flat)
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    if options:
        theirs.load_adapter(str(tmp_path / "adapter"))
    read = hf.PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    tokens = torch.tensor([[*read(PROMPTS[1])["input_ids"], 5]])
    log_prob = theirs(tokens).logits[0, -2].log_softmax(-1)[5]
    assert float(log_prob.detach()) == pytest.approx(float(wanted[2].detach()), abs=1e-5)


def test_adapters_change_nothing_at_first_and_alone_are_trained() -> None:
    pytest.importorskip("peft")
    plain, own = tiny(), tiny(lora=2)
    answers = [[3, 4], [5], [6, 7]]
    wanted = token_terms(plain, prompts(plain), answers)[0]
    assert torch.allclose(token_terms(own, prompts(own), answers)[0], wanted, atol=1e-5)
    assert own.flat.numel() < plain.flat.numel() / 3
    begun, digest = own.flat.clone(), own.frozen_digest()
    with torch.no_grad():
        own.flat.add_(0.1)
    assert not torch.allclose(token_terms(own, prompts(own), answers)[0], wanted)
    assert torch.equal(own.frozen_digest(), digest)
    with own.instead(begun):  # the adapters as they were are none at all
        assert torch.allclose(token_terms(own, prompts(own), answers)[0], wanted, atol=1e-5)
        with own.network.disable_adapter():
            assert torch.allclose(token_terms(own, prompts(own), answers)[0], wanted, atol=1e-5)
    assert torch.allclose(own.flat, begun + 0.1)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/nowhere/at/all", "there is no folder or GGUF file /nowhere/at/all; models are not downloaded"),
        ("Qwen/Qwen2.5-0.5B", "models are not downloaded"),
        (".", "holds no config.json"),
    ],
)
def test_models_that_are_not_there(name: str, said: str) -> None:
    with pytest.raises(RloptError, match=said):
        find_model(name)


def test_folders_that_hold_something_else(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing", "auto_map": {"AutoModel": "a.B"}}))
    (tmp_path / "a.py").write_text("raise SystemExit('run')")
    with pytest.raises(RloptError, match="holds no"):
        make_language_model(build(LanguageConfig, {"model": str(tmp_path)}), 0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"words": ()}, "knows no words"),
        ({"width": 48}, "multiple of 32"),
        ({"lora_alpha": 2.0}, "there are none"),
    ],
)
def test_mistakes(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RloptError, match=said):
        tiny(**options)


# What it says


def noise(rows: int, longest: int = 9) -> Tensor:
    return torch.rand((rows, longest), generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def test_the_likeliest_answers_are_those_of_transformers(model: LanguageModel) -> None:
    asked = prompts(model)
    found = generate(model, asked, 9)
    tokens, there, _ = left_padded(asked, model.pad, model.device)
    theirs = model.network.generate(
        tokens, attention_mask=there, max_new_tokens=9, do_sample=False, eos_token_id=model.end, pad_token_id=model.pad
    )[:, tokens.shape[1] :]
    for mine, other in zip(found, theirs.tolist(), strict=True):
        end = other.index(model.end) + 1 if model.end in other else len(other)
        assert mine.tokens == other[:end]


def test_log_probabilities_of_what_was_said_are_those_of_one_pass_over_it(model: LanguageModel) -> None:
    asked = prompts(model)
    found = generate(model, asked, 9, noise(3), temperature=0.7)
    log_prob, entropy = token_terms(model, asked, [said.tokens for said in found], temperature=0.7)
    assert torch.allclose(log_prob, torch.tensor([x for said in found for x in said.log_prob]), atol=1e-5)
    assert log_prob.shape == entropy.shape and bool((entropy > 0).all())


def test_what_a_row_says_is_its_own_business(model: LanguageModel) -> None:
    """Others beside it, and their ends, change nothing but the last bits."""
    asked, drawn = prompts(model), noise(3)
    together = generate(model, asked, 9, drawn)
    for b, prompt in enumerate(asked):
        (alone,) = generate(model, [prompt], 9, drawn[b : b + 1])
        assert alone.tokens == together[b].tokens
        assert alone.log_prob == pytest.approx(together[b].log_prob, abs=1e-5)


def test_answers_end_at_the_end_and_at_the_words_that_end_them(model: LanguageModel) -> None:
    asked = [model.encode("go")] * 64
    found = generate(model, asked, 30, noise(64, 30), until="</action>")
    close = model.encode("</action>")[0]
    for said in found:
        assert len(said.tokens) == len(said.log_prob) <= 30
        assert not {model.end, close} & set(said.tokens[:-1])
    assert {said.tokens[-1] for said in found} >= {model.end, close}


def test_tokens_are_drawn_as_often_as_they_are_likely(model: LanguageModel) -> None:
    prompt = model.encode("take the")
    n = 4_000
    grid = (torch.arange(n, dtype=torch.float64) + 0.5).unsqueeze(1) / n  # every quantile once
    found = torch.tensor([said.tokens[0] for said in generate(model, [prompt] * n, 1, grid, temperature=0.5)])
    share = torch.bincount(found, minlength=len(WORDS) + 3) / n
    tokens, there, position = left_padded([prompt], model.pad, model.device)
    logits = model.network(tokens, attention_mask=there, position_ids=position).logits[0, -1]
    assert torch.allclose(share, (logits / 0.5).softmax(-1), atol=1.5 / n)


# Choosing among answers


@pytest.mark.parametrize("normalised", [True, False])
def test_a_shared_beginning_changes_no_choice(model: LanguageModel, normalised: bool) -> None:
    asked = prompts(model)
    texts = [["take the coin", "go north", "open"], ["go"], ["coin", "open door to north"]]
    choices = [[[*model.encode(text), model.end] for text in own] for own in texts]
    found, alone = (choice_log_probs(model, asked, choices, normalised, 0.8, shared) for shared in (True, False))
    assert torch.allclose(found, alone, atol=1e-5)
    assert torch.allclose(found.exp().sum(1), torch.ones(3)) and float(found[1, 0].detach()) == pytest.approx(0.0)
    # By hand, of the first prompt.
    score = []
    for answer in choices[0]:
        token = token_terms(model, [asked[0]], [answer])[0].sum()
        score.append((token / len(answer) if normalised else token) / 0.8)
    assert torch.allclose(found[0], torch.stack(score).log_softmax(0), atol=1e-5)


def test_gradients_of_a_choice_flow_through_the_cache() -> None:
    own = tiny()
    choices = [[[3, 4, 1], [5, 1]], [[6, 1], [7, 8, 9, 1]], [[3, 1], [4, 1]]]
    found = []
    for shared in (True, False):
        grad = torch.zeros_like(own.flat)
        own.collect_into(grad)
        choice_log_probs(own, prompts(own), choices, shared=shared)[:, 0].sum().backward()
        found.append(grad)
    assert torch.allclose(*found, atol=1e-5) and found[0].abs().sum() > 0


def test_answers_of_one_token(model: LanguageModel) -> None:
    choices = [[[3], [4]], [[5], [6]], [[3], [6]]]
    found = choice_log_probs(model, prompts(model), choices)
    assert torch.allclose(found, choice_log_probs(model, prompts(model), choices, shared=False), atol=1e-5)
