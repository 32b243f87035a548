"""The prompts that select a speech task (paper §8.2.2); data preparation and inference use the same words."""

TRANSCRIBE = "Repeat after me in"  # continues with the language and a colon: "Repeat after me in English:"
