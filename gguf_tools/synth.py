"""Tiny LLaMA models with random weights, for tests: real files that llama.cpp loads, made in milliseconds.

The weights are scaled so that the model is as uncertain as it should be: normed activations have variance one, the
output matrix turns them into logits with a standard deviation of 0.5, and a token's loss is about ln(n_vocab) + 0.12
nats.
"""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path
from string import ascii_lowercase
from typing import Literal

import gguf
import numpy as np
from gguf.quants import quantize
from numpy.typing import NDArray

from gguf_tools.errors import FileError

TensorType = Literal["F32", "F16", "Q8_0", "Q4_0"]
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # tokens 0, 1 and 2
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LOGIT_DEVIATION = 0.5


def write_tiny_llama(
    path: str | os.PathLike[str],
    *,
    n_layers: int = 3,
    n_embd: int = 64,
    n_head: int = 4,
    n_head_kv: int = 2,
    n_ff: int = 128,
    n_vocab: int = 320,
    seed: int = 0,
    type: TensorType = "F32",
    tied: bool = True,
    architecture: str = "llama",
    context_length: int = 2048,
) -> Path:
    """Write a random model with a byte-level BPE tokenizer and a chat template; the same arguments give the same bytes.

    Matrices are stored as `type`, norms as F32. Without `tied` there is an output matrix of its own. `architecture`
    only names the file's keys: the tensors are those of `llama`.

    Raises:
        FileError: the sizes do not fit together, or the path cannot be written.
    """
    if n_vocab < 300:
        raise FileError(
            f"{path}: n_vocab is {n_vocab}, but 256 byte tokens, 3 special ones and merges need at least 300."
        )
    if n_embd % (2 * n_head) or n_head % n_head_kv:
        raise FileError(
            f"{path}: {n_embd} values do not divide into {n_head} heads of even size over {n_head_kv} KV heads."
        )
    if type in ("Q8_0", "Q4_0") and (n_embd % 32 or n_ff % 32):
        raise FileError(f"{path}: n_embd {n_embd} and n_ff {n_ff} must be multiples of 32 for {type}.")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("model")
    writer.add_name(f"tiny {architecture} {seed}")
    writer.add_block_count(n_layers)
    writer.add_context_length(context_length)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv)
    writer.add_rope_dimension_count(n_embd // n_head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(n_vocab)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if type == "F32" else f"MOSTLY_{type}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_tokenizer(writer, n_vocab)
    rng = np.random.Generator(np.random.Philox(seed))
    for name, shape, deviation in _tensors(n_layers, n_embd, n_head, n_head_kv, n_ff, n_vocab, tied):
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, np.float32))
            continue
        values: NDArray[np.float32] = rng.standard_normal(shape, dtype=np.float32) * np.float32(deviation)
        kind = gguf.GGMLQuantizationType[type]
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error.strerror or error}.") from None
    finally:
        writer.close()
    return Path(path)


def _tensors(
    n_layers: int, n_embd: int, n_head: int, n_head_kv: int, n_ff: int, n_vocab: int, tied: bool
) -> list[tuple[str, tuple[int, ...], float]]:
    """Names, shapes (n_out, n_in) and standard deviations; matrices keep the variance of what they are applied to."""
    n_kv = n_embd // n_head * n_head_kv
    output = _LOGIT_DEVIATION * n_embd**-0.5
    tensors: list[tuple[str, tuple[int, ...], float]] = [
        ("token_embd.weight", (n_vocab, n_embd), output if tied else 1.0)
    ]
    for i in range(n_layers):
        for module, shape in (
            ("attn_norm", (n_embd,)),
            ("attn_q", (n_embd, n_embd)),
            ("attn_k", (n_kv, n_embd)),
            ("attn_v", (n_kv, n_embd)),
            ("attn_output", (n_embd, n_embd)),
            ("ffn_norm", (n_embd,)),
            ("ffn_gate", (n_ff, n_embd)),
            ("ffn_up", (n_ff, n_embd)),
            ("ffn_down", (n_embd, n_ff)),
        ):
            tensors.append((f"blk.{i}.{module}.weight", shape, shape[-1] ** -0.5))
    tensors.append(("output_norm.weight", (n_embd,), 1.0))
    if not tied:
        tensors.append(("output.weight", (n_vocab, n_embd), output))
    return tensors


def _add_tokenizer(writer: gguf.GGUFWriter, n_vocab: int) -> None:
    """Three special tokens, the 256 bytes, then pairs of letters with the merges that make them, most useful first."""
    tokens = [END_OF_TEXT, TURN_START, TURN_END, *_byte_characters()]
    kinds = [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 256
    space = _byte_characters()[ord(" ")]
    pairs = [(space, letter) for letter in ascii_lowercase] + list(product(ascii_lowercase, repeat=2))
    merges = pairs[: n_vocab - len(tokens)]
    tokens += [first + second for first, second in merges]
    kinds += [gguf.TokenType.NORMAL] * len(merges)
    n_unused = n_vocab - len(tokens)
    tokens += [f"<|unused_{i}|>" for i in range(n_unused)]
    kinds += [gguf.TokenType.UNUSED] * n_unused
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{first} {second}" for first, second in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_eot_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _byte_characters() -> list[str]:
    """The printable character for each byte in byte-level BPE: itself, or the next one free from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    characters, n_moved = [], 0
    for byte in range(256):
        characters.append(chr(byte if byte in printable else 256 + n_moved))
        n_moved += byte not in printable
    return characters
