"""The files that scoring reads: JSON, plain or gzip, checked before anything trusts it."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from pathlib import Path
from typing import Any

from fwdllama.errors import DataError


def read_json(path: Path) -> Any:
    """Any JSON file, plain or gzip, told apart by its first bytes.

    Raises:
        DataError: it cannot be read or is not JSON; the message says where it stops being JSON.
    """
    try:
        raw = path.read_bytes()
        return json.loads(gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON at line {error.lineno}, column {error.colno}: {error.msg}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not JSON: byte {error.start} is not UTF-8 text.") from error
    except RecursionError as error:
        raise DataError(f"{path}: not usable JSON: its brackets are nested too deeply.") from error
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path}: the gzip data is damaged or cut short.") from error
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from error


def read_predictions(path: Path) -> dict[str, str]:
    """A predictions file, plain or gzip: a JSON object of question id to answer.

    Raises:
        DataError: it cannot be read, or is something else.
    """
    predictions = read_json(path)
    if not isinstance(predictions, dict):
        raise DataError(
            f"{path}: predictions are a JSON object of question id to answer, but this is a {_kind(predictions)}."
        )
    for id_, answer in predictions.items():
        if not isinstance(answer, str):
            raise DataError(
                f"{path}: the prediction for {id_!r} is {answer!r}, but must be a string, empty for no answer."
            )
    return predictions


def read_na_probs(path: Path) -> dict[str, float]:
    """A file of no-answer probabilities, plain or gzip: a JSON object of question id to number.

    Raises:
        DataError: it cannot be read, or is something else.
    """
    probabilities = read_json(path)
    if not isinstance(probabilities, dict):
        raise DataError(
            f"{path}: probabilities are a JSON object of question id to number, but this is a {_kind(probabilities)}."
        )
    for id_, value in probabilities.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise DataError(f"{path}: the no-answer probability of {id_!r} is {value!r}, but must be a number.")
    return probabilities


def _kind(value: object) -> str:
    return {list: "list", str: "string", type(None): "null", bool: "truth value"}.get(type(value), "number")
