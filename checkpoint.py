"""Activation recomputation: keep what goes into a block, and compute the rest again in backward.

    forward     x0 -[block 0]-> x1 -[block 1]-> x2 -[block 2]-> loss        kept: x0, x1, x2
    backward    [block 2] again, its gradients; [block 1] again, its gradients; [block 0] ...

Autograd saves tensors for backward. checkpoint() takes each of them away as it is saved, leaving a
number; when backward first asks for one, the function runs again, with the same inputs, random
numbers and autocast, until all are there. Gradients flow through the first, real graph: none is
counted twice, and parameters, many outputs and autograd.grad need no special care. Selective: the
outputs of expensive operations (matmuls, attention) are kept, the second run takes them from there.

Cost     a Transformer block (width h, s tokens, batch b, a heads), bytes kept in fp16 with dropout
         and the scores as tensors: all sbh (34 + 5as/h); attention's core again: 34 sbh, for
         s / (36h + 6s) more FLOPs (q k' only); all again: 2 sbh, for 1/3 more. n equal layers in k
         segments: k inputs and n/k layers at a time; least for k = sqrt(c n), if a layer keeps c
         times its input
Paper    Chen et al. 2016, section 4 (arXiv 1604.06174); Korthikanti et al. 2022, sections 4 and 5
         (2205.05198)
Run      python checkpoint.py            claims and figures/checkpoint.png, about 20 s
         python checkpoint.py --bench    step times beside torch.utils.checkpoint
Left out graphs on several GPUs of one process, kernels that are no torch operations (selective runs
         them again), functions that change what they close over: the second run would see it,
         and BatchNorm counts twice; random numbers of Python, NumPy, own generators; torch.func
"""

import argparse
import contextlib
import functools
import itertools
import math
import pathlib
import statistics
import time
import traceback

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

# The operations whose outputs selective_checkpoint() keeps: those that cost most FLOPs per byte.
EXPENSIVE = frozenset("""linear mm addmm bmm baddbmm convolution _scaled_mm _grouped_mm
    flash_forward _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu
    _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention""".split())


class Keep(torch.autograd.Function):
    """A node of no graph that saves tensors as autograd does: hooks around it (an outer checkpoint,
    offloading to the CPU) get them, and a later change in place is noticed."""

    @staticmethod
    def forward(ctx, anchor, *tensors):
        ctx.save_for_backward(*tensors)
        return anchor.view_as(anchor)


class Saved:
    """Any nest of lists, tuples, dicts; its tensors, but for parameters, are kept by autograd."""

    def __init__(self, tree):
        self.leaves, self.spec = tree_flatten(tree)
        tensors = [(i, x) for i, x in enumerate(self.leaves)
                   if isinstance(x, torch.Tensor) and not isinstance(x, nn.Parameter)]
        self.grads = {i: (x.requires_grad, x._version) for i, x in tensors}
        self.parameters = [(x, x._version) for x in self.leaves if isinstance(x, nn.Parameter)]
        for i, _ in tensors:
            self.leaves[i] = None
        anchor = torch.empty(0, requires_grad=True)
        self.end = Keep.apply(anchor, *(x.detach() for _, x in tensors))    # it owns the node

    def load(self):
        if any(p._version != version for p, version in self.parameters):
            raise RuntimeError("a parameter was changed by an inplace operation")
        leaves = list(self.leaves)
        for (i, (grad, version)), x in zip(self.grads.items(), self.end.grad_fn.saved_tensors):
            if x._version != version:           # of a hook, such as save_on_cpu: another tensor
                torch._C._autograd._unsafe_set_version_counter((x,), (version,))
            leaves[i] = x.detach().requires_grad_(grad)
        return tree_unflatten(leaves, self.spec)


class Enough(Exception):
    """Stops the second run: all that backward will ask for is there."""


class Outputs(TorchDispatchMode):
    """Keeps the outputs of some operations in a list, (name, output, random state after it) each,
    or takes them from there, in order."""

    def __init__(self, names, devices, kept=None):
        super().__init__()
        self.names, self.devices, self.kept = names, devices, []
        self.reused = None if kept is None else iter(kept)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        if name not in self.names:
            return func(*args, **(kwargs or {}))
        if self.reused is None:
            out = func(*args, **(kwargs or {}))
            drew = torch.Tag.nondeterministic_seeded in func.tags
            self.kept.append((name, out, random_state(self.devices) if drew else None))
            return out
        was, out, state = next(self.reused, ("none", None, None))
        if was != name:
            raise RuntimeError(f"checkpoint: a function is not the same when it runs again: "
                               f"{name}, at first {was}")
        if state is not None:                               # what comes after draws the same
            set_random_state(state)
        return out


def fresh(x):
    return x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x


class Frame:
    """One call of checkpoint(): how to run the function again, and what that has given so far."""

    def __init__(self, fn, args, kwargs, names, compare):
        self.fn, self.inputs, self.names, self.compare = fn, Saved((args, kwargs)), names, compare
        self.facts, self.tensors = [], {}       # of each saved tensor; those computed again
        self.outputs, self.used = None, 0       # of expensive operations; how many matter
        devices = {x.device for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)}
        self.random = random_state(devices)
        self.regions = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
                        for kind in {device.type for device in (*self.random, *devices)}
                        if torch.amp.is_autocast_available(kind)]
        self.cached = torch.is_autocast_cache_enabled()
        self.modes = _get_current_function_mode_stack()     # such as another autocast

    def first_run(self, args, kwargs):
        self.outputs = Outputs(self.names, self.random)
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.pack, unpack), (
                    self.outputs if self.names else contextlib.nullcontext()):
                out = self.fn(*args, **kwargs)
            leaves = tree_flatten(out)[0]
            if not any(isinstance(x, torch.Tensor) for x in leaves):
                raise ValueError(f"checkpoint: {self.fn} returned {out!r:.60}: return at least one "
                                 f"tensor")
            kept = self.outputs.kept[:self.used]            # the rest comes after all saved tensors
            if any(x._version for x in tree_flatten(kept)[0] if isinstance(x, torch.Tensor)):
                raise ValueError(f"checkpoint: {self.fn} changes in place what one of "
                                 f"{sorted(self.names)} gave: take that out of save=, or clone it")
            self.outputs = Saved(kept)
        except BaseException:
            self.outputs = None                 # else these tensors and their graph hold each other
            raise
        return out

    def pack(self, x):
        value = raw(x).clone() if self.compare else None
        self.facts.append((x.shape, x.dtype, x.device, x._version, value))
        self.used = len(self.outputs.kept)
        return self, len(self.facts) - 1

    def second_run(self):
        found, versions = {}, []

        def pack(x):
            i = len(found)
            if i < len(self.facts):
                self.check(i, x)
                found[i] = x.detach()
                versions.append(x._version)
            if i + 1 >= len(self.facts):
                raise Enough
            return x.detach()

        try:
            args, kwargs = self.inputs.load()
            if isinstance(self.outputs, Saved):
                kept = self.outputs.load()
            else:                               # fn itself, still running, asks for a gradient
                kept = tree_map(fresh, self.outputs.kept)
        except RuntimeError as error:
            if "inplace" not in str(error):
                raise
            raise RuntimeError(f"checkpoint: an input of {self.fn}, or an output that is kept, was "
                               f"changed in place after it was used: clone it before") from error
        now = random_state(self.random)
        with contextlib.ExitStack() as stack:
            stack.callback(set_random_state, now)
            set_random_state(self.random)
            for kind, dtype, enabled in self.regions:
                stack.enter_context(torch.autocast(kind, dtype, enabled, self.cached))
            for context in (*self.modes, torch.enable_grad(),
                            torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)):
                stack.enter_context(context)
            if self.names:
                stack.enter_context(Outputs(self.names, self.random, kept))
            with contextlib.suppress(Enough):
                self.fn(*args, **kwargs)
        if len(found) < len(self.facts):
            raise RuntimeError(f"checkpoint: {self.fn} saved {len(self.facts)} tensors at first, "
                               f"{len(found)} when it ran again: it must do the same twice")
        if versions != [x._version for x in found.values()]:
            raise RuntimeError(f"checkpoint: {self.fn} changes in place a tensor that backward "
                               f"needs: clone it before")
        self.tensors = found

    def check(self, i, x):
        *was, version, value = self.facts[i]
        alike = was == [x.shape, x.dtype, x.device]
        if alike and version == x._version and (value is None or torch.equal(value, raw(x))):
            return
        what = f"{tuple(x.shape)} {x.dtype}, at first {tuple(was[0])} {was[1]}"
        if alike:
            what = "other values" if version == x._version else "been changed in place since"
        torchs = pathlib.Path(torch.__file__).parent
        lines = [line for line in traceback.extract_stack() if line.filename != __file__
                 and torchs not in pathlib.Path(line.filename).parents]
        where = f"{lines[-1].filename}:{lines[-1].lineno}: {lines[-1].line}" if lines else "?"
        raise RuntimeError(f"checkpoint: {self.fn} is not the same when it runs again: of the "
                           f"{len(self.facts)} tensors it saves number {i}, in {where}, has {what}")


def raw(x):                                     # its bytes: NaN equals NaN, and not 0
    return x.detach().contiguous().flatten().view(torch.uint8)


def unpack(handle):
    frame, i = handle
    if i not in frame.tensors:                  # the first, or a second backward
        frame.second_run()
    return frame.tensors.pop(i)


def random_state(devices):
    """-> {device: state}, of the CPU, these devices, and the current GPU."""
    states = {torch.device("cpu"): torch.get_rng_state()}
    devices = set(devices)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        devices.add(torch.device("cuda", torch.cuda.current_device()))
    for device in devices:
        if device.type == "cuda":
            states[device] = torch.cuda.get_rng_state(device)
        elif device.type == "mps":
            states[device] = torch.mps.get_rng_state()
    return states


def set_random_state(states):
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        elif device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.mps.set_rng_state(state)


def checkpoint(fn, *args, compare=False, **kwargs):
    """-> fn(*args, **kwargs); what fn's operations save for backward is computed again there.

    args, kwargs: anything; tensors in lists, tuples, dicts are found, too (but kwargs named compare
    or save are not fn's). fn: any function, also of parameters it closes over; it must do the same
    twice. compare: also check that it gives the same values (for debugging: keeps everything).
    A backward that needs only a part leaves the rest of what was computed until the graph goes.
    ValueError: fn returns no tensor. RuntimeError, in backward: an input, or another tensor that
    backward needs, was changed in place, or the second run differs; names the tensor."""
    if not torch.is_grad_enabled():
        return fn(*args, **kwargs)
    return Frame(fn, args, kwargs, None, compare).first_run(args, kwargs)


def selective_checkpoint(fn, *args, save=EXPENSIVE, compare=False, **kwargs):
    """The same, but outputs of the operations in `save`, names such as "mm", are kept. ValueError:
    one of them was changed in place."""
    if not torch.is_grad_enabled():
        return fn(*args, **kwargs)
    return Frame(fn, args, kwargs, frozenset(save), compare).first_run(args, kwargs)


def checkpoint_sequential(fns, segments, x):
    """fns one after the other, in segments, all but the last recomputed: its turn comes at once,
    when nothing of the others is there yet. None: about sqrt(n), as for layers that keep as much
    as goes in (Chen 2016); more segments need less memory if they keep more."""
    fns = list(fns)
    segments = round(math.sqrt(len(fns))) if segments is None else segments
    if not 1 <= segments <= len(fns):
        raise ValueError(f"segments={segments} of {len(fns)} functions: pick 1 to {len(fns)}")

    def run(part, x):
        for fn in part:
            x = fn(x)
        return x

    ends = [round(i * len(fns) / segments) for i in range(segments + 1)]
    for start, end in zip(ends[:-2], ends[1:-1]):
        x = checkpoint(run, fns[start:end], x)
    return run(fns[ends[-2]:], x)


def choose(sizes, flops, budget):
    """Which to keep, the others being computed again: exact 0/1 knapsack. sizes: bytes that keeping
    each costs, flops: what it saves, budget: bytes. -> indices, sorted; ValueError: budget < 0.
    As many states as there are sums of sizes worth their bytes: few, unless sizes are contrived."""
    if budget < 0 or len(sizes) != len(flops) or min([*sizes, *flops, 0]) < 0:
        raise ValueError(f"budget={budget}, {len(sizes)} sizes, {len(flops)} flops: need as many "
                         f"of both, and nothing below 0")
    front = [(0, 0, ())]                        # (bytes, FLOPs, indices), each worth its bytes
    for i, (size, flop) in enumerate(zip(sizes, flops)):
        more = [(b + size, f + flop, kept + (i,)) for b, f, kept in front if b + size <= budget]
        best, merged = -1, []
        for b, f, kept in sorted(front + more, key=lambda state: (state[0], -state[1])):
            if f > best:                        # else another has more for fewer bytes
                merged.append((b, f, kept))
                best = f
        front = merged
    return list(front[-1][2])


class Made(TorchDispatchMode):
    """with Made() as memory: ... -> memory.peak, most bytes at once of the storages made in it;
    memory.all, their addresses."""

    def __init__(self):
        super().__init__()
        self.peak, self.alive, self.all = 0, {}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = {storage._cdata for storage in storages_in((args, kwargs))}
        for storage in storages_in(out):
            if storage._cdata not in old:                   # else a view, or changed in place
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.all.add(storage._cdata)
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def storages_in(tree):
    return [x.untyped_storage() for x in tree_flatten(tree)[0] if isinstance(x, torch.Tensor)]


def saved_bytes(fn, *args, **kwargs):
    """Bytes that a call keeps for its backward, each storage once: of its inputs and of what it
    makes; not what exists anyway, as parameters do. On any device."""
    saved = {}

    def pack(x):
        saved[x.untyped_storage()._cdata] = x.untyped_storage()         # held: its address stays
        return x.detach()                       # not x: a result that its own node holds is a leak

    with Made() as memory, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = fn(*args, **kwargs)               # held: else its graph and tensors would be gone
    counted = memory.all | {storage._cdata for storage in storages_in((args, kwargs))}
    del out
    return sum(storage.nbytes() for place, storage in saved.items() if place in counted)


def plan(fns, x, budget):
    """Which of fns (each takes what the one before gives) to recompute, so that all together keep
    at most `budget` bytes for backward, at the least FLOPs. Decides by what each layer measures.
    budget: an int, bytes; a float from 0.0 (as few as can be) to 1.0 (keep all). -> indices,
    sorted. ValueError: it can't be so few. The fns run (BatchNorm counts it); random numbers stay.
    """
    plain, least, flops, now = [], [], [], random_state({x.device})
    for fn in fns:
        x = x.detach().requires_grad_()
        fn(x)                                   # an autocast around keeps its casts of weights now
        plain.append(saved_bytes(fn, x))
        least.append(min(plain[-1], saved_bytes(checkpoint, fn, x)))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            x = fn(x)
        flops.append(counter.get_total_flops() + 1)         # + 1: rather keep than recompute
    set_random_state(now)
    if isinstance(budget, float):
        if not 0 <= budget <= 1:
            raise ValueError(f"budget={budget}: as a fraction it must lie in 0 to 1")
        budget = sum(least) + int(budget * (sum(plain) - sum(least)))
    if budget < sum(least):
        raise ValueError(f"budget={budget} bytes, but the least is {sum(least)}: allow more, or "
                         f"use smaller batches")
    extra = [a - b for a, b in zip(plain, least)]
    # Reversed, so that of equals the last are kept: backward frees them before it recomputes.
    kept = choose(extra[::-1], flops[::-1], budget - sum(least))
    return [i for i in range(len(fns)) if len(fns) - 1 - i not in kept]


# ------------------------------------------------------------------ demo

class Block(nn.Module):
    """A Transformer block: (b, s, h) -> same. scores: as tensors, with dropout (Megatron's, 2022);
    else fused attention."""

    def __init__(self, h, heads, dropout=0.1, scores=False, core=None):
        super().__init__()
        self.heads, self.scores, self.p = heads, scores, dropout
        self.norm1, self.norm2 = nn.LayerNorm(h), nn.LayerNorm(h)
        self.qkv, self.o = nn.Linear(h, 3 * h), nn.Linear(h, h)
        self.up, self.down = nn.Linear(h, 4 * h), nn.Linear(4 * h, h)
        self.around_core = core or (lambda fn, *args: fn(*args))        # how attention's core runs

    def core(self, q, k, v):                                # each (b, heads, s, h / heads)
        if not self.scores:
            return F.scaled_dot_product_attention(q, k, v)
        scores = q @ (k * k.shape[-1] ** -0.5).mT
        return dropout(scores.softmax(-1), self.p) @ v

    def forward(self, x):
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = self.around_core(self.core, *qkv).transpose(1, 2).flatten(2)
        x = x + dropout(self.o(y), self.p)
        return x + dropout(self.down(F.gelu(self.up(self.norm2(x)))), self.p)


def dropout(x, p):
    return torch.native_dropout(x, p, True)[0] if p else x  # its mask takes a byte an element


def plainly(fn, *args, **kwargs):
    return fn(*args, **kwargs)


def check(ok, claim, measured):
    """Print one claim with what was measured; stop with exit code 1 if it does not hold."""
    print(f"{'ok  ' if ok else 'FAIL'} {claim:<64} {measured}")
    if not ok:
        raise AssertionError(f"claim does not hold: {claim}: {measured}")


def gradients(way, x, depth=3, region=contextlib.nullcontext):
    """Of a net that has layers before, between and behind the recomputed blocks, with dropout."""
    torch.manual_seed(0)
    first, last = nn.Linear(x.shape[-1], 32), nn.Linear(32, 1)
    blocks = nn.ModuleList(Block(32, 4) for _ in range(depth))
    with region():
        y = first(x)
        for block in blocks:
            y = y.tanh() + 0.1 * way(block, y)
        loss = last(y).float().square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad for m in (first, blocks, last) for p in m.parameters())]


def demo_gradients():
    x = torch.randn(2, 8, 16)

    def nested(fn, *args):
        return checkpoint(functools.partial(checkpoint, fn), *args)

    def bf16():
        return torch.autocast("cpu", torch.bfloat16)

    for name, way, depth, region in (
            ("every block recomputed", checkpoint, 3, contextlib.nullcontext),
            ("selectively", selective_checkpoint, 3, contextlib.nullcontext),
            ("blocks in recomputed blocks", nested, 3, contextlib.nullcontext),
            ("under autocast", checkpoint, 3, bf16), ("100 blocks", checkpoint, 100,
                                                      contextlib.nullcontext)):
        same = [torch.equal(a, b) for a, b in zip(gradients(plainly, x, depth, region),
                                                  gradients(way, x, depth, region))]
        check(all(same), f"loss, gradients, dropout too: {name}", f"{len(same)} tensors, bit-equal")


def demo_bytes():
    b, s, h, a = 2, 128, 128, 8
    x = torch.randn(b, s, h, dtype=torch.bfloat16)
    first, unit = None, b * s * h
    print(f"\nbytes kept by a block / sbh (bf16, dropout, as/h = {a * s / h:g})     formula "
          f" measured     FLOPs")
    for name, formula, scores, core, way in (
            ("all", 34 + 5 * a * s / h, True, None, plainly),
            ("attention's core recomputed", 34, True, checkpoint, plainly),
            ("all recomputed", 2, True, None, checkpoint),
            ("all, fused attention", None, False, None, plainly),
            ("fused, selective: matmuls and attention kept", None, False, None,
             selective_checkpoint)):
        torch.manual_seed(0)
        block = Block(h, a, scores=scores, core=core).bfloat16()
        own = x.clone().requires_grad_()
        kept = saved_bytes(way, block, own) / unit
        with FlopCounterMode(display=False) as counter:
            way(block, own).sum().backward()
        first = first or counter.get_total_flops()
        ratio = counter.get_total_flops() / first
        print(f"     {name:<50}", f"{formula:7.1f}" if formula else " " * 7, f"{kept:9.2f}",
              f"{ratio:9.4f}")
        if formula:
            check(abs(kept / formula - 1) < 0.05, f"{name}: as Korthikanti 2022, eq. 1 to 6 (5 %)",
                  f"{kept:.2f}, {formula:g}")
        if core is not None:
            check(abs(ratio - 1 - s / (36 * h + 6 * s)) < 1e-9, "only q k' again: s / (36h + 6s)",
                  f"{ratio - 1:.4f}")
        if name == "all recomputed":
            check(abs(ratio - 4 / 3) < 1e-9, "a whole forward more: 4/3 of the FLOPs",
                  f"{ratio:.6f}")


def demo_choice():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        sizes, flops = (torch.randint(1, 100, (9,), generator=generator).tolist() for _ in range(2))
        budget = sum(sizes) // 2
        got = sum(flops[i] for i in choose(sizes, flops, budget))
        best = max(sum(flops[i] for i in kept) for n in range(10)
                   for kept in itertools.combinations(range(9), n)
                   if sum(sizes[i] for i in kept) <= budget)
        if got != best:
            break
    check(got == best, "choose() = the best of all 512 choices, 50 random cases", f"{got} = {best}")
    layers = [nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Linear(width, 64))
              for width in [2048] * 2 + [64] * 8]
    x = torch.randn(256, 64)
    again = plan(layers, x, 0.3)
    check(again == [0, 1], "what is big is recomputed, not what comes late",
          f"layers {again} of 2 big, 8 small ones")
    blocks = [Block(64, 4) for _ in range(16)]
    x = torch.randn(2, 32, 64)
    one, most = saved_bytes(blocks[0], x.requires_grad_()), {}
    for k in (1, 2, 4, 8, 16):                              # k inputs; one segment at a time
        most[k] = (k - 1) * x.nbytes + 16 // k * one
    print(f"\n16 blocks, each keeps {one / x.nbytes:.1f} x its input; so in k segments MB at most")
    print("    ", ",  ".join(f"k = {k}: {size / 1e6:.2f}" for k, size in most.items()))


def ways_of(blocks, x):
    """-> {name: how to run the blocks}: fractions of the memory, selective, and torch's own two."""
    from torch.utils.checkpoint import (CheckpointPolicy, checkpoint as torch_checkpoint,
                                        create_selective_checkpoint_contexts)

    def some(again):
        def run(x):
            for i, block in enumerate(blocks):
                x = checkpoint(block, x) if i in again else block(x)
            return x
        return run

    def every(way):
        def run(x):
            for block in blocks:
                x = way(block, x)
            return x
        return run

    def policy(context, op, *args, **kwargs):
        keep = op.name().split("::")[1].split(".")[0] in EXPENSIVE
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def torch_selective(block, x):
        return torch_checkpoint(block, x, use_reentrant=False, context_fn=functools.partial(
            create_selective_checkpoint_contexts, policy))

    ways = {part / 8: some(plan(blocks, x, part / 8)) for part in range(9)}
    ways["selective"] = every(selective_checkpoint)
    ways["torch, all"] = every(functools.partial(torch_checkpoint, use_reentrant=False))
    ways["torch, selective"] = every(torch_selective)
    return ways


def measure(depth, h, s, rounds, device="cpu", dtype=torch.float32):
    """-> {name of a way: (MB at its peak, median ms) of forward and backward}, the ways in turn."""
    torch.manual_seed(0)
    blocks = [Block(h, h // 32, dropout=0.0).to(device, dtype) for _ in range(depth)]
    x = torch.randn(4, s, h, device=device, dtype=dtype, requires_grad=True)
    ways, times, peaks = ways_of(blocks, x), {}, {}
    for name, run in ways.items():
        run(x).square().mean().backward()                   # the parameters' .grad exist from now
        with Made() as memory:
            run(x).square().mean().backward()
        peaks[name] = memory.peak / 1e6
    for _ in range(rounds + 2):                             # two to warm up
        for name, run in ways.items():
            start = time.perf_counter()
            run(x).square().mean().backward()
            if device == "cuda":
                torch.cuda.synchronize()
            times.setdefault(name, []).append(1e3 * (time.perf_counter() - start))
    return {name: (peaks[name], statistics.median(times[name][2:])) for name in ways}


def draw(points):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("skipped: figure (pip install matplotlib)")
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    whole = points[1.0]
    curve = [(100 * mb / whole[0], ms / whole[1]) for name, (mb, ms) in points.items()
             if isinstance(name, float)]
    axes.plot(*zip(*curve), "C0o-")
    below = curve[len(curve) // 2]
    axes.annotate("plan(): 0 to 12 of\n12 blocks recomputed", below, xytext=(-150, -55),
                  textcoords="offset points", color="C0")
    for name, style in (("selective", "C0D"), ("torch, all", "C1s"), ("torch, selective", "C1D")):
        mb, ms = points[name]
        axes.plot(100 * mb / whole[0], ms / whole[1], style, ms=9)
        axes.annotate(name, (100 * mb / whole[0], ms / whole[1]), xytext=(9, 0), va="center",
                      textcoords="offset points", color=style[:2])
    axes.axhline(4 / 3, color="0.5", ls="--", lw=1)
    axes.annotate("4/3: the FLOPs of one forward more", (24, 4 / 3 + 0.006), color="0.4")
    axes.set(xlabel="peak memory of forward and backward, % of keeping all",
             ylabel="time, 1 = keep all", xlim=(0, 103),
             title="Recomputing buys memory with time")
    folder = pathlib.Path(__file__).parent / "figures"
    folder.mkdir(exist_ok=True)
    figure.savefig(folder / "checkpoint.png")


def report(points):
    for name, (mb, ms) in points.items():
        label = f"plan(), {name:.3f}" if isinstance(name, float) else name
        print(f"     {label:<20} {mb:8.2f} MB {ms:9.2f} ms   {ms / points[1.0][1]:.2f}x")


def demo():
    demo_gradients()
    demo_bytes()
    demo_choice()
    print("\n12 blocks, h = 128, 512 tokens: peak memory of forward and backward, time")
    points = measure(12, 128, 128, 5)
    report(points)
    peaks = [mb for name, (mb, _) in points.items() if isinstance(name, float)]
    check(peaks == sorted(peaks) and peaks[0] < 0.5 * peaks[-1], "less and less kept: lower peaks",
          f"{peaks[-1]:.1f} to {peaks[0]:.1f} MB")
    (ours, _), (theirs, _) = points["selective"], points["torch, selective"]
    check(points[0.0][0] <= points["torch, all"][0] and ours < theirs,
          "peak no higher than torch.utils.checkpoint's; selective: lower",
          f"{ours:.1f}, {theirs:.1f} MB")
    draw(points)


def bench():
    """Ours beside torch.utils.checkpoint, which keeps the same or more."""
    cuda = torch.cuda.is_available()
    sizes = ((12, 1024, 2048), (12, 2048, 2048)) if cuda else ((12, 128, 128), (6, 256, 256))
    for depth, h, s in sizes:
        print(f"{depth} blocks, h = {h}, 4 x {s} tokens")
        points = measure(depth, h, s, 15, *(("cuda", torch.bfloat16) if cuda else ()))
        report(points)
        for ours, theirs in ((0.0, "torch, all"), ("selective", "torch, selective")):
            print(f"     ours / {theirs}: {points[ours][0] / points[theirs][0]:.2f} of the peak, "
                  f"{points[ours][1] / points[theirs][1]:.2f} of the time")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="activation recomputation: demo, or step times")
    parser.add_argument("--bench", action="store_true", help="only times, medians of 15")
    bench() if parser.parse_args().bench else demo()
