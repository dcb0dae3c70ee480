"""Every option of `train` is a setting of a run, and every default in the help is the one that holds."""

from __future__ import annotations

import re
from typing import Any, get_args

import pytest
import typer
from pydantic import BaseModel

from fwdllama.cli import main
from fwdllama.cli.budget import memory_size
from fwdllama.cli.options import DEFAULT_SECONDS, SETTINGS, configuration, label_words, say_defaults
from fwdllama.config import TrainConfig, make_config
from fwdllama.errors import UsageError

from .conftest import Run

# Settings that one would change only while working on the method itself.
WITHOUT_OPTION = {"pacing.max_rounds", "step.final_lr", "batch.evaluate_every", "engine.flash"}


@pytest.fixture(scope="module")
def parameters() -> dict[str, Any]:
    """What `train` takes, with the defaults said in its help."""
    group: Any = typer.main.get_command(main.application(plugins=False))
    command = group.commands["train"]
    say_defaults(command)
    return {parameter.name: parameter for parameter in command.params}


def fields(section: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Dotted names of all settings, with their annotations."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found |= fields(inner, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = inner
    return found


def default(path: str) -> Any:
    value: Any = make_config({"budget": {"steps": 1}})
    for part in path.split("."):
        value = getattr(value, part)
    return value


def test_options_and_settings_are_the_same(parameters: dict[str, Any]) -> None:
    assert set(SETTINGS.values()) == set(fields(TrainConfig)) - WITHOUT_OPTION
    assert SETTINGS.keys() <= parameters.keys()


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_help_says_the_default_that_holds(name: str, parameters: dict[str, Any]) -> None:
    parameter = parameters[name]
    assert parameter.default is None
    said = re.search(r" Default: (.+)\.$", parameter.help)
    assert said is not None
    value = default(SETTINGS[name])
    if value is None or name == "steps":
        assert not re.fullmatch(r"[\d.]*|{}", said[1]), "a value is said, but nothing is set"
    elif isinstance(value, bool):
        assert said[1] == (name if value else f"no-{name}")
    elif SETTINGS[name].endswith("_bytes"):
        assert memory_size(said[1]) == value
    else:
        assert said[1] == (",".join(value) if isinstance(value, tuple) else str(value))


def test_help_that_is_shown_has_defaults(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = " ".join(run("train", "--help").out.split())
    assert f"Default: {default('space.rank')}." in text
    assert "{}" not in text


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_choices_of_an_option_are_those_of_the_setting(name: str, parameters: dict[str, Any]) -> None:
    offered = parameters[name].type_descriptor.choices
    kinds = get_args(fields(TrainConfig)[SETTINGS[name]])
    allowed = tuple(value for kind in kinds if kind is not type(None) for value in get_args(kind) or (kind,))
    if offered is not None:
        assert tuple(offered) == allowed


def test_what_is_not_given_is_left_to_the_configuration() -> None:
    assert configuration({"rank": None, "model": "m"}) == make_config({"budget": {"seconds": DEFAULT_SECONDS}})


def test_what_is_given_reaches_its_setting() -> None:
    given = {
        "modules": "q, v",
        "layers": "3-5",
        "mmap": True,
        "ctx": 64,
        "threads": 2,
        "steps": 7,
        "pacing": "variance",
    }
    config = configuration(given)
    assert config.space.modules == ("q", "v")
    assert config.space.layers == (3, 5)
    assert config.engine.mmap is True
    assert config.batch.n_ctx == 64
    assert config.engine.n_threads == 2
    assert (config.budget.steps, config.budget.seconds) == (7, None)
    assert config.pacing.kind == "variance"
    assert configuration({"layers": "4"}).space.layers == (4, 4)
    assert configuration({"keep_prompts": "700MB"}).engine.keep_prompts_bytes == 700 << 20
    assert configuration({"keep_prompts": "no"}).engine.keep_prompts_bytes is None


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"rank": 0}, "--rank: Input should be greater than or equal to 1 (got 0)."),
        ({"held_out": 0}, "--held-out: Input should be greater than or equal to 1 (got 0)."),
        ({"ctx": -1}, "--ctx: Input should be greater than or equal to 1 (got -1)."),
        ({"seconds": 0.0}, "--seconds: Input should be greater than 0 (got 0.0)."),
        ({"modules": "q,,v"}, "--modules: module '' cannot be trained; choose from q, k, v, o, gate, up, down"),
        ({"modules": "q,q"}, "--modules: modules 'q,q' must name at least one module, each once"),
        ({"layers": "a-b"}, "--layers is 'a-b', but must be the first and the last layer, such as 9-17."),
        ({"layers": "1-2-3"}, "--layers is '1-2-3', but must be the first and the last layer, such as 9-17."),
        ({"kv_type": "f8"}, "--kv-type: Input should be 'f16', "),
        ({"keep_prompts": "all"}, "--keep-prompts is 'all', but must be no, or a size such as 8GB or 700MB."),
        ({"units": 1, "fresh": 2}, "fresh 2 cannot exceed units 1"),
    ],
)
def test_a_value_that_cannot_be_is_refused_under_the_option_s_name(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        configuration(given)
    assert sentence in str(caught.value)


def test_label_words_are_read_and_what_is_no_list_of_them_is_refused() -> None:
    assert label_words(None) is None
    assert label_words("1=World, 2 = Sports") == {"1": "World", "2": "Sports"}
    for text in ("", "1", "1=", "=World", "1=a,1=b", "1=a,"):
        with pytest.raises(UsageError, match="must give each class once, such as 1=World,2=Sports"):
            label_words(text)
