"""`optgptq report`: a finished run as one HTML page, two runs beside each other, the draft of a model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .display import plain_log
from .options import JsonOption, QuietOption
from .output import human_bytes, table, write_json, write_note, write_result
from .record import require_writable

if TYPE_CHECKING:
    from optgptq.reports.run_data import RunData


def report(  # noqa: PLR0913 - the parameters of a command are its options
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the checkpoint.", show_default=False)],
    record: Annotated[
        Path | None,
        typer.Option("--record", help="Run record; default: OUT.run.json beside the folder.", show_default=False),
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option("--eval", help="What `optgptq eval --json` printed for this checkpoint.", show_default=False),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option("--compare", metavar="OTHER", help="Folder of another checkpoint to show beside this one."),
    ] = None,
    compare_record: Annotated[
        Path | None, typer.Option("--compare-record", help="Run record of the other one.", show_default=False)
    ] = None,
    compare_evaluation: Annotated[
        Path | None,
        typer.Option("--compare-eval", help="What `optgptq eval --json` printed for it.", show_default=False),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", help="Page to write; default: OUT.report.html beside the folder.", show_default=False),
    ] = None,
    card: Annotated[
        Path | None, typer.Option("--card", help="Also write the draft of a model card here.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write one self-contained HTML page about a finished run, or about two; and the draft of a model card."""
    from optgptq.reports.run_data import collect_run
    from optgptq.reports.whole_file import require_outside, write_whole

    place = _page_path(output, compare) if html is None else html
    for path, option in ((place, "--html"), (card, "--card")):
        if path is not None:
            require_writable(path, option=option)
            require_outside(path, output)
    _require_finished(output)
    with plain_log(quiet=quiet):
        data = collect_run(output, record=record, evaluation=evaluation)
        other = None
        if compare is not None:
            other = collect_run(compare, record=compare_record, evaluation=compare_evaluation)
        for run in (data,) if other is None else (data, other):
            for note in run.notes:
                write_note(f"note: {run.name}: {note}")
        write_whole(place, _page(data, other))
        if card is not None:
            from optgptq.reports.card import model_card

            write_whole(card, model_card(data))
    told = _told(data, place, card)
    if as_json:
        write_json(told)
    elif not quiet:
        write_result(_summary(told))


def _require_finished(output: Path) -> None:
    """Raise OutputError where only what an interrupted job has kept is there."""
    from optgptq.errors import OutputError
    from optgptq.kept_work import kept_work

    kept = None if output.is_dir() else kept_work(output)
    if kept is not None:
        raise OutputError(
            str(output), expected="a finished checkpoint", found="a job that was interrupted", action=kept
        )


def _page_path(output: Path, compare: Path | None) -> Path:
    folder = output.absolute()
    suffix = "report" if compare is None else f"against-{compare.absolute().name}"
    return folder.with_name(f"{folder.name}.{suffix}.html")


def _page(data: RunData, other: RunData | None) -> str:
    if other is None:
        from optgptq.reports.page import report_page

        return report_page(data)
    from optgptq.reports.compare import compare_page

    return compare_page(data, other)


def _told(data: RunData, place: Path, card: Path | None) -> dict[str, Any]:
    return {
        "html": str(place),
        "html_bytes": place.stat().st_size,
        "card": None if card is None else str(card),
        "bits_per_weight": data.checkpoint.bits_per_weight,
        "gates_missed": [str(gate.get("gate")) for gate in data.gates if gate.get("passed") is not True],
        "warnings": list(data.warnings),
        "notes": list(data.notes),
    }


def _summary(told: dict[str, Any]) -> str:
    rows = [("page", f"{told['html']}, {human_bytes(told['html_bytes'])}")]
    if told["card"] is not None:
        rows.append(("model card", told["card"]))
    rows.append(("warnings", str(len(told["warnings"]))))
    return table(rows)
