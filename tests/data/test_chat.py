from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.texts import write_tokenizer

from optgptq.data.tokenizer import load_tokenizer
from optgptq.errors import TextError

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = """{{- bos_token }}
{%- if tools is none %}
    {{- 'no tools\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {{- '[' + message.role + '] ' + (message.content | trim) + eos_token }}
{%- endfor %}
"""
BLOCKS = """{% for message in messages %}
    {% if message.role == 'assistant' %}
{% generation %}{{ message.content }}{% endgeneration %}
    {% else %}
{{ message | tojson }}
{{ message | tojson(indent=1) }}
    {% endif %}
{% endfor %}
"""
MESSAGES = [
    {"role": "user", "content": "  Hello <b>\u4e2d</b> 'you' "},
    {"role": "skip", "content": "-"},
    {"role": "assistant", "content": "Hi & bye"},
]


def with_template(folder: Path, template: Any) -> Path:
    return write_tokenizer(folder, config={"chat_template": template})


@pytest.mark.parametrize("template", [CHATML, LLAMA, BLOCKS])
def test_text_is_that_of_transformers(tmp_path: Path, template: str) -> None:
    from transformers import AutoTokenizer

    folder = with_template(tmp_path, template)
    reference = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    expected = reference.apply_chat_template(MESSAGES, tokenize=False)
    assert load_tokenizer(folder).render_chat(MESSAGES) == expected


@pytest.mark.parametrize("template", [CHATML, LLAMA, BLOCKS])
def test_a_text_to_answer_is_that_of_transformers(tmp_path: Path, template: str) -> None:
    from transformers import AutoTokenizer

    folder = with_template(tmp_path, template)
    reference = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    expected = reference.apply_chat_template(MESSAGES[:1], tokenize=False, add_generation_prompt=True)
    rendered = load_tokenizer(folder).render_chat(MESSAGES[:1], add_generation_prompt=True)
    assert rendered == expected
    assert rendered.endswith("<|im_start|>assistant\n") == (template == CHATML)


def test_what_to_do_is_said_for_prompts_too(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "none"))
    with pytest.raises(TextError) as caught:
        tokenizer.render_chat(MESSAGES, add_generation_prompt=True)
    assert caught.value.action == "Give prompts as plain text, or add the template."
    refusing = load_tokenizer(with_template(tmp_path / "refusing", "{{ raise_exception('no') }}"))
    with pytest.raises(TextError) as caught:
        refusing.render_chat(MESSAGES, add_generation_prompt=True)
    assert caught.value.action.startswith("Check the roles of the messages")
    with pytest.raises(TextError) as caught:
        refusing.render_chat([], add_generation_prompt=True)
    assert caught.value.action == "Give messages as objects with role and content."


def test_a_template_file_wins_over_the_configuration(tmp_path: Path) -> None:
    folder = with_template(tmp_path, "from the configuration")
    assert load_tokenizer(folder).render_chat(MESSAGES) == "from the configuration"
    (folder / "chat_template.jinja").write_text("from the file")
    assert load_tokenizer(folder).render_chat(MESSAGES) == "from the file"


def test_of_several_templates_the_default_is_taken(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert load_tokenizer(with_template(tmp_path, templates)).render_chat(MESSAGES) == "plain"


def test_a_date_is_the_same_on_every_day(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(with_template(tmp_path, "{{ strftime_now('%d %b %Y') }} {{ strftime_now('%Y-%m-%d') }}"))
    assert tokenizer.render_chat(MESSAGES) == "26 Jul 2024 2024-07-26"


def failure(folder: Path, messages: Any) -> TextError:
    with pytest.raises(TextError) as caught:
        load_tokenizer(folder).render_chat(messages)
    return caught.value


def test_a_model_without_template(tmp_path: Path) -> None:
    error = failure(write_tokenizer(tmp_path), MESSAGES)
    assert error.where == f"chat template of {tmp_path}"
    assert error.expected == "a file chat_template.jinja, or chat_template in tokenizer_config.json"
    assert error.action.startswith("Set calibration.chat_template=false")


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{{ raise_exception('roles must alternate') }}", "the error 'roles must alternate' on "),
        ("{{ messages[0].content + 3 }}", "the error "),
        ("{% for", "the error "),
        ("{{ messages.append(1) }}", "the error "),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "the error "),
    ],
)
def test_a_template_that_fails_or_breaks_out(tmp_path: Path, template: str, found: str) -> None:
    error = failure(with_template(tmp_path, template), MESSAGES)
    assert error.expected == "a template that accepts the messages"
    assert error.found.startswith(found)


@pytest.mark.parametrize("messages", ["Hello", [], ["Hello"], {"role": "user"}])
def test_what_is_no_list_of_messages(tmp_path: Path, messages: Any) -> None:
    error = failure(with_template(tmp_path, CHATML), messages)
    assert error.where == "chat messages"
    assert error.found == repr(messages)


def test_a_template_file_that_is_not_utf8(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path)
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TextError, match="UTF-8"):
        load_tokenizer(folder)


def test_messages_are_not_changed(tmp_path: Path) -> None:
    before = json.dumps(MESSAGES)
    load_tokenizer(with_template(tmp_path, CHATML)).render_chat(MESSAGES)
    assert json.dumps(MESSAGES) == before
