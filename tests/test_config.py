"""A configuration is whole, frozen and checked, comes back from JSON as it was, and each mistake is one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fwdllama.config import TrainConfig, layer_band, make_config, read_config
from fwdllama.errors import UsageError
from fwdllama.space import MODULES

SMALLEST: dict[str, Any] = {"budget": {"steps": 1}}


def with_value(path: str, value: Any) -> dict[str, Any]:
    """The smallest configuration with one value changed, at `section.key` or `key`."""
    section, _, key = path.partition(".")
    changed = {key: value} if key else value
    return {**SMALLEST, section: {**SMALLEST.get(section, {}), **changed} if key else changed}


def test_a_budget_is_all_that_must_be_given() -> None:
    found = make_config(SMALLEST)
    assert found.budget.steps == 1
    assert found == TrainConfig(budget=found.budget)
    with pytest.raises(UsageError, match=r"^budget: Field required\.$"):
        make_config({})
    with pytest.raises(UsageError, match=r"^budget: one of seconds, steps and probes must be given\.$"):
        make_config({"budget": {"patience": 3}})


def test_nothing_can_be_changed_afterwards() -> None:
    found = make_config(SMALLEST)
    with pytest.raises(ValidationError):
        found.seed = 1
    with pytest.raises(ValidationError):
        found.step.lr = 1.0


positive = st.integers(1, 10**6)
sizes = st.floats(1e-9, 1e9)
configurations = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**53 - 1),
        "template": st.sampled_from(["seed", "chat"]),
        "space": st.fixed_dictionaries(
            {
                "modules": st.lists(st.sampled_from(list(MODULES)), min_size=1, unique=True),
                "layers": st.none() | st.tuples(st.integers(0, 9), st.integers(0, 9)),
                "rank": positive,
                "alpha": sizes,
                "train": st.sampled_from(["b", "ab"]),
                "scope": st.sampled_from(["answer", "all"]),
            }
        ),
        "estimator": st.fixed_dictionaries({"sided": st.sampled_from(["one", "two"]), "eps": st.none() | sizes}),
        "pacing": st.fixed_dictionaries({"kind": st.sampled_from(["fixed", "variance"]), "tau": sizes}),
        "step": st.fixed_dictionaries({"lr": sizes, "accept": st.booleans(), "candidates": positive}),
        "batch": st.fixed_dictionaries({"n_ctx": st.none() | positive, "per_unit": positive}),
        "budget": st.fixed_dictionaries({"probes": positive, "seconds": st.none() | sizes}),
        "engine": st.fixed_dictionaries({"n_threads": st.none() | positive, "trunk": st.booleans()}),
    }
)


@given(configurations)
def test_a_configuration_comes_back_from_its_json_as_it_was(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    found = make_config(values)
    path = tmp_path_factory.getbasetemp() / "config.json"
    path.write_text(found.model_dump_json(indent=2))
    assert read_config(path) == found
    assert make_config(json.loads(json.dumps(values))) == found


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("space.rank", 0, r"space\.rank: Input should be greater than or equal to 1 \(got 0\)"),
        ("space.modules", ["q", "z"], r"space\.modules: module 'z' cannot be trained; choose from q, k, v, o, gate, up, "),
        ("space.modules", ["token_embd"], r"space\.modules: module 'token_embd' .* tied embeddings it is the output matrix"),
        ("space.modules", ["q", "q"], r"space\.modules: modules 'q,q' must name at least one module, each once"),
        ("space.modules", [], r"space\.modules: modules '' must name at least one module"),
        ("space.layers", [1], r"space\.layers"),
        ("space.alpha", float("nan"), r"space\.alpha: .* finite number \(got nan\)"),
        ("space.train", "a", r"space\.train: Input should be 'b' or 'ab' \(got 'a'\)"),
        ("space.colour", "red", r"space\.colour: Extra inputs are not permitted \(got 'red'\)"),
        ("estimator.eps", 0, r"estimator\.eps: Input should be greater than 0 \(got 0\)"),
        ("estimator.sided", "both", r"estimator\.sided: Input should be 'one' or 'two' \(got 'both'\)"),
        ("estimator.first_rounds", -1, r"estimator\.first_rounds: Input should be greater than or equal to 0 \(got -1\)"),
        ("step.lr", -1, r"step\.lr: Input should be greater than 0 \(got -1\)"),
        ("step.lr", "fast", r"step\.lr: .* valid number.* \(got 'fast'\)"),
        ("step.final_lr", 1.5, r"step\.final_lr: .* less than or equal to 1 \(got 1\.5\)"),
        ("pacing.kind", "slow", r"pacing\.kind: Input should be 'fixed' or 'variance' \(got 'slow'\)"),
        ("engine.kv_type", "q3", r"engine\.kv_type: .* \(got 'q3'\)"),
        ("engine.n_gpu_layers", -1, r"engine\.n_gpu_layers: .* greater than or equal to 0 \(got -1\)"),
        ("budget.seconds", 0, r"budget\.seconds: Input should be greater than 0 \(got 0\)"),
        ("budget.steps", 2.5, r"budget\.steps: .* valid integer.* \(got 2\.5\)"),
        ("seed", -1, r"seed: Input should be greater than or equal to 0 \(got -1\)"),
        ("seed", 2**53, r"seed: Input should be less than 9007199254740992"),
        ("space", 7, r"space: .* \(got 7\)"),
    ],
)
def test_a_value_that_cannot_work_is_named_with_its_place(path: str, value: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=rf"^{sentence}.*\.$"):
        make_config(with_value(path, value))


@pytest.mark.parametrize(
    ("batch", "examples_per_probe", "sentence"),
    [
        ({"units": 2, "per_unit": 3, "fresh": 1}, 7, r"examples_per_probe 7 exceeds the 6 examples of a batch"),
        ({"units": 2, "fresh": 3}, 1, r"fresh 3 cannot exceed units 2\.$"),
    ],
)
def test_values_that_do_not_go_together_are_named(batch: dict[str, int], examples_per_probe: int, sentence: str) -> None:
    values = {**SMALLEST, "batch": batch, "estimator": {"examples_per_probe": examples_per_probe}}
    with pytest.raises(UsageError, match=rf"^configuration: {sentence}"):
        make_config(values)


@pytest.mark.parametrize("content", [b"", b"no json", b"\xff\xfe"])
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"config\.json: not a readable configuration \("):
        read_config(path)
    path.unlink()
    with pytest.raises(UsageError, match=r"config\.json: not a readable configuration \(.*No such file"):
        read_config(path)


def test_a_file_of_another_shape_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for content in ("[]", "7", "null", '{"budget": []}'):
        path.write_text(content)
        with pytest.raises(UsageError, match=r"^(configuration|budget): .*\.$"):
            read_config(path)


@given(st.integers(1, 200))
def test_the_layers_that_are_trained_by_default_are_in_the_middle_of_the_model_and_never_none(n_layers: int) -> None:
    first, last = layer_band(n_layers)
    assert 0 <= first <= last < n_layers
    assert n_layers < 10 or n_layers / 5 <= first <= last <= 4 * n_layers / 5
