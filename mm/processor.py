"""From messages and pictures to samples: chat template, placeholders, tiles; and from tokens back to text.

Images stand in the rendered text as a mark of ours; the text around the marks is tokenised piece by piece, and each
mark becomes the model's image token. So any tokenizer serves, whether or not it knows images.
"""

from collections.abc import Sequence
from pathlib import Path

import jinja2
from PIL import Image
from transformers import PreTrainedTokenizerBase

from mm.batch import IGNORED, Sample
from mm.config import ModelConfig
from shards.format import Record, picture_suffixes
from vision.reading import read_picture, to_rgb
from vision.tiling import Tiles, tile_image

IMAGE_MARK = "<|mm-image|>"

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
        caption_prompt: what the user asks for when a picture is to be captioned; None leaves the chat form out, so
            that the caption follows the picture directly.
        chat_template: a Jinja template in place of the tokenizer's.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: ModelConfig,
        max_tiles: int | None = None,
        caption_prompt: str | None = "Describe the picture.",
        chat_template: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_token_id = config.image_token_id
        self.stop_tokens = config.language_model.stop_tokens
        self.tile_size = config.vision_encoder.tile_size if config.vision_encoder else None
        self.context = config.language_model.context
        most = config.vision_encoder.max_num_tiles if config.vision_encoder else 1
        self.max_tiles = most if max_tiles is None else max_tiles
        if not 1 <= self.max_tiles <= most:
            raise ValueError(f"max_tiles is {max_tiles}; this model's image encoder takes 1 to {most}")
        self.caption_prompt = caption_prompt
        self.chat_template = chat_template or tokenizer.chat_template or PLAIN_TEMPLATE

    def prompt(self, messages: list[dict]) -> Sample:
        """The sample after which the assistant speaks.

        Raises:
            ValueError: messages of another form, an empty one, a picture that cannot be read.
        """
        flat, images = self._flatten(messages)
        return Sample(self._tokenize(self._render(flat, answer_follows=True)), images=images)

    def example(self, messages: list[dict]) -> Sample:
        """A training sample: every assistant turn is a target, up to and with its stop token.

        Raises:
            ValueError: as `prompt`, or a conversation without an assistant turn.
        """
        while messages and not _is_answer(messages[-1]):  # what follows the last answer teaches nothing
            messages = messages[:-1]
        if not messages:
            raise ValueError("the conversation has no assistant turn to learn from")
        flat, images = self._flatten(messages)
        tokens: list[int] = []
        labels: list[int] = []
        done = ""
        for index, message in enumerate(flat):
            if message["role"] != "assistant":
                continue
            before = self._render(flat[:index], answer_follows=True)
            after = self._render(flat[: index + 1], answer_follows=False)
            if not (before.startswith(done) and after.startswith(before)):
                raise ValueError(
                    "the chat template rewrites earlier turns when later ones follow, so targets cannot be told apart; "
                    "give another chat_template"
                )
            answer = after[len(before) :]
            target = answer.rstrip("\n")  # a line break behind the stop token is nobody's to learn
            for text, is_target in ((before[len(done) :], False), (target, True), (answer[len(target) :], False)):
                piece = self._tokenize(text)
                tokens += piece
                labels += [token if is_target and token != self.image_token_id else IGNORED for token in piece]
            done = after
        end = max(index for index, label in enumerate(labels) if label != IGNORED) + 1
        return Sample(tokens[:end], labels[:end], images)

    def caption_prompt_for(self, picture: Image.Image | str | Path | bytes) -> Sample:
        """The sample after which a caption follows."""
        if self.caption_prompt is not None:
            return self.prompt(self._caption_messages(picture))
        return Sample([*self._bos(), self.image_token_id], images=[self._tiles(picture)])

    def caption_example(self, picture: Image.Image | str | Path | bytes, caption: str) -> Sample:
        """A training sample whose target is the caption.

        Raises:
            ValueError: an empty caption, one that holds the mark of images, a picture that cannot be read.
        """
        if not caption.strip():
            raise ValueError("the caption is empty")
        _refuse_mark(caption, "the caption")
        if self.caption_prompt is not None:
            answer = {"role": "assistant", "content": caption}
            return self.example([*self._caption_messages(picture), answer])
        prompt = self.caption_prompt_for(picture)
        target = [*self._tokenize(caption), *self.stop_tokens[:1]]
        labels = [IGNORED] * len(prompt.tokens) + target
        return Sample(prompt.tokens + target, labels, prompt.images)

    def record_example(self, record: Record) -> Sample:
        """A training sample from a shard's record: its messages, or its picture and caption.

        Raises:
            ValueError: as `example` and `caption_example`, or a sample longer than the context.
        """
        if "messages" in record.json:
            sample = self.example(record_messages(record))
        else:
            sample = self.caption_example(record_pictures(record)[0], record.json["caption"])
        if len(sample.tokens) > self.context:
            raise ValueError(f"the sample has {len(sample.tokens)} tokens, over the context of {self.context}")
        return sample

    def record_prompt(self, record: Record) -> tuple[Sample, str]:
        """The sample before a record's last answer, and that answer; the caption for a captioned picture."""
        answer = record_answer(record)
        if "messages" not in record.json:
            return self.caption_prompt_for(record_pictures(record)[0]), answer
        return self.prompt(record_messages(record)[:-1]), answer

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of an answer's tokens, without special tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def _caption_messages(self, picture: Image.Image | str | Path | bytes) -> list[dict]:
        content = [{"type": "image", "image": picture}, {"type": "text", "text": self.caption_prompt}]
        return [{"role": "user", "content": content}]

    def _flatten(self, messages: list[dict]) -> tuple[list[dict], list[Tiles]]:
        """Messages with plain text as content, marks where images stood, and the images' tiles."""
        if not messages:
            raise ValueError("there are no messages")
        flat, images = [], []
        for index, message in enumerate(messages):
            if not isinstance(message, dict) or not {"role", "content"} <= set(message):
                raise ValueError(f'message {index} must be {{"role": ..., "content": ...}}')
            content = message["content"]
            if not isinstance(content, str | list):
                raise ValueError(f"message {index} has {content!r} as content; it can be text or a list of parts")
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            text = ""
            for part in parts:
                match part:
                    case {"type": "image", "image": picture}:
                        images.append(self._tiles(picture))
                        text += IMAGE_MARK
                    case {"type": "text", "text": str(words)}:
                        _refuse_mark(words, f"message {index}")
                        text += words
                    case _:
                        raise ValueError(
                            f'message {index} holds {part!r}; a part is {{"type": "text", "text": ...}} or '
                            '{"type": "image", "image": file}'
                        )
            if not text.strip():
                raise ValueError(f"message {index} ({message['role']}) is empty: give it text or an image")
            flat.append({"role": message["role"], "content": text})
        return flat, images

    def _tiles(self, picture: Image.Image | str | Path | bytes) -> Tiles:
        if self.tile_size is None:
            raise ValueError("a picture was given to a model that has no vision_encoder")
        image = to_rgb(picture) if isinstance(picture, Image.Image) else read_picture(picture)
        return tile_image(image, self.tile_size, self.max_tiles)

    def _render(self, flat: list[dict], answer_follows: bool) -> str:
        own_text = self.tokenizer.convert_ids_to_tokens(self.image_token_id)  # None where the tokenizer lacks it
        places_images = own_text and ("'image'" in self.chat_template or '"image"' in self.chat_template)
        shown = [_in_parts(message) for message in flat] if places_images else flat
        try:
            text = self.tokenizer.apply_chat_template(
                shown, chat_template=self.chat_template, tokenize=False, add_generation_prompt=answer_follows
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from error
        if places_images:
            text = text.replace(own_text, IMAGE_MARK)
        expected = sum(message["content"].count(IMAGE_MARK) for message in flat)
        if text.count(IMAGE_MARK) != expected:
            raise ValueError(
                f"the chat template gives {text.count(IMAGE_MARK)} places for {expected} images; give another "
                "chat_template, and leave the image token's own text out of the messages"
            )
        return text

    def _tokenize(self, text: str) -> list[int]:
        first, *rest = (self.tokenizer(piece, add_special_tokens=False).input_ids for piece in text.split(IMAGE_MARK))
        return first + [token for piece in rest for token in [self.image_token_id, *piece]]

    def _bos(self) -> list[int]:
        """What the tokenizer itself puts before a text."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tokenizer("").input_ids[:1] == [bos] else []


def _refuse_mark(text: str, where: str) -> None:
    if IMAGE_MARK in text:
        raise ValueError(f"{where} holds {IMAGE_MARK}, which stands for images: leave it out")


def _is_answer(message: dict) -> bool:
    return isinstance(message, dict) and message.get("role") == "assistant"


def _in_parts(message: dict) -> dict:
    """A flat message as a list of text and image parts, for templates that place images themselves."""
    if IMAGE_MARK not in message["content"]:
        return message
    first, *rest = message["content"].split(IMAGE_MARK)
    parts = [{"type": "text", "text": first}]
    for text in rest:
        parts += [{"type": "image"}, {"type": "text", "text": text}]
    return {**message, "content": [part for part in parts if part.get("text") != ""]}


def record_pictures(record: Record) -> list[bytes]:
    """The record's pictures, in the order of their members.

    Raises:
        ValueError: there is none.
    """
    pictures = [record.media[suffix] for suffix in picture_suffixes(record.media)]
    if not pictures:
        raise ValueError(f"record {record.id} holds no picture; its members are {', '.join(record.media) or 'none'}")
    return pictures


def record_answer(record: Record) -> str:
    """The text that a record wants for an answer: its last assistant turn, or its caption.

    Raises:
        ValueError: the conversation does not end with an assistant's turn.
    """
    if "messages" not in record.json:
        return record.json["caption"]
    if not record.json["messages"] or record.json["messages"][-1]["role"] != "assistant":
        raise ValueError(f"record {record.id} does not end with an assistant's turn")
    content = record.json["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def record_messages(record: Record) -> list[dict]:
    """The record's messages, with the bytes of its media in place of their members' suffixes."""

    def resolve(part: dict) -> dict:
        if part.get("type") != "image":
            return part
        if part["image"] not in record.media:
            raise ValueError(
                f"record {record.id} names picture {part['image']!r}; its members are {', '.join(record.media)}"
            )
        return {**part, "image": record.media[part["image"]]}

    resolved = []
    for message in record.json["messages"]:
        content = message["content"]
        parts = content if isinstance(content, str) else [resolve(part) for part in content]
        resolved.append({**message, "content": parts})
    return resolved
