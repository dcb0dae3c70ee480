"""What a model is quantised to: one type for most matrices, others for some, and what each needs.

llama.cpp ignores some wishes silently and aborts the process on others (rows that are not whole blocks, types that need importance
data), so single tensors are named here one by one, and every wish that would not come true is refused.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from gguf import LlamaFileType
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from gguf_tools.errors import FileError
from gguf_tools.model import ModelInfo

ALIASES = {"INT4": "Q4_0", "INT8": "Q8_0", "Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
# Every type of file that llama.cpp makes and the gguf package reads; it has no name for Q2_0, and llama.cpp no recipe for NVFP4.
FILE_TYPES = {
    kind.name.removeprefix("MOSTLY_").removeprefix("ALL_"): kind
    for kind in LlamaFileType
    if kind not in (LlamaFileType.GUESSED, LlamaFileType.MOSTLY_NVFP4)
}
_NO_QUANTISER = ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64")
TENSOR_TYPES = {kind.name: kind for kind in GGMLQuantizationType if kind.name not in _NO_QUANTISER}
# So few bits that llama.cpp refuses, or aborts, without importance data.
NEEDS_IMPORTANCE = frozenset(
    TENSOR_TYPES[name] for name in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
)
_FEW_BITS = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S")  # file types, as above
_PLAIN = (LlamaFileType.ALL_F32, LlamaFileType.MOSTLY_F16, LlamaFileType.MOSTLY_BF16)


@dataclass(frozen=True)
class Recipe:
    """Types of a model's matrices.

    `type` is a file type such as `Q4_K_M`, whose mixture llama.cpp decides; with `pure` there is no mixture. `tensors` are pairs of
    a regular expression and a tensor type; the first that is found in a tensor's name counts. `output` and `embeddings` are tensor
    types for these two, which are one tensor in some models. `imatrix` is a file of importance data.
    """

    type: str
    tensors: tuple[tuple[str, str], ...] = ()
    output: str | None = None
    embeddings: str | None = None
    pure: bool = False
    imatrix: str | os.PathLike[str] | None = None


def file_type(recipe: Recipe) -> LlamaFileType:
    """The file type of a recipe, aliases resolved.

    Raises:
        FileError: there is none of that name, or it needs importance data.
    """
    name = recipe.type.upper()
    kind = FILE_TYPES.get(ALIASES.get(name, name))
    if kind is None:
        raise FileError(
            f"quantisation type {recipe.type!r} is unknown; these can be made: {', '.join(FILE_TYPES)}, and int4 (Q4_0), int8 (Q8_0)."
        )
    if name in _FEW_BITS and recipe.imatrix is None:
        raise FileError(f"quantisation type {name} has so few bits that it needs importance data; see --imatrix.")
    return kind


def tensor_type(name: str) -> GGMLQuantizationType:
    """The type of a single tensor, aliases of plain types resolved.

    Raises:
        FileError: llama.cpp quantises to no type of that name.
    """
    plain = ALIASES.get(name.upper(), "") if name.upper().startswith("INT") else name.upper()
    if plain not in TENSOR_TYPES:
        raise FileError(f"tensor type {name!r} is unknown; a single tensor can be {', '.join(TENSOR_TYPES)}.")
    return TENSOR_TYPES[plain]


def file_type_of(kind: GGMLQuantizationType) -> LlamaFileType:
    """The file type of a model whose matrices are all of one tensor type."""
    return next(FILE_TYPES[name] for name in (kind.name, f"{kind.name}_S", f"{kind.name}_MOE") if name in FILE_TYPES)


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp would quantise a tensor of a LLaMA-like model."""
    return len(shape) >= 2 and name.endswith(".weight") and not name.endswith("_norm.weight")


def check_rows(where: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> None:
    """Refuse a type whose blocks do not fill a tensor's rows; `where` names the tensor.

    Raises:
        FileError: they do not.
    """
    block = GGML_QUANT_SIZES[kind][0]
    if shape[-1] % block:
        raise FileError(f"{where} has rows of {shape[-1]} values, but {kind.name} needs whole blocks of {block}.")


def misfits(recipe: Recipe, info: ModelInfo) -> list[str]:
    """Matrices whose rows are not whole blocks of the recipe's type, for which llama.cpp takes a larger type instead."""
    name = file_type(recipe).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    kind = next((TENSOR_TYPES[stem] for stem in (name, name.rpartition("_")[0]) if stem in TENSOR_TYPES), None)
    block = GGML_QUANT_SIZES[kind][0] if kind is not None else 256  # IQ2_M, IQ3_XS and IQ3_M have no type of their own
    return [each for each, (shape, _) in info.tensors.items() if is_matrix(each, shape) and shape[-1] % block]


def tensor_overrides(
    recipe: Recipe, info: ModelInfo, important: frozenset[str]
) -> list[tuple[str, GGMLQuantizationType]]:
    """The tensors whose type the recipe names, each once; `important` are those with importance data.

    Raises:
        FileError: a pattern fits nothing or is none, a type does not fit its tensor, needs importance data that is missing, or would
            be ignored.
    """
    found: dict[str, GGMLQuantizationType] = {}
    output = "token_embd.weight" if info.tied_embeddings else "output.weight"
    wishes = [(f"^{re.escape(name)}$", kind) for name, kind in
              ((output, recipe.output), ("token_embd.weight", recipe.embeddings)) if kind is not None]  # fmt: skip
    if info.tied_embeddings and len(wishes) == 2 and tensor_type(wishes[0][1]) != tensor_type(wishes[1][1]):
        raise FileError(
            f"{info.path}: output and embeddings are one tensor in this model, so they cannot be {recipe.output} and {recipe.embeddings}."
        )
    for pattern, wish in (*wishes, *recipe.tensors):
        kind = tensor_type(wish)
        try:
            names = [name for name, (shape, _) in info.tensors.items() if is_matrix(name, shape) and re.search(pattern, name)]
        except (re.error, RecursionError) as error:
            raise FileError(f"the tensor pattern {pattern!r} is no regular expression: {error}.") from None
        if not names:
            raise FileError(f"{info.path}: the tensor pattern {pattern!r} fits none of its matrices, such as blk.0.attn_q.weight.")
        for name in names:
            if found.setdefault(name, kind) != kind:
                continue  # an earlier wish
            check_rows(f"{info.path}: {name}", info.tensors[name][0], kind)
            if kind in NEEDS_IMPORTANCE and name not in important:
                raise FileError(f"{info.path}: {name} cannot be {kind.name} without importance data for it; see --imatrix.")
    if found and file_type(recipe) in _PLAIN:
        raise FileError(f"single tensors can be of another type only beside a quantised one, not beside {recipe.type.upper()}.")
    return list(found.items())
