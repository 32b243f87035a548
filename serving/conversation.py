"""From a checked request to samples: media are counted, fetched and decoded, then the processor lays out the prompt."""

import asyncio
import base64
import binascii
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from foundation.errors import UserError
from mm.batch import Sample
from mm.inference.prompt import vision_sizes
from mm.model import MultimodalModel
from mm.processor import Processor
from serving.api import AudioPart, ImagePart, InputAudioPart, Message, TextPart, VideoPart
from serving.errors import ApiError
from serving.limits import Limits
from serving.media import MediaDecoder
from serving.remote import Sources

DATA_URL = re.compile(r"data:[\w.+-]*/?[\w.+-]*(?:;[\w-]+=[\w.,\"-]+)*;base64,", re.IGNORECASE)


class Conversations:
    """Prepares the prompts of one model."""

    def __init__(
        self, model: MultimodalModel, processor: Processor, limits: Limits, decoder: MediaDecoder, sources: Sources
    ) -> None:
        self.model, self.processor, self.limits = model, processor, limits
        self.decoder, self.sources = decoder, sources
        self._threads = ThreadPoolExecutor(1, "prompts")  # the tokenizer serves one prompt at a time

    async def chat(self, messages: list[Message], blind: bool = False) -> Sample:
        """The prompt of a conversation.

        Args:
            blind: every picture is grey: what does the answer owe to the pictures?

        Raises:
            ApiError: 400.
        """
        return await self.prompt(await self.read(messages, blind))

    async def read(self, messages: list[Message], blind: bool = False) -> list[dict[str, Any]]:
        """Messages as `Processor.prompt` takes them, with their media decoded. Arguments and errors as `chat`."""
        parts = [part for message in messages if isinstance(message.content, list) for part in message.content]
        count = sum(not isinstance(part, TextPart) for part in parts)
        if count > self.limits.media:
            raise ApiError(400, f"{count} media in one request, over the limit of {self.limits.media}", "messages")
        read = []
        for index, message in enumerate(messages):
            role = "system" if message.role == "developer" else message.role
            content: Any = message.content
            if isinstance(content, list):
                content = [
                    await self._part(part, f"messages.{index}.content.{place}", blind)
                    for place, part in enumerate(content)
                ]
            read.append({"role": role, "content": content})
        return read

    async def prompt(self, messages: list[dict[str, Any]], param: str = "messages") -> Sample:
        """The prompt of messages whose media are decoded. Raises: ApiError: 400."""
        return await self._run(self.processor.prompt, messages, param)

    async def text(self, text: str) -> Sample:
        """A text to be continued. Raises: ApiError: 400."""
        return await self._run(self.processor.text_prompt, text, "prompt")

    async def _run(self, make: Any, source: Any, param: str) -> Sample:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, make, source)
        except UserError as error:
            raise ApiError(400, str(error)[:1000], param) from None

    async def _part(self, part: Any, param: str, blind: bool) -> dict[str, Any]:
        if isinstance(part, TextPart):
            return {"type": "text", "text": part.text}
        if isinstance(part, ImagePart):
            self._check_modality("vision_encoder", "pictures", param)
            side = self.processor.tile_size if part.image_url.detail == "low" else 0
            pixels = await self.decoder.picture(await self.bytes_of(part.image_url.url, param), param, side or 0)
            if blind:
                pixels[:] = 128
            return {"type": "image", "image": pixels}
        if isinstance(part, VideoPart):
            self._check_modality("video_adapter", "clips", param)
            data = await self.bytes_of(part.video_url.url, param)
            frames = await self.decoder.clip(data, param, self.processor.max_frames)
            if blind:
                frames.pixels[:] = 128
            return {"type": "video", "video": frames}
        self._check_modality("speech_encoder", "sounds", param)
        if isinstance(part, AudioPart):
            data = await self.bytes_of(part.audio_url.url, param)
        else:
            assert isinstance(part, InputAudioPart)
            data = await asyncio.to_thread(self._decode, part.input_audio.data, param)
        return {"type": "audio", "audio": await self.decoder.sound(data, param)}

    def _check_modality(self, part: str, what: str, param: str) -> None:
        if getattr(self.model.config, part) is None:
            raise ApiError(400, f"this model takes no {what}: it has no {part}", param, code="unsupported_modality")

    async def bytes_of(self, url: str, param: str) -> bytes:
        """The file of a URL. Raises: ApiError: 400, it is not allowed or cannot be read."""
        if url[:5].lower() != "data:":
            return await asyncio.to_thread(self.sources.read, url, param)
        found = DATA_URL.match(url[:300])
        if found is None:
            raise ApiError(400, "a data: URL is data:TYPE;base64,DATA", param, code="invalid_url")
        return await asyncio.to_thread(self._decode, url[found.end() :], param)

    def _decode(self, text: str, param: str) -> bytes:
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise ApiError(400, "this is not base64", param, code="invalid_base64") from None
        if not data:
            raise ApiError(400, "the file is empty", param)
        if len(data) > self.limits.media_bytes:
            raise ApiError(400, f"the file has more than {self.limits.media_bytes:,} bytes", param, code="too_large")
        return data


def media_tokens(model: MultimodalModel, sample: Sample) -> dict[str, int]:
    """Tokens of a prompt's media: `audio_tokens` stand among the prompt's own; `image_tokens` and `video_tokens` are
    vision tokens, which the prompt's tokens attend to and which are not among them."""
    sizes = vision_sizes(model, sample)
    audio = sample.tokens.count(model.config.audio_token_id) if sample.speech else 0
    return {
        "audio_tokens": audio,
        "image_tokens": sum(sizes.get("image", [])),
        "video_tokens": sum(sizes.get("video", [])),
    }
