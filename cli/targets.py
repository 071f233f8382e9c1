"""Options about who will load a result, and how the answers are shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from optgptq.targets import Target, TargetAnswer

TargetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        metavar="ENGINE[-VERSION][:PLATFORM]",
        help="Who must load the result, such as vllm, sglang-0.5.23:cpu or transformers; repeatable.",
        show_default=False,
    ),
]
TensorParallelOption = Annotated[
    int, typer.Option("--tensor-parallel", metavar="N", min=1, help="Devices that share each linear in that engine.")
]


def parse_targets(names: Sequence[str] | None, tensor_parallel: int = 1) -> tuple[Target, ...]:
    """Return the targets called `names`; UsageError for one that is not known, or devices without any."""
    from optgptq.errors import UsageError
    from optgptq.targets import parse_target

    if tensor_parallel > 1 and not names:
        raise UsageError(
            f"--tensor-parallel {tensor_parallel}",
            expected="a --target that the devices belong to",
            found="none",
            action="Add --target ENGINE, or leave --tensor-parallel out.",
        )
    return tuple(parse_target(name) for name in names or ())


def target_lines(answers: Sequence[TargetAnswer]) -> list[str]:
    """Return the answers for people, one sentence a line."""
    return [line for answer in answers for line in answer.lines()]
