"""From messages with media to samples, and from tokens back to text: chat template, placeholders, media files.

Media stand in the rendered text as marks. The text around the marks is tokenised piece by piece, and each mark becomes
the model's own tokens for its item. So any tokenizer serves, whether or not it knows images.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from foundation.errors import UserError
from mm.batch import IGNORED, Sample
from mm.config import ModelConfig
from mm.modalities import AUDIO, IMAGE, MODALITIES, MediaLimits, MediaSource
from mm.records import part_error, record_answer, record_caption, record_medium, record_messages
from shards.format import Record

BY_NAME = {modality.name: modality for modality in MODALITIES}
BY_MARK = {modality.mark: modality for modality in MODALITIES}
MARKS = re.compile("(" + "|".join(map(re.escape, BY_MARK)) + ")")

Message = dict[str, Any]  # of the Hugging Face chat form: {"role": ..., "content": text or a list of parts}
Media = dict[str, list[Any]]  # the items of messages in order, by their modality's field of `Sample`
Queues = dict[str, Iterator[Any]]  # by mark, the items whose marks have not been tokenised yet

# For language models that come without a chat template.
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}{% if message.role == 'assistant' %}"
    "{{ message.content }}{{ eos_token }}{{ '\\n' }}{% else %}{{ message.content + '\\n' }}{% endif %}{% endfor %}"
)


class Processor:
    """Turns messages, captions and shard records into samples of one model.

    Args:
        tokenizer: the language model's own, from `transformers`.
        config: of the model; gives tile size, image token and stop tokens.
        max_tiles: tiles per picture at most.
        caption_prompt: the user's request in captioning a picture; None leaves the chat form out, so that the caption
            follows the picture directly. video_prompt: the same for clips.
        chat_template: a Jinja template in place of the tokenizer's.
        max_frames: frames per clip at most.
        max_frame_tiles: tiles per frame at most; None is `max_tiles`.

    Raises:
        UserError: a limit out of range.
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
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.image_token_id = IMAGE.token_id(config)
        self.stop_tokens = config.language_model.stop_tokens
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
        self.chat_template = chat_template or tokenizer.chat_template or PLAIN_TEMPLATE

    def settings(self) -> dict[str, Any]:
        """The arguments besides tokenizer and configuration: `Processor(tokenizer, config, **settings)` is equal."""
        names = ("max_tiles", "caption_prompt", "chat_template", "max_frames", "max_frame_tiles", "video_prompt")
        return {name: getattr(self, name) for name in names}

    def prompt(self, messages: list[Message]) -> Sample:
        """A conversation up to the assistant's next turn.

        Raises:
            UserError: messages of another form, an empty one, a file that cannot be read.
        """
        flat, media = self._flatten(messages)
        tokens = self._tokenize(self._render(flat, answer_follows=True), _queues(media))
        return Sample(tokens, None, **media)

    def example(self, messages: list[Message]) -> Sample:
        """A training sample: every assistant turn is a target, up to and with its stop token.

        Raises:
            UserError: as `prompt`, or a conversation without an assistant turn.
        """
        while messages and not _is_answer(messages[-1]):  # turns after the last answer hold no target
            messages = messages[:-1]
        if not messages:
            raise UserError("the conversation has no assistant turn to learn from")
        flat, media = self._flatten(messages)
        queues = _queues(media)
        first_extra = self.config.language_model.vocab_size
        tokens: list[int] = []
        labels: list[int] = []
        done = ""
        for index, message in enumerate(flat):
            if message["role"] != "assistant":
                continue
            before = self._render(flat[:index], answer_follows=True)
            after = self._render(flat[: index + 1], answer_follows=False)
            if not (before.startswith(done) and after.startswith(before)):
                raise UserError(
                    "the chat template rewrites earlier turns when later ones follow, so targets cannot be told apart; "
                    "give another chat_template"
                )
            answer = after[len(before) :]
            target = answer.rstrip("\n")  # a line break after the stop token is no target
            for text, is_target in ((before[len(done) :], False), (target, True), (answer[len(target) :], False)):
                piece = self._tokenize(text, queues)
                tokens += piece
                labels += [
                    token if is_target and token < first_extra and token != self.image_token_id else IGNORED
                    for token in piece
                ]
            done = after
        end = max(index for index, label in enumerate(labels) if label != IGNORED) + 1
        return Sample(tokens[:end], labels[:end], **media)

    def caption_prompt_for(self, source: MediaSource, kind: str = "image") -> Sample:
        """The sample that a caption of a file continues.

        Args:
            kind: modality of the source, "image" or "video".

        Raises:
            UserError: the file cannot be read.
        """
        prompt = self._caption_request(kind)
        part = {"type": kind, kind: source}
        if prompt is not None:
            return self.prompt([{"role": "user", "content": [part, {"type": "text", "text": prompt}]}])
        flat, media = self._flatten([{"role": "user", "content": [part]}])
        return Sample([*self._bos(), *self._tokenize(flat[0]["content"], _queues(media))], None, **media)

    def caption_example(self, source: MediaSource, caption: str, kind: str = "image") -> Sample:
        """A training sample whose target is the caption; arguments as in `caption_prompt_for`.

        Raises:
            UserError: an empty caption, one that holds a media mark, a picture or clip that cannot be read.
        """
        if not caption.strip():
            raise UserError("the caption is empty")
        _check_no_mark(caption, "the caption")
        prompt = self._caption_request(kind)
        if prompt is not None:
            content = [{"type": kind, kind: source}, {"type": "text", "text": prompt}]
            return self.example([{"role": "user", "content": content}, {"role": "assistant", "content": caption}])
        sample = self.caption_prompt_for(source, kind)
        target = [*self._tokenize(caption, {}), *self.stop_tokens[:1]]
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

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of an answer's tokens, without special tokens."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()

    def _caption_request(self, kind: str) -> str | None:
        return self.caption_prompt if kind == "image" else self.video_prompt

    def _flatten(self, messages: list[Message]) -> tuple[list[Message], Media]:
        """Messages whose content is text with marks in the place of media, and the media."""
        if not messages:
            raise UserError("there are no messages")
        media: Media = {modality.field: [] for modality in MODALITIES}
        flat: list[Message] = []
        for index, message in enumerate(messages):
            if not isinstance(message, dict) or not {"role", "content"} <= set(message):
                raise UserError(f'message {index} must be {{"role": ..., "content": ...}}')
            content = message["content"]
            if not isinstance(content, str | list):
                raise UserError(f"message {index} has {content!r} as content; it can be text or a list of parts")
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            text = "".join(self._flatten_part(part, index, media) for part in parts)
            # Only an answer to a sound may be empty: nothing is said there.
            if not text.strip() and not (_is_answer(message) and flat and AUDIO.mark in flat[-1]["content"]):
                raise UserError(
                    f"message {index} ({message['role']}) is empty: give it text, an image, a clip or sound"
                )
            flat.append({"role": message["role"], "content": text})
        return flat, media

    def _flatten_part(self, part: Any, index: int, media: Media) -> str:
        """A part of message `index` as text; an item that it holds is read and appended to `media`."""
        match part:
            case {"type": "text", "text": str(text)}:
                _check_no_mark(text, f"message {index}")
                return text
            case {"type": str(kind)} if kind in BY_NAME and part.get(kind) is not None:
                modality = BY_NAME[kind]
                if getattr(self.config, modality.part) is None:
                    raise UserError(f"message {index} holds {modality.plural}, and the model has no {modality.part}")
                limits = MediaLimits(self.max_tiles, self.max_frames, self.max_frame_tiles or self.max_tiles)
                media[modality.field].append(modality.read(part[kind], self.config, limits))
                return modality.mark
        raise part_error(part, f"message {index}")

    def _render(self, flat: list[Message], answer_follows: bool) -> str:
        """Messages as the chat template writes them, with a mark in each item's place."""
        image_text = self.tokenizer.convert_ids_to_tokens(self.image_token_id)  # None where the tokenizer lacks it
        # Templates of models that know images write the tokenizer's own image token for each image part.
        if image_text and ("'image'" in self.chat_template or '"image"' in self.chat_template):
            text = self._apply_template([_in_parts(message) for message in flat], answer_follows)
            text = text.replace(str(image_text), IMAGE.mark)
        else:
            text = self._apply_template(flat, answer_follows)
        for modality in MODALITIES:
            expected = sum(message["content"].count(modality.mark) for message in flat)
            if text.count(modality.mark) != expected:
                raise UserError(
                    f"the chat template gives {text.count(modality.mark)} places for {expected} {modality.plural}; "
                    "give another chat_template, and leave the image token's own text out of the messages"
                )
        return text

    def _apply_template(self, messages: list[Message], answer_follows: bool) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, chat_template=self.chat_template, tokenize=False, add_generation_prompt=answer_follows
                )
            )
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template refuses these messages: {error}") from error

    def _tokenize(self, text: str, queues: Queues) -> list[int]:
        """Token ids of a text with marks; each mark takes the next item of its queue."""
        tokens: list[int] = []
        for piece in MARKS.split(text):
            if modality := BY_MARK.get(piece):
                tokens += modality.tokens(next(queues[piece]), self.config)
            elif piece:
                tokens += self.tokenizer(piece, add_special_tokens=False).input_ids
        return tokens

    def _bos(self) -> list[int]:
        """The begin-of-text token, where the tokenizer itself puts one before a text."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tokenizer("").input_ids[:1] == [bos] else []


def _queues(media: Media) -> Queues:
    return {modality.mark: iter(media[modality.field]) for modality in MODALITIES}


def _check_no_mark(text: str, where: str) -> None:
    if found := MARKS.search(text):
        raise UserError(f"{where} holds {found[0]}, which stands for media: leave it out")


def _is_answer(message: Message) -> bool:
    return isinstance(message, dict) and message.get("role") == "assistant"


def _in_parts(message: Message) -> Message:
    """A flat message as a list of text and image parts, for templates that place images themselves."""
    if IMAGE.mark not in message["content"]:
        return message
    first, *rest = message["content"].split(IMAGE.mark)
    parts = [{"type": "text", "text": first}]
    for text in rest:
        parts += [{"type": "image"}, {"type": "text", "text": text}]
    return {**message, "content": [part for part in parts if part.get("text") != ""]}
