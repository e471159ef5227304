"""FlashAttention: exact attention, tile by tile, so that the T x T score matrix never exists.

    s_tj = scale q_t . k_j     lse_t = log sum_j exp(s_tj)     o_t = sum_j exp(s_tj - lse_t) v_j

           k_0 v_0    k_1 v_1    k_2 v_2
    q_0    diagonal      .          .        One (m, l, o) per query walks along the keys: merge()
    q_1    full       diagonal      .        adds a tile; o / l and lse = m + log l remain. Causal:
    q_2    full       full       diagonal    tiles marked . are skipped, diagonal ones are masked.

Cost     FLOPs stay O(T^2 D): the same in the forward; 7 matrix products instead of 6 with the
         backward, which computes P = exp(s - lse) again. Memory beyond inputs and output: O(T), not
         O(T^2) (Dao 2022, theorem 1). A GPU gains speed because less crosses its main memory, HBM:
         Theta(T^2 D^2 / M) elements, M fitting on chip, not Theta(T D + T^2) (theorem 2). The tiles
         here explain that and save the memory; SDPA and flash_triton.py are fused, so faster.
Paper    Dao et al. 2022, FlashAttention (its forward has keys in the outer loop); Dao 2023,
         FlashAttention-2, algorithms 1 and 2 (queries: each o is written once); Milakov and
         Gimelshein 2018, online softmax. GPT-3 (May 2020) and PaLM (April 2022) came out before the
         first of Dao's papers (May 2022) and did not use it.
Run      python flash_attn.py            claims and figures/flash_attn.png, about 6 s
         python flash_attn.py --bench    milliseconds and TFLOP/s of all backends
Left out dropout, second derivatives, sliding windows, packed documents.
"""

import argparse
import itertools
import math
import pathlib

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend as Kind, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer

try:
    import flash_triton                                     # the same algorithm as GPU kernels
except ImportError:                                         # no Triton, or this file stands alone
    flash_triton = None

# Shape letters: B batch, H query heads, N key heads (N divides H), T positions (Tq queries, Tk
# keys), D head dim, R rows of a query block = `block` positions of the H / N heads of one key head.


def attention_reference(q, k, v, causal=True, scale=None):
    """Dense attention: all scores, one mask, one softmax. What flash_attention must equal."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)         # (B, H, Tq, Tk)
    Tq, Tk = s.shape[-2:]                                   # causal: the last query sees every key
    hidden = torch.ones_like(s, dtype=torch.bool).triu(Tk - Tq + 1 if causal else Tk)
    p = s.masked_fill(hidden, -math.inf).softmax(-1)
    return p.masked_fill(hidden, 0) @ v                     # a row without keys: 0, not NaN


def partial(s, v):            # (.., R, keys), (.., keys, D) -> m, l (.., R, 1), o (.., R, D)
    """Softmax over some keys, undivided: m = max s, l = sum exp(s - m), o = sum exp(s - m) v.
    Without m, exp would overflow: float32 ends at exp(88)."""
    m = s.amax(-1, keepdim=True)
    p = (s - m.masked_fill(m == -math.inf, 0)).exp()        # no key: exp(-inf - 0) = 0, not NaN
    return m, p.sum(-1, keepdim=True), p @ v


def merge(a, b):
    """Join the partial results of two disjoint sets of keys; any order and nesting will do.

    exp(s - m_a) exp(m_a - m) = exp(s - m): with m = max(m_a, m_b), the factor exp(m_a - m) <= 1
    turns l_a and o_a into sums that refer to m. The same for b; then they add."""
    (m_a, l_a, o_a), (m_b, l_b, o_b) = a, b
    m = torch.maximum(m_a, m_b)
    finite = m.masked_fill(m == -math.inf, 0)               # no key in either: not exp(-inf + inf)
    scale_a, scale_b = (m_a - finite).exp(), (m_b - finite).exp()
    return m, scale_a * l_a + scale_b * l_b, scale_a * o_a + scale_b * o_b


def block_of(x, start, block, N):                           # (B, H or N, T, D) -> (B, N, rows, D)
    """`block` positions in float32 (float64 stays). Query heads of a group become rows of their
    key head: k and v are not repeated, and the products for dk and dv sum over the group."""
    x = x[:, :, start:start + block]
    return x.reshape(len(x), N, -1, x.shape[3]).to(torch.promote_types(x.dtype, torch.float32))


def score_tile(q_i, k_j, diagonal, group, scale):           # -> (B, N, R, keys)
    """Scores of one tile; row r of each query head sees the columns <= r + diagonal."""
    s = scale * (q_i @ k_j.mT)
    if diagonal < s.shape[3] - 1:                           # else every row sees the whole tile
        heads = s.unflatten(2, (group, -1))                 # a view: (B, N, group, rows, keys)
        heads.masked_fill_(torch.ones_like(heads, dtype=torch.bool).triu(diagonal + 1), -math.inf)
    return s


class TiledAttention(torch.autograd.Function):
    """FlashAttention-2 in plain PyTorch. Query t sees the keys j <= t + shift."""

    @staticmethod
    def forward(ctx, q, k, v, shift, scale, block):         # algorithm 1
        (B, N, Tk, D), (H, Tq) = k.shape, q.shape[1:3]
        o = torch.empty_like(q)
        lse = q.new_empty(B, H, Tq, 1, dtype=torch.promote_types(q.dtype, torch.float32))
        for i in range(0, Tq, block):
            q_i = block_of(q, i, block, N)
            zero = torch.zeros_like(q_i)
            state = zero[..., :1] - math.inf, zero[..., :1], zero            # no key seen yet
            for j in range(0, min(Tk, i + block + shift), block):            # up to the diagonal
                s = score_tile(q_i, block_of(k, j, block, N), i + shift - j, H // N, scale)
                state = merge(state, partial(s, block_of(v, j, block, N)))
            m, l, o_i = state                               # l >= 1, but 0 in a row without keys,
            lse_i = (m + l.log()).masked_fill(l == 0, math.inf)   # whose P is then exp(-inf) = 0
            lse[:, :, i:i + block] = lse_i.reshape(B, H, -1, 1)
            o[:, :, i:i + block] = (o_i / l.clamp(min=1)).reshape(B, H, -1, D)
        ctx.save_for_backward(q, k, v, o, lse)              # linear in T: neither scores nor P
        ctx.settings = shift, scale, block
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):                                  # algorithm 2
        (q, k, v, o, lse), (shift, scale, block) = ctx.saved_tensors, ctx.settings
        (B, N, Tk, D), (H, Tq) = k.shape, q.shape[1:3]
        # Softmax: ds = p * (dp - delta) with delta = sum_j p_j dp_j = do . o, the paper's D.
        delta = (do.to(lse.dtype) * o).sum(-1, keepdim=True)                 # (B, H, Tq, 1)
        dq, dk, dv = torch.zeros_like(q, dtype=lse.dtype), torch.empty_like(k), torch.empty_like(v)
        with torch.autocast(do.device.type, enabled=False):                  # as in the forward
            for j in range(0, Tk, block):
                k_j, v_j = block_of(k, j, block, N), block_of(v, j, block, N)
                dk_j, dv_j = torch.zeros_like(k_j), torch.zeros_like(v_j)
                for i in range(max(0, j - shift) // block * block, Tq, block):
                    q_i, do_i, lse_i, delta_i = (block_of(x, i, block, N)
                                                 for x in (q, do, lse, delta))
                    p = (score_tile(q_i, k_j, i + shift - j, H // N, scale) - lse_i).exp()
                    dv_j += p.mT @ do_i
                    ds = scale * p * (do_i @ v_j.mT - delta_i)
                    dk_j += ds.mT @ q_i
                    dq[:, :, i:i + block] += (ds @ k_j).reshape(B, H, -1, D)
                dk[:, :, j:j + block], dv[:, :, j:j + block] = dk_j, dv_j
        return dq.to(q.dtype), dk, dv, None, None, None


def flash_attention(q, k, v, causal=True, scale=None, backend=None, block=128):
    """q (B, H, Tq, D), k and v (B, N, Tk, D) -> (B, H, Tq, D) in q's dtype; scale None = D ** -0.5.

    Causal is aligned bottom-right: the last query sees every key, as decoding with a KV cache
    needs. A query without keys gives 0. backend: "triton"; "torch", the tiles above, of `block`
    positions; "sdpa"; None: triton for half precision on a GPU that it can use, else sdpa.
    ValueError: shapes or dtypes do not fit; unknown or impossible backend; block or scale <= 0."""
    # To the type that a product has here: under autocast a lower one. SDPA does the same.
    q, k, v = (x.to((x.new_empty(0, 1) @ x.new_empty(1, 0)).dtype) for x in (q, k, v))
    if not (q.ndim == k.ndim == 4 and k.shape == v.shape and q.shape[::3] == k.shape[::3]
            and k.shape[1] and q.shape[1] % k.shape[1] == 0 and q.dtype == k.dtype == v.dtype):
        got = ", ".join(f"{n} {tuple(x.shape)} {x.dtype}" for n, x in zip("qkv", (q, k, v)))
        raise ValueError(f"{got} do not fit: pass q as (B, H, Tq, D), k and v as (B, N, Tk, D), "
                         "with H a multiple of N, all of one dtype")
    (H, Tq, D), (N, Tk) = q.shape[1:], k.shape[1:3]
    scale = D ** -0.5 if scale is None else scale
    if backend not in (None, "triton", "sdpa", "torch") or block < 1 or not 0 < scale < math.inf:
        raise ValueError(f'{backend=}, {block=}, {scale=}: pass triton, sdpa, torch or None; a '
                         'block >= 1; a scale > 0')
    if backend == "triton" and flash_triton is None:
        raise ValueError('backend="triton" needs flash_triton.py beside this file, and Triton')
    half = backend is None and q.is_cuda and q.element_size() == 2 and flash_triton is not None
    if backend == "triton" or half and flash_triton.obstacle(q, k, v, scale) is None:
        return flash_triton.attention(q, k, v, causal, scale)
    if backend == "torch" and q.numel():                    # for no query the tiles have no size
        shift = Tk - Tq if causal else Tk                   # Tk: every query sees every key
        # Autocast, torch's or one made of a torch function mode, would make the products bf16.
        with torch.autocast(q.device.type, enabled=False), torch._C.DisableTorchFunction():
            return TiledAttention.apply(q, k, v, shift, scale, block)
    # SDPA aligns is_causal top-left, so it is right for Tq == Tk only.
    blind = max(0, Tq - Tk) if causal else 0                # queries without keys: cut, then padded
    mask = (torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)
            if causal and 1 < Tq < Tk else None)            # a single query sees every key
    if q.is_cuda and q.element_size() > 2 and H != N:   # no fused kernel of float32 knows groups
        k, v = (x.repeat_interleave(H // N, 1) for x in (k, v))
    o = F.scaled_dot_product_attention(q[:, :, blind:], k, v, mask, scale=scale,
                                       enable_gqa=H != k.shape[1], is_causal=causal and Tq >= Tk)
    return F.pad(o, (0, 0, blind, 0)) if blind else o


METHODS = {"dense": attention_reference,
           "tiles": lambda *qkv, **options: flash_attention(*qkv, backend="torch", **options),
           "sdpa": lambda *qkv, **options: flash_attention(*qkv, backend="sdpa", **options)}


def check(ok, claim, measured):
    """Print one claim with what was measured; stop with exit code 1 if it does not hold."""
    print(f"{'ok  ' if ok else 'FAIL'} {claim:<64} {measured}")
    if not ok:
        raise AssertionError(f"claim does not hold: {claim}: {measured}")


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operator returned while the mode was on. Elements that
    cross HBM: of products and softmax, if each reads and writes there; of tiles (positions cut)."""
    nbytes = whole = tiles = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            self.nbytes = max(self.nbytes, t.nbytes if torch.is_tensor(t) else 0)
        if func in (torch.ops.aten.bmm.default, torch.ops.aten._softmax.default):
            self.whole += sum(t.numel() for t in (*args, out) if torch.is_tensor(t))
        if func is torch.ops.aten.slice.Tensor and args[1] == 2:
            self.tiles += out.numel()
        return out


def inputs(B, H, N, Tq, Tk, D, **options):                  # -> q, k, v
    shapes = (B, H, Tq, D), (B, N, Tk, D), (B, N, Tk, D)
    return [torch.randn(s, requires_grad=True, **options) for s in shapes]


def demo():
    torch.manual_seed(0)
    s = torch.tensor([[2, 1, 4, 3, 0, 5]]).double()
    v = torch.tensor([[1, 2, 3, 4, 5, 6]]).double().mT
    a, b, c = (partial(s[:, j:j + 2], v[j:j + 2]) for j in (0, 2, 4))
    print("online softmax of one query: scores 2 1 | 4 3 | 0 5, values 1 2 | 3 4 | 5 6")
    for n, state in enumerate((a, merge(a, b), merge(merge(a, b), c))):
        m, l, o = (x.item() for x in state)
        print(f"     blocks 0..{n}: m = {m:.0f}  l = {l:.4f}  o = {o:.4f}  o / l = {o / l:.4f}")
    orders = merge(merge(a, b), c), merge(a, merge(b, c)), merge(merge(c, a), b)
    error = torch.stack([o / l - s.softmax(-1) @ v for _, l, o in orders]).abs().max().item()
    check(error <= 1e-14, "o / l, merged in any order = softmax(s) @ v", f"{error:.0e} (<= 1e-14)")

    cases = {"causal, T = 100, tiles of 32": (6, 100, 100, True),
             "not causal": (6, 100, 100, False),
             "6 query heads on 2 key heads": (2, 100, 100, True),
             "37 queries after 63 cached keys": (2, 37, 100, True),
             "100 queries on 37 keys: 63 rows are 0": (2, 100, 37, True)}
    for name, (N, Tq, Tk, causal) in cases.items():
        qkv = inputs(2, 6, N, Tq, Tk, 16, dtype=torch.float64)
        do, results = torch.randn_like(qkv[0]), []
        for method, options in ("dense", {}), ("tiles", {"block": 32}), ("sdpa", {}):
            o = METHODS[method](*qkv, causal=causal, **options)
            results.append([o, *torch.autograd.grad(o, qkv, do)])
        tiles, sdpa = (torch.stack([(x - y).abs().max() for x, y in zip(result, results[0])]).max()
                       for result in results[1:])           # max of tensors: NaN stays NaN
        check(tiles <= 1e-12 and sdpa <= 1e-12, f"o, dq, dk, dv = dense: {name}",
              f"tiles {tiles:.0e}, sdpa {sdpa:.0e} (<= 1e-12)")

    sizes, mb, moved = (256, 512, 1024, 2048), {method: [] for method in METHODS}, {}
    for T in sizes:
        for method, attend in METHODS.items():
            with LargestTensor() as seen:
                o = attend(*inputs(1, 2, 2, T, T, 64), causal=False)
                moved[T, method] = (seen.whole if method == "dense" else seen.tiles) // 2   # a head
                o.sum().backward()
            mb[method].append(seen.nbytes / 1e6)
    dense, tiles = (mb[method][-1] / mb[method][0] for method in ("dense", "tiles"))
    check(dense == 64 and tiles == 8, "largest tensor of forward + backward, T = 256 to 2048",
          f"dense x {dense:g}, tiles x {tiles:g} (x 64, x 8)")
    with LargestTensor() as halves:                         # q, o, lse; for each tile of q all k, v
        METHODS["tiles"](*inputs(1, 1, 1, T, T, 64), causal=False, block=64)
    theory = {n: 2 * T * 64 + T + T // n * 2 * T * 64 for n in (64, 128)}
    counted = moved[T, "dense"], moved[T, "tiles"], halves.tiles
    check(counted == (4 * T * 64 + 4 * T * T, theory[128], theory[64]),
          f"HBM elements of the forward, T = {T}: dense, tiles of 128, of 64",
          f"{counted[0] / 1e6:.1f}, {counted[1] / 1e6:.1f}, {counted[2] / 1e6:.1f} M (as theory)")
    print("\n     T   largest tensor, MB: dense   tiles   HBM elements, counted: dense     tiles")
    for n, T in enumerate(sizes):                           # of the forward, one head, D = 64
        print(f"{T:6}{mb['dense'][n]:27.2f}{mb['tiles'][n]:8.2f}{moved[T, 'dense']:30,}"
              f"{moved[T, 'tiles']:10,}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("skipped: figure (pip install matplotlib)")
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for method, style, raised in ("dense", "C1o-", 2), ("tiles", "C0s-", 2), ("sdpa", "kx:", 0.9):
        axes.loglog(sizes, mb[method], style, base=2)
        axes.annotate(method, (600, raised * mb[method][1]), color=style[:-2])
    axes.set(xlabel="positions T", ylabel="largest tensor (MB)",
             title="Dense attention grows with T², the tiles with T")
    axes.set_xticks(sizes, sizes)
    axes.set_yticks([2 ** n for n in range(-3, 6)], [2 ** n for n in range(-3, 6)])
    folder = pathlib.Path(__file__).parent / "figures"
    folder.mkdir(exist_ok=True)
    figure.savefig(folder / "flash_attn.png")


def bench():
    """Median ms, and TFLOP/s for 2 products, 7 with the backward, half of that if causal."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    cuda, methods, flex = torch.cuda.is_available(), dict(METHODS), torch.compile(flex_attention)
    options = {"device": "cuda", "dtype": torch.bfloat16} if cuda else {}
    if cuda:
        methods |= {"default": lambda *qkv, causal: flash_attention(*qkv, causal),  # or Triton
                    "flex": lambda *qkv, causal: flex(*qkv, block_mask=mask if causal else None)}
        for name, kind in ("cudnn", Kind.CUDNN_ATTENTION), ("fa2", Kind.FLASH_ATTENTION):
            fused = sdpa_kernel(kind)(F.scaled_dot_product_attention)
            methods[name] = lambda *qkv, causal, fused=fused: fused(*qkv, is_causal=causal)
    for D, T, causal in itertools.product((64, 128), (1024, 2048, 4096, 8192, 16384) if cuda else
                                          (256, 1024), (False, True)):
        B, H = (16384 // T, 2048 // D) if cuda else (1, 4)
        torch.compiler.reset()                  # else flex: one kernel for all shapes, then none
        *qkv, do = *inputs(B, H, H, T, T, D, **options), torch.randn(B, H, T, D, **options)
        mask = create_block_mask(lambda b, h, t, j: t >= j, None, None, T, T, do.device)
        for name, attend in methods.items():
            if T > 4096 and name in ("dense", "tiles"):     # too large, too slow
                continue
            line = f"D {D:3}  T {T:5}  {'causal' if causal else 'full':6}  {name:7}"
            for phase, products in ("forward", 2), ("forward and backward", 7):
                def run():
                    o = attend(*qkv, causal=causal)
                    if products == 7:
                        torch.autograd.grad(o, qkv, do)
                timer = Timer("run()", globals={"run": run})
                timer.timeit(3)                             # compiles and warms up
                ms = 1e3 * timer.blocked_autorange(min_run_time=0.3).median
                tflop = products * 2e-12 * B * H * T * T * D / (1 + causal)
                line += f"   {phase} {ms:8.3f} ms {1e3 * tflop / ms:7.3g} TFLOP/s"
            print(line, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bench", action="store_true", help="ms and TFLOP/s of all backends")
    bench() if parser.parse_args().bench else demo()
