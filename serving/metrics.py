"""What the server counts, under vLLM's names, for Prometheus."""

from collections.abc import Mapping
from typing import Any

from foundation.extras import import_extra

prometheus = import_extra("prometheus_client", "serve", "the server")

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class Metrics:
    """Counters of one server. Args: model: its name, the value of the label `model_name`."""

    def __init__(self, model: str) -> None:
        self.registry = prometheus.CollectorRegistry()
        self._model = model
        self._running = self._gauge("num_requests_running", "Answers that have a row of the engine.")
        self._waiting = self._gauge("num_requests_waiting", "Answers that wait for a row.")
        self._cache = self._gauge("kv_cache_usage_perc", "Share of the memory for keys and values in use; 1 is all.")
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens of answers.")
        self._hits = self._counter("prefix_cache_hits", "Pages of text that an earlier request had computed.")
        self._media_hits = self._counter("mm_cache_hits", "Pictures and clips that an earlier request had encoded.")
        self._first = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", SECONDS)
        self._next = self._histogram("inter_token_latency_seconds", "Between two tokens of an answer.", SECONDS)
        self._whole = self._histogram("e2e_request_latency_seconds", "From arrival to the end.", SECONDS)
        self._step_tokens = self._histogram("iteration_tokens_total", "Tokens of a step.", TOKENS)
        self._asked = self._histogram("request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self._given = self._histogram("request_generation_tokens", "Tokens of an answer.", TOKENS)
        self._success = prometheus.Counter(
            "vllm:request_success",
            "Answers that ended.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._found: dict[str, int] = {}

    def _gauge(self, name: str, text: str) -> Any:
        return prometheus.Gauge(f"vllm:{name}", text, ["model_name"], registry=self.registry).labels(self._model)

    def _counter(self, name: str, text: str) -> Any:
        return prometheus.Counter(f"vllm:{name}", text, ["model_name"], registry=self.registry).labels(self._model)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Any:
        made = prometheus.Histogram(f"vllm:{name}", text, ["model_name"], registry=self.registry, buckets=buckets)
        return made.labels(self._model)

    def note_load(self, running: int, waiting: int, free: int, capacity: int, found: Mapping[str, int]) -> None:
        """After a step: answers with and without a row, free units of all, and pages found by kind."""
        self._running.set(running)
        self._waiting.set(waiting)
        self._cache.set(1 - free / capacity if capacity else 0)
        for kind, count in found.items():
            (self._hits if kind == "text" else self._media_hits).inc(count - self._found.get(kind, 0))
            self._found[kind] = count

    def count_step(self, tokens: int) -> None:
        """One step of the engine. Args: tokens: of all its rows."""
        self._step_tokens.observe(tokens)

    def count_prompt(self, tokens: int) -> None:
        """A request's prompt."""
        self._prompt_tokens.inc(tokens)
        self._asked.observe(tokens)

    def count_token(self, seconds: float, first: bool) -> None:
        """A token, so many seconds after the request's arrival or after the token before."""
        self._generation_tokens.inc()
        (self._first if first else self._next).observe(seconds)

    def count_answer(self, tokens: int, seconds: float, reason: str) -> None:
        """The end of an answer: stop, length or abort."""
        self._given.observe(tokens)
        self._whole.observe(seconds)
        self._success.labels(self._model, reason).inc()

    def text(self) -> bytes:
        """The page /metrics."""
        return prometheus.generate_latest(self.registry)
