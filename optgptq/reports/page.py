"""The report as one HTML page that loads nothing, runs nothing, and can be read anywhere."""

from __future__ import annotations

from collections.abc import Sequence

import jinja2
import markupsafe

import optgptq
from optgptq.reports.blocks import Section
from optgptq.reports.cost_sections import cost_section, plan_section
from optgptq.reports.findings import findings_section
from optgptq.reports.loss_sections import loss_section, worst_section
from optgptq.reports.origin_sections import (
    cache_section,
    dense_section,
    environment_section,
    files_section,
    loading_section,
    recipe_section,
)
from optgptq.reports.run_data import RunData
from optgptq.reports.summary_sections import heads_section, quality_section, summary_section
from optgptq.reports.wording import showable


def report_page(data: RunData) -> str:
    """Return the page of one run."""
    sections = (
        summary_section(data),
        findings_section(data),
        quality_section(data),
        loss_section(data),
        worst_section(data),
        cost_section(data),
        plan_section(data),
        loading_section(data),
        dense_section(data),
        cache_section(data),
        heads_section(data),
        environment_section(data),
        recipe_section(data),
        files_section(data),
    )
    return render_page(f"Quantization report: {data.name}", [section for section in sections if section is not None])


def render_page(title: str, sections: Sequence[Section]) -> str:
    """Return the sections as HTML; every text is escaped, pictures are put in as they are."""
    template = _templates().get_template("page.html.jinja")
    return template.render(title=title, sections=sections, version=optgptq.__version__)


def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("optgptq.reports", "templates"),
        autoescape=True,
        finalize=_finalize,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _finalize(value: object) -> object:
    """Return what a template may print: text that can be shown; pictures as they are."""
    return showable(value) if isinstance(value, str) and not isinstance(value, markupsafe.Markup) else value
