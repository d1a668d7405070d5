"""
Time and memory of the fused loss against its rivals: same inputs, same machine, same run.

  python tools/bench.py --out results/bench                 # two cores: about 8 minutes
  python tools/bench.py --rows 256 --vocab 49152 --width 576 --out results/bench_small

Rivals: the three GEMMs that no method can do without (four with a trainable head); plain autograd on full logits;
Liger-Kernel's chunked distillation loss and TRL's chunked divergence, each if installed (pip install liger-kernel trl datasets).
Forward KL, loss and gradients. Times: medians of interleaved repetitions. Memory: resident set of a fresh process above its
inputs (on a GPU: the allocator's peak). Gradient error: against float64 on 16 rows of a near-matched pair (KL about 0.001).
Writes  OUT.json, OUT.md, OUT.png
"""
import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import losses

CASES = {"frozen head, fp32": (False, "float32"), "trainable head, fp32": (True, "float32"),
         "frozen head, bf16": (False, "bfloat16")}


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--rows", type=int, default=1024, help="answer tokens N")
    p.add_argument("--vocab", type=int, default=151_936, help="V")
    p.add_argument("--width", type=int, default=896, help="H of student and teacher")
    p.add_argument("--repeats", type=int, default=3, help="interleaved repetitions")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    p.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="what is compared")
    p.add_argument("--peak", nargs=2, metavar=("CASE", "RIVAL"), help="internal: print the peak of one call, in bytes")
    p.add_argument("--out", required=True, help="files OUT.json, OUT.md and OUT.png")
    return p.parse_args(argv)


def make_inputs(args, case, rows=None):
    """Near-matched pair: hidden rows of width 1 that differ by 3%, logits of a few nats."""
    trainable, dtype = CASES[case]
    g = torch.Generator().manual_seed(0)
    rows, make = rows or args.rows, dict(device=args.device, dtype=getattr(torch, dtype))
    student = torch.randn(rows, args.width, generator=g)
    teacher = student + 0.03 * torch.randn(rows, args.width, generator=g)
    head = torch.randn(args.vocab, args.width, generator=g).mul_(1.5 / args.width**0.5).to(**make)
    return dict(student_hidden=student.to(**make).requires_grad_(), student_weight=head.requires_grad_(trainable),
                teacher_hidden=teacher.to(**make), teacher_weight=head.detach().clone(),
                targets=torch.randint(args.vocab, (rows,), generator=g).to(args.device))


def gemms(student_hidden, student_weight, teacher_hidden, teacher_weight, targets):
    with torch.no_grad():
        teacher_hidden @ teacher_weight.T
        logits = student_hidden @ student_weight.T
        logits @ student_weight
        if student_weight.requires_grad:
            logits.T @ student_hidden


def plain(student_hidden, student_weight, teacher_hidden, teacher_weight, targets):
    student = F.log_softmax((student_hidden @ student_weight.T).float(), dim=-1)
    with torch.no_grad():
        teacher = F.log_softmax((teacher_hidden @ teacher_weight.T).float(), dim=-1)
    F.kl_div(student, teacher, reduction="sum", log_target=True).backward()


def ours(**inputs):
    losses.fused_ce_kd(**inputs, temperature=1.0, ce_weight=0.0, kd_weight=1.0)[0].backward()


def liger(student_hidden, student_weight, teacher_hidden, teacher_weight, targets):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False, chunk_size=256)
    (loss(student_hidden, student_weight, teacher_hidden, teacher_weight, targets) * len(targets)).backward()


def trl(student_hidden, student_weight, teacher_hidden, teacher_weight, targets):
    from trl.trainer.distillation_trainer import _chunked_divergence_loss
    _chunked_divergence_loss(student_hidden[None], teacher_hidden[None], student_weight, teacher_weight,
                             torch.ones(1, len(targets), dtype=torch.long, device=targets.device), beta=0.0,
                             num_items_in_batch=1)[0].backward()


RIVALS = {"GEMMs alone": gemms, "plain": plain, "Liger": liger, "TRL": trl, "ours": ours}


def installed():
    import importlib.util
    needs = {"Liger": ["liger_kernel"], "TRL": ["trl", "datasets"]}
    missing = {r: [x for x in packages if not importlib.util.find_spec(x)] for r, packages in needs.items()}
    for rival, packages in missing.items():
        if packages:
            print(f"{rival} is left out: pip install {' '.join(packages)}")
    return [r for r in RIVALS if not missing.get(r)]


def run(rival, inputs):
    """Seconds of one call, gradients included."""
    for x in inputs.values():
        x.grad = None
    wait = torch.cuda.synchronize if inputs["targets"].is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    RIVALS[rival](**inputs)
    wait()
    return time.perf_counter() - start


def resident_bytes(key):
    """VmRSS (now) or VmHWM (peak) of this process, Linux."""
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def peak_bytes(args, case, rival):
    """Peak memory of one call above its inputs."""
    inputs = make_inputs(args, case)
    small = {k: (v.detach()[:64] % 64).requires_grad_(v.requires_grad) for k, v in inputs.items()}
    run(rival, small)  # imports and thread pools
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(rival, inputs)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident_bytes("VmRSS")
    run(rival, inputs)
    return resident_bytes("VmHWM") - before


def gradient_error(args, case, rival):
    """Relative error of the hidden rows' gradient against float64."""
    inputs = make_inputs(args, case, rows=16)
    if rival == "GEMMs alone":
        return None
    run(rival, inputs)
    exact = inputs["student_hidden"].detach().double().requires_grad_()
    head, teacher_head = inputs["student_weight"].detach().double(), inputs["teacher_weight"].double()
    teacher = (inputs["teacher_hidden"].double() @ teacher_head.T).log_softmax(-1)
    F.kl_div((exact @ head.T).log_softmax(-1), teacher, reduction="sum", log_target=True).backward()
    return float((inputs["student_hidden"].grad.double() - exact.grad).norm() / exact.grad.norm())


def measure(args):
    results = {}
    for case in args.cases:
        rivals = installed()
        times, inputs = {r: [] for r in rivals}, make_inputs(args, case)
        for repeat in range(args.repeats + 1):
            for rival in rivals:
                seconds = run(rival, inputs)
                if repeat:  # the first round warms up
                    times[rival].append(seconds)
                print(f"{case}: {rival} {seconds:.2f} s", flush=True)
        del inputs
        peaks = {}
        for rival in rivals:
            command = [sys.executable, __file__, "--peak", case, rival, "--out", args.out, "--device", args.device]
            for flag in ("rows", "vocab", "width"):
                command += [f"--{flag}", str(getattr(args, flag))]
            peaks[rival] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        results[case] = {r: {"seconds": sorted(times[r])[len(times[r]) // 2], "all_seconds": times[r], "peak_bytes": peaks[r],
                             "gradient_error": gradient_error(args, case, r)} for r in rivals}
    return results


def write_report(args, results):
    lines = []
    for case, rivals in results.items():
        own = rivals["ours"]
        lines += [f"**{case}**: N = {args.rows:,} rows, H = {args.width}, V = {args.vocab:,}, {args.device}", "",
                  "| | s | ours / it, time | GiB above inputs | ours / it, memory | error of the gradient |", "|---|---|---|---|---|---|"]
        for name, r in rivals.items():
            error = "" if r["gradient_error"] is None else f"{r['gradient_error']:.0e}"
            lines.append(f"| {name} | {r['seconds']:.2f} | {own['seconds'] / r['seconds']:.2f} | {r['peak_bytes'] / 2**30:.2f} | "
                         f"{own['peak_bytes'] / max(1, r['peak_bytes']):.2f} | {error} |")
        lines.append("")
    text = "\n".join(lines)
    Path(f"{args.out}.md").write_text(text)
    record = {"rows": args.rows, "vocab": args.vocab, "width": args.width, "device": args.device, "torch": torch.__version__,
              "threads": torch.get_num_threads(), "results": results}
    Path(f"{args.out}.json").write_text(json.dumps(record, indent=1))
    return text


def draw(results, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(results), figsize=(3.6 * len(results), 3.4), constrained_layout=True, squeeze=False)
    for axis, (case, rivals) in zip(axes[0], results.items()):
        for name, r in rivals.items():
            axis.scatter(r["seconds"], r["peak_bytes"] / 2**30, color="#e07b27" if name == "ours" else "#3b6fb6")
            axis.annotate(name, (r["seconds"], r["peak_bytes"] / 2**30), xytext=(4, 4), textcoords="offset points", fontsize=8)
        axis.set(title=case, xlabel="seconds", ylabel="GiB above the inputs", xlim=(0, None), ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main(args):
    if args.peak:
        print(peak_bytes(args, *args.peak))
        return
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    results = measure(args)
    print(write_report(args, results))
    draw(results, f"{args.out}.png")


if __name__ == "__main__":
    main(get_args())
