"""Operators of the interpreter around attention: ONNX's own, and those of ONNX Runtime's fused transformer graphs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional

from perwatt.interpreter_operators import operator
from perwatt.interpreter_values import DTYPES

MICROSOFT = "com.microsoft"
RAW, CAPPED, MASKED, PROBABILITIES = range(4)
"""qk_matmul_output_mode: which stage the fourth output shows."""
HALVES = (torch.float16, torch.bfloat16)
FLOAT = 1
"""ONNX's number of float32: the least that fused kernels take their softmax in."""


@operator("Attention", since=23)
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: Any = None, past_key: Any = None,
    past_value: Any = None, nonpad_kv_seqlen: Any = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    left_window_size: int = -1,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int = 0,
    outputs: int = 1,
) -> tuple[Any, ...]:  # fmt: skip
    flat = q.ndim == 3
    if flat:
        q, k, v = _heads(q, q_num_heads), _heads(k, kv_num_heads), _heads(v, kv_num_heads)
    past = 0
    if past_key is not None:
        past = past_key.shape[2]
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    fused = outputs < 4 and not softcap and softmax_precision in (0, FLOAT) and _fused(q)
    plain = attn_mask is None and past_key is None and nonpad_kv_seqlen is None
    if fused and plain and is_causal and left_window_size < 0:
        # torch aligns its causal mask at the top left, which is ONNX's rule where there is no past.
        return _joined(_sdpa(q, k, v, None, factor, True), flat), k, v, None
    right = 0 if is_causal else right_window_size
    allowed = _allowed(q, k, past, nonpad_kv_seqlen, left_window_size, right)
    allowed, bias = _with_mask(allowed, attn_mask, k.shape[2])
    if fused:
        y, stage = _masked_sdpa(q, k, v, allowed, bias, factor), None
    else:
        settings = factor, softcap, softmax_precision, qk_matmul_output_mode
        y, stage = _step_by_step(q, k, v, allowed, bias, *settings)
    return _joined(y, flat), k, v, stage


def _fused(q: torch.Tensor) -> bool:
    """Whether torch's fused kernels may be taken. They keep half types wide between the steps, where ONNX rounds: on
    accelerators that is wanted, on the CPU nothing is gained by it."""
    return q.device.type != "cpu" or q.dtype not in HALVES


def _heads(x: torch.Tensor, count: Any) -> torch.Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def _joined(y: torch.Tensor, flat: bool) -> torch.Tensor:
    return y.transpose(1, 2).flatten(2) if flat else y


def _allowed(q: torch.Tensor, k: torch.Tensor, past: Any, lengths: Any, left: int, right: int) -> Any:
    """Which keys a query may see by its place, None for all. A query's place among the keys is its index plus `past`, or
    in a cache that is kept outside, `lengths` (valid keys of each sample), less the number of queries."""
    queries, keys = q.shape[2], k.shape[2]
    key = torch.arange(keys, device=q.device)
    offset: Any = past
    found: Any = None
    if lengths is not None:
        lengths = lengths.reshape(-1, 1, 1, 1)
        offset = lengths - queries
        found = key < lengths
    if left < 0 and right < 0:
        return found
    place = torch.arange(queries, device=q.device).unsqueeze(-1) + offset
    if left >= 0:
        found = _both(found, key >= place - left)
    return _both(found, key <= place + right) if right >= 0 else found


def _both(one: Any, other: Any) -> Any:
    if one is None or other is None:
        return other if one is None else one
    return one & other


def _with_mask(allowed: Any, mask: Any, keys: Any) -> tuple[Any, Any]:
    """The model's own mask: what it allows, and what it adds. A mask shorter than the keys forbids the rest."""
    if mask is None:
        return allowed, None
    short = keys - mask.shape[-1]
    if mask.dtype is torch.bool:
        padded = functional.pad(mask, (0, short), value=False) if short else mask
        return _both(allowed, padded), None
    return allowed, functional.pad(mask, (0, short), value=-math.inf) if short else mask


def _dead(allowed: Any, bias: Any) -> Any:
    """Queries that may see no key at all: their output is 0. A column; None where there is no mask."""
    open_ = _both(allowed, None if bias is None else bias > -math.inf)
    return None if open_ is None else ~open_.any(-1, keepdim=True)


def _four(mask: Any) -> Any:
    """With an axis each for batch, heads, queries and keys."""
    return mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape)) if mask is not None and mask.ndim < 4 else mask


def _sdpa(q: Any, k: Any, v: Any, mask: Any, factor: float, causal: bool) -> Any:
    if q.shape[1] == k.shape[1]:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=factor)
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=factor, enable_gqa=True
    )


def _masked_sdpa(q: Any, k: Any, v: Any, allowed: Any, bias: Any, factor: float) -> Any:
    dead = _dead(allowed, bias)
    if dead is None:
        return _sdpa(q, k, v, None, factor, False)
    # Rows that see nothing get to see everything and are zeroed afterwards: neither NaN nor its gradient can arise.
    mask = (allowed | dead) if bias is None else bias.to(q.dtype).masked_fill(dead, 0.0)
    if bias is not None and allowed is not None:
        mask = mask.masked_fill(~(allowed | dead), -math.inf)
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    y = _sdpa(q, k, v, _four(mask).expand(shape), factor, False)
    return y.masked_fill(_four(dead), 0.0)


def _step_by_step(
    q: Any, k: Any, v: Any, allowed: Any, bias: Any, factor: float, softcap: float, precision: int, mode: int
) -> tuple[Any, Any]:
    """Attention whose stages can be seen: the output and the stage that `mode` asks for."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) if x.shape[1] != q.shape[1] else x for x in (k, v))
    root = torch.tensor(math.sqrt(factor), dtype=q.dtype, device=q.device)  # rounded to the type, as ONNX has it
    stages = {RAW: torch.matmul(q * root, (k * root).transpose(-1, -2))}
    stages[CAPPED] = softcap * torch.tanh(stages[RAW] / softcap) if softcap else stages[RAW]
    scores = stages[CAPPED] if bias is None else stages[CAPPED] + bias.to(q.dtype)
    stages[MASKED] = scores if allowed is None else scores.masked_fill(~allowed, -math.inf)
    scores = stages[MASKED].to(DTYPES[precision] if precision else q.dtype)
    dead = _dead(allowed, bias)
    found = _softmax(scores) if dead is None else _softmax(scores.masked_fill(dead, 0.0)).masked_fill(dead, 0.0)
    stages[PROBABILITIES] = found.to(q.dtype)
    return torch.matmul(stages[PROBABILITIES], v), stages[mode]


def _softmax(scores: torch.Tensor) -> torch.Tensor:
    """Of half types step by step in the type, as the specification's function body does."""
    if scores.dtype not in HALVES or scores.shape[-1] == 0:
        return torch.softmax(scores, -1)
    raised = torch.exp(scores - scores.amax(-1, keepdim=True))
    return raised / raised.sum(-1, keepdim=True)


@operator("RotaryEmbedding", since=23)
def rotary_embedding(
    x: torch.Tensor,
    cos_cache: torch.Tensor,
    sin_cache: torch.Tensor,
    position_ids: Any = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> torch.Tensor:
    flat = x.ndim == 3
    heads = x.unflatten(-1, (num_heads, -1)) if flat else x.transpose(1, 2)
    turned, kept = heads, None
    if rotary_embedding_dim:
        turned, kept = heads[..., :rotary_embedding_dim], heads[..., rotary_embedding_dim:]
    if position_ids is not None:
        cos_cache, sin_cache = (functional.embedding(position_ids, cache) for cache in (cos_cache, sin_cache))
    cos, sin = cos_cache.unsqueeze(2), sin_cache.unsqueeze(2)
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    real, imaginary = cos * first - sin * second, sin * first + cos * second
    turned = torch.stack([real, imaginary], -1).flatten(-2) if interleaved else torch.cat([real, imaginary], -1)
    found = turned if kept is None else torch.cat([turned, kept], -1)
    return found.flatten(2) if flat else found.transpose(1, 2)


@operator("Gelu", since=1, domain=MICROSOFT)
def gelu(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x)


@operator("BiasGelu", since=1, domain=MICROSOFT)
def bias_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x + bias)


@operator("FastGelu", since=1, domain=MICROSOFT)
def fast_gelu(x: torch.Tensor, bias: Any = None) -> torch.Tensor:
    return functional.gelu(x if bias is None else x + bias, approximate="tanh")


@operator("QuickGelu", since=1, domain=MICROSOFT)
def quick_gelu(x: torch.Tensor, *, alpha: float = 1.702) -> torch.Tensor:
    return x * torch.sigmoid(alpha * x)


@operator("SkipLayerNormalization", since=1, domain=MICROSOFT)
def skip_layer_normalization(
    x: torch.Tensor,
    skip: torch.Tensor,
    gamma: torch.Tensor,
    beta: Any = None,
    bias: Any = None,
    *,
    epsilon: float = 1e-12,
    outputs: int = 1,
) -> tuple[Any, ...]:
    """Output, mean, inverse standard deviation, and the sum that was normalized."""
    total = _sum(x, skip, bias)
    found, mean, inverse = old_layer_normalization(total, gamma, beta, epsilon=epsilon, outputs=outputs)
    return found, mean, inverse, total


@operator("SkipSimplifiedLayerNormalization", since=1, domain=MICROSOFT)
def skip_simplified_layer_normalization(
    x: torch.Tensor,
    skip: torch.Tensor,
    gamma: torch.Tensor,
    bias: Any = None,
    *,
    epsilon: float = 1e-12,
    outputs: int = 1,
) -> tuple[Any, ...]:
    """As SkipLayerNormalization, by the root of the mean square; no mean."""
    total = _sum(x, skip, bias)
    found, inverse = _by_mean_square(total, [-1], epsilon)
    return found * gamma, None, inverse, total


def _sum(x: torch.Tensor, skip: torch.Tensor, bias: Any) -> torch.Tensor:
    """`skip` may be smaller: one for the whole batch, or without a batch axis."""
    total = x + skip
    return total if bias is None else total + bias


@operator("EmbedLayerNormalization", since=1, domain=MICROSOFT)
def embed_layer_normalization(
    input_ids: torch.Tensor, segment_ids: Any, words: torch.Tensor, positions: torch.Tensor, segments: Any,
    gamma: torch.Tensor, beta: torch.Tensor, mask: Any = None, position_ids: Any = None,
    *,
    epsilon: float = 1e-12,
    mask_index_type: int = 0,
    outputs: int = 1,
) -> tuple[Any, ...]:  # fmt: skip
    """Output, the count of each row's mask, and the sum of embeddings that was normalized."""
    where = (
        functional.embedding(position_ids, positions) if position_ids is not None else positions[: input_ids.shape[1]]
    )
    total = functional.embedding(input_ids, words) + where
    if segment_ids is not None:
        total = total + functional.embedding(segment_ids, segments)
    counts = input_ids.new_zeros(input_ids.shape[0]) if mask is None else mask.sum(1)
    return functional.layer_norm(total, total.shape[-1:], gamma, beta, epsilon), counts.to(torch.int32), total


@operator("LayerNormalization", since=1)
def old_layer_normalization(
    x: torch.Tensor,
    scale: torch.Tensor,
    bias: Any = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    outputs: int = 1,
) -> tuple[Any, ...]:
    """What ONNX Runtime's optimizer writes into models that are older than ONNX's own (opset 17)."""
    axes = list(range(axis % x.ndim, x.ndim))
    mean = inverse = None
    if outputs > 1:
        variance, mean = torch.var_mean(x.float(), axes, correction=0, keepdim=True)
        inverse = torch.rsqrt(variance + epsilon)
    return functional.layer_norm(x, x.shape[axes[0] :], scale, bias, epsilon), mean, inverse


@operator("SimplifiedLayerNormalization", since=1)
def simplified_layer_normalization(
    x: torch.Tensor,
    scale: torch.Tensor,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    outputs: int = 1,
) -> tuple[Any, ...]:
    """ONNX Runtime's, in the standard domain too; ONNX calls it RMSNormalization."""
    found, inverse = _by_mean_square(x, list(range(axis % x.ndim, x.ndim)), epsilon)
    return found * scale, inverse


def _by_mean_square(x: torch.Tensor, axes: list[int], epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(axes, keepdim=True) + epsilon)
    return (wide * inverse).to(x.dtype), inverse
