"""What the format tests share: the real tokenizer, one with Llama 3's tokens, and messages in short."""

import copy
from typing import Any

import pytest
from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from transformers import AutoTokenizer

from actors import hub
from tests.tiny import SMOLLM2


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(hub.resolve(SMOLLM2.name))


@pytest.fixture(scope="module")
def llama(tokenizer: Any) -> Any:
    """SmolLM2's vocabulary with Llama 3's special tokens, and "\\n\\n" one token before text, as it is there."""
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens(
        {"additional_special_tokens": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]},
        replace_extra_special_tokens=False,
    )
    lines = Split(Regex(r"\s*[\r\n]+"), "isolated")
    other.backend_tokenizer.pre_tokenizer = Sequence([lines, ByteLevel(add_prefix_space=False)])
    return other


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}
