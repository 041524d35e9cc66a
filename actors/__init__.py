"""What runs on workers: the trainer, the rollout engine, the rewards, and the pieces they share.

    types.py     what travels between actors: rollout groups, snapshots, statistics
    specs.py     what an actor is built from: one frozen spec each
    errors.py    the exceptions of the whole project
    device.py    the only module that knows which accelerator there is
    hub.py       a model's name to a local folder, with SmolLM2 carried along for machines without a hub
    chat.py      messages to tokens
    prompts.py   transforms of rows that come with Eagleray
    model.py     the policy: base model, LoRA, tokenizer; log-probabilities of packed rows
    head.py      log-probabilities out of hidden states on CPUs, in TRL's fused head
    attention.py what completions and documents in a packed row look at
    adapter.py   an adapter in a folder, and a policy that starts from it
    merge.py     an adapter and its base as one model
    packing.py   rollout groups to rows in which a prompt stands once and nothing is padding
    loss.py      GRPO and its relatives, pure functions
    snapshot.py  a policy's tensors to flat buffers and back, with digest and validation
    install.py   a snapshot into vLLM: merged into the weights, as a LoRA slot, or all weights
    storage.py   files that are whole or absent: safetensors and JSON with digests
    states.py    nested states of tensors and plain values as safetensors
    optimizers.py an optimizer's state to a file and back
    sharding.py  FSDP2 and DeepSpeed, where transformers leaves something to do
    network.py   on which interface of a machine ranks meet
    ranks.py     how a trainer's ranks share the model and its gradients
    trainer.py   the actor that learns, one rank of it
    decoder.py   requests to vLLM that are decoded side by side
    conversation.py completions of several turns, played by a function of a person
    turns.py     which job's group is sampled next
    policy.py    what an engine knows of one job's policy
    engine.py    the actor that samples
    measuring.py actors that tell how much memory a trainer, a worker or an engine really needs
    samples.py   the actor that writes down what was sampled
    functions.py functions that the job file names
    rewards.py   the actor that scores with a function
    verifiers.py reward functions that come with Eagleray
    sandbox.py   programs of a code reward, with limits of their own
    cage.py      what the sandbox starts
    reward_model.py the actor that scores with a reward model
    judge.py     the actor that scores by asking a language model
    serving.py   the replicas of Ray Serve that answer clients
    requests.py  who may ask them, and how requests are written for a model
    formats/     dataset rows to token ids, a module a family of types
    reading.py   datasets' files to raw rows, whole or in pieces
    preparing.py pieces of files to prepared rows, on Ray Data's workers
    streaming.py rows that are read while they are trained on
    methods/     SFT, DPO, KTO, ORPO and reward models: TRL's trainer, a file a method
    dataset_loop.py what each Ray Train worker does

An actor never imports the orchestrator: what it needs arrives in its constructor.
"""
