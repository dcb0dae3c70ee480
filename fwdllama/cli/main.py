"""`fwdllama`: the commands put together, and every failure turned into one line and an exit code.

Commands of other packages come through the entry points `fwdllama.commands`. They are loaded only where they can
matter, for a command that is not one of ours and for the list of all, so that a broken package cannot stop training.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from typing import Annotated

import typer

from fwdllama import __version__
from fwdllama.cli import answer, calibrate, demo, doctor, gguf, join, model, reference, train
from fwdllama.errors import FwdllamaError
from gguf_tools.errors import FileError

INTERRUPTED = 130  # 128 + SIGINT, as shells count
LLAMA_LOGGER = "fwdllama.llama.cpp"  # llama.cpp's own words


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; nothing but `SystemExit` of a broken pipe gets out of here."""
    arguments = _debug_first(list(arguments) or ["--help"])
    debug = "--debug" in arguments[:1]
    try:
        app = fitted(arguments)
        result = app(arguments, prog_name="fwdllama", standalone_mode=False)
    except (FwdllamaError, FileError) as error:
        return _failed(str(error), error.exit_code, debug)
    except typer.TyperException as error:  # an unknown option, or a value of the wrong type
        return _failed(_usage(error), getattr(error, "exit_code", 2), debug)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the last resort of a program that shows no traceback unasked
        text = " ".join(str(error).split())
        kind = type(error).__name__
        return _failed(f"unexpected {kind}: {text}. Run it again with --debug to see where, and report it.", 1, debug)
    return result if isinstance(result, int) else 0


def application(*, plugins: bool = True) -> typer.Typer:
    """The commands of this package, and with `plugins` those of others."""
    app = typer.Typer(
        name="fwdllama",
        help="Fine-tune a quantised GGUF model with forward passes only, and see what it learned.",
        epilog="Begin with `fwdllama demo`, or with `fwdllama model fetch smollm2-135m`.",
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    for module in (demo, train, join, answer, model, gguf, calibrate, doctor, reference):
        module.register(app)
    if plugins:
        _load_plugins(app)
    return app


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fwdllama {__version__}")
        raise typer.Exit


def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and llama.cpp's own words; may stand anywhere.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """What holds for every command."""
    _set_up_logging(debug)


def fitted(arguments: Sequence[str]) -> typer.Typer:
    """The application with what a command line needs: the one command of ours that it names, or else all there are.

    typer reads the annotations of every command that it is given, which for all of ours takes as long as importing it.
    """
    app = application(plugins=False)
    words = [word for word in arguments if not word.startswith("-")]
    if words[:1] == [reference.NAME] or (not words and {"-h", "--help"} & set(arguments)):
        _load_plugins(app)
    elif words and not _narrowed(app, iter(words)):
        _load_plugins(app)
        _narrowed(app, iter(words))
    return app


def _narrowed(group: typer.Typer, words: Iterator[str]) -> bool:
    """Leave only the command that the words name, in each group on the way to it; False where the first names none."""
    name = next(words, None)
    commands = [each for each in group.registered_commands if each.name == name]
    groups = [each for each in group.registered_groups if each.name == name]
    if not (commands or groups):
        return False
    group.registered_commands, group.registered_groups = commands, groups
    for each in groups:
        if each.typer_instance is not None:
            _narrowed(each.typer_instance, words)
    return True


def _load_plugins(app: typer.Typer) -> None:
    for entry in sorted(entry_points(group="fwdllama.commands"), key=lambda entry: entry.name):
        try:
            register = entry.load()
        except (ImportError, AttributeError) as error:
            typer.echo(f"warning: the command {entry.name} ({entry.value}) cannot be loaded: {error}.", err=True)
        else:
            register(app)


def _debug_first(arguments: list[str]) -> list[str]:
    """`--debug` moved to the front, because people add it to the end of the line that failed."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    if "--debug" not in arguments[:end]:
        return arguments
    return ["--debug", *(word for word in arguments[:end] if word != "--debug"), *arguments[end:]]


def _usage(error: Exception) -> str:
    """The parser's complaint, and where to read more; it may have several lines where it lists choices."""
    text = " ".join(error.format_message().split()) if isinstance(error, typer.TyperException) else str(error)
    command = getattr(getattr(error, "ctx", None), "command_path", "fwdllama")
    return f"{text.rstrip('.')}. See `{command} --help`."


def _failed(sentence: str, exit_code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc(file=sys.stderr)
    typer.echo(f"error: {sentence}", err=True)
    return exit_code


class _Lines(logging.Handler):
    """Log records as lines of stderr, wherever stderr goes at that moment: a live display takes it over."""

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(self.format(record), err=True)


class _Words(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {super().format(record)}"


def _set_up_logging(debug: bool) -> None:
    """Warnings of ours are shown; everything, and llama.cpp's log, only with --debug."""
    logger = logging.getLogger("fwdllama")
    for handler in [handler for handler in logger.handlers if isinstance(handler, _Lines)]:
        logger.removeHandler(handler)
    handler = _Lines()
    handler.setFormatter(_Words())
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.WARNING)
    # Off, not "errors only": a model that does not load is one sentence of ours, and these would come before it.
    logging.getLogger(LLAMA_LOGGER).setLevel(logging.NOTSET if debug else logging.CRITICAL + 1)
