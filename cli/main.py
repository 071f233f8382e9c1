"""The command tree, and the one place where exceptions become exit codes (`docs/exit-codes.md`)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from . import bench, convert, doctor, evaluate, generate, gqa, plan, quantize, recipes, show
from . import report as run_report
from .failures import Failure, failure_of, report, usage_failure
from .interrupts import stop_on_request
from .output import write_result

app = typer.Typer(
    name="optgptq",
    help="Make low-bit checkpoints of causal language models, check them, compare them, and run them.",
    epilog="Exit codes: 0 done, 1 bug, 2 usage, 3 input, 4 target, 5 memory or disk, 6 numbers, 7 gate, 75 stopped.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("plan")(plan.plan)
app.command("quantize")(quantize.quantize)
app.command("eval")(evaluate.evaluate)
app.command("generate")(generate.generate)
app.command("bench")(bench.bench)
app.command("inspect")(show.inspect)
app.command("verify")(show.verify)
app.command("report")(run_report.report)
app.command("convert")(convert.convert)
app.command("gqa")(gqa.group)
app.command("recipes")(recipes.recipes)
app.command("doctor")(doctor.doctor)

# typer gives this number back instead of the KeyboardInterrupt.
_TYPER_INTERRUPTED = 130


def _show_version(wanted: bool) -> None:
    if wanted:
        from optgptq import __version__

        write_result(f"optgptq {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Make low-bit checkpoints of causal language models, check them, compare them, and run them."""


def main(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; nothing escapes but a second or third request to stop."""
    as_json = "--json" in arguments
    error: BaseException
    try:
        with stop_on_request():
            status = app(args=list(arguments), prog_name="optgptq", standalone_mode=False)
        if status != _TYPER_INTERRUPTED:
            return status if isinstance(status, int) else 0
        error = KeyboardInterrupt()
    except (Exception, KeyboardInterrupt) as raised:  # noqa: BLE001 - the border of the program
        error = raised
    failure = _usage_or_other(error)
    if not failure.found:
        return failure.exit_code  # no arguments at all: typer has printed the help already
    report(error, failure, as_json=as_json)
    return failure.exit_code


def _usage_or_other(error: BaseException) -> Failure:
    usage_error = typer.BadParameter.__base__
    if usage_error is not None and isinstance(error, usage_error) and isinstance(error, Exception):
        return usage_failure(error)
    return failure_of(error)


def run() -> None:
    """Entry of the `optgptq` script."""
    from optgptq.environment import limit_spinning, limit_threads

    limit_spinning()
    limit_threads()
    sys.exit(main(sys.argv[1:]))
