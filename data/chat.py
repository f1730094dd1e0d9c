"""Chat templates of Hugging Face checkpoints: messages to text, and which of it is learned.

A template is a jinja2 program that came with a checkpoint, so it runs in jinja2's immutable
sandbox, in the environment that `transformers` gives it. There is no template to fall back on: a
model that is trained on another format than its own forgets the one it knows.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import ext, nodes, sandbox
from jinja2.parser import Parser

from data.written import Piece, Written

# Which assistant turns of a conversation are learned.
TURNS = ("all", "last")
# What a template sees under these names is not for `variables` to say.
RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token")
# The tokens, besides these two of RESERVED, that `transformers` hands to every template.
OTHER_TOKENS = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

Message = Mapping[str, Any]


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and the tokens it writes; holds its text, so it may be pickled.

    Args:
        source: the jinja2 text.
        bos_token: what the template reads as `bos_token`; None leaves it undefined.
        eos_token: likewise `eos_token`.
        variables: whatever else the template reads, such as {"enable_thinking": False}.
        turns: "all" learns every assistant turn of a conversation, "last" the last one alone, for
            templates that write earlier turns differently once there are later ones.
        now: the clock of templates that write the date; None reads the real one, so that the text
            depends on the day it is made.
        origin: where the template was read; used in errors.

    Raises:
        ValueError: a syntax error (with its line), an unknown `turns`, or a reserved variable.

    Example:
        >>> source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
        >>> source += "{% if add_generation_prompt %}<assistant>{% endif %}"
        >>> turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
        >>> [piece.text for piece in ChatTemplate(source).written(turns).pieces]
        ['<user>2 + 2?</s><assistant>', '4</s>']
    """

    source: str
    bos_token: str | None = None
    eos_token: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    turns: str = "all"
    now: datetime.datetime | None = None
    origin: str = "chat template"

    def __post_init__(self) -> None:
        if self.turns not in TURNS:
            raise ValueError(f"turns={self.turns!r} is unknown; choose from {', '.join(TURNS)}")
        taken = sorted(set(self.variables) & set(RESERVED))
        if taken:
            raise ValueError(
                f"variables has {', '.join(taken)}, which the template gets from elsewhere; "
                "the tokens are arguments of their own"
            )
        try:
            _compile(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"{self.origin}:{error.lineno}: {error.message}; correct the template"
            ) from error
        except (jinja2.TemplateError, SyntaxError, RecursionError) as error:
            raise ValueError(f"{self.origin}: not a template ({error}); correct it") from error

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[Any] | None = None,
    ) -> str:
        """The text of a conversation, equal to that of `apply_chat_template` in `transformers`.

        Args:
            messages: {"role": ..., "content": ...}, at least one; other keys reach the template
                too, keys that hold None do not.
            add_generation_prompt: end with what comes before an answer of the assistant.
            tools: JSON schemas of the functions the model may call.

        Raises:
            ValueError: no message, or the template refuses these.
        """
        return self._render(messages, add_generation_prompt, tools, "")

    def written(
        self, messages: Sequence[Message], origin: str = "", tools: Sequence[Any] | None = None
    ) -> Written:
        """The text of a conversation with its assistant turns marked as learned.

        Before answer k comes what the template writes for the messages before k and a generation
        prompt; the answer is what the messages up to k add to it, so it ends as the template ends
        a turn, and a model learns to stop there.

        Args:
            messages: as for `render`; an assistant's among them, and not as the first.
            origin: where they were read; used in errors.
            tools: as for `render`.

        Returns:
            Pieces that together are `render(messages)`. Its reference is the content of the last
            message where that is the assistant's.

        Raises:
            ValueError: no answer, an answer to nothing, messages that the template refuses, or a
                template whose text of the first messages is not the start of the whole text,
                as in Qwen3's, which drops the thoughts of earlier turns.
        """
        where = f"{origin}: " if origin else ""
        answers = [k for k, message in enumerate(messages) if message.get("role") == "assistant"]
        if not answers:
            raise ValueError(f"{where}no message of role 'assistant'; nothing would be learned")
        answers = answers if self.turns == "all" else answers[-1:]
        if answers[0] == 0:
            raise ValueError(
                f"{where}the first message is the assistant's, an answer to nothing; remove it or "
                "put a message of the user or the system before it"
            )
        whole = self._render(messages, False, tools, where)
        pieces, end = [], 0
        for k in answers:
            prompt = self._render(messages[:k], True, tools, where)
            after = self._render(messages[: k + 1], False, tools, where)
            self._check_prefixes(where, k, end, (prompt, after, whole))
            pieces.append(Piece(whole[end : len(prompt)], False))
            pieces.append(Piece(whole[len(prompt) : len(after)]))
            end = len(after)
        content = messages[-1].get("content") if answers[-1] == len(messages) - 1 else None
        if end < len(whole):
            pieces.append(Piece(whole[end:], False))
            content = None
        references = (content,) if isinstance(content, str) and content.strip() else ()
        return Written(tuple(pieces), references, origin, marked=True)

    def _render(
        self, messages: Sequence[Message], generate: bool, tools: Sequence[Any] | None, where: str
    ) -> str:
        if not messages:
            raise ValueError(f"{where}no messages; give at least one")
        now = self.now
        tokens = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        names = {
            "strftime_now": lambda form: (now or datetime.datetime.now()).strftime(form),
            **self.variables,
            **{name: token for name, token in tokens.items() if token is not None},
            "messages": [{k: v for k, v in m.items() if v is not None} for m in messages],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": generate,
        }
        try:
            return _compile(self.source).render(names)
        except Exception as error:  # what a template calls may raise anything
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise ValueError(
                f"{where}{self.origin} refuses the messages of roles {roles}: {error}; give "
                "messages in the order and with the keys that it asks for"
            ) from error

    def _check_prefixes(self, where: str, k: int, end: int, texts: tuple[str, str, str]) -> None:
        """Raise unless `texts` (before answer k, with it, all) each start the next one."""
        prompt, after, whole = texts
        remedy = (
            "Pass a template that leaves earlier turns as they are, or turns='last' to learn the "
            "last answer alone"
        )
        if not after.startswith(prompt):
            what, one, two = "with its generation prompt before message", prompt, after
            remedy = (
                "Pass the variables= that make its prompt what its answers begin with (such as "
                "enable_thinking), or another template"
            )
        elif not whole.startswith(after):
            what, one, two = "up to message", after, whole
        elif len(prompt) < end or len(after) == len(prompt):
            raise ValueError(f"{where}{self.origin} writes nothing for the answer {k}. {remedy}")
        else:
            return
        at = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), len(two))
        raise ValueError(
            f"{where}{self.origin} is not consistent: {what} {k} it writes "
            f"{one[at : at + 30]!r} after {one[max(at - 30, 0) : at]!r}, where the longer "
            f"conversation has {two[at : at + 30]!r}; so what is learned would not be what is "
            f"generated. {remedy}"
        )


def load(
    folder: str | Path, *, turns: str = "all", variables: Mapping[str, Any] | None = None
) -> ChatTemplate:
    """Read the chat template of a checkpoint folder.

    Args:
        folder: holds chat_template.jinja, or tokenizer_config.json with "chat_template": a text,
            or a list of {"name", "template"} whose "default" is taken. The first wins over the
            second. The tokens are those of tokenizer_config.json, or of special_tokens_map.json
            beside an older one.
        turns: see `ChatTemplate`.
        variables: likewise.

    Raises:
        ValueError: neither file has a template, no template is named "default", a file is
            malformed, or see `ChatTemplate`.

    Example:
        template = load("checkpoints/qwen2.5-0.5b-instruct")
    """
    folder = Path(folder)
    file = folder / "tokenizer_config.json"
    settings = _read_object(file)
    beside = folder / "chat_template.jinja"
    if beside.is_file():
        source, origin = _read_text(beside), str(beside)
    else:
        source, origin = _default(settings.get("chat_template"), folder), str(file)
    if "added_tokens_decoder" not in settings:
        # transformers reads this file, which newer checkpoints do not have, under this condition.
        settings |= _read_object(folder / "special_tokens_map.json")
    others = {name: _token(settings, name, file) for name in OTHER_TOKENS}
    known = {name: token for name, token in others.items() if token is not None}
    return ChatTemplate(
        source,
        bos_token=_token(settings, "bos_token", file),
        eos_token=_token(settings, "eos_token", file),
        variables={**known, **(variables or {})},
        turns=turns,
        origin=origin,
    )


class _Generation(ext.Extension):
    """`{% generation %}`, which some templates put around answers; its body is written as it is."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

    def _write(self, caller: Any) -> str:
        return caller()


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )
    # jinja2's own filter escapes what would be markup in a web page.
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(source)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _default(found: Any, folder: Path) -> str:
    """The template of tokenizer_config.json: a text, or the one named "default" of a list."""
    file = folder / "tokenizer_config.json"
    if isinstance(found, str):
        return found
    if found is None:
        raise ValueError(
            f"{folder} has no chat template: no chat_template.jinja, and no 'chat_template' in "
            "tokenizer_config.json (base models have none). Pass the folder of the model's chat "
            "variant, or data.chat.ChatTemplate(source=..., eos_token=...) with a template of your "
            "own"
        )
    entries = found if isinstance(found, list) else [found]
    if not all(
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("template"), str)
        for entry in entries
    ):
        raise ValueError(
            f"{file}: 'chat_template' is neither a text nor a list of "
            "{'name': text, 'template': text}; correct it"
        )
    named = {entry["name"]: entry["template"] for entry in entries}
    if "default" not in named:
        raise ValueError(
            f"{file}: no chat template is named 'default'; there are "
            f"{', '.join(map(repr, named)) or 'none'}. Put the one to use into chat_template.jinja"
        )
    return named["default"]


def _token(settings: dict[str, Any], name: str, file: Path) -> str | None:
    value = settings.get(name)
    # Older files describe a token by an object.
    text = value.get("content") if isinstance(value, dict) else value
    if text is None and not isinstance(value, dict) or isinstance(text, str):
        return text
    raise ValueError(f"{file}: {name!r} is {value!r}; give a text or {{'content': text}}")


def _read_object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(_read_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{error.lineno}: malformed JSON ({error.msg})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: expected an object, found {str(found)[:60]!r}")
    return found


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: byte {error.start} is not utf-8; save the file as it") from error
