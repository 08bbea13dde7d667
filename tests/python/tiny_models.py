"""Tiny models with random weights, made from configurations: nothing is downloaded."""

import torch
import transformers

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2")
VOCABULARY = 97
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    # Sharp attention: with the usual 0.02 a random model looks at every token alike and keys hardly matter.
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_model(family: str = "Llama", implementation: str | None = None, **changes):
    """A model of a family with 2 layers and 2 key/value heads for 4 query heads, the same at every call."""
    config = getattr(transformers, f"{family}Config")(**{**_SIZES, **changes})
    if implementation is None:
        implementation = "eager" if family == "Gemma2" else "sdpa"
    config._attn_implementation = implementation
    torch.manual_seed(1)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def make_ids(batch: int = 2, tokens: int = 80) -> torch.Tensor:
    """Token ids [batch, tokens]."""
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits_of(model, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    """Logits [batch, tokens, vocabulary] of one call."""
    return model(ids, **kwargs).logits
