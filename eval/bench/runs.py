"""Training and scoring on real questions through the command line, as a user does it; and the demo.

A run stays in the work folder. Items that only look at a run (time in the model, the race against back-propagation) take the one that
is there if the same command made it, and say which commit that was; an item whose own result it is always trains anew.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fwdllama.checkpoint import read_metrics, write_atomically

from .child import line_of, read_state, run
from .measure import Bar, Bench, BenchError, Figures, Item, Measured, variant_of
from .record import commit

N_QUESTIONS = 400  # of the dev sample, in the order of the file
SHORT, LONG, INT4 = "squad-int8-300s", "squad-int8-1200s", "squad-int4-300s"
MADE = "made.json"  # beside a run directory: what made it
STAGED = ("--scope", "answer", "--stage-layers", "5")  # the layers below the adapter once, five in memory at a time, then the upper ones alone


@dataclass(frozen=True)
class Trained:
    """A finished run: where it is, what made it, and what `fwdllama train --json` printed."""

    folder: str
    command: str
    commit: str | None
    wall_s: float  # of the process, set-up included
    printed: dict[str, Any]

    @property
    def run(self) -> Path:
        """The run directory."""
        return Path(self.folder) / "run"

    @property
    def adapter(self) -> Path:
        """The adapter that it wrote."""
        return Path(self.folder) / "adapter.gguf"


def trained(bench: Bench, name: str, *, anew: bool = False) -> Trained:
    """The run of item `name`: the one in the work folder, or with `anew` or where there is none, a new one."""
    model, seconds = {SHORT: (bench.model, 300), LONG: (bench.model, 1200), INT4: (variant_of(bench.model, "int4"), 300)}[name]
    folder = bench.work / name
    words = train_words(bench, folder, "--seconds", f"{bench.seconds(seconds):g}", model=model)
    made = folder / MADE
    if not anew and made.exists():
        found = Trained(**json.loads(made.read_text()))
        if found.command == line_of(words):
            return found
    bench.fresh(name)
    ran = run(bench, *words)
    found = Trained(str(folder), ran.command, commit(), ran.wall_s, ran.json)
    write_atomically(made, json.dumps(asdict(found), indent=2).encode())
    return found


def train_words(bench: Bench, folder: Path, *more: object, model: str | None = None, data: Path | None = None) -> tuple[str, ...]:
    """The command that trains into `folder`, on the bench's model and data or others."""
    files = ("--model", model or bench.model, "--data", data or bench.train_data, "--out", folder / "adapter.gguf", "--run", folder / "run")
    return ("train", *map(str, (*files, *more)), "--json")


def scores(bench: Bench, model: str, adapter: Path | None, n_questions: int = N_QUESTIONS) -> dict[str, float]:
    """F1, exact match and loss of a model on the first questions of the dev sample."""
    limit = bench.questions(n_questions)
    words = ["eval", "--model", model, "--data", bench.dev_data, "--limit", limit, "--json"]
    if adapter is not None:
        words += ["--adapter", adapter, "--no-compare"]
    printed = run(bench, *words).json
    found = printed["base" if adapter is None else "tuned"]
    if found["n_missing"] or found["skipped"]:
        raise BenchError(f"{found['n_missing'] + sum(found['skipped'].values())} of {limit} questions were not asked: {found['skipped']}.")
    return {"f1": found["f1"], "exact_match": found["exact_match"], "loss": found["loss_nats_per_token"]}


@functools.cache
def base_scores(bench: Bench, model: str, n_questions: int = N_QUESTIONS) -> dict[str, float]:
    """The untrained model's, asked once for all items of a bench: it is the same for each."""
    return scores(bench, model, None, n_questions)


def decode_shares(run_path: Path) -> dict[str, float]:
    """Time inside the model over all training time (prompts and held-out losses included), and over that of the steps alone."""
    state, rows = read_state(run_path), read_metrics(run_path)
    ends = [row["elapsed_s"] for row in rows]
    # The first step's beginning is not in its row; its share is taken over all that came before its end.
    lengths = [end - begin for begin, end in zip([0.0, *ends], ends, strict=False)]
    inside = sum(row["decode_fraction"] * length for row, length in zip(rows, lengths, strict=True))
    return {
        "decode_share": state["decode_s"] / state["elapsed_s"],
        "decode_share_of_steps": inside / sum(lengths),
        "decode_share_of_worst_step": min(row["decode_fraction"] for row in rows),
    }


def squad(name: str, bench: Bench) -> Measured:
    """Train, then score before and after."""
    made = trained(bench, name, anew=True)
    model = variant_of(bench.model, "int4") if name == INT4 else bench.model
    if model is None:
        raise BenchError(f"{bench.model} has no INT4 variant.")
    tuned, base = scores(bench, model, made.adapter), base_scores(bench, model)
    printed = made.printed
    figures: Figures = {
        **tuned,
        **{f"base_{key}": value for key, value in base.items()},
        "questions": bench.questions(N_QUESTIONS),
        **{key: printed[key] for key in ("steps", "probes", "held_out_loss", "best_step", "elapsed_s", "peak_memory_bytes", "skipped")},
        "setup_s": made.wall_s - printed["elapsed_s"],
        **decode_shares(made.run),
        "run": str(made.run),
    }
    return Measured(figures, made.command)


def decode_share(bench: Bench) -> Measured:
    """Look at the short run."""
    made = trained(bench, SHORT)
    return Measured({**decode_shares(made.run), "elapsed_s": read_state(made.run)["elapsed_s"], "run_commit": made.commit}, made.command)


def demo(bench: Bench) -> Measured:
    """Run the demo as `make demo` does once everything is set up."""
    words: list[object] = ["demo", "--folder", bench.fresh("demo"), "--model", bench.model, "--json"]
    if bench.scale != 1:
        words += ["--rounds", max(1, round(32 * bench.scale))]
    ran = run(bench, *words)
    found = ran.json["scores"]
    before, after = found["before"], found["after"]
    figures = {
        "f1_before": before["f1"],
        "f1_after": after["f1"],
        "factor": after["f1"] / before["f1"] if before["f1"] else None,
        "exact_match_before": before["exact_match"],
        "exact_match_after": after["exact_match"],
        "questions": found["n_questions"],
        "wall_s": ran.wall_s,
        "training_s": ran.json["elapsed_s"],
        "rounds": ran.json["rounds"],
        "probes": ran.json["probes"],
        "wasted": ran.json["wasted"],
    }
    return Measured(figures, ran.command)


_F1, _EXACT = "f1", "exact_match"
_SQUAD = (_F1, _EXACT, "loss", "base_f1", "base_exact_match", "base_loss", "held_out_loss", "steps", "probes", "decode_share")

SQUAD_ITEMS = (
    Item(
        SHORT,
        "300 s of training on SQuAD, first 400 questions of the dev sample, INT8 base",
        (Bar(_F1, ">=", 45), Bar(_EXACT, ">=", 33)),
        _SQUAD,
        ("data",),
        12,
        functools.partial(squad, SHORT),
    ),
    Item(
        LONG, "the same, 20 minutes", (Bar(_F1, ">=", 54),), _SQUAD, ("data",), 24, functools.partial(squad, LONG)
    ),
    Item(
        INT4,
        "the same, 300 s, INT4 base as shipped",
        (Bar(_F1, ">=", 38),),
        _SQUAD,
        ("data", "int4"),
        18,
        functools.partial(squad, INT4),
    ),
    Item(
        "decode-share",
        "time in llama_decode of all training time, prompts included",
        (Bar("decode_share", ">=", 0.9),),
        ("decode_share", "decode_share_of_steps"),
        ("data",),
        0,
        decode_share,
    ),
)
DEMO_ITEM = Item(
    "demo",
    "`make demo` after set-up: F1 on its held-out questions, and how long it takes",
    (Bar("factor", ">=", 2), Bar("wall_s", "<=", 360)),
    ("f1_before", "f1_after", "factor", "wall_s"),
    ("server",),
    6,
    demo,
)
