"""Which of an aggregator's runs a device works for."""

from __future__ import annotations

from collections.abc import Sequence

from fwdllama.errors import FederationError
from fwdllama.federation.message import Run


def chosen_run(runs: Sequence[Run], wanted: str | None, base: str, url: str) -> Run:
    """The run named `wanted` (or by its id), or the only one that goes on and is for the model whose SHA-256 is `base`.

    Raises:
        FederationError: there is none, or more than one, or it is for another model, or this machine reads its specification differently.
    """
    if wanted is not None:
        named = [run for run in runs if wanted in (run.run, run.spec.name)]
        if not named:
            raise FederationError(f"{url} has no run {wanted!r}; it has {_names(runs)}.")
        run = named[0]
        if run.spec.base.sha256 != base:
            raise FederationError(_other_model(run, base))
    else:
        going = [run for run in runs if run.status != "finished"]
        if not going:
            raise FederationError(f"{url} has no run that goes on; it has {_names(runs)}.")
        fitting = [run for run in going if run.spec.base.sha256 == base]
        if not fitting and len(going) == 1:
            raise FederationError(_other_model(going[0], base))
        if not fitting:
            models = ", ".join(f"{run.spec.name} ({run.spec.base.name}, SHA-256 {run.spec.base.sha256})" for run in going)
            raise FederationError(f"None of the runs of {url} is for this model, whose SHA-256 is {base}: {models}.")
        if len(fitting) > 1:
            raise FederationError(f"{url} has several runs for this model: {_names(fitting)}. Choose one with --run.")
        run = fitting[0]
    genesis = run.spec.genesis().hex()
    if genesis != run.genesis:
        raise FederationError(
            f"Run {run.spec.name!r} of {url} begins with {run.genesis[:12]}, but its specification gives {genesis[:12]} here. "
            "Install the version of fwdllama that the aggregator has."
        )
    return run


def _names(runs: Sequence[Run]) -> str:
    return ", ".join(f"{run.spec.name} ({run.status})" for run in runs) or "none"


def _other_model(run: Run, base: str) -> str:
    wanted = run.spec.base
    return f"Run {run.spec.name!r} is for {wanted.name}, SHA-256 {wanted.sha256}, but this model's SHA-256 is {base}; give that file with --model."
