"""Training under every stage: the trainer, the data order, the objectives, checkpoints, metrics and the planner.

Objectives: `objectives` (the interface, next tokens), `contrastive`, `video`, `speech` with `distillation`,
`speech_pretraining` (BEST-RQ), `character_ctc`. `adapters` is what the stages with a frozen language model share. A new
objective is one file here that meets `objectives.Objective`; a new metric is a key that its `observe` returns.
"""
