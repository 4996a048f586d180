"""llama.cpp's names of Llama 4's tensors (spec §6.3), for reading and writing.

Experts are not in the tables: `ffn_gate_exps` and `ffn_up_exps` [E, F, D] are the halves of gate_up_proj [E, D, 2F],
and `ffn_down_exps` [E, D, F] is down_proj [E, F, D].
"""

import re

_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "vision_model.class_embedding": "v.class_embd",
    "vision_model.positional_embedding_vlm": "v.position_embd.weight",
    "vision_model.patch_embedding.linear.weight": "v.patch_embd.weight",
    "vision_model.layernorm_pre.weight": "v.pre_ln.weight",
    "vision_model.layernorm_pre.bias": "v.pre_ln.bias",
    "vision_model.layernorm_post.weight": "v.post_ln.weight",
    "vision_model.layernorm_post.bias": "v.post_ln.bias",
    "vision_model.vision_adapter.mlp.fc1.weight": "mm.model.mlp.1.weight",
    "vision_model.vision_adapter.mlp.fc2.weight": "mm.model.mlp.2.weight",
    "multi_modal_projector.linear_1.weight": "mm.model.fc.weight",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down",
    "feed_forward.router": "ffn_gate_inp",
    "feed_forward.shared_expert.gate_proj": "ffn_gate_shexp",
    "feed_forward.shared_expert.up_proj": "ffn_up_shexp",
    "feed_forward.shared_expert.down_proj": "ffn_down_shexp",
}
_VISION_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_out",
    "input_layernorm": "ln1",
    "post_attention_layernorm": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
_OURS = re.compile(r"(vision_model\.)?model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_THEIRS = re.compile(r"(v\.)?blk\.(\d{1,6})\.(.+)\.(weight|bias)")
_TOP_BACK, _LAYER_BACK, _VISION_BACK = ({v: k for k, v in t.items()} for t in (_TOP, _LAYER, _VISION_LAYER))
# gguf 0.19's table gives Llama 4's second norm a name that was meant for another model.
_VISION_BACK["attn_post_norm"] = "post_attention_layernorm"


def to_gguf(name: str) -> str:
    """llama.cpp's name of a tensor that is stored as it is; experts have none."""
    if name in _TOP:
        return _TOP[name]
    match = _OURS.fullmatch(name)
    assert match is not None, name
    table, prefix = (_VISION_LAYER, "v.") if match[1] else (_LAYER, "")
    return f"{prefix}blk.{match[2]}.{table[match[3]]}.{match[4]}"


def from_gguf(name: str) -> str | None:
    """Our name of a tensor of llama.cpp's; None if it has none, as experts."""
    if name in _TOP_BACK:
        return _TOP_BACK[name]
    match = _THEIRS.fullmatch(name)
    if match is None:
        return None
    table, prefix = (_VISION_BACK, "vision_model.") if match[1] else (_LAYER_BACK, "")
    return f"{prefix}model.layers.{match[2]}.{table[match[3]]}.{match[4]}" if match[3] in table else None


def layer_of_experts(name: str) -> tuple[str, str] | None:
    """Layer and kind (one of EXPERTS) of a tensor of experts."""
    match = _THEIRS.fullmatch(name)
    return (match[2], match[3]) if match and not match[1] and match[3] in EXPERTS and match[4] == "weight" else None
