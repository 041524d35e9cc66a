"""What usually lies behind a failure, and what helps: a table of what the exception and the log say.

A new cause is an entry of CAUSES. The first that fits counts, so what is more particular stands further up.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Cause:
    """pattern: a regular expression, looked for in the exception, then in why Ray says that the actor died, then in its log.

    A symptom says what happened rather than why, so what is found further on goes before it.
    """

    name: str
    pattern: str
    cause: str
    remedy: str
    symptom: bool = False


CAUSES = (
    Cause(
        "placement",
        r"did not free its bundles|placement group .*(?:infeasible|cannot be)",
        "the cluster has no room: another job holds what this one needs, or a node has not come",
        "`ray status` says who holds what; `eagleray plan` says what this job needs",
    ),
    Cause(
        "gpu-memory",
        r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|No available memory for the cache blocks"
        r"|Free memory on device .* less than desired",
        "a GPU ran out of memory",
        "lower micro_batch_size, sequence_len or trl.max_completion_length, or set gradient_checkpointing: true; "
        "of an engine, change vllm.gpu_memory_utilization or vllm.max_model_len",
    ),
    Cause(
        "shared-memory",
        r"/dev/shm.*No space left|No space left.*/dev/shm|Bus error|SIGBUS",
        "/dev/shm is full: the object store and torch's workers share memory through it",
        "give the container more (docker --shm-size, an emptyDir of medium Memory at /dev/shm), or lower ray.sync_bucket_mib",
    ),
    Cause(
        "disk-full",
        r"No space left on device|\[Errno 28\]|[Dd]isk quota exceeded|OutOfDiskError",
        "a disk is full",
        "make room at output_dir (save_total_limit keeps fewer checkpoints) and in Ray's temporary folder, /tmp/ray",
    ),
    Cause(
        "permission",
        r"PermissionError|Permission denied|Read-only file system",
        "a process may not write, or read, where it wants to",
        "the message names the file: look at its owner and at how the disk is mounted on the actor's node",
    ),
    Cause(
        "host-memory",
        r"running low on memory|\bOutOfMemoryError|[Mm]emory monitor|exceeds the memory usage threshold"
        r"|DefaultCPUAllocator|[Cc]an(?:no|')t allocate memory|\bMemoryError\b|std::bad_alloc",
        "a node ran out of memory, not of its GPUs",
        "lower micro_batch_size, sequence_len or ray.kv_cache_gib, use fewer actors a node (ray.placement: spread), "
        "or nodes with more memory",
    ),
    Cause(
        "port",
        r"[Aa]ddress already in use|EADDRINUSE|errno: 98|[Pp]ort \d+ is already",
        "a port that a process wants is taken by another one, often of an earlier run that has not ended",
        "run again: ports are drawn anew; `ss -ltnp` names who holds one",
    ),
    Cause(
        "gated-model",
        r"GatedRepoError|401 Client Error|403 Client Error|Access to model .* is restricted",
        "the hub does not give this model to you",
        "accept its license on its page, and run `hf auth login` on every node",
    ),
    Cause(
        "model",
        r"is no folder, not in the hub's cache|LocalEntryNotFoundError|RepositoryNotFoundError|OfflineModeIsEnabled"
        r"|is not a local folder and is not a valid model identifier|no file named .*(?:safetensors|pytorch_model)",
        "a model is not there on the node that wanted it",
        "name a folder that all nodes see, or let every node reach the hub or its cache",
    ),
    Cause(
        "module",
        r"ModuleNotFoundError|ImportError: cannot import",
        "a package, or a file of yours, is missing on the node",
        "install the same requirements on every node; files beside the configuration travel with `eagleray submit`",
    ),
    Cause(
        "driver-version",
        r"driver version is insufficient|no kernel image is available|CUDA error: (?:invalid device|no CUDA-capable)",
        "this build of torch or vLLM does not suit the node's GPU or its driver",
        "compare `nvidia-smi` and `python -m torch.utils.collect_env` there; make setup KIND=gpu installs the pinned builds",
    ),
    Cause(
        "gpu-broken",
        r"uncorrectable ECC|device-side assert|CUDA error: (?:an illegal memory access|unspecified launch failure)|Xid",
        "a GPU failed, or a kernel on it did",
        "look at `nvidia-smi -q` and `dmesg` on the node; set CUDA_LAUNCH_BLOCKING=1 to see which call it was",
    ),
    Cause(
        "collective-timeout",
        r"collective operation timeout|Timed out waiting \d+ms|[Ww]ait timeout|BarrierTimeout",
        "a rank waited in a collective for another one that did not come in time",
        "the other ranks' logs say what they did; ddp_timeout gives them longer",
    ),
    Cause(
        "nccl",
        r"NCCL (?:error|WARN)|nccl(?:System|Internal|Unhandled|Remote)\w*Error|ncclInvalidUsage|DistBackendError",
        "the GPUs' ranks could not talk to each other (NCCL)",
        "set NCCL_DEBUG=INFO, and NCCL_SOCKET_IFNAME to the network that joins the nodes; NCCL wants a GPU a rank",
    ),
    Cause(
        "peer",
        r"Connection (?:closed|reset) by peer|Broken pipe",
        "a rank lost another one that had ended before",
        "look at the other ranks in the table of actors: the first one to die says why",
        symptom=True,
    ),
    Cause(
        "sync-proof",
        r"errors\.SyncError",
        "an engine does not serve the policy that the trainer published, or its snapshot did not arrive whole",
        "the message names the engine and the version; run again, and with ray.sync: adapter if it comes again",
    ),
    Cause(
        "reward",
        r"errors\.RewardError(?!.* ended its process)",
        "a reward function, reward model or judge, or trl.rollout_func, gave nothing that can be learned from",
        "call the function on one row by hand; its own message is above, and what it printed is in its log",
    ),
    Cause(
        "checkpoint",
        r"errors\.CheckpointError",
        "a checkpoint is damaged, or output_dir is not the same folder on every node",
        "the message names the file; an older checkpoint goes on with resume_from_checkpoint: FOLDER",
    ),
    Cause(
        "node-lost",
        r"node.{0,90}(?:has died|was terminated|is dead|marked dead|preempted)|NodeDiedError",
        "the node of an actor is gone",
        "see whether it was preempted or restarted; auto_resume_from_checkpoints: true goes on when it is back",
    ),
    Cause(
        "head-lost",
        r"(?:connect to|reach) (?:the )?GCS|GCS .*(?:unavailable|dead)|LocalRayletDiedError|[Rr]aylet.*(?:died|has failed)",
        "Ray itself is gone on this node or on the head",
        "look at raylet.out and gcs_server.out in Ray's folder of logs; start the cluster again, and the job resumes",
    ),
    Cause(
        "silent",
        r"did not answer within",
        "an actor hangs, or its work takes longer than the job allows",
        "its stack is in the dashboard under Actors; ray.rollout_timeout_s gives it longer",
        symptom=True,
    ),
    Cause(
        "segfault",
        r"SIGSEGV|Segmentation fault|SIGABRT|core dumped|Fatal Python error",
        "native code crashed in its process",
        "the end of its log names the library; without CUDA graphs (vllm.enforce_eager: true) an engine has less of it",
    ),
    Cause(
        "reward-ended",
        r"reward \S+ failed on .* ended its process",
        "a reward function takes its process down with it",
        "look for sys.exit and os._exit in it, and for a library that crashes; its log may end with the reason",
        symptom=True,
    ),
    Cause(
        "killed",
        r"Worker exit type: SYSTEM_ERROR",
        "its process was ended from outside: by the kernel when memory ran out, or by somebody (SIGKILL)",
        "`dmesg | grep -i oom` on its node tells which; the report has the node's memory now",
        symptom=True,
    ),
)


# What Ray says of every process that ended by itself: causes that it does not know to be true.
GUESSES = re.compile(r"Some common causes include: \(1\).*")


def likely(*texts: str) -> Cause | None:
    """The cause that fits the first of the texts, unless it is a symptom; None for a failure that the table does not know."""
    known = [GUESSES.sub("", text) for text in texts]
    found = [next((cause for cause in CAUSES if re.search(cause.pattern, text)), None) for text in known]
    causes = [cause for cause in found if cause]
    return next((cause for cause in causes if not cause.symptom), causes[0] if causes else None)
