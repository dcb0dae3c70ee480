"""`fwdllama calibrate`: whether slopes of a model stand far enough above its rounding to train on."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from fwdllama.cli import device as d
from fwdllama.cli import options as o

if TYPE_CHECKING:
    from fwdllama.calibration import Calibration

CLEAR_SNR = 3.0  # below it a tenth of a slope's variance is rounding
STRAIGHT = 1.0  # at most so much bend for each nat of slope


def register(app: typer.Typer) -> None:
    """Add `calibrate`."""

    @app.command("calibrate", cls=o.Command)
    def calibrate_command(
        context: typer.Context,
        model: o.Model,
        data: o.Data,
        kind: o.Kind = "auto",
        labels: o.Labels = None,
        template: o.Template = None,
        modules: o.Modules = None,
        layers: o.Layers = None,
        rank: o.Rank = None,
        alpha: o.Alpha = None,
        train: o.Train = None,
        init: o.Init = None,
        scope: o.Scope = None,
        examples_per_probe: o.ExamplesPerProbe = None,
        eps: o.Eps = None,
        units: o.Units = None,
        per_unit: o.PerUnit = None,
        held_out: o.HeldOut = None,
        ctx: o.Ctx = None,
        seed: o.Seed = None,
        preset: d.Preset = None,
        threads: o.Threads = None,
        kv_type: o.KvType = None,
        mmap: o.Mmap = None,
        repack: o.Repack = None,
        n_batch: o.NBatch = None,
        nice: d.Nice = None,
        gpu_layers: o.GpuLayers = None,
        trunk: o.Trunk = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
    ) -> None:
        """Measure slope, curvature and rounding noise of a model on a data file, and how fast probes are."""
        from fwdllama import training
        from fwdllama.models import resolve

        given = d.completed(context.params)
        config = o.configuration(given)
        source = training.Source(data, None if kind == "auto" else kind, o.label_words(labels))
        hooks = training.Hooks(on_event=lambda text: typer.echo(text, err=True))
        with d.considerate(given, hooks.on_event):
            found = training.measure_noise(config, resolve(model), source, hooks)
        if as_json:
            typer.echo(json.dumps(asdict(found), indent=2))
            return
        change = found.slope_rms * found.eps
        for name, text in (
            ("noise floor", f"{found.noise:.2g} nats: what rounding alone changes of a loss"),
            ("slope", f"{found.slope_rms:.3g} nats per unit of eps, root mean square over directions"),
            ("curvature", f"{found.curvature:.3g} nats per unit of eps squared"),
            ("eps", f"{found.eps:.3g}: a probe changes the loss by {change:.2g} nats, {found.snr:.1f} times the noise"),
            ("speed", f"{found.probes_per_s:.1f} probes a second"),
            ("advice", advice(found)),
        ):
            typer.echo(f"{name:12} {text}")


def advice(found: Calibration) -> str:
    """What to make of it, in a sentence."""
    if found.snr < CLEAR_SNR:
        return "Slopes hardly stand above the rounding at this eps; leave --eps out, so that a larger one is found."
    if found.curvature * found.eps > STRAIGHT * found.slope_rms:
        return (
            "Where slopes stand above the rounding, the loss bends more than it slopes; use a less coarsely quantised "
            "base, --sided two, or more --rounds."
        )
    return "Slopes stand clear of rounding and curvature; train with these settings."
