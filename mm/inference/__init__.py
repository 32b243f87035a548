"""The decoding engine: one static step for all requests, which join and leave its rows between steps.

    Request -> Engine -> Prompt (digests) -> run_chunks (prompts, into pages) -> DecodeState -> decode_one (per token)

`pages` is the memory of keys and values, `sampling` chooses tokens on the device by noise that depends on the request
alone, `joint_ctc` chooses those of transcripts together with CTC.
"""

from mm.inference.engine import Engine, decode
from mm.inference.request import Request

__all__ = ["Engine", "Request", "decode"]
