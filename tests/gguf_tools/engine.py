"""A process that gives files to llama.cpp: it reads `model PATH` or `adapter PATH` lines, and answers `ok` or `refused` to each.

Run as a program, because a file that ends the process must end another one than the test's.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TEXTS = ["Hello wörld\n\n 123 <|im_end|>", "".join(map(chr, range(32, 127))), bytes(range(128, 192)), "\N{GRINNING FACE} \t日本"]


class Engine:
    """The other end: `ask` for an answer; a dead process is replaced, and what it died of is the answer."""

    def __init__(self, base: Path) -> None:
        self.base, self.process = base, self._start(base)

    def _start(self, base: Path) -> subprocess.Popen[str]:
        command = [sys.executable, str(Path(__file__)), str(base)]
        quiet = {**os.environ, "GGML_NO_BACKTRACE": "1"}  # otherwise an abort starts a debugger, which talks on stdout
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=quiet)

    def ask(self, kind: str, path: Path) -> str:
        """`ok`, `refused`, or `died of signal N`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{kind} {path}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        if answer in ("ok", "refused"):
            return answer
        self.process.stdout.read()
        code = self.process.wait()
        self.close()
        self.process = self._start(self.base)
        return f"died of signal {-code}" if code < 0 else f"died with exit code {code}"

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        self.process.wait()


def main(base: str) -> None:
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda level, text, user_data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = _load(llama_cpp, base)
    context = _context(llama_cpp, model)
    for line in sys.stdin:
        kind, _, path = line.strip().partition(" ")
        ok = _try_model(llama_cpp, path) if kind == "model" else _try_adapter(llama_cpp, model, context, path)
        sys.stdout.write("ok\n" if ok else "refused\n")
        sys.stdout.flush()


def _load(lib: Any, path: str) -> Any:
    return lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())


def _context(lib: Any, model: Any) -> Any:
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 64
    params.n_threads = params.n_threads_batch = 1
    return lib.llama_init_from_model(model, params)


def _decode(lib: Any, model: Any, context: Any) -> bool:
    """Sixteen tokens from all over the vocabulary at once, then one alone, as in generation."""
    n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    lib.llama_memory_clear(lib.llama_get_memory(context), True)
    for start, n in ((0, 16), (16, 1)):
        batch = lib.llama_batch_init(n, 0, 1)
        batch.n_tokens = n
        for i in range(n):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = (start + i) * 37 % n_vocab, start + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, 1
        status = lib.llama_decode(context, batch)
        lib.llama_batch_free(batch)
        if status != 0:
            return False
        lib.llama_get_logits(context)[n * n_vocab - 1]
    return True


def _try_model(lib: Any, path: str) -> bool:
    model = _load(lib, path)
    if not model:
        return False
    vocab = lib.llama_model_get_vocab(model)
    room = (lib.llama_token * 2048)()
    for text in TEXTS:
        raw = text if isinstance(text, bytes) else text.encode()
        for special in (False, True):
            lib.llama_tokenize(vocab, raw, len(raw), room, len(room), True, special)
    piece = ctypes.create_string_buffer(1 << 17)
    for token in range(0, lib.llama_vocab_n_tokens(vocab), 7):
        lib.llama_token_to_piece(vocab, token, piece, len(piece), 0, True)
    context = _context(lib, model)
    ok = bool(context) and _decode(lib, model, context)
    if context:
        lib.llama_free(context)
    lib.llama_model_free(model)
    return ok


def _try_adapter(lib: Any, model: Any, context: Any, path: str) -> bool:
    adapter = lib.llama_adapter_lora_init(model, path.encode())
    if not adapter:
        return False
    adapters, scales = (lib.llama_adapter_lora_p_ctypes * 1)(adapter), (ctypes.c_float * 1)(1.0)
    ok = lib.llama_set_adapters_lora(context, adapters, 1, scales) == 0 and _decode(lib, model, context)
    lib.llama_set_adapters_lora(context, adapters, 0, scales)
    lib.llama_adapter_lora_free(adapter)
    return ok


if __name__ == "__main__":
    main(sys.argv[1])
