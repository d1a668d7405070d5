"""
Distil a text LLM (teacher) into a speech LLM (student), by text and by speech.

  python train_kd.py --data train.jsonl --eval-data heldout.jsonl --out out/run
  torchrun --nproc_per_node=8 train_kd.py --student ENCODER+LLM --data train.jsonl --out out/run

Reads   manifests of synth_speech.py: JSON lines with id, prompt, audio, response, finish
Writes  OUT/last, OUT/best (students), ckpt-STEP-SHA256.pt, log.jsonl, samples.jsonl, args.json

T2T: the student reads the question.   loss = CE(answer) + lambda * tau^2 * KL(teacher || student)
S2T: the student hears it.             the same + CTC, which keeps the adapter spelling the words
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers.utils import logging

import losses
import model as m

# answer tokens in which question and answer are not yet told apart by the answer itself:
EARLY = 8  # the gap shows there
PARTS = ("encoder", "adapter", "llm")
CHANNELS = ("t2t", "s2t", "ctc")  # text to text, speech to text, speech to spelling


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    g = p.add_argument_group("models and data")
    g.add_argument("--teacher", default=m.DEFAULT_LLM, help="text LLM, folder or hub id; frozen")
    g.add_argument("--student", default=m.DEFAULT_STUDENT,
                   help="ENCODER+LLM, a speech LLM of transformers (folder or hub id), "
                        "or a folder that this script wrote")
    g.add_argument("--trust-remote-code", action="store_true",
                   help="run the code that comes in the student's folder; read it first")
    g.add_argument("--revision", help="revision of hub models")
    g.add_argument("--data", nargs="+", required=True, help="manifests to train on")
    g.add_argument("--eval-data", nargs="+", default=[], help="manifests to measure on")
    g.add_argument("--max-bad-rows", type=int, default=0,
                   help="leave out so many unusable rows; OUT/bad_rows.jsonl lists them")
    g.add_argument("--labels", choices=["response", "reference"], default="response",
                   help="the teacher's answer, or the data set's")
    g.add_argument("--max-answer-tokens", type=int, default=256,
                   help="longer answers are cut there")
    g.add_argument("--out", required=True, help="output folder")
    g.add_argument("--feature-cache",
                   help="folder for the frozen encoder's features; off: encode at each step; "
                        "default: DATA/.features")
    g.add_argument("--teacher-cache",
                   help="folder for the teacher's hidden rows of every answer: its body runs once "
                        "a row and leaves memory; 2 bytes x width a token; default: no cache")
    g = p.add_argument_group("method")
    g.add_argument("--channels", nargs="+", choices=["t2t", "s2t"], default=["t2t", "s2t"],
                   help="text to text, speech to text")
    g.add_argument("--t2t-weight", type=float, default=1.0, help="weight of the text channel")
    g.add_argument("--s2t-weight", type=float, default=1.0, help="weight of the speech channel")
    g.add_argument("--loss", choices=list(losses.DIVERGENCES), default="forward_kl",
                   help="divergence from the teacher")
    g.add_argument("--kd-weight", type=float, default=0.5,
                   help="lambda of the divergence; the paper has 0.5")
    g.add_argument("--ce-weight", type=float, default=1.0,
                   help="weight of the cross-entropy; 0 = pure distillation")
    g.add_argument("--temperature", type=float, default=2.0,
                   help="tau of both models; the loss is scaled by tau^2")
    g.add_argument("--beta", type=float, default=0.5, help="of jsd and skew_kl, 0-1")
    g.add_argument("--ctc-weight", type=float, default=0.3,
                   help="CTC beside the speech channel; 0 = off")
    g = p.add_argument_group("what trains")
    g.add_argument("--train", nargs="+", choices=PARTS,
                   default=["adapter", "llm"], help="parts that train")
    g.add_argument("--freeze", help="of these, leave what this regular expression finds in a "
                   "parameter's name, e.g. 'layers\\.[0-3]\\.'")
    g.add_argument("--lora-rank", type=int, default=0,
                   help="LoRA on the LLM's linear layers, embeddings and head frozen, at --lr-llm "
                        "(1e-4 to 5e-4); needs peft; 0 = off")
    g.add_argument("--lora-alpha", type=float, default=32, help="LoRA is scaled by alpha / rank")
    g.add_argument("--lora-speech-only", action="store_true",
                   help="LoRA acts at the speech alone: by text the LLM stays what it is")
    g.add_argument("--share-teacher", action=argparse.BooleanOptionalAction, default=True,
                   help="with LoRA on the teacher itself: one copy of it, adapters off = teacher")
    g.add_argument("--lr-encoder", type=float, default=1e-5,
                   help="peak learning rate; 1e-6 to 5e-5")
    g.add_argument("--lr-adapter", type=float, default=2e-4,
                   help="peak learning rate while distilling; 5e-5 to 1e-3")
    g.add_argument("--lr-llm", type=float, default=2e-5,
                   help="peak learning rate; the paper: 5e-6 for 7 B")
    g.add_argument("--warm-start-steps", type=int, default=0,
                   help="optimizer steps of CTC alone, before distilling")
    g.add_argument("--warm-start-lr", type=float, default=1e-3,
                   help="peak learning rate of the warm start")
    g.add_argument("--warm-start-batch-size", type=int, default=24,
                   help="clips per GPU per step of the warm start")
    g = p.add_argument_group("optimisation")
    g.add_argument("--max-steps", type=int, default=0,
                   help="optimizer steps of distillation; 0 = --epochs")
    g.add_argument("--epochs", type=float, default=2,
                   help="passes over the data, if --max-steps is 0")
    g.add_argument("--batch-size", type=int, default=8, help="rows per GPU per forward, at most")
    g.add_argument("--batch-tokens", type=int, default=0,
                   help="positions per GPU per forward, padding included, at most; 0: no limit")
    g.add_argument("--global-batch-size", type=int, default=0,
                   help="rows per optimizer step over all GPUs; 0: no accumulation")
    g.add_argument("--lr-warmup-steps", type=int, default=20,
                   help="linear, in each phase; a cosine to zero follows")
    g.add_argument("--weight-decay", type=float, default=0.01, help="AdamW, matrices only")
    g.add_argument("--max-grad-norm", type=float, default=1.0,
                   help="clip the gradient to this norm")
    g.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16",
                   help="of the computation; what trains is float32")
    g.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=False,
                   help="recompute activations: less memory, about 30%% slower")
    g.add_argument("--shard", action="store_true",
                   help="FSDP2 in place of DDP: teacher, student and optimizer split over the GPUs")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                   help="torch.compile the LLM")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   choices=["cuda", "cpu"])
    g.add_argument("--workers", type=int, default=1,
                   help="processes per GPU that load data; 0 = none")
    g.add_argument("--seed", type=int, default=0,
                   help="of the adapter's first weights and the order of the data")
    g = p.add_argument_group("log, evaluation, checkpoints")
    g.add_argument("--log-every", type=int, default=5, help="optimizer steps")
    g.add_argument("--eval-every", type=int, default=0,
                   help="optimizer steps; 0 = only after the last")
    g.add_argument("--save-every", type=int, default=50, help="optimizer steps between checkpoints")
    g.add_argument("--keep", type=int, default=2, help="newest checkpoints that stay")
    g.add_argument("--resume", action="store_true",
                   help="go on from the newest whole checkpoint of OUT, if there is one")
    g.add_argument("--tensorboard", action="store_true",
                   help="also log to OUT/tensorboard (needs the package)")
    args = p.parse_args(argv)
    if args.channels == ["t2t"] and ("llm" not in args.train or args.lora_speech_only):
        p.error("--channels t2t trains nothing without --train llm, or with --lora-speech-only")
    if args.lora_rank and "llm" not in args.train:
        p.error("--lora-rank trains the LLM: add llm to --train")
    if args.lora_speech_only and not args.lora_rank:
        p.error("--lora-speech-only needs --lora-rank")
    try:
        re.compile(args.freeze or "")
    except re.error as error:
        p.error(f"--freeze {args.freeze}: {error}")
    if args.shard and ("RANK" not in os.environ or args.compile or args.dtype == "float16"):
        p.error("--shard needs torchrun, and goes with neither --compile nor --dtype float16")
    m.check_options(
        p, args, batch_size=1, warm_start_batch_size=1, log_every=1, save_every=1,
        max_answer_tokens=1, keep=1, seed=(0, 2**32), epochs=1e-3, temperature=1e-2,
        max_grad_norm=1e-6, lora_alpha=1e-3,
        **dict.fromkeys("""global_batch_size batch_tokens eval_every max_steps warm_start_steps
            lr_warmup_steps workers max_bad_rows t2t_weight s2t_weight kd_weight ce_weight
            ctc_weight lora_rank""".split(), 0),
        **dict.fromkeys("weight_decay lr_encoder lr_adapter lr_llm warm_start_lr".split(), (0, 1)))
    if not args.kd_weight + args.ce_weight:
        p.error("--kd-weight 0 and --ce-weight 0 leave nothing to learn; set one of them")
    if args.loss in ("jsd", "skew_kl") and not 0 < args.beta < 1:
        p.error(f"--beta {args.beta}: expected 0 < beta < 1")
    return args


# ---- data ----

def read_manifest(path, seen=None, bad=None):
    """Manifest -> rows with absolute audio paths; raises ValueError that names the line, or
    adds it to the list `bad`. seen: ids met before, and where."""
    path, seen = Path(path), {} if seen is None else seen
    if not path.is_file():
        raise ValueError(f"{path}: no such manifest; synth_speech.py writes one")

    def parse(row, where):
        if lost := [key for key in ("id", "prompt", "response") if key not in row]:
            raise ValueError(f"{where}: no {', '.join(lost)}; expected id, prompt, audio, response")
        m.check_texts(row, where, "prompt", "response", "reference", "audio", "finish",
                      "instruction", "system")
        seconds = row["seconds"] = row.get("seconds") or 0
        if not isinstance(seconds, int | float) or not 0 <= seconds <= m.MAX_SECONDS:
            raise ValueError(f"{where}: seconds is {seconds!r}, expected 0 to {m.MAX_SECONDS}")
        if not isinstance(row["id"], str | int) or seen.setdefault(str(row["id"]), where) != where:
            raise ValueError(f"{where}: id {row['id']!r} is no text, or also that of "
                             f"{seen.get(str(row['id']))}; every row needs its own")
        row["id"] = str(row["id"])
        if m.AUDIO_MARK in f"{row.get('system')}{row.get('instruction')}":
            raise ValueError(f"{where}: {m.AUDIO_MARK} stands in system or instruction; it is the "
                             "place of the sound, take it out")
        if not (row.get("audio") if row["prompt"] is None else row["prompt"].strip()):
            raise ValueError(f"{where}: neither prompt nor audio, or a blank prompt; expected text,"
                             " or null where none stands for the sound")
        if row.get("audio"):
            row["audio"] = m.file_below(path.parent, row["audio"], where)
        return row

    return m.json_lines(path, parse, bad)


def drop(rows, key, reasons, bad):
    """Rows without those whose row[key] has one of the reasons; they are added to `bad`."""
    why = [reasons.get(row.get(key)) for row in rows]
    bad += [{"id": row["id"], "reason": reason} for row, reason in zip(rows, why) if reason]
    return [row for row, reason in zip(rows, why) if not reason]


def answer_ids(tokenizer, row, labels, max_tokens):
    """The answer, tokenised once for teacher and both channels;
    a cut answer teaches no stopping."""
    ids = tokenizer(row[labels], add_special_tokens=False, split_special_tokens=True).input_ids
    cut = (row.get("finish") == "length" and labels == "response") or len(ids) > max_tokens
    return ids[:max_tokens] + ([] if cut else [m.end_token(tokenizer)])


class Rows(torch.utils.data.Dataset):
    """Rows of the manifest with everything that needs no model:
    ids, spelling, features or log-mel."""

    def __init__(self, rows, student, teacher_tokenizer, args, cache=None, teacher_cache=None):
        self.rows, self.student, self.teacher_tokenizer = rows, student, teacher_tokenizer
        self.args, self.cache, self.teacher_cache = args, cache, teacher_cache

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row, tokenizer = self.rows[i], self.student.tokenizer
        item = {"id": row["id"], "audio": row.get("audio"), "has_text": row["prompt"] is not None,
                "answer": []}
        if row.get(self.args.labels):
            item["answer"] = answer_ids(tokenizer, row, self.args.labels,
                                        self.args.max_answer_tokens)
        item["before"], item["after"] = m.chat_parts(tokenizer, row.get("system"),
                                                     row.get("instruction"))
        if item["has_text"]:
            before, after = m.chat_parts(self.teacher_tokenizer, row.get("system"),
                                         row.get("instruction"))
            item["said"] = m.text_ids(tokenizer, row["prompt"])
            item["teacher_prompt"] = (before + m.text_ids(self.teacher_tokenizer, row["prompt"])
                                      + after)
            # beside an instruction the prompt may be a caption: nobody says it
            item["spelling"] = ([] if row.get("instruction")
                                else self.student.spelling(row["prompt"]))
        if row.get("audio"):
            if self.cache:
                item["features"] = load_file(self.cache(row["audio"]))["x"]
            else:
                item["clip"] = self.student.clip(row)
        if self.teacher_cache and item["has_text"] and item["answer"]:
            item["teacher_hidden"] = load_file(self.teacher_cache(item))["x"]
        return item


@dataclass
class Place:
    """Where a row's tensor lies among those of its type."""
    dtype: torch.dtype
    start: int
    shape: torch.Size


def pack(items):
    """Rows -> what a worker sends: on its way each tensor is an open file, so rows share one."""
    found = {}

    def move(x):
        if not isinstance(x, torch.Tensor):
            return x
        parts = found.setdefault(x.dtype, [])
        parts.append(x.flatten())
        return Place(x.dtype, sum(map(len, parts[:-1])), x.shape)

    items = tree_map(move, items)
    return items, {dtype: torch.cat(parts) for dtype, parts in found.items()}


def unpack(batch):
    """What `pack` gives -> the rows as they were."""
    items, flat = batch
    return tree_map(lambda x: flat[x.dtype][x.start:x.start + x.shape.numel()].view(x.shape)
                    if isinstance(x, Place) else x, items)


def fingerprint(model, dtype):
    """Twelve characters that change with a model's weights or the type that it computes in."""
    digest = hashlib.sha1(str(dtype).encode())
    for value in model.state_dict().values():  # a few of every tensor: a merged LoRA is seen
        some = value.flatten()[::max(1, value.numel() // 256)]
        digest.update(some.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def fill_cache(things, path_of, load, compute, workers, rank, world, what):
    """Compute what is not on disk yet, 16 at a time in the order given -> one file each. What
    meets in a batch depends on `things` alone, so that a restart gives the same bits.

    `load` runs in worker processes: thing -> what `compute` wants, or str, why it cannot be used;
    `compute`: list -> tensors. Returns {path: why} of the latter.
    """
    batches, bad = [things[i:i + 16] for i in range(0, len(things), 16)][rank::world], {}
    todo = [batch for batch in batches if not all(path_of(x).exists() for x in batch)]
    loader = iter(DataLoader(todo, batch_size=None, num_workers=workers,
                             multiprocessing_context="fork" if workers else None,
                             collate_fn=lambda batch: [(path_of(x), load(x)) for x in batch]))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else SIGTERM to all looks like a worker's crash
    with tqdm(total=sum(map(len, todo)), desc=what, disable=rank > 0 or not todo) as bar, \
            torch.no_grad():
        for loaded in loader:
            bad |= {path: x for path, x in loaded if isinstance(x, str)}
            good = [(path, x) for path, x in loaded if path not in bad]
            for (path, _), value in zip(good, compute([x for _, x in good]) if good else []):
                if path.exists():
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_suffix(f".{os.getpid()}")
                save_file({"x": value.contiguous().cpu()}, temporary)
                os.replace(temporary, path)
            bar.update(len(loaded))
    if dist.is_initialized():
        dist.barrier()
    return bad


def feature_cache(args, student, rows, rank, world, dtype):
    """Read each clip; encode it once, unless the encoder trains or the cache is off -> function
    from audio path to the file of its features (S, D) in fp16, or None; {audio path: why} of clips
    that cannot be used.

    The file's name depends on the clip and on the encoder, so that neither can change unnoticed.
    """
    frozen = ("encoder" not in args.train and isinstance(student, m.SpeechLLM)
              and args.feature_cache != "off")
    encoder = fingerprint(student.encoder, dtype) if frozen else None

    def path_of(audio):
        stat = os.stat(audio)
        folder = Path(args.feature_cache or Path(audio).parent.parent / ".features") / str(encoder)
        return folder / (hashlib.sha1(f"{audio} {stat.st_size} {stat.st_mtime_ns}".encode())
                         .hexdigest() + ".safetensors")

    seconds = {row["audio"]: row.get("seconds", 0) for row in rows if row.get("audio")}
    clips = sorted(seconds, key=lambda clip: (seconds[clip], clip))  # like lengths: little padding

    def read(clip):
        try:
            waveform, said = m.load_audio(clip), seconds[clip]
        except (ValueError, OSError) as error:
            return str(error)
        length = len(waveform) / m.SAMPLE_RATE
        if length < 0.9 * said - 0.1:
            return f"{clip}: {length:.2f} s, but the manifest says {said}: was it cut?"
        return student.mel(waveform) if frozen else None

    def encode(mels):
        return [f.half() for f in student.features([mel.to(student.device) for mel in mels])]

    bad = fill_cache(clips, path_of, read, encode if frozen else lambda mels: [], args.workers,
                     rank, world, "encoding" if frozen else "reading")
    marks = torch.tensor([path_of(c) in bad for c in clips], dtype=torch.int, device=student.device)
    if world > 1:  # every rank must leave out the same
        dist.all_reduce(marks)
    return (path_of if frozen else None,
            {clip: str(read(clip)) for clip, mark in zip(clips, marks.tolist()) if mark})


def teacher_cache(args, teacher, data, rank, world):
    """Teach each row once -> function from item to the file of its hidden rows (n, H'), which
    give the exact divergence, whatever the loss; a few of the largest logits would not."""
    folder = Path(args.teacher_cache) / fingerprint(teacher, teacher.dtype)

    def path_of(item):
        ids = json.dumps([item["teacher_prompt"], item["answer"]])
        return folder / (hashlib.sha1(ids.encode()).hexdigest() + ".safetensors")

    items = sorted((i for i in data if i["has_text"] and i["answer"]),
                   key=lambda i: len(i["teacher_prompt"] + i["answer"]))
    fill_cache(items, path_of, lambda i: i, lambda items: teacher_rows(teacher, items), 0, rank,
               world, "teaching")
    return path_of


def row_lengths(tokenizer, rows, args, spoken_hz=3):
    """Positions that each row takes in the LLM: text channel, and so many a second it speaks."""
    def sizes(texts):
        return map(len, tokenizer(list(texts), add_special_tokens=False).input_ids)
    template = sum(map(len, m.chat_parts(tokenizer)))
    asked = sizes(" ".join(filter(None, map(r.get, ("system", "instruction", "prompt"))))
                  for r in rows)
    spoken = [round(spoken_hz * r.get("seconds", 0)) for r in rows]
    return [template + a + s + min(n + 1, args.max_answer_tokens)
            for a, s, n in zip(asked, spoken, sizes(r[args.labels] for r in rows))]


def too_long(args, rows, teacher, student):
    """{id: why} of the rows whose prompt and answer exceed the context of one of the LLMs."""
    rows = [row for row in rows if row.get(args.labels)]
    context = min(getattr(llm.config, "max_position_embeddings", None) or math.inf
                  for llm in (teacher, student.llm))
    sizes = row_lengths(student.tokenizer, rows, args, student.spoken_hz) if rows else []
    return {row["id"]: f"row {row['id']!r}: {size} tokens of prompt, speech and answer, the "
            f"models' context is {context}; shorten it or lower --max-answer-tokens"
            for row, size in zip(rows, sizes) if size > context}


def usable_rows(args, rows, global_batch_size, warm_batch):
    """Rows to distil, which a channel can use, and rows to hear, whose words are known.

    Raises: ValueError if there are fewer than a phase needs for one global batch.
    """
    for row in rows if args.shard else []:
        if not all(row.get(key) for key in ("prompt", "audio", args.labels)):
            raise ValueError(f"--shard: row {row['id']} lacks prompt, audio or {args.labels}; all "
                             "processes must do the same work, so leave such rows out")
    # where by text nothing trains, that channel gives no gradient: each rank needs sound
    needs = [{"t2t": "prompt", "s2t": "audio"}[c] for c in args.channels
             if c != "t2t" or "llm" in args.train and not args.lora_speech_only]
    distil_rows = [r for r in rows if r.get(args.labels) and any(r.get(key) for key in needs)]
    spoken_rows = [r for r in rows if args.warm_start_steps and r.get("audio") and r["prompt"]
                   and not r.get("instruction")]
    for what, found, size in (("distil", distil_rows, global_batch_size),
                              ("hear", spoken_rows, warm_batch if args.warm_start_steps else 0)):
        if len(found) < size:
            raise ValueError(f"{len(found)} rows to {what} with --labels {args.labels} in "
                             f"{', '.join(args.data)}, fewer than one global batch of {size}; "
                             "give more rows or a smaller batch")
    return distil_rows, spoken_rows


def micro_batches_of(rows, lengths, batch_size, batch_tokens, world):
    """One step's rows -> micro-batches within both limits (a longer row goes alone), longest
    first; their number is a multiple of `world`, so that every process gets as many."""
    batches = [[]]
    for i in sorted(rows, key=lambda i: -lengths[i]):  # the first of a batch sets its width
        width = lengths[(batches[-1] or [i])[0]]
        full = batch_tokens and (len(batches[-1]) + 1) * width > batch_tokens
        if batches[-1] and (full or len(batches[-1]) == batch_size):
            batches.append([])
        batches[-1].append(i)
    while len(batches) % world:
        batches.sort(key=len)
        largest = batches.pop()
        batches += [largest[::2], largest[1::2]]
    return batches


def plan_batches(lengths, batch_size, global_batch_size, steps, seed, batch_tokens=0, world=1):
    """Row indices of every micro-batch of every step:
    list (steps) of lists (micro-batches) of lists (rows).

    A function of its arguments alone: no restart changes it, and no number of processes changes
    which rows a step has. Rows of like length meet.
    """
    per_epoch, plan = len(lengths) // global_batch_size, []
    for epoch in range(math.ceil(steps / max(1, per_epoch))):
        rng = random.Random(f"{seed} {epoch}")
        order = rng.sample(range(len(lengths)), len(lengths))
        span = 20 * global_batch_size
        order = [i for s in range(0, len(order), span)
                 for i in sorted(order[s:s + span], key=lambda i: lengths[i])]
        batches = [order[i:i + global_batch_size]
                   for i in range(0, per_epoch * global_batch_size, global_batch_size)]
        rng.shuffle(batches)
        plan += [micro_batches_of(batch, lengths, batch_size, batch_tokens, world)
                 for batch in batches]
    return plan[:steps]


# ---- one pass through student and teacher ----

def teacher_rows(teacher, items):
    """One teacher forward for both channels -> the hidden rows that predict the answers,
    list of (n_i, H'); from the cache if the items carry them."""
    if "teacher_hidden" in items[0]:
        head = teacher.get_output_embeddings().weight
        return [item["teacher_hidden"].to(head.device) for item in items]
    if hasattr(teacher, "llm"):
        return base_rows(teacher, items)
    prompts, lengths = [i["teacher_prompt"] for i in items], [len(i["answer"]) for i in items]
    rows = [torch.tensor(i["teacher_prompt"] + i["answer"], device=teacher.device) for i in items]
    with torch.no_grad():
        hidden = m.answer_states(teacher, rows, lengths, len(os.path.commonprefix(prompts)))[0]
    return hidden.split(lengths)


def base_rows(student, items):
    """teacher_rows of the student's own LLM: LoRA off, eval mode. Through the student's forward,
    where FSDP gathers the weights."""
    llm, training, mask = student.llm, student.training, student.llm.lora_mask
    student.eval()
    llm.lora_mask = 0
    with torch.no_grad():
        hidden = student([i["teacher_prompt"] for i in items], [[] for _ in items],
                         [i["answer"] for i in items])[0]                        # (N, H)
    llm.lora_mask = mask
    student.train(training)
    return hidden.split([len(i["answer"]) for i in items])


def student_inputs(items, channel):
    """Arguments of SpeechLLM.forward for one channel;
    t2t puts the words where s2t puts the sound."""
    inputs = {"before": [i["before"] + (i["said"] if channel == "t2t" else []) for i in items],
              "after": [i["after"] for i in items], "answers": [i["answer"] for i in items]}
    if channel in ("s2t", "ctc"):
        inputs["clips"] = list(range(len(items)))
        if "features" in items[0]:
            inputs["features"] = [i["features"] for i in items]
        else:
            inputs["mels"] = [i["clip"] for i in items]
            if isinstance(items[0]["clip"], dict):  # HubStudent's clips are whole prompts
                inputs["before"] = inputs["after"] = [[] for _ in items]
    return {**inputs, "llm": channel != "ctc"}


def channel_items(items, channel):
    """The rows of a batch that a channel can use."""
    usable = [i for i in items if (i["has_text"] if channel == "t2t" else i["audio"])]
    return [i for i in usable if i["answer"] or channel == "ctc"]


def count_tokens(args, passes):
    """Supervised tokens of this rank's passes: answers by text, by speech, spelled pieces."""
    counts = [0, 0, 0]
    for channel, chosen, _ in passes:
        if channel != "ctc":
            counts[CHANNELS.index(channel)] += sum(len(i["answer"]) for i in chosen)
        if channel == "ctc" or (channel == "s2t" and args.ctc_weight):
            counts[2] += sum(len(i.get("spelling", [])) for i in chosen)
    return counts


def chunk_rows_of(head):
    """Rows whose logits exist at the same time. On a CPU 128 MiB of each model's, twice that if
    each chunk has to upcast the head; on a GPU more, since a chunk costs kernel launches."""
    if head.is_cuda:
        return max(256, 2**26 // len(head))
    size = 2**25 if head.dtype == torch.float32 else 2**26
    return 2 ** max(6, int(math.log2(size / len(head))))


def channel_loss(args, items, hidden, head, teacher_hidden, teacher_head, scales=(1.0, 1.0)):
    """Sums over the channel's answer tokens -> (loss, ce, kd).
    Without a text there is no teacher: CE only. Scales are the logits' of student and teacher."""
    total, hidden = None, hidden.split([len(i["answer"]) for i in items])
    for has_text in (True, False):
        chosen = [k for k, i in enumerate(items) if i["has_text"] is has_text]
        if not chosen:
            continue
        rows = torch.cat([hidden[k] for k in chosen])  # (N, H)
        targets = torch.tensor([t for k in chosen for t in items[k]["answer"]], device=rows.device)
        teacher = (torch.cat([teacher_hidden[items[k]["id"]] for k in chosen]) if has_text
                   else rows.detach())
        sums = losses.fused_ce_kd(
            student_hidden=rows, student_weight=head, teacher_hidden=teacher,
            teacher_weight=teacher_head if has_text else head, targets=targets, kind=args.loss,
            temperature=args.temperature, beta=args.beta, ce_weight=args.ce_weight,
            kd_weight=args.kd_weight if has_text else 0.0,
            student_logit_scale=scales[0], teacher_logit_scale=scales[1 if has_text else 0],
            chunk_rows=chunk_rows_of(head))
        total = sums if total is None else [a + b for a, b in zip(total, sums)]
    return total


def ctc_loss(items, logits, lengths):
    """CTC over the clips whose words are known;
    a sound without words is not taught to be silence."""
    spoken = [k for k, item in enumerate(items) if item.get("spelling")]
    if not spoken:
        return logits.sum() * 0
    targets = [items[k]["spelling"] for k in spoken]
    return losses.ctc(student_logits=logits[spoken], lengths=lengths[spoken], targets=targets)


def channel_pass(args, model, channel, items, teacher_hidden, llms, num_tokens):
    """One channel of a micro-batch -> its part of the step's loss, and for the log (6,): the loss,
    sums of CE and KD by text, of CE and KD by speech, of CTC."""
    hidden, logits, spelled, head = model(**student_inputs(items, channel))
    loss, logged = 0.0, torch.zeros(6, dtype=torch.float64, device=llms[0].device)
    if channel != "ctc":
        at = CHANNELS.index(channel)
        # after the forward: then FSDP has gathered it, if it is the student's
        teacher_head = llms[1].get_output_embeddings().weight
        total, *parts = channel_loss(args, items, hidden, head, teacher_hidden, teacher_head,
                                     list(map(m.logit_scale, llms)))
        loss = (args.t2t_weight, args.s2t_weight)[at] / num_tokens[at] * total
        logged[1 + 2 * at:3 + 2 * at] = torch.stack(parts)
    if logits is not None and (channel == "ctc" or args.ctc_weight):
        ctc = ctc_loss(items, logits, spelled)
        loss = loss + (1.0 if channel == "ctc" else args.ctc_weight) / num_tokens[2] * ctc
        logged[5] = ctc.detach()
    logged[0] = loss.detach()
    return loss, logged


# ---- evaluation ----

@torch.no_grad()
def evaluate(student, teacher, dataset, indices, channels=("t2t", "s2t"), batch_size=16,
             progress=False, stopped=()):
    """Per row and channel: sums over answer tokens, all and the first EARLY,
    of KL(teacher || student) and agreement.

    Channels beside t2t and s2t are controls: "silent" leaves the speech out,
    "other" plays another row's. `stopped` fills to end it early.
    Returns:
        {channel: (rows, 6) float64: KL, agreements, tokens, KL8, agreements8, tokens8}.
        KL at tau = 1, nats.
    """
    was_training = student.training
    student.eval()
    results = {channel: torch.zeros(len(indices), 6, dtype=torch.float64) for channel in channels}
    teacher_llm = getattr(teacher, "llm", teacher)
    heads = [m.whole(x.get_output_embeddings().weight).to(student.device).float()
             * m.logit_scale(x) for x in (student.llm, teacher_llm)]
    vocab = min(map(len, heads))
    autocast = torch.autocast(student.device.type, dtype=teacher_llm.dtype,
                              enabled=teacher_llm.dtype != torch.float32)
    for start in tqdm(range(0, len(indices), batch_size), desc="evaluating", unit="batch",
                      disable=not progress):
        if stopped:
            break
        items = [dataset[i] for i in indices[start:start + batch_size]]
        reference = torch.cat(teacher_rows(teacher, items)).float() @ heads[1][:vocab].T   # (N, V)
        for channel in channels:
            chosen = items
            if channel == "other":  # the neighbour's sound, under this row's prompt and answer
                chosen = [{**i, "features": j["features"]} if "features" in i
                          else {**i, "clip": j["clip"]}
                          for i, j in zip(items, items[1:] + items[:1])]
            with autocast:
                hidden, *_ = student(
                    **student_inputs(chosen, "s2t" if channel == "other" else channel))
            logits = hidden.float() @ heads[0][:vocab].T                                   # (N, V)
            log_student, log_teacher = logits.log_softmax(-1), reference.log_softmax(-1)
            kl = (log_teacher.exp() * (log_teacher - log_student)).sum(-1).double().cpu()  # (N,)
            agree = (logits.argmax(-1) == reference.argmax(-1)).double().cpu()
            lengths = [len(i["answer"]) for i in items]
            for row, (k, a) in enumerate(zip(kl.split(lengths), agree.split(lengths)), start):
                results[channel][row] = torch.stack(
                    [x.sum() for part in (slice(None), slice(EARLY))
                     for x in (k[part], a[part], torch.ones_like(k[part]))])
    student.train(was_training)
    return results


def eval_log(results):
    """Sums of evaluate, over all ranks -> the keys of log.jsonl."""
    log = {}
    for channel, sums in results.items():
        for suffix, (kl, agree, tokens) in (("", sums[:3].tolist()), ("8", sums[3:].tolist())):
            log[f"eval_kl{suffix}_{channel}"] = kl / max(1, tokens)
            log[f"eval_agree{suffix}_{channel}"] = agree / max(1, tokens)
    for suffix in ("", "8"):
        if {"t2t", "s2t"} <= set(results):  # the live modality gap
            log[f"eval_gap{suffix}"] = log[f"eval_kl{suffix}_s2t"] - log[f"eval_kl{suffix}_t2t"]
    return log


# ---- what trains ----

def load_teacher(args, student, dtype):
    """-> (teacher, tokenizer); with LoRA on the teacher's own weights, the student itself,
    whose LLM `teacher_rows` then reads with LoRA off."""
    shares = args.lora_rank and args.share_teacher and not args.teacher_cache
    if shares and args.student.partition("+")[2] == args.teacher:
        return student, student.tokenizer
    teacher, tokenizer = m.load_llm(args.teacher, dtype, args.revision)
    own = {k.replace(".base_layer.", "."): v for k, v in student.llm.state_dict().items()}
    if shares and all(k in own and torch.equal(own[k].to(v), v)
                      for k, v in teacher.state_dict().items()):
        return student, student.tokenizer
    return teacher.requires_grad_(False), tokenizer


def add_lora(args, student):
    """LoRA by --lora-*, unless the student brings it along from such a run."""
    wanted = dict(rank=args.lora_rank, alpha=args.lora_alpha) if args.lora_speech_only else None
    present = getattr(student.config, "speech_lora", None)
    if present and present != wanted:
        raise ValueError(f"{args.student} has LoRA at its speech, {present}; "
                         f"these options ask for {wanted}")
    if wanted and isinstance(student, m.HubStudent):
        raise ValueError(f"--lora-speech-only: {args.student} does not tell its speech from its "
                         "template, only ENCODER+LLM does; leave the option out")
    if args.lora_rank and not present:
        student.llm.name_or_path = args.student.partition("+")[2] or args.student
        m.add_lora(student.llm, args.lora_rank, args.lora_alpha)
    if wanted:
        student.config.speech_lora = wanted


def trainable_names(args, student):
    """Names of the parameters that train: of the parts of --train (with LoRA, nothing else of the
    LLM) without those that --freeze finds; and the latter. ValueError if it finds none or all."""
    names = {name for name, _ in student.named_parameters() if name.split(".")[0] in args.train
             and "embed_positions" not in name  # sinusoids
             and (not args.lora_rank or not name.startswith("llm.") or ".lora_" in name)}
    frozen = {name for name in names if args.freeze and re.search(args.freeze, name)}
    if args.freeze and not 0 < len(frozen) < len(names):
        raise ValueError(f"--freeze {args.freeze!r} finds {len(frozen)} of the {len(names)} "
                         f"parameters that train, e.g. {min(names)}; expected some of them")
    return names - frozen, frozen


# ---- checks, checkpoints ----

def check_pair(teacher, teacher_tokenizer, student):
    """Same ordinary vocabulary and end of turn, and plain heads;
    special tokens may be named differently."""
    a, b = teacher_tokenizer.get_vocab(), student.tokenizer.get_vocab()
    for tokenizer, vocab in ((teacher_tokenizer, a), (student.tokenizer, b)):
        for token in tokenizer.get_added_vocab():
            vocab.pop(token, None)
    ends = m.end_token(teacher_tokenizer), m.end_token(student.tokenizer)
    if a != b or ends[0] != ends[1]:
        example = next((t for t in sorted(a.keys() | b.keys()) if a.get(t) != b.get(t)), None)
        raise RuntimeError("teacher and student need one tokenizer: "
                           f"{teacher_tokenizer.name_or_path} and {student.tokenizer.name_or_path} "
                           f"differ, e.g. in {example!r}, and end a turn with {ends}")
    for llm in (getattr(teacher, "llm", teacher), student.llm):
        if getattr(llm.config.get_text_config(decoder=True), "final_logit_softcapping", None):
            raise RuntimeError(f"{llm.config.model_type}: capped logits (final_logit_softcapping) "
                               "are not supported; choose another model")


def shard(student, teacher, dtype, device):
    """FSDP2: layers one by one, then the rest. Layers are gathered in `dtype` when they are needed,
    gradients are summed in float32; the adapter is all float32. The teacher's head stays whole."""
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    options = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False))
    one = teacher is student or teacher.device.type == "meta"
    llms = [student.llm] if one else [student.llm, teacher]
    for layer in [x for part in (student.encoder, *llms) for x in m.layers_of(part)]:
        fully_shard(layer, **options)
    fully_shard(student.adapter, mesh=mesh, reshard_after_forward=False,
                mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    fully_shard(student, **options)
    if not one:
        teacher.get_output_embeddings().to(device)
        fully_shard(teacher.base_model, reshard_after_forward=True, **options)


def checkpoints(out):
    """Files ckpt-STEP-SHA256.pt, the newest first."""
    return sorted(out.glob("ckpt-*.pt"), reverse=True)


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def save_checkpoint(out, student, optimizer, scaler, step, best, args, world, write=True):
    """Trainable weights and everything else that a bit-exact continuation needs; complete or not
    there. --keep of them stay. With --shard every rank must call it, one with `write`.
    Raises OSError if it cannot be written."""
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    weights = {k: v.detach() for k, v in student.named_parameters() if id(v) in trained}
    state = tree_map(lambda x: m.whole(x, write),
                     {"model": weights, "optimizer": optimizer.state_dict()})
    if not write:
        return
    temporary = out / "ckpt.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save({**state, "scaler": scaler.state_dict(), "step": step, "best": best,
                        "args": vars(args), "world": world}, file)
            file.flush()
            os.fsync(file.fileno())
    except (RuntimeError, OSError) as error:  # torch does not say why, the system not where
        raise OSError(f"{temporary} cannot be written ({error}): "
                      f"{shutil.disk_usage(out).free / 2**30:.2f} GiB are free there") from error
    path = out / f"ckpt-{step:06d}-{sha256(temporary)}.pt"
    os.replace(temporary, path)
    older = [old for old in checkpoints(out) if old.name < f"ckpt-{step:06d}"]
    for old in {*checkpoints(out)} - {path, *older[:args.keep - 1]}:
        old.unlink()


def load_checkpoint(out, student, optimizer, scaler, args, world):
    """The newest whole checkpoint -> (step, best, names of newer ones, which are damaged)."""
    files = checkpoints(out)
    whole = next((k for k, file in enumerate(files) if file.stem.endswith(sha256(file))), None)
    if whole is None:
        raise RuntimeError(f"{out}: no checkpoint has the SHA-256 that its name says "
                           f"({len(files)} tried); copy one back, or choose another --out")
    path = files[whole]
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: no checkpoint can be read from it ({str(error)[:99]}); start "
                         "afresh in another --out") from error
    free = ("resume", "device", "workers", "tensorboard", "out", "log_every", "save_every",
            "feature_cache", "keep", "shard")
    changed = [f"{k} {saved['args'].get(k)!r} -> {v!r}" for k, v in vars(args).items()
               if k not in free and saved["args"].get(k) != v]
    if saved["world"] != world or changed:
        raise ValueError(f"{path} was written by {saved['world']} processes, this run has {world}; "
                         f"changed options: {', '.join(changed) or 'none'}; "
                         "repeat the old ones, or start afresh in another --out")
    parameters = dict(student.named_parameters())
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [k for k, p in parameters.items() if id(p) in trained and k not in saved["model"]]
    if missing:
        raise ValueError(f"{path}: no weights for {missing[0]} and {len(missing) - 1} more; "
                         "is this the same student?")

    def like(value, p):  # whole, as in the file -> sharded as the parameter is
        sharded = value.shape == p.shape and isinstance(p, DTensor)
        return (distribute_tensor(value.to(p.device), p.device_mesh, p.placements)
                if sharded else value)

    for name, value in saved["model"].items():
        parameters[name].data.copy_(like(value, parameters[name]))
    in_order = [p for group in optimizer.param_groups for p in group["params"]]
    for index, state in saved["optimizer"]["state"].items():
        state.update({key: like(value, in_order[index]) for key, value in state.items()})
    optimizer.load_state_dict(saved["optimizer"])
    scaler.load_state_dict(saved["scaler"])
    return saved["step"], saved["best"], [file.name for file in files[:whole]]


def cut_back(path, step):
    """Leave the lines before a step's evaluation, which is repeated: they are as they would be
    without a stop."""
    lines = path.read_text().splitlines(True) if path.exists() else []
    logged = [(line, json.loads(line)) for line in lines if line.endswith("\n")]
    m.write_atomically(path, "".join(line for line, record in logged if record["step"] < step
                                   or record["step"] == step and "loss" in record))


def make_optimizer(args, student):
    """AdamW over the parts that train; matrices decay, vectors do not. The loop sets the rates."""
    groups = []
    for name in args.train:
        trainable = [p for p in getattr(student, name).parameters() if p.requires_grad]
        groups += [{"params": [p for p in trainable if p.dim() >= 2],
                    "weight_decay": args.weight_decay, "part": name},
                   {"params": [p for p in trainable if p.dim() < 2],
                    "weight_decay": 0.0, "part": name}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)


def print_step(record, step, steps, left_s):
    """One line for people: where the run is, what it costs, how long it takes."""
    shown = ("loss", "ce_s2t", "kd_s2t", "ce_t2t", "kd_t2t", "ctc", "grad_norm", "lr")
    cells = [f"{record['phase']} {step:5d}/{steps}",
             *(f"{k} {record[k]:.4g}" for k in shown if record[k]),
             f"{record['tokens_per_s']:.0f} tok/s", f"{record['memory']:.1f} GiB",
             f"padding {record['padding']:.1%}", f"data wait {record['wait']:.1%}",
             f"{left_s / 60:.1f} min left"]
    print(" | ".join(cells), flush=True)


def write_samples(student, rows, path, step):
    """The student's answers by speech to a few rows, for whoever would rather read than count."""
    answers = student.generate(rows, max_new_tokens=40)
    with open(path, "a") as file:
        for row, text in zip(rows, answers):
            file.write(json.dumps({"step": step, "prompt": row["prompt"], "by_speech": text,
                                   "teacher": row["response"]}) + "\n")
    print(f"      asked: {rows[0]['prompt']!r}\n      by speech: {answers[0]!r}")


# ---- main and what it calls, in the order of the calls ----

def start_processes(args):
    """-> rank, world size and device; with torchrun, all processes have met."""
    if "RANK" not in os.environ:
        return 0, 1, torch.device(args.device)
    if args.device == "cpu":
        dist.init_process_group("gloo")  # torchrun sets one thread a process
        torch.set_num_threads(max(1, m.cores() // int(os.environ["LOCAL_WORLD_SIZE"])))
        device = torch.device("cpu")
    else:
        dist.init_process_group("nccl")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return dist.get_rank(), dist.get_world_size(), device


def batch_sizes(args, world):
    """-> rows of one optimizer step over all processes, distilling and in the warm start."""
    at_once = args.batch_size * world
    size = args.global_batch_size or at_once
    if size % at_once:
        raise ValueError(f"--global-batch-size {size} is not a multiple of "
                         f"--batch-size {args.batch_size} x {world} processes; "
                         f"use {at_once * max(1, size // at_once)}")
    return size, args.warm_start_batch_size * world


def load_models(args, device, dtype):
    """-> student, teacher, the teacher's tokenizer, names of the parameters that train and of
    those that --freeze keeps."""
    torch.manual_seed(args.seed)  # the adapter's first weights are the same on every rank
    student = m.load_student(args.student, args.revision, args.trust_remote_code)
    (student.encoder if args.shard else student).to(device)  # what is sharded moves piece by piece
    if isinstance(student, m.HubStudent) and args.warm_start_steps:
        raise ValueError(f"--warm-start-steps {args.warm_start_steps}: {args.student} has no CTC "
                         "adapter to warm up, only ENCODER+LLM has; use 0")
    for name in ("encoder", "llm"):
        if name not in args.train or name == "llm" and args.lora_rank:  # frozen: needs no master
            for tensor in getattr(student, name).state_dict(keep_vars=True).values():
                if tensor.is_floating_point():  # module.to would round RoPE's frequencies too
                    tensor.data = tensor.data.to(dtype)
    teacher, teacher_tokenizer = load_teacher(args, student, dtype)
    if not args.shard or args.teacher_cache:
        teacher.to(device)
    check_pair(teacher, teacher_tokenizer, student)
    add_lora(args, student)
    trainable, frozen = trainable_names(args, student)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in trainable)
        if name in trainable:
            parameter.data = parameter.data.float()
    for llm in (student.llm, getattr(teacher, "llm", teacher)):
        m.suit_attention(llm)
    if args.gradient_checkpointing:  # renamed in transformers 5.23
        getattr(student.llm, "activation_checkpointing_enable",
                student.llm.gradient_checkpointing_enable)()
    elif not args.compile:
        m.keep_little(student.llm)
    if args.compile and (device.type == "cuda" or shutil.which("g++")):
        student.llm.base_model.compile(dynamic=True)
    elif args.compile and not int(os.environ.get("RANK", 0)):
        print("--compile: no C++ compiler (g++) found, running eagerly")
    return student, teacher, teacher_tokenizer, trainable, frozen


class Phase(NamedTuple):
    """Warm start or distillation, from `first_step` on."""
    name: str
    rows: Rows
    plan: list       # row indices of every micro-batch of every step, see plan_batches
    first_step: int
    peaks: dict      # peak learning rate of each part that trains
    channels: list


def prepare_data(args, train_rows, eval_rows, bad, models, sizes, rank, world, dtype):
    """Rows -> the phases, and the rows to measure on; the caches are filled.

    models: student, teacher and the teacher's tokenizer; sizes: as of batch_sizes. Rows that
    cannot be used are added to `bad`; ValueError if that are too many.
    """
    (student, teacher, teacher_tokenizer), (global_batch_size, warm_batch) = models, sizes
    train_rows, eval_rows = (drop(rows, "id", too_long(args, rows, teacher, student), bad)
                             for rows in (train_rows, eval_rows))
    m.leave_out(bad, args.max_bad_rows, args.out, rank == 0)
    needed = sum(usable_rows(args, train_rows, global_batch_size, warm_batch), eval_rows)
    cache, unread = feature_cache(args, student, needed, rank, world, dtype)
    train_rows, eval_rows = (drop(rows, "audio", unread, bad) for rows in (train_rows, eval_rows))
    said = m.leave_out(bad, args.max_bad_rows, args.out, rank == 0)
    if said and rank == 0:
        print(said)
    distil_rows, spoken_rows = usable_rows(args, train_rows, global_batch_size, warm_batch)
    distil_steps = args.max_steps or max(
        1, round(args.epochs * len(distil_rows) / global_batch_size))
    plan = plan_batches(row_lengths(student.tokenizer, distil_rows, args, student.spoken_hz),
                        args.batch_size, global_batch_size, distil_steps, args.seed,
                        args.batch_tokens, world)
    warm_plan = plan_batches([r.get("seconds", 0) for r in spoken_rows],
                             args.warm_start_batch_size, warm_batch, args.warm_start_steps,
                             args.seed)
    hidden_of = None
    if args.teacher_cache:
        used = {i for step in plan for batch in step for i in batch}
        taught = [{**row, "audio": None} for row in [distil_rows[i] for i in sorted(used)]
                  + eval_rows]
        hidden_of = teacher_cache(args, teacher, Rows(taught, student, teacher_tokenizer, args),
                                  rank, world)
        teacher.base_model.to("meta")  # its body leaves memory, its head stays
    spoken, distilled, measured = (
        Rows(rows, student, teacher_tokenizer, args, cache, hidden)
        for rows, hidden in ((spoken_rows, None), (distil_rows, hidden_of), (eval_rows, hidden_of)))
    peaks = {name: getattr(args, f"lr_{name}") for name in args.train}
    return (Phase("warm-start", spoken, warm_plan, 0, {"adapter": args.warm_start_lr}, ["ctc"]),
            Phase("distil", distilled, plan, args.warm_start_steps, peaks, args.channels)), measured


def open_log(args, step):
    """-> function that adds a record to OUT/log.jsonl and TensorBoard."""
    writer = None
    if args.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise RuntimeError("--tensorboard needs the package tensorboard: "
                               "pip install tensorboard") from error
        writer = SummaryWriter(Path(args.out) / "tensorboard", purge_step=step + 1)

    def log(record):
        with open(Path(args.out) / "log.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
        for key, value in record.items():
            if writer and isinstance(value, float):
                writer.add_scalar(key, value, record["step"])
    return log


def print_start(args, student, phases, eval_set, frozen, text_trains, step, damaged):
    """What this run is made of, and where it goes on."""
    if step or damaged:
        print(f"going on from step {step}"
              + "".join(f"; {name} is damaged and left out" for name in damaged))
    sizes = {name: sum(p.numel() for p in getattr(student, name).parameters() if p.requires_grad)
             for name in PARTS}
    print(f"{len(phases[1].rows)} rows to distil, {len(phases[0].rows)} to hear, "
          f"{len(eval_set)} to measure on; trains: "
          + ", ".join(f"{name} {size / 1e6:.1f} M" for name, size in sizes.items() if size)
          + f"; --freeze keeps {len(frozen)} parameters as they are" * bool(frozen))
    if "t2t" in args.channels and not text_trains:
        print("by text nothing trains, so the text channel is measured but not trained")


def measure(args, student, teacher, rows, stopped, rank, world):
    """Every rank evaluates its share -> record of all for the log; None if SIGTERM came to one."""
    mine = list(range(rank, len(rows), world))
    others = [0] * (-(-len(rows) // world) - len(mine))  # as many rows on every rank
    results = evaluate(student, teacher, rows, mine + others, args.channels,
                       stopped=() if args.shard else stopped)
    if args.shard:  # what the backward would do
        student.reshard()
        student.adapter.reshard()
    sums = torch.stack([values[:len(mine)].sum(0) for values in results.values()]
                       + [torch.full((6,), len(stopped), dtype=torch.float64)]).to(student.device)
    if dist.is_initialized():
        dist.all_reduce(sums)
    *sums, stops = sums.cpu()
    return None if stops[0] else eval_log(dict(zip(results, sums)))


def begin_phase(args, student, phase, trainable, step, rank, world):
    """-> the student, wrapped for several processes, and an iterator over this rank's batches."""
    for name, parameter in student.named_parameters():  # the warm start trains the adapter alone
        parameter.requires_grad_(name in trainable  # which FSDP reads only once
                                 and (args.shard or name.split(".")[0] in phase.peaks))
    student.train()
    model = student
    if dist.is_initialized() and not args.shard:
        index = student.device.index
        model = DistributedDataParallel(student, gradient_as_bucket_view=True,
                                        device_ids=None if index is None else [index])
    todo = phase.plan[step - phase.first_step:]
    stream = iter(DataLoader(  # forked: workers share the student's tokenizer
        phase.rows, batch_sampler=[batch for batches in todo for batch in batches[rank::world]],
        num_workers=args.workers, collate_fn=pack,
        multiprocessing_context="fork" if args.workers else None))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a dead worker is found at the fetch
    return model, stream


def fetch(stream, count, stopped):
    """The next `count` micro-batches; none after SIGTERM."""
    try:
        return [unpack(next(stream)) for _ in range(count)]
    except RuntimeError as error:
        if stopped:  # SIGTERM to all processes ends the workers too
            return []
        raise RuntimeError(f"{error}; memory full? --resume goes on, also with fewer "
                           "--workers") from error


def update(args, optimizer, scaler, peaks, step):
    """Clip the gradient, step the optimizer -> the gradient's norm."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if group["part"] not in peaks:
                p.grad = None
            elif p.grad is None:  # FSDP leaves out what no channel used, DDP gives it zeros
                p.grad = torch.zeros_like(p)
    scaler.unscale_(optimizer)  # clip the true gradient
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = m.whole(torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm))
    if not torch.isfinite(grad_norm) and scaler.get_scale() <= 1:  # else fp16 skips the step
        raise RuntimeError(f"gradient norm {grad_norm} in step {step}; lower the learning "
                           f"rate, or --dtype bfloat16; the newest checkpoint of {args.out} keeps "
                           "the last good state")
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return float(grad_norm)


def resources(device):
    """What a long run must not use more and more of, see tools/soak.py."""
    memory = (torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda"
              else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    record = {"memory": memory, "workers": len(torch.multiprocessing.active_children())}
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        record |= {"resident": pages * resource.getpagesize() / 2**30,
                   "open_files": len(os.listdir("/proc/self/fd"))}
    return record


def main(args):
    # ---- processes, rows ----
    signal.signal(signal.SIGTERM, m.stop_now)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rank, world, device = start_processes(args)
    master, dtype, out = rank == 0, getattr(torch, args.dtype), Path(args.out)
    if checkpoints(out) and not args.resume:
        raise ValueError(f"{checkpoints(out)[0]} exists: add --resume to go on, "
                         "or choose another --out")
    seen, bad, sizes = {}, [], batch_sizes(args, world)
    train_rows = [row for path in args.data for row in read_manifest(path, seen, bad)]
    eval_rows = [row for path in args.eval_data for row in read_manifest(path, bad=bad)]
    eval_rows = [r for r in eval_rows if r["prompt"] and r["response"] and r.get("audio")]
    m.leave_out(bad, args.max_bad_rows, out, master)
    usable_rows(args, train_rows, *sizes)  # fail before the models load

    # ---- teacher, student, data ----
    student, teacher, teacher_tokenizer, trainable, frozen = load_models(args, device, dtype)
    llms = student.llm, getattr(teacher, "llm", teacher)
    text_trains = not args.lora_speech_only and any(n.startswith("llm.") for n in trainable)
    phases, eval_set = prepare_data(args, train_rows, eval_rows, bad,
                                    (student, teacher, teacher_tokenizer), sizes, rank, world,
                                    dtype)
    total_steps = sum(len(phase.plan) for phase in phases)

    # ---- optimizer, resume, log ----
    if args.shard:
        shard(student, teacher, dtype, device)
    optimizer = make_optimizer(args, student)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, best, damaged = 0, None, []
    out.mkdir(parents=True, exist_ok=True)
    if checkpoints(out):
        step, best, damaged = load_checkpoint(out, student, optimizer, scaler, args, world)
    if master:
        versions = {"world_size": world, "torch": torch.__version__,
                    "transformers": transformers.__version__}
        m.write_atomically(out / "args.json", json.dumps({**vars(args), **versions}, indent=1))
        for name in ("log.jsonl", "samples.jsonl"):
            cut_back(out / name, step)
        log = open_log(args, step)
        print_start(args, student, phases, eval_set, frozen, text_trains, step, damaged)
    stop, stopped = False, []  # of all ranks, of this one
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))

    def due(step):
        every = args.eval_every or len(phases[1].plan)
        distilled = step - args.warm_start_steps
        return len(eval_set) and distilled >= 0 and (distilled % every == 0 or step == total_steps)

    # ---- the loop ----
    current, tokens_seen, waited, begun = None, 0, 0.0, time.perf_counter()
    last_log = begun
    while True:
        if due(step):
            record = measure(args, student, teacher, eval_set, stopped, rank, world)
            if stop := record is None:
                break
            score = record.get("eval_kl8_s2t", record.get("eval_kl8_t2t"))
            if best is None or score < best:  # the best early answers by speech
                best = score
                if master or args.shard:
                    m.save_student(student, out / "best", dtype, master)
            if master:
                log({"step": step, **record})
                print("eval  " + " | ".join(f"{k[5:]} {v:.3f}" for k, v in record.items()))
                if not args.shard:  # ranks would lose step
                    write_samples(student, eval_set.rows[:3], out / "samples.jsonl", step)
        if step == total_steps:
            break
        phase = phases[step >= args.warm_start_steps]
        if phase is not current:
            current, (model, stream) = phase, begin_phase(args, student, phase, trainable, step,
                                                          rank, world)
        number, steps = step - phase.first_step, len(phase.plan)
        factor = (min(1.0, (number + 1) / max(1, args.lr_warmup_steps))
                  * 0.5 * (1 + math.cos(math.pi * number / steps)))
        for group in optimizer.param_groups:
            group["lr"] = phase.peaks.get(group["part"], 0.0) * factor

        # -------- one optimizer step --------
        asked = time.perf_counter()
        micro_batches = fetch(stream, len(phase.plan[number][rank::world]), stopped)
        waited += time.perf_counter() - asked
        # speech first: it keeps more, and there are no gradients yet
        passes = [(channel, chosen, items) for items in micro_batches for channel in CHANNELS[::-1]
                  if channel in phase.channels and (chosen := channel_items(items, channel))
                  and (channel != "t2t" or text_trains)]
        # Mean over ALL supervised tokens of the step, per channel.
        # DDP averages over ranks, hence `world` below.
        counts = torch.tensor([*count_tokens(args, passes), len(stopped)], dtype=torch.float64)
        if dist.is_initialized():
            counts = counts.to(device)
            dist.all_reduce(counts)
        if stop := bool(counts[3]):
            break
        num_tokens = counts[:3].clamp(min=1).tolist()
        # after the fetch: a new DataLoader iterator draws from it
        torch.manual_seed(args.seed + 100_003 * step + rank)
        sums = torch.zeros(6, dtype=torch.float64, device=device)
        teacher_hidden, done = {}, None
        with torch.amp.autocast(device.type, enabled=False):  # copies of weights last till its end
            for turn, (channel, chosen, items) in enumerate(passes, 1):
                if items is not done and channel != "ctc":  # one teacher pass serves both channels
                    taught = [i for i in items if i["has_text"] and i["answer"]]
                    teacher_hidden = dict(zip(
                        [i["id"] for i in taught], teacher_rows(teacher, taught))) if taught else {}
                    done = items
                # no_sync must cover forward AND backward:
                # DDP decides in forward whether this backward will sync
                with (contextlib.nullcontext() if model is student or turn == len(passes)
                      else model.no_sync()):
                    with torch.amp.autocast(device.type, dtype, enabled=dtype != torch.float32):
                        loss, logged = channel_pass(args, model, channel, chosen, teacher_hidden,
                                                    llms, num_tokens)
                    scaler.scale(loss * world).backward()
                sums += logged
        if dist.is_initialized():
            dist.all_reduce(sums)
        values = sums.tolist()
        if not all(map(math.isfinite, values)):
            ids = [i["id"] for items in micro_batches for i in items]
            raise RuntimeError(f"loss {values[0]} in step {step + 1}, learning rate "
                               f"{group['lr']:.2e}; rows of rank {rank}: {ids}; "
                               f"the newest checkpoint of {out} keeps the last good state")
        grad_norm = update(args, optimizer, scaler, phase.peaks, step + 1)
        step += 1
        # ------------------------------------

        tokens_seen += sum(num_tokens)
        if master and (step % args.log_every == 0 or step == total_steps):
            now, (read, real) = time.perf_counter(), student.positions
            means = [value / num_tokens[i // 2] for i, value in enumerate(values[1:])]
            record = {"step": step, "phase": phase.name, "loss": values[0], "grad_norm": grad_norm,
                      "lr": max(group["lr"] for group in optimizer.param_groups),
                      **dict(zip(("ce_t2t", "kd_t2t", "ce_s2t", "kd_s2t", "ctc"), means)),
                      "tokens_per_s": tokens_seen / (now - last_log),
                      "wait": waited / (now - last_log),
                      "padding": 1 - real / read if read else 0.0,
                      "hours": (now - begun) / 3600, **resources(device)}
            log(record)
            left_s = (now - last_log) / args.log_every * (steps - number - 1)
            print_step(record, number + 1, steps, left_s)
            last_log, tokens_seen, waited, student.positions = now, 0, 0.0, [0, 0]
        if (master or args.shard) and (step % args.save_every == 0 or step == total_steps
                                       or due(step)):
            save_checkpoint(out, student, optimizer, scaler, step, best, args, world, master)

    # ---- the student ----
    if stop and not list(out.glob(f"ckpt-{step:06d}-*.pt")) and (master or args.shard):
        save_checkpoint(out, student, optimizer, scaler, step, best, args, world, master)
    if not stop and (master or args.shard):
        m.save_student(student, out / "last", dtype, master)
    if master:
        print(f"stopped by SIGTERM after step {step}; the same command with --resume goes on"
              if stop else f"wrote {out / 'last'}")
    if dist.is_initialized():
        dist.barrier()  # torchrun kills all when one has ended otherwise
        dist.destroy_process_group()
    return 143 if stop else 0


if __name__ == "__main__":
    try:
        sys.exit(main(get_args()))
    except (ValueError, RuntimeError, OSError, SafetensorError) as error:
        print("train_kd.py:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
