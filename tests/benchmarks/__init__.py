"""Eagleray's speed, always as a ratio to a peer timed in turn with it.

    common.py       the model, the actors, the timing in turn: what the figures share
    results.py      rows of a figure, as JSON and as a table
    step.py         one GRPO step through the actors, as the driver takes it
    grpo_step.py    a step, against TRL's trainer
    overhead.py     a step, against bare sampling and bare backpropagation of the same tokens
    computed.py     tokens the trainer computes, against the tokens that there are
    ahead.py        a step that samples ahead, against the longer of sampling and training
    two_gpus.py     a step with trainer and engines on a GPU each, against colocation and TRL with vLLM's server
    workers.py      SFT and DPO on two workers that cut the model into shards, against one worker
    recovery.py     a kill of each kind of process: until the message, until the same command trains again
    scale.py        the driver's own work by the number of engines, with the actors of idle.py, which do nothing
    shared.py       GRPO trials that share an engine, against the same trials one after another
    sync.py         trainer to engines, against a memory copy and against a file
    decoding.py     sampling after a sync, against the untouched base model
    rollout.py      sampling through the actor, against vLLM alone
    kl.py           the engine's policy against the trainer's, by the way that weights went
    conversations.py generated chat rows, and a dataset job on them
    preparing.py    rows to token ids, against datasets.map

Run with `python -m tests.benchmarks NAME`. A new figure is a module with `run(pairs) -> list[Row]` and a line in
`__main__.FIGURES`.
"""
