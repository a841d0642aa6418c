"""The checkpoint in llama.cpp's file format, GGUF.

Names, the order of rows in queries' and keys' weights and the type of the tokenizer are those of llama.cpp's own
convert_hf_to_gguf.py, which cannot be used: it knows tokenizers by a list of hashes of published ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(checkpoint: Path) -> Path:
    """Write `model.gguf` beside the checkpoint's own files, once, and return its path. Needs the package gguf."""
    import gguf

    path = checkpoint / "model.gguf"
    if path.exists():
        return path
    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(checkpoint / "model.gguf.part", "llama")
    _add_shape(writer, config)
    _add_tokenizer(writer, checkpoint)
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        _add_tensor(writer, name, tensor, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (checkpoint / "model.gguf.part").rename(path)


def _add_shape(writer: Any, config: dict[str, Any]) -> None:
    writer.add_name("random weights")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _add_tokenizer(writer: Any, checkpoint: Path) -> None:
    import gguf

    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    special = {token["id"] for token in tokenizer["added_tokens"]}
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([control if i in special else normal for i in range(len(tokens))])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(max(special))
    writer.add_bos_token_id(max(special))
    writer.add_add_bos_token(False)


def _add_tensor(writer: Any, name: str, tensor: Tensor, config: dict[str, Any]) -> None:
    import gguf

    if name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        tensor = _interleaved(tensor, heads)
    if tensor.ndim == 1:
        writer.add_tensor(_gguf_name(name), tensor.float().numpy())  # llama.cpp wants norms in float32
    elif tensor.dtype == torch.bfloat16:
        raw = tensor.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(_gguf_name(name), raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(_gguf_name(name), tensor.float().numpy())


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows for llama.cpp's rotary embedding, whose pairs are neighbours; transformers' lie half a head apart."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _gguf_name(name: str) -> str:
    if not name.startswith("model.layers."):
        plain = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
        return plain[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_LAYER[rest.removesuffix('.weight')]}.weight"
