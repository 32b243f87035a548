"""The HTTP server: OpenAI's API over the decoding engine.

request -> `server` (`guard`: hosts, keys) -> `api` (schema) -> `conversation` (media, by a child process)
-> `loop` (the engine's thread) -> `answers` (text, log-probabilities) -> JSON or server-sent events
"""
