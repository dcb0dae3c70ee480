"""Starting and resuming runs. Nothing is written before training can begin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fwdllama.calibration import Calibration
from fwdllama.checkpoint import RunDirectory, check_unused, read_facts
from fwdllama.config import TrainConfig, read_config
from fwdllama.errors import RunError
from fwdllama.hooks import Hooks
from fwdllama.material import Source
from fwdllama.models import default_cache_dir
from fwdllama.session import Outcome, opened, settings_of
from fwdllama.surroundings import check_output, check_writable, environment
from gguf_tools.adapter import adapter_bytes, read_adapter
from gguf_tools.model import file_sha256

__all__ = ["Hooks", "Outcome", "Source", "measure_noise", "resume", "train"]


def train(config: TrainConfig, model_path: Path, source: Source, run_path: Path, out: Path, hooks: Hooks) -> Outcome:
    """Start a run in `run_path` and write the best adapter to `out`.

    Raises:
        FwdllamaError: anything that a user can mend, in one sentence.
        FileError: the model's file is unfit.
    """
    check_output(out)
    check_writable(run_path)
    check_unused(run_path)
    hooks.rest()  # before memory is taken for a model that must wait
    with opened(config, model_path, source, hooks) as session:
        theta = session.space.initial_theta()
        session.load_first_batch()
        calibration = session.calibrated(theta)
        facts = {
            "identity": session.identity(),
            "files": {"model": str(model_path.resolve()), "data": str(source.path.resolve()), "out": str(out.resolve())},
            "source": {"kind": source.kind, "labels": source.labels, "limit": source.limit},
            "environment": environment(),
            "device": dict(hooks.device),
            "n_seq": session.oracle.capacity,
            "n_logits": session.oracle.model.n_vocab,
            "calibration": calibration.__dict__,
        }
        initial = session.adapter(theta, {})
        stored = config.model_dump_json(indent=2)
        with RunDirectory.create(run_path, stored, facts, adapter_bytes(initial), eps=calibration.eps) as run:
            return session.finish(run, theta, out, calibration)


def resume(run_path: Path, hooks: Hooks, *, out: Path | None = None, budget: dict[str, Any] | None = None) -> Outcome:
    """Continue a run to the result it would have had, or further with a larger `budget`.

    Raises:
        RunError: the directory is not a run, damaged, in use, or its model or data are not what they were.
    """
    facts, config = read_facts(run_path), read_config(run_path / "config.json")
    if budget:
        config = config.model_copy(update={"budget": config.budget.model_copy(update=budget)})
    files, how = facts["files"], facts["source"]
    source = Source(Path(files["data"]), how["kind"], how["labels"], how["limit"])
    target = out or Path(files["out"])
    check_output(target)
    # Before anything is made of them: another model may not even have the tensors that the adapter is for.
    now = {
        "base model": file_sha256(files["model"], default_cache_dir()),
        "data": file_sha256(files["data"]),
        "configuration": settings_of(config),
    }
    for key, value in now.items():
        _check_same(run_path, key, facts["identity"].get(key), value)
    hooks.rest()
    with RunDirectory.open(run_path) as run:
        if budget:
            run.extend(config.model_dump_json(indent=2))
        held = read_adapter(run_path / "initial.gguf")
        a = {name: pair[0] for name, pair in held.tensors.items()}
        with opened(config, Path(files["model"]), source, hooks, a=a) as session:
            for key, value in session.identity().items():
                _check_same(run_path, key, facts["identity"].get(key), value)
            if held.scope == "answer":  # earlier versions asked in other forms, which neither the configuration nor the data tell
                _check_same(run_path, "form of questions, of an answer behind the tokens", held.invocation_tokens, session.invocation)
            theta = run.theta(session.space.initial_theta())
            return session.finish(run, theta, target, None)


def _check_same(run_path: Path, name: str, was: Any, now: Any) -> None:
    """Compare what a run recorded with what there is now.

    Raises:
        RunError: they differ; of a configuration the first choice that does is named.
    """
    if isinstance(was, dict) and isinstance(now, dict):
        for key in (*was, *(key for key in now if key not in was)):
            _check_same(run_path, f"{name} {key}", was.get(key), now.get(key))
    elif was != now:
        raise RunError(f"{run_path} belongs to another {name}: it was {was}, and is {now} now.")


def measure_noise(config: TrainConfig, model_path: Path, source: Source, hooks: Hooks) -> Calibration:
    """What training would find at its start, and how fast its probes are; nothing is written.

    Raises:
        NoiseError: the slopes drown in the model's rounding.
        FwdllamaError: anything else that a user can mend.
        FileError: the model's file is unfit.
    """
    engine = config.engine.model_copy(update={"keep_prompts_bytes": None})  # nothing is written
    with opened(config.model_copy(update={"engine": engine}), model_path, source, hooks) as session:
        session.load_first_batch()
        return session.timed(session.space.initial_theta())


