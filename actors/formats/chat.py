"""Conversations to token ids: `chat_template` and `sharegpt`. The named templates are in templates.py.

The ids are those of the chat template on the whole conversation, never pieced together from its turns. A turn is found
in that text by its surroundings: the conversation is rendered a second time with a mark in place of the turn, and what
stands after the mark must be the end of the true text. This holds for templates that trim a message, that write the
last turn otherwise than the others, or that end a turn without a token of its own. Where it does not hold, the row is
refused: a wrong mask would go unseen.
"""

import logging
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from actors.errors import ConfigError
from actors.formats.base import (
    IGNORED,
    Encode,
    FormatSpec,
    Row,
    RowError,
    SftRow,
    optional_text_of,
    value_of,
    with_parsed,
    without_nulls,
)
from actors.formats.templates import template_of

log = logging.getLogger("eagleray")

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system", "tool": "tool"}
THINKING = "reasoning_content"
# Templates read these besides the content; a marked turn goes without them, so that all that it wrote is replaced.
BESIDE_CONTENT = ("tool_calls", THINKING)
MARK = "\ue000turn\ue001"  # private-use characters: in no text that means anything

Message = dict[str, Any]


@dataclass(frozen=True)
class Detail:
    """Characters of a message from `begin` up to `end`, and whether they are trained."""

    begin: int
    end: int
    trained: bool


@dataclass(frozen=True)
class Turn:
    """A message as the template takes it, and what its row says about training it."""

    name: str  # where it stands in the row, such as messages[2]
    message: Message
    trained: bool | None  # None = its role decides
    details: tuple[Detail, ...] | None


@dataclass(frozen=True)
class Place:
    """Where in the rendered conversation lies what a turn writes after its header, and whether it is trained."""

    turn: Turn
    begin: int
    end: int
    trained: bool


@dataclass(frozen=True)
class Tokens:
    """A rendered conversation: token i is text[offsets[i][0] : offsets[i][1]]."""

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]

    def within(self, begin: int, end: int) -> range:
        """The tokens that hold a character of text[begin:end]. One that reaches over the edge is among them."""
        first = bisect_right(self.offsets, begin, key=lambda offset: offset[1])
        return range(first, bisect_left(self.offsets, end, key=lambda offset: offset[0]))

    def starting_at(self, position: int) -> range:
        """The tokens from a place in the text on."""
        return range(bisect_left(self.offsets, position, key=lambda offset: offset[0]), len(self.ids))


@dataclass(frozen=True)
class Endings:
    """A kind of token that ends a turn, and where it is trained."""

    ids: frozenset[int]
    train_on: str  # all | turn | last


def chat_template(spec: FormatSpec, tokenizer: Any) -> Encode:
    """Messages with a role and a content. Loss on the text of the trained roles' turns and on the token that ends each."""
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"datasets: type: chat_template needs a fast tokenizer, which tells where in the text a token lies; "
            f"{type(tokenizer).__name__} is a slow one"
        )
    return ChatFormat(spec, tokenizer, template_of(spec, tokenizer), *_endings(spec, tokenizer)).encode


def sharegpt(spec: FormatSpec, tokenizer: Any) -> Encode:
    """chat_template on `conversations` of `from` and `value`."""
    return chat_template(
        replace(
            spec,
            field_messages=spec.field_messages or "conversations",
            message_field_role=spec.message_field_role or "from",
            message_field_content=spec.message_field_content or "value",
        ),
        tokenizer,
    )


def _endings(spec: FormatSpec, tokenizer: Any) -> tuple[Endings, Endings]:
    """The EOT and the EOS tokens. Without eot_tokens, EOS is both."""
    train_on_eos = spec.train_on_eos or "turn"
    train_on_eot = spec.train_on_eot or train_on_eos
    if tokenizer.eos_token in spec.eot_tokens and train_on_eos != train_on_eot:
        raise ConfigError(
            f"datasets: train_on_eos: {train_on_eos} and train_on_eot: {train_on_eot} speak of one token, because "
            f"eot_tokens has the EOS token {tokenizer.eos_token}; make them the same"
        )
    eos = frozenset() if tokenizer.eos_token_id is None else frozenset({int(tokenizer.eos_token_id)})
    eot = frozenset(_id_of(token, tokenizer) for token in spec.eot_tokens) or eos
    return Endings(eot, train_on_eot), Endings(eos, train_on_eos)


def _id_of(token: str, tokenizer: Any) -> int:
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1:
        raise ConfigError(f"eot_tokens: '{token}' is {len(ids)} tokens to this tokenizer, not one; add it under `tokens:`")
    return int(ids[0])


class ChatFormat:
    """A dataset entry's conversations on one tokenizer and template."""

    def __init__(self, spec: FormatSpec, tokenizer: Any, template: str, eot: Endings, eos: Endings) -> None:
        self.spec = spec
        self.tokenizer = tokenizer
        self.template = template
        self.endings = (eot, eos)
        self.special = frozenset(tokenizer.all_special_ids) | frozenset(tokenizer.get_added_vocab().values())
        self.roles = {source: role for role, sources in spec.roles.items() for source in sources} if spec.roles else ROLES
        trained = ("assistant",) if spec.roles_to_train is None else spec.roles_to_train
        self.roles_to_train = [self.roles.get(role, role) for role in trained]
        # A row is tokenized faster without what transformers does around it; the first call leaves it set as for any row.
        tokenizer("", add_special_tokens=False)
        self.backend = tokenizer.backend_tokenizer
        self.messages_field = spec.field_messages or "messages"
        self.properties = {  # what the template calls it: what the row calls it
            "role": spec.message_field_role or "role",
            "content": spec.message_field_content or "content",
            THINKING: spec.field_thinking or THINKING,
            **(spec.message_property_mappings or {}),
        }
        if not any(tokenizer.decode([i]) in template for i in eot.ids | eos.ids) and "eos_token" not in template:
            log.warning("chat_template: writes no EOS token, so the model will not learn to stop; name its own in eot_tokens")

    def encode(self, row: Row) -> SftRow:
        row = without_nulls(row)
        turns, tools = self._turns(row), self._tools(row)
        tokens = self._tokenize(self._render([turn.message for turn in turns], tools))
        places = self._places(turns, tools, tokens.text)
        trained = [i for place in places if place.trained for i in self._trained_tokens(place, tokens)]
        trained += [i for kind in self.endings for i in self._trained_endings(kind, places, tokens)]
        if not trained:
            raise RowError(
                f"`{self.messages_field}` has nothing to train: its roles are "
                f"{', '.join(turn.message['role'] for turn in turns)}; trained are {', '.join(self.roles_to_train) or 'none'}"
            )
        labels = [IGNORED] * len(tokens.ids)
        for i in trained:
            labels[i] = tokens.ids[i]
        return {"input_ids": tokens.ids, "labels": labels}

    def _is_trained(self, turn: Turn) -> bool:
        if turn.trained is not None:
            return turn.trained
        if turn.details is not None:
            return bool(turn.details)
        return self.spec.train_on_inputs or turn.message["role"] in self.roles_to_train

    # From the row to messages

    def _turns(self, row: Row) -> list[Turn]:
        messages = value_of(row, self.messages_field)
        if not isinstance(messages, list):
            raise RowError(f"`{self.messages_field}` is a {type(messages).__name__}, not a list of messages")
        if not messages:
            raise RowError(f"`{self.messages_field}` is empty")
        turns = [self._turn(message, f"{self.messages_field}[{index}]") for index, message in enumerate(messages)]
        system_field = self.spec.field_system or "system"
        if turns[0].message["role"] != "system" and system_field in row:
            system = {"role": "system", "content": optional_text_of(row, system_field)}
            turns.insert(0, Turn(system_field, system, None, None))
        if self.spec.drop_system_message and turns[0].message["role"] == "system":
            turns = turns[1:]
        if not turns:
            raise RowError(f"`{self.messages_field}` is empty but for the system message, which drop_system_message drops")
        return turns

    def _turn(self, source: Any, name: str) -> Turn:
        if not isinstance(source, Mapping):
            raise RowError(f"`{name}` is a {type(source).__name__}, not a message with a role and a content")
        message = {key: value for key, value in source.items() if key not in self.properties.values()}
        message |= {key: source[field] for key, field in self.properties.items() if field in source}
        role = message.get("role")
        if not isinstance(role, str):
            found = (
                f"has no `{self.properties['role']}`" if role is None else f"has {role!r} as its `{self.properties['role']}`"
            )
            raise RowError(f"`{name}` {found}, which must be text; its fields are {', '.join(map(str, source)) or 'none'}")
        message["role"] = self.roles.get(role, role)
        if message.get("tool_calls"):
            message["tool_calls"] = [with_parsed(call, "arguments", name) for call in message["tool_calls"]]
        elif "content" not in message and THINKING not in message:
            fields = ", ".join(map(str, source))
            raise RowError(f"`{name}` has no `{self.properties['content']}`; its fields are {fields}")
        content = message.setdefault("content", "")
        if not isinstance(content, str):
            raise RowError(f"`{self.properties['content']}` of `{name}` is a {type(content).__name__}, not text")
        return Turn(name, message, self._training(source, name), self._details(source, name, len(content)))

    def _training(self, source: Row, name: str) -> bool | None:
        field = self.spec.message_field_training
        value = source.get(field) if field else None
        if value is not None and not isinstance(value, bool):
            raise RowError(f"`{field}` of `{name}` is {value!r}, neither true nor false")
        return value

    def _details(self, source: Row, name: str, length: int) -> tuple[Detail, ...] | None:
        field = self.spec.message_field_training_detail
        value = source.get(field) if field else None
        if value is None:
            return None
        try:
            # The offsets of a detail are both of characters that belong to it.
            details = tuple(Detail(int(d["begin_offset"]), int(d["end_offset"]) + 1, bool(d["train"])) for d in value)
        except (KeyError, TypeError, ValueError) as error:
            raise RowError(
                f"`{field}` of `{name}` is no list of objects with begin_offset, end_offset and train "
                f"({type(error).__name__}: {error})"
            ) from error
        for detail in details:
            if not 0 <= detail.begin < detail.end <= length:
                raise RowError(
                    f"`{field}` of `{name}`: characters {detail.begin} to {detail.end - 1} are not in a text of {length}"
                )
        return details

    def _tools(self, row: Row) -> list[Any] | None:
        field = self.spec.field_tools or "tools"
        tools = row.get(field)
        if tools is None:
            return None
        if not isinstance(tools, list):
            raise RowError(f"`{field}` is a {type(tools).__name__}, not a list of tools")
        return [with_parsed(tool, "parameters", f"{field}[{index}]") for index, tool in enumerate(tools)] or None

    # From messages to text, and where in it a turn lies

    def _render(self, messages: Sequence[Message], tools: list[Any] | None, header: bool = False) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tools=tools, chat_template=self.template, tokenize=False, add_generation_prompt=header
                )
            )
        except Exception as error:  # a template is a program of its own, and a row may be none that it foresees
            reason = f"{type(error).__name__}: {error}"
            raise RowError(f"the chat template cannot take `{self.messages_field}` ({reason})") from error

    def _tokenize(self, text: str) -> Tokens:
        encoding = self.backend.encode(text, add_special_tokens=False)
        return Tokens(text, encoding.ids, encoding.offsets)

    def _places(self, turns: Sequence[Turn], tools: list[Any] | None, text: str) -> list[Place]:
        """Of the turns that something hangs on: those trained, or all where all endings are."""
        every_ending = any(kind.train_on == "all" for kind in self.endings)
        found = []
        for index, turn in enumerate(turns):
            trained = self._is_trained(turn)
            if trained or every_ending:
                found.append(self._place(turns, index, trained, tools, text))
        return [place for place in found if place is not None]

    def _place(self, turns: Sequence[Turn], index: int, trained: bool, tools: list[Any] | None, text: str) -> Place | None:
        """None where the template leaves the turn out and nobody trains it."""
        turn = turns[index]
        messages = [t.message for t in turns]
        mark = {key: value for key, value in turn.message.items() if key not in BESIDE_CONTENT} | {"content": MARK}
        before, found, after = self._render([*messages[:index], mark, *messages[index + 1 :]], tools).partition(MARK)
        if not found and not trained:
            return None
        if not found:
            raise RowError(f"`{turn.name}` is to be trained, but the chat template does not write it")
        start, end = self._start(messages, index, tools, text, before), len(text) - len(after)
        if start is None or start > end or not text.endswith(after):
            raise RowError(
                f"the chat template does not tell where `{turn.name}` lies in its text, because what it writes elsewhere "
                "changes with that message; use another chat_template"
            )
        if start == end and trained:
            raise RowError(f"`{self.properties['content']}` of `{turn.name}` is empty, so there is nothing to train")
        return Place(turn, start, end, trained)

    def _start(self, messages: Sequence[Message], index: int, tools: list[Any] | None, text: str, before: str) -> int | None:
        """After the generation prompt where the template has one: what follows it, be it thoughts, the model must write."""
        if index and messages[index]["role"] == "assistant":
            prompt = self._render(messages[:index], tools, header=True)
            # Where both end at the same place, it is no matter whether there is a generation prompt.
            if prompt != before and text.startswith(prompt) and prompt != self._render(messages[:index], tools):
                return len(prompt)
        return len(before) if text.startswith(before) else None

    # From a turn's place to its tokens

    def _trained_tokens(self, place: Place, tokens: Tokens) -> list[int]:
        turn = place.turn
        if turn.details is None:
            return list(tokens.within(place.begin, place.end))
        content = turn.message["content"]
        found = tokens.text.rfind(content.strip(), place.begin, place.end)  # templates may trim it
        if found < 0:
            raise RowError(f"`{turn.name}` has details of training, but the chat template does not write its text as it is")
        origin = found - (len(content) - len(content.lstrip()))
        return [i for d in turn.details if d.trained for i in tokens.within(origin + d.begin, origin + d.end)]

    def _trained_endings(self, kind: Endings, places: Sequence[Place], tokens: Tokens) -> list[int]:
        wanted = [place for place in places if place.trained or kind.train_on == "all"]
        found = [i for place in wanted if (i := self._ending(kind, place.end, tokens)) is not None]
        return found[-1:] if kind.train_on == "last" else found

    def _ending(self, kind: Endings, end: int, tokens: Tokens) -> int | None:
        """The token that ends a turn: nothing but space and special tokens may lie between the two."""
        for i in tokens.starting_at(end):
            if tokens.ids[i] in kind.ids:
                return i
            if tokens.ids[i] not in self.special and tokens.text[slice(*tokens.offsets[i])].strip():
                return None
        return None
