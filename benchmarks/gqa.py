"""Key/value heads merged without training, step by step: perplexity and mean KL of the dense models that come out.

The first row of each model is what is usually done before training goes on: the projections of neighbouring heads are
averaged. Every other row is `optgptq gqa` with some of its parts switched off. Models are scored as folders, by the
code behind `optgptq eval`, on text that is not calibration text.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from measure.cases import EVALUATION_TOKENS, NUM_WINDOWS, REPOSITORY, Case, chosen_cases
from measure.process import BenchmarkError
from measure.report import Report, finish, new_parser

from optgptq.checkpoint.folder import CONFIG_FILE, CheckpointFolder
from optgptq.checkpoint.writer import ShardWriter
from optgptq.data.corpora import TextSource
from optgptq.evaluation.perplexity import EvalResult
from optgptq.evaluation.run import EvaluationSettings, evaluate_folders
from optgptq.formats.dense import write_dense
from optgptq.gqa.grouping import adjacent_groups
from optgptq.gqa.heads import read_heads, write_heads
from optgptq.gqa.plan import GroupingPlan, kv_bytes_per_token, plan_grouping
from optgptq.gqa.source import grouped_source
from optgptq.group_heads import group_model
from optgptq.models.loading import load_layer
from optgptq.models.registry import model_spec
from optgptq.recipe import Recipe, load_recipe

MEAN = "mean of neighbours"
# What is switched on: grouping, refit of queries, refit of the output.
STEPS: dict[str, tuple[str, bool, bool]] = {
    "shared subspace, neighbours": ("adjacent", False, False),
    "shared subspace, cosine groups": ("cosine", False, False),
    "shared subspace, similarity groups": ("similarity", False, False),
    "+ output refit": ("similarity", False, True),
    "+ query refit": ("similarity", True, False),
    "+ both refits (as shipped)": ("similarity", True, True),
    "neighbours, both refits": ("adjacent", True, True),
}
COLUMNS = ("model", "heads", "KV bytes per token", "method", "perplexity", "ratio", "mean KL")


def main() -> int:
    """Measure the chosen models."""
    parser = new_parser(__doc__)
    parser.add_argument("--models", nargs="+", help="default: all that are present")
    parser.add_argument("--groups", nargs="+", type=int, default=[2, 4], help="key/value heads that become one")
    parser.add_argument("--shared", type=Path, default=REPOSITORY.parent / "shared", help="folder with other models")
    arguments = parser.parse_args()
    report = Report(name="gqa", title="Key/value heads merged without training", columns=COLUMNS)
    report.notes += [
        f"{8 if arguments.quick else NUM_WINDOWS} calibration windows; perplexity and KL against the model with all "
        f"its heads, {EVALUATION_TOKENS:,} tokens of other text. Nothing is quantized.",
        "None of the models has ALiBi: for those there is no trained model at hand.",
    ]
    for case in chosen_cases(arguments, parser, report.notes):
        num_kv_heads = model_spec(CheckpointFolder.open(case.model)).num_kv_heads
        for group in arguments.groups:
            if num_kv_heads % group == 0:
                _measure(report, case, group, arguments)
    return finish(report, arguments)


def _measure(report: Report, case: Case, group: int, arguments: argparse.Namespace) -> None:
    ratios: dict[str, float] = {}
    for method in (MEAN, *STEPS):
        with tempfile.TemporaryDirectory() as name:
            output, recipe = Path(name) / "grouped", _recipe(case, group, method, quick=arguments.quick)
            if method == MEAN:
                _average(case.model, recipe, output)
            else:
                group_model(case.model, recipe, output)
            result = _score(output, case)
            before, after = (model_spec(CheckpointFolder.open(folder)) for folder in (case.model, output))
        assert result.baseline_perplexity is not None
        ratios[method] = result.perplexity / result.baseline_perplexity
        row = [case.name, f"{before.num_kv_heads} to {after.num_kv_heads}"]
        row += [f"{kv_bytes_per_token(before):,} to {kv_bytes_per_token(after):,}", method, f"{result.perplexity:.4f}"]
        row += [f"{ratios[method]:.3f}", f"{result.mean_kl:.4f}"]
        report.rows.append(row)
        report.details.append({**dict(zip(COLUMNS, row, strict=True)), "group": group})
        print(" | ".join(row), file=sys.stderr)
    dense = f"perplexity {result.baseline_perplexity:.4f} with all heads"
    note = f"{case.name}: {dense}; windows of {case.window_size} tokens."
    if note not in report.notes:
        report.notes.append(note)
    if ratios["+ both refits (as shipped)"] > min(ratios[MEAN], ratios["shared subspace, neighbours"]):
        report.missed.append(f"{case.name}, group {group}: the shipped method is worse than a plainer one.")


def _recipe(case: Case, group: int, method: str, *, quick: bool) -> Recipe:
    grouping, queries, output = STEPS.get(method, ("adjacent", False, False))
    overrides = {
        "gqa.group": group,
        "gqa.grouping": grouping,
        "gqa.refit_queries": queries,
        "gqa.refit_output": output,
        "calibration.source": case.calibration,
        "calibration.window_size": case.window_size,
        "calibration.num_windows": 8 if quick else NUM_WINDOWS,
    }
    return load_recipe("opt-gqa-w4", [f"{field}={json.dumps(value)}" for field, value in overrides.items()])


def _average(model: Path, recipe: Recipe, output: Path) -> None:
    """Write the model with the key and value projections of each group of neighbours averaged."""
    source = CheckpointFolder.open(model)
    plan = plan_grouping(source, model_spec(source), recipe)
    if plan is None:
        raise BenchmarkError(f"{model}: nothing to group")
    heads_folder = output.with_name("heads")
    heads_folder.mkdir()
    writer = ShardWriter(heads_folder, plan.entries, max_shard_bytes=10**9)
    for index in range(plan.spec.num_layers):
        for name, tensor in _averaged_layer(source, plan, index).items():
            writer.write(name, tensor)
    writer.finish()
    (heads_folder / CONFIG_FILE).write_text(json.dumps(plan.config))
    output.mkdir()
    write_dense(grouped_source(source, plan, CheckpointFolder.open(heads_folder)), output, max_shard_bytes=10**9)


def _averaged_layer(source: CheckpointFolder, plan: GroupingPlan, index: int) -> dict[str, torch.Tensor]:
    heads = read_heads(load_layer(source, plan.spec, index, dtype=torch.float32))
    groups = [list(group) for group in adjacent_groups(plan.spec.num_kv_heads, plan.settings.size)]

    def mean(weight_KDX: torch.Tensor) -> torch.Tensor:
        return torch.stack([weight_KDX[group].mean(0) for group in groups])

    merged = replace(
        heads,
        key_KDI=mean(heads.key_KDI),
        value_KDI=mean(heads.value_KDI),
        key_bias_KD=None if heads.key_bias_KD is None else mean(heads.key_bias_KD),
        value_bias_KD=None if heads.value_bias_KD is None else mean(heads.value_bias_KD),
    )
    prefix, stored = plan.spec.names.layer_prefix(index), {entry.name: entry.dtype for entry in plan.entries}
    tensors = {}
    for local_name, linear in write_heads(merged, plan.new_spec).items():
        for leaf, tensor in (("weight", linear.weight_OI), ("bias", linear.bias_O)):
            name = f"{prefix}.{local_name}.{leaf}"
            if tensor is not None:
                tensors[name] = tensor.to(stored[name])
    return tensors


def _score(output: Path, case: Case) -> EvalResult:
    settings = EvaluationSettings(
        source=TextSource(source=case.evaluation), window_size=case.window_size, max_tokens=EVALUATION_TOKENS
    )
    return evaluate_folders(output, settings, baseline=case.model).result


if __name__ == "__main__":
    sys.exit(main())
