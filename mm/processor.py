"""From messages with media to samples, and from tokens back to text: placeholders, targets, media files.

A conversation is rendered once by the chat template (`mm.chat_template`), with a mark in the place of each medium, and
tokenised in one pass (`mm.chat_tokenizer`). Targets are found by their characters in the rendered text. Each mark
becomes the model's own tokens for its item. So any tokenizer serves, whether or not it knows images.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from foundation.errors import UserError
from mm.batch import IGNORED, Sample
from mm.chat_template import ChatTemplate, Message, choose_template
from mm.chat_tokenizer import MARK_ID, Rendering, Span, Tokens
from mm.config import ModelConfig
from mm.modalities import AUDIO, IMAGE, MODALITIES, MediaLimits, MediaSource
from mm.records import part_error, record_answer, record_caption, record_medium, record_messages
from mm.tokenizer_fit import check_vocabulary, find_stop_tokens
from shards.format import Record

BY_NAME = {modality.name: modality for modality in MODALITIES}
BY_MARK = {modality.mark: modality for modality in MODALITIES}
MARKS = re.compile("(" + "|".join(map(re.escape, BY_MARK)) + ")")

Media = dict[str, list[Any]]  # by their modality's field of `Sample`: the items in order, or the files to read
Range = tuple[int, int]  # first character and end of a target in a rendered text


class Processor:
    """Turns messages, captions and shard records into samples of one model.

    Args:
        tokenizer: the language model's own, from `transformers`.
        config: of the model; gives tile size, image token and stop tokens.
        max_tiles: tiles per picture at most.
        caption_prompt: the user's request in captioning a picture; None leaves the chat form out, so that the caption
            follows the picture directly. video_prompt: the same for clips.
        chat_template: a Jinja template in place of the tokenizer's, or the name of one of several that it has.
        max_frames: frames per clip at most.
        max_frame_tiles: tiles per frame at most; None is `max_tiles`.
        allow_control_tokens: control tokens spelled in messages count as such. By default they are text, and only
            those that the chat template writes count.
        allow_omitted_text: the chat template may leave out texts of messages, as some do with earlier thoughts. By
            default such a conversation is refused.

    Raises:
        UserError: a limit out of range, no chat template to choose, a tokenizer without a tokenizer.json, or one that
            is larger than the language model's embedding table.

    Attributes:
        stop_tokens: what ends an answer: the language model's own tokens, the tokenizer's eos, and what the chat
            template writes after an answer. `mm.tokenizer_fit.use_stop_tokens` gives them to the model.
        stop_reasons: why, by token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: ModelConfig,
        max_tiles: int | None = None,
        caption_prompt: str | None = "Describe the picture.",
        chat_template: str | None = None,
        max_frames: int = 64,
        max_frame_tiles: int | None = None,
        video_prompt: str | None = "Describe the clip.",
        allow_control_tokens: bool = False,
        allow_omitted_text: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config
        check_vocabulary(tokenizer, config)
        self.image_token_id = IMAGE.token_id(config)
        self.tile_size = config.vision_encoder.tile_size if config.vision_encoder else None
        self.context = config.language_model.context
        encoder_limit = config.vision_encoder.max_num_tiles if config.vision_encoder else 1
        self.max_tiles = encoder_limit if max_tiles is None else max_tiles
        if not 1 <= self.max_tiles <= encoder_limit:
            raise UserError(f"max_tiles is {max_tiles}; this model's image encoder takes 1 to {encoder_limit}")
        if max_frames < 1:
            raise UserError(f"max_frames is {max_frames}; it must be at least 1")
        if max_frame_tiles is not None and not 1 <= max_frame_tiles <= encoder_limit:
            raise UserError(
                f"max_frame_tiles is {max_frame_tiles}; this model's image encoder takes 1 to {encoder_limit}"
            )
        self.max_frames, self.max_frame_tiles = max_frames, max_frame_tiles
        self.caption_prompt, self.video_prompt = caption_prompt, video_prompt
        self.chat_template = choose_template(tokenizer, chat_template)
        self.allow_control_tokens, self.allow_omitted_text = allow_control_tokens, allow_omitted_text
        self._template = ChatTemplate(
            tokenizer,
            self.chat_template,
            marks=list(BY_MARK),
            image_mark=IMAGE.mark,
            image_token=tokenizer.convert_ids_to_tokens([self.image_token_id])[0],  # None where the tokenizer lacks it
            allow_control_tokens=allow_control_tokens,
            allow_omitted_text=allow_omitted_text,
        )
        self._tokenizer = self._template.tokenizer
        self.stop_reasons = find_stop_tokens(tokenizer, self._template, config.language_model.stop_tokens)
        self.stop_tokens = tuple(self.stop_reasons)

    def settings(self) -> dict[str, Any]:
        """The arguments besides tokenizer and configuration: `Processor(tokenizer, config, **settings)` is equal."""
        names = ["max_tiles", "caption_prompt", "chat_template", "max_frames", "max_frame_tiles", "video_prompt"]
        names += ["allow_control_tokens", "allow_omitted_text"]
        return {name: getattr(self, name) for name in names}

    def prompt(self, messages: list[Message]) -> Sample:
        """A conversation up to the assistant's next turn.

        Raises:
            UserError: messages of another form, an empty one, a file that cannot be read.
        """
        flat, files = self._flatten(messages)
        media = self._read(files)
        tokens = self._tokenizer.encode_prompt(self._template.render(flat, answer_follows=True))
        return self._sample(tokens, None, media)

    def text_prompt(self, text: str) -> Sample:
        """A text without the chat form, to be continued; control tokens spelled in it count as in messages."""
        _check_text(text, "the prompt")
        spans = self._tokenizer.find(text) if self.allow_control_tokens else []
        return Sample(self._bos() + self._tokenizer.encode(Rendering(text, spans)).ids.tolist())

    def example(self, messages: list[Message]) -> Sample:
        """A training sample: every assistant turn is a target, up to and with its stop token.

        Raises:
            UserError: as `prompt`, or a conversation without an assistant turn.
        """
        while messages and not _is_answer(messages[-1]):  # turns after the last answer hold no target
            messages = messages[:-1]
        if not messages:
            raise UserError("the conversation has no assistant turn to learn from")
        flat, files = self._flatten(messages)
        media = self._read(files)
        rendering = self._template.render(flat, answer_follows=False)
        targets = [self._target(flat, index, rendering) for index, turn in enumerate(flat) if _is_answer(turn)]
        return self._sample(self._tokenizer.encode(rendering), targets, media)

    def caption_prompt_for(self, source: MediaSource, kind: str = "image") -> Sample:
        """The sample that a caption of a file continues.

        Args:
            kind: modality of the source, "image" or "video".

        Raises:
            UserError: the file cannot be read.
        """
        if self._caption_request(kind) is not None:
            return self.prompt(self._caption_messages(source, kind))
        _, files = self._flatten([{"role": "user", "content": [{"type": kind, kind: source}]}])
        sample = self._sample(self._tokenizer.encode(self._caption_rendering(kind, "")), None, self._read(files))
        return Sample(self._bos() + sample.tokens, None, sample.images, sample.videos)

    def caption_example(self, source: MediaSource, caption: str, kind: str = "image") -> Sample:
        """A training sample whose target is the caption; arguments as in `caption_prompt_for`.

        Raises:
            UserError: an empty caption, one that holds a media mark, a picture or clip that cannot be read.
        """
        _check_caption(caption)
        if self._caption_request(kind) is not None:
            return self.example([*self._caption_messages(source, kind), {"role": "assistant", "content": caption}])
        sample = self.caption_prompt_for(source, kind)
        target = self._caption_tokens(kind, caption)
        labels = [IGNORED] * len(sample.tokens) + target
        return Sample(sample.tokens + target, labels, sample.images, sample.videos)

    def record_example(self, record: Record) -> Sample:
        """A training sample from a shard's record: its messages, or its picture or clip with its caption.

        Raises:
            UserError: as `example` and `caption_example`, or a sample longer than the context.
        """
        if "messages" in record.json:
            sample = self.example(record_messages(record))
        else:
            kind, source = record_medium(record)
            sample = self.caption_example(source, record_caption(record), kind)
        if len(sample.tokens) > self.context:
            raise UserError(f"the sample has {len(sample.tokens)} tokens, over the context of {self.context}")
        return sample

    def record_prompt(self, record: Record) -> tuple[Sample, str]:
        """The sample up to a record's last answer, and that answer; of a captioned record, the caption."""
        answer = record_answer(record)
        if "messages" not in record.json:
            kind, source = record_medium(record)
            return self.caption_prompt_for(source, kind), answer
        return self.prompt(record_messages(record)[:-1]), answer

    def record_answer_tokens(self, record: Record, answers: Sequence[str]) -> list[list[int]]:
        """The tokens of each answer after `record_prompt`, with its stop token, as in training. Media are not read.

        Raises:
            UserError: as `record_prompt`, or an answer that `example` or `caption_example` refuses.
        """
        if "messages" in record.json:
            messages = record_messages(record)[:-1]
        else:
            kind, source = record_medium(record)
            for answer in answers:
                _check_caption(answer)
            if self._caption_request(kind) is None:
                return [self._caption_tokens(kind, answer) for answer in answers]
            messages = self._caption_messages(source, kind)
        flat, files = self._flatten(messages)
        tokens = []
        for answer in answers:
            turn = self._flatten_message({"role": "assistant", "content": answer}, len(flat), flat, files)
            rendering = self._template.render([*flat, turn], answer_follows=False)
            start, end = self._target([*flat, turn], len(flat), rendering)
            found = self._tokenizer.encode(rendering)
            tokens.append(found.ids[(start <= found.starts) & (found.starts < end) & (found.ids != MARK_ID)].tolist())
        return tokens

    def decode(self, tokens: Sequence[int], strip: bool = True) -> str:
        """Text of an answer's tokens as they spell it, without special tokens and white space around it, if `strip`."""
        # Clean-up would take spaces out of what the model wrote, and out of what `mm.stream` has sent already.
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).strip() if strip else str(text)

    def _caption_request(self, kind: str) -> str | None:
        return self.caption_prompt if kind == "image" else self.video_prompt

    def _caption_messages(self, source: MediaSource, kind: str) -> list[Message]:
        content = [{"type": kind, kind: source}, {"type": "text", "text": self._caption_request(kind)}]
        return [{"role": "user", "content": content}]

    def _caption_rendering(self, kind: str, caption: str) -> Rendering:
        """A picture or clip and its caption without the chat form."""
        mark = BY_NAME[kind].mark
        spans = self._tokenizer.find(mark + caption) if self.allow_control_tokens else [Span(0, len(mark), mark)]
        return Rendering(mark + caption, spans)

    def _caption_tokens(self, kind: str, caption: str) -> list[int]:
        """A caption and the stop token, after the picture or clip without the chat form."""
        _check_text(caption, "the caption")
        ids = self._tokenizer.encode(self._caption_rendering(kind, caption)).ids
        return [*ids[ids != MARK_ID].tolist(), *self.stop_tokens[:1]]

    def _flatten(self, messages: list[Message]) -> tuple[list[Message], Media]:
        """Messages whose content is text with marks in the place of media, and the files of the media."""
        if not messages:
            raise UserError("there are no messages")
        files: Media = {modality.field: [] for modality in MODALITIES}
        flat: list[Message] = []
        for index, message in enumerate(messages):
            flat.append(self._flatten_message(message, index, flat, files))
        return flat, files

    def _flatten_message(self, message: Message, index: int, earlier: list[Message], files: Media) -> Message:
        """Message `index` after the flat `earlier` ones; the files that it holds are appended to `files`."""
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise UserError(f'message {index} must be {{"role": ..., "content": ...}}')
        role, content = message["role"], message["content"]
        if not isinstance(role, str) or not role.strip() or self._tokenizer.hidden_positions(role):
            raise UserError(f"message {index} has the role {role!r}; it can be a word such as user or assistant")
        if not isinstance(content, str | list):
            raise UserError(f"message {index} has {content!r} as content; it can be text or a list of parts")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = "".join(self._flatten_part(part, index, files) for part in parts)
        # Only an answer to a sound may be empty: nothing is said there.
        if not text.strip() and not (_is_answer(message) and earlier and AUDIO.mark in earlier[-1]["content"]):
            raise UserError(f"message {index} ({role}) is empty: give it text, an image, a clip or sound")
        return {"role": role, "content": text}

    def _flatten_part(self, part: Any, index: int, files: Media) -> str:
        """A part of message `index` as text; the file that it holds is appended to `files`."""
        match part:
            case {"type": "text", "text": str(text)}:
                _check_text(text, f"message {index}")
                return text
            case {"type": str(kind)} if kind in BY_NAME and part.get(kind) is not None:
                modality = BY_NAME[kind]
                if getattr(self.config, modality.part) is None:
                    raise UserError(f"message {index} holds {modality.plural}, and the model has no {modality.part}")
                files[modality.field].append(part[kind])
                return modality.mark
        raise part_error(part, f"message {index}")

    def _read(self, files: Media) -> Media:
        limits = MediaLimits(self.max_tiles, self.max_frames, self.max_frame_tiles or self.max_tiles)
        return {
            modality.field: [modality.read(file, self.config, limits) for file in files[modality.field]]
            for modality in MODALITIES
        }

    def _target(self, flat: list[Message], index: int, rendering: Rendering) -> Range:
        """The characters of answer `index` in a rendered conversation, up to and with its stop token."""
        text, spans = rendering.text, rendering.spans
        if index == 0:  # templates refuse to render no messages at all
            position = start = 0
        else:
            before = self._template.render_text(flat[:index], answer_follows=True)
            if not text.startswith(before):
                raise UserError(
                    "the chat template rewrites earlier turns when later ones follow, so targets cannot be told apart; "
                    "give another chat_template"
                )
            position = len(before)
            num_before = bisect_right(spans, position, key=lambda span: span.end)
            start = self._tokenizer.answer_start(Rendering(before, spans[:num_before]))
        is_whole = True
        for piece in self._template.pieces(flat[index]["content"]):
            found = _find(piece, rendering, position)
            if found is None:
                is_whole = False
                continue
            start = found if position == 0 else start
            position = found + len(piece)
        # Some templates write other tokens after the last turn than after an earlier one.
        is_last = index == len(flat) - 1
        after = text if is_last else self._template.render_text(flat[: index + 1], answer_follows=False)
        limit = _common_length(text, after)
        if limit < position or not is_whole:
            limit = len(text)
        stops = [
            span.end for span in spans if position <= span.start and span.end <= limit and span.name not in BY_MARK
        ]
        return start, stops[0] if stops else len(text[:limit].rstrip("\n"))

    def _sample(self, tokens: Tokens, targets: Sequence[Range] | None, media: Media) -> Sample:
        """A sample of the tokens, in which each mark becomes the tokens of the next item of its modality."""
        starts = [start for start, _ in targets or ()]  # ascending
        ends = np.array([0, *(end for _, end in targets or ())])
        is_target = tokens.starts < ends[np.searchsorted(starts, tokens.starts, side="right")]
        is_target &= (tokens.ids != MARK_ID) & (tokens.ids != self.image_token_id)
        is_target &= tokens.ids < self.config.language_model.vocab_size
        ids, labels = tokens.ids.tolist(), np.where(is_target, tokens.ids, IGNORED).tolist()
        queues = {modality.mark: iter(media[modality.field]) for modality in MODALITIES}
        marks = np.flatnonzero(tokens.ids == MARK_ID).tolist()
        pieces = [
            BY_MARK[tokens.names[place]].tokens(next(queues[tokens.names[place]]), self.config) for place in marks
        ]
        for place, piece in reversed(list(zip(marks, pieces, strict=True))):
            ids[place : place + 1] = piece
            labels[place : place + 1] = [IGNORED] * len(piece)
        if targets is None:
            return Sample(ids, None, **media)
        end = next((place + 1 for place in reversed(range(len(labels))) if labels[place] != IGNORED), 0)
        if not end:
            raise UserError(
                "the answers hold no token to learn: they are empty, and the chat template does not end them"
            )
        return Sample(ids[:end], labels[:end], **media)

    def _bos(self) -> list[int]:
        """The begin-of-text token, where the tokenizer itself puts one before a text."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tokenizer("").input_ids[:1] == [bos] else []


def _check_caption(caption: str) -> None:
    if not caption.strip():
        raise UserError("the caption is empty")
    _check_text(caption, "the caption")


def _check_text(text: str, where: str) -> None:
    if found := MARKS.search(text):
        raise UserError(f"{where} holds {found[0]}, which stands for media: leave it out")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} holds half of a surrogate pair, {text[error.start]!r}, at character {error.start}: leave it out, "
            "or write the whole character"
        ) from error


def _common_length(first: str, second: str) -> int:
    """Of the beginning that two texts share."""
    lengths = range(1, min(len(first), len(second)) + 1)
    return bisect_left(lengths, True, key=lambda length: first[:length] != second[:length])


def _find(piece: str, rendering: Rendering, position: int) -> int | None:
    """Where a text begins in a rendered one, from `position` on and not inside a control token of the template."""
    while (found := rendering.text.find(piece, position)) >= 0:
        ends = (found, found + len(piece))
        if not any(span.start < end < span.end for span in rendering.spans for end in ends):
            return found
        position = found + 1
    return None


def _is_answer(message: Message) -> bool:
    return isinstance(message, dict) and message.get("role") == "assistant"
