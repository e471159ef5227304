r"""Mixture of experts: many MLPs, of which each token visits K. More parameters, the same FLOPs.

    scores = softmax(W_r x)    y = sum over the K largest: weight_e * expert_e(x)
    weight_e = score_e / sum of these K; for K = 1 the score itself, else W_r would not learn from y
    expert_e(x) = down_e (silu(gate_e x) * up_e x)

    tokens  a b c d e   choose   a:20 b:21 c:20 d:01 e:20     (E = 3 experts, K = 2)
    sorted  | a c d e | b d | a b c e |       every expert has its tokens in one piece: a matmul for
              expert 0   1    expert 2        each, no loop over tokens; then back, weighted, summed

Left alone, the router sends more to whom it already sends much (figures/moe.png). Two cures and a
limit:
  aux      E sum_e f_e P_e, f_e the share of choices, P_e the mean score: 1 when balanced, for any K
  bias     added to the scores for the choice only; after a step up for idle experts, down for busy
  capacity each expert takes at most factor * S K / E, rounded up, of a rank's S tokens, in order;
           the others get nothing from it. Bounds what an expert computes, does not balance

Expert parallelism: n ranks with their own tokens hold E / n experts each. Rows travel to their
experts and back, by all-to-all; other gradients are averaged over ranks, as in data parallelism.

Cost     FLOPs of K experts, and 2 C E a token for the router; all E in memory. With n ranks: 4
         all-to-alls a step and layer (there and back, forward and backward), each S K C (n-1)/n
         elements a rank when balanced, and the counts. Kept for backward, elements: S C + S K
         (2 C + 4 H) and a few per choice; by a dense MLP: S (C + 4 H).
Paper    Shazeer et al. 2017 (arXiv 1701.06538); Fedus et al. 2021, Switch, eq. 4-6 (2101.03961);
         Zoph et al. 2022, ST-MoE, z-loss (2202.08906); Jiang et al. 2024, Mixtral (2401.04088);
         Wang et al. 2024, bias without loss (2408.15664); DeepSeek-V3, section 2.1.2 (2412.19437)
Run      python moe.py [--nproc N] [--bench]   or   torchrun --nproc-per-node N moe.py [--bench]
Left out Shazeer's losses (squared coefficients of variation), groups of experts, experts that
         choose tokens (not causal), fp8, exchange hidden behind computing, a gather fused into the
         product: see DeepEP, Megatron-LM, SonicMoE
"""

import argparse
import math
import os
import pathlib
import sys
import tempfile
import time

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

# Shape letters: B sequences, T tokens of one, S tokens in all, C width, H width inside an expert,
# E experts, K chosen by a token, R rows (a token at one of its experts), n ranks, e = E / n.


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


class Sort(torch.autograd.Function):
    """(S, C) -> (S K, C): row i is the token of choice order[i]; choice j is token j // K's. With
    back=True the transpose, (S K, C) -> (S, C), which adds up the K rows of a token. Each is the
    other's backward, and both only read: no atomic additions, so the result is reproducible."""

    @staticmethod
    def forward(ctx, x, order, inverse, k, back):
        ctx.save_for_backward(order, inverse)
        ctx.k, ctx.back = k, not back
        if back:                                # under autocast a sum is float32
            return x[inverse].view(len(x) // k, k, x.shape[1]).sum(1).to(x.dtype)
        return x[order // k]

    @staticmethod
    def backward(ctx, dy):
        return Sort.apply(dy, *ctx.saved_tensors, ctx.k, ctx.back), None, None, None, None


class Exchange(torch.autograd.Function):
    """Send sent[r] rows of x to rank r, in order, and receive received[r] from it. Backward: their
    gradients take the way back."""

    @staticmethod
    def forward(ctx, x, sent, received, group):
        ctx.arguments = received, sent, group
        y = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(y, x.contiguous(), received, sent, group=group)
        return y

    @staticmethod
    def backward(ctx, dy):
        return Exchange.apply(dy, *ctx.arguments), None, None, None


class MeanOverRanks(torch.autograd.Function):
    """w, used for the tokens of n ranks. The training loss is the mean of the ranks' losses: their
    gradients add up in w's, which is divided by n, once."""

    @staticmethod
    def forward(ctx, w, n):
        ctx.n = n
        return w.view_as(w)

    @staticmethod
    def backward(ctx, dw):
        return dw / ctx.n, None


def as_product(x):
    """x in the type of a product here, under autocast a lower one: before it is kept or travels."""
    return x.to((x.new_empty(0, 1) @ x.new_empty(1, 0)).dtype)


def grouped(x, weight, ends):
    """x (R, in) @ weight[i].T (in, out) for the rows ends[i-1] to ends[i] -> (R, out). The rows
    after the last end are no result. On CUDA in bf16: one kernel, and the host does not wait."""
    low = as_product(x)
    if one_kernel(x, weight, low.dtype):
        return F.grouped_mm(low, weight.to(low.dtype).mT, offs=ends.int())
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    parts = x.split([*sizes, len(x) - sum(sizes)])
    products = [F.linear(part, w) for part, w in zip(parts, weight.unbind())]   # unbind: its
    rest = products[0].new_zeros(len(parts[-1]), weight.shape[1])       # backward is one stack
    return torch.cat([*products, rest])


def one_kernel(x, weight, dtype):
    aligned = all(size % 8 == 0 for size in weight.shape[1:])           # 16 bytes
    return x.is_cuda and dtype == torch.bfloat16 and aligned and hasattr(F, "grouped_mm")


def swiglu(x):                                  # (R, 2 H), gate and up -> (R, H)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def balance_loss(scores, load):
    """E sum_e f_e P_e: 1 where all experts are equally used, E / K if the same K get everything.
    Switch eq. 4, with the shares of all S K choices. scores (S, E), load (E,) -> ()

    f is a count, without gradient; what falls is P of those that are chosen too often."""
    P = (scores / scores.sum(-1, keepdim=True)).sum(0) / max(1, len(scores))
    f = load / load.sum().clamp(min=1)
    return len(load) * (f.to(P.dtype) * P).sum()


def z_loss(logits):
    """Mean over tokens of (log sum_e exp logit_e)^2: keeps logits small (ST-MoE, section 3)."""
    return logits.logsumexp(-1).square().sum() / max(1, len(logits))


class MoE(nn.Module):
    """y, aux = moe(x): (..., C) -> (..., C), and a dict, also where nothing is to be added:

    loss     ()   z_weight * z, with balance="aux" plus balance_weight * balance: the caller adds it
                  to the training loss
    balance, z    balance_loss and z_loss of these tokens
    load     (E,) how many choices fell on each expert, before any is dropped (int64)
    dropped  ()   how many found no place (capacity_factor, in training only)

    dim C, hidden H of one expert. num_shared: experts for all tokens, beside the K chosen.
    capacity_factor: None drops nothing. balance: "aux" | "bias" (call update_bias once a step) |
    None. gate: "softmax" | "sigmoid" (scores of their own, DeepSeek-V3). renormalize: the K weights
    add up to 1; None: where K > 1, as a single weight of 1 would teach the router nothing. jitter:
    in training the router sees x times 1 -+ jitter (Switch); noisy: logits plus noise of a learned
    size, in training (Shazeer, eq. 4).
    group: each of its ranks has as many tokens, and holds e experts, marked p.expert_parallel =
    group (such a layer cannot be deep-copied), whose gradients are means over the group. For
    ddp.py and zero.py set p.replicas, too: the ranks that hold the same experts.
    data_group: the ranks whose choices count in an "aux" loss, so that the mean of theirs is that
    of all tokens together (None: group). ValueError: numbers that do not fit, with the fix."""

    def __init__(self, dim, hidden, num_experts, top_k=2, capacity_factor=None, num_shared=0,
                 balance="aux", group=None, *, gate="softmax", renormalize=None, jitter=0.0,
                 noisy=False, balance_weight=0.01, z_weight=0.001, data_group=None):
        super().__init__()
        n = 1 if group is None else dist.get_world_size(group)
        problem = None
        if not 1 <= top_k <= num_experts:
            problem = f"top_k={top_k} of {num_experts} experts: pick 1 to {num_experts}"
        elif n < 1 or num_experts % n:
            problem = (f"{num_experts} experts over {n} ranks: pick a multiple of {n}, or fewer "
                       f"ranks")
        elif capacity_factor is not None and not capacity_factor > 0:
            problem = f"capacity_factor={capacity_factor}: above 0, such as 1.25; None: no limit"
        elif balance not in ("aux", "bias", None) or gate not in ("softmax", "sigmoid"):
            problem = f"balance={balance!r}: aux, bias or None; gate={gate!r}: softmax or sigmoid"
        elif min(dim, hidden) < 1 or num_shared < 0 or not 0 <= jitter < 1:
            problem = (f"dim={dim}, hidden={hidden}: at least 1; num_shared={num_shared}: at least "
                       f"0; jitter={jitter}: from 0 to below 1")
        if problem:
            raise ValueError(problem)
        self.num_experts, self.top_k, self.capacity_factor = num_experts, top_k, capacity_factor
        self.balance, self.gate, self.jitter, self.noisy = balance, gate, jitter, noisy
        self.renormalize = top_k > 1 if renormalize is None else renormalize
        self.balance_weight, self.z_weight = balance_weight, z_weight
        self.group, self.n, self.data_group = group, n, data_group or group
        e, wide = num_experts // n, num_shared * hidden
        self.router = nn.Linear(dim, num_experts, bias=False)
        self.noise = nn.Linear(dim, num_experts, bias=False) if noisy else None
        self.register_buffer("bias", torch.zeros(num_experts) if balance == "bias" else None)
        self.gate_up = nn.Parameter(torch.empty(e, 2, hidden, dim))
        self.down = nn.Parameter(torch.empty(e, dim, hidden))
        if num_shared:                          # together they are one wider expert
            self.shared_gate_up = nn.Parameter(torch.empty(2, wide, dim))
            self.shared_down = nn.Parameter(torch.empty(dim, wide))
        self.num_shared = num_shared
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """Normal, variance 1 / fan-in. Experts: drawn for all E on all ranks: seed alike."""
        for name, p in self.named_parameters():
            parts = self.n if name in ("gate_up", "down") else 1
            whole = torch.randn(len(p) * parts, *p.shape[1:]) * p.shape[-1] ** -0.5
            p.copy_(whole.chunk(parts)[dist.get_rank(self.group) if parts > 1 else 0])
            if parts > 1:
                p.expert_parallel = self.group
        if self.noisy:
            self.noise.weight.zero_()

    def _apply(self, fn, recurse=True):
        bias = self.bias
        super()._apply(fn, recurse)
        if bias is not None:                    # also after model.bfloat16(): steps are small
            wide = torch.promote_types(self.bias.dtype, torch.float32)
            if self.bias.dtype != wide:
                self.bias = bias.to(self.bias.device, wide)
        return self

    @torch.no_grad()
    def update_bias(self, load, rate=0.001):
        """Once a step. load (E,): its choices, summed over ranks and microbatches (Wang 2024)."""
        load = load.to(self.bias)
        self.bias += rate * torch.sign(load.mean() - load)

    def route(self, x):
        """x (..., C) -> weight and expert (..., K), aux. In fp32: small differences decide."""
        exact = torch.promote_types(x.dtype, torch.float32)
        if self.training and self.jitter:
            x = x.to(exact)
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        with torch.autocast(x.device.type, enabled=False), torch._C.DisableTorchFunction():
            logits = F.linear(x.to(exact), self.router.weight.to(exact))        # no autocast here
            if self.noisy and self.training:
                size = F.softplus(F.linear(x.to(exact), self.noise.weight.to(exact)))
                logits = logits + size * torch.randn_like(logits)
        scores = logits.softmax(-1) if self.gate == "softmax" else logits.sigmoid()
        by = scores if self.bias is None else scores + self.bias.to(scores)
        expert = by.detach().topk(self.top_k).indices
        weight = scores.gather(-1, expert)
        if self.renormalize:
            weight = weight / weight.sum(-1, keepdim=True)
        load = torch.zeros(self.num_experts, dtype=torch.int64, device=x.device)
        choices = expert.flatten()                          # no bincount: it makes CUDA wait
        load.scatter_add_(0, choices, torch.ones_like(choices))
        seen = load
        if self.training and self.balance == "aux" and self.data_group is not None:
            seen = load.clone()
            dist.all_reduce(seen, group=self.data_group)
        balance = balance_loss(scores.reshape(-1, self.num_experts), seen)
        z = z_loss(logits.reshape(-1, self.num_experts))
        loss = self.z_weight * z
        if self.balance == "aux":
            loss = loss + self.balance_weight * balance
        return weight, expert, {"loss": loss, "balance": balance, "z": z, "load": load}

    def forward(self, x):
        weight, expert, aux = self.route(x)
        y, aux["dropped"] = self.combine(as_product(x), weight, expert)
        return y, aux

    def combine(self, x, weight, expert):
        """x (..., C), what route() says of it (..., K) -> y (..., C), number of dropped choices."""
        tokens, choices = x.reshape(-1, x.shape[-1]), expert.flatten()  # (S, C), (S K,)
        order, ends = self.sort(choices)
        inverse = order.argsort()
        rows = Sort.apply(tokens, order, inverse, self.top_k, False)    # (S K, C), by expert
        unused = torch.arange(len(rows), device=x.device)[:, None] >= ends[-1]
        if self.capacity_factor:                # of what is no result, nothing may go on: not NaN
            rows = rows.masked_fill(unused, 0)
        out = self.experts(rows, ends) if self.n == 1 else self.travel(rows, ends)
        if self.capacity_factor:
            out = out.masked_fill(unused, 0)
        out = out * weight.flatten()[order, None].to(out.dtype)
        y = Sort.apply(out, order, inverse, self.top_k, True)           # (S, C)
        if self.num_shared:
            h = swiglu(F.linear(tokens, self.shared_gate_up.flatten(0, 1)))
            y = y + F.linear(h, self.shared_down)
        return y.view(x.shape), len(choices) - ends[-1]

    def sort(self, choices):
        """choices (S K,), in token order -> order (S K,), by expert, then in token order, dropped
        ones at the end; ends (E,): expert i has order[ends[i-1]:ends[i]]."""
        everyone = torch.arange(self.num_experts, device=choices.device)
        order = choices.argsort(stable=True)
        ends = torch.searchsorted(choices[order], everyone, right=True)
        if self.capacity_factor and self.training:
            capacity = math.ceil(self.capacity_factor * len(choices) / self.num_experts - 1e-9)
            starts = F.pad(ends[:-1], (1, 0))
            place = torch.empty_like(order)                 # of each choice, among its expert's
            place[order] = torch.arange(len(order), device=order.device) - starts[choices[order]]
            choices = choices.masked_fill(place >= capacity, self.num_experts)
            order = choices.argsort(stable=True)
            ends = torch.searchsorted(choices[order], everyone, right=True)
        return order, ends

    def experts(self, rows, ends):              # (R, C), sorted by expert of this rank -> (R, C)
        gate_up, down = self.gate_up.flatten(1, 2), self.down
        if self.n > 1:
            gate_up, down = MeanOverRanks.apply(gate_up, self.n), MeanOverRanks.apply(down, self.n)
        return grouped(swiglu(grouped(rows, gate_up, ends)), down, ends)

    def travel(self, rows, ends):
        """Rows (S K, C), sorted by expert of all ranks: to their experts and back -> (S K, C)."""
        sent = ends.diff(prepend=ends.new_zeros(1))                     # (E,) rows for each expert
        received = torch.empty_like(sent)                               # (n, e) from each rank
        dist.all_to_all_single(received, sent, group=self.group)
        counts = torch.stack([sent.view(self.n, -1).sum(1), received.view(self.n, -1).sum(1)])
        go, come = counts.tolist()                                      # here the host waits, once
        here = Exchange.apply(rows[:sum(go)], go, come, self.group)
        expert = torch.arange(self.num_experts // self.n, device=rows.device).repeat(self.n)
        order = expert.repeat_interleave(received, output_size=len(here)).argsort(stable=True)
        inverse = order.argsort()
        ends = received.view(self.n, -1).sum(0).cumsum(0)
        out = self.experts(Sort.apply(here, order, inverse, 1, False), ends)
        out = Exchange.apply(Sort.apply(out, order, inverse, 1, True), come, go, self.group)
        return F.pad(out, (0, 0, 0, len(rows) - len(out)))              # the dropped


def moe_reference(moe, x):
    """The same in plain words, one token at a time; dropless, alone."""
    y = []
    for token in x.flatten(0, -2):
        scores = (moe.router.weight @ token).softmax(0)
        weight, expert = scores.topk(moe.top_k)
        total = torch.zeros_like(token)
        for w, i in zip(weight / weight.sum(), expert):
            gate, up = moe.gate_up[i] @ token
            total = total + w * (moe.down[i] @ (F.silu(gate) * up))
        y.append(total)
    return torch.stack(y).view_as(x)


def check(ok, claim, measured):
    """Print one claim with what was measured; stop with exit code 1 if it does not hold."""
    if dist.get_rank() == 0 or not ok:
        print(f"{'ok  ' if ok else 'FAIL'} {claim:<64} {measured}")
    if not ok:
        raise AssertionError(f"claim does not hold: {claim}: {measured}")


def demo():
    rank, n = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    alone = MoE(6, 5, 2 * n + 1, top_k=2).double()                  # one process, all tokens
    x = torch.randn(2, 13, 6, dtype=torch.float64, requires_grad=True)
    probe = torch.randn_like(x)
    (y, aux), wanted = alone(x), moe_reference(alone, x)
    tensors = [x, *alone.parameters()]
    pairs = zip(torch.autograd.grad((y * probe).sum(), tensors),
                torch.autograd.grad((wanted * probe).sum(), tensors))
    error = torch.stack([(a - b).abs().max() for a, b in [(y, wanted), *pairs]]).max().item()
    check(error <= 1e-12, "sorted matmuls = a loop over tokens, all gradients",
          f"{error:.1e} (<= 1e-12), loads {aux['load'].tolist()}")

    even, skewed = torch.full((64, 8), 1 / 8), torch.tensor([56, 8, 0, 0, 0, 0, 0, 0])
    values = [balance_loss(even, torch.full((8,), 64 * k / 8)).item() for k in (1, 2, 4)]
    check(values == [1, 1, 1], "balance loss 1 when balanced, for K = 1, 2, 4", f"{values}")
    logits = torch.zeros(64, 8, requires_grad=True)
    grads = [torch.autograd.grad(loss(logits.softmax(-1)), logits)[0].abs().max().item()
             for loss in (lambda p: p.mean(0).var(), lambda p: balance_loss(p, skewed))]
    check(grads[0] == 0 and grads[1] > 1e-3, "variance of mean scores misses 87.5 % on one of 8",
          f"gradient {grads[0]:.0e}, balance loss {grads[1]:.0e}")

    tight = MoE(6, 5, 4, top_k=1, capacity_factor=1.0).double()
    roomy = MoE(6, 5, 4, top_k=1).double()
    roomy.load_state_dict(tight.state_dict())
    expert = tight.route(x)[1].flatten()
    place = torch.stack([(expert[:i] == expert[i]).sum() for i in range(26)])
    kept = (place < 7)[:, None]                             # ceil(1.0 * 26 / 4)
    (got, aux), want = tight(x), roomy(x)[0]
    error = (got.view(26, 6) - want.view(26, 6) * kept).abs().max().item()
    zero = not got.view(26, 6)[~kept[:, 0]].any()
    right = zero and error <= 1e-12 and aux["dropped"] == (~kept).sum() > 0
    check(right, "an expert keeps its first 7 tokens, the rest gives exactly 0",
          f"{error:.1e} (<= 1e-12), {aux['dropped']} of 26 dropped")

    torch.manual_seed(0)
    E = 2 * n
    alone, split = MoE(6, 5, E, 2).double(), MoE(6, 5, E, 2, group=dist.group.WORLD).double()
    mine = dict(alone.state_dict())
    for name in ("gate_up", "down"):
        mine[name] = mine[name].chunk(n)[rank]
    split.load_state_dict(mine)
    x = torch.randn(n, 5, 6, dtype=torch.float64)
    (alone(x)[0].square().mean() + alone(x)[1]["loss"]).backward()
    y, aux = split(x[rank])
    (y.square().mean() + aux["loss"]).backward()
    errors = [(y - alone(x)[0][rank]).abs().max()]
    for (name, p), q in zip(split.named_parameters(), alone.parameters()):
        if hasattr(p, "expert_parallel"):
            want = q.grad.chunk(n)[rank]
        else:                                               # what data parallelism does
            dist.all_reduce(p.grad)
            p.grad, want = p.grad / n, q.grad
        errors.append((p.grad - want).abs().max())
    error = torch.stack(errors).max().item()                # NaN, if one is
    check(error <= 1e-12, f"{E} experts on {n} ranks = one process, all gradients",
          f"{error:.1e} (<= 1e-12)")
    learn(rank, n)


class Net(nn.Module):
    """The next byte from the last 8: embed, mix, norm, x + experts(x), norm, head."""

    def __init__(self, C, H, E, K, balance):
        super().__init__()
        self.embed, self.mix = nn.Embedding(256, 16), nn.Linear(8 * 16, C)
        self.norms = nn.ModuleList(nn.RMSNorm(C) for _ in range(2))
        self.moe = MoE(C, H, E, K, balance=balance, balance_weight=0.1, z_weight=0.001 * (E > 1))
        self.head = nn.Linear(C, 256)

    def forward(self, tokens):
        x = self.mix(self.embed(tokens).flatten(1))
        y, aux = self.moe(self.norms[0](x))
        return self.head(self.norms[1](x + y)), aux


# name: width of an expert, experts, chosen, balance. H K is the same: so are the FLOPs.
RUNS = {"dense": (128, 1, 1, None), "left alone": (64, 8, 2, None), "aux loss": (64, 8, 2, "aux"),
        "bias": (64, 8, 2, "bias")}


def train(H, E, K, balance, steps=600):
    """Learn this Python's source -> held-out nats per byte, loads (steps, E), 1 = fair share."""
    torch.manual_seed(0)
    files = sorted(pathlib.Path(os.__file__).parent.glob("*.py"))
    text = torch.tensor(list(b"".join(file.read_bytes() for file in files)[:2_000_000]))
    windows, model, loads = text.unfold(0, 9, 1), Net(64, H, E, K, balance), []
    known = len(windows) * 9 // 10
    adamw = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        adamw.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        batch = windows[torch.randint(known, (512,))]
        logits, aux = model(batch[:, :8])
        (F.cross_entropy(logits, batch[:, 8]) + aux["loss"]).backward()
        adamw.step()
        adamw.zero_grad()
        if balance == "bias":
            model.moe.update_bias(aux["load"], rate=0.01)
        loads.append(aux["load"] * E / aux["load"].sum())
    with torch.no_grad():
        held_out = windows[known::20]
        loss = F.cross_entropy(model.eval()(held_out[:, :8])[0], held_out[:, 8])
    return loss.item(), torch.stack(loads)


def learn(rank, n):
    mine = {name: train(*RUNS[name]) for name in list(RUNS)[rank::n]}
    parts = [None] * n
    dist.all_gather_object(parts, mine)
    runs = {name: next(part[name] for part in parts if name in part) for name in RUNS}
    share = {name: loads[-50:].mean(0) for name, (_, loads) in runs.items()}
    for name, low, high in (("left alone", 1.8, 4), ("aux loss", 1, 1.3), ("bias", 1, 1.3)):
        most, least = share[name].max().item(), share[name].min().item()
        check(low <= most <= high, f"{name}: the busiest of 8 has {low} to {high} x its fair share",
              f"{most:.2f}, the idlest {least:.2f}")
    dense, best = runs["dense"][0], max(runs["aux loss"][0], runs["bias"][0])
    check(best < dense - 0.03, "equal FLOPs, 4 x the parameters: a lower loss than the dense MLP",
          f"{best:.3f} < {dense:.3f} nats a byte")
    if rank == 0:
        draw(runs)


def draw(runs):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("skipped: figure (pip install matplotlib)")
    figure = Figure(figsize=(8, 4), layout="constrained")
    panels = figure.subplots(1, 4, width_ratios=(3, 3, 3, 4))
    for axes, name in zip(panels, ("left alone", "aux loss", "bias")):
        loads = runs[name][1]
        smooth = loads.view(-1, 20, loads.shape[1]).mean(1)
        axes.plot(torch.arange(len(smooth)) * 20 + 10, smooth, lw=1,
                  color="C1" if name == "left alone" else "C0")
        axes.axhline(1, color="k", ls="--", lw=1)
        axes.set(title=name, xlabel="step", ylim=(0, 3), xticks=(0, 500), xlim=(0, 600))
    panels[0].set_ylabel("load of each of 8 experts, 1 = fair")
    for axes in panels[1:3]:
        axes.tick_params(labelleft=False)
    for i, (name, (loss, _)) in enumerate(runs.items()):
        panels[3].plot(loss, i, "o", color={"dense": "k", "left alone": "C1"}.get(name, "C0"))
        panels[3].annotate(f"{name} {loss:.3f}", (loss, i - 0.2), fontsize=11,
                           ha="right" if name == "dense" else "left")
    panels[3].set(yticks=(), xlim=(1.765, 1.875), xticks=(1.78, 1.86), ylim=(3.5, -0.6),
                  title="equal FLOPs", xlabel="held-out loss,\nnats per byte")
    folder = pathlib.Path(__file__).parent / "figures"
    folder.mkdir(exist_ok=True)
    figure.savefig(folder / "moe.png")


def mask_loop(moe, x):
    """What one writes first: for each expert, find its tokens, compute, add."""
    tokens, (weight, expert, _) = x.flatten(0, -2), moe.route(x.flatten(0, -2))
    y = torch.zeros_like(tokens)
    for i in range(moe.num_experts):
        token, choice = torch.where(expert == i)
        h = swiglu(F.linear(tokens[token], moe.gate_up[i].flatten(0, 1)))
        some = F.linear(h, moe.down[i]) * weight[token, choice, None]
        y = y.index_add(0, token, some.to(y.dtype))
    return y.view_as(x)


def bench(rounds):
    """Median ms of forward and backward, the ways in turn; on CUDA in bf16."""
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    sizes = ([(2048, 1024, 32, 4, 32768), (768, 512, 8, 2, 32768)] if cuda else
             [(128, 176, 8, 2, 1024), (128, 176, 32, 2, 1024), (256, 384, 8, 2, 2048)])
    for C, H, E, K, S in sizes:
        moe, x = MoE(C, H, E, K).to(device, dtype), torch.randn(1, S, C, device=device, dtype=dtype)
        up, down = (nn.Parameter(torch.randn(shape, device=device, dtype=dtype) / 50)
                    for shape in ((2 * K * H, C), (C, K * H)))
        ways = {"dense, equal FLOPs": lambda x: F.linear(swiglu(F.linear(x, up)), down),
                "loop over experts": lambda x: mask_loop(moe, x), "this MoE": lambda x: moe(x)[0]}
        try:
            from transformers import MixtralConfig
            from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
            config = MixtralConfig(hidden_size=C, intermediate_size=H, num_local_experts=E,
                                   num_experts_per_tok=K, experts_implementation="eager")
            block = MixtralSparseMoeBlock(config).to(device, dtype)
            for p in block.parameters():
                nn.init.normal_(p, std=C ** -0.5)
            ways["transformers' Mixtral"] = block
        except ImportError:
            print("skipped: Mixtral (pip install transformers)")
        times = {way: [] for way in ways}
        for way, fn in list(ways.items()) * rounds:
            leaf = x.clone().requires_grad_()
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            fn(leaf).square().mean().backward()
            if cuda:
                torch.cuda.synchronize()
            times[way].append((time.perf_counter() - start) * 1e3)
        median = {way: torch.tensor(t[3:]).median().item() for way, t in times.items()}
        print(f"C={C}, H={H}, E={E}, K={K}, {S} tokens, {dtype} on {device}")
        for way, ms in median.items():
            rate = 18 * S * K * C * H / ms / 1e9            # 3 matrices, 2 FLOPs, 3 for backward
            print(f"  {way:<22} {ms:8.2f} ms {rate:8.2f} TFLOP/s   {median['this MoE'] / ms:.2f} = "
                  f"this MoE / it")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="mixture of experts: demo, or times in ms")
    parser.add_argument("--nproc", type=int, default=4, help="processes to start (default 4)")
    parser.add_argument("--bench", action="store_true", help="only times, in one process")
    args = parser.parse_args()
    launch(*((bench, 1, 23) if args.bench else (demo, args.nproc)))
