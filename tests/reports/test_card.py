"""The model card: metadata that hubs read, commands that fit, and nothing that breaks Markdown."""

from __future__ import annotations

import pytest
import yaml
from support.runs import CONFIG, run_data

from optgptq.reports.card import base_model, front_matter, model_card
from optgptq.reports.run_data import Loading, RunData


def parts(card: str) -> tuple[dict[str, object], str]:
    _, head, body = card.split("---\n", 2)
    return yaml.safe_load(head), body


def answer(engine: str, *, loads: bool = True, platform: str = "", told: str = "") -> Loading:
    return Loading(engine=engine, platform=platform, title=f"{engine} 1.0", loads=loads, told=told)


def test_the_metadata_tell_what_is_known() -> None:
    data = run_data(card="---\nlicense: llama3.1\nlicense_name: x\ntags: [a]\n---\n# Llama")
    head, body = parts(model_card(data))
    assert head == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "meta-llama/Llama-3.1-70B",
        "base_model_relation": "quantized",
        "license": "llama3.1",
        "license_name": "x",
        "tags": ["optgptq", "gptq", "4-bit"],
        "quantized_by": "optgptq",
    }
    assert "# out\n" in body
    assert "| perplexity | 5.0875 |" in body
    assert "```yaml\nname: gptq-w4\n" in body
    assert "- Kept in full precision: lm\\_head." in body


@pytest.mark.parametrize(
    "name",
    [
        None,
        "",
        "./llama",
        "/models/llama",
        "llama",
        "a/b/c",
        "C:\\x",
        "a/../b",
        "a/..",
        "a b/c",
        "x/y--z",
        5,
        ["a/b"],
        "a/b\n",
        "a" * 60 + "/" + "b" * 60,
    ],
)
def test_what_is_no_hub_id_is_left_out(name: object) -> None:
    data = run_data(config={**CONFIG, "_name_or_path": name})
    assert base_model(data) is None
    assert "base_model" not in front_matter(data)


def test_layouts_of_its_own_need_its_own_library() -> None:
    data = run_data(inspected={"format": "optgptq"}, loading=(answer("vllm", loads=False), answer("optgptq")))
    assert front_matter(data)["library_name"] == "optgptq"
    body = parts(model_card(data))[1]
    assert "vllm serve" not in body
    assert "optgptq generate PATH_OR_HUB_ID" in body
    assert "Not loaded by: vllm 1.0." in body


def test_commands_are_of_those_that_load() -> None:
    loading = (answer("vllm", platform="humming", told="slow"), answer("transformers"), answer("unknown"))
    body = parts(model_card(run_data(loading=loading)))[1]
    assert "vllm serve PATH_OR_HUB_ID --quantization humming\n" in body
    assert "AutoModelForCausalLM" in body
    assert "sglang" not in body
    assert "- vllm 1.0: slow\n" in body


def test_optional_kernels_have_a_command_of_their_own() -> None:
    loading = (answer("vllm"), answer("vllm", platform="humming"), answer("sglang", platform="humming"))
    body = parts(model_card(run_data(loading=loading)))[1]
    assert body.count("vllm serve PATH_OR_HUB_ID\n") == 1
    assert body.count("vllm serve PATH_OR_HUB_ID --quantization humming\n") == 1
    assert "--model-path PATH_OR_HUB_ID --quantization humming\n" in body


@pytest.mark.parametrize(
    ("source", "datasets"),
    [("allenai/c4", ["allenai/c4"]), ("self", None), ("bundled:story-calibration", None), ("my/../x", None), (7, None)],
)
def test_the_data_set_of_the_calibration_is_named(source: object, datasets: list[str] | None) -> None:
    data = run_data(manifest={"recipe": {"calibration": {"source": source}}})
    assert front_matter(data).get("datasets") == datasets


HOSTILE = "```\n---\n# <script>x</script> [a](b) | {{ 1 }} \x00\ud800"


def test_foreign_text_stays_text() -> None:
    data = run_data(
        name=HOSTILE,
        card="---\nlicense: |\n  mit\n  ---\n  base_model: evil\n---\n",
        manifest={"recipe": {"name": HOSTILE, "x": [HOSTILE]}, "warnings": [HOSTILE]},
        inspected={"architecture": HOSTILE, "dense": ({"name": HOSTILE, "reason": ""},)},
    )
    card = model_card(data)
    card.encode()
    lines = card.splitlines()
    assert lines.count("---") == 2
    head = yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)]))
    assert head["base_model"] == "meta-llama/Llama-3.1-70B"
    fences = [line for line in lines if line.startswith("```")]
    assert fences == ["```yaml", "```"]
    outside = card[: card.index("```yaml")]
    assert "<script>" not in outside
    assert "\n# <" not in outside


@pytest.mark.parametrize(
    "card", ["", "---\n", "---\n: [\n---\n", "---\n- a\n---\n", "---\n!!python/object:x {}\n---\n", "no"]
)
def test_cards_without_a_licence(card: str) -> None:
    assert "license" not in front_matter(run_data(card=card))


def test_a_card_without_figures_says_so() -> None:
    data: RunData = run_data(evaluation={}, manifest={"recipe": None})
    body = parts(model_card(data))[1]
    assert "Not measured." in body
    assert "- Its quality was not measured." in body
    assert "## Recipe" not in body
