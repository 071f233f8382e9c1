"""Exit codes and messages: every way a command can end."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import typer

from optgptq import errors
from optgptq_cli import main as main_module
from optgptq_cli.failures import failure_of, report
from optgptq_cli.interrupts import stop_on_request
from optgptq_cli.main import main

FOUR = {"expected": "this", "found": "that", "action": "Do something."}
CODES = {
    errors.UsageError: 2,
    errors.RecipeError: 2,
    errors.ModelError: 3,
    errors.TextError: 3,
    errors.FormatError: 3,
    errors.OutputError: 3,
    errors.TargetError: 4,
    errors.CapacityError: 5,
    errors.NumericalError: 6,
    errors.GateError: 7,
    errors.Interrupted: 75,
}


@pytest.fixture
def failing(monkeypatch):
    """Make `optgptq doctor` end with a given exception."""

    def install(error: BaseException) -> None:
        app = typer.Typer()

        @app.callback()
        def root() -> None: ...

        @app.command("doctor")
        def doctor(as_json: bool = typer.Option(False, "--json")) -> None:
            raise error

        monkeypatch.setattr(main_module, "app", app)

    return install


@pytest.mark.parametrize(("kind", "code"), CODES.items())
def test_each_error_has_its_exit_code_and_four_lines(kind, code, failing, capsys):
    failing(kind("the place", **FOUR))
    assert main(["doctor"]) == code
    captured = capsys.readouterr()
    heading = "interrupted" if code == 75 else "error"
    assert captured.err == f"{heading}: the place\n  expected: this\n  found:    that\n  to do:    Do something.\n"
    assert captured.out == ""


def test_with_json_the_error_is_one_object_on_one_line(failing, capsys):
    failing(errors.TargetError("the place", **FOUR))
    assert main(["doctor", "--json"]) == 4
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert json.loads(captured.err) == {"error": {"kind": "TargetError", "exit_code": 4, "where": "the place", **FOUR}}


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (MemoryError(), 5, "MemoryError"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 5, "can't allocate"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), 5, "CUDA out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "/some/file"), 5, "/some/file"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 5, "quota"),
        (PermissionError(errno.EACCES, "Permission denied", "/some/file"), 3, "Permission denied"),
        (OSError(errno.EIO, "Input/output error", "/some/file"), 3, "Input/output error"),
        (KeyboardInterrupt(), 75, "a request to stop"),
    ],
)
def test_failures_of_the_machine_have_exit_codes_of_their_own(error, code, text, failing, capsys):
    failing(error)
    assert main(["doctor"]) == code
    captured = capsys.readouterr()
    assert text in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("error", [RuntimeError("oh no"), OSError(errno.ENODEV, "broken"), KeyError("x")])
def test_anything_else_is_a_bug_with_a_trace_and_a_request_to_report(error, failing, capsys):
    failing(error)
    assert main(["doctor"]) == 1
    captured = capsys.readouterr()
    assert "Traceback (most recent call last)" in captured.err
    assert "please report it" in captured.err


def test_a_message_of_several_lines_stays_four_lines(capsys):
    report(
        ValueError(), failure_of(errors.ModelError("a\nb", expected="c\n  d", found="e", action="F.")), as_json=False
    )
    assert capsys.readouterr().err == "error: a b\n  expected: c d\n  found:    e\n  to do:    F.\n"


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["quantize"], "Missing argument 'MODEL'"),
        (["nonsense"], "No such command 'nonsense'"),
        (["doctor", "--nonsense"], "No such option"),
        (["generate", "m", "--max-tokens", "x"], "'--max-tokens'"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_a_usage_error(arguments, found, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert found in captured.err
    assert "--help" in captured.err
    assert captured.out == ""
    assert main([*arguments, "--json"]) == 2
    assert json.loads(capsys.readouterr().err)["error"]["exit_code"] == 2


def test_no_arguments_show_the_help(capsys):
    assert main([]) == 2
    captured = capsys.readouterr()
    assert "quantize" in captured.out + captured.err
    assert "error:" not in captured.err


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "optgptq 0.1.0\n"


def test_help_loads_no_torch_and_answers_at_once():
    code = (
        "import sys, time; began = time.process_time()\n"
        "from optgptq_cli.main import main\n"
        "status = main(['--help'])\n"
        "used = time.process_time() - began\n"
        "heavy = [name for name in ('torch', 'transformers', 'datasets', 'numpy', 'pydantic') if name in sys.modules]\n"
        "print(status, used, heavy, file=sys.stderr)\n"
    )
    best = 9.0
    for _ in range(3):
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        status, used, heavy = run.stderr.split(maxsplit=2)
        assert status == "0"
        assert heavy.strip() == "[]"
        best = min(best, float(used))
    assert best < 0.5


def test_a_reader_that_leaves_ends_the_command_quietly():
    command = f"{sys.executable} -m optgptq_cli recipes --schema | head -c 1"
    run = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False)
    assert "Traceback" not in run.stderr
    assert "BrokenPipe" not in run.stderr
    assert run.returncode in (0, 75)


def test_signals_interrupt_once_and_the_second_is_answered(capsys):
    reached = []
    with pytest.raises(KeyboardInterrupt), stop_on_request():  # noqa: PT012 - two signals, one of them answered
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            reached.append("cleaned")
    assert reached == ["cleaned"]
    assert "once more to stop at once" in capsys.readouterr().err


def test_handlers_are_put_back():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with stop_on_request():
        assert signal.getsignal(signal.SIGTERM) is not before[signal.SIGTERM]
    assert {number: signal.getsignal(number) for number in before} == before
