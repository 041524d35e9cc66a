"""More tokens of prompts at once than vLLM computes in one pass."""

import asyncio
from pathlib import Path

from actors.engine import RolloutEngine
from actors.specs import EngineSpec, ModelSpec, SamplingSpec
from tests.tiny import save_smollm2_llama

PROMPTS = 64


def test_prompts_that_wait_for_their_pass_draw_by_their_seeds(tmp_path: Path) -> None:
    """vLLM would cut the last one of a pass in two, and turn back its generator, which a CPU's cannot do."""
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    model = ModelSpec(save_smollm2_llama(tmp_path, **shape), "float32")
    engine = RolloutEngine(EngineSpec(model, None, "weights", max_model_len=128, max_num_seqs=PROMPTS), [1, 2, 3])
    prompts = [f"{index} times " + "the cat sat on the mat " * 15 for index in range(PROMPTS)]
    tokens = sum(len(engine.tokenizer(prompt)["input_ids"]) for prompt in prompts)
    assert tokens > engine.llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens

    async def together() -> list[list[str]]:
        sampled = await asyncio.gather(*(engine.sample(prompt, SamplingSpec(1, 4), 7) for prompt in prompts))
        return [group.texts for _, group in sampled]

    drawn = asyncio.run(together())
    alone = [asyncio.run(engine.sample(prompt, SamplingSpec(1, 4), 7))[1].texts for prompt in prompts[-4:]]
    engine.llm.llm_engine.engine_core.shutdown()
    assert drawn[-4:] == alone
