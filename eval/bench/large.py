"""Memory at the shape of LLaMA-7B, under a hard limit: random weights cost what trained ones do.

The model is made by `fwdllama gguf synth` in the cache and removed afterwards. Training is as short as reaches its peak: one step of one
round, eight prompts of about 200 tokens and one that is watched, A drawn at random and eps given, so that nothing else is measured. The
file leaves the page cache before each run, so that all of it counts as the run's. 1 GB is 10^9 bytes.
"""

from __future__ import annotations

import functools
import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .child import Ran, in_child, run
from .limit import uncached
from .measure import Bar, Bench, Item, Measured
from .runs import train_words

GB = 10**9
N_PROMPTS, PROMPT_TOKENS, CTX = 8, 200, 256
LLAMA_7B = ("--like", "llama-7b")
TRAINED_SHARE = 4  # the last quarter of the layers is trained: 8 of 32
MARGIN = 0.95  # of what may be used is given to the planner, which may be wrong by a few percent
NEW_TOKENS = 4  # of an answer in the evaluation; its peak is that of the prompts
COMMON = {"ctx": CTX}
TRAINING = {
    "units": N_PROMPTS, "per_unit": 1, "fresh": 1, "held_out": 1, "rounds": 1, "steps": 1, "init": "random", "eps": 0.01,
    "scope": "answer",
}  # fmt: skip
# The whole model in memory; the first of these that is planned to stay under the bar.
WHOLE = ({"kv_type": "f16"}, {"kv_type": "q8_0"}, {"kv_type": "q4_0"})

Values = Mapping[str, Any]  # options by parameter name


@dataclass(frozen=True)
class Bound:
    """What a type's runs must stay below, in bytes: of the unstaged one, of the staged one, and the hard limits of both."""

    type: str
    whole_bytes: int
    staged_bytes: int
    whole_limit: int
    staged_limit: int


INT4 = Bound("q4_0", int(4.4 * GB), int(1.6 * GB), 5 * GB, 2 * GB)
INT8 = Bound("q8_0", int(8.2 * GB), int(2.6 * GB), 9 * GB, 3 * GB)


def words_of(values: Values) -> tuple[str, ...]:
    """Options as one types them.

    >>> words_of({"kv_type": "q8_0", "mmap": True, "repack": False})
    ('--kv-type', 'q8_0', '--mmap', '--no-repack')
    """
    words: list[str] = []
    for name, value in values.items():
        option = name.replace("_", "-")
        words += [f"--{option}" if value else f"--no-{option}"] if isinstance(value, bool) else [f"--{option}", str(value)]
    return tuple(words)


def large(bound: Bound, bench: Bench, shape: tuple[str, ...] = LLAMA_7B) -> Measured:
    """Make the model, train it whole and in stages, evaluate it, and remove it."""
    from fwdllama.models import default_cache_dir

    folder = default_cache_dir() / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / f"random-{bound.type}.gguf"
    before = set(default_cache_dir().glob("parts/*"))
    try:
        run(bench, "gguf", "synth", *shape, "--type", bound.type, "-o", model, "--force")
        return Measured(figures(bound, bench, model), f"fwdllama bench {NAMES[bound]}")
    finally:
        model.unlink(missing_ok=True)
        for made in set(default_cache_dir().glob("parts/*")) - before:  # what training cut out of it
            shutil.rmtree(made) if made.is_dir() else made.unlink()


def figures(bound: Bound, bench: Bench, model: Path) -> dict[str, Any]:
    """Everything that is measured on a model that is there."""
    from gguf_tools.model import read_model_info

    info = read_model_info(model)
    data, n_tokens = in_child(write_prompts, bench.work / "prompts.jsonl", info.n_vocab)
    layers = f"{info.n_layers - max(1, info.n_layers // TRAINED_SHARE)}-{info.n_layers - 1}"
    values = {**COMMON, **TRAINING, "layers": layers}
    planned = in_child(planned_bytes, model, [{**values, **more} for more in WHOLE])
    chosen = next((i for i, n_bytes in enumerate(planned) if n_bytes <= bound.whole_bytes), len(WHOLE) - 1)
    kv_type = str(WHOLE[chosen]["kv_type"])
    whole = trained(bench, model, data, words_of({**values, **WHOLE[chosen]}), bound.whole_limit)
    recorded = in_child(recorded_plan, bench.work / "large" / "run")
    options = words_of({**COMMON, "kv_type": kv_type, "batch": recorded["n_seq"], "limit": N_PROMPTS, "max_new_tokens": NEW_TOKENS})
    uncached(model)
    evaluated = run(bench, "eval", "--model", model, "--data", data, *options, "--json", limit_bytes=bound.whole_limit)
    found: dict[str, Any] = {
        "model_bytes": info.size_bytes,
        "prompt_tokens": n_tokens,
        "trained_layers": layers,
        "kv_type": kv_type,
        "limited_by": whole.limit,
        "limit_bytes": bound.whole_limit,
        "completed": True,
        "whole_bytes": whole.peak_bytes,
        "whole_group_bytes": whole.group_bytes,
        "whole_wall_s": whole.wall_s,
        "whole_planned_bytes": recorded["planned_bytes"],
        "eval_bytes": evaluated.peak_bytes,
        "ratio": whole.peak_bytes / evaluated.peak_bytes,
        "plan_error": abs(recorded["planned_bytes"] / whole.peak_bytes - 1),
        "whole_command": whole.command,
    }
    return found | staged(bound, bench, model, data, values)


def staged(bound: Bound, bench: Bench, model: Path, data: Path, values: Values) -> dict[str, Any]:
    """The same training in stages, each of which holds a part of the model only, as the planner chooses them for the bar."""
    ran = trained(bench, model, data, words_of({**values, "memory_budget": int(MARGIN * bound.staged_bytes)}), bound.staged_limit)
    planned = in_child(recorded_plan, bench.work / "large" / "run")["planned_bytes"]
    engine = json.loads((bench.work / "large" / "run" / "config.json").read_text())["engine"]
    chosen = [f"KV {engine['kv_type']}", "repacked" if engine["repack"] else "not repacked", *(["mapped"] if engine["mmap"] else [])]
    return {
        "staged_options": f"slices of {engine['stage_layers']} layers, {', '.join(chosen)}",
        "staged_bytes": ran.peak_bytes,
        "staged_group_bytes": ran.group_bytes,
        "staged_limit_bytes": bound.staged_limit,
        "staged_wall_s": ran.wall_s,
        "staged_planned_bytes": planned,
        "staged_plan_error": abs(planned / ran.peak_bytes - 1),
        "staged_command": ran.command,
    }


def trained(bench: Bench, model: Path, data: Path, words: tuple[str, ...], limit_bytes: int) -> Ran:
    """Train under a hard limit."""
    uncached(model)
    return run(bench, *train_words(bench, bench.fresh("large"), *words, model=str(model), data=data), limit_bytes=limit_bytes)


def planned_bytes(model: Path, settings: list[Values]) -> list[int]:
    """What `train` would say that it needs, for each of some settings."""
    from fwdllama.cli.options import configuration
    from fwdllama.machine import process_bytes
    from fwdllama.memory import Shape, training
    from gguf_tools.model import read_model_info

    info, base = read_model_info(model), process_bytes()
    configs = [configuration(values) for values in settings]
    return [base + training(info, config, Shape.expected(config, CTX, info.n_vocab)).peak.total_bytes for config in configs]


def recorded_plan(folder: Path) -> dict[str, int]:
    """A run's own plan, made again from what it recorded, and its number of sequences."""
    from dataclasses import replace

    from fwdllama.checkpoint import read_facts
    from fwdllama.config import read_config
    from fwdllama.machine import process_bytes
    from fwdllama.memory import Shape, training
    from gguf_tools.model import read_model_info

    facts, config = read_facts(folder), read_config(folder / "config.json")
    info = read_model_info(Path(facts["files"]["model"]))
    expected = Shape.expected(config, facts["identity"]["context"], info.n_vocab, n_logits=facts.get("n_logits"))
    n_seq = int(facts.get("n_seq", expected.n_seq))
    plan = training(info, config, replace(expected, n_seq=n_seq, n_outputs=max(expected.n_outputs, n_seq)))
    return {"n_seq": n_seq, "planned_bytes": process_bytes() + plan.peak.total_bytes}


def write_prompts(path: Path, n_vocab: int) -> tuple[Path, int]:
    """Prompts of random words, each of nearly PROMPT_TOKENS tokens of a random model's vocabulary; the file, and the longest's tokens."""
    from dataclasses import replace
    from tempfile import TemporaryDirectory

    from fwdllama.llama.model import Model
    from gguf_tools.shape import TINY
    from gguf_tools.synth import write_llama

    rng = random.Random(7)
    lines, longest = [], 0
    with TemporaryDirectory() as folder:  # the vocabulary is the same, whatever else the model is
        twin = write_llama(Path(folder) / "twin.gguf", replace(TINY, n_vocab=n_vocab), type="Q8_0")
        with Model(twin) as model:
            for _ in range(4 * N_PROMPTS):
                prompt = ""
                while True:
                    more = f"{prompt} {''.join(rng.choices('abcdefghijklmnopqrstuvwxyz', k=5))}".strip()
                    n_tokens = len(model.tokenize(more))
                    if n_tokens > PROMPT_TOKENS:
                        break
                    prompt, longest = more, max(longest, n_tokens)
                lines.append(json.dumps({"prompt": prompt, "answer": prompt.rpartition(" ")[2]}))
    path.write_text("\n".join(lines) + "\n")
    return path, longest


NAMES = {INT4: "memory-7b-int4", INT8: "memory-7b-int8"}
ITEMS = tuple(
    Item(
        name,
        f"peak memory at LLaMA-7B shape, {name[-4:].upper()}, last 8 layers, batch of 8 prompts of 200 tokens, under a hard limit",
        (
            Bar("whole_bytes", "<=", bound.whole_bytes),
            Bar("staged_bytes", "<=", bound.staged_bytes),
            Bar("ratio", "<=", 1.02),
            Bar("plan_error", "<=", 0.07),
            Bar("staged_plan_error", "<=", 0.07),
        ),
        ("whole_bytes", "staged_bytes", "ratio", "plan_error", "staged_plan_error", "eval_bytes", "limited_by", "limit_bytes"),
        (),
        40,
        functools.partial(large, bound),
        model=False,
    )
    for bound, name in NAMES.items()
)
