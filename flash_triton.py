"""FlashAttention as two Triton kernels: what flash_attn.py explains in PyTorch, written for a GPU.

    s = scale q k^T    p = exp(s - lse)    o = p v        dp = do v^T    ds = p * (dp - delta)
    delta = sum over D of o * do           dv = p^T do    dq = scale ds k    dk = scale ds^T q

    forward    tiles of q  walk along the keys       m, l, o stay in registers, k and v stream by
    backward   tiles of q  walk along the keys       dq in registers; leaves delta for the next
               tiles of k  walk along the queries    dk, dv in registers, over all heads of a group
Cost     HBM holds q k v o and lse: linear in T. The backward makes 7 tile products (s, dp twice);
         FlashAttention-2 makes 5, and adds dq with atomics, in no fixed order; here bits repeat.
Built    for Hopper in half precision: its copy engine, TMA, moves the tiles, its wgmma multiplies
         them, no register spills up to D = 128: the demo compiles, without a GPU, and counts.
Paper    Dao 2023, FlashAttention-2, algorithms 1 and 2; Tillet et al. 2019, Triton.
Run      python flash_triton.py          claims and what the compiler reports, about 15 s
         python flash_attn.py --bench    speed beside PyTorch's kernels, on a GPU
Left out warp specialisation (FlashAttention-3), FP8, dropout, windows, second derivatives.
"""

import argparse
import itertools
import math
import os
import pathlib
import subprocess
import sys
import tempfile

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    raise ImportError("flash_triton.py needs Triton 3.6 or newer: pip install triton") from None

# Shape letters: B batch, H query heads, N key heads, group = H / N, T positions (Tq queries, Tk
# keys), D head dim. A tile has `rows` of the side that stays and meets `cols` of the other.
# Query t sees the keys j <= t + shift: causal with shift = Tk - Tq, all with shift = Tk.
# Tensors with D come as descriptors: TMA reads tiles by position, whatever the strides, and past
# the last position reads 0 and writes nothing. `scale` includes log2 e, because a GPU computes
# exp2; lse is divided by that scale, to be subtracted from q . k.

@triton.jit
def forward_kernel(q, k, v, o, lse, shift, scale, heads, group, Tq, Tk, pitch,
                   rows: tl.constexpr, cols: tl.constexpr, D: tl.constexpr):
    """`rows` queries of one head walk along its keys: full tiles first, then the masked ones."""
    blocks = tl.cdiv(Tq, rows)
    i = (blocks - 1 - tl.program_id(0) % blocks) * rows     # causal: a head's longest walk first
    head = tl.program_id(0) // blocks
    b, h = head // heads, head % heads
    t = i + tl.arange(0, rows)[:, None]
    q_i = q.load([b, h, i, 0]).reshape(rows, D)
    m = tl.full([rows, 1], -1e30, tl.float32)               # not -inf: no key, no NaN
    l = tl.zeros([rows, 1], tl.float32)
    o_i = tl.zeros([rows, D], tl.float32)
    end = tl.minimum(Tk, i + rows + shift)
    full = tl.maximum(0, tl.minimum(Tk, i + shift + 1)) // cols * cols
    for masked in tl.static_range(2):
        for j in tl.range(full if masked else 0, end if masked else full, cols):
            k_j = k.load([b, h // group, j, 0]).reshape(cols, D)
            v_j = v.load([b, h // group, j, 0]).reshape(cols, D)
            s = tl.dot(q_i, k_j.T, input_precision="ieee")
            if masked:
                key = j + tl.arange(0, cols)[None, :]
                s = tl.where(key <= tl.minimum(t + shift, Tk - 1), s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1, keep_dims=True) * scale)
            p = tl.exp2(tl.fma(s, scale, -m_new))
            rescale = tl.exp2(m - m_new)                    # l and o referred to m, now to m_new
            l = l * rescale + tl.sum(p, 1, keep_dims=True)
            o_i = tl.dot(p.to(v_j.dtype), v_j, o_i * rescale, input_precision="ieee")
            m = m_new
    divisor = tl.where(l == 0, 1.0, l)                      # no key: o = 0, lse = inf, P = 0
    lse_i = tl.where(l == 0, float("inf"), (m + tl.log2(divisor)) / scale)
    tl.store(lse + head.to(tl.int64) * pitch + t, lse_i, t < Tq)
    o.store([b, h, i, 0], (o_i / divisor).to(q_i.dtype).reshape(1, 1, rows, D))


@triton.jit
def backward_kernel(x, u, o, dx, du, y, w, lse, delta, shift, scale, heads, group, Tx, Ty, pitch,
                    rows: tl.constexpr, cols: tl.constexpr, D: tl.constexpr, keys: tl.constexpr):
    """`rows` positions of x walk along y: one program for both sides, as s and ds are symmetric.

    queries  x, u = q, do    y, w = k, v     p = exp(x y^T - lse)        dx = ds y
    keys     x, u = k, v     y, w = q, do    ds = p * (u w^T - delta)    dx = ds y, du = p w

    The keys see p and ds transposed. The queries walk first and leave delta. The products start
    from -lse and -delta, not from 0: as accumulators these take no registers of their own."""
    blocks = tl.cdiv(Tx, rows)
    i = tl.program_id(0) % blocks * rows
    i = i if keys else (blocks - 1) * rows - i              # causal: a head's longest walk first
    head = tl.program_id(0) // blocks
    b, h = head // heads, head % heads
    x_i = x.load([b, h, i, 0]).reshape(rows, D)
    u_i = u.load([b, h, i, 0]).reshape(rows, D)
    dx_i = tl.zeros([rows, D], tl.float32)
    du_i = tl.zeros([rows, D], tl.float32)
    if keys:                                                # masked tiles, then full ones
        start, end = tl.maximum(0, i - shift) // cols * cols, Ty
        middle = tl.minimum(Ty, tl.cdiv(tl.maximum(0, i + rows - 1 - shift), cols) * cols)
    else:                                                   # as in the forward
        start, end = 0, tl.minimum(Ty, i + rows + shift)
        middle = tl.maximum(0, tl.minimum(Ty, i + shift + 1)) // cols * cols
        at = head.to(tl.int64) * pitch + i + tl.arange(0, rows)
        lse_t = tl.load(lse + at)[:, None]
        delta_t = tl.sum(u_i.to(tl.float32) * o.load([b, h, i, 0]).reshape(rows, D), 1)[:, None]
        tl.store(delta + at[:, None], delta_t)
    row, col = tl.arange(0, rows)[:, None], tl.arange(0, cols)[None, :]
    zero = tl.zeros([rows, cols], tl.float32)
    for part in tl.static_range(2):
        first, last = (middle, end) if part else (start, middle)
        count = tl.cdiv(last - first, cols)                 # keys: for each head of the group, all
        for n in tl.range(count * group if keys else count):        # in one loop: nested ones spill
            j = first + (n % tl.maximum(count, 1) if keys else n) * cols
            other = h * group + n // tl.maximum(count, 1) if keys else h // group
            y_j = y.load([b, other, j, 0]).reshape(cols, D)
            w_j = w.load([b, other, j, 0]).reshape(cols, D)
            if keys:
                at = (b * heads * group + other).to(tl.int64) * pitch + j
                lse_t = tl.load(lse + at + tl.arange(0, cols))[None, :]
                delta_t = tl.load(delta + at + tl.arange(0, cols))[None, :]
            p = tl.exp2(tl.dot(x_i, y_j.T, zero - lse_t, input_precision="ieee") * scale)
            if keys and part == 0:
                p = tl.where(row + (i - j - shift) <= col, p, 0.0)
            if part == 1 and not keys:
                p = tl.where((col + (j - i - shift) <= row) & (col < Ty - j), p, 0.0)
            ds = p * tl.dot(u_i, w_j.T, zero - delta_t, input_precision="ieee")
            dx_i = tl.dot(ds.to(y_j.dtype), y_j, dx_i, input_precision="ieee")
            if keys:
                du_i = tl.dot(p.to(w_j.dtype), w_j, du_i, input_precision="ieee")
    dx_i *= scale * 0.6931471805599453                      # log2 e out again: ln 2
    dx.store([b, h, i, 0], dx_i.to(x_i.dtype).reshape(1, 1, rows, D))
    if keys:
        du.store([b, h, i, 0], du_i.to(x_i.dtype).reshape(1, 1, rows, D))


DTYPES = torch.float16, torch.bfloat16, torch.float32
# Head dim: (rows, cols, warps, tiles in flight) of the forward, then of the backward.
TILES = {64: ((128, 128, 4, 3), (64, 64, 4, 3)), 128: ((128, 64, 8, 3), (128, 64, 8, 2)),
         256: ((64, 64, 4, 2), (64, 32, 8, 2))}


def tiling(q, backward):
    if q.device.type == "cpu" or q.dtype == torch.float32:
        return 32, 16, 4, 1             # for the interpreter; for exact products, not tensor cores
    return TILES[max(64, triton.next_power_of_2(q.shape[3]))][backward]


def tiles(x, rows):
    """A descriptor of x's (rows, D) tiles. TMA steps by 16 bytes: other layouts are copied."""
    steps = [x.data_ptr(), *(step * x.element_size() for step in x.stride()[:3])]
    if x.stride(3) != 1 or 0 in steps or any(step % 16 for step in steps):
        x = x.clone(memory_format=torch.contiguous_format)
    width = max(16, triton.next_power_of_2(x.shape[3]))     # TMA fills other head dims with zeros
    return TensorDescriptor(x, x.shape, x.stride(), [1, 1, rows, width])


def like(x):                                                # (B, T, H, D) in memory: the next
    B, H, T, D = x.shape                                    # projection reads it without a copy
    return x.new_empty(B, T, H, D).transpose(1, 2)


def outputs(q, *_):                                         # o, lse: whole tiles, inf beyond Tq
    B, H, Tq, D = q.shape
    return like(q), q.new_full((B, H, -(-Tq // 128) * 128), math.inf, dtype=torch.float32)


# As operators of PyTorch the launches are opaque to torch.compile: one node each in its graph.
@torch.library.custom_op(f"{__name__.replace('.', '_')}::flash_forward", mutates_args=())
def forward(q: Tensor, k: Tensor, v: Tensor, shift: int, scale: float) -> tuple[Tensor, Tensor]:
    (B, H, Tq, D), (N, Tk) = q.shape, k.shape[1:3]
    rows, cols, warps, stages = tiling(q, backward=False)
    o, lse = outputs(q)
    at = [tiles(x, n) for x, n in ((q, rows), (k, cols), (v, cols), (o, rows))]
    with torch.cuda.device_of(q):
        forward_kernel[(triton.cdiv(Tq, rows) * B * H,)](
            *at, lse, shift, scale / math.log(2), H, H // N, Tq, Tk, lse.shape[2],
            rows, cols, at[0].block_shape[3], num_warps=warps, num_stages=stages)
    return o, lse


@torch.library.custom_op(f"{__name__.replace('.', '_')}::flash_backward", mutates_args=())
def backward(q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, shift: int,
             scale: float) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols, warps, stages = tiling(q, backward=True)
    (dq, dk, dv), delta = map(like, (q, k, v)), torch.zeros_like(lse)
    for keys, x, u, y, w, dx, du in (False, q, do, k, v, dq, dq), (True, k, v, q, do, dk, dv):
        at = [*(tiles(z, rows) for z in (x, u, o, dx, du)), *(tiles(z, cols) for z in (y, w))]
        with torch.cuda.device_of(q):
            backward_kernel[(triton.cdiv(x.shape[2], rows) * x.shape[0] * x.shape[1],)](
                *at, lse, delta, shift, scale / math.log(2), x.shape[1], q.shape[1] // k.shape[1],
                x.shape[2], y.shape[2], lse.shape[2], rows, cols, at[0].block_shape[3], keys,
                num_warps=warps, num_stages=stages)
    return dq, dk, dv


def save(ctx, inputs, output):
    *qkv, ctx.shift, ctx.scale = inputs
    ctx.save_for_backward(*qkv, *output)                    # linear in T: neither scores nor P


INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)      # TRITON_INTERPRET=1 is set

forward.register_fake(outputs)
backward.register_fake(lambda q, k, v, *rest: (like(q), like(k), like(v)))
forward.register_autograd(lambda ctx, do, _: (
    *backward(*ctx.saved_tensors, do, ctx.shift, ctx.scale), None, None), setup_context=save)


def obstacle(q, k, v, scale):
    """Why the kernels cannot take these inputs, and what to do; or None."""
    if not (q.ndim == k.ndim == 4 and k.shape == v.shape and q.shape[::3] == k.shape[::3]
            and q.numel() and k.numel() and q.shape[1] % k.shape[1] == 0):
        return (f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: pass (B, H, Tq, D) "
                "and twice (B, N, Tk, D), N a divisor of H, none empty")
    if len({(x.dtype, x.device) for x in (q, k, v)}) > 1 or q.dtype not in DTYPES:
        return f"{q.dtype}, {k.dtype}, {v.dtype}: pass one dtype of {DTYPES}, on one device"
    if q.shape[3] > 256 or q.shape[3] * q.element_size() % 16:
        return f"D = {q.shape[3]}: pad it to a multiple of 16 bytes, up to 256"
    if not 0 < scale < math.inf:
        return f"{scale=}: pass a positive one"
    if q.is_cuda and (INTERPRETED or torch.version.hip or
                      torch.cuda.get_device_properties(q.device).major not in (9, 10)):
        return "this GPU's compute capability is neither 9.x nor 10.x, or TRITON_INTERPRET is set"
    if not q.is_cuda and not (INTERPRETED and q.dtype != DTYPES[1]):
        return "no GPU: set TRITON_INTERPRET=1 (which multiplies bfloat16 wrongly), or use SDPA"


def attention(q, k, v, causal=True, scale=None):
    """q (B, H, Tq, D), k and v (B, N, Tk, D) -> (B, H, Tq, D); scale None = D ** -0.5. Causal: the
    last query sees every key; a query without keys gives 0. ValueError: see obstacle()."""
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if reason := obstacle(q, k, v, scale):
        raise ValueError(f"flash_triton: {reason}")
    return forward(q, k, v, k.shape[2] - (q.shape[2] if causal else 0), scale)[0]


def compiler_report(kernel, D, walk, **constants):
    """Of a kernel built for Hopper -> registers of a thread, bytes spilled, bytes of shared memory,
    wgmma instructions."""
    rows, cols, warps, stages = TILES[D][walk]
    constants |= {"rows": rows, "cols": cols, "D": D}
    kinds = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
    for name in kinds.keys() & set("q k v o x u y w dx du".split()):
        kinds[name] = f"tensordesc<bf16[1, 1, {cols if name in 'kvyw' else rows}, {D}]>"
    kinds |= {name: "*fp32" for name in kinds.keys() & {"lse", "delta"}} | {"scale": "fp32"}
    source = triton.compiler.ASTSource(kernel, kinds, constants)
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    kernel = triton.compile(source, target, {"num_warps": warps, "num_stages": stages})
    built, shared = kernel.asm, kernel.metadata.shared
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        pathlib.Path(file.name).write_bytes(built["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.check_output(command, text=True)
    registers, spilled = (int(usage.split(key)[1].split()[0]) for key in (" REG:", " STACK:"))
    return registers, spilled, shared, built["ptx"].count("wgmma.mma_async")


def check(ok, claim, measured):
    """Print one claim with what was measured; stop with exit code 1 if it does not hold."""
    print(f"{'ok  ' if ok else 'FAIL'} {claim:<64} {measured}", flush=True)
    if not ok:
        raise AssertionError(f"claim does not hold: {claim}: {measured}")


def numbers(device="cpu", dtype=torch.float32, limit=1e-5):
    """The kernels against dense attention in float64: on a GPU, or in Triton's interpreter."""
    torch.manual_seed(0)
    few, many, widths = (370, 1000, TILES) if device == "cuda" else (37, 100, (32,))    # many tiles
    for D, (claim, causal, Tq, Tk) in itertools.product(widths, (
            ("6 query heads on 2 key heads", True, many, many),
            (f"{few} queries after {many - few} cached keys", True, few, many),
            (f"{many} queries, {few} keys: {many - few} rows are 0", True, many, few),
            ("every query sees every key", False, few, many))):
        q, do = torch.randn(2, 2, 6, Tq, D, device=device).to(dtype)
        k, v = torch.randn(2, 2, 2, Tk, D, device=device).to(dtype)
        seen = torch.ones(Tq, Tk, dtype=torch.bool, device=device)
        seen, results = seen.tril(Tk - Tq) if causal else seen, []
        dense = lambda *qkv: F.scaled_dot_product_attention(*qkv, seen, enable_gqa=True)
        ours = lambda *qkv: attention(*qkv, causal)
        for attend, kind in (ours, dtype), (dense, torch.float64):
            qkv = [x.to(kind).detach().requires_grad_() for x in (q, k, v)]
            o = attend(*qkv)
            results.append([o.detach(), *torch.autograd.grad(o, qkv, do.to(kind))])
        error = torch.stack([(a - b).norm() / b.norm() for a, b in zip(*results)]).max()
        check(error <= limit, f"o, dq, dk, dv = dense, D={D}: {claim}",
              f"{error:.0e} (<= {limit:.0e})")


def demo():
    if INTERPRETED:
        return numbers()                    # there is nothing to compile
    if torch.cuda.is_available() and torch.cuda.get_device_properties(0).major in (9, 10):
        numbers("cuda", torch.bfloat16, limit=1e-2)
    else:                                   # a process of its own: triton.jit reads the variable
        subprocess.run([sys.executable, __file__], check=True,
                       env={**os.environ, "TRITON_INTERPRET": "1"})
    for D in TILES:
        for name, kernel, walk, side in (("forward", forward_kernel, 0, {}),
                                         ("dq", backward_kernel, 1, {"keys": False}),
                                         ("dk and dv", backward_kernel, 1, {"keys": True})):
            registers, spilled, shared, products = compiler_report(kernel, D, walk, **side)
            fits = (spilled == 0 or D > 128) and shared <= 232448       # bytes: all there are
            check(fits and products > 0, f"built for Hopper: {name}, D = {D}",
                  f"{registers} of 255 registers, {spilled} bytes spilled, {shared / 1024:.0f} of "
                  f"227 KB shared, {products} x wgmma")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()          # no flags
    demo()
