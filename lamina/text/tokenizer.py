"""Text to token ids and back: the tokenizer and chat template of a model's folder."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as _Tokenizer

from lamina.errors import InvalidRequest, ModelFileError, cut
from lamina.text.chat_template import ChatTemplate
from lamina.text.messages import check_messages, check_text

_MAX_JSON_BYTES = 1 << 28
_MAX_ID = 1 << 22
_TEMPLATE_FILE = "chat_template.jinja"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_CONTROL = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)
"""How tokens of turns are spelled, some of which are not marked as special, as DeepSeek's."""
_SPELLED = 32  # characters by which a special token is known in a text
_SEAM = "\udfff"  # half of a surrogate pair, which no checked text has
_PARTS = 256  # parts of a text that are encoded at a time
_PIECE = 1 << 16  # characters that are searched at a time
_SHORT = 4096  # tokens that are decoded in a millisecond
_LEAD = "\n"  # no token has it beside other characters, in vocabularies that spell a space as U+2581


class Tokenizer:
    """The tokenizer of the model in a folder. Safe to use from several threads.

    Raises ModelFileError where the folder's tokenizer files are missing or malformed.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        file = folder / "tokenizer.json"
        content = _read(file)
        with _malformed(str(file)):
            self._tokenizer: Any = _Tokenizer.from_buffer(content)
        self._tokenizer.no_truncation()  # a training script's settings may be in the file
        self._tokenizer.no_padding()
        config = read_json(folder / "tokenizer_config.json")
        self._special = {name: _token_text(config.get(name)) for name in _SPECIAL_TOKENS}
        self._template, self._tool_template = _find_templates(folder, config)
        self.eos_ids: tuple[int, ...] = self._find_eos_ids(folder)
        """The tokens that end a text, from generation_config.json, else config.json, else the tokenizer itself."""
        added = self._tokenizer.get_added_tokens_decoder()
        self.added_tokens: dict[str, int] = {str(token.content): index for index, token in added.items()}
        """The ids of the tokens that are taken as a whole wherever they are written, special or not."""
        self.special_ids: frozenset[int] = frozenset(index for index, token in added.items() if token.special)
        """The tokens that `decode` leaves out by default."""
        self.special_tokens: frozenset[str] = frozenset(filter(None, map(self.token, self.special_ids)))
        """How the vocabulary spells them."""
        controls = [text for text in self.added_tokens if text in self.special_tokens or _CONTROL.fullmatch(text)]
        # A user may type a switch, as GLM's /nothink.
        spelled = [text[:_SPELLED] for text in controls if len(text) > 1 and not text.startswith("/")]
        self._controls = _beginnings(spelled)

    @property
    def vocab_size(self) -> int:
        """How many tokens there are. The model's embedding may have more rows."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def vocabulary(self) -> dict[str, int]:
        """The id of each token by its own spelling, added tokens included."""
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    @property
    def has_chat_template(self) -> bool:
        """Whether the model can be given messages."""
        return self._template is not None

    @property
    def chat_template(self) -> str:
        """The source of the template, of that for tools where there are two; "" where there is none."""
        return "" if self._tool_template is None else self._tool_template.source

    @property
    def template_knows_tools(self) -> bool:
        """Whether the chat template shows tools to the model itself."""
        return self.template_uses("tools")

    def template_uses(self, variable: str) -> bool:
        """Whether the chat template's code has this name; else a variable of that name has no effect."""
        return self._tool_template is not None and self._tool_template.uses(variable)

    def encode(self, text: str | Sequence[str], add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`, by default with the special tokens that the model expects around it.

        Special tokens written out in the text are taken as such, but where a text comes in parts (`render_parts`), only
        those within one part. Raises InvalidRequest where the text is no valid Unicode, naming the position;
        ModelFileError where the tokenizer's rules fail on it.
        """
        parts = [text] if isinstance(text, str) else list(text)
        for part in parts:
            check_text("the prompt", part)
        ids: list[int] = []
        # Unlike `encode`, which takes seconds for a megabyte of digits, this lets other threads run meanwhile.
        encode, add = self._tokenizer.encode_batch_fast, add_special_tokens and len(parts) == 1
        with _malformed("the model's tokenizer.json"):
            lead = self._lead() if len(parts) > 1 else []
            if lead:
                parts[1:] = [_LEAD + part for part in parts[1:]]
            for begin in range(0, len(parts), _PARTS):
                for index, encoding in enumerate(encode(parts[begin : begin + _PARTS], add_special_tokens=add), begin):
                    ids += encoding.ids[len(lead) if index else 0 :]
            return self._surrounded(ids) if add_special_tokens and not add else ids

    def _lead(self) -> list[int]:
        """The ids of _LEAD where the tokenizer puts a space before each text: a part that begins with it gets the
        space there, and its own ids are those behind. Else none."""
        letter, lead = (self._tokenizer.encode(text, add_special_tokens=False) for text in ("a", _LEAD))
        return list(lead.ids) if letter.tokens and letter.tokens[0].startswith("\u2581") else []

    def _surrounded(self, ids: list[int]) -> list[int]:
        """Ids with the special tokens around them."""
        letter = self._tokenizer.encode("a")
        is_added = letter.special_tokens_mask
        begin, end = is_added.index(0), len(is_added) - is_added[::-1].index(0)
        return [*letter.ids[:begin], *ids, *letter.ids[end:]]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Bytes that form no character become U+FFFD; ids outside the vocabulary become nothing."""
        if len(ids) <= _SHORT:
            return str(self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))
        # Unlike `decode`, which takes most of a second for a million tokens, this lets other threads run meanwhile.
        return str(self._tokenizer.decode_batch([ids], skip_special_tokens=skip_special_tokens)[0])

    def to_json(self) -> str:
        """The tokenizer as the text of a tokenizer.json. Raises ModelFileError where ids are so large that counting up
        to the largest, as the library does, would take hours."""
        if (largest := max(self._tokenizer.get_vocab().values(), default=0)) >= _MAX_ID:
            raise ModelFileError(
                f"the model's tokenizer.json has a token of id {largest}; allowed are ids below {_MAX_ID}"
            )
        return str(self._tokenizer.to_str())

    def knows(self, token_id: int) -> bool:
        """Whether `token_id` is in the vocabulary."""
        return self._tokenizer.id_to_token(token_id) is not None

    def token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of a token; None outside of the vocabulary."""
        token = self._tokenizer.id_to_token(token_id)
        return None if token is None else str(token)

    def render_parts(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """`messages` as text in the form that the model was trained on, in parts for `encode`. Where messages, tools or
        variables spell a special token, a part ends after its first character, so that only the template's own become
        tokens: else `<|im_end|>` in a message would end it, and what follows could be of another role.

        At the text's end the assistant's turn begins (`add_generation_prompt`), or the last message is left open
        (`continue_final_message`). `template_kwargs` are further variables of the template, which JSON can hold.

        A message is {"role": one of ROLES, "content": text, or a list of {"type": "text", "text": text}}, perhaps with
        `name`; the assistant's with `tool_calls` (and then without content), `reasoning_content`, or `refusal`, whose
        text counts as content, a tool's with `tool_call_id`. Raises InvalidRequest for other messages, or where the
        template refuses these; ModelFileError where the model has no template or it misbehaves.
        """
        checked = check_messages(messages)
        if continue_final_message and (add_generation_prompt or not checked[-1]["content"].strip()):
            raise InvalidRequest(
                "continue_final_message is True; it needs add_generation_prompt False and text in the last message"
            )
        template = self._tool_template if tools else self._template
        if template is None:
            raise ModelFileError("the model has no chat template; give it a prompt instead of messages")
        special = {name: text for name, text in self._special.items() if text is not None}
        variables: dict[str, Any] = special | self._with_seams(dict(template_kwargs or {}))
        variables |= {"add_generation_prompt": add_generation_prompt, "documents": None}
        variables["tools"] = None if tools is None else self._with_seams(tools)
        written = [self._with_seams(_in_its_words(message, template)) for message in checked]
        text = template.render(written, **variables)
        if continue_final_message:
            content = written[-1]["content"]
            content = content if content in text else content.strip()
            if content not in text:
                raise InvalidRequest(
                    "continue_final_message is True, but the chat template does not show the last message"
                )
            text = text[: text.rindex(content) + len(content)]
        return text.split(_SEAM)

    def _with_seams(self, value: Any) -> Any:
        """A value that JSON can hold, with a seam within each special token that its texts spell."""
        if isinstance(value, str):
            return value if self._controls is None else _seamed(value, self._controls)
        if isinstance(value, Mapping):
            return {self._with_seams(key): self._with_seams(item) for key, item in value.items()}
        return [self._with_seams(item) for item in value] if isinstance(value, list | tuple) else value

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The ids of `render_parts`. No special tokens are added: templates write them themselves."""
        parts = self.render_parts(messages, add_generation_prompt, template_kwargs=template_kwargs)
        return self.encode(parts, add_special_tokens=False)

    def close(self) -> None:
        """End the processes that render the chat templates, if some were started."""
        for template in (self._template, self._tool_template):
            if template is not None:
                template.close()

    def _find_eos_ids(self, folder: Path) -> tuple[int, ...]:
        for name in ("generation_config.json", "config.json"):
            ids = read_json(folder / name).get("eos_token_id")
            if ids is not None:
                listed = ids if isinstance(ids, list) else [ids]
                if any(type(index) is not int or not 0 <= index < _MAX_ID for index in listed):
                    allowed = f"ids from 0 to {_MAX_ID - 1}"
                    raise ModelFileError(f"{folder / name}: eos_token_id is {cut(ids)}; allowed are {allowed}")
                return tuple(listed)
        eos = self._special["eos_token"]
        index = None if eos is None else self._tokenizer.token_to_id(eos)
        return () if index is None else (index,)


class StreamDecoder:
    """Decodes one token after another. The pieces together are the text that `decode` makes of all ids.

    A piece never ends within a character: U+FFFD at the end of the text may be the beginning of one, and waits for
    the rest. Each token costs the decoding of a short window: the waiting tokens, and some tokens before them as
    context, because the first token of a text may decode in another way than the same token later. (Vocabularies that
    spell unknown characters in byte tokens decode a run of them as a whole. Where a later byte makes a run invalid,
    text that was already returned for it is not taken back.)
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = []
        self._returned = 0  # characters of the window's text that were returned
        self._waiting = 0  # tokens since the text last ended with a whole character

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, often none."""
        if self._shows_nothing(token_id):
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        self._waiting = self._waiting + 1 if text.endswith(_REPLACEMENT) else 0
        if 0 < self._waiting < _MOST_BYTES:
            return ""
        # After more tokens than a character has bytes, some are invalid, but the last of them may still begin one.
        piece = self._take(text, len(text) - _open_end(text))
        if len(self._window) >= _WINDOW:
            self._shorten(text)
        return piece

    def finish(self) -> str:
        """The text of the tokens that still wait; U+FFFD stands for bytes that never became a character."""
        text = self._decode(self._window)
        return self._take(text, len(text))

    def _take(self, text: str, end: int) -> str:
        begin, self._returned = self._returned, max(self._returned, end)
        return text[begin:end]

    def _shorten(self, text: str) -> None:
        """Drop tokens at the window's start, where the rest decodes to the end of the same text.

        Such a cut is between two characters. Within four tokens there is one, as no character has more bytes. At
        least one returned character stays, because a decoder may treat the start of a text in its own way.
        """
        newest = len(self._window) - _CONTEXT
        for begin in range(newest, newest - _MOST_BYTES, -1):
            tail = self._decode(self._window[begin:])
            returned = self._returned - (len(text) - len(tail))
            if returned > 0 and text.endswith(tail):
                del self._window[:begin]
                self._returned = returned
                return
        if len(self._window) >= _LONGEST:
            del self._window[:newest]
            tail = self._decode(self._window)
            self._returned = len(tail) - _open_end(tail)

    def _shows_nothing(self, token_id: int) -> bool:
        is_hidden = self._skip_special_tokens and token_id in self._tokenizer.special_ids
        return is_hidden or not self._tokenizer.knows(token_id)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, self._skip_special_tokens)


_REPLACEMENT = "\ufffd"
_MOST_BYTES = 4  # of a character in UTF-8
_CONTEXT = 10  # tokens kept at least: four characters, the last three of which may wait
_WINDOW = 24  # tokens at which the window is shortened
_LONGEST = 96  # tokens at which it is shortened anywhere, which only an invalid run of byte tokens can reach


def _open_end(text: str) -> int:
    """How many characters at the end of `text` may be the bytes that begin another one: 3 at most."""
    return min(_MOST_BYTES - 1, len(text) - len(text.rstrip(_REPLACEMENT)))


def _seamed(text: str, controls: re.Pattern[str]) -> str:
    """The text with a seam behind the first character of each control, which is one character of a match. Piece by
    piece: `re` keeps the interpreter from other threads, for 0.2 s where four million characters begin none."""
    cuts = [0]
    for begin in range(0, len(text), _PIECE):
        end = begin + _PIECE
        cuts += [match.end() for match in controls.finditer(text, begin, end + _SPELLED) if match.start() < end]
    cuts.append(len(text))
    return _SEAM.join(text[begin:end] for begin, end in pairwise(cuts))


def _beginnings(words: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern for the first character of each of the words; None without words."""
    grouped = groupby(sorted(words), key=lambda word: word[0])
    branches = [f"{re.escape(first)}(?={_tree([word[1:] for word in group])})" for first, group in grouped]
    return re.compile("|".join(branches)) if branches else None


def _tree(words: Sequence[str]) -> str:
    """A pattern for one of the words, which are sorted, or for a part of one that ends the text: what follows could
    complete it. Words that begin alike share that, so that a thousand reserved tokens cost a text no more than one."""
    if "" in words:
        return ""
    grouped = groupby(words, key=lambda word: word[0])
    return rf"(?:\Z|{'|'.join(re.escape(first) + _tree([word[1:] for word in group]) for first, group in grouped)})"


def _in_its_words(message: dict[str, Any], template: ChatTemplate) -> dict[str, Any]:
    """A checked message with the names that the template knows for a developer and for reasoning."""
    if message["role"] == "developer" and not template.mentions("developer"):
        message["role"] = "system"
    if "reasoning_content" in message and template.mentions("thinking"):  # gpt-oss
        message["thinking"] = message["reasoning_content"]
    return message


def _find_templates(folder: Path, config: Mapping[str, Any]) -> tuple[ChatTemplate | None, ChatTemplate | None]:
    """The template, in its own file, which newer checkpoints have, else in tokenizer_config.json; and the one for
    conversations with tools, which is mostly the same."""
    file = folder / _TEMPLATE_FILE
    source = _read(file).decode("utf-8", "replace") if file.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source, for_tools = named.get("default"), named.get("tool_use")
        if isinstance(source, str) and isinstance(for_tools, str):
            return ChatTemplate(source), ChatTemplate(for_tools)
    template = ChatTemplate(source) if isinstance(source, str) else None
    return template, template


def _token_text(token: object) -> str | None:
    """A special token of tokenizer_config.json: its text, or an object that has it as `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


@contextlib.contextmanager
def _malformed(what: str) -> Iterator[None]:
    """Errors of the library, which has no class for them, and its panics, which are no Exception, as ModelFileError."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelFileError(f"{what} is malformed: {error}") from error


def _read(file: Path) -> bytes:
    try:
        if not file.is_file():
            raise ModelFileError(f"{file} is no file" if file.exists() else f"there is no {file}")
        if (size := file.stat().st_size) > _MAX_JSON_BYTES:
            raise ModelFileError(f"{file} has {size} bytes; allowed are {_MAX_JSON_BYTES}")
        return file.read_bytes()
    except OSError as error:
        raise ModelFileError(f"cannot read {file}: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in `file`, or an empty one where there is no file."""
    if not file.exists():
        return {}
    try:
        value = json.loads(_read(file))
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{file} is malformed: {error}") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{file} holds a {type(value).__name__}; expected an object")
    return value
