"""Attention, and its two products, straight from tiles: softmax(qK^T)V without dense keys and values.

One call into the C++ library each. Tiles are made in tiles.py; versions for torch.compile are torch_ops.py.
"""

from __future__ import annotations

import math
from ctypes import byref

from kvpack import _native
from kvpack.arrays import TensorLike, as_contiguous, dtype_name, empty, empty_like
from kvpack.tile64 import Tile64, check_tiles, workspace_of

MAX_QUERY_ROWS = 16
"""Most query tokens of one call."""


def multiply_keys(keys: Tile64, q: TensorLike, out: TensorLike | None = None) -> TensorLike:
    """Scores of queries, not scaled: out[b, i, t] = sum over c of q[b, i, c] * K[b div group, t, c].

    Args:
        keys: tiles of kind `key`.
        q: [batches*group, rows, head_dim], float16, bfloat16 or (CPU only) float32; rows 1 to 16, any group. Copied
            where it is not contiguous.
        out: [batches*group, rows, tokens], contiguous, of q's type; None allocates.

    Returns:
        out. Sums are in float32. Nothing is synchronised.

    Raises:
        ValueError: shapes, types or devices that do not fit; both values are shown.

    Source: docs/numerics.md section 3.
    """
    check_tiles("keys", keys)
    return _multiply("keys", keys, q, "q", keys.tokens, out)


def multiply_values(values: Tile64, p: TensorLike, out: TensorLike | None = None) -> TensorLike:
    """Weighted sums of values: out[b, i, c] = sum over t of p[b, i, t] * V[b div group, t, c].

    Args:
        values: tiles of kind `value`.
        p: [batches*group, rows, tokens], as q of multiply_keys.
        out: [batches*group, rows, head_dim], contiguous, of p's type; None allocates.

    Returns:
        out. Sums are in float32. Nothing is synchronised.

    Raises:
        ValueError: shapes, types or devices that do not fit; both values are shown.

    Source: docs/numerics.md section 3.
    """
    check_tiles("values", values)
    return _multiply("values", values, p, "p", values.head_dim, out)


def _multiply(side: str, tiles: Tile64, x: TensorLike, name: str, width: int, out: TensorLike | None) -> TensorLike:
    _require_rank(x, name, 3)
    x = as_contiguous(x)
    out = empty(x, (*x.shape[:2], width), dtype_name(x)) if out is None else out
    workspace = _workspace(x, tiles, x.shape[0] * x.shape[1])
    views = [_native.optional_view(part, what) for part, what in ((x, name), (out, "out"), (workspace, "workspace"))]
    function = getattr(_native.library, f"kvpack_multiply_{side}")
    _native.check(function(tiles.native, *views, _native.stream_of(x)))
    return out


def attend_tile64(
    q: TensorLike,
    keys: Tile64,
    values: Tile64,
    *,
    recent: tuple[TensorLike, TensorLike] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    causal: bool = False,
    out: TensorLike | None = None,
    return_lse: bool = False,
) -> TensorLike | tuple[TensorLike, TensorLike]:
    """Attends over tiles and then a dense recent window.

        out[b, h, i] = sum over t of softmax_t(scale * q[b, h, i] . K[b, h div group, t]) * V[b, h div group, t]

    Args:
        q: [batch, q_heads, rows, head_dim], float16, bfloat16 or (CPU only) float32; rows 1 to 16. Copied where it is
            not contiguous.
        keys: tiles of kind `key`, of batch*kv_heads matrices.
        values: tiles of kind `value`, of the same tokens; their bits may differ from those of keys.
        recent: dense key and value of the newest tokens, [batch, kv_heads, recent_tokens, head_dim] of q's type,
            channels side by side; None where there are none.
        scale: factor of the scores, above 0; None is 1/sqrt(head_dim).
        softcap: scores become softcap * tanh(score / softcap); None leaves them.
        causal: the last `rows` recent tokens are those of the query rows, and a row sees none after its own.
        out: shape and type of q, contiguous; None allocates.
        return_lse: also return the natural log-sum-exp of the scores.

    Returns:
        out, or (out, lse) with lse [batch, q_heads, rows] float32. No tokens at all give 0 and -inf. The same bits in
        every run on one device; nothing is synchronised.

    Raises:
        ValueError: shapes, types or devices that do not fit; both values are shown.
        NotImplementedError: what no implementation does, with what exists.

    Source: docs/numerics.md section 8.
    """
    check_tiles("keys", keys)
    check_tiles("values", values)
    _require_rank(q, "q", 4)
    require_batch(q, keys, values)
    q = as_contiguous(q)
    out = empty_like(q) if out is None else out
    lse = empty(q, q.shape[:3], "float32") if return_lse else None
    batch, q_heads, rows, _ = q.shape
    workspace = _workspace(q, keys, batch * q_heads * rows)
    options = _native.AttendOptions(_factor("scale", scale), _factor("softcap", softcap), int(causal), 0)
    recent_keys, recent_values = (None, None) if recent is None else pair_of(recent)
    named = (
        ("q", q),
        ("recent_keys", recent_keys),
        ("recent_values", recent_values),
        ("out", out),
        ("lse", lse),
        ("workspace", workspace),
    )
    views = {name: _native.optional_view(x, name) for name, x in named}
    _native.check(
        _native.library.kvpack_attend_tile64(
            keys.native,
            values.native,
            views["q"],
            views["recent_keys"],
            views["recent_values"],
            byref(options),
            views["out"],
            views["lse"],
            views["workspace"],
            _native.stream_of(q),
        )
    )
    return (out, lse) if return_lse else out


def _workspace(x: TensorLike, tiles: Tile64, rows: int) -> TensorLike | None:
    """Working memory for `rows` query rows of all heads together."""
    columns = max(1, rows // max(tiles.batches, 1))
    function = _native.library.kvpack_attend_workspace_bytes
    return workspace_of(function, x, tiles.batches, columns, tiles.tokens, tiles.head_dim)


def _factor(name: str, value: float | None) -> float:
    """The C side writes "none given" as 0, so that 0 itself must not come from a caller."""
    if value is None:
        return 0.0
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; it is a finite number above 0, or None")
    return float(value)


def require_batch(q: TensorLike, keys: Tile64, values: Tile64) -> None:
    """Refuses another batch than that of tiles [batch, kv_heads, ..]: the C side sees their product only."""
    for name, leading in (("keys", keys.leading), ("values", values.leading)):
        if len(leading) == 2 and leading[0] != q.shape[0]:
            raise ValueError(f"q has shape {tuple(q.shape)}; {name} are of batch {leading[0]}, kv_heads {leading[1]}")


def pair_of(recent: tuple[TensorLike, TensorLike]) -> tuple[TensorLike, TensorLike]:
    """The recent window as two tensors; refuses anything else."""
    if not isinstance(recent, (tuple, list)) or len(recent) != 2 or any(part is None for part in recent):
        raise TypeError("recent is a pair of dense keys and values, or None")
    return recent[0], recent[1]


def _require_rank(x: TensorLike, name: str, rank: int) -> None:
    _native.view(x, name)
    if len(x.shape) != rank:
        words = {3: "[batches*group, rows, width]", 4: "[batch, q_heads, rows, head_dim]"}[rank]
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected {words}")
