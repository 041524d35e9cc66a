"""The formats of supervised fine-tuning by the name that `type:` has for them. A new one is an entry of SFT_FORMATS."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from typing import Any

from actors.errors import ConfigError
from actors.formats.base import Encode, FormatSpec
from actors.formats.chat import chat_template, sharegpt
from actors.formats.instruct import INSTRUCT_FORMATS, completion, input_output, instruct, user_defined

SFT_FORMATS: dict[str, Callable[[FormatSpec, Any], Encode]] = {
    "chat_template": chat_template,
    "sharegpt": sharegpt,
    "completion": completion,
    "input_output": input_output,
    **{name: partial(instruct, form) for name, form in INSTRUCT_FORMATS.items()},
}

# Axolotl's types that are not among them, without what follows a dot, and what to use in their place.
_CHAT = "use chat_template, with field_messages and message_property_mappings where its rows have other names for them"
_ROWS = "write the rows that it would make into a file, with type: alpaca or a mapping of fields and formats"
LACKING: dict[str, str] = {
    "creative_acr": _ROWS,
    "reflection": _ROWS,
    "orcamini": "use alpaca_w_system.load_open_orca, or a mapping of fields and formats",
    "messages": _CHAT,
    "llama2_chat": _CHAT,
    "pygmalion": _CHAT,
    "stepwise_supervised": "use rl: reward_trainer with bradley_terry.chat_template, a model of whole answers",
}


def build_sft(spec: FormatSpec, tokenizer: Any) -> Encode:
    """The function from a dataset entry's rows to SftRow. Raises ConfigError when there is none."""
    return sft_format(spec)(spec, tokenizer)


def sft_format(spec: FormatSpec) -> Callable[[FormatSpec, Any], Encode]:
    """What builds that function. Raises ConfigError for a type that is none of SFT_FORMATS, and for a mapping of other keys."""
    if spec.type is None:
        raise ConfigError("datasets: type: is missing, and tells how a row is read; add one, such as chat_template or alpaca")
    if isinstance(spec.type, Mapping):
        return user_defined(spec.type)
    if instead := LACKING.get(spec.type.partition(".")[0]):
        raise ConfigError(f"datasets: type: {spec.type} is not implemented yet; {instead}")
    if spec.type not in SFT_FORMATS:
        near = get_close_matches(spec.type, SFT_FORMATS, n=3) or list(SFT_FORMATS)
        raise ConfigError(f"datasets: there is no type: {spec.type}; choose one of {', '.join(near)}")
    return SFT_FORMATS[spec.type]
