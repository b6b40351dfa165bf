"""Training on many GPUs, on paper: memory, compute, communication, hours and euros. The tables of docs/scale.md.

    python benchmarks/scale_plan.py                     print the tables
    python benchmarks/scale_plan.py --write             put them into docs/scale.md
    python benchmarks/scale_plan.py --price 3 --mfu 0.4

Arithmetic alone: nothing is measured here and no package is needed. What is assumed can be given as an argument; what
is derived from it stands beside its formula in docs/scale.md. Units: bytes, seconds, tokens; GB are 10^9 bytes.
"""

import argparse
import heapq
import math
import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"

# --- models


@dataclass(frozen=True)
class Shape:
    """A Llama: sizes as in its config.json, and how many parameters that makes."""

    hidden: int
    inner: int
    layers: int
    kv: int  # heads of keys times their size
    tied: bool = False
    vocab: int = 128256

    @property
    def layer(self):
        """Parameters of a decoder layer."""
        return 2 * self.hidden**2 + 2 * self.hidden * self.kv + 3 * self.hidden * self.inner + 2 * self.hidden

    @property
    def body(self):
        """Those of all layers."""
        return self.layers * self.layer

    @property
    def head(self):
        """Those of the head, and as many of the embedding."""
        return self.vocab * self.hidden

    @property
    def total(self):
        """All of them."""
        return self.body + self.head * (1 if self.tied else 2) + self.hidden

    def adapter(self, rank=16):
        """Those of LoRA factors on all linear layers of the body."""
        sides = 4 * self.hidden + 2 * (self.hidden + self.kv) + 3 * (self.hidden + self.inner)
        return self.layers * rank * sides


SHAPES = {
    "1 B": Shape(2048, 8192, 16, 512, tied=True),  # Llama-3.2-1B
    "8 B": Shape(4096, 14336, 32, 1024),  # Llama-3.1-8B
    "70 B": Shape(8192, 28672, 80, 1024),  # Llama-3.1-70B
}

# --- data

PROMPT, RESPONSE = 170, 300  # tokens of UltraFeedback in the mean; two responses a prompt
TOKENS = PROMPT + 2 * RESPONSE  # of a pair as it is packed here, the prompt once
SENT = 2 * TOKENS - 2 * RESPONSE  # of a pair as a server is asked, the prompt twice
EPOCH = 61135  # pairs
WINDOW = 256  # pairs that are shared among ranks at once while a table is filled (dpo_ref/data/packing.py)
# How lengths are spread, as benchmarks/pairs.py draws them: median, deviation of the logarithm, least and most.
SPREAD = {"prompt": (100, 0.95, 8, 512), "response": (220, 0.75, 4, 700)}


def forward_flops(shape, prompt=PROMPT, response=RESPONSE):
    """Of a pair: of its layers with attention, and of the head on response tokens (benchmarks/gpu.py)."""
    context = prompt * (prompt + 1) / 2 + 2 * (prompt * response + response * (response + 1) / 2)
    matrices = shape.body - 2 * shape.hidden * shape.layers  # norms multiply no matrix
    body = 2 * matrices * (prompt + 2 * response) + 4 * shape.layers * shape.hidden * context
    return body, 2 * shape.head * 2 * response


def useful_flops(shape, **lengths):
    """Of a pair in a step: forward, and twice that backward."""
    return 3 * sum(forward_flops(shape, **lengths))


@cache
def imbalance(pairs, ranks, batches=40):
    """Tokens of the rank that has most of a batch, over their mean, in the mean of some batches: pairs go to ranks by
    their tokens, the longest first to who has least (`share_of` in dpo_ref/data/packing.py)."""
    rng, total = random.Random(0), 0.0
    for _ in range(batches):
        loads = [0] * ranks
        for size in sorted((_pair_tokens(rng) for _ in range(pairs)), reverse=True):
            heapq.heapreplace(loads, loads[0] + size)
        total += max(loads) * ranks / sum(loads)
    return total / batches


def _pair_tokens(rng):
    median, sigma, low, high = SPREAD["prompt"]
    tokens = max(low, min(high, round(median * math.exp(rng.gauss(0, sigma)))))
    median, sigma, low, high = SPREAD["response"]
    shared = math.exp(rng.gauss(0, 0.8 * sigma))
    for _ in range(2):
        tokens += max(low, min(high, round(median * shared * math.exp(rng.gauss(0, 0.6 * sigma))))) + 1
    return tokens


# --- memory of a rank

FITS = 80e9  # of the 85 GB (79 GiB) that torch counts on an H100, less what CUDA, NCCL and the allocator take
CHUNK = 2 * 8 * 2**25  # logits of the head that are alive at once, in bfloat16 (dpo_ref/models/logps.py)
METHODS = ("adamw", "adamw_bf16", "LoRA 16")
CHECKPOINTING = ("off", "selective", "full")


def stream(method, sharded):
    """What flows between layers: bfloat16, float32, or float32 past weights that are not trained."""
    if method == "LoRA 16":
        return "LoRA"
    return "bfloat16" if sharded or method == "adamw_bf16" else "float32"


def kept_of_layer(shape, flows, repeated=False):
    """Bytes that a layer keeps of a token without checkpointing. Gathered keys and values hold the prompt once a
    response; `repeated` is as in torch 2.11, whose kernel is given as many heads of them as of queries."""
    of_norms_and_queries = {"bfloat16": 22, "LoRA": 24, "float32": 32}[flows] * shape.hidden
    keys = 4 * SENT / TOKENS * (shape.hidden if repeated else shape.kv)
    return of_norms_and_queries + 8 * shape.inner + keys


def activations(shape, flows, checkpointing, repeated=False):
    """Bytes of a token: what all layers keep, and one of them while it is computed again."""
    one = kept_of_layer(shape, flows, repeated)
    if checkpointing == "off":
        return shape.layers * one
    entry = (2 if flows == "bfloat16" else 4) * shape.hidden
    products = 8 * shape.hidden + 4 * shape.inner + 4 * shape.kv if checkpointing == "selective" else 0
    return shape.layers * (entry + products) + one


def states(shape, method, ranks=1):
    """Weights, gradients and moments; of what lies below an adapter the weights alone."""
    if method == "LoRA 16":
        return (2 * shape.total + 16 * shape.adapter()) / ranks
    return {"adamw": 16, "adamw_bf16": 8}[method] * shape.total / ranks


def besides(shape, method, sharded, checkpointing):
    """What a pass holds besides activations: copies of weights, the head with its gradient, a chunk of logits."""
    trained = method != "LoRA 16"
    if not sharded:
        copied = {"off": shape.body}.get(checkpointing, shape.layer) if method == "adamw" else 0
        return 2 * copied + (6 * shape.head if trained else 0) + CHUNK
    layers = (10 if trained else 4) * shape.layer
    own = {"adamw": 10, "adamw_bf16": 8}.get(method, 2)
    if shape.tied:
        own = 6 if trained else 0
    return layers + 2 * shape.head + own * shape.head + CHUNK


def memory(shape, method, sharded, ranks, checkpointing, tokens=8192, repeated=False):
    """Bytes of a rank at the peak of a step."""
    return (
        states(shape, method, ranks if sharded else 1)
        + besides(shape, method, sharded, checkpointing)
        + tokens * activations(shape, stream(method, sharded), checkpointing, repeated)
    )


def longest(shape, ranks, bytes_of_token):
    """Tokens of the longest group that fits beside fsdp's parts."""
    room = FITS - states(shape, "adamw", ranks) - besides(shape, "adamw", True, "full")
    return room / bytes_of_token


# --- what ranks send


@dataclass(frozen=True)
class Assumed:
    """What is assumed of machines and prices."""

    peak: float = 989e12  # FLOP/s of an H100 or H200 in bfloat16
    mfu: float = 0.5  # of it, while a rank computes
    reached: float = 0.8  # of a link's bandwidth
    price: float = 2.5  # euros for a GPU and an hour
    startup: float = 300.0  # seconds until the first pass
    hbm: float = 3.35e12 * 0.8  # bytes/s of the card's own memory
    pcie: float = 50e9  # bytes/s each way between a card and main memory
    main: float = 300e9  # bytes/s of a node's main memory
    tokens: int = 7168  # data.tokens_per_batch

    @property
    def rate(self):
        """FLOP/s of a rank."""
        return self.mfu * self.peak

    def bandwidth(self, link):
        """Bytes/s, each way, at which a rank gathers and reduces."""
        return self.reached * LINKS[link]

    def euros(self, ranks, seconds):
        """Of so many GPUs for so long."""
        return ranks * seconds / 3600 * self.price


NODE = 8  # GPUs
NVLINK, RAILS, ONE = "NVLink, one node", "400 Gb/s a GPU", "400 Gb/s a node"
# A ring through nodes enters each of them once, over all of its network cards together: 8 times 50 GB/s, or 50.
LINKS = {NVLINK: 450e9, RAILS: 400e9, ONE: 50e9}


def link_of(ranks):
    """The better kind of machine."""
    return NVLINK if ranks <= NODE else RAILS


def sent_by_ddp(shape, ranks, trained):
    """Bytes a step, as a ring all-reduce of float32 gradients."""
    return 2 * (ranks - 1) / ranks * 4 * trained


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank of fsdp receives, and sends, in one pass of full fine-tuning."""

    layers_forward: float
    layers_backward: float
    layers_reduced: float
    rest: float  # embedding and last norm: gathered once
    rest_reduced: float
    head: float
    head_reduced: float

    def of_pass(self, reduced=True):
        """All of them."""
        always = self.layers_forward + self.layers_backward + self.rest + self.head + self.head_reduced
        return always + (self.layers_reduced + self.rest_reduced if reduced else 0)


def sent_by_fsdp(shape, ranks):
    """bfloat16 weights and float32 gradients; the head float32 both ways, unless it is the embedding."""
    share, rest = (ranks - 1) / ranks, shape.head + shape.hidden
    head = 0 if shape.tied else share * 4 * shape.head
    return Sent(
        share * 2 * shape.body, share * 2 * shape.body, share * 4 * shape.body,
        share * 2 * rest, share * 4 * rest, head, head,
    )  # fmt: skip


def break_even(assumed, link, ranks):
    """Tokens a pass from which on communication hides behind the compute of the same layers: gathering in the forward
    pass; gathering and reducing in the backward pass; gathering alone in it; ddp's sum in the last backward pass."""
    ratio = (ranks - 1) / ranks * assumed.rate / assumed.bandwidth(link)
    return {"forward": ratio, "every_pass": 1.5 * ratio, "last_pass": 0.5 * ratio, "ddp": 2 * ratio}


@dataclass(frozen=True)
class Pass:
    """Seconds of one pass under fsdp."""

    compute: float
    waiting: float


def pass_of(shape, ranks, tokens, assumed, link=None, train=True, reduced=True):
    """What a rank computes in a pass of so many tokens, and how long it waits for others."""
    body, head = (flops * tokens / TOKENS / assumed.rate for flops in forward_flops(shape))
    sent, bandwidth = sent_by_fsdp(shape, ranks), assumed.bandwidth(link or link_of(ranks))
    waiting = max(0.0, sent.layers_forward / bandwidth - body) + (sent.rest + sent.head) / bandwidth
    if not train:
        return Pass(body + head, waiting)
    backward = sent.layers_backward + (sent.layers_reduced if reduced else 0)
    waiting += max(0.0, backward / bandwidth - 2 * body)
    waiting += (sent.head_reduced + (sent.rest_reduced if reduced else 0)) / bandwidth
    return Pass(3 * (body + head), waiting)


@dataclass(frozen=True)
class Plan:
    """Seconds of a step on so many ranks."""

    tokens: float  # of a rank in the mean
    passes: int
    compute: float  # of that many tokens
    longer: float  # what the rank with most tokens computes beyond it
    waiting: float
    update: float

    @property
    def seconds(self):
        """All of it."""
        return self.compute + self.longer + self.waiting + self.update


def step(shape, ranks, batch, assumed, link=None, train=True):
    """An optimiser step over a batch of pairs under fsdp; or, without training, a window of a reference's pass."""
    mean, skew = batch * TOKENS / ranks, imbalance(batch, ranks)
    passes = math.ceil(mean * skew / assumed.tokens)
    one = pass_of(shape, ranks, mean * skew / passes, assumed, link, train)
    compute = passes * one.compute
    update = 28 * shape.total / ranks / assumed.hbm if train else 0.0
    return Plan(mean, passes, compute / skew, compute * (1 - 1 / skew), passes * one.waiting, update)


def epoch(shape, ranks, batch, assumed, link=None, pairs=EPOCH):
    """Seconds of the reference's table and of the steps of an epoch."""
    table = pairs / WINDOW * step(shape, ranks, WINDOW, assumed, link, train=False).seconds
    return table, pairs / batch * step(shape, ranks, batch, assumed, link).seconds


# --- the tables


def table(head, rows):
    """As Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def gb(value):
    """Bytes as GB, in three digits at most."""
    value /= 1e9
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.095 else f"{value:.2f}"


def ms(seconds):
    """Seconds as milliseconds."""
    return f"{1e3 * seconds:.0f}" if seconds >= 0.00995 else f"{1e3 * seconds:.1f}"


def whole(value):
    """A number with thousands apart."""
    return f"{value:,.0f}"


def hours(seconds):
    """Seconds as minutes, hours or days."""
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 86400 else f"{seconds / 86400:.1f} days"


def parameters_table(assumed):
    """Parameters by part."""
    rows = [
        [name, f"{s.total:,}", f"{s.layers} × {s.layer / 1e6:.1f} M", f"{s.head / 1e6:.0f} M", f"{s.adapter():,}"]
        for name, s in SHAPES.items()
    ]
    return table(["", "parameters", "layers", "embedding, and head", "LoRA of rank 16"], rows)


def activations_table(assumed):
    """Bytes a token by what flows between layers."""
    used = {
        "bfloat16": "`fsdp`; `adamw_bf16`",
        "float32": "`adamw`, one GPU or `ddp`",
        "LoRA": "LoRA",
    }
    rows = []
    for name, shape in SHAPES.items():
        for flows, words in used.items():
            sizes = [activations(shape, flows, each) for each in CHECKPOINTING]
            rows.append([name, words, *(f"{size / 1e6:.2f} ({gb(8192 * size)})" for size in sizes)])
    return table(["", "", *(f"`{each}`: MB a token (GB of 8,192)" for each in CHECKPOINTING)], rows)


def memory_table(assumed):
    """GB of a rank: bold where it fits."""
    rows = []
    for name, shape in SHAPES.items():
        for method in METHODS:
            cells = []
            for sharded, ranks in ((False, 1), (True, 8), (True, 64)):
                sizes = [memory(shape, method, sharded, ranks, each) for each in CHECKPOINTING]
                cells.append(" / ".join(f"**{gb(size)}**" if size <= FITS else gb(size) for size in sizes))
            rows.append([name, method, gb(states(shape, method)), *cells])
    return table(["", "", "states", "one GPU, or `ddp` on any number", "`fsdp` on 8", "`fsdp` on 64"], rows)


def offload_table(assumed):
    """What parallel.offload=true leaves on the card and costs."""
    rows = []
    for name, ranks in (("8 B", 1), ("8 B", 8), ("70 B", 8), ("70 B", 64)):
        shape = SHAPES[name]
        node = min(ranks, NODE)
        own = shape.total / ranks
        kept = memory(shape, "adamw", True, ranks, "full") - states(shape, "adamw", ranks)
        update = 28 * own * node / assumed.main
        rows.append([
            name, ranks, gb(kept), gb(node * 16 * own), f"{8 * own / assumed.pcie:.2f}",
            f"{4 * own / assumed.pcie:.2f}", f"{update:.2f}",
        ])  # fmt: skip
    return table(
        ["", "GPUs", "GB on a card", "GB of main memory a node", "s a pass, to the card", "s a pass, back",
         "s a step, update"], rows,
    )  # fmt: skip


def compute_table(assumed):
    """FLOPs of a pair."""
    rows = []
    for name, shape in SHAPES.items():
        body, head = forward_flops(shape)
        useful = 3 * (body + head)
        rough = 6 * shape.total * SENT
        rows.append([
            name, f"{useful / 1e12:.2f}", f"{rough / 1e12:.2f}", f"{(body + head) / 1e12:.2f}",
            f"{body / 1e12:.2f}", f"{assumed.rate / useful:.1f}", f"{assumed.peak / useful:.1f}",
        ])  # fmt: skip
    share = f"{100 * assumed.mfu:.0f} %"
    return table(
        ["", "a step, TFLOP", "6 N tokens, prompt twice", "a reference's pass", "`full` adds",
         f"pairs/s of a GPU at {share}", "at the peak"], rows,
    )  # fmt: skip


def bytes_table(assumed):
    """Bytes and milliseconds by part."""
    cases = [("8 B", 8), ("8 B", 64), ("70 B", 64)]
    sent = [sent_by_fsdp(SHAPES[name], ranks) for name, ranks in cases]
    speeds = [assumed.bandwidth(link_of(ranks)) for _, ranks in cases]
    parts = {
        "layers, gathered forward": "layers_forward",
        "layers, gathered backward": "layers_backward",
        "layers' gradients": "layers_reduced",
        "embedding and last norm": "rest",
        "their gradients": "rest_reduced",
        "head (float32)": "head",
        "its gradient": "head_reduced",
    }
    rows = [
        [
            words,
            *(f"{gb(getattr(s, part))} GB, {ms(getattr(s, part) / b)} ms" for s, b in zip(sent, speeds, strict=True)),
        ]
        for words, part in parts.items()
    ]
    for words, reduced in (("a pass", True), ("a pass that reduces nothing (`last_pass`)", False)):
        cells = [(s.of_pass(reduced), b) for s, b in zip(sent, speeds, strict=True)]
        rows.append([words, *(f"{gb(size)} GB, {ms(size / b)} ms" for size, b in cells)])
    for words, trained in (("`ddp`, a step", "total"), ("`ddp` with LoRA 16, a step", "adapter")):
        cells = []
        for (name, ranks), b in zip(cases, speeds, strict=True):
            shape = SHAPES[name]
            size = sent_by_ddp(shape, ranks, shape.total if trained == "total" else shape.adapter())
            cells.append(f"{gb(size)} GB, {ms(size / b)} ms")
        rows.append([words, *cells])
    return table(["", *(f"{name} on {ranks}" for name, ranks in cases)], rows)


def break_even_table(assumed):
    """Tokens a pass."""
    rows = []
    for link, ranks in ((NVLINK, 8), (RAILS, 64), (ONE, 64)):
        tokens = break_even(assumed, link, ranks)
        rows.append([f"{link} ({ranks} GPUs)", f"{assumed.bandwidth(link) / 1e9:.0f}", *map(whole, tokens.values())])
    return table(
        ["", "GB/s", "forward", "backward, `every_pass`", "backward, `last_pass`", "`ddp`, its last pass"], rows
    )


def scaling_table(assumed):
    """A step of 8 B on more and more GPUs."""
    rows, shape = [], SHAPES["8 B"]
    cases = [(128, n, None) for n in (8, 16, 32, 64, 128)] + [(1024, 64, None), (128, 64, ONE), (1024, 64, ONE)]
    for batch, ranks, link in cases:
        plan = step(shape, ranks, batch, assumed, link)
        rows.append([
            f"{batch:,}", f"{ranks}" + (", one card a node" if link else ""), whole(plan.tokens),
            f"{imbalance(batch, ranks):.2f}", plan.passes, ms(plan.compute), ms(plan.longer), ms(plan.waiting),
            ms(plan.update), ms(plan.seconds), f"{plan.compute / plan.seconds:.0%}",
        ])  # fmt: skip
    return table(
        ["batch", "GPUs", "tokens a rank", "most over mean", "passes", "computes, ms", "longest rank", "waits",
         "update", "step", "of it useful"], rows,
    )  # fmt: skip


def cost_table(assumed):
    """An epoch of UltraFeedback on 8 B."""
    rows, shape = [], SHAPES["8 B"]
    for batch, ranks, link in ((128, 8, None), (128, 64, None), (1024, 64, None), (128, 64, ONE)):
        filled, trained = epoch(shape, ranks, batch, assumed, link)
        total = filled + trained + assumed.startup
        rows.append([
            f"{ranks}" + (", one card a node" if link else ""), f"{batch:,}", f"{filled / 60:.1f}",
            f"{trained / 60:.1f}", f"{EPOCH / trained / ranks:.1f}", f"{total / 60:.0f}",
            f"{assumed.euros(ranks, filled + trained):.1f}", f"{assumed.euros(ranks, total):.1f}",
        ])  # fmt: skip
    return table(
        ["GPUs", "batch", "table, min", "steps, min", "pairs/s of a GPU", "with the start, min", "euros",
         "with the start"], rows,
    )  # fmt: skip


def hybrid_table(assumed):
    """GB that each of a node's eight network cards carries in a step of 8 B on 64 GPUs."""
    shape, ranks = SHAPES["8 B"], 64
    sent, nodes = sent_by_fsdp(shape, ranks), ranks // NODE
    once = 2 * (nodes - 1) / nodes * 4 * shape.total / NODE  # an all-reduce of the parts that a card holds
    rows = []
    for passes in (1, 2, 4):
        every = passes * sent.of_pass() / NODE
        last = ((passes - 1) * sent.of_pass(False) + sent.of_pass()) / NODE
        rows.append([passes, gb(every), gb(last), gb(once)])
    return table(["passes a step", "`fsdp`, `every_pass`", "`fsdp`, `last_pass`", "hybrid (not built)"], rows)


MILLION = 10**6
# Tokens of prompts a second and GPU, 70 B. Published: TensorRT-LLM, FP8, two H100, 2,048 tokens in and 128 out, 762
# tokens/s out, so 762 * 16 / 2 in on each GPU. Half of it for bfloat16, and a third of that, are assumptions.
SERVED_FP8 = 762 * 2048 / 128 / 2
SERVED = {"served, conservative": 1000, "served, optimistic": SERVED_FP8 / 2, "served in FP8": SERVED_FP8}


def reference_table(assumed):
    """A 70 B reference for a million pairs."""
    shape, rows = SHAPES["70 B"], []
    for ranks in (8, 64):
        for words, rate in SERVED.items():
            seconds = MILLION * SENT / rate / ranks
            rows.append([words, ranks, whole(rate), hours(seconds), whole(assumed.euros(ranks, seconds))])
        seconds = MILLION / WINDOW * step(shape, ranks, WINDOW, assumed, train=False).seconds
        rate = MILLION * TOKENS / seconds / ranks
        rows.append(["sharded", ranks, whole(rate), hours(seconds), whole(assumed.euros(ranks, seconds))])
    return table(["", "GPUs", "tokens/s of a GPU", "time", "euros"], rows)


def live_table(assumed):
    """The table beside a reference that is asked at every step: 8 B trained once on a million pairs."""
    policy, other, ranks = SHAPES["8 B"], SHAPES["70 B"], 8
    steps = epoch(policy, ranks, 128, assumed, pairs=MILLION)[1]
    filled = MILLION / WINDOW * step(other, ranks, WINDOW, assumed, train=False).seconds
    asked = MILLION / 128 * step(other, ranks, 128, assumed, train=False).seconds
    rows = []
    for runs in (1, 5):
        with_table, live = filled + runs * steps, runs * (steps + asked)
        rows.append([
            runs, hours(with_table), whole(assumed.euros(ranks, with_table)), hours(live),
            whole(assumed.euros(ranks, live)), f"{live / with_table:.1f}",
        ])  # fmt: skip
    return table(["runs", "with a table", "euros", "asked at every step", "euros", "times"], rows)


def context_table(assumed):
    """The longest group on one device, and on eight of them together."""
    rows = []
    for name, ranks in (("1 B", 8), ("8 B", 8), ("8 B", 64), ("70 B", 64)):
        shape = SHAPES[name]
        sizes = {each: activations(shape, "bfloat16", each) for each in CHECKPOINTING}
        sizes["offload"] = kept_of_layer(shape, "bfloat16")
        cells = [f"{longest(shape, ranks, size) / 1e3:,.0f}" for size in sizes.values()]
        cells.append(f"{8 * longest(shape, ranks, sizes['full']) / 1e3:,.0f}")
        rows.append([name, ranks, *cells])
    return table(
        ["", "GPUs", "`off`", "`selective`", "`full`", "`full`, layers' inputs offloaded (planned)",
         "`full`, over 8 ranks (planned)"], rows,
    )  # fmt: skip


def ring_table(assumed):
    """What a ring of eight sends a layer, and from which span on that hides."""
    rows = []
    for name in ("8 B", "70 B"):
        shape = SHAPES[name]
        for tokens in (32768, 131072):
            sent = 7 / 8 * tokens * 4 * shape.kv
            work = 2 * shape.hidden * tokens**2 / 8
            products = 2 * shape.layer * tokens / 8
            least = 2 * shape.kv / shape.hidden * assumed.rate / assumed.bandwidth(NVLINK)
            rows.append([
                name, f"{tokens:,}", gb(sent), ms(sent / assumed.bandwidth(NVLINK)), ms(work / assumed.rate),
                ms(products / assumed.rate), whole(least),
            ])  # fmt: skip
    return table(
        ["", "tokens", "GB a rank receives", "NVLink, ms", "attention, ms", "products, ms", "least span to hide"], rows
    )


TABLES = {
    "plan_parameters": parameters_table,
    "plan_activations": activations_table,
    "plan_memory": memory_table,
    "plan_offload": offload_table,
    "plan_compute": compute_table,
    "plan_bytes": bytes_table,
    "plan_break_even": break_even_table,
    "plan_scaling": scaling_table,
    "plan_hybrid": hybrid_table,
    "plan_cost": cost_table,
    "plan_reference": reference_table,
    "plan_live": live_table,
    "plan_context": context_table,
    "plan_ring": ring_table,
}


def filled(page, assumed):
    """The page with these tables between their marks. Raises ValueError for a mark that it lacks."""
    for name, make in TABLES.items():
        pattern, new = rf"(<!-- {name} -->\n).*?(<!-- end -->)", make(assumed)
        page, count = re.subn(pattern, rf"\g<1>{new}\n\g<2>", page, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"the page has {count} places for {name}")
    return page


def main():
    """Print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--price", type=float, default=Assumed.price, help="euros for a GPU and an hour")
    parser.add_argument("--mfu", type=float, default=Assumed.mfu, help="share of the peak while a rank computes")
    parser.add_argument("--peak", type=float, default=Assumed.peak / 1e12, help="TFLOP/s")
    parser.add_argument("--reached", type=float, default=Assumed.reached, help="share of a link's bandwidth")
    parser.add_argument("--startup", type=float, default=Assumed.startup, help="seconds until the first pass")
    parser.add_argument("--tokens", type=int, default=Assumed.tokens, help="tokens per micro-batch of a step")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scale.md")
    args = parser.parse_args()
    assumed = Assumed(
        peak=args.peak * 1e12, mfu=args.mfu, reached=args.reached, price=args.price, startup=args.startup,
        tokens=args.tokens,
    )  # fmt: skip
    if args.write:
        PAGE.write_text(filled(PAGE.read_text(), assumed))
        return
    for name, make in TABLES.items():
        print(f"{name}\n\n{make(assumed)}\n")


if __name__ == "__main__":
    main()
