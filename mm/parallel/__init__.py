"""Many processes for one model: process groups, layout, FSDP, tensor parallelism and pipeline, applied from outside.

The model's code knows nothing of this package. Training and inference stand on it; it imports neither.

    process_group.py    the processes that torchrun starts, and the collectives over all of them
    layout.py           how they are arranged: pp x dp_replicate x dp_shard x tp
    tables.py           which modules are split, gathered and checkpointed; the planner reads the same tables
    tensor_parallel.py, fsdp.py, parallelize.py    the parallelism inside one pipeline stage
    tensor_parallel_inference.py    tensor parallelism without gradients, on plain tensors
    pipelined_inference.py          generation in stages, with micro-batches in turn
    inference.py        the part of a model that a rank generates with
    pipeline.py         one rank's stage of a model, to train
    dtensor.py          full tensors and norms of what is sharded
"""
