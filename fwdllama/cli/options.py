"""The options that several commands share, and which setting of a run each one is.

An option that is not given is None, so that every default is written once, in `fwdllama.config`, and put into the help
when that is shown. Importing this module imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from fwdllama.errors import UsageError

if TYPE_CHECKING:
    from fwdllama.config import TrainConfig

DEFAULT_SECONDS = 300.0  # of training, where no budget is given

FILES, DATA, SPACE, SLOPES = "Files", "Data", "What is trained", "How slopes are measured"
STEPS, BATCH, BUDGET, ENGINE = "Steps", "Examples in memory", "When it ends", "Engine"

DataKind = Literal["squad", "pairs", "classification"]
SET = "{}"  # stands in a help text for the default in the configuration

KindName = Literal["auto", "squad", "pairs", "classification"]
TemplateName = Literal["seed", "chat"]


class Command(TyperCommand):
    """A command whose help says the defaults of `fwdllama.config`, which is imported for help only when it is shown."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        say_defaults(self)
        super().format_help(ctx, formatter)


def say_defaults(command: Any) -> None:
    """Put the default of each setting, its option's own or the configuration's, into the help of its option; safe to call twice."""
    from fwdllama.config import HALF_LIFE, LR, USUAL_PROBES, make_config

    config = make_config({"budget": {"steps": 1}})
    left_open = {"lr": f"{LR}, less in runs of more than {USUAL_PROBES:,} probes", "half_life": f"{HALF_LIFE}, more in such runs"}
    for parameter in command.params:
        if parameter.name in SETTINGS and SET in (parameter.help or ""):
            value: Any = config
            for part in SETTINGS[parameter.name].split("."):
                value = getattr(value, part)
            value = value if parameter.default is None else parameter.default
            if value is None:
                value = left_open[parameter.name]
            if isinstance(value, bool):
                value = parameter.name if value else f"no-{parameter.name}"
            text = ",".join(value) if isinstance(value, tuple) else str(value)
            parameter.help = parameter.help.replace(SET, text)


def option(panel: str, help: str, default: str | None = None, *names: str, **more: Any) -> Any:
    """An option of a help panel; `default` is what its help says, `SET` for the configuration's own."""
    text = help if default is None else f"{help} Default: {default}."
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False, **more)


def switch(name: str, panel: str, help: str) -> Any:
    """An option `--name/--no-name`."""
    return option(panel, help, SET, f"--{name}/--no-{name}")


Model = Annotated[
    str, option(FILES, "Base model: a name such as smollm2-135m, or the path of a GGUF file.", metavar="MODEL")
]
Data = Annotated[
    Path,
    option(FILES, "What to learn from: SQuAD JSON, JSONL of prompts and answers, or CSV with labels.", metavar="FILE"),
]
Kind = Annotated[KindName, option(DATA, "Kind of data; auto tells it from the content.", "auto")]
Labels = Annotated[
    str | None,
    option(DATA, "Classification: the word for each class, such as 1=World,2=Sports.", "AG News's", metavar="A=W,B=W"),
]
Template = Annotated[TemplateName | None, option(DATA, "How questions are put to the model.", SET)]

Modules = Annotated[
    str | None,
    option(SPACE, "Adapted matrices, out of q, k, v, o, gate, up and down.", SET, metavar="NAME,NAME"),
]
Layers = Annotated[
    str | None,
    option(SPACE, "Adapted layers, first to last, or one.", "from 0.3 to 0.6 of the depth", metavar="FIRST-LAST"),
]
Rank = Annotated[int | None, option(SPACE, "Rank of each adapted matrix.", SET, metavar="N")]
Alpha = Annotated[float | None, option(SPACE, "Scale of the adapter: alpha / rank.", SET, metavar="X")]
Train = Annotated[Literal["b", "ab"] | None, option(SPACE, "Which half is trained: B alone, or A too.", SET)]
Init = Annotated[
    Literal["activation", "random"] | None,
    option(SPACE, "How A is chosen: from what the matrices are given, or at random.", SET),
]
Scope = Annotated[
    Literal["answer", "all"] | None,
    option(
        SPACE,
        "Where the adapter is on: from the answer on (ten times faster, for fwdllama and llama-server), or for the "
        "whole prompt (for any runtime).",
        SET,
    ),
]

ExamplesPerProbe = Annotated[int | None, option(SLOPES, "Examples that share a direction.", SET, metavar="N")]
Sided = Annotated[Literal["one", "two"] | None, option(SLOPES, "Losses at one side of theta, or at both.", SET)]
Rounds = Annotated[int | None, option(SLOPES, "Directions for each example in a step.", SET, metavar="N")]
FirstRounds = Annotated[
    int | None,
    option(
        SLOPES,
        "More directions for each example, judged by the first token of its answer alone, which costs a fourth.",
        "10, with --scope all or --objective f1 none",
        metavar="N",
    ),
]
Eps = Annotated[float | None, option(SLOPES, "Distance of a probe.", "calibrated", metavar="X")]
Outlier = Annotated[float | None, option(SLOPES, "Examples count less from so many times the mean loss on.", SET, metavar="X")]
ExampleClip = Annotated[
    float | None, option(SLOPES, "Slopes of one example are at most so many times the median example's.", SET, metavar="X")
]
Objective = Annotated[
    Literal["nll", "f1"] | None, option(SLOPES, "What is improved: the answers' likelihood, or their F1.", SET)
]
Vocabulary = Annotated[
    Literal["data", "whole"] | None,
    option(
        SLOPES,
        "Tokens that an answer's likelihood is measured against: those of the data, where the layers below the adapted ones are computed "
        "apart, which takes a sixth off a step; or the whole vocabulary.",
        SET,
    ),
]
Pacing = Annotated[
    Literal["fixed", "variance"] | None,
    option(SLOPES, "Probes of a step: always as many, or until their mean is known well enough.", SET),
]
Tau = Annotated[float | None, option(SLOPES, "How well, for --pacing variance.", SET, metavar="X")]

Lr = Annotated[float | None, option(STEPS, "Length of a step.", SET, metavar="X")]
HalfLife = Annotated[int | None, option(STEPS, "Probes after which steps are half as long, and after twice as many a third.", SET, metavar="N")]
Warmup = Annotated[bool | None, switch("warmup", STEPS, "Begin with six steps of few probes, each long for it.")]
Candidates = Annotated[int | None, option(STEPS, "Draw so many directions and keep the one most like the last step.", SET, metavar="N")]
Accept = Annotated[
    bool | None,
    switch("accept", STEPS, "Try each step on fresh examples, and take it back where they get worse."),
]

Units = Annotated[int | None, option(BATCH, "Paragraphs (or single examples) held at once.", SET, metavar="N")]
PerUnit = Annotated[int | None, option(BATCH, "Questions of each paragraph.", SET, metavar="N")]
Fresh = Annotated[int | None, option(BATCH, "Paragraphs replaced before each step.", SET, metavar="N")]
HeldOut = Annotated[
    int | None,
    option(BATCH, "Examples whose loss is watched, of paragraphs that are not trained on.", SET, metavar="N"),
]
Ctx = Annotated[
    int | None, option(BATCH, "Tokens of an example; longer ones are left out.", "most of the data fit", metavar="N")
]

Seconds = Annotated[float | None, option(BUDGET, "Seconds of training.", "300, if nothing is given", metavar="S")]
Steps = Annotated[int | None, option(BUDGET, "Steps.", "no limit", metavar="N")]
Probes = Annotated[int | None, option(BUDGET, "Probes.", "no limit", metavar="N")]
Patience = Annotated[
    int | None, option(BUDGET, "End after so many measurements without a better held-out loss.", "never", metavar="N")
]

Seed = Annotated[int | None, option(ENGINE, "Everything random follows from it.", SET, metavar="N")]
Threads = Annotated[int | None, option(ENGINE, "CPU threads.", "one a physical core", metavar="N")]
KvType = Annotated[
    str | None, option(ENGINE, "Type of the KV cache: f16, f32, bf16, q8_0, ..., q4_0.", SET, metavar="TYPE")
]
Mmap = Annotated[
    bool | None,
    switch("mmap", ENGINE, "Map the model's file instead of reading it; smallest together with --no-repack."),
]
Repack = Annotated[
    bool | None,
    switch("repack", ENGINE, "Rearrange the weights for this CPU; fastest."),
]
NBatch = Annotated[
    int | None, option(ENGINE, "Tokens decoded at once: fewer need less memory, and take longer for prompts.", SET, metavar="N")
]
GpuLayers = Annotated[int | None, option(ENGINE, "Layers on a GPU, if llama.cpp was built for one.", SET, metavar="N")]
Trunk = Annotated[
    bool | None,
    switch("trunk", ENGINE, "Compute the layers below the first adapted one once an example."),
]
Together = Annotated[
    int | None,
    option(ENGINE, "Examples in a decode of probes, each probe with numbers of its own; 1: one probe after the other.", SET, metavar="N"),
]
KeepPrompts = Annotated[
    str | None,
    option(ENGINE, "Disk for the prompts' KV, in the cache folder, where data are few enough to be seen again; or no.", "2GB", metavar="SIZE"),
]

StageLayers = Annotated[
    int | None,
    option(
        ENGINE,
        "Train in two passes: first everything through the layers below the trained ones, so many of them in memory at a time, then training "
        "with the upper ones alone. What lies between waits on disk. Peak memory is that of the larger pass.",
        "one pass, all layers in memory",
        metavar="N",
    ),
]
States = Annotated[
    Literal["f32", "f16"] | None,
    option(ENGINE, "Type of what enters the first trained layer.", "f16 where it waits on disk, f32 in memory"),
]
MemoryBudget = Annotated[
    str | None,
    option(
        ENGINE,
        "Stay within so much memory, such as 2GB: chooses mapping, KV type, passes, examples in memory and layers, as far as they are not given, "
        "and says what.",
        "all that there is",
        metavar="SIZE",
    ),
]
FromLayer = Annotated[
    int | None, option(SPACE, "First adapted layer, for as many as would be adapted.", "see --layers", metavar="N", min=0)
]

# Every option that is a setting of `fwdllama.config.TrainConfig`, by its parameter's name.
SETTINGS: Mapping[str, str] = {
    "seed": "seed",
    "template": "template",
    **{name: f"space.{name}" for name in ("modules", "layers", "rank", "alpha", "train", "init", "scope")},
    **{name: f"estimator.{name}" for name in ("examples_per_probe", "sided", "rounds", "first_rounds")},
    **{name: f"estimator.{name}" for name in ("eps", "outlier", "example_clip", "objective", "vocabulary")},
    "pacing": "pacing.kind",
    "tau": "pacing.tau",
    **{name: f"step.{name}" for name in ("lr", "half_life", "warmup", "candidates", "accept")},
    **{name: f"batch.{name}" for name in ("units", "per_unit", "fresh", "held_out")},
    "ctx": "batch.n_ctx",
    **{name: f"budget.{name}" for name in ("seconds", "steps", "probes", "patience")},
    "threads": "engine.n_threads",
    "gpu_layers": "engine.n_gpu_layers",
    **{name: f"engine.{name}" for name in ("kv_type", "mmap", "repack", "n_batch", "together", "trunk", "stage_layers", "states")},
    "keep_prompts": "engine.keep_prompts_bytes",
}


def configuration(given: Mapping[str, Any]) -> TrainConfig:
    """A checked configuration from a command's parameters; None, and names that are no setting, are passed over.

    Raises:
        UsageError: a value cannot be; the sentence names the option.
    """
    from fwdllama.config import make_config

    values: dict[str, Any] = {"budget": {}}
    for name, path in SETTINGS.items():
        value = given.get(name)
        if value is not None:
            *sections, field = path.split(".")
            place = values
            for section in sections:
                place = place.setdefault(section, {})
            place[field] = _PARSERS[name](value) if name in _PARSERS else value
    if not values["budget"].keys() & {"seconds", "steps", "probes"}:
        values["budget"]["seconds"] = DEFAULT_SECONDS
    try:
        return make_config(values)
    except UsageError as error:
        raise UsageError(_named_as_option(str(error))) from error


def _named_as_option(sentence: str) -> str:
    """`space.rank: ...` as the user wrote it, `--rank: ...`."""
    place, colon, rest = sentence.partition(":")
    for name, path in SETTINGS.items():
        if place == path or place.startswith(f"{path}."):
            return f"--{name.replace('_', '-')}{colon}{rest}"
    return sentence


def _modules(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _layers(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    try:
        return int(first), int(last if dash else first)
    except ValueError:
        raise UsageError(f"--layers is {text!r}, but must be the first and the last layer, such as 9-17.") from None


def _keep_prompts(text: str) -> int | None:
    from fwdllama.cli.budget import memory_size

    return None if text.strip().lower() == "no" else memory_size(text, "--keep-prompts", "no, or ")


_PARSERS: Mapping[str, Callable[[str], Any]] = {"modules": _modules, "layers": _layers, "keep_prompts": _keep_prompts}


def label_words(text: str | None) -> dict[str, str] | None:
    """The word for each class, from `1=World,2=Sports`; None where nothing is given.

    Raises:
        UsageError: it is of another form, or names a class twice.
    """
    if text is None:
        return None
    words: dict[str, str] = {}
    for part in text.split(","):
        label, equals, word = (piece.strip() for piece in part.partition("="))
        if not (label and equals and word) or label in words:
            raise UsageError(f"--labels is {text!r}, but must give each class once, such as 1=World,2=Sports.")
        words[label] = word
    return words
