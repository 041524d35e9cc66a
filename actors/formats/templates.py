"""Chat templates by name, as `chat_template` has them. A new named one is an entry of CHAT_TEMPLATES."""

from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from actors.errors import ConfigError
from actors.formats.base import FormatSpec

CHAT_TEMPLATES = {
    "alpaca": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'system' and loop.first %}{{ message['content'] }}"
        "{% elif message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] }}"
        "{% elif message['role'] == 'assistant' %}{{ '### Response:\n' + message['content'] + eos_token }}{% endif %}"
        "{% if not loop.last %}{{ '\n\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n\n### Response:\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ raise_exception('gemma has no system role') }}{% endif %}"
        "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
        "{{ message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
        "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "phi_3": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + '<|end|>\n' }}"
        "{% elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '<|end|>\n<|assistant|>\n' }}"
        "{% elif message['role'] == 'assistant' %}{{ message['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    ),
}
# Axolotl's names of templates that models of a family bring themselves, and what is in those.
FAMILIES = {
    **dict.fromkeys(("qwen_25", "qwen3"), "<|im_start|>"),
    **dict.fromkeys(("mistral_v1", "mistral_v2v3", "mistral_v3_tekken", "mistral_v7_tekken"), "[INST]"),
    "gemma3": "<start_of_turn>",
    "llama4": "<|header_start|>",
    "phi_35": "<|assistant|>",
    "cohere": "<|START_OF_TURN_TOKEN|>",
}
OWN = "tokenizer_default"
FALLBACK = "tokenizer_default_fallback_"


def has_template(name: str | None) -> bool:
    """Whether chat_template may have that value; None = it is not written."""
    return name is None or name in (OWN, "jinja", *FAMILIES) or name.removeprefix(FALLBACK) in CHAT_TEMPLATES


def ensure_own(name: str | None, tokenizer: Any) -> None:
    """Raises ConfigError where a model's own template is asked for by its family's name, and it has none, or another."""
    if name in FAMILIES and FAMILIES[name] not in (tokenizer.chat_template or ""):
        raise ConfigError(
            f"chat_template: {name} is what models of that family have of their own, with {FAMILIES[name]} in it; "
            f"this one has {'another' if tokenizer.chat_template else 'none'}; choose one of {OWN}, {', '.join(CHAT_TEMPLATES)}"
        )


def template_of(spec: FormatSpec, tokenizer: Any) -> str:
    """The template's text. Raises ConfigError for an unknown name, no template, or one that is not Jinja."""
    name = spec.chat_template or ("jinja" if spec.chat_template_jinja else OWN)
    if name in FAMILIES:
        ensure_own(name, tokenizer)
        name = OWN
    if name == "jinja":
        return _jinja(spec.chat_template_jinja, tokenizer)
    if name == OWN or (name.startswith(FALLBACK) and tokenizer.chat_template):
        if not tokenizer.chat_template:
            raise ConfigError(
                f"chat_template: the tokenizer has none of its own; choose one of {', '.join(CHAT_TEMPLATES)}, "
                "or give one in chat_template_jinja"
            )
        return str(tokenizer.get_chat_template())
    name = name.removeprefix(FALLBACK)
    if name not in CHAT_TEMPLATES:
        raise ConfigError(
            f"chat_template: there is no '{name}'; choose one of {OWN}, {', '.join(CHAT_TEMPLATES)}, "
            f"{FALLBACK}<name>, or jinja with chat_template_jinja"
        )
    return CHAT_TEMPLATES[name]


def _jinja(given: str | None, tokenizer: Any) -> str:
    if not given:
        raise ConfigError("chat_template: jinja needs the template; add chat_template_jinja, a template or its file")
    template = given
    if "{" not in given:
        if not Path(given).is_file():
            raise ConfigError(f"chat_template_jinja: {given} is neither a template nor a file that holds one")
        template = Path(given).read_text(encoding="utf-8")
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], chat_template=template, tokenize=False)
    except TemplateSyntaxError as error:
        raise ConfigError(f"chat_template_jinja: is no Jinja template, line {error.lineno}: {error.message}") from error
    except (TemplateError, LookupError, TypeError, ValueError):
        pass  # it may want more than this one message; a row that it cannot take is refused then
    return template
