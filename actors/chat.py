"""Messages to tokens, by the chat template of a model's tokenizer."""

from collections.abc import Mapping, Sequence
from typing import Any

PLACE = "eagleray-answer"  # stands where a turn's text does, to see what the template puts after it


def prompt_token_ids(tokenizer: Any, prompt: Any, chat_template_kwargs: Mapping[str, object]) -> list[int]:
    """Tokens of a prompt as the model sees it: plain text as it stands, messages through the chat template."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    return list(
        tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **chat_template_kwargs
        )["input_ids"]
    )


def token_ids_between(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], answered: int, end: str, chat_template_kwargs: Mapping[str, object]
) -> list[int]:
    """Tokens from the end of a turn of the model to where it writes its next one: what the template says of others' messages.

    messages: the whole conversation; the first `answered` of them end with the model's turn. end: the text of the token that
    the model ended it with, "" where it did not. So the tokens that were sampled can stay as they are. Raises ValueError for a
    template that writes earlier turns in another way once there is a later one.
    """

    def text(part: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
        return str(tokenizer.apply_chat_template(part, tokenize=False, **kwargs, **chat_template_kwargs))

    *earlier, turn = messages[:answered]
    ending = text([*earlier, {**turn, "content": PLACE}]).rpartition(PLACE)[2]
    before = text(messages[:answered]).removesuffix(ending)
    after = text(messages, add_generation_prompt=True)
    if not after.startswith(before):
        raise ValueError(
            "the chat template changes earlier turns once there is a later one, so the model would not read what it wrote; "
            "give as base_model a folder whose tokenizer has another, such as trl.chat_template_utils."
            "get_training_chat_template makes of it"
        )
    return list(tokenizer(after[len(before) :].removeprefix(end), add_special_tokens=False)["input_ids"])
