"""How the umT5 encoder's parameters are stored: by Transformers and in the original repository."""

from __future__ import annotations

from .config import TextConfig
from .weights.entry import Entry

_THEIR_BLOCK = "encoder.block.{}.layer."


def text_entries(config: TextConfig) -> tuple[Entry, ...]:
    """Every parameter of `UMT5Encoder`, once.

    The original's keys are those of `models_t5_umt5-xxl-enc-bf16.pth`.
    """
    dim, hidden = config.dim, config.ffn_dim
    heads = (config.heads, config.head_dim)
    inner = config.heads * config.head_dim

    def scale(name: str, diffusers: str, original: str, layers: int = 0) -> Entry:
        logical = ("layers", None) if layers else (None,)
        return Entry(name, diffusers, original, (dim,), (dim,), layers=layers, logical=logical)

    def layer(name, diffusers, original, shape, stored, axes, logical) -> Entry:
        return Entry(
            f"blocks.{name}",
            f"{_THEIR_BLOCK}{diffusers}.weight",
            f"blocks.{{}}.{original}.weight",
            shape,
            stored,
            axes,
            layers=config.layers,
            logical=("layers", *logical),
        )

    def projection(name: str) -> Entry:
        return layer(
            f"attn.{name}.kernel", f"0.SelfAttention.{name}", f"attn.{name}",
            (dim, *heads), (inner, dim), (1, 0), ("embed", "heads", "head_dim"),
        )  # fmt: skip

    def up(name: str, diffusers: str, original: str) -> Entry:
        return layer(
            f"ffn.{name}.kernel", f"1.DenseReluDense.{diffusers}", f"ffn.{original}",
            (dim, hidden), (hidden, dim), (1, 0), ("embed", "mlp"),
        )  # fmt: skip

    return (
        Entry(
            "embed", "shared.weight", "token_embedding.weight",
            (config.vocabulary, dim), (config.vocabulary, dim), logical=(None, "embed"),
        ),
        scale(
            "blocks.norm1.scale", _THEIR_BLOCK + "0.layer_norm.weight", "blocks.{}.norm1.weight",
            config.layers,
        ),
        projection("q"),
        projection("k"),
        projection("v"),
        layer(
            "attn.out.kernel", "0.SelfAttention.o", "attn.o",
            (*heads, dim), (dim, inner), (1, 0), ("heads", "head_dim", "embed"),
        ),
        layer(
            "attn.bias", "0.SelfAttention.relative_attention_bias", "pos_embedding.embedding",
            (config.buckets, config.heads), (config.buckets, config.heads), (), (None, "heads"),
        ),
        scale(
            "blocks.norm2.scale", _THEIR_BLOCK + "1.layer_norm.weight", "blocks.{}.norm2.weight",
            config.layers,
        ),
        up("gate", "wi_0", "gate.0"),
        up("up", "wi_1", "fc1"),
        layer(
            "ffn.down.kernel", "1.DenseReluDense.wo", "ffn.fc2",
            (hidden, dim), (dim, hidden), (1, 0), ("mlp", "embed"),
        ),
        scale("norm.scale", "encoder.final_layer_norm.weight", "norm.weight"),
    )  # fmt: skip


def text_aliases(config: TextConfig) -> dict[str, str]:
    """Other keys of the same tensors, by the key in the table.

    The embedding of tokens has two names: Transformers writes either, or both.
    """
    return {"shared.weight": "encoder.embed_tokens.weight"}
