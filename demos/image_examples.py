"""The examples of the image demo's page: random held-out pictures, answers with probabilities, attention maps."""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mm
from mm.batch import blank_pixels
from mm.evaluation.attention_maps import AttentionMaps
from mm.evaluation.evaluate import EvaluationReport
from mm.evaluation.likelihood import answer_log_likelihoods
from mm.records import record_messages, record_pictures
from shards.format import Record
from shards.reader import ShardSet

NUM_EXAMPLES = 4  # pictures of each set


@dataclass(frozen=True)
class Example:
    """A held-out picture and what the model answered.

    Attributes:
        picture: the file, PNG, JPEG or WebP.
        question: None where a caption was asked for.
        reference: the expected answer.
        prediction: the model's answer.
        blind_prediction: its answer to the same question with the picture blanked.
        probability: of exactly this prediction and its end; None where it is empty.
        blind_probability: the same with the picture blanked.
        attention: the maps of the prediction's tokens; None where it is empty.
    """

    picture: bytes
    question: str | None
    reference: str
    prediction: str
    blind_prediction: str
    probability: float | None = None
    blind_probability: float | None = None
    attention: AttentionMaps | None = None


def choose_examples(
    model: mm.MultimodalModel,
    processor: mm.Processor,
    sets: Mapping[str, ShardSet],
    reports: Mapping[str, EvaluationReport],
    count: int = NUM_EXAMPLES,
) -> dict[str, list[Example]]:
    """Random pictures of each set, whether the answers are right or not; the same ones each time.

    Args:
        sets: records by the set's name.
        reports: of each set under its name and, with blanked pictures, under "{name}_blank".
        count: pictures of each set.
    """
    examples: dict[str, list[Example]] = {}
    for name, records in sets.items():
        row_of_id = {record_id: row for row, record_id in enumerate(records.index["id"].to_pylist())}
        blind_predictions = {row["id"]: row["prediction"] for row in reports[f"{name}_blank"].predictions}
        predictions = reports[name].predictions
        examples[name] = []
        for row in random.Random(0).sample(predictions, min(count, len(predictions))):
            record = records[row_of_id[row["id"]]]
            example = Example(
                picture=record_pictures(record)[0],
                question=row["question"] if "messages" in record.json else None,
                reference=row["reference"],
                prediction=row["prediction"],
                blind_prediction=blind_predictions[row["id"]],
                **explain(model, processor, record, row["prediction"]),
            )
            examples[name].append(example)
    return examples


def explain(model: mm.MultimodalModel, processor: mm.Processor, record: Record, prediction: str) -> dict[str, Any]:
    """An answer's probability with the record's picture and with a blank one, and its attention maps, as in `Example`.

    An empty answer has none of them.
    """
    if not prediction:
        return {}
    sample, _ = processor.record_prompt(record)
    tokens = processor.record_answer_tokens(record, [prediction])
    (seeing,), (blind,) = answer_log_likelihoods(model, [sample, blank_pixels(sample)], [tokens, tokens])
    if "messages" in record.json:
        messages = record_messages(record)[:-1]
    else:
        request = {"type": "text", "text": processor.caption_prompt}
        content = [{"type": "image", "image": record_pictures(record)[0]}, request]
        messages = [{"role": "user", "content": content}]
    return {
        "probability": math.exp(seeing),
        "blind_probability": math.exp(blind),
        "attention": mm.attention_maps(model, processor, messages, prediction),
    }
