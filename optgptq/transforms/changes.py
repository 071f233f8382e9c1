"""What happens to each matrix of a model: one record for linears, embeddings and the head alike.

An embedding is a linear of one-hot inputs, stored transposed: its rows are written to the residual stream as the
outputs of `o` and `down` are.

Shapes: `O` output rows, `I` input columns, `M` model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from optgptq.models.inventory import LinearInfo, layer_linears
from optgptq.models.spec import DecoderSpec
from optgptq.transforms.fold import FoldedNorm, branch_norm
from optgptq.transforms.kv_scales import KVScales, column_scale, row_scale
from optgptq.transforms.rotation import Rotation, ValueRotations
from optgptq.transforms.settings import TransformSettings


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LinearChange:
    """The change of one matrix, `W -> rows(columns(W))`, and of its bias.

    Attributes:
        norm: its weight is multiplied into the columns.
        input_rotation: `W <- W R`, after the norm.
        output_rotation: `W <- R^T W`.
        centres_output: the mean over rows is subtracted, for a residual stream that only layer norms read.
        value_rotations: of the value heads; which side follows from `rotates_value_rows`.
        rotates_value_rows: it makes the values; False: it reads the heads.
        layer_index: for the value rotations.
        row_scale_O, column_scale_I: scales of keys and values, multiplied last of all on their side; float64.
        stored_transposed: stored `[I, O]`.
    """

    norm: FoldedNorm | None = None
    input_rotation: Rotation | None = None
    output_rotation: Rotation | None = None
    centres_output: bool = False
    value_rotations: ValueRotations | None = None
    rotates_value_rows: bool = False
    layer_index: int = 0
    row_scale_O: torch.Tensor | None = None
    column_scale_I: torch.Tensor | None = None
    stored_transposed: bool = False

    @property
    def changes_columns(self) -> bool:
        value_columns = self.value_rotations is not None and not self.rotates_value_rows
        scales = self.norm is not None or self.column_scale_I is not None
        return scales or self.input_rotation is not None or value_columns

    @property
    def changes_rows(self) -> bool:
        value_rows = self.value_rotations is not None and self.rotates_value_rows
        scales = self.centres_output or self.row_scale_O is not None
        return scales or self.output_rotation is not None or value_rows

    @property
    def stored_rows_are_independent(self) -> bool:
        """The stored matrix may be changed a few of its rows at a time."""
        return not (self.changes_columns if self.stored_transposed else self.changes_rows)

    def change_weight(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """Return the changed float64 matrix."""
        if self.norm is not None:
            weight_OI = weight_OI * self.norm.scale_M
        if self.input_rotation is not None:
            weight_OI = self.input_rotation.apply(weight_OI)
        if self.value_rotations is not None and not self.rotates_value_rows:
            weight_OI = self.value_rotations.rotate_columns(weight_OI, self.layer_index)
        if self.column_scale_I is not None:
            weight_OI = weight_OI * self.column_scale_I
        return self._change_rows(weight_OI)

    def change_bias(self, bias_O: torch.Tensor, weight_OI: torch.Tensor | None) -> torch.Tensor:
        """Return the changed float64 bias; `weight_OI`, unchanged, is looked at where a norm's bias moves here."""
        if self.norm is not None and self.norm.moved_bias_M is not None:
            assert weight_OI is not None
            bias_O = bias_O + weight_OI @ self.norm.moved_bias_M
        return self._change_rows(bias_O[:, None])[:, 0]

    def _change_rows(self, weight_OI: torch.Tensor) -> torch.Tensor:
        if self.value_rotations is not None and self.rotates_value_rows:
            weight_OI = self.value_rotations.rotate_rows(weight_OI, self.layer_index)
        if self.centres_output:
            weight_OI = weight_OI - weight_OI.mean(dim=0)
        if self.output_rotation is not None:
            weight_OI = self.output_rotation.apply(weight_OI.T).T
        if self.row_scale_O is not None:
            weight_OI = weight_OI * self.row_scale_O[:, None]
        return weight_OI


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ModelChange:
    """What is needed to know the change of every matrix of a model.

    Attributes:
        spec, settings: the model and what was asked.
        norms: what folding takes out of the norms; empty where nothing is folded.
        residual: rotation of the residual stream or None.
        kv_scales: scales of keys and values of each decoder layer, behind the value rotation; empty for none.
    """

    spec: DecoderSpec
    settings: TransformSettings
    norms: Mapping[str, FoldedNorm]
    residual: Rotation | None
    kv_scales: Sequence[KVScales] = ()

    def linear_changes(self) -> dict[str, LinearChange]:
        """Return the change of every matrix that changes, by full module name, embeddings and head included."""
        changes = {
            linear.name: self._layer_linear(linear)
            for index in range(self.spec.num_layers)
            for linear in layer_linears(self.spec, index)
        } | self._ends()
        return {name: change for name, change in changes.items() if change.changes_rows or change.changes_columns}

    def _layer_linear(self, linear: LinearInfo) -> LinearChange:
        assert linear.stage != "head"
        transposed = linear.stored_transposed
        scales = self.kv_scales[linear.layer_index] if self.kv_scales else KVScales()
        if linear.stage in ("o", "down"):
            values = self._value_rotations() if linear.stage == "o" else None
            change = self._producer(values=values, layer_index=linear.layer_index, transposed=transposed)
            return replace(change, column_scale_I=column_scale(self.spec, scales)) if linear.stage == "o" else change
        names = self.spec.linear_names(linear.layer_index, linear.stage)
        # Last of three or fused with the others: the values are always in the last linear of the stage.
        makes_values = linear.stage == "qkv" and linear.name == names[-1]
        return LinearChange(
            norm=self.norms.get(branch_norm(self.spec, linear.layer_index, linear.stage) or ""),
            input_rotation=self.residual,
            value_rotations=self._value_rotations() if makes_values else None,
            rotates_value_rows=makes_values,
            layer_index=linear.layer_index,
            row_scale_O=row_scale(self.spec, linear, scales) if linear.stage == "qkv" else None,
            stored_transposed=transposed,
        )

    def _ends(self) -> dict[str, LinearChange]:
        names = self.spec.names
        head = LinearChange(norm=self.norms.get(names.final_norm or ""), input_rotation=self.residual)
        ends = {names.project_out or names.head: head}
        if names.position_embedding is not None:
            ends[names.position_embedding] = self._producer(transposed=True)
        if names.project_in is not None:
            ends[names.project_in] = self._producer()
        elif names.embedding_norm is None:
            ends[names.embedding] = self._producer(transposed=True)
        return ends

    def _producer(
        self, *, values: ValueRotations | None = None, layer_index: int = 0, transposed: bool = False
    ) -> LinearChange:
        return LinearChange(
            output_rotation=self.residual,
            centres_output=self._centres,
            value_rotations=values,
            layer_index=layer_index,
            stored_transposed=transposed,
        )

    @property
    def _centres(self) -> bool:
        """Every reader of the residual stream subtracts the mean itself, so the rotated stream may lose it."""
        return self.residual is not None and self.spec.norm.kind == "layer" and self.spec.names.final_norm is not None

    def _value_rotations(self) -> ValueRotations | None:
        settings = self.settings
        if not settings.rotates_values:
            return None
        return ValueRotations(kind=settings.value_rotation, seed=settings.seed, spec=self.spec)
