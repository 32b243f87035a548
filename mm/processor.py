"""From messages with pictures, clips and sound to samples: chat template, placeholders; and from tokens back to text.

Media stand in the rendered text as marks of ours; the text around the marks is tokenised piece by piece, and each mark
becomes the model's own tokens for it. So any tokenizer serves, whether or not it knows images.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from foundation.errors import UserError
from mm.batch import IGNORED, Sample
from mm.config import ModelConfig
from shards.format import CLIPS, Record, picture_suffixes
from speech.adapter import num_tokens
from speech.reading import read_sound
from video.sampling import Clip, sample_frames
from vision.reading import read_picture, to_rgb
from vision.tiling import Tiles, tile_image

IMAGE_MARK, VIDEO_MARK, AUDIO_MARK = "<|mm-image|>", "<|mm-video|>", "<|mm-audio|>"
MARKS = re.compile("(" + "|".join(map(re.escape, (IMAGE_MARK, VIDEO_MARK, AUDIO_MARK))) + ")")
MediaSource = Image.Image | str | Path | bytes  # a picture; clips and sounds come as a file or its bytes

# For language models that come without a chat template.
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}{% if message.role == 'assistant' %}"
    "{{ message.content }}{{ eos_token }}{{ '\\n' }}{% else %}{{ message.content + '\\n' }}{% endif %}{% endfor %}"
)


@dataclass
class Media:
    """What the messages hold besides text, each kind in order."""

    images: list[Tiles] = field(default_factory=list)
    videos: list[Clip] = field(default_factory=list)
    speech: list[Tensor] = field(default_factory=list)


class Processor:
    """Turns messages, captions and shard records into samples of one model.

    Args:
        tokenizer: the language model's own, from `transformers`.
        config: of the model; gives tile size, image token and stop tokens.
        max_tiles: tiles per picture at most.
        caption_prompt: what the user asks for when a picture is to be captioned; None leaves the chat form out, so
            that the caption follows the picture directly. video_prompt: the same for clips.
        chat_template: a Jinja template in place of the tokenizer's.
        max_frames: frames per clip at most.
        max_frame_tiles: tiles per frame at most; None is `max_tiles`.
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
        self.image_token_id = config.image_token_id
        self.stop_tokens = config.language_model.stop_tokens
        self.tile_size = config.vision_encoder.tile_size if config.vision_encoder else None
        self.context = config.language_model.context
        most = config.vision_encoder.max_num_tiles if config.vision_encoder else 1
        self.max_tiles = most if max_tiles is None else max_tiles
        if not 1 <= self.max_tiles <= most:
            raise UserError(f"max_tiles is {max_tiles}; this model's image encoder takes 1 to {most}")
        if max_frames < 1:
            raise UserError(f"max_frames is {max_frames}; it must be at least 1")
        if max_frame_tiles is not None and not 1 <= max_frame_tiles <= most:
            raise UserError(f"max_frame_tiles is {max_frame_tiles}; this model's image encoder takes 1 to {most}")
        self.max_frames, self.max_frame_tiles = max_frames, max_frame_tiles
        self.caption_prompt, self.video_prompt = caption_prompt, video_prompt
        self.chat_template = chat_template or tokenizer.chat_template or PLAIN_TEMPLATE

    def settings(self) -> dict:
        """What this processor was made with besides tokenizer and configuration: `Processor(t, c, **settings)`."""
        names = ("max_tiles", "caption_prompt", "chat_template", "max_frames", "max_frame_tiles", "video_prompt")
        return {name: getattr(self, name) for name in names}

    def prompt(self, messages: list[dict]) -> Sample:
        """The sample after which the assistant speaks.

        Raises:
            UserError: messages of another form, an empty one, a picture that cannot be read.
        """
        flat, media = self._flatten(messages)
        tokens = self._tokenize(self._render(flat, answer_follows=True), iter(media.speech))
        return Sample(tokens, None, media.images, media.videos, media.speech)

    def example(self, messages: list[dict]) -> Sample:
        """A training sample: every assistant turn is a target, up to and with its stop token.

        Raises:
            UserError: as `prompt`, or a conversation without an assistant turn.
        """
        while messages and not _is_answer(messages[-1]):  # what follows the last answer teaches nothing
            messages = messages[:-1]
        if not messages:
            raise UserError("the conversation has no assistant turn to learn from")
        flat, media = self._flatten(messages)
        utterances = iter(media.speech)
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
            target = answer.rstrip("\n")  # a line break behind the stop token is nobody's to learn
            for text, is_target in ((before[len(done) :], False), (target, True), (answer[len(target) :], False)):
                piece = self._tokenize(text, utterances)
                tokens += piece
                labels += [
                    token if is_target and token < first_extra and token != self.image_token_id else IGNORED
                    for token in piece
                ]
            done = after
        end = max(index for index, label in enumerate(labels) if label != IGNORED) + 1
        return Sample(tokens[:end], labels[:end], media.images, media.videos, media.speech)

    def caption_prompt_for(self, source: MediaSource, kind: str = "image") -> Sample:
        """The sample after which a caption follows. Args: kind: of the source, "image" or "video"."""
        prompt = self._caption_question(kind)
        part = {"type": kind, kind: source}
        if prompt is not None:
            return self.prompt([{"role": "user", "content": [part, {"type": "text", "text": prompt}]}])
        flat, media = self._flatten([{"role": "user", "content": [part]}])
        return Sample([*self._bos(), *self._tokenize(flat[0]["content"])], None, media.images, media.videos)

    def caption_example(self, source: MediaSource, caption: str, kind: str = "image") -> Sample:
        """A training sample whose target is the caption; arguments as in `caption_prompt_for`.

        Raises:
            UserError: an empty caption, one that holds the mark of media, a picture or clip that cannot be read.
        """
        if not caption.strip():
            raise UserError("the caption is empty")
        _refuse_mark(caption, "the caption")
        prompt = self._caption_question(kind)
        if prompt is not None:
            content = [{"type": kind, kind: source}, {"type": "text", "text": prompt}]
            return self.example([{"role": "user", "content": content}, {"role": "assistant", "content": caption}])
        sample = self.caption_prompt_for(source, kind)
        target = [*self._tokenize(caption), *self.stop_tokens[:1]]
        labels = [IGNORED] * len(sample.tokens) + target
        return Sample(sample.tokens + target, labels, sample.images, sample.videos)

    def record_example(self, record: Record) -> Sample:
        """A training sample from a shard's record: its messages, or its picture or clip and caption.

        Raises:
            UserError: as `example` and `caption_example`, or a sample longer than the context.
        """
        if "messages" in record.json:
            sample = self.example(record_messages(record))
        else:
            kind, source = record_medium(record)
            sample = self.caption_example(source, record.json["caption"], kind)
        if len(sample.tokens) > self.context:
            raise UserError(f"the sample has {len(sample.tokens)} tokens, over the context of {self.context}")
        return sample

    def record_prompt(self, record: Record) -> tuple[Sample, str]:
        """The sample before a record's last answer, and that answer; the caption for a captioned picture or clip."""
        answer = record_answer(record)
        if "messages" not in record.json:
            kind, source = record_medium(record)
            return self.caption_prompt_for(source, kind), answer
        return self.prompt(record_messages(record)[:-1]), answer

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of an answer's tokens, without special tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def _caption_question(self, kind: str) -> str | None:
        return self.caption_prompt if kind == "image" else self.video_prompt

    def _flatten(self, messages: list[dict]) -> tuple[list[dict], Media]:
        """Messages with plain text as content and marks where media stood, and the media."""
        if not messages:
            raise UserError("there are no messages")
        flat, media = [], Media()
        for index, message in enumerate(messages):
            if not isinstance(message, dict) or not {"role", "content"} <= set(message):
                raise UserError(f'message {index} must be {{"role": ..., "content": ...}}')
            content = message["content"]
            if not isinstance(content, str | list):
                raise UserError(f"message {index} has {content!r} as content; it can be text or a list of parts")
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            text = ""
            for part in parts:
                match part:
                    case {"type": "image", "image": picture}:
                        media.images.append(self._tiles(picture))
                        text += IMAGE_MARK
                    case {"type": "video", "video": clip}:
                        media.videos.append(self._clip(clip))
                        text += VIDEO_MARK
                    case {"type": "audio", "audio": sound}:
                        media.speech.append(self._speech(sound))
                        text += AUDIO_MARK
                    case {"type": "text", "text": str(words)}:
                        _refuse_mark(words, f"message {index}")
                        text += words
                    case _:
                        raise UserError(
                            f'message {index} holds {part!r}; a part is {{"type": "text", "text": ...}}, '
                            '{"type": "image", "image": file}, {"type": "video", "video": file} or '
                            '{"type": "audio", "audio": file}'
                        )
            if not text.strip() and not (_is_answer(message) and flat and AUDIO_MARK in flat[-1]["content"]):
                raise UserError(
                    f"message {index} ({message['role']}) is empty: give it text, an image, a clip or sound"
                )  # but for an answer to a sound in which nothing is said
            flat.append({"role": message["role"], "content": text})
        return flat, media

    def _clip(self, source: str | Path | bytes) -> Clip:
        if self.config.video_adapter is None:
            raise UserError("a clip was given to a model that has no video_adapter")
        frames = sample_frames(source, self.max_frames)
        most = self.max_frame_tiles or self.max_tiles
        tiles = [tile_image(Image.fromarray(pixels), self.tile_size, most) for pixels in frames.pixels]
        return Clip(tiles, torch.from_numpy(frames.times))

    def _speech(self, source: str | Path | bytes) -> Tensor:
        if self.config.speech_encoder is None:
            raise UserError("sound was given to a model that has no speech_encoder")
        sound = read_sound(source)
        try:
            return self.config.speech_encoder.features(sound)
        except ValueError as error:
            name = "sound" if isinstance(source, bytes) else source
            raise UserError(f"{name}: {error}") from error

    def _tiles(self, picture: MediaSource) -> Tiles:
        if self.tile_size is None:
            raise UserError("a picture was given to a model that has no vision_encoder")
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
            raise UserError(f"the chat template refuses these messages: {error}") from error
        if places_images:
            text = text.replace(own_text, IMAGE_MARK)
        for kind, mark in (("images", IMAGE_MARK), ("clips", VIDEO_MARK), ("utterances", AUDIO_MARK)):
            expected = sum(message["content"].count(mark) for message in flat)
            if text.count(mark) != expected:
                raise UserError(
                    f"the chat template gives {text.count(mark)} places for {expected} {kind}; give another "
                    "chat_template, and leave the image token's own text out of the messages"
                )
        return text

    def _tokenize(self, text: str, utterances: Iterator[Tensor] | None = None) -> list[int]:
        """Args: utterances: those whose marks stand in the text, and perhaps more, that later texts take."""
        tokens: list[int] = []
        for piece in MARKS.split(text):
            if piece == IMAGE_MARK:
                tokens.append(self.image_token_id)
            elif piece == VIDEO_MARK:
                tokens.append(self.config.video_token_id)
            elif piece == AUDIO_MARK:
                heard = [self.config.audio_token_id] * num_tokens(len(next(utterances)))
                tokens += [self.config.speech_start_id, *heard, self.config.speech_end_id]
            elif piece:
                tokens += self.tokenizer(piece, add_special_tokens=False).input_ids
        return tokens

    def _bos(self) -> list[int]:
        """What the tokenizer itself puts before a text."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tokenizer("").input_ids[:1] == [bos] else []


def _refuse_mark(text: str, where: str) -> None:
    if found := MARKS.search(text):
        raise UserError(f"{where} holds {found[0]}, which stands for media: leave it out")


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
        UserError: there is none.
    """
    pictures = [record.media[suffix] for suffix in picture_suffixes(record.media)]
    if not pictures:
        raise UserError(f"record {record.id} holds no picture; its members are {', '.join(record.media) or 'none'}")
    return pictures


def record_medium(record: Record) -> tuple[str, bytes]:
    """What a captioned record's caption is of: ("image", its first picture) or ("video", its clip).

    Raises:
        UserError: there is neither.
    """
    if pictures := picture_suffixes(record.media):
        return "image", record.media[pictures[0]]
    clips = [data for suffix, data in record.media.items() if suffix in CLIPS]
    if not clips:
        raise UserError(
            f"record {record.id} holds neither picture nor clip; its members are {', '.join(record.media) or 'none'}"
        )
    return "video", clips[0]


def record_answer(record: Record) -> str:
    """The text that a record wants for an answer: its last assistant turn, or its caption.

    Raises:
        UserError: the conversation does not end with an assistant's turn.
    """
    if "messages" not in record.json:
        return record.json["caption"]
    if not record.json["messages"] or record.json["messages"][-1]["role"] != "assistant":
        raise UserError(f"record {record.id} does not end with an assistant's turn")
    content = record.json["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def record_transcript(record: Record) -> str | None:
    """What is said in a record's recording: its `said`, or what a transcription or a silence has for an answer; None
    where that is not known."""
    if "said" in record.json:
        return record.json["said"]
    return record_answer(record) if record.json.get("task") in ("transcription", "silence") else None


def record_messages(record: Record) -> list[dict]:
    """The record's messages, with the bytes of its media in place of their members' suffixes."""

    def resolve(part: dict) -> dict:
        kind = part.get("type")
        if kind not in ("image", "video", "audio"):
            return part
        if part[kind] not in record.media:
            raise UserError(
                f"record {record.id} names the {kind} {part[kind]!r}; its members are {', '.join(record.media)}"
            )
        return {**part, kind: record.media[part[kind]]}

    resolved = []
    for message in record.json["messages"]:
        content = message["content"]
        parts = content if isinstance(content, str) else [resolve(part) for part in content]
        resolved.append({**message, "content": parts})
    return resolved
