"""Over how many GPUs an engine can cut a model: vLLM deals out its attention heads, to each GPU as many."""

from orchestrator.model_shape import ModelSource, read_config
from orchestrator.schema import JobConfig
from orchestrator.source import Problem


def sizes(heads: int) -> list[int]:
    """The numbers of GPUs by which so many attention heads can be dealt out."""
    return [count for count in range(1, heads + 1) if heads % count == 0]


def ensure_possible(config: JobConfig) -> None:
    """Raises ConfigError for a tensor_parallel_size that the model's heads cannot be dealt out by."""
    size = config.vllm.tensor_parallel_size
    if size == 1:
        return
    heads = int(read_config(ModelSource(config.base_model, config.trust_remote_code)).get_text_config().num_attention_heads)
    if size not in sizes(heads):
        use = ", ".join(map(str, sizes(heads)))
        text = f"is {size}, which does not divide the {heads} attention heads of {config.base_model}; use one of {use}"
        config.source.raise_if_any([Problem("vllm.tensor_parallel_size", text)])
