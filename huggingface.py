"""Qwen3 folders of Hugging Face in Flow's terms: what config.json says as the fields of a FlowConfig, the names and the weights.

Flow.from_pretrained reads a folder with these functions; nothing here knows the model itself.
"""

import json
from pathlib import Path

import torch
from torch import Tensor


def hf_name(name: str) -> str:
    """The name of one of Flow's weights in a Qwen3ForCausalLM."""
    for ours, theirs in (
        ("token_embedding.", "model.embed_tokens."),
        ("layers.", "model.layers."),
        (".attn_norm.", ".input_layernorm."),
        (".mlp_norm.", ".post_attention_layernorm."),
        (".attn.", ".self_attn."),
    ):
        name = name.replace(ours, theirs)
    return f"model.{name}" if name == "norm.weight" else name


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ValueError(f"{path} is not JSON ({problem}): download the folder again") from problem
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object: download the folder again")
    return content


def config_from_hf(folder: Path) -> dict:
    """The fields of a FlowConfig from the config.json of a Qwen3 model, old notation or new.

    Raises FileNotFoundError when there is none, ValueError for what Flow cannot do.
    """
    hf = read_json(folder / "config.json")
    if hf.get("model_type") != "qwen3":
        raise ValueError(f"{folder} is a {hf.get('model_type')!r} model, Flow reads model_type 'qwen3' only")
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    if scaled or hf.get("attention_bias") or hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{folder} uses scaled RoPE, attention biases or another activation than SiLU, which Flow does not have")
    n_layer = hf["num_hidden_layers"]
    types = hf.get("layer_types")
    if types is None:  # before layer_types: the layers from max_window_layers on slide, when sliding is switched on at all
        slide_from = hf.get("max_window_layers", 28) if hf.get("use_sliding_window") and hf.get("sliding_window") else n_layer
        types = ["full_attention" if i < slide_from else "sliding_attention" for i in range(n_layer)]
    global_layers = tuple(i for i, kind in enumerate(types) if kind == "full_attention")
    if set(types) - {"full_attention", "sliding_attention"} or len(types) != n_layer:
        kinds = "full_attention and sliding_attention"
        raise ValueError(f"{folder} has layer_types {sorted(set(types))} for {n_layer} layers, Flow knows {kinds}")
    # The usual pattern keeps its short name, so that export and import give the same config.
    every = global_layers[0] + 1 if global_layers else n_layer + 1
    regular = global_layers == tuple(i for i in range(n_layer) if (i + 1) % every == 0)
    return dict(
        vocab_size=hf["vocab_size"],
        n_layer=n_layer,
        n_head=hf["num_attention_heads"],
        n_kv_head=hf.get("num_key_value_heads") or hf["num_attention_heads"],
        d_model=hf["hidden_size"],
        head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        d_ff=hf["intermediate_size"],
        window=hf.get("sliding_window") or hf["max_position_embeddings"],
        global_every=every,
        rope_theta=float(rope.get("rope_theta") or hf.get("rope_theta", 10_000.0)),
        norm_eps=hf["rms_norm_eps"],
        max_seq_len=hf["max_position_embeddings"],
        tie_embeddings=hf.get("tie_word_embeddings", False),
        global_layers=None if regular else global_layers,
    )


def read_weights(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """All weights of a folder's safetensors files, sharded or not, under their Hugging Face names.

    Raises FileNotFoundError when a file is missing, ValueError when one is cut short.
    """
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    weights = {}
    for shard in sorted(set(read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]:
        if not (folder / shard).exists():
            raise FileNotFoundError(f"{folder / shard} is missing: download the folder again")
        try:
            with safe_open(folder / shard, framework="pt") as file:
                weights.update((name, file.get_tensor(name).to(dtype)) for name in file.keys())
        except SafetensorError as problem:
            raise ValueError(f"{folder / shard} is not a whole safetensors file ({problem}): download it again") from problem
    return weights
