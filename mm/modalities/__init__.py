"""Modalities: the kinds of input besides text. One file each describes what differs between them.

Adding a modality takes:
1. a file here with its `Modality`, and its entry in `MODALITIES` below: reading, tokens, dummy item, member suffixes;
2. its list of items in `mm.batch.Sample`, and that list with `row_...` in `mm.batch.Batch`;
3. its encoder's and adapter's configurations as fields of `mm.config.ModelConfig`, its token ids beside them, and its
   modules under the same names in `mm.model.MultimodalModel`, which run folders then store;
4. its encoding in `mm.model`: into vision tokens for cross-attention (`vision_contexts`), or into rows of the language
   model's input (`insert_audio_embeddings`).
Collating, moving to a device, checks of placeholders, messages, records, dummy samples and run folders follow from
the description. The order is that of the checks and of a dummy sample's items.
"""

from mm.modalities.audio import AUDIO
from mm.modalities.image import IMAGE
from mm.modalities.modality import MediaLimits, MediaSource, Modality
from mm.modalities.video import VIDEO

MODALITIES = (IMAGE, VIDEO, AUDIO)

__all__ = ["AUDIO", "IMAGE", "MODALITIES", "VIDEO", "MediaLimits", "MediaSource", "Modality"]
