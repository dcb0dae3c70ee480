"""Presets set options that exist, within what can be, and lose to whatever is given."""

from __future__ import annotations

import pytest
import typer

from fwdllama.cli import main
from fwdllama.cli.device import guard_of
from fwdllama.cli.options import configuration
from fwdllama.machine import default_threads
from fwdllama.preset import PRESETS, Name, completed, described


@pytest.mark.parametrize("name", PRESETS)
def test_every_value_is_an_option_of_training_and_can_be(name: Name) -> None:
    options = PRESETS[name].options()
    group = typer.main.get_command(main.application(plugins=False))
    for command in ("train", "join", "calibrate"):
        parameters = {parameter.name for parameter in group.commands[command].params}  # type: ignore[attr-defined]
        assert options.keys() - parameters <= ({"min_battery", "max_temperature", "memory_budget"} if command == "calibrate" else set())
    engine = configuration(options).engine
    assert (engine.mmap, engine.repack, engine.kv_type, engine.n_batch) == tuple(options[k] for k in ("mmap", "repack", "kv_type", "n_batch"))
    assert engine.n_threads == default_threads()
    assert guard_of(options).max_temperature_c == options["max_temperature"]
    assert f"--max-temperature {options['max_temperature']:g}" in described(name, {})


def test_the_help_offers_every_preset() -> None:
    command = typer.main.get_command(main.application(plugins=False)).commands["train"]  # type: ignore[attr-defined]
    offered = next(parameter for parameter in command.params if parameter.name == "preset").type_descriptor.choices
    assert list(offered) == list(PRESETS)


def test_what_is_given_wins_and_is_said() -> None:
    given = {"mmap": False, "threads": 7, "repack": None, "nice": None, "seed": 3}
    found = completed("phone-8gb", given)
    assert found == {"mmap": False, "threads": 7, "repack": False, "nice": 10, "seed": 3}, "a command gets only options that it has"
    assert described("phone-8gb", given).endswith("; given: --threads 7 --no-mmap")
    assert "--threads" not in described("phone-8gb", given).partition(";")[0]
    assert completed(None, given) == given


def test_a_phone_maps_its_model_and_keeps_no_copy_of_it() -> None:
    for name in ("phone-8gb", "phone-6gb"):
        assert PRESETS[name].mmap  # type: ignore[index]
        assert not PRESETS[name].repack  # type: ignore[index]
    budgets = [PRESETS[name].memory_budget_bytes or 0 for name in ("phone-8gb", "phone-6gb")]
    assert budgets[0] < 4e9
    assert budgets[1] < 3e9
