"""
How fast answers are generated: synth_speech.py's way against transformers' own generate, same prompts, greedy.

Rival: AutoModelForCausalLM.generate in batches of 48 in input order, in float32 and in bfloat16.
Ours: as `torchrun --nproc_per_node=CORES synth_speech.py` answers on a CPU: one process a core, the dtype that is
faster, large batches sorted by length; and the same in one process, which is all there is on a GPU.
Tokens count up to and with the end of turn; loading is not counted. Called by bench.py.
"""
import functools
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import bench_lib as lib
import bench_step
import model as m
import synth_speech

NEW_TOKENS = 40
RIVAL_BATCH, OUR_BATCH = 48, 384


def add_arguments(group):
    group.add_argument("--prompts", type=int, help="prompts that are answered, of --data or of tools/questions.jsonl")


@functools.cache
def load(name, dtype, device):
    llm, tokenizer = m.load_llm(name, getattr(torch, dtype))
    return llm.to(device), tokenizer


def rival(rows, llm, tokenizer):
    """Tokens that transformers' own batched generate gives."""
    tokens, end = 0, m.end_token(tokenizer)
    for start in range(0, len(rows), RIVAL_BATCH):
        chats = [[{"role": "user", "content": r["prompt"]}] for r in rows[start:start + RIVAL_BATCH]]
        texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False,
                           return_token_type_ids=False).to(llm.device)
        ids = llm.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=end)
        for row in ids[:, inputs.input_ids.shape[1]:].tolist():
            tokens += row.index(end) + 1 if end in row else len(row)
    return tokens


def ours(rows, llm, tokenizer):
    """Tokens of one process's share, in batches as synth_speech.py makes them."""
    return sum(record["tokens"] for start in range(0, len(rows), OUR_BATCH)
               for record in synth_speech.answer(llm, tokenizer, rows[start:start + OUR_BATCH], NEW_TOKENS))


def run(way, rows, llm, dtype, device):
    """Job of a process -> tokens; without rows it loads."""
    if dtype == "faster":
        dtype = faster_dtype(device)
    loaded = load(llm, dtype, device)
    tokens = {"ours": ours, "transformers": rival}[way](rows, *loaded) if rows else 0
    lib.wait(device)
    return {"tokens": tokens, "dtype": dtype}


@functools.cache
def faster_dtype(device):
    return str(synth_speech.measured_dtype(device)).removeprefix("torch.")


def read_prompts(args):
    if args.data and Path(args.data).is_file():
        rows = [json.loads(line) for line in Path(args.data).read_text().splitlines()]
        rows = [r for r in rows if r["response"]]
    else:
        rows = [{"prompt": prompt} for prompt in bench_step.questions()]
    return [{"prompt": rows[i % len(rows)]["prompt"], "id": str(i)} for i in range(args.prompts)]


def measure(args):
    """-> {"ways": {name: tokens_per_s, all}, ...}"""
    rows, log, cores = read_prompts(args), Path(args.out) / "answers.log", lib.cores()
    by_length = sorted(rows, key=lambda r: len(r["prompt"]))
    ways = {"transformers, float32": ("transformers", "float32", [rows]),
            "transformers, bfloat16": ("transformers", "bfloat16", [rows]),
            "ours, one process": ("ours", "faster", [by_length])}
    if args.device == "cpu" and cores > 1:
        ways["ours"] = ("ours", "faster", [by_length[i::cores] for i in range(cores)])
    else:
        ways["ours"] = ways.pop("ours, one process")
    rates, dtypes = {name: [] for name in ways}, {}
    with tempfile.TemporaryDirectory() as folder:
        llm, _ = bench_step.prepare_models(args, Path(folder))
        job = {"llm": llm, "device": args.device}
        workers = {name: [lib.Worker(__file__, log, OMP_NUM_THREADS=str(cores // len(shares))) for _ in shares]
                   for name, (_, _, shares) in ways.items()}
        for name, (way, dtype, shares) in ways.items():
            for worker in workers[name]:  # loads, and a GPU's kernels
                dtypes[name] = worker.ask(way=way, rows=shares[0][:4] if args.device == "cuda" else [], dtype=dtype,
                                          **job)["dtype"]
        for _ in range(args.repeats):
            for name, (way, dtype, shares) in ways.items():
                start = time.perf_counter()
                for worker, share in zip(workers[name], shares):
                    worker.send(way=way, rows=share, dtype=dtypes[name], **job)
                tokens = sum(worker.receive()["tokens"] for worker in workers[name])
                rates[name].append(tokens / (time.perf_counter() - start))
                print(f"answers: {name} {rates[name][-1]:.0f} tokens/s", flush=True)
        for worker in [worker for some in workers.values() for worker in some]:
            worker.close()
    return {"ways": {name: {"tokens_per_s": lib.median(values), "all": values, "dtype": dtypes[name]}
                     for name, values in rates.items()},
            "prompts": len(rows), "new_tokens": NEW_TOKENS, "cores": cores, "llm": args.llm, "device": args.device}


def report(results):
    own = results["ways"]["ours"]["tokens_per_s"]
    title = (f"**Answers**: {results['prompts']} prompts, at most {results['new_tokens']} tokens, greedy, "
             f"{results['llm']}, {results['device']}"
             + (f", {results['cores']} cores" if results["device"] == "cpu" else ""))
    rows = [[name, r["dtype"], f"{r['tokens_per_s']:.0f}", f"{own / r['tokens_per_s']:.2f}"]
            for name, r in results["ways"].items()]
    return title + "\n\n" + lib.table(["", "dtype", "tokens/s", "ours / it, speed"], rows) + "\n"


def draw(results, path):
    figure, (axis,) = lib.figure(1)
    for place, (name, r) in enumerate(results["ways"].items()):
        axis.barh(place, r["tokens_per_s"], color=lib.colour(name))
    axis.set(title="answers", xlabel="tokens/s", yticks=range(len(results["ways"])), yticklabels=list(results["ways"]))
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    lib.serve(run)
