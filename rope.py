"""Rotary position embedding (RoPE): turn q and k by an angle proportional to their position.

RoPE is an absolute rotation whose dot product is relative. Position m turns pair i by m theta_i:

    theta_i = base^(-2i/D),  i = 0 .. D/2-1    i counts pairs, D is the dimension of ONE head
    (R_m q) . (R_n k) = q . (R_(n-m) k)        R_m^T R_n = R_(n-m): only the distance n - m is left

    x_i' = x_i cos - y_i sin       interleaved  x0 y0 x1 y1 x2 y2   the paper, Meta's Llama weights
    y_i' = y_i cos + x_i sin       half-split   x0 x1 x2 y0 y1 y2   GPT-NeoX, Hugging Face Llama

Both layouts are one model once the rows of q_proj and k_proj are permuted (to_interleaved); weights
of the other layout run without an error and give wrong scores. RoPE does not extrapolate by itself:
past the trained length the slow pairs reach unseen angles. `scaling` slows pairs: linear, all alike
(position interpolation, PI); yarn and llama3, the slow ones; dynamic, by raising the base (NTK).

Cost     no parameters, a table of 4 T D bytes, 6 flops per pair of each q and k head in EVERY layer
Paper    Su et al. 2021 (RoFormer) sec. 3.2.2; eq. 19, linear; Chen et al. 2023 (PI); Peng et al.
         2023 (YaRN); Press et al. 2021 (ALiBi); Vaswani et al. 2017 sec. 3.5 (sinusoidal)
Run      python rope.py      all claims, two tiny models and figures/rope.png, about 25 s
Left out partial rotation (GPT-NeoX), 2-D positions, LongRoPE, fine-tuning after scaling
"""

import argparse
import math
import pathlib
import sysconfig

import torch
import torch.nn.functional as F

# Shape letters: B sequences, T positions, H heads, D dimension of a head, C = H D.


def rope_table(seq_len, head_dim, base=10000., scaling=None):          # -> 2 x (T, D/2)
    """cos and sin of the angles m theta_i, float32. `scaling` is a Hugging Face rope dict; its
    rope_theta, if any, replaces base. "dynamic" depends on seq_len: keys rotated under a shorter
    table do not fit. ValueError: odd head_dim, unknown rope_type, missing key, partial rotation."""
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim={head_dim} does not split into pairs; make it even")
    scaling = {k: v for k, v in (scaling or {"type": "default"}).items() if v is not None}
    try:
        theta, attention = _frequencies(seq_len, head_dim, base, scaling)
    except KeyError as key:
        raise ValueError(f"scaling {scaling} lacks {key}; look for it in config.json (a length may "
                         "be called max_position_embeddings there)") from None
    angle = torch.outer(torch.arange(seq_len).float(), theta)          # float32, as Hugging Face
    return angle.cos() * attention, angle.sin() * attention


def _frequencies(seq_len, D, base, scaling):           # -> theta (D/2,), factor on cos and sin
    kind = scaling["type" if "rope_type" not in scaling and "type" in scaling else "rope_type"]
    if kind not in ("default", "linear", "dynamic", "yarn", "llama3"):
        raise ValueError(f"rope_type {kind!r} is none of default, linear, dynamic, yarn, llama3")
    if scaling.get("partial_rotary_factor", 1) != 1:
        raise ValueError("partial_rotary_factor must be 1; rotate a slice of x, of width head_dim")
    base = scaling.get("rope_theta", base)             # as in config.rope_parameters
    factor = 1 if kind == "default" else scaling["factor"]
    trained = None if kind in ("default", "linear") else scaling["original_max_position_embeddings"]
    if kind == "dynamic" and seq_len > trained:        # the slowest theta is divided by (...)
        base = base * (factor * seq_len / trained - (factor - 1)) ** (D / max(D - 2, 1))
    theta = 1 / base ** (torch.arange(0, D, 2).float() / D)
    keep, attention = 1, 1.0                           # 1 keeps a theta, 0 divides it by the factor
    if kind == "linear":
        keep = 0
    elif kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]   # turns in `trained`
        keep = ((trained / (2 * math.pi / theta) - low) / (high - low)).clamp(0, 1)
    elif kind == "yarn":
        # The pair index i with trained * theta_i = 2 pi beta: beta turns in the trained length.
        low, high = (D * math.log(trained / (beta * 2 * math.pi)) / (2 * math.log(base))
                     for beta in (scaling.get("beta_fast", 32), scaling.get("beta_slow", 1)))
        if scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, D - 1)
        keep = 1 - ((torch.arange(D // 2) - low) / (high - low or 0.001)).clamp(0, 1)
        heat = 0.1 * math.log(max(factor, 1))          # scores grow by (heat + 1)^2
        m, m_all = scaling.get("mscale"), scaling.get("mscale_all_dim")        # DeepSeek's configs
        m, m_all = (m, m_all) if m and m_all else (1, 0)
        attention = scaling.get("attention_factor") or (m * heat + 1) / (m_all * heat + 1)
    return (1 - keep) * theta / factor + keep * theta, attention


def apply_rope(x, cos, sin, positions=None, interleaved=False):        # (B, H, T, D) -> same
    """Rotate the pairs of x by their position, in float32 or wider; the result has x's dtype.
    positions: (T,) or (B, T) integers, by default 0 .. T-1; needed with a KV cache (a new token is
    not at 0), left padding, packed documents. x as (B, T, H, D) would be rotated by head number.
    ValueError: x not 4-D; table not (rows, D/2), not float32/float64, too short; bad positions."""
    if x.ndim != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}; apply_rope needs (B, H, T, D)")
    B, _, T, D = x.shape
    narrow = cos.dtype not in (torch.float32, torch.float64)         # what module.to() makes of it
    if narrow or cos.shape != sin.shape or cos.ndim != 2 or 2 * cos.shape[1] != D:
        raise ValueError(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)}, {cos.dtype}, must be "
                         f"float32 (rows, D/2) with D={D}; make them with rope_table(rows, {D})")
    if positions is None:
        if T > len(cos):
            raise ValueError(f"x has T={T} positions, the table {len(cos)}; make a longer table")
        cos, sin = cos[:T], sin[:T]
    else:
        if positions.is_floating_point() or positions.shape not in ((T,), (B, T)):
            raise ValueError(f"positions {positions.dtype} {tuple(positions.shape)} must be "
                             f"integers of shape ({T},) or ({B}, {T})")
        # On the CPU only: elsewhere reading the extremes makes every layer wait for the device.
        if B * T and positions.is_cpu and (positions.min() < 0 or positions.max() >= len(cos)):
            raise ValueError(f"positions {positions.min()}..{positions.max()} leave the table of "
                             f"{len(cos)} rows; make a longer table, or clamp the padding to 0")
        cos, sin = (t[positions.long()].unsqueeze(-3) for t in (cos, sin))   # ((B,) 1, T, D/2)
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    axis, layout = (-1, (-1, 2)) if interleaved else (-2, (2, -1))     # where the two of a pair are
    partner = wide.unflatten(-1, layout).roll(1, axis).flatten(-2)
    cos, sin = (torch.stack(t, axis).flatten(-2) for t in ((cos, cos), (-sin, sin)))
    return (wide * cos + partner * sin).to(x.dtype)


def to_interleaved(w, num_heads):                                      # (H D, ...) -> same
    """Rows of a half-split q_proj or k_proj (weight or bias), put in interleaved order."""
    return w.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def to_half_split(w, num_heads):           # the inverse: Meta's Llama weights to Hugging Face's
    return w.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def sinusoidal_table(T, C):                                            # -> (T, C) float32
    """Added to the embeddings. Even columns sin, odd columns cos of position / 10000^(2i/C)."""
    if C % 2:
        raise ValueError(f"C={C} columns do not pair sin with cos; make C even")
    angle = torch.outer(torch.arange(T).double(), 1e4 ** (-torch.arange(0, C, 2).double() / C))
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(1).float()


def alibi_bias(H, T):                                                  # -> (H, T, T) float32
    """-slope_h |i - j| for query i, key j, without a causal mask. Slopes 2^(-8h/H), h = 1 .. H; if
    H is no power of two, the authors take those of the power below, then every second one above.
    """
    n = 2 ** int(math.log2(H))                         # largest power of two <= H
    slopes = [2 ** (-8 * h / n) for h in range(1, n + 1)]
    slopes += [2 ** (-4 * h / n) for h in range(1, 2 * (H - n), 2)]
    return -torch.tensor(slopes)[:, None, None] * (torch.arange(T)[:, None] - torch.arange(T)).abs()


def linear_attention(q, k, v, cos, sin, causal=True):      # q, k (B, H, T, D), v -> (B, H, T, E)
    """sum_n (R_m f(q_m)).(R_n f(k_n)) v_n / sum_n f(q_m).f(k_n), f = elu + 1 (RoFormer eq. 19).
    The rotation follows f, and the denominator has none, so it stays positive. Work T D E, never
    T^2. The causal prefix sums hold T D E numbers, the non-causal sum D E.
    """
    wide = torch.promote_types(v.dtype, torch.float32)     # long sums in bf16 lose small terms
    f_q, f_k, v_wide = F.elu(q.to(wide)) + 1, F.elu(k.to(wide)) + 1, v.to(wide)
    turned_q, turned_k = apply_rope(f_q, cos, sin), apply_rope(f_k, cos, sin)
    if causal:
        state = torch.einsum("bhtd,bhte->bhtde", turned_k, v_wide).cumsum(2)
        top, total = torch.einsum("bhtd,bhtde->bhte", turned_q, state), f_k.cumsum(2)
    else:
        top, total = turned_q @ (turned_k.mT @ v_wide), f_k.sum(2, keepdim=True)
    return (top / (f_q * total).sum(-1, keepdim=True)).to(v.dtype)


def rope_reference(x, angle):                             # (B, H, T, D), (T, D/2) -> same
    """The definition: a pair is the complex number x_i + j y_i; multiply it by e^(j m theta_i)."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.exp(1j * angle)).flatten(-2)


def check(ok, claim, measured):
    """Print one claim with what was measured; stop with exit code 1 if it does not hold."""
    print(f"{'ok  ' if ok else 'FAIL'} {claim:<64} {measured}")
    if not ok:
        raise AssertionError(f"claim does not hold: {claim}: {measured}")


def same(got, want, limit, claim):
    error = (got.double() - want.double()).abs().max().item()
    check(error <= limit, claim, f"{error:.1e} (<= {limit:.0e})")


def demo_rotation():
    torch.manual_seed(0)
    T, D = 37, 16
    q, k, v = torch.randn(3, 2, 3, T, D, dtype=torch.float64)          # each (B, H, T, D)
    theta = 10000 ** (-torch.arange(0, D, 2).double() / D)
    angle = torch.arange(8192.).double()[:, None] * theta
    cos, sin = angle.cos(), angle.sin()                # a float64 table, to judge exactness

    def turn(x, start=0):
        return apply_rope(x, cos, sin, torch.arange(start, start + x.shape[2]))

    for n in (100, 400):
        same(turn(q, n) @ turn(k, n).mT, turn(q) @ turn(k).mT, 1e-12, f"q . k, both moved by {n}")
    same(turn(q).norm(dim=-1), q.norm(dim=-1), 1e-12, "the length of every vector is kept")
    order = to_interleaved(torch.arange(D), 1)         # which half-split entry stands where
    same(to_half_split(order, 1), torch.arange(D), 0, "to_half_split undoes to_interleaved")
    want = rope_reference(q[..., order], angle[:T])
    same(apply_rope(q[..., order], cos, sin, None, True), want, 1e-12, "interleaved = complex form")
    same(turn(q)[..., order], want, 1e-12, "half-split, permuted = complex form")
    full = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)
    rows = [F.softmax(turn(q[:, :, [t]], t) @ turn(k)[:, :, :t + 1].mT / 4, -1) @ v[:, :, :t + 1]
            for t in range(T)]                         # 4 = sqrt(D); the keys were rotated once
    same(torch.cat(rows, 2), full, 1e-12, "decoding token by token = the full forward")
    m = torch.arange(T)
    got = apply_rope(q, cos, sin, torch.stack((m % 20, (m - 5).clamp(min=0))))         # (B, T)
    same(got[0, :, 20:], turn(q[:, :, 20:])[0], 0, "a packed document = the document alone")
    same(got[1, :, 5:], turn(q[:, :, 5:])[1], 0, "a left-padded row = the row alone")
    same(rope_table(8192, D)[0], cos, 1e-3, "cos of the float32 table, 8192 positions = float64")
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 8192}
    turns, slowed = 8192 / (2 * math.pi / theta), _frequencies(1, D, 1e4, llama3)[0] / theta
    same(slowed[[0, -1]], torch.tensor([1, 1 / 8]), 1e-6, f"llama3: {turns[0]:.0f} turns stay, "
         f"{turns[-1]:.1f} are slowed by 8")
    lost = ((angle[:, :1] * theta.bfloat16().double()).cos() - cos).abs().max().item()
    check(lost > 1, "theta cast to bf16: cos is lost by position 8192", f"off by {lost:.1f} (> 1)")
    got = apply_rope(q.bfloat16(), *rope_table(T, D))
    same(got, turn(q.bfloat16().double()), 2**-7, "bf16 x: float32 inside, one rounding at the end")
    f_q, f_k = F.elu(q) + 1, F.elu(k) + 1
    weight = (turn(f_q) @ turn(f_k).mT).tril() / (f_q @ f_k.mT).tril().sum(-1, keepdim=True)
    same(linear_attention(q, k, v, cos, sin), weight @ v, 1e-12, "linear attention = dense T x T")
    first = (m == 0).double()[:, None].expand_as(v)    # v_0 = 1, the others 0
    least = linear_attention(q, k, first, cos, sin).abs().min().item()
    check(least > 1e-6, "every output depends on v_0 (Jacobian not 0)", f"{least:.1e} (> 1e-6)")
    pe = sinusoidal_table(512, D).double()[None, None]                 # pairs (sin, cos): turn back
    moved = apply_rope(pe[:, :, :412], cos, -sin, torch.full((412,), 100), interleaved=True)
    same(moved, pe[:, :, 100:], 1e-5, "sinusoidal PE(m + 100) = PE(m) rotated by 100 theta")


def logits(weights, tokens, table):        # two pre-norm blocks; without a table ALiBi, not RoPE
    x, T = weights[0][tokens], tokens.shape[1]
    mask = torch.full((T, T), -math.inf).triu(1) + (0 if table else alibi_bias(4, T))
    for qkv, out, up, down in (weights[2:6], weights[6:10]):
        q, k, v = (F.layer_norm(x, (64,)) @ qkv).view(-1, T, 3, 4, 16).permute(2, 0, 3, 1, 4)
        if table:
            q, k = apply_rope(q, *table), apply_rope(k, *table)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + y.transpose(1, 2).flatten(2) @ out
        x = x + F.gelu(F.layer_norm(x, (64,)) @ up) @ down
    return F.layer_norm(x, (64,)) @ weights[1]


def nats(weights, data, ends, length, table=None):
    """Mean loss of the 64 bytes up to each end: the SAME bytes whatever the window's length."""
    batch = data[ends - torch.arange(length, -1, -1)]                  # (windows, length + 1)
    return F.cross_entropy(logits(weights, batch[:, :-1], table)[:, -64:].mT, batch[:, -64:])


def train(data, table=None, steps=350):
    torch.manual_seed(0)
    shapes = [(256, 64), (64, 256)] + 2 * [(64, 192), (64, 64), (64, 256), (256, 64)]
    weights = [(torch.randn(shape) * 0.1).requires_grad_() for shape in shapes]
    optimizer = torch.optim.AdamW(weights, 4e-3)
    for _ in range(steps):
        nats(weights, data, torch.randint(64, len(data), (16, 1)), 64, table).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [w.detach() for w in weights]


def demo_length():
    files = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    data, held_out = (torch.tensor(list(b"".join(f.read_bytes() for f in half)))
                      for half in (files[1::2], files[::2]))
    ends = torch.linspace(512, len(held_out) - 1, 32).long()[:, None]
    lengths, ppl, weights = (64, 128, 256, 512), {}, train(data, rope_table(64, 16))
    for name, kind in (("RoPE as trained", "default"), ("RoPE + linear (PI)", "linear"),
                       ("RoPE + dynamic (NTK)", "dynamic"), ("RoPE + YaRN", "yarn")):
        ppl[name] = []
        for n in lengths:
            scaling = {"rope_type": kind, "factor": n / 64, "original_max_position_embeddings": 64}
            table = rope_table(n, 16, scaling=scaling)
            ppl[name].append(nats(weights, held_out, ends, n, table).exp().item())
    weights = train(data)
    ppl["ALiBi"] = [nats(weights, held_out, ends, n).exp().item() for n in lengths]
    print("\nperplexity of the same 2048 held-out bytes; trained at T = 64, 1 seed, no fine-tuning")
    ranges = [f"{n - 64}-{n - 1}" for n in lengths]
    print(f"{'at positions':<22}" + "".join(f"{x:>9}" for x in ranges))
    for name, row in ppl.items():
        print(f"{name:<22}" + "".join(f"{x:9.2f}" for x in row))
    plain, _, ntk, yarn, alibi = ppl.values()
    worse, fixed, flat = plain[3] / plain[0], max(ntk[2], yarn[2]) / plain[2], alibi[3] / alibi[0]
    check(worse >= 2, "RoPE does NOT extrapolate: perplexity at 8x / at 1x", f"{worse:.2f} (>= 2)")
    check(fixed <= 0.8, "NTK and YaRN at 4x / plain RoPE at 4x", f"{fixed:.2f} (<= 0.8)")
    check(flat <= 1.15, "ALiBi at 8x / at 1x", f"{flat:.2f} (<= 1.15)")
    T, C, D = 8192, 4096, 128                          # with 32 query and 8 key heads
    print(f"\ncost, T={T} D={D}   parameters  table bytes   flops per token  growth with T and C")
    print(f"RoPE                {0:>12}  {4 * T * D:>11}  {3 * D * 40:>6} per layer  T C per layer")
    print(f"sinusoidal          {0:>12}  {4 * T * C:>11}  {C:>6} once       T C")
    print(f"learned nn.Embedding{T * C:>12}  {0:>11}  {C:>6} once       T C; no row beyond T")
    print(f"ALiBi, causal mean  {0:>12}  {4 * 32:>11}  {32 * T:>6} per layer  H T^2 per layer")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("skipped: figure (pip install matplotlib)")
    figure, ticks = Figure((8, 4.2), layout="constrained"), (7, 8, 10, 15, 20, 25)
    axes = figure.subplots()
    for (name, row), color in zip(ppl.items(), ("C1", "C4", "C2", "C0", "C3")):
        axes.plot(ranges, row, "o-", color=color)
        axes.annotate(name, (3.08, row[-1]), color=color, va="center")
    axes.set(yscale="log", yticks=ticks, yticklabels=ticks, ylabel="perplexity per byte",
             title="RoPE does not extrapolate by itself", xlabel="positions (trained on 0-63)")
    path = pathlib.Path(__file__).parent / "figures" / "rope.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()          # no flags
    torch.set_num_threads(1)                           # the matrices are too small to share
    demo_rotation()
    demo_length()
