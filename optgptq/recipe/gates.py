"""Gates: limits that a finished checkpoint must keep, as a list of data, and the section of a recipe that sets them.

No gate decides a byte of a checkpoint. What is measured and read for them is in `optgptq.evaluation`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Literal, Self

from pydantic import Field, StrictStr, model_validator

from optgptq.recipe.section import PositiveInt, Section, impossible

# text: the checkpoint scored on a text; comparison: that, beside a baseline; record: what its manifest says of the job;
# folder: which linears it stores in codes.
FigureSource = Literal["text", "comparison", "record", "folder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GateKind:
    """What one gate looks at.

    Attributes:
        name: the field of the section `gates`, and the name in `--gate NAME=VALUE`.
        figure: what is compared, in words.
        source: where the figure comes from.
        at_least: the limit is the lowest good figure; otherwise the highest.
        unit: of figure and limit, empty for a plain number.
        highest: largest limit that has a meaning, None for any.
        advice: a sentence on what to do where it is missed.
        option: older option of `optgptq eval` for the same gate.
    """

    name: str
    figure: str
    source: FigureSource
    at_least: bool = False
    unit: str = ""
    highest: float | None = None
    advice: str = "Use a recipe with more bits or smaller groups, more calibration text, or agree on another limit."
    option: str | None = None

    @property
    def is_measured(self) -> bool:
        """The model must run for it."""
        return self.source in ("text", "comparison")

    @property
    def bound(self) -> str:
        """Which side of the limit is good, in words."""
        return "at least" if self.at_least else "at most"


_DENSE_ADVICE = "Look into `optgptq inspect` for linears that were kept dense, and why; drop these rules."
_RTN_ADVICE = "Give the named linears the method of the others, and more calibration text so that no input is unseen."
_TEXT_ADVICE = "Use more calibration text, calibration.moment_dtype=float64, or agree on another limit."

GATES: Mapping[str, GateKind] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            GateKind(name="max_perplexity", figure="perplexity", source="text", option="--max-ppl"),
            GateKind(
                name="max_perplexity_increase",
                figure="relative perplexity increase",
                source="comparison",
                option="--max-ppl-increase",
            ),
            GateKind(
                name="max_kl",
                figure="mean KL in nats per token",
                source="comparison",
                unit="nats per token",
                option="--max-kl",
            ),
            GateKind(
                name="min_top1",
                figure="top-1 agreement",
                source="comparison",
                at_least=True,
                unit="share",
                highest=1.0,
                option="--min-top1",
            ),
            GateKind(
                name="max_layer_error", figure="output error of a decoder layer", source="record", unit="relative error"
            ),
            GateKind(name="max_linear_loss", figure="loss of a linear", source="record", unit="share of its output"),
            GateKind(
                name="max_dense_share",
                figure="share of weights left dense",
                source="folder",
                unit="share",
                highest=1.0,
                advice=_DENSE_ADVICE,
            ),
            GateKind(
                name="max_rtn_share",
                figure="share of weights rounded to nearest against the recipe's method",
                source="record",
                unit="share",
                highest=1.0,
                advice=_RTN_ADVICE,
            ),
            GateKind(
                name="max_damp_ratio",
                figure="damping of an input moment",
                source="record",
                unit="share of the mean diagonal",
                advice=_TEXT_ADVICE,
            ),
            GateKind(
                name="max_clip_fraction",
                figure="share of a linear's weights outside their grids",
                source="record",
                unit="share",
                highest=1.0,
                advice="Use smaller groups or weights.grid_search=minmax, or agree on another limit.",
            ),
            GateKind(
                name="min_tokens_per_linear",
                figure="calibration tokens behind a linear",
                source="record",
                at_least=True,
                unit="tokens",
                advice="Use more calibration windows, or text that reaches all parts of the model.",
            ),
        )
    }
)

_Limit = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
_ShareLimit = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]


class GatesRecipe(Section):
    """What a finished checkpoint must keep, and the text that it writes as a sample; decides no byte of it."""

    text: Annotated[StrictStr, Field(min_length=1)] | None = Field(
        default=None, description="text that measured gates read, spelled as in calibration.source; not self"
    )
    config: StrictStr | None = Field(default=None, description="configuration of a hub data set")
    split: StrictStr = Field(default="test", description="split of a saved or hub data set")
    column: StrictStr = Field(default="text", description="column that holds the text")
    revision: StrictStr | None = Field(default=None, description="commit of a hub data set")
    window_size: Annotated[int, Field(strict=True, ge=2)] | None = Field(
        default=None, description="tokens per window; null: 2048, or less if the model ends earlier"
    )
    max_tokens: PositiveInt | None = Field(default=20_000, description="first tokens of the text that count; null: all")
    max_perplexity: _Limit | None = Field(default=None, description="highest perplexity")
    max_perplexity_increase: _Limit | None = Field(
        default=None, description="highest relative increase over the source model, 0.02 for 2 percent"
    )
    max_kl: _Limit | None = Field(default=None, description="highest mean KL to the source model, nats per token")
    min_top1: _ShareLimit | None = Field(default=None, description="lowest top-1 agreement with the source model")
    max_layer_error: _Limit | None = Field(default=None, description="highest output error of a decoder layer")
    max_linear_loss: _Limit | None = Field(default=None, description="highest loss of a linear")
    max_dense_share: _ShareLimit | None = Field(
        default=None, description="highest share of the decoder layers' weights that stay dense"
    )
    max_rtn_share: _ShareLimit | None = Field(
        default=None,
        description="highest share of the decoder layers' weights that were rounded to nearest, where the recipe's "
        "method is another",
    )
    max_damp_ratio: _Limit | None = Field(default=None, description="highest damping that a linear needed")
    max_clip_fraction: _ShareLimit | None = Field(
        default=None, description="highest share of a linear's weights outside their grids"
    )
    min_tokens_per_linear: PositiveInt | None = Field(
        default=None, description="fewest calibration tokens that a linear read"
    )
    sample_prompt: Annotated[StrictStr, Field(min_length=1)] | None = Field(
        default=None, description="prompt that the finished checkpoint continues; null: no sample"
    )
    sample_tokens: PositiveInt = Field(default=40, description="tokens of that sample")

    @property
    def limits(self) -> dict[str, float]:
        """Limits that are set, by the name of their gate, in the order of `GATES`."""
        values = {name: getattr(self, name) for name in GATES}
        return {name: float(limit) for name, limit in values.items() if limit is not None}

    @property
    def is_empty(self) -> bool:
        """Nothing is asked of the finished checkpoint."""
        return not self.limits and self.sample_prompt is None

    @model_validator(mode="after")
    def _check_text(self) -> Self:
        measured = [name for name in self.limits if GATES[name].is_measured]
        if measured and self.text is None:
            raise impossible(
                "text",
                expected=f"a text, which {' and '.join(measured)} {'is' if len(measured) == 1 else 'are'} measured on",
                found="null",
                action="Set gates.text=bundled:story-evaluation for the bundled stories, or name a text of yours.",
            )
        if self.text == "self":
            raise impossible(
                "text",
                expected="a text that exists",
                found="self, the text a model writes for its own calibration",
                action="Set gates.text=bundled:story-evaluation for the bundled stories, or name a text of yours.",
            )
        if self.max_tokens is not None and self.window_size is not None and self.max_tokens < self.window_size:
            raise impossible(
                "max_tokens",
                expected=f"at least one window, {self.window_size} tokens",
                found=str(self.max_tokens),
                action="Set a larger gates.max_tokens, or a smaller gates.window_size.",
            )
        return self
