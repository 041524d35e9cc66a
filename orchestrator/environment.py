"""The environment variables that each role's process starts with: one pure function, so that they can be read and tested."""

from orchestrator.plan import Plan

_ALL = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONWARNINGS": "ignore",
    # Images for containers often set it, and where no byte code was installed each process would compile all of torch and vLLM.
    "PYTHONDONTWRITEBYTECODE": "",
}


def worker_environment(threads: int | None) -> dict[str, str]:
    """Of a Ray Train worker. threads: on CPU."""
    return {**_ALL, **({"OMP_NUM_THREADS": str(threads)} if threads is not None else {})}


def served_environment(plan: Plan, engines: int, kv_cache_gib: int) -> dict[str, str]:
    """Of an engine of `eagleray serve`, of so many that share the machine. kv_cache_gib: on CPU."""
    if plan.gpu:
        return dict(_ALL)
    threads = max(1, (plan.engine_threads or 1) // engines)
    return {
        **_ALL,
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
    }


def actor_environment(role: str, plan: Plan, kv_cache_gib: int | None) -> dict[str, str]:
    """role: trainer | engine | reward."""
    env = dict(_ALL)
    threads = {"trainer": plan.trainer_threads, "engine": plan.engine_threads}.get(role)
    if threads is not None:
        env["OMP_NUM_THREADS"] = str(threads)  # Ray would set it to the CPUs that the actor reserves
    if role == "engine":
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine lives in the actor, where installs can reach it
        if not plan.gpu:
            env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # its threads share the cores with the trainer's
            if kv_cache_gib is not None:
                env["VLLM_CPU_KVCACHE_SPACE"] = str(kv_cache_gib)
    return env
