"""The driver: it reads the configuration, plans, starts actors and conducts the loop. It holds refs and headers, no tensors.

    source.py       a YAML file with its line numbers, and overrides
    spelling.py     keys and values with another name or spelling
    matching.py     keys and types against the schema
    schema.py       every key of the dialect, with type and default
    values.py       choices and ranges of single keys
    validate.py     contradictions between keys
    axolotl_keys.py keys of Axolotl that are hints, refused, or other names
    runnable.py     what this version acts on; the tables are in online_keys.py and dataset_keys.py
    config.py       all of that as load() and dump()
    data.py         prompts: reading, checking, dealing to steps
    dataset_files.py the local files that an entry of datasets names
    plan.py         configuration and cluster to roles, bundles and batch arithmetic: a pure function
    description.py  the plan for a person
    dataset_plan.py the same for dataset jobs
    model_shape.py  a model's config.json to numbers of weights
    activations.py  what a micro-batch keeps alive in a model's layers, counted on tensors without data
    head_memory.py  what comes after the layers
    memory.py       all that a rank needs; engine_memory.py: what an engine does
    fit.py          whether that is there, GPU by GPU
    tensor_parallel.py over how many GPUs an engine can cut a model
    hardware.py     machines that a person says, such as 8x80GB, and how large the GPUs of a cluster are
    machines.py     what --cluster means: these, or those that are there
    planning.py     a job on a cluster, and the nearest changes with which it would fit
    plan_command.py eagleray plan; drawing.py: its picture; memory_check.py: its numbers beside measured ones
    sweep_config.py SWEEP.yaml: a base job, a space (space.py) and how it is searched
    sweep_plan.py   how many trials fit at once; sweep_plan_command.py: eagleray sweep --plan
    sweeps.py       a sweep: its folder, and its end; sweep_search.py: Ray Tune's search in between
    trials.py       a trial as Ray Tune sees it; trial_process.py: the job's process
    sweep_results.py what a sweep has found so far; sweep_frame.py: as text; sweep_table.py: while it goes
    sweep_report.py its pictures and its table; sweep_drawing.py: their panels
    api.py          load, plan, run and sweep from Python
    prepare.py      datasets to token ids on disk, by Ray Data; prepared.py: what is there of them then
    row_sources.py  what their rows are read from and how
    sharding.py     deepspeed and fsdp_config, checked and as transformers takes them
    arguments.py    configuration to the arguments of TRL's trainers
    environment.py  the environment each actor starts with
    cluster.py      the only module that starts Ray, placement groups and actors
    waits.py        how the driver waits for them, and what it tells when they fail
    policies.py     published versions, their installs and proofs
    rollouts.py     batches in flight
    rewards.py      reward functions, reward models and judges: what trl.reward_funcs names
    judges.py       the judges of ray.judges, checked and as their actors take them
    conversations.py trl.rollout_func, checked and as the engines take it
    scoring.py      reward calls, with their time limit
    samples.py      what was sampled, on its way to files
    credit.py       rewards to advantages
    tally.py        what sampled groups came to: rewards, advantages, and the numbers of a record
    shares.py       a batch to the shares of the trainer's ranks
    checkpoints.py  output folder: lock, checkpoints, resume
    grpo.py         the loop
    run.py          which shape a job has
    online_job.py   an online job (rl: grpo) from configuration to result
    online_specs.py what its actors are built from
    shared_engines.py engines that several of them share
    dataset_job.py  a dataset job (every other method) from configuration to result
    jobs.py         what both share
    starting_adapter.py the adapter that a job starts from, and whether the job agrees with it
    metrics.py      what a run measures
    wandb_run.py    the same as a run of Weights & Biases
    ray_metrics.py  the same for Prometheus
    display.py      what it shows
    journal.py      what it tells besides: its start, phases, warnings and end
    watch.py        a run under watch: its journal, and its report when it fails
    crash.py        that report
    causes.py       what usually lies behind a failure
    dashboard.py    what Ray's dashboard says of a job, over HTTP
    sightings.py    a run as seen from its folder or from a dashboard
    frame.py        a sighting as text
    top.py          `eagleray top`
    report.py       its curves
    results.py      what it left in its folder, and how that is loaded
    merge.py        its adapter and the base model as one model
    answering.py    engines that answer with it
    chat.py         questions to it
    questions.py    the prompts that it never trained on
    figures.py      before against after, in numbers
    evaluate.py     the base model and it on the same prompts
    served.py       which engines that takes, and what each has
    serve.py        it behind an OpenAI-compatible endpoint
    ray_jobs.py     the same job through Ray's job API: submit, status, logs, stop
    advise.py       from rows to the method that they allow; advised_job.py its job file, advise_report.py what is said of it
    row_sample.py   rows from all over a dataset; row_kinds.py and prompt_rows.py say which methods can use them
    sizing.py       which adapter and how many GPUs
    import_report.py an Axolotl file key by key
    cli.py          the command line

Imports go one way: orchestrator -> actors.
"""
