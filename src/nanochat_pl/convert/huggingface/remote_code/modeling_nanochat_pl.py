"""A model exported by nanochat-pl, for transformers (``trust_remote_code=True``); needs torch and transformers alone.

A decoder without biases: RMSNorm without parameters, rotary positions before the norm of queries and keys, squared
relu, softcapped logits; and, where the config has them: windows, grouped queries, gated value embeddings, a smear of
the token before, residual factors, backout.

Shapes: B rows, T new positions, S positions in all, C width, H query heads, G key/value heads, D head width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast


class NanoChatPLConfig(PretrainedConfig):
    """The architecture, every number resolved. The defaults are those of no model: a config.json gives them all."""

    model_type = "nanochat_pl"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 512
    padded_vocab_size: int = 512
    hidden_size: int = 64
    intermediate_size: int = 256
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    head_dim: int = 16
    max_position_embeddings: int = 256
    windows: tuple[int, ...] | list[int] = (256, 256)
    rotary_base: float = 100_000.0
    rotary_reach: int = 2560
    rotary_bfloat16: bool = False
    softcap: float = 15.0
    qk_scale: float = 1.0
    smear_channels: int = 0
    backout: bool = False
    residual_lambdas: bool = False
    value_embedding_layers: tuple[int, ...] | list[int] = ()
    value_gate_channels: int = 12
    value_gate_scale: float = 3.0
    use_cache: bool = True
    tie_word_embeddings: bool = False


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, H, D), cos and sin (B, T, 1, D/2); channels d and d + D/2 are a pair."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, config: NanoChatPLConfig, layer: int) -> None:
        super().__init__()
        width, self.head_dim, self.layer = config.hidden_size, config.head_dim, layer
        self.window = config.windows[layer]
        self.scale = config.qk_scale**2 * config.head_dim**-0.5
        self.gate_channels, self.gate_scale = config.value_gate_channels, config.value_gate_scale
        query_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.c_q = nn.Linear(width, query_width, bias=False)
        self.c_k = nn.Linear(width, kv_width, bias=False)
        self.c_v = nn.Linear(width, kv_width, bias=False)
        self.c_proj = nn.Linear(query_width, width, bias=False)
        if layer in config.value_embedding_layers:
            self.ve_gate = nn.Linear(self.gate_channels, config.num_key_value_heads, bias=False)

    def forward(
        self,
        x: Tensor,
        value_embedding: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor,
        cache: DynamicCache | None,
    ) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (-1, self.head_dim)) for linear in (self.c_q, self.c_k, self.c_v))
        if value_embedding is not None:
            gate = self.gate_scale * torch.sigmoid(self.ve_gate(x[..., : self.gate_channels]))
            v = v + gate[..., None] * value_embedding.view_as(v)
        q, k = norm(rotate(q, *rotary)), norm(rotate(k, *rotary))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        grouped = q.size(1) != k.size(1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale, enable_gqa=grouped)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: NanoChatPLConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.c_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config: NanoChatPLConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        x = x + self.attn(norm(x), *context)
        return x + self.mlp(norm(x))


class NanoChatPLForCausalLM(PreTrainedModel, GenerationMixin):
    """The model with its head. Rows of a batch may be padded on either side, as ``attention_mask`` says."""

    config_class = NanoChatPLConfig
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_sdpa = True
    # Factors of whole layers: in bfloat16 they would lose what a model has learnt.
    _keep_in_fp32_modules_strict = {"resid_lambdas", "x0_lambdas", "smear_lambda", "backout_lambda"}  # noqa: RUF012

    def __init__(self, config: NanoChatPLConfig) -> None:
        super().__init__(config)
        width, rows = config.hidden_size, config.padded_vocab_size
        if config.residual_lambdas:
            self.resid_lambdas = nn.Parameter(torch.ones(config.num_hidden_layers))
            self.x0_lambdas = nn.Parameter(torch.zeros(config.num_hidden_layers))
        if config.smear_channels:
            self.smear_lambda = nn.Parameter(torch.zeros(1))
            self.smear_gate = nn.Linear(config.smear_channels, 1, bias=False)
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.zeros(1))
        blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(rows, width), "h": blocks})
        self.lm_head = nn.Linear(width, rows, bias=False)
        kv_width = config.num_key_value_heads * config.head_dim
        self.value_embeds = nn.ModuleDict(
            {str(layer): nn.Embedding(rows, kv_width) for layer in config.value_embedding_layers}
        )
        self._tables: tuple[Tensor, Tensor] | None = None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer["wte"]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer["wte"] = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits float32 (B, T, V), and with ``labels`` (B, T; -100: not counted) the mean loss of the next tokens."""
        _refuse(input_ids, attention_mask, kwargs)
        assert input_ids is not None
        cache = self._cache(past_key_values, use_cache)
        past = cache.get_seq_length() if cache is not None else 0
        total = past + input_ids.size(1)
        if total > self.config.rotary_reach:
            raise ValueError(f"{total} positions: the model's rotary tables end at {self.config.rotary_reach}.")
        if attention_mask is None:
            attention_mask = torch.ones(input_ids.size(0), total, dtype=torch.long, device=input_ids.device)
        if attention_mask.size(1) != total:
            raise ValueError(
                f"attention_mask has {attention_mask.size(1)} positions, with the cache there are {total}."
            )
        real = attention_mask.bool()
        if position_ids is None:
            position_ids = (real.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        x = self._hidden(input_ids, real, position_ids, cache, past)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, kept])[..., : self.config.vocab_size].float()
        logits = self.config.softcap * torch.tanh(logits * (1 / self.config.softcap))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def _hidden(self, ids: Tensor, real: Tensor, positions: Tensor, cache: DynamicCache | None, past: int) -> Tensor:
        """What the head reads: (B, T, C). ``real`` (B, S) is False for padding."""
        config = self.config
        cos, sin = self._rotary_tables(ids.device)
        rotary = cos[positions].unsqueeze(-2), sin[positions].unsqueeze(-2)
        masks = {window: _mask(real, past, window) for window in sorted(set(config.windows))}
        x = first = self._smear(ids, real, cache, past)
        middle = x
        for layer, block in enumerate(cast(nn.ModuleList, self.transformer["h"])):
            if config.residual_lambdas:
                x = self.resid_lambdas[layer] * x + self.x0_lambdas[layer] * first
            embedding = self.value_embeds[str(layer)](ids) if layer in config.value_embedding_layers else None
            x = block(x, embedding, rotary, masks[config.windows[layer]], cache)
            if layer == config.num_hidden_layers // 2:
                middle = x
        if config.backout:
            x = x - self.backout_lambda.to(x.dtype) * middle
        return norm(x)

    def _smear(self, ids: Tensor, real: Tensor, cache: DynamicCache | None, past: int) -> Tensor:
        """Normed embeddings (B, T, C), with a gated share of the token before where the config has a smear.

        So that a cache knows the token before, the ids are kept in one more layer of it: what transformers does to a
        cache (reorder, cut, repeat) it does to all layers.
        """
        x = norm(self.transformer["wte"](ids))
        if not self.config.smear_channels:
            return x
        before = x[:, :1] * 0
        if cache is not None:
            if cache.layers and len(cache.layers) == self.config.num_hidden_layers:
                cache.layers.append(type(cache.layers[0])())
            kept = ids[:, None, :, None]
            seen, _ = cache.update(kept, kept[..., :0], self.config.num_hidden_layers)
            if past:
                before = norm(self.transformer["wte"](seen[:, 0, past - 1 : past, 0]))
        previous = torch.cat([before, x[:, :-1]], dim=1)
        exists = F.pad(real, (1, 0))[:, past : past + ids.size(1), None]
        gate = torch.sigmoid(self.smear_gate(x[..., : self.config.smear_channels]))
        return x + self.smear_lambda.to(x.dtype) * gate * (previous * exists)

    def _cache(self, given: DynamicCache | None, use_cache: bool | None) -> DynamicCache | None:
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if given is None:
            return DynamicCache() if use_cache else None
        if not isinstance(given, DynamicCache):
            raise ValueError(f"{type(given).__name__}: this model works with transformers' DynamicCache only.")
        return given

    def _rotary_tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines (rotary_reach, D/2), made on the CPU in float32 as in the training; kept for later."""
        dtype = cast(nn.Embedding, self.transformer["wte"]).weight.dtype
        if self._tables is None or self._tables[0].device != device or self._tables[0].dtype != dtype:
            # Also where the first use is under inference_mode: a training may follow.
            with torch.inference_mode(False):
                self._tables = self._new_tables(device, dtype)
        return self._tables

    def _new_tables(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        config = self.config
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
        positions = torch.arange(config.rotary_reach, dtype=torch.float32, device="cpu")
        angles = torch.outer(positions, 1.0 / (config.rotary_base**exponents))
        tables = [angles.cos(), angles.sin()]
        if config.rotary_bfloat16:
            tables = [table.bfloat16() for table in tables]
        return tables[0].to(device, dtype), tables[1].to(device, dtype)


def _mask(real: Tensor, past: int, window: int) -> Tensor:
    """bool (B, 1, T, S): each position sees itself and the real ones of the ``window`` positions before it."""
    total = real.size(1)
    queries = torch.arange(past, total, device=real.device)[:, None]
    keys = torch.arange(total, device=real.device)
    band = (keys <= queries) & (keys >= queries - window)
    # Padding sees itself: for a position that sees nothing some kernels give NaN.
    return (band & real[:, None, None, :]) | (keys == queries)


def _refuse(input_ids: Tensor | None, attention_mask: Tensor | None, others: dict[str, Any]) -> None:
    if input_ids is None or others.get("inputs_embeds") is not None:
        raise ValueError("This model reads input_ids; inputs_embeds would not tell it the tokens.")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(f"attention_mask has {attention_mask.dim()} dimensions; it must be (rows, positions).")
    for name in ("output_attentions", "output_hidden_states"):
        if others.pop(name, None):
            raise ValueError(f"{name}: is not supported by this model.")
    for name in ("return_dict", "cache_position", "inputs_embeds"):
        others.pop(name, None)
