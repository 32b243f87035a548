"""How a tokenizer and a chat template fit a language model: their sizes, and the tokens that end an answer."""

import dataclasses
import logging
from typing import TYPE_CHECKING, Protocol

from transformers import PreTrainedTokenizerBase

from foundation.errors import UserError
from mm.chat_template import ChatTemplate
from mm.config import ModelConfig
from mm.convert.report import LoadingReport

if TYPE_CHECKING:
    from mm.model import MultimodalModel

QUESTION, ANSWER = "Which one?", "Number seven, I think."
IMAGE_TOKENS = ("<|image|>", "<image>")  # texts of a picture's token that a tokenizer has beyond the embedding table
NOTE = "stop token "  # how a converter's notes about stop tokens begin; then follow the id, a colon and the reason
CONFIGURED = "the language model's configuration"
ENDS_ANSWER = "the chat template ends an answer with it"
MAX_NAMES = 5  # tokens that a message lists

logger = logging.getLogger(__name__)


class HasStopTokens(Protocol):
    """A processor, as far as `use_stop_tokens` needs it."""

    stop_tokens: tuple[int, ...]
    stop_reasons: dict[int, str]


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> None:
    """Check that each token has a row of the language model's embedding table.

    A tokenizer may be smaller than the table, whose size is often rounded up. A token beyond the table would get one of
    the rows that stand for media. Only the image token of Llama 3.2 Vision is such a token on purpose.

    Raises:
        UserError: the tokenizer is larger; the message names both sizes and the tokens.
    """
    rows = config.language_model.vocab_size
    beyond = {token_id: token for token, token_id in tokenizer.get_vocab().items() if token_id >= rows}
    if beyond.get(config.image_token_id, "") in (*IMAGE_TOKENS, getattr(tokenizer, "image_token", "")):
        beyond.pop(config.image_token_id, None)
    if not beyond:
        return
    names = ", ".join(f"{token} ({token_id})" for token_id, token in sorted(beyond.items())[:MAX_NAMES])
    more = f" and {len(beyond) - MAX_NAMES} more" if len(beyond) > MAX_NAMES else ""
    raise UserError(
        f"the tokenizer has ids up to {max(beyond)}, the language model's embedding table has {rows} rows, without one "
        f"for {names}{more}. Take the tokenizer that belongs to the weights; or remove these tokens from its files, "
        "tokenizer.json and tokenizer_config.json; or resize the table with transformers: "
        "model.resize_token_embeddings(len(tokenizer))"
    )


def find_stop_tokens(
    tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, configured: tuple[int, ...]
) -> dict[int, str]:
    """The tokens that end an answer, each with the reason: the model's own, the tokenizer's eos, the chat template's.

    They often differ. Many GGUF files, and chat models that were trained from a base model, name a token as eos with
    which their chat template ends no turn.

    Args:
        configured: the stop tokens of the language model's configuration; they come first.
    """
    reasons: dict[int, list[str]] = {token: [CONFIGURED] for token in configured}
    if tokenizer.eos_token_id is not None:
        reasons.setdefault(int(tokenizer.eos_token_id), []).append("the tokenizer's eos_token")
    end = end_of_answer(template)
    token = None if end is None else tokenizer.convert_tokens_to_ids(end)
    if isinstance(token, int):
        reasons.setdefault(token, []).append(ENDS_ANSWER)
    return {token: "; ".join(why) for token, why in reasons.items()}


def end_of_answer(template: ChatTemplate) -> str | None:
    """The first control token that a chat template writes after an answer; None without one, which is logged.

    It is looked for at the end of a conversation, then before the next turn.
    """
    is_rendered = False
    answered = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    for messages in (answered, [*answered, *answered]):
        try:
            rendering = template.render(messages, answer_follows=False)
        except UserError:  # the template takes no such conversation; the processor says so where it is used
            continue
        _, answer, after = rendering.text.partition(ANSWER)
        if not answer:  # a template that may leave out text
            continue
        is_rendered = True
        end = len(rendering.text) - len(after)
        found = next((span.name for span in rendering.spans if span.start >= end), None)
        if found is not None:
            return found
    if is_rendered:
        logger.warning(
            "the chat template ends an answer with no control token, so training on it teaches no end of an answer; "
            "answers end at the stop tokens of the configuration and the tokenizer"
        )
    return None


def use_stop_tokens(model: "MultimodalModel", processor: HasStopTokens) -> None:
    """Make a model end its answers at its processor's stop tokens, and add them with the reasons to its report."""
    stop, before = processor.stop_tokens, model.config.language_model.stop_tokens
    language_model = dataclasses.replace(model.config.language_model, stop_tokens=stop)
    model.config = dataclasses.replace(model.config, language_model=language_model)
    model.language_model.config = dataclasses.replace(model.language_model.config, stop_tokens=stop)
    reasons = processor.stop_reasons
    is_reported = False
    for part in (model, model.language_model):
        if isinstance(part.report, LoadingReport):
            part.report, is_reported = _with_reasons(part.report, reasons), True
    if not is_reported and set(stop) != set(before):
        logger.info("\n".join(f"{NOTE}{token}: {reason}" for token, reason in reasons.items()))


def _with_reasons(report: LoadingReport, reasons: dict[int, str]) -> LoadingReport:
    """The report with one note for each stop token. For configured ones it names the files already."""
    notes, files = [], {}
    for note in report.notes:
        start, _, reason = note.partition(": ")
        if start.startswith(NOTE):
            files[start] = reason
        else:
            notes.append(note)
    for token, reason in reasons.items():
        start = f"{NOTE}{token}"
        notes.append(f"{start}: {reason.replace(CONFIGURED, files.get(start, CONFIGURED))}")
    return dataclasses.replace(report, notes=tuple(notes))
