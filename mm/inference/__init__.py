"""The decoding engine: one static step for all requests, which join and leave its rows between steps.

    Request -> Engine -> mm.generation.prefill (once per prompt) -> DecodeState -> decode_one (per token)

`sampling` chooses tokens on the device, by noise that depends on the request alone.
"""

from mm.inference.engine import Engine, Request

__all__ = ["Engine", "Request"]
