"""The section of a recipe about the text that a model is measured on."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, StrictBool, StrictStr, model_validator

from optgptq.recipe.section import FloatDtype, PositiveInt, Section, impossible

BosPolicy = Literal["none", "window", "document"]
WindowLayout = Literal["packed", "documents"]


class CalibrationRecipe(Section):
    """Which text the model reads while it is measured."""

    source: Annotated[StrictStr, Field(min_length=1)] = Field(
        default="self",
        description="self (the model writes it), bundled:story-calibration, a .txt, .jsonl or .parquet file, "
        "a folder saved by datasets, or a hub id owner/name",
    )
    config: StrictStr | None = Field(default=None, description="configuration of a hub data set")
    split: StrictStr = Field(default="train", description="split of a saved or hub data set")
    column: StrictStr = Field(default="text", description="column that holds the text, or the chat messages")
    revision: StrictStr | None = Field(
        default=None, description="commit of a hub data set; without it the text can change"
    )
    num_windows: PositiveInt = Field(default=128, description="windows to calibrate on")
    window_size: PositiveInt | None = Field(
        default=None, description="tokens per window; null: 2048, or less if the model ends earlier"
    )
    seed: int = Field(
        default=0, strict=True, ge=0, lt=2**63, description="seed of the choice of windows and of self text"
    )
    bos: BosPolicy = Field(default="none", description="where a begin-of-sequence token is put")
    layout: WindowLayout = Field(
        default="packed", description="packed: documents joined and cut; documents: one per window"
    )
    chat_template: StrictBool = Field(
        default=False, description="the column holds chat messages for the model's template"
    )
    windows_per_batch: PositiveInt | None = Field(default=None, description="windows per forward pass; null: chosen")
    full_precision_windows: Annotated[int, Field(strict=True, ge=0)] | None = Field(
        default=None,
        description="windows also run through unquantized layers, to measure output error; null: one in 32, at least 1",
    )
    held_out_windows: PositiveInt = Field(
        default=8,
        description="windows kept out of all moments, on which the strength of the target shift is chosen "
        "and trained norms are judged",
    )
    compute_dtype: Literal["auto", "float32"] = Field(
        default="auto",
        description="dtype of activations; auto: bfloat16 where model and processor have it, else float32",
    )
    moment_dtype: FloatDtype = Field(default="float32", description="accumulator of the input moments")
    moment_stream: Literal["quantized", "full_precision"] = Field(
        default="quantized", description="activations measured"
    )
    self_temperature: float = Field(
        default=1.0, strict=True, gt=0, allow_inf_nan=False, description="sampling temperature of self text"
    )

    @model_validator(mode="after")
    def _check_self_text(self) -> Self:
        if self.source != "self":
            return self
        if self.chat_template:
            raise impossible(
                "chat_template",
                expected="false where the model writes its own text",
                found="chat_template true with source self",
                action="Name a text with chat messages in calibration.source, or set calibration.chat_template=false.",
            )
        if self.layout == "documents":
            raise impossible(
                "layout",
                expected="packed where the model writes its own text",
                found="layout documents with source self",
                action="Name a text in calibration.source, or set calibration.layout=packed.",
            )
        return self
