"""Is everything right on this CUDA device, and how fast is it? One command, under eight minutes.

    make gpu-check
    python benchmarks/gpu_check.py attention whole_model    # some of the parts

Each part runs in a process of its own, for so many seconds at most, and none ends another. What came out is written
into benchmarks/results/gpu_<card>.json after every part, and stands in a table at the end; the status is 1 where one
failed. Without a CUDA device nothing is checked, and a line says so. `--device cpu` tries the checks themselves, at
small sizes, without a device.
"""

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import gpu
from common import RESULTS, ROOT, llama, machine

SECONDS = 480  # of all parts together
LAST_LINES = 15

# --- the parts: each returns what it found, and says under "ok" and "said" what the table shows


def device_speed(device):
    """What the card can do at most: products of matrices in bfloat16, and copies within its memory."""
    import torch

    size = 8192 if device == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    block = torch.empty(2**29 if device == "cuda" else 2**20, device=device, dtype=torch.uint8)
    product_s, copy_s = _seconds(lambda: a @ b, device), _seconds(block.clone, device)
    tflops, tb_per_s = 2 * size**3 / product_s / 1e12, 2 * len(block) / copy_s / 1e12
    said = f"{tflops:.3g} TFLOP/s in bfloat16, {tb_per_s:.2g} TB/s"
    return {"ok": True, "said": said, "tflops_bf16": tflops, "copy_tb_per_s": tb_per_s}


def _seconds(call, device, repeats=20):
    """Seconds of one call, after three that are not counted."""
    for _ in range(3):
        call()
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait(device)
    return (time.perf_counter() - start) / repeats


def _wait(device):
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


BOUND = 1e-2  # of bfloat16: |ours - truth| / |truth|
HEADS = [(8, 8, 64), (9, 3, 64), (32, 8, 128), (8, 2, 256), (4, 4, 16)]  # of queries, of keys, their size
LAYOUTS = {
    "pairs": ((37, (5, 200)), (1, (64, 3)), (130, (1, 1)), (300, (129, 131))),
    "lists": ((17, (40, 41, 1, 70)), (90, (33,)), (5, (2, 300, 7))),
}
WINDOWS = (None, 16)


def attention(device):
    """Every backend against softmax written out in float64 over the whole pack: outputs and gradients."""
    from dpo_ref.models.attention import REGISTERED, available

    heads = HEADS if device == "cuda" else HEADS[:2]
    rows = []
    for backend in filter(available, REGISTERED):
        for case in product(heads, LAYOUTS, WINDOWS):
            row = {"backend": backend, "heads": case[0], "layout": case[1], "window": case[2]}
            rows.append(row | _attention_case(backend, *case, device))
    said = ", ".join(f"{name} {_worst(rows, name)}" for name in dict.fromkeys(row["backend"] for row in rows))
    return {"ok": all(row["ok"] for row in rows), "said": f"largest relative error: {said}", "rows": rows}


def _attention_case(backend, heads, layout, window, device):
    """Its errors, or why there are none: a case that a kernel refuses loses no other."""
    try:
        errors = _attention_errors(backend, heads, layout, window, device)
    except Exception as error:
        return {"ok": False, "raised": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    return {"ok": max(errors.values()) < BOUND, "errors": errors}


def _worst(rows, backend):
    own = [row for row in rows if row["backend"] == backend]
    refused = [row["raised"] for row in own if "raised" in row]
    largest = max((error for row in own for error in row.get("errors", {}).values()), default=math.nan)
    return f"{largest:.0e}" + (f" ({len(refused)} cases raised: {refused[0]})" if refused else "")


def _attention_errors(backend, heads, layout, window, device):
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from dpo_ref.models.attention import PackedLayout, PackedMask, register

    groups, (num_queries, num_keys, size) = LAYOUTS[layout], heads
    attend = ALL_ATTENTION_FUNCTIONS[register(backend)]
    mask = PackedMask(PackedLayout(groups, torch.device(device)), None)
    length = sum(prompt + sum(responses) for prompt, responses in groups)
    generator = torch.Generator(device).manual_seed(num_queries + size)
    q, k, v, d_out = (
        torch.randn(1, each, length, size, device=device, generator=generator).bfloat16()
        for each in (num_queries, num_keys, num_keys, num_queries)
    )

    def ours(q, k, v):
        out, _ = attend(torch.nn.Identity(), q, k, v, mask, scaling=size**-0.5, sliding_window=window)
        return out.transpose(1, 2)

    seen = visible(groups, window).to(device)
    found = _with_gradients(ours, q, k, v, d_out)
    truth = _with_gradients(
        lambda q, k, v: by_formula(q, k, v, seen), q.double(), k.double(), v.double(), d_out.double()
    )
    gaps = [float((one.double() - other).norm() / other.norm()) for one, other in zip(found, truth, strict=True)]
    return dict(zip(("out", "dq", "dk", "dv"), gaps, strict=True))


def visible(groups, window):
    """Which token of a pack sees which, from the definition: its own group's prompt and its own response, none that
    comes later, and none that is a window or more away."""
    import torch

    rows = []  # group, response (0: the prompt), position in its sequence
    for group, (prompt, responses) in enumerate(groups):
        rows += [(group, 0, position) for position in range(prompt)]
        for number, size in enumerate(responses, 1):
            rows += [(group, number, prompt + position) for position in range(size)]
    group, response, position = torch.tensor(rows).unbind(1)
    distance = position[:, None] - position
    same = (group[:, None] == group) & ((response == 0) | (response[:, None] == response))
    return same & (distance >= 0) & (distance < (window or len(rows)))


def by_formula(q, k, v, seen):
    """softmax(q k' / sqrt d) v over what is seen."""
    import torch

    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


def _with_gradients(attend, q, k, v, d_out):
    import torch

    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out.to(out.dtype))]


GRADIENT_BOUND = 5e-2  # of bfloat16 against float32; 1.1e-2 was seen on a random model, 2.9e-2 on a pretrained one


def whole_model(device):
    """Log-probabilities and the gradient of DPO: packed in bfloat16, against float32 and one response at a time by
    transformers' own forward pass."""
    import torch
    from pairs import pairs

    from dpo_ref.models.attention import REGISTERED, available
    from dpo_ref.models.packable import install

    wide = device == "cuda"
    shape = {"hidden_size": 512 if wide else 64, "intermediate_size": 1408 if wide else 128, "num_hidden_layers": 8}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 4096, "pad_token_id": 0}
    vocab, rows = 4096, []
    groups = pairs("hh", 16 if wide else 2, vocab)
    truth = _measured(llama(vocab, shape).to(device).eval(), groups, _one_at_a_time, device, torch.float32)
    for backend in filter(available, REGISTERED):
        model = llama(vocab, shape).to(device).eval()
        reason = install(model, backend)
        found = _measured(model, groups, _packed, device, torch.bfloat16)
        gap = (found[0] - truth[0]).abs()
        row = {
            "backend": backend,
            "unpacked_because": reason,
            "token_mean": float(gap.mean()),
            "token_max": float(gap.max()),
        }
        row["gradient"] = float((found[1] - truth[1]).norm() / truth[1].norm())
        rows.append(row | {"ok": reason is None and row["gradient"] < GRADIENT_BOUND})
    said = ", ".join(f"{row['backend']} {row['gradient']:.1e}" for row in rows)
    return {"ok": all(row["ok"] for row in rows), "said": f"gradient off by {said}", "rows": rows}


def _measured(model, groups, logps_of, device, dtype):
    """Token log-probabilities, and the gradient of DPO's loss against a reference that says 0."""
    import torch

    tokens = []
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        for group in groups:
            values = logps_of(model, group)
            chosen, rejected = values.split([len(ids) for ids in group.response_ids])
            (-torch.nn.functional.logsigmoid(0.1 * (chosen.sum() - rejected.sum())) / len(groups)).backward()
            tokens.append(values.detach())
    return torch.cat(tokens), torch.cat([parameter.grad.flatten().double() for parameter in model.parameters()])


def _packed(model, group):
    from dpo_ref.data.packing import collate
    from dpo_ref.models.logps import response_logps

    return response_logps(model, collate([group]).to(model.device)).tokens().double()


def _one_at_a_time(model, group):
    import torch

    found, prompt = [], len(group.prompt_ids)
    for response in group.response_ids:
        ids = torch.tensor([[*group.prompt_ids, *response]], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, prompt - 1 : -1].double()
        found.append(logits.log_softmax(-1).gather(1, ids[0, prompt:, None])[:, 0])
    return torch.cat(found)


START_BOUND = 1e-3  # of the loss of a policy that is its reference, against ln 2


def train_and_evaluate(device):
    """train.py as anybody types it: the loss of a policy that is its reference is ln 2; and evaluate.py."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        sizes = ["data.num_pairs=512", "data.num_eval_pairs=64", "data.num_test_prompts=32", "tracking=none"]
        _type("train.py", *sizes, f"output_dir={run}")
        _type("evaluate.py", f"policy={run}", "tracking=none")
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        answers = json.loads((run / "evaluation" / "evaluation.json").read_text())["metrics"]
    losses = [row["eval/loss"] for row in rows if "eval/loss" in row]
    off = abs(losses[0] - math.log(2))
    said = f"eval loss {losses[0]:.5f} -> {losses[-1]:.5f} (ln 2 = {math.log(2):.5f}), gold {answers['gold/mean']:.3f}"
    return {"ok": off < START_BOUND, "said": said, "losses": losses, "gold": answers["gold/mean"]}


def _type(*words):
    """Raises SystemExit with the last lines of a command that fails."""
    ended = subprocess.run(
        [sys.executable, *words], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    print(ended.stdout)
    if ended.returncode:
        raise SystemExit(f"{' '.join(words)}: status {ended.returncode}")


TESTS = ("models/test_attention_kernels.py", "models/test_head_kernels.py", "training/test_rounding.py")


def tests(device):
    """The tests that compute on a CUDA device where there is one."""
    words = ["-m", "pytest", "-p", "no:cacheprovider", *(f"tests/{name}" for name in TESTS)]
    ended = subprocess.run(
        [sys.executable, *words], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    print(ended.stdout)
    return {"ok": ended.returncode == 0, "said": ended.stdout.strip().splitlines()[-1]}


def _speed(shape, variants):
    """Rows of benchmarks/gpu.py."""
    asked = Namespace(pairs=64, tokens=8192, steps=5, peak=989.0, optimiser="adamw_bf16")
    rows = [gpu.attempt(shape, "ultrafeedback", variant, asked) for variant in variants]
    told = [f"{row['variant']} {_told(row)}" for row in rows]
    return {"ok": not any("failure" in row for row in rows), "said": "; ".join(told), "rows": rows}


def _told(row):
    return row["failure"] if "failure" in row else f"{row['pairs_per_second']:.1f} pairs/s, MFU {row['mfu']:.0%}"


def speed_1b(device):
    """Steps of a model of one billion parameters."""
    return _speed("1b", ("as shipped", "compiled"))


def speed_8b(device):
    """Steps of a model of eight billion parameters; needs about 120 GiB."""
    return _speed("8b", ("as shipped",))


PARTS = {
    device_speed: 40,
    attention: 70,
    whole_model: 45,
    train_and_evaluate: 90,
    tests: 90,
    speed_1b: 90,
    speed_8b: 90,
}
"""The parts in order of their value, and for how many seconds each may run."""
NAMED = {part.__name__: part for part in PARTS}
NEED_CUDA = ("speed_1b", "speed_8b")


# --- running them


def run_part(command, seconds, result, log):
    """What a part found, or why it found nothing: it failed, or its time was up. What it printed is in `log`."""
    start = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return {"ok": False, "said": f"not done after {seconds:.0f} s", "seconds": seconds}
    found = json.loads(result.read_text()) if result.exists() else {"ok": False, "said": _last_words(log, process)}
    return found | {"seconds": round(time.monotonic() - start, 1)}


def _last_words(log, process):
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"status {process.returncode}: {lines[-1][:100] if lines else 'nothing was printed'}"


def run_all(names, device, folder, seconds, keep):
    """Run parts one after the other; `keep` is given what is known after each."""
    found, end = {}, time.monotonic() + seconds
    for name in names:
        left = end - time.monotonic()
        result, log = folder / f"{name}.json", folder / f"{name}.log"
        command = [sys.executable, __file__, name, "--device", device, "--into", str(result)]
        limit = min(PARTS[NAMED[name]], left)
        found[name] = run_part(command, limit, result, log) if left > 0 else {"ok": False, "said": "no time was left"}
        print(line_of(name, found[name]), flush=True)
        if not found[name]["ok"] and log.exists():
            print(*log.read_text(errors="replace").splitlines()[-LAST_LINES:], sep="\n", flush=True)
        keep(found)
    return found


def line_of(name, found):
    """One row of the table."""
    return f"{'ok' if found['ok'] else 'FAILED':7} {name:18} {found.get('seconds', 0):6.1f} s  {found['said']}"


def card_file(card):
    """Where the results of a card are: those of NVIDIA H200 in gpu_h200.json."""
    return RESULTS / f"gpu_{re.sub('[^a-z0-9]+', '_', card.lower().removeprefix('nvidia ')).strip('_')}.json"


def kept_in(path):
    """Writes what the check found beside what else is known of the card."""

    def keep(found):
        before = json.loads(path.read_text()) if path.exists() else {"card": machine()["gpu"]}
        path.write_text(json.dumps(before | {"check": {"machine": machine(), "parts": found}}, indent=1) + "\n")

    return keep


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*NAMED, []], help=f"of {', '.join(NAMED)}; all without any")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--into", type=Path, help="run one part here, and write what it found into this file")
    args = parser.parse_args()
    if args.into:
        args.into.write_text(json.dumps(NAMED[args.parts[0]](args.device)))
        return
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: no CUDA device is here, so nothing was checked")
        return
    names = args.parts or [name for name in NAMED if args.device == "cuda" or name not in NEED_CUDA]
    with tempfile.TemporaryDirectory() as folder:
        keep = kept_in(card_file(torch.cuda.get_device_name())) if args.device == "cuda" else lambda found: None
        found = run_all(names, args.device, Path(folder), SECONDS, keep)
    print(f"\n{args.device}: {sum(each['ok'] for each in found.values())} of {len(found)} parts are ok")
    print(*(line_of(name, each) for name, each in found.items()), sep="\n")
    raise SystemExit(0 if all(each["ok"] for each in found.values()) else 1)


if __name__ == "__main__":
    main()
