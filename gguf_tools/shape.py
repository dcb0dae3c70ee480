"""Shapes of LLaMA models: the sizes that decide every tensor's, and those of models that people know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from gguf_tools.alphabet import MIN_TOKENS
from gguf_tools.errors import FileError


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a LLaMA model. `tied` says that embeddings and output are one matrix; `rope_base` is of the rotary frequencies."""

    n_layers: int = 3
    n_embd: int = 64
    n_head: int = 4
    n_head_kv: int = 2
    n_ff: int = 128
    n_vocab: int = 320
    context_length: int = 2048
    tied: bool = True
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5

    def check(self, where: str) -> None:
        """Refuse sizes that make no model; `where` begins the sentence.

        Raises:
            FileError: they do not.
        """
        for name in ("n_layers", "n_embd", "n_head", "n_head_kv", "n_ff", "context_length"):
            if not 1 <= getattr(self, name) <= 1 << 24:
                raise FileError(f"{where}: {name} is {getattr(self, name)}, but must be 1 to {1 << 24}.")
        if not MIN_TOKENS <= self.n_vocab <= 1 << 24:
            raise FileError(
                f"{where}: n_vocab is {self.n_vocab}, but 256 byte tokens, 3 special ones and merges need at least {MIN_TOKENS}."
            )
        if self.n_embd % (2 * self.n_head) or self.n_head % self.n_head_kv:
            raise FileError(
                f"{where}: {self.n_embd} values do not divide into {self.n_head} heads of even size over {self.n_head_kv} KV heads."
            )

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape in numpy order, (n_out, n_in), in the file's order."""
        n_kv = self.n_embd // self.n_head * self.n_head_kv
        found: dict[str, tuple[int, ...]] = {"token_embd.weight": (self.n_vocab, self.n_embd)}
        for i in range(self.n_layers):
            for module, shape in (
                ("attn_norm", (self.n_embd,)),
                ("attn_q", (self.n_embd, self.n_embd)),
                ("attn_k", (n_kv, self.n_embd)),
                ("attn_v", (n_kv, self.n_embd)),
                ("attn_output", (self.n_embd, self.n_embd)),
                ("ffn_norm", (self.n_embd,)),
                ("ffn_gate", (self.n_ff, self.n_embd)),
                ("ffn_up", (self.n_ff, self.n_embd)),
                ("ffn_down", (self.n_embd, self.n_ff)),
            ):
                found[f"blk.{i}.{module}.weight"] = shape
        found["output_norm.weight"] = (self.n_embd,)
        if not self.tied:
            found["output.weight"] = (self.n_vocab, self.n_embd)
        return found


TINY = LlamaShape()

PRESETS: Mapping[str, LlamaShape] = MappingProxyType(
    {
        "tiny": TINY,
        "smollm2-135m": LlamaShape(30, 576, 9, 3, 1536, 49_152, 8192, True, 100_000.0),
        "tinyllama-1.1b": LlamaShape(22, 2048, 32, 4, 5632, 32_000, 2048, False),
        "llama-7b": LlamaShape(32, 4096, 32, 32, 11_008, 32_000, 2048, False, norm_eps=1e-6),
        "llama2-13b": LlamaShape(40, 5120, 40, 40, 13_824, 32_000, 4096, False),
        "llama3-8b": LlamaShape(32, 4096, 32, 8, 14_336, 128_256, 8192, False, 500_000.0),
    }
)
