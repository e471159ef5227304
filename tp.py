"""Tensor parallelism: every rank works on all tokens, with its own part of each weight.

    x -- f --> y_0 = gelu(x A_0^T) --> y_0 B_0^T -- g --> z     rank 0: rows A_0 of A (out, in),
    |                                               |                   columns B_0 of B
    x -- f --> y_1 = gelu(x A_1^T) --> y_1 B_1^T -- g --> z     rank 1: the others

    z = sum_i gelu(x A_i^T) B_i^T      f: identity forward, all-reduce backward; g: the reverse

Without f the loss looks fine, but what lies before gets one rank's term of the gradient, and the
replicas drift apart (figures/tp.png). Sequence parallelism: from g to the next f (norms, residual,
dropout) a rank holds t = T / n of the tokens; f and g become the two halves of an all-reduce.

Cost     a layer (attention, MLP of 4 C, all heads): 2 all-reduces forward, 2 backward, or their
         halves; a rank sends 8 B T C (n-1)/n elements. In bf16, nothing overlapping, that is less
         time than what n ranks save of the matrices' 72 B T C^2 flop where flop/s < 4.5 C x
         bytes/s, those that a rank sends: wide layers, fast links (1e15 and 4.5e11: C > 494); and
         less than what is left to a rank where flop/s < 4.5 C / (n-1) x bytes/s.
         Kept for backward, bytes per B T C (bf16, GELU): 32 on one rank, 8 + 24 / n, with
         sequence parallelism 4 + 28 / n. Korthikanti table 2 has 34, 10 + 24 / t, 34 / t beside
         the scores (5 a s / h, which fused attention does not keep): two dropout masks more,
         and split inputs gathered again in backward. All ranks must build layers from one seed.
Paper    Shoeybi et al. 2019, section 3 (arXiv 1909.08053); Korthikanti et al. 2022 (2205.05198)
Run      python tp.py [--nproc N] [--bench]   or   torchrun --nproc-per-node N tp.py       N: 2 3 4
Left out vocabularies and heads that do not divide, key/value heads shared by ranks: see Megatron-LM
"""

import argparse
import os
import pathlib
import sys
import tempfile
import time
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)    # before torch 2.13
# Shape letters: B sequences, T tokens, C width, V vocabulary, n ranks; small: a rank's part.


# --- launch (the same lines in every multi-process file; test_all.py compares them) ---
def _rank(rank, fn, n, path, args):
    try:
        if path is None:                        # torchrun's: gloo for CPU, nccl for CUDA tensors
            if int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        else:                                   # they meet in a file: no port to collide with
            torch.set_num_threads(1)            # n processes share the cores
            dist.init_process_group("gloo", store=dist.FileStore(path, n), rank=rank, world_size=n)
        fn(*args)
        dist.barrier()                          # leave together: gloo may abort who is still busy
        dist.destroy_process_group()
        if path is not None:                    # all is done; as Python ends, gloo's threads may
            sys.stdout.flush()                  # still hold tensors, and abort
            os._exit(0)
    except Exception:
        sys.stdout.flush()                      # what was printed, the traceback, and end at once:
        sys.excepthook(*sys.exc_info())         # to leave the group in order could wait for ranks
        os._exit(1)                             # that wait for this one


def launch(fn, n, *args):
    """Run fn(*args) in n new gloo processes, or, once a job, in those torchrun made (its n counts).
    A rank that fails prints its traceback; the others are stopped, and this raises."""
    if dist.is_torchelastic_launched():
        return _rank(None, fn, n, None, args)
    with tempfile.TemporaryDirectory() as folder:           # daemon: Ctrl-C leaves none behind
        torch.multiprocessing.spawn(_rank, (fn, n, f"{folder}/store", args), n, daemon=True)
# --- end launch ---


def tp_size(group):
    """Ranks of a group; None: 1, not split."""
    return 1 if group is None else dist.get_world_size(group)


def collective(kind, x, dim, group):
    """Start one -> a function that waits for it and returns its result. x is only read: autograd
    or the caller may read it later. kind: copy | split | all-reduce | all-gather |
    reduce-scatter; the last two and split work along dim."""
    n = tp_size(group)
    if kind == "copy" or n == 1:
        return lambda: x.view_as(x)
    if kind in ("split", "reduce-scatter") and x.shape[dim] % n:
        raise ValueError(f"dimension {dim} of {tuple(x.shape)} over {n} ranks: pick a size (for "
                         f"dimension 1: tokens) that is a multiple of {n}")
    if kind == "split":
        return lambda: x.chunk(n, dim)[dist.get_rank(group)].contiguous()
    if kind == "all-reduce":
        result = x.clone(memory_format=torch.contiguous_format)
        work = dist.all_reduce(result, group=group, async_op=True)
    elif kind == "all-gather":                  # (B, t, C) -> (B, T, C) for dim 1
        result = x.new_empty(n * x.shape[0], *x.shape[1:])
        work = all_gather(result, x.contiguous(), group=group, async_op=True)
    else:                                       # (B, T, C) -> (B, t, C) for dim 1. By all-to-all:
        parts = torch.stack(x.chunk(n, dim))    # gloo's own reduce-scatter sends twice as much
        result = torch.empty_like(parts)
        work = dist.all_to_all_single(result, parts, group=group, async_op=True)

    def finish():
        work.wait()
        if kind == "all-reduce":
            return result
        if kind == "all-gather":
            return torch.cat(result.chunk(n), dim)
        return result.sum(0).to(x.dtype)        # under autocast a sum is float32

    return finish


class Conjugate(torch.autograd.Function):
    """One collective forward, another backward: which, the next layer decides. If all ranks do the
    same with the result, each has the whole gradient, and backward copies or takes its part; if
    each computes a term of what follows, a term of the gradient, and backward sums them."""

    @classmethod
    def of(cls, x, there, back, dim, group):    # alone it is nothing, not even a node of the graph
        return x if tp_size(group) == 1 else cls.apply(x, there, back, dim, group)

    @staticmethod
    def forward(ctx, x, there, back, dim, group):
        ctx.arguments = back, there, dim, group
        return collective(there, x, dim, group)()

    @staticmethod
    def backward(ctx, dy):
        return Conjugate.of(dy, *ctx.arguments), None, None, None, None


def copy_to_tp(x, group):
    """f. All ranks read the same x, each for its y_i: dL/dx = sum_i dL/dy_i dy_i/dx, and a rank
    computes one term: backward sums."""
    return Conjugate.of(x, "copy", "all-reduce", 0, group)


def reduce_from_tp(x, group):
    """g. z = sum_i x_i, so dL/dx_i = dL/dz, and all ranks have that: they hold one loss, not n
    different ones. Backward: nothing; an all-reduce would make it n times too large."""
    return Conjugate.of(x, "all-reduce", "copy", 0, group)


def gather_from_sp(x, group):
    """f for split tokens, (B, t, C) -> (B, T, C). A rank computes a term of the gradient of all T
    tokens, and needs the sum of the terms for its own t: backward is a reduce-scatter."""
    return Conjugate.of(x, "all-gather", "reduce-scatter", 1, group)


def reduce_to_sp(x, group):
    """g for split tokens, (B, T, C) -> (B, t, C). x_i is a term of all of z; a rank has dL/dz of
    its own t tokens: backward is an all-gather."""
    return Conjugate.of(x, "reduce-scatter", "all-gather", 1, group)


def gather_from_tp(x, group):
    """(..., c) -> (..., C), such as logits: then all ranks compute the same, and the gradient of a
    rank's part is its part of the gradient."""
    return Conjugate.of(x, "all-gather", "split", -1, group)


def scatter_to_tp(x, group):
    """(..., C) -> (..., c), the reverse: each rank goes on with its part, so backward gathers."""
    return Conjugate.of(x, "split", "all-gather", -1, group)


class ColumnProducts(torch.autograd.Function):
    """f, then x W^T for several W; in backward dL/dx travels while the weights' gradients are being
    computed. Split tokens are kept as gathered: Megatron-LM keeps its own t, and gathers twice."""

    @staticmethod
    def forward(ctx, x, group, split_tokens, *weights):
        ctx.group, ctx.split_tokens = group, split_tokens
        x = collective("all-gather" if split_tokens else "copy", x, 1, group)()
        ctx.save_for_backward(x, *weights)
        return tuple(F.linear(x, w) for w in weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *dys):
        x, *weights = ctx.saved_tensors
        sum_dx = None
        if ctx.needs_input_grad[0]:
            terms = [dy @ w.to(dy.dtype) for dy, w in zip(dys, weights)]    # to: under autocast
            kind = "reduce-scatter" if ctx.split_tokens else "all-reduce"
            sum_dx = collective(kind, sum(terms[1:], terms[0]), 1, ctx.group)
        rows = x.flatten(0, -2).to(dys[0].dtype)
        dws = [dy.flatten(0, -2).mT @ rows if needed else None
               for dy, needed in zip(dys, ctx.needs_input_grad[3:])]
        return sum_dx and sum_dx(), None, None, *dws


def check_dtype(x):
    if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"x is {x.dtype}: give a float64, float32, bfloat16 or float16 tensor")


def column_parallel(x, *layers):
    """Column layers of one group that read the same x (q k v, gate up) -> this rank's outputs, with
    one f for all. It reads their weights: forward hooks on them are not called. ValueError: layers
    that differ in group or sequence_parallel, or gather their outputs."""
    check_dtype(x)
    group, split_tokens = layers[0].group, layers[0].sequence_parallel
    if len(layers) > 1 and any(m.gather_output or (m.group, m.sequence_parallel) != (
            group, split_tokens) for m in layers):
        raise ValueError("column_parallel: give layers of one group and one sequence_parallel, "
                         "without gather_output")
    # To the type of a product here, under autocast a lower one: once, before x travels, is kept.
    x = x.to((x.new_empty(0, 1) @ x.new_empty(1, 0)).dtype)
    if tp_size(group) == 1:
        return [m.product(x, m.weight, m.bias) for m in layers]
    if all(m.product is F.linear for m in layers):
        outputs = ColumnProducts.apply(x, group, split_tokens, *(m.weight for m in layers))
    else:
        x = (gather_from_sp if split_tokens else copy_to_tp)(x, group)
        outputs = [m.product(x, m.weight) for m in layers]
    return [y if m.bias is None else y + m.bias.to(y.dtype) for m, y in zip(layers, outputs)]


class ColumnParallelLinear(nn.Linear):
    """(B, T, in) -> (B, T, out / n): this rank's rows of the weight (out, in) and of the bias.

    sequence_parallel: x is (B, t, in). heads: `out` is so many, each whole on a rank.
    gather_output: -> (B, T, out). product: what multiplies; another may be set (fp8: amp.py)."""

    def __init__(self, in_features, out_features, bias=True, *, group=None,
                 sequence_parallel=False, heads=None, gather_output=False):
        super().__init__(in_features, out_features, bias)
        self.group, self.sequence_parallel = group, sequence_parallel
        self.gather_output, self.product = gather_output, F.linear
        self.weight = shard(self.weight, 0, group, heads)
        self.bias = shard(self.bias, 0, group, heads) if bias else None

    def share(self, p):
        """A whole parameter that the product reads, too (peft.py): its gradient is that of all
        ranks. With sequence_parallel sum_replicated_grads() does it."""
        return p if self.sequence_parallel else copy_to_tp(p, self.group)

    def forward(self, x):
        [y] = column_parallel(x, self)
        return gather_from_tp(y, self.group) if self.gather_output else y


class RowParallelLinear(nn.Linear):
    """(B, T, in / n) -> (B, T, out): this rank's columns of the weight (out, in). The bias is whole
    and added once, after the sum. sequence_parallel: -> (B, t, out)"""

    def __init__(self, in_features, out_features, bias=True, *, group=None,
                 sequence_parallel=False):
        super().__init__(in_features, out_features, bias)
        self.group, self.sequence_parallel = group, sequence_parallel
        self.product = F.linear
        self.weight = shard(self.weight, 1, group)

    share = ColumnParallelLinear.share

    def forward(self, x):
        check_dtype(x)
        leave = reduce_to_sp if self.sequence_parallel else reduce_from_tp
        z = leave(self.product(x, self.weight), self.group)
        return z if self.bias is None else z + self.bias.to(z.dtype)


class VocabParallelEmbedding(nn.Embedding):
    """ids (B, T), the same on all ranks -> (B, T, C): the sum of what the ranks find among their
    V / n rows. sequence_parallel: -> (B, t, C). ValueError, if split, on a GPU a device-side
    assertion, without waiting: an id outside of V."""

    def __init__(self, num_embeddings, embedding_dim, *, group=None, sequence_parallel=False):
        super().__init__(num_embeddings, embedding_dim)
        self.group, self.sequence_parallel = group, sequence_parallel
        self.weight = shard(self.weight, 0, group)

    def forward(self, ids):
        if tp_size(self.group) == 1:
            return super().forward(ids)
        row, mine = own_rows(ids, ids.min(), ids.max(), len(self.weight), self.group)
        leave = reduce_to_sp if self.sequence_parallel else reduce_from_tp
        return leave(F.embedding(row, self.weight) * mine.unsqueeze(-1), self.group)


def own_rows(ids, low, high, v, group):         # -> row among this rank's v, is it one of them
    V = tp_size(group) * v
    if ids.is_cuda:                             # without waiting: a device-side assertion
        torch._assert_async((low >= 0) & (high < V))
    elif low < 0 or high >= V:
        raise ValueError(f"tokens {low:.0f} to {high:.0f}; need 0 to {V - 1}")
    row = ids - dist.get_rank(group) * v
    return row.clamp(0, v - 1), (row >= 0) & (row < v)


def vocab_parallel_cross_entropy(logits, targets, group=None, ignore_index=-100):
    """logits (..., v), this rank's columns of V; targets (...) -> mean nats, the same on all ranks.
    -log p = log sum_j exp(z_j - m) - (z_target - m), m = max_j z_j: three numbers travel per
    target, never logits. ValueError, if split, on all ranks: one has a label outside of V (on a GPU
    a device-side assertion)."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))     # bf16: sums lose
    if tp_size(group) == 1:
        return F.cross_entropy(z.flatten(0, -2), targets.flatten(), ignore_index=ignore_index)
    counted = targets != ignore_index
    labels = targets.where(counted, 0)          # the extremes travel too: all raise or none
    top = torch.cat([z.detach().amax(-1).flatten(), torch.stack([-labels.min(), labels.max()])])
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    row, mine = own_rows(labels, -top[-2], top[-1], z.shape[-1], group)
    z = z - top[:-2].view(*targets.shape, 1)
    z_target = z.gather(-1, row.unsqueeze(-1)).squeeze(-1).where(mine, 0)
    total, z_target = reduce_from_tp(torch.stack([z.exp().sum(-1), z_target]), group)
    return (total.log() - z_target).where(counted, 0).sum() / counted.sum()


def shard(full, dim, group, heads=None):
    """A tensor that all ranks hold alike -> a Parameter, this rank's part along dim, marked
    p.shard = ("tp", dim); copy.deepcopy drops the mark. heads: so many stay whole along dim."""
    n, units = tp_size(group), heads or full.shape[dim]
    if n < 1:
        raise ValueError("this rank is not in the group: give the group that it is in")
    if units % n:
        raise ValueError(f"{units} {'heads' if heads else 'rows or columns'} over {n} ranks: pick "
                         f"a multiple of {n}, or fewer ranks")
    if full.shape[dim] % units:
        raise ValueError(f"{full.shape[dim]} features are not {units} heads: pick a multiple")
    part = collective("split", full.detach(), dim, group)()
    p = nn.Parameter(part.clone(), full.requires_grad)
    if n > 1:
        p.shard = ("tp", dim)
    return p


def cuts(p, group):
    """The (dimension, group) pairs along which p is cut: also experts over p.expert_parallel, a
    mark of moe.py."""
    experts = [(0, p.expert_parallel)] if hasattr(p, "expert_parallel") else []
    return experts + [(p.shard[1], group)] if hasattr(p, "shard") else experts


def unshard(p, group, t=None):
    """The full tensor, on all ranks, of p, or of t if that is cut like p (gradient, momentum)."""
    t = p.detach() if t is None else t
    for dim, ranks in cuts(p, group):
        t = collective("all-gather", t, dim, ranks)()
    return t


def part_like(p, full, group):
    """The reverse: this rank's part of a full tensor, cut like p."""
    for dim, ranks in cuts(p, group):
        full = collective("split", full, dim, ranks)()
    return full


def sum_replicated_grads(module, group):
    """Once per step, with sequence parallelism: whole parameters (norms, biases of row layers) have
    seen only a rank's tokens; their gradients are summed over the group, also of a layer after a
    gather, which has seen all: keep those out. ValueError: no layer splits tokens, so nothing is
    missing; the group spreads experts (moe.py), too, whose gradients are means."""
    if group is not None and any(
            getattr(p, "expert_parallel", None) is group for p in module.parameters()):
        raise ValueError("experts are spread over this group: spread them over another")
    split = any(getattr(m, "sequence_parallel", False) for m in module.modules())
    if tp_size(group) > 1 and not split:
        raise ValueError("no layer has sequence_parallel: whole parameters have seen all tokens")
    grads = [p.grad for p in module.parameters() if p.grad is not None and not hasattr(p, "shard")]
    if grads and tp_size(group) > 1:
        total = collective("all-reduce", torch.cat([g.flatten() for g in grads]), 0, group)()
        for g, part in zip(grads, total.split([g.numel() for g in grads])):
            g.copy_(part.view_as(g))


def grad_norm(parameters, group):
    """2-norm of the gradient of the whole model; what is split counts everywhere, the rest once."""
    alike = {}                                  # the groups that cut them: gradients
    for p in dict.fromkeys(parameters):
        if p.grad is not None:
            alike.setdefault(tuple(ranks for _, ranks in cuts(p, group)), []).append(p.grad)
    norms = []
    for groups, grads in alike.items():
        norm = nn.utils.get_total_norm(grads)
        norm = norm.to(torch.promote_types(norm.dtype, torch.float32))      # fp16 ends at 65504
        for ranks in groups:
            norm = collective("all-reduce", norm.square(), 0, ranks)().sqrt()
        norms.append(norm)
    return norms[0] if len(norms) == 1 else nn.utils.get_total_norm(norms)


def check(ok, claim, measured):
    """Print one claim with what was measured; stop with exit code 1 if it does not hold."""
    if dist.get_rank() == 0 or not ok:
        print(f"{'ok  ' if ok else 'FAIL'} {claim:<64} {measured}")
    if not ok:
        raise AssertionError(f"claim does not hold: {claim}: {measured}")


class Block(nn.Module):
    """Pre-norm attention and MLP, grouped-query heads; with group=None the dense reference."""

    def __init__(self, C, H, K, group=None, sequence_parallel=False):
        super().__init__()
        split = {"group": group, "sequence_parallel": sequence_parallel}
        self.norm1, self.norm2, self.D = nn.LayerNorm(C), nn.LayerNorm(C), C // H
        self.q = ColumnParallelLinear(C, C, heads=H, **split)
        self.k = ColumnParallelLinear(C, K * self.D, heads=K, **split)
        self.v = ColumnParallelLinear(C, K * self.D, heads=K, **split)
        self.o = RowParallelLinear(C, C, **split)
        self.up = ColumnParallelLinear(C, 4 * C, **split)
        self.down = RowParallelLinear(4 * C, C, **split)
        self.enter = nn.Identity()              # where parallelize_module hooks in, see bench()

    def forward(self, x):
        h = self.enter(self.norm1(x))
        if isinstance(self.q, ColumnParallelLinear):
            q, k, v = column_parallel(h, self.q, self.k, self.v)
        else:
            q, k, v = self.q(h), self.k(h), self.v(h)
        q, k, v = (y.unflatten(-1, (-1, self.D)).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def counted(run):
    """-> elements that a rank sends (in a ring) during run(), and the number of collectives."""
    sent, n = [], dist.get_world_size()

    def counting(collective, halves):           # an all-reduce is two halves
        def call(result, *args, **kwargs):
            sent.append(halves * result.numel() * (n - 1) / n)
            return collective(result, *args, **kwargs)
        return call

    with mock.patch.dict(globals(), all_gather=counting(all_gather, 1)), mock.patch.multiple(
            dist, all_reduce=counting(dist.all_reduce, 2),
            all_to_all_single=counting(dist.all_to_all_single, 1)):
        run()
    return sum(sent), len(sent)


def saved_bytes(block, x):
    """Bytes of activations kept for backward; a norm's and a softmax's statistics not counted."""
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in block.parameters()}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights and t.dtype == x.dtype and t.shape[-1] > 1:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        block(x)
    return sum(kept.values())


def train(group, f=True):
    """40 SGD steps of embedding, norm, MLP, head -> losses; how far the ranks' norms are apart."""
    torch.manual_seed(0)
    tokens, targets = torch.randint(36, (2, 3, 12))
    embed, norm = VocabParallelEmbedding(36, 24, group=group), nn.LayerNorm(24)
    up = ColumnParallelLinear(24, 96, group=group)
    down, head = (RowParallelLinear(96, 24, group=group),
                  ColumnParallelLinear(24, 36, group=group))
    model = nn.ModuleList([embed, norm, up, down, head]).double()
    up.group = group if f else None             # None: a plain layer of this rank's rows, without f
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, gaps = [], []
    for _ in range(40):
        x = embed(tokens)
        x = x + down(up(norm(x)).exp())         # exp: its backward reads its output
        loss = vocab_parallel_cross_entropy(head(x), targets, group)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        copies = collective("all-gather", norm.weight.detach().unsqueeze(0), 0, group)()
        losses.append(loss.item())
        gaps.append((copies - copies[0]).abs().max().item())
    return losses, gaps


def demo():
    group, n, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    if n not in (2, 3, 4):
        raise ValueError(f"{n} ranks: the demo's sizes split over 2, 3 or 4")
    B, T, C, H = 2, 12, 48, 24
    x = torch.randn(B, T, C, generator=torch.Generator().manual_seed(1)).double()
    for sequence_parallel in (False, True):
        torch.manual_seed(0)
        dense = Block(C, H, H // 2).double()
        torch.manual_seed(0)
        block = Block(C, H, H // 2, group, sequence_parallel).double()
        whole = x.clone().requires_grad_()
        mine = (x.chunk(n, 1)[rank] if sequence_parallel else x).clone().requires_grad_()
        want, outputs = dense(whole), []
        want.square().sum().backward()
        forward = counted(lambda: outputs.append(block(mine)))
        backward = counted(outputs[0].square().sum().backward)
        pairs = [(outputs[0], want), (mine.grad, whole.grad)]
        if sequence_parallel:
            sum_replicated_grads(block, group)
            pairs = [(a, b.chunk(n, 1)[rank]) for a, b in pairs]
        pairs += [(unshard(p, group, p.grad), q.grad)
                  for p, q in zip(block.parameters(), dense.parameters())]
        error = torch.stack([(a - b).abs().max() for a, b in pairs]).max().item()
        name = "sequence" if sequence_parallel else "tensor"
        check(error <= 1e-12, f"{name} parallel block: output, all gradients = dense",
              f"{error:.1e} (<= 1e-12)")
        unit = B * T * C * (n - 1) / n
        check(forward[0] == backward[0] == 4 * unit, "a rank sends 4 + 4 B T C (n-1)/n elements",
              f"{forward[0] / unit:g} + {backward[0] / unit:g}, in {forward[1]} + {backward[1]} "
              f"collectives")
        blocks = Block(C, H, H), Block(C, H, H, group, sequence_parallel)
        sizes = [saved_bytes(b.bfloat16(), v.detach().bfloat16().requires_grad_()) / (B * T * C)
                 for b, v in zip(blocks, (whole, mine))]
        whole_on_all = 4 if sequence_parallel else 8        # both norms' outputs; and inputs
        theory = whole_on_all + (32 - whole_on_all) / n
        check(sizes == [32, theory], f"keeps {theory:.4g} B T C bytes for backward (bf16), not 32",
              f"{sizes[1]:.4g}, not {sizes[0]:.4g}")
    losses, gaps = train(group)
    dense, _ = train(None)
    error = torch.tensor([a - b for a, b in zip(losses, dense)]).abs().max().item()
    check(error <= 1e-10 and max(gaps) == 0, "40 SGD steps = one process, norms bit-equal",
          f"{error:.1e} (<= 1e-10)")
    wrong, gaps = train(group, f=False)
    error = max(abs(a / b - 1) for a, b in zip(wrong, losses))
    check(error < 0.1, "the MLP without f: its loss looks fine", f"{error:.1%} off (< 10 %)")
    check(gaps[-1] > 1e-3, "the MLP without f: the ranks' norms drift", f"{gaps[-1]:.1e} (> 1e-3)")
    if rank == 0:
        draw(losses, wrong, gaps)


def draw(losses, wrong, gaps):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("skipped: figure (pip install matplotlib)")
    left, right = Figure(figsize=(8, 3.6), layout="constrained").subplots(1, 2)
    left.plot(losses, "C0-")
    left.annotate("with f = one process", (0, 0.9), color="C0")
    left.plot(wrong, "C1--")
    left.annotate("without the f of the MLP", (10, 2.5), color="C1")
    left.set(xlabel="SGD step", ylabel="loss (nats per token)")
    right.plot(gaps, "C1--")
    right.plot([0] * len(gaps), "C0-")
    right.set(xlabel="SGD step", ylabel="norm's weight: ranks apart")
    left.figure.suptitle("Without f the loss looks fine while the replicas drift apart")
    folder = pathlib.Path(__file__).parent / "figures"
    folder.mkdir(exist_ok=True)
    left.figure.savefig(folder / "tp.png")


def bench(rounds):
    """Median ms of a block's forward and backward, torch's parallelize_module and ours in turn."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, parallel
    cuda = 1 <= int(os.environ.get("LOCAL_WORLD_SIZE", 0)) <= torch.cuda.device_count()
    device, B, T, C, H = ("cuda", 8, 2048, 4096, 32) if cuda else ("cpu", 4, 64, 256, 4)
    n, ways, times = dist.get_world_size(), {}, {}
    C, H = (3 * C // 4, 3 * H // 4) if n == 3 else (C, H)       # whole heads
    for split in (False, True):
        here = Shard(1) if split else Replicate()
        plan = {"enter": parallel.PrepareModuleInput(input_layouts=here,
                                                     desired_input_layouts=Replicate()),
                **{name: parallel.ColwiseParallel() for name in "qkv"},
                "up": parallel.ColwiseParallel(input_layouts=here),
                "o": parallel.RowwiseParallel(output_layouts=here),
                "down": parallel.RowwiseParallel(output_layouts=here)}
        plan |= {name: parallel.SequenceParallel() for name in ("norm1", "norm2") if split}
        theirs = Block(C, H, H)
        for name in ("q", "k", "v", "o", "up", "down"):
            layer = getattr(theirs, name)
            setattr(theirs, name, nn.Linear(layer.in_features, layer.out_features))
        mesh, kind = init_device_mesh(device, (n,)), "sequence" if split else "tensor"
        ways[kind, "torch"] = parallel.parallelize_module(theirs.to(device), mesh, plan)
        ways[kind, "ours"] = Block(C, H, H, dist.group.WORLD, split).to(device)
    for (kind, who), block in list(ways.items()) * rounds:
        x = torch.randn(B, T // n if kind == "sequence" else T, C, device=device)
        dist.barrier()
        begin = time.perf_counter()
        block(x.requires_grad_()).square().mean().backward()
        if cuda:
            torch.cuda.synchronize()            # gloo's barrier does not wait for the GPU
        dist.barrier()
        times.setdefault((kind, who), []).append((time.perf_counter() - begin) * 1e3)
    for kind in ("tensor", "sequence"):
        theirs, ours = (torch.tensor(times[kind, who][3:]).median() for who in ("torch", "ours"))
        if dist.get_rank() == 0:
            print(f"{kind} parallel   torch {theirs:8.1f} ms   ours {ours:8.1f} ms   "
                  f"{ours / theirs:.2f} x torch")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="tensor parallelism: demo, or step times in ms")
    parser.add_argument("--nproc", type=int, default=2, choices=(2, 3, 4), help="processes")
    parser.add_argument("--bench", action="store_true", help="only step times, 40 rounds")
    args = parser.parse_args()
    launch(*((bench, args.nproc, 40) if args.bench else (demo, args.nproc)))
