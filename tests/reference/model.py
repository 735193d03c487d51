"""A slow, plain model written from the recipe alone: one position, one head, one key at a time.

It shares no code with ``nanochat_pl.model`` but the config's fields and the names in the state dict. Everything is
computed in float64; there is no batch, no cache, no fused kernel.
"""

from __future__ import annotations

import math

import torch

EPSILON = torch.finfo(torch.float32).eps


def rms_norm(vector):
    return vector / torch.sqrt(vector.pow(2).mean() + EPSILON)


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def rotate(vector, position, config):
    half = len(vector) // 2
    result = torch.empty_like(vector)
    for i in range(half):
        angle = position / config.rotary_base ** (2 * i / len(vector))
        cos, sin = math.cos(angle), math.sin(angle)
        if config.rotary_bfloat16:
            cos, sin = (float(torch.tensor(number).bfloat16()) for number in (cos, sin))
        result[i] = vector[i] * cos + vector[half + i] * sin
        result[half + i] = -vector[i] * sin + vector[half + i] * cos
    return result


class ReferenceModel:
    """Logits and losses of a single row of tokens."""

    def __init__(self, config, state):
        self.config = config
        self.weights = {name: tensor.double() for name, tensor in state.items()}

    def logits(self, ids):
        """Float64 (T, V) logits of a list of token ids."""
        config, weights = self.config, self.weights
        stream = self.first_layer_inputs(ids)
        start, middle = stream, None
        for layer in range(config.num_layers):
            if config.residual_lambdas:
                keep, again = weights["resid_lambdas"][layer], weights["x0_lambdas"][layer]
                stream = [keep * x + again * x0 for x, x0 in zip(stream, start, strict=True)]
            update = self.attention(layer, [rms_norm(x) for x in stream], ids)
            stream = [x + y for x, y in zip(stream, update, strict=True)]
            stream = [x + self.mlp(layer, rms_norm(x)) for x in stream]
            if layer == config.num_layers // 2:
                middle = stream
        if config.backout:
            stream = [x - weights["backout_lambda"] * kept for x, kept in zip(stream, middle, strict=True)]
        raw = torch.stack([weights["lm_head.weight"][: config.vocab_size] @ rms_norm(x) for x in stream])
        return config.softcap * torch.tanh(raw / config.softcap)

    def losses(self, ids, targets):
        """Nats of each target, 0 where it is negative."""
        result = []
        for row, target in zip(self.logits(ids), targets, strict=True):
            result.append(0.0 if target < 0 else float(torch.log(torch.exp(row).sum()) - row[target]))
        return result

    def first_layer_inputs(self, ids):
        embedded = [rms_norm(self.weights["transformer.wte.weight"][i]) for i in ids]
        channels = self.config.smear_channels
        if channels == 0:
            return embedded
        result = [embedded[0]]
        for now, before in zip(embedded[1:], embedded[:-1], strict=True):
            gate = sigmoid(self.weights["smear_gate.weight"][0] @ now[:channels])
            result.append(now + self.weights["smear_lambda"] * gate * before)
        return result

    def attention(self, layer, stream, ids):
        config = self.config
        keys = [self.keys(layer, x, position) for position, x in enumerate(stream)]
        values = [self.values(layer, x, token) for x, token in zip(stream, ids, strict=True)]
        result = []
        for position, x in enumerate(stream):
            heads = []
            for head in range(config.num_heads):
                query = self.query(layer, head, x, position)
                group = head // (config.num_heads // config.num_kv_heads)
                visible = range(max(0, position - config.windows[layer]), position + 1)
                scores = [query @ keys[key][group] / math.sqrt(config.head_dim) for key in visible]
                shares = [torch.exp(score - max(scores)) for score in scores]
                mixed = sum(share * values[key][group] for share, key in zip(shares, visible, strict=True))
                heads.append(mixed / sum(shares))
            result.append(self.weights[f"transformer.h.{layer}.attn.c_proj.weight"] @ torch.cat(heads))
        return result

    def head_rows(self, layer, which, head):
        size = self.config.head_dim
        return self.weights[f"transformer.h.{layer}.attn.{which}.weight"][head * size : (head + 1) * size]

    def query(self, layer, head, x, position):
        turned = rotate(self.head_rows(layer, "c_q", head) @ x, position, self.config)
        return self.config.qk_scale * rms_norm(turned)

    def keys(self, layer, x, position):
        raw = [self.head_rows(layer, "c_k", head) @ x for head in range(self.config.num_kv_heads)]
        return [self.config.qk_scale * rms_norm(rotate(key, position, self.config)) for key in raw]

    def values(self, layer, x, token):
        config, size = self.config, self.config.head_dim
        values = [self.head_rows(layer, "c_v", head) @ x for head in range(config.num_kv_heads)]
        if layer not in config.value_embedding_layers:
            return values
        gates = self.weights[f"transformer.h.{layer}.attn.ve_gate.weight"]
        embedding = self.weights[f"value_embeds.{layer}.weight"][token]
        for head in range(config.num_kv_heads):
            gate = config.value_gate_scale * sigmoid(gates[head] @ x[: config.value_gate_channels])
            values[head] = values[head] + gate * embedding[head * size : (head + 1) * size]
        return values

    def mlp(self, layer, x):
        inner = self.weights[f"transformer.h.{layer}.mlp.c_fc.weight"] @ x
        return self.weights[f"transformer.h.{layer}.mlp.c_proj.weight"] @ inner.clamp(min=0).pow(2)
