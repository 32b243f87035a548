"""The part of a model that a rank holds to generate with: one stage of a pipeline, shared by tensor-parallel ranks."""

from mm.model import MultimodalModel
from mm.parallel.layout import Layout
from mm.parallel.pipelined_inference import InferenceStage
from mm.parallel.tensor_parallel import check_shared_sizes
from mm.parallel.tensor_parallel_inference import share_for_inference


def part_of_rank(model: MultimodalModel, layout: Layout, device_type: str) -> MultimodalModel:
    """This rank's part of a model, which it takes over; every rank must hold the same weights.

    A part with all layers (`pp` 1) stands in for the model in generation and scoring, if all ranks run it alike.

    Args:
        layout: without data parallelism.

    Raises:
        UserError: more stages than the model has, or `tp` does not divide its heads or channels.
    """
    check_shared_sizes(model, layout.tp)
    if layout.pp > 1:
        model = InferenceStage(model, layout.mesh(device_type)["pp"].get_group())
    if layout.tp > 1:
        share_for_inference(model, layout.mesh(device_type)["tp"].get_group())
    return model
