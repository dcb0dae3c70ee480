"""A byte-level BPE vocabulary of any size, for models without training: every text has tokens, and the tokens give it back."""

from __future__ import annotations

from itertools import product
from string import ascii_lowercase

import gguf

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # tokens 0, 1 and 2
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MIN_TOKENS = 300


def add_vocabulary(writer: gguf.GGUFWriter, n_vocab: int) -> None:
    """Three special tokens, the 256 bytes, then pairs of letters with the merges that make them, most useful first.

    `n_vocab` is at least MIN_TOKENS; tokens beyond the pairs are unused.
    """
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
