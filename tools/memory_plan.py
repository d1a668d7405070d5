"""
How much memory a run of train_kd.py takes on each GPU, from configurations alone: no weights, no GPU.

  python tools/memory_plan.py                                    <- the paper's pair on 8 GPUs, and what fits 24, 40, 80 GB
  python tools/memory_plan.py --student openai/whisper-base+Qwen2.5-1.5B --teacher Qwen2.5-7B --world 4 --shard
  python tools/memory_plan.py --student ENCODER+LLM --teacher LLM        <- folders or hub ids (configurations are read)

Weights, gradients and optimizer state are counted tensor by tensor. Activations are those that autograd keeps: one and two
decoder layers run on fake tensors under its hooks, and the rest is a straight line. Rows are counted as if all were as
long as the longest and shared nothing. Not counted: CUDA's own memory and fragmentation (say 3 GiB), activations of a
trained encoder, what a frozen encoder needs while it hears.
"""
import argparse
import math
import sys
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, masking_utils
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniAudioEncoderConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniAudioEncoder

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import losses  # noqa: E402
import model as m  # noqa: E402

# huggingface.co/Qwen/Qwen2.5-*-Instruct/config.json: hidden, intermediate, layers, heads, key-value heads, tied, vocabulary.
# Omni's thinker (huggingface.co/Qwen/Qwen2.5-Omni-7B/config.json, thinker_config.text_config) has the sizes of the 7 B model.
QWEN = {"Qwen2.5-0.5B": (896, 4864, 24, 14, 2, True, 151_936), "Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, True, 151_936),
        "Qwen2.5-3B": (2048, 11008, 36, 16, 2, True, 151_936), "Qwen2.5-7B": (3584, 18944, 28, 28, 4, False, 152_064),
        "Qwen2.5-14B": (5120, 13824, 48, 40, 8, False, 152_064), "Qwen2.5-32B": (5120, 27648, 64, 40, 8, False, 152_064),
        "Qwen2.5-72B": (8192, 29568, 80, 64, 8, False, 152_064)}
# the same file, thinker_config.audio_config; its projection to the LLM's width is the adapter
OMNI_AUDIO = dict(d_model=1280, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120, num_mel_bins=128, n_window=100)
OMNI_HZ = 25  # positions of the LLM a second
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
GIB = 2**30


def llm_config(name):
    if name in QWEN:
        hidden, inner, layers, heads, kv, tied, vocab = QWEN[name]
        return Qwen2Config(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
                           num_key_value_heads=kv, tie_word_embeddings=tied, vocab_size=vocab)
    return AutoConfig.from_pretrained(m.resolve(name)).get_text_config(decoder=True)


def student_parts(name, lora_rank=0):
    """Omni+LLM or ENCODER+LLM, by names -> ({part: module on the meta device}, positions of the LLM a second)."""
    encoder, _, llm = name.partition("+")
    config = llm_config(llm)
    with torch.device("meta"):
        if encoder == "Omni":
            llm = AutoModelForCausalLM.from_config(config)
            encoder, hz = Qwen2_5OmniAudioEncoder(Qwen2_5OmniAudioEncoderConfig(**OMNI_AUDIO, output_dim=config.hidden_size)), OMNI_HZ
            adapter, encoder.proj = encoder.proj, nn.Identity()
        else:
            student = m.SpeechLLM(m.SpeechLLMConfig(
                encoder=AutoConfig.from_pretrained(m.resolve(encoder)).to_dict(), llm=config.to_dict()))
            encoder, adapter, llm, hz = student.encoder, student.adapter, student.llm, m.SpeechLLM.spoken_hz
        if lora_rank:
            m.add_lora(llm, lora_rank, lora_rank)
    return {"encoder": encoder, "adapter": adapter, "llm": llm}, hz


def saved_bytes(config, layers, batch, length, dtype, autocast, lora_rank, checkpointing):
    """Bytes that autograd keeps, beside parameters, for one pass of an LLM of so many layers over (B, T, H)."""
    config = type(config).from_dict({**config.to_dict(), "num_hidden_layers": layers, "layer_types": None})
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
        if lora_rank:
            llm.requires_grad_(False)
            m.add_lora(llm, lora_rank, lora_rank)
    if not checkpointing:  # as train_kd.py:load_models
        m.keep_little(llm)
    # a fake tensor cannot be looked at, so transformers would fear packed sequences, and make a mask that no real run has
    with FakeTensorMode(), mock.patch.object(masking_utils, "find_packed_sequence_indices", lambda position_ids: None):
        base = llm.base_model
        state = {k: torch.empty(x.shape, dtype=x.dtype, requires_grad=x.requires_grad)
                 for k, x in [*base.named_parameters(), *base.named_buffers()]}
        embeds = torch.empty(batch, length, config.hidden_size, dtype=dtype, requires_grad=True)
        inputs = dict(inputs_embeds=embeds * 1, use_cache=False)
        return count_saved(lambda: torch.func.functional_call(base, state, kwargs=inputs).last_hidden_state,
                           {x.untyped_storage()._cdata for x in state.values()}, autocast)


def count_saved(forward, own, autocast=None):
    """Bytes of the tensors that autograd keeps during `forward`; `own`: storages that are not counted (parameters)."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = (storage.nbytes(), tensor)  # the tensor keeps the storage, and so its address, alive
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=bool(autocast)):
        output = forward()
    return sum(size for size, _ in kept.values()) if output is not None else 0


def plan(student, teacher, *, world=8, shard=False, train=("adapter", "llm"), lora_rank=0, share_teacher=True, dtype="bfloat16",
         batch=8, prompt_tokens=64, answer_tokens=256, seconds=8.0, chunk_rows=None, checkpointing=False, teacher_cache=False):
    """-> {what: bytes on one GPU}; names as of student_parts and llm_config. Encoders count as frozen activations: none."""
    parts, hz = student_parts(student, lora_rank)
    llm, compute, ways = parts["llm"], SIZES[dtype], world if shard else 1
    config = llm.config

    def local(p):  # FSDP splits along the first dimension and pads
        return math.ceil(p.shape[0] / ways) * math.prod(p.shape[1:]) if ways > 1 else p.numel()

    trained, weights = [], 0
    for name, part in parts.items():
        for key, p in part.named_parameters():
            trains = name in train and "embed_positions" not in key and (not lora_rank or name != "llm" or ".lora_" in key)
            trained += [p] * trains
            weights += local(p) * (4 if trains or name == "adapter" or lora_rank == 0 and name in train else compute)
    count = sum(map(local, trained))
    shared = lora_rank and share_teacher and student.partition("+")[2] == teacher
    with torch.device("meta"):
        other = AutoModelForCausalLM.from_config(llm_config(teacher))
    head = other.get_output_embeddings().weight.numel()
    body = {p for p in other.base_model.parameters()}
    taught = 0 if shared else head + sum(local(p) for p in body if ways > 1 or p is not other.get_output_embeddings().weight)
    taught = head if teacher_cache and not shared else taught

    length = math.ceil(prompt_tokens + seconds * hz + answer_tokens)
    master = "llm" in train and not lora_rank  # float32 weights under autocast: as DDP has them
    tensor_dtype = torch.float32 if master and not shard else getattr(torch, dtype)
    one, two = (saved_bytes(config, n, batch, length, tensor_dtype, compute == 2, lora_rank, checkpointing)
                for n in (1, 2))
    linear = {name: x.weight.numel() for name, x in m.layers_of(llm)[0].named_modules() if isinstance(x, nn.Linear)}
    copied = compute == 2 and master and not shard  # by autocast
    copies = copied * compute * sum(linear.values())  # of one layer's weights
    seen = copies - copied * compute * (not checkpointing) * linear.get("mlp.down_proj", 0)  # lean_mlp keeps that one itself
    per_layer, layers = two - one - seen, config.num_hidden_layers
    kept = (one - per_layer - seen) + layers * per_layer
    if checkpointing:
        kept = layers * batch * length * config.hidden_size * tensor_dtype.itemsize + one - seen

    vocab, width, rows = config.vocab_size, config.hidden_size, batch * answer_tokens
    chunk = min(rows, chunk_rows or max(256, 2**26 // vocab))
    loss = 2 * chunk * vocab * 4 + max(chunk, losses.GPU_WEIGHT_ROWS if master else 0) * vocab * compute + rows * width * 12
    if master:
        loss += vocab * width * (4 + (compute if compute == 2 and not shard else 0))
    table = {"student weights": weights, "teacher weights": taught * compute, "gradients": 4 * count,
             "optimizer": 8 * count + 4 * len(trained)}
    passing = {"activations": kept, "autocast's copies of weights": copies * layers, "loss": loss}
    if shard:  # the root (embeddings, head) stays gathered in a pass, beside two layers
        layer = sum(p.numel() for p in m.layers_of(llm)[0].parameters())
        root = sum(p.numel() for p in llm.parameters()) - layer * layers
        table["gathered by FSDP"] = (root + 2 * layer) * compute
        passing["its gradients"] = (layer if lora_rank or not master else max(layer, root)) * (compute + 4) if trained else 0
    return table | passing


def show(table):
    total = sum(table.values())
    for what, size in [*table.items(), ("all", total)]:
        print(f"| {what:28} | {size / GIB:7.2f} |")
    return total


MODES = {"DDP, all of the LLM": dict(), "DDP, LoRA 16": dict(lora_rank=16), "--shard, all of the LLM": dict(shard=True),
         "--shard, LoRA 16": dict(shard=True, lora_rank=16)}


def largest(gigabytes, options, mode):
    """The largest Qwen2.5 that, as teacher and LLM of the student at once, leaves 5% and 3 GiB of such a GPU free."""
    fits = [name for name in QWEN if sum(plan("Omni+" + name, name, **options | mode).values()) + 3 * GIB < 0.95 * gigabytes * GIB]
    return fits[-1] if fits else "none"


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--student", default="Omni+Qwen2.5-7B", help=f"ENCODER+LLM; ENCODER may be Omni, LLM one of {', '.join(QWEN)}")
    p.add_argument("--teacher", default="Qwen2.5-7B", help="LLM, or a name as above")
    p.add_argument("--world", type=int, default=8, help="GPUs")
    p.add_argument("--shard", action="store_true", help="as of train_kd.py; without it DDP")
    p.add_argument("--lora-rank", type=int, default=0, help="as of train_kd.py")
    p.add_argument("--share-teacher", action=argparse.BooleanOptionalAction, default=True, help="as of train_kd.py")
    p.add_argument("--teacher-cache", action="store_true", help="of the teacher only the head stays")
    p.add_argument("--train", nargs="+", choices=["encoder", "adapter", "llm"], default=["adapter", "llm"], help="as of train_kd.py")
    p.add_argument("--dtype", choices=list(SIZES), default="bfloat16", help="as of train_kd.py")
    p.add_argument("--batch-size", type=int, default=8, help="rows per GPU per forward")
    p.add_argument("--prompt-tokens", type=int, default=64, help="template and question by text")
    p.add_argument("--answer-tokens", type=int, default=256, help="of each row")
    p.add_argument("--seconds", type=float, default=8.0, help="of audio in each row")
    p.add_argument("--chunk-rows", type=int, help="of the loss; default: train_kd.py's choice on a GPU")
    p.add_argument("--gradient-checkpointing", action="store_true", help="as of train_kd.py")
    p.add_argument("--fits", action="store_true", help="also print the largest pairs for 24, 40 and 80 GB")
    args = p.parse_args(argv)
    options = dict(world=args.world, train=tuple(args.train), dtype=args.dtype, batch=args.batch_size, prompt_tokens=args.prompt_tokens,
                   answer_tokens=args.answer_tokens, seconds=args.seconds, chunk_rows=args.chunk_rows,
                   checkpointing=args.gradient_checkpointing, teacher_cache=args.teacher_cache)
    mode = dict(shard=args.shard, lora_rank=args.lora_rank, share_teacher=args.share_teacher)
    print(f"{args.teacher} into {args.student}, {args.world} GPUs; GiB on each\n\n| {'what':28} |     GiB |\n| --- | ---: |")
    show(plan(args.student, args.teacher, **options, **mode))
    if args.fits:
        print("\n| largest pair (teacher = the student's LLM) | 24 GB | 40 GB | 80 GB |\n| --- | --- | --- | --- |")
        for name, mode in MODES.items():
            print(f"| {name} | " + " | ".join(largest(gb, options | dict(checkpointing=True), mode) for gb in (24, 40, 80)) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
