"""Conversations as a chat template writes them, and which control tokens in the result are the template's own."""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from itertools import product
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from foundation.errors import UserError
from mm.chat_tokenizer import ChatTokenizer, Rendering, Span, unguessable

logger = logging.getLogger(__name__)

Message = dict[str, Any]  # of the Hugging Face chat form: {"role": ..., "content": text or a list of parts}

# For language models that come without a chat template.
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}{% if message.role == 'assistant' %}"
    "{{ message.content }}{{ eos_token }}{{ '\\n' }}{% else %}{{ message.content + '\\n' }}{% endif %}{% endfor %}"
)


def choose_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> str:
    """The Jinja text to use: the one given, or the tokenizer's of that name, or its default, or a plain one.

    Raises:
        UserError: the tokenizer has several templates, none of them called "default", and no name is given.
    """
    named = tokenizer.chat_template
    if not isinstance(named, dict):
        return template or named or PLAIN_TEMPLATE
    if template:
        return named.get(template, template)
    if "default" in named or len(named) == 1:
        return named.get("default") or next(iter(named.values()))
    raise UserError(
        f"the tokenizer has the chat templates {', '.join(sorted(named)) or 'none'}, and none is called default; give "
        "chat_template one of these names"
    )


class ChatTemplate:
    """Renders messages whose content is text with marks in the place of media.

    Args:
        tokenizer: a fast one.
        text: the Jinja template.
        marks: what stands for media in the messages.
        image_mark: the one of images. image_token: the text of the tokenizer's own image token, which a template that
            knows images writes for each image part; None without one.
        allow_control_tokens: control tokens spelled in messages are control tokens too.
        allow_omitted_text: the template may leave out texts.

    Raises:
        UserError: the tokenizer is not a fast one.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        marks: Sequence[str],
        image_mark: str,
        image_token: str | None,
        allow_control_tokens: bool,
        allow_omitted_text: bool,
    ) -> None:
        self.text, self._hf_tokenizer = text, tokenizer
        self._image_mark, self._marks = image_mark, re.compile("|".join(map(re.escape, marks)))
        self._image_token = image_token if "'image'" in text or '"image"' in text else None
        self._allow_control_tokens, self._allow_omitted_text = allow_control_tokens, allow_omitted_text
        self._reported_omission = False
        self._hider = unguessable()  # stands in a text's control tokens while they are looked for
        self._takes_parts, example = self._probe()
        tokens = {mark: self._image_token if mark == image_mark else None for mark in marks}
        self.tokenizer = ChatTokenizer(tokenizer, self._control_tokens(text + example), tokens)

    def render(self, messages: list[Message], answer_follows: bool) -> Rendering:
        """Messages as the template writes them.

        Args:
            messages: their content is text with marks.
            answer_follows: the text ends where the assistant's answer begins.

        Raises:
            UserError: the template refuses the messages, leaves out or adds media, leaves out text, or acts on a
                control token that a message spells.
        """
        text = self.render_text(messages, answer_follows)
        self._check_texts(messages, text)
        hidden = [] if self._allow_control_tokens else self._hidden_positions(messages, text, answer_follows)
        spans = self.tokenizer.find(text, hidden)
        if self._image_token is not None:
            spans = [
                Span(span.start, span.end, self._image_mark) if span.name == self._image_token else span
                for span in spans
            ]
        places = Counter(span.name for span in spans)
        expected = Counter(mark for message in messages for mark in self._marks.findall(message["content"]))
        for mark in {*expected, *(name for name in places if self._marks.fullmatch(name))}:
            if places[mark] != expected[mark]:
                raise UserError(
                    f"the chat template gives {places[mark]} places for {expected[mark]} items marked {mark}; give "
                    "another chat_template"
                )
        return Rendering(text, spans)

    def render_text(self, messages: list[Message], answer_follows: bool) -> str:
        """As `render`, the text alone, unchecked."""
        shaped = [
            {**message, "content": self._shape(message["content"], self._takes_parts.get(message["role"]))}
            for message in messages
        ]
        try:
            return self._apply(shaped, answer_follows)
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template refuses these messages: {error}") from error
        except Exception as error:  # a template computes with what it gets, and can fail in any way
            raise UserError(f"the chat template fails on these messages: {type(error).__name__}: {error}") from error

    def _apply(self, messages: list[Message], answer_follows: bool) -> str:
        return str(
            self._hf_tokenizer.apply_chat_template(
                messages, chat_template=self.text, tokenize=False, add_generation_prompt=answer_follows
            )
        )

    def _probe(self) -> tuple[dict[str, bool], str]:
        """Which roles' content the template renders as a list of parts and not as a string; an example of its text."""
        probes = {"system": unguessable(), "user": unguessable(), "assistant": unguessable()}

        def rendered(roles: Sequence[str], in_parts: dict[str, bool]) -> str | None:
            messages = [
                {"role": role, "content": [{"type": "text", "text": probes[role]}] if in_parts[role] else probes[role]}
                for role in roles
            ]
            try:
                text = self._apply(messages, answer_follows=False)
            except Exception:  # templates refuse other forms and roles in any way
                return None
            return text if all(probes[role] in text for role in roles) else None

        for forms in product((False, True), repeat=2):
            in_parts = dict(zip(("user", "assistant"), forms, strict=True))
            text = rendered(["user", "assistant"], in_parts)
            if text is None:
                continue
            for form in (in_parts["user"], not in_parts["user"]):
                in_parts["system"] = form
                if (with_system := rendered(["system", "user", "assistant"], in_parts)) is not None:
                    return in_parts, text + with_system
            in_parts["system"] = in_parts["user"]
            return in_parts, text
        return {}, ""  # strings, and what is wrong shows in the messages

    def _control_tokens(self, template: str) -> set[str]:
        """Special tokens, and other added tokens that the template itself writes, such as Qwen's "<think>"."""
        added = self._hf_tokenizer.added_tokens_decoder.values()
        written = {token.content for token in added if token.content in template and not token.content.isspace()}
        images = {self._image_token} if self._image_token is not None else set()
        return {token.content for token in added if token.special and token.content} | written - {""} | images

    def _shape(self, content: str, in_parts: bool | None) -> str | list[dict[str, str]]:
        """Text with marks in the form that the template takes."""
        if self._image_token is None or self._image_mark not in content:
            return [{"type": "text", "text": content}] if in_parts else content
        first, *rest = content.split(self._image_mark)
        parts = [{"type": "text", "text": first}]
        for text in rest:
            parts += [{"type": "image"}, {"type": "text", "text": text}]
        return [part for part in parts if part.get("text") != ""]

    def _hidden_positions(self, messages: list[Message], text: str, answer_follows: bool) -> list[int]:
        """Positions in the rendered text inside of control tokens that messages spell."""
        hiding = [{**message, "content": self._hide(message["content"])} for message in messages]
        changed = [index for index, message in enumerate(hiding) if message != messages[index]]
        if not changed:
            return []
        pieces = self.render_text(hiding, answer_follows).split(self._hider)
        if "".join(pieces) != text:
            raise UserError(
                f"message {changed[0]} spells a control token, and the chat template acts on it: leave it out, or set "
                "allow_control_tokens"
            )
        positions, position = [], 0
        for piece in pieces[:-1]:
            position += len(piece)
            positions.append(position)
        return positions

    def _hide(self, content: str) -> str:
        hidden, end = "", 0
        for match in [*self._marks.finditer(content), None]:
            piece = content[end : match.start()] if match else content[end:]
            start = 0
            for position in self.tokenizer.hidden_positions(piece):
                hidden += piece[start:position] + self._hider
                start = position
            hidden += piece[start:] + (match[0] if match else "")
            end = match.end() if match else end
        return hidden

    def _check_texts(self, messages: list[Message], text: str) -> None:
        """Each text of the messages is in the rendered text, white space around it aside."""
        pieces = Counter(piece for message in messages for piece in self.pieces(message["content"]))
        missing = next((piece for piece, count in pieces.items() if text.count(piece) < count), None)
        if missing is None:
            return
        start = missing if len(missing) <= 60 else f"{missing[:57]}..."
        if not self._allow_omitted_text:
            raise UserError(
                f"the chat template leaves out the text {start!r}: give another chat_template, or, if it leaves it out "
                "on purpose, set allow_omitted_text"
            )
        if not self._reported_omission:
            logger.warning("the chat template leaves out texts of messages, as allowed; the first is %r", start)
            self._reported_omission = True

    def pieces(self, content: str) -> list[str]:
        """The texts between the marks of a message's content, stripped, without empty ones."""
        return [piece for text in self._marks.split(content) if (piece := text.strip())]
