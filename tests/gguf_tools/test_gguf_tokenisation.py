"""A converted vocabulary cuts texts in llama.cpp as the original does, each compared on 1,000 varied strings."""

from __future__ import annotations

import importlib.util
import io
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from gguf_tools.convert import convert_model
from tests.gguf_tools.conftest import Llama, Opener
from tests.gguf_tools.folder import CONFIG, write_folder

ALPHABETS = ("abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789", " ", "  \t\n\r", "\u00a0\u3000\u2009\u200b",
             ".,;:!?'\"()[]{}<>/\\|@#$%^&*-_=+~`", "äöüßéèñçøåłžşğ", "абвгдежзийклмн", "αβγδεζηθικλμν", "אבגדהוזח", "ابتثجحخد",
             "अआइईउकखगघ", "你好世界中文字符", "日本語カタカナひらがな", "한국어조선말",
             "👍😀🎉🚀❤️👩‍💻🇩🇪", "e\u0301a\u0308\u0327", "½²³Ⅷ٣௧", "\x00\x07\x7f", "▁▁ ")  # fmt: skip
WORDS = ("the", "The", "hello", "world", "I'm", "don't", "we'LL", "it's", "they've", "123", "4567890", "3.14", "x_1", "foo(bar);",
         "https://a.b/c?d=e", "<s>", "</s>", "[INST]", "<0x0A>", "\n\n", "\r\n", "   ", "naïve", "été", "I", "a", "Zürich", "==", "->",
         "don\u2019t", "'S", "…", "C++", "#include", "def f(x):\n    return x", "東京", "Привет", "مرحبا", "🙂", "ﬁ", "İ", "ǆ")  # fmt: skip
CORPUS = ("The quick brown fox jumps over the lazy dog. Hello world, it's 1234 o'clock and we've been here before!\n"
          "def f(x):\n    return x + 12345  # Grüße aus Zürich, été naïve; Привет мир, 你好世界\n") * 40  # fmt: skip


def varied(n: int = 1000) -> list[str]:
    """Words, scripts, spaces and symbols in every mixture; the same ones each time."""
    rng = random.Random(7)
    texts = ["", " ", "  ", "\n", "a", " a", "a ", *WORDS]
    while len(texts) < n:
        parts = []
        for _ in range(rng.randint(1, 12)):
            if rng.random() < 0.5:
                parts.append(rng.choice(WORDS))
            else:
                parts.append("".join(rng.choices(rng.choice(ALPHABETS), k=rng.randint(1, 6))))
        texts.append(rng.choice(("", " ", " ")).join(parts))
    return texts[:n]


def converted(tmp_path: Path, open_llama: Opener, n_vocab: int, tokenizer: dict[str, Any], model: Path | None = None) -> Llama:
    """A random model with this vocabulary, opened by llama.cpp."""
    config = CONFIG | {"vocab_size": n_vocab, "num_hidden_layers": 1, "eos_token_id": 2}
    folder = write_folder(tmp_path / "hf", config, tokenizer=tokenizer)
    if model is not None:
        (folder / "tokenizer.model").write_bytes(model.read_bytes())
    convert_model(folder, tmp_path / "m.gguf")
    return open_llama(tmp_path / "m.gguf")


def assert_same(llama: Llama, encode: Callable[[str], Sequence[int]], texts: Sequence[str]) -> None:
    """Every text gives the same tokens; the first ones that do not are shown."""
    differing = [(text, list(encode(text)), llama.tokenise(text)) for text in texts]
    differing = [one for one in differing if one[1] != one[2]]
    assert not differing, f"{len(differing)} of {len(texts)} differ: {differing[:3]}"


@pytest.mark.parametrize("name", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240216.model.v2"])
def test_a_real_llama_vocabulary_tokenises_as_sentencepiece_does(name: str, tmp_path: Path, open_llama: Opener) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="the original tokeniser is in the extra `interop`")
    spec = importlib.util.find_spec("mistral_common")  # found, not imported: only its data are used
    if spec is None or spec.origin is None:
        pytest.skip("needs a real LLaMA vocabulary, which the package mistral-common of the extra `interop` ships")
    path = Path(spec.origin).parent / "data" / name
    original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    llama = converted(tmp_path, open_llama, original.vocab_size(), {}, path)
    assert_same(llama, original.encode, varied())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sentencepiece model of LLaMA's kind."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="the trainer is in the extra `interop`")
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()), model_writer=out, model_type="bpe", vocab_size=500, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, minloglevel=2, num_threads=1,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    path.write_bytes(out.getvalue())
    return path


def test_a_trained_vocabulary_tokenises_as_sentencepiece_does(trained: Path, tmp_path: Path, open_llama: Opener) -> None:
    import sentencepiece

    llama = converted(tmp_path, open_llama, 512, {}, trained)  # twelve tokens are padding
    assert_same(llama, sentencepiece.SentencePieceProcessor(model_file=str(trained)).encode, varied())


@pytest.mark.parametrize("scheme", ["Prepend", "Metaspace"])
def test_its_tokenizer_json_tokenises_the_same(scheme: str, trained: Path, tmp_path: Path, open_llama: Opener) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="the original tokeniser is in the extra `interop`")
    import sentencepiece

    spm = sentencepiece.SentencePieceProcessor(model_file=str(trained))
    ids = {spm.id_to_piece(i): i for i in range(spm.vocab_size())}
    ranked = sorted((i for i in range(259, len(ids)) if len(spm.id_to_piece(i)) > 1), key=lambda i: (-spm.get_score(i), i))
    merges = []
    for piece in map(spm.id_to_piece, ranked):
        cuts = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        merges += sorted((cut for cut in cuts if set(cut) <= set(ids)), key=lambda cut: (ids[cut[0]], ids[cut[1]]))
    original = tokenizers.Tokenizer(tokenizers.models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    texts = varied()
    if scheme == "Prepend":
        original.normalizer = tokenizers.normalizers.Sequence(
            [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
        )
    else:  # puts no space before a space, which llama.cpp cannot leave out: the conversion warns
        original.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        texts = [text for text in texts if not text.startswith((" ", "▁"))]
    llama = converted(tmp_path, open_llama, len(ids), json.loads(original.to_str()))
    assert_same(llama, lambda text: original.encode(text).ids, texts)


def cutters(tokenizers: Any) -> dict[str, tuple[list[Any], bool]]:
    from gguf_tools import bpe

    def split(regex: str) -> Any:
        return tokenizers.pre_tokenizers.Split(tokenizers.Regex(regex), "isolated")

    byte_level = tokenizers.pre_tokenizers.ByteLevel
    plain = byte_level(add_prefix_space=False, use_regex=False)
    return {
        "gpt-2": ([byte_level(add_prefix_space=False)], False),
        "smollm": ([tokenizers.pre_tokenizers.Digits(individual_digits=True), byte_level(add_prefix_space=False)], False),
        "llama-bpe": ([split(bpe._LLAMA3), plain], True),
        "smaug-bpe": ([split(bpe._LLAMA3), plain], False),
        "qwen2": ([split(bpe._QWEN2), plain], False),
    }


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2"])
def test_byte_level_bpe_tokenises_as_tokenizers_does(name: str, tmp_path: Path, open_llama: Opener) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="the original tokeniser is in the extra `interop`")
    steps, ignore_merges = cutters(tokenizers)[name]
    original = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=ignore_merges))
    original.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)
    original.decoder = tokenizers.decoders.ByteLevel()
    original.train_from_iterator(CORPUS.splitlines(), tokenizers.trainers.BpeTrainer(
        vocab_size=500, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    ))  # fmt: skip
    original.add_special_tokens(["<|end|>"])
    original.add_tokens(["[INST]"])
    llama = converted(tmp_path, open_llama, original.get_vocab_size(), json.loads(original.to_str()))
    assert_same(llama, lambda text: original.encode(text).ids, varied())
