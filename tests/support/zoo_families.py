"""The families of the zoo: for each decoder-only architecture that a user might bring, what makes it tiny."""

from typing import Any, NamedTuple

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_inner": 48}
WINDOW = {"sliding_window": 5}  # shorter than the texts
HALF = {"layer_types": ["sliding_attention", "full_attention"], **WINDOW}
HEADS = {"head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1, "n_group": 2,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
LATENT = {  # multi-head latent attention: keys longer than values, all heads their own
    "q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "num_key_value_heads": 4, "head_dim": 4,
}  # fmt: skip
MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
MAMBA2 = {**MAMBA, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"], "head_dim": 8,
}  # fmt: skip
LONGROPE = {  # the texts are partly longer than 48 tokens
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4
    },
    "original_max_position_embeddings": 48,
}  # fmt: skip


GEMMA3 = {**SHAPE, **HEADS, **HALF, "query_pre_attn_scalar": 8, "bos_token_id": None, "pad_token_id": None}
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
}  # fmt: skip


class Family(NamedTuple):
    """An architecture of transformers: its name, a checkpoint of it, and what its tiny model's config says."""

    title: str
    model_type: str
    example: str
    config: dict[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        """All of the config but vocabulary and special tokens."""
        return {**SHAPE, **self.config}


FAMILIES = {
    family.title: family
    for family in (
        Family("Llama 2 and 3", "llama", "meta-llama/Llama-3.2-1B-Instruct", {}),
        Family("Mistral", "mistral", "mistralai/Mistral-7B-Instruct-v0.3", WINDOW),
        Family("Ministral", "ministral", "mistralai/Ministral-8B-Instruct-2410", {**HEADS, **HALF}),
        Family("Mixtral", "mixtral", "mistralai/Mixtral-8x7B-Instruct-v0.1", LOCAL),
        Family("Qwen2 and 2.5", "qwen2", "Qwen/Qwen2.5-1.5B-Instruct", {}),
        Family("Qwen2-MoE", "qwen2_moe", "Qwen/Qwen1.5-MoE-A2.7B-Chat",
               {**EXPERTS, "shared_expert_intermediate_size": 16}),
        Family("Qwen3", "qwen3", "Qwen/Qwen3-4B-Instruct-2507", HEADS),
        Family("Qwen3-MoE", "qwen3_moe", "Qwen/Qwen3-30B-A3B-Instruct-2507", {**HEADS, **EXPERTS}),
        Family("Qwen3-Next", "qwen3_next", "Qwen/Qwen3-Next-80B-A3B-Instruct",
               {**EXPERTS, **DELTA, "shared_expert_intermediate_size": 16}),
        Family("Qwen3.5", "qwen3_5_text", "Qwen/Qwen3.5-4B", DELTA),
        Family("Gemma", "gemma", "google/gemma-2b-it", HEADS),
        Family("Gemma 2", "gemma2", "google/gemma-2-2b-it",
               {**HEADS, **HALF, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0}),
        Family("Gemma 3", "gemma3_text", "google/gemma-3-1b-it", {**HEADS, **HALF, "query_pre_attn_scalar": 8}),
        Family("Gemma 3 with images", "gemma3", "google/gemma-3-4b-it",
               {"text_config": GEMMA3, "vision_config": VISION}),
        Family("OLMo", "olmo", "allenai/OLMo-7B-Instruct-hf", {}),
        Family("OLMo 2", "olmo2", "allenai/OLMo-2-1124-7B-SFT", {}),
        Family("OLMo 3", "olmo3", "allenai/Olmo-3-7B-Instruct-SFT", HALF),
        Family("OLMo Hybrid", "olmo_hybrid", "allenai/Olmo-Hybrid-7B", DELTA),
        Family("OLMoE", "olmoe", "allenai/OLMoE-1B-7B-0924-SFT", EXPERTS),
        Family("FlexOlmo", "flex_olmo", "allenai/FlexOlmo-7x7B-1T", EXPERTS),
        Family("Phi 1 and 2", "phi", "microsoft/phi-2", {}),
        Family("Phi-3 and Phi-4-mini", "phi3", "microsoft/Phi-4-mini-instruct", LONGROPE),
        Family("Phi-3.5-MoE", "phimoe", "microsoft/Phi-3.5-MoE-instruct", {**LOCAL, **WINDOW}),
        Family("GPT-2", "gpt2", "openai-community/gpt2", GPT),
        Family("GPT-BigCode", "gpt_bigcode", "bigcode/starcoderbase-1b", GPT),
        Family("GPT-J", "gptj", "EleutherAI/gpt-j-6b", {**GPT, "rotary_dim": 4}),
        Family("GPT-Neo", "gpt_neo", "EleutherAI/gpt-neo-1.3B",
               {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 5}),
        Family("GPT-NeoX, Pythia", "gpt_neox", "EleutherAI/pythia-1b", {}),
        Family("GPT-OSS", "gpt_oss", "openai/gpt-oss-20b", {**HEADS, **HALF, **LOCAL}),
        Family("OPT", "opt", "facebook/opt-1.3b", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
        Family("BLOOM", "bloom", "bigscience/bloomz-1b7", {"n_layer": 2, "n_head": 4}),
        Family("MPT", "mpt", "mosaicml/mpt-7b-chat",
               {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 512, "expansion_ratio": 2}),
        Family("Falcon", "falcon", "tiiuae/falcon-7b-instruct", {}),
        Family("Falcon-H1", "falcon_h1", "tiiuae/Falcon-H1-1.5B-Instruct",
               {**HEADS, **MAMBA2, "mamba_d_ssm": 64}),
        Family("Mamba", "mamba", "state-spaces/mamba-1.4b-hf", {"state_size": 8}),
        Family("Mamba 2", "mamba2", "mistralai/Mamba-Codestral-7B-v0.1",
               {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16}),
        Family("Falcon Mamba", "falcon_mamba", "tiiuae/falcon-mamba-7b-instruct", {"state_size": 8}),
        Family("Jamba", "jamba", "ai21labs/AI21-Jamba-Mini-1.7",
               {**MAMBA, "num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
                "use_mamba_kernels": False}),
        Family("Bamba", "bamba", "ibm-ai-platform/Bamba-9B-v2", {**MAMBA2, "attn_layer_indices": [1]}),
        Family("Nemotron-H", "nemotron_h", "nvidia/Nemotron-H-8B-Base-8K",
               {**HEADS, "layers_block_type": ["mamba", "attention", "mlp", "moe"], "ssm_state_size": 8,
                "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "chunk_size": 16, "n_routed_experts": 4,
                "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16, "use_mamba_kernels": False,
                "num_hidden_layers": 4}),
        Family("LFM2", "lfm2", "LiquidAI/LFM2-1.2B", {"layer_types": ["conv", "full_attention"]}),
        Family("MiniMax", "minimax", "MiniMaxAI/MiniMax-Text-01-hf",
               {**HEADS, **LOCAL, "layer_types": ["linear_attention", "full_attention"], "block_size": 16}),
        Family("Cohere", "cohere", "CohereLabs/c4ai-command-r-v01", {"logit_scale": 0.5}),
        Family("Cohere 2", "cohere2", "CohereLabs/c4ai-command-r7b-12-2024", {**HALF, "logit_scale": 0.5}),
        Family("Granite 3", "granite", "ibm-granite/granite-3.3-2b-instruct", {"logits_scaling": 4.0}),
        Family("GraniteMoE", "granitemoe", "ibm-granite/granite-3.1-1b-a400m-instruct",
               {**LOCAL, "logits_scaling": 4.0}),
        Family("Granite 4", "granitemoehybrid", "ibm-granite/granite-4.0-micro",
               {**MAMBA2, "num_local_experts": 0, "shared_intermediate_size": 48, "layer_types": ["attention"] * 2,
                "logits_scaling": 4.0}),
        Family("Granite 4 Hybrid", "granitemoehybrid", "ibm-granite/granite-4.0-h-tiny",
               {**MAMBA2, **LOCAL, "shared_intermediate_size": 48, "layer_types": ["mamba", "attention"]}),
        Family("DeepSeek V2", "deepseek_v2", "deepseek-ai/DeepSeek-V2-Lite-Chat",
               {**ROUTED, **LATENT, "topk_method": "group_limited_greedy"}),
        Family("DeepSeek V3 and R1", "deepseek_v3", "deepseek-ai/DeepSeek-V3", {**ROUTED, **LATENT}),
        Family("GLM-4", "glm", "zai-org/glm-4-9b-chat-hf", HEADS),
        Family("GLM-4-0414", "glm4", "zai-org/GLM-4-9B-0414", HEADS),
        Family("GLM-4.5", "glm4_moe", "zai-org/GLM-4.5-Air", {**HEADS, **ROUTED}),
        Family("SmolLM3", "smollm3", "HuggingFaceTB/SmolLM3-3B", {"no_rope_layers": [1, 0]}),
        Family("StableLM", "stablelm", "stabilityai/stablelm-2-1_6b-chat", {}),
        Family("Starcoder2", "starcoder2", "bigcode/starcoder2-3b", WINDOW),
        Family("EXAONE 4", "exaone4", "LGAI-EXAONE/EXAONE-4.0-1.2B", HALF),
        Family("Nemotron", "nemotron", "nvidia/Minitron-4B-Base", {}),
        Family("Arcee", "arcee", "arcee-ai/AFM-4.5B", {}),
        Family("Apertus", "apertus", "swiss-ai/Apertus-8B-Instruct-2509", {}),
        Family("ERNIE 4.5", "ernie4_5", "baidu/ERNIE-4.5-0.3B-PT", HEADS),
        Family("ERNIE 4.5 MoE", "ernie4_5_moe", "baidu/ERNIE-4.5-21B-A3B-PT",
               {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 0}),
        Family("Hunyuan", "hunyuan_v1_dense", "tencent/Hunyuan-1.8B-Instruct", HEADS),
        Family("Seed-OSS", "seed_oss", "ByteDance-Seed/Seed-OSS-36B-Instruct", HEADS),
        Family("Helium", "helium", "kyutai/helium-1-2b", HEADS),
        Family("nanochat", "nanochat", "karpathy/nanochat-d32", {}),
        Family("Persimmon", "persimmon", "adept/persimmon-8b-chat", {}),
    )
}  # fmt: skip
AWAY = {  # architectures that are refused
    family.title: family
    for family in (
        Family("BERT", "bert", "google-bert/bert-base-uncased", {"is_decoder": True}),
        Family("ELECTRA", "electra", "google/electra-base-generator", {"is_decoder": True, "embedding_size": 32}),
        Family("RoFormer", "roformer", "junnyu/roformer_chinese_base", {"is_decoder": True, "embedding_size": 32}),
    )
}
