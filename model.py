"""
The student: speech encoder -> adapter -> text LLM;
how its inputs are made, how it is loaded, saved and asked.

  waveform (S,) -> log-mel (F, M) -> encoder (50 Hz) -> adapter (12.5 Hz)
                -> a few embeddings -> chat template -> LLM

The adapter hears with CTC. Its classes are the short tokens of the LLM's own tokenizer, so it
*spells*: what is spelled is tokenised again, and each token of it enters the LLM as its own
embedding plus a learned correction from the sound. Where no word is heard, the sound itself gives
an embedding a second. Nothing here prints but the last word of a stopped script.
"""
import codecs
import contextlib
import copy
import functools
import importlib.util
import inspect
import json
import os
import shutil
import socket
import sys
import types
import urllib.parse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from jinja2 import TemplateError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import (CONFIG_MAPPING, AttentionInterface, AutoConfig, AutoFeatureExtractor,
                          AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor,
                          AutoTokenizer, DynamicCache, PretrainedConfig, PreTrainedModel,
                          WhisperFeatureExtractor)
from transformers.cache_utils import DynamicLayer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.whisper.modeling_whisper import WhisperEncoder

# with AMX, oneDNN's kernels hold megabytes each, and it would keep a thousand, of every shape met
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")

SAMPLE_RATE = 16_000
MEL_RATE_HZ = 100                  # log-mel frames a second: hop of 160 samples
FEATURE_RATE_HZ = 50               # encoder positions a second: its second convolution has stride 2
STACK = 4                          # encoder positions that become one adapter frame: 12.5 Hz
WINDOW_FRAMES = 30 * MEL_RATE_HZ   # encoder was trained on 30 s; longer clips go window by window
CPU_READ = 1024                    # tokens of prompts that a CPU reads at a time
MAX_SECONDS = 600                  # of a clip: the adapter attends over all of it
AUDIO_MARK = "<|audio|>"           # stands for the speech in the rendered template; never tokenised
# byte-level BPE: one character is one byte
BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
# models that also speak: the class of the part that hears and thinks
THINKERS = {"qwen2_5_omni": "Qwen2_5OmniThinkerForConditionalGeneration"}
TEKKEN_TEMPLATE = (  # of Mistral's models, Voxtral too, whose folders have tekken.json alone
    "<s>{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}"
    "[/SYSTEM_PROMPT]{% elif m.role == 'assistant' %}{{ m.content }}</s>{% else %}[INST]"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{{ "
    "'[BEGIN_AUDIO][AUDIO]' if part.type == 'audio' else part.text }}{% endfor %}{% endif %}"
    "[/INST]{% endif %}{% endfor %}")
DEFAULT_LLM = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_STUDENT = f"openai/whisper-base+{DEFAULT_LLM}"


# ---- what people give: options, JSON, files ----

def check_options(parser, args, **limits):
    """parser.error unless each option is a number within its limits, low or (low, high),
    nothing is named twice, the GPU is there, and OUT is or can become a folder."""
    for name, limit in limits.items():
        low, high = limit if isinstance(limit, tuple) else (limit, sys.float_info.max)
        if not low <= getattr(args, name) <= high:  # NaN never is
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected a number, "
                         + (f"{low} to {high}" if isinstance(limit, tuple) else f"{low} or more"))
    for name in ("data", "channels", "train", "subsets", "modality"):
        values = getattr(args, name, None)
        if isinstance(values, list) and len(set(values)) < len(values):
            parser.error(f"--{name} {' '.join(values)}: one is named twice")
    rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if getattr(args, "device", "cpu") == "cuda" and rank >= gpus:
        parser.error(f"--device cuda, but torch sees {gpus or 'no'} GPU, and this is process {rank}"
                     " of torchrun (from 0); use --device cpu, or fewer processes")
    out = Path(getattr(args, "out", ".")).absolute()
    there = next(path for path in (out, *out.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        parser.error(f"--out {args.out}: {there} is no folder that can be written to; "
                     "choose another")


def read_json(data, where, line=1):
    """UTF-8 bytes, with or without BOM -> JSON value; raises ValueError that names FILE:LINE."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        raise ValueError(f"{where}:{line}: not JSON in UTF-8 ({error})") from error
    return value


def json_lines(path, parse, bad=None):
    """parse(object, FILE:LINE) of each line of a file, or item of its JSON list -> list.

    What is no object, or raises ValueError in parse, raises, or is added to `bad`.
    """
    data, rows = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8), []
    items = read_json(data, path) if data.lstrip().startswith(b"[") else data.split(b"\n")
    for number, item in enumerate(items, 1):
        try:
            if isinstance(item, bytes) and not item.strip():
                continue
            row = read_json(item, path, number) if isinstance(item, bytes) else item
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: {str(row)[:60]!r} is no JSON object; expected "
                                 "one a line")
            rows.append(parse(row, f"{path}:{number}"))
        except ValueError as error:
            if bad is None:
                raise
            bad.append({"id": f"{path}:{number}", "reason": str(error)})
    return rows


def check_texts(row, where, *keys):
    """ValueError unless each key holds text or null, or is absent."""
    for key in keys:
        if not isinstance(row.get(key), str | None):
            raise ValueError(f"{where}: {key} is {str(row[key])[:60]!r}, expected text or null")


def leave_out(bad, limit, out, write=True):
    """Bad rows, [{"id", "reason"}], are listed in OUT/bad_rows.jsonl -> what to say about it.

    Raises: ValueError if there are more than `limit`.
    """
    path = Path(out) / "bad_rows.jsonl"
    if bad and limit and write:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in bad))
    if len(bad) > limit:
        raise ValueError(f"{bad[0]['reason']} (bad rows: {len(bad)}{f', see {path}' * (limit > 0)};"
                         f" mend them, or leave them out by --max-bad-rows {len(bad)})")
    return f"{len(bad)} bad rows are left out, listed in {path}" if bad else ""


def file_below(folder, name, where):
    """FOLDER/NAME; ValueError unless it is a file that lies below FOLDER, also behind links."""
    path = Path(folder, name)
    if not os.path.isfile(path):
        raise ValueError(f"{where}: audio file {name!r} not found (paths are relative to {folder})")
    if os.path.isabs(name) or not path.resolve().is_relative_to(Path(folder).resolve()):
        raise ValueError(f"{where}: audio file {name!r} leads out of {folder}; copy it there, "
                         "and give its path from there")
    return str(path)


def from_folder(loader, folder, **options):
    """loader.from_pretrained: no code of the folder's own runs, no pickle is read (a model has
    `dtype` among its options). Raises RuntimeError, also for missing weights."""
    if "dtype" in options:
        options |= dict(use_safetensors=True, ignore_mismatched_sizes=True,
                        output_loading_info=True)
    try:
        loaded = loader.from_pretrained(folder, **{"trust_remote_code": False, **options})
    except (OSError, ValueError, RuntimeError, LookupError, SafetensorError) as error:
        raise RuntimeError(f"{folder}: no {loader.__name__} can be read from it "
                           f"({str(error)[:200]}); expected a folder of transformers whose weights "
                           "are safetensors") from error
    if "dtype" not in options:
        return loaded
    lost = sorted({*loaded[1]["missing_keys"], *(k for k, *_ in loaded[1]["mismatched_keys"])})
    if lost:
        raise RuntimeError(f"{folder}: its safetensors do not fit its config.json: no weights for "
                           f"{lost[0]} and {len(lost) - 1} more; expected all of them")
    return loaded[0]


def write_atomically(path, text):
    """The file appears complete or not at all, whichever rank is quicker."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def stop_now(*_):
    """Handler of SIGTERM."""
    print("stopped by SIGTERM; the same command goes on", file=sys.stderr, flush=True)
    sys.exit(143)


def cores():
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# ---- names, audio, text ----

def resolve(name, revision=None):
    """A model's name -> a local folder: the folder itself, models/NAME, the hub's cache,
    the hub, in this order.

    Raises: RuntimeError within seconds when the name is in none of them and the hub
        cannot be reached.
    """
    for folder in (Path(name), Path("models") / name, Path(__file__).parent / "models" / name):
        if (folder / "config.json").is_file():
            return str(folder)
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, HfHubHTTPError, LocalEntryNotFoundError
    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py", "spk_dict.pt"]
    hint = (f"{name!r} is no local folder with a config.json, is not under models/ "
            "and not in the hub's cache")
    try:
        return snapshot_download(name, revision=revision, local_files_only=True,
                                 allow_patterns=patterns)
    except HFValidationError as error:
        raise RuntimeError(f"{hint}, and is no hub id (ORG/NAME)") from error
    except LocalEntryNotFoundError:
        pass
    url = urllib.parse.urlparse(constants.ENDPOINT)
    try:  # transformers would retry for half a minute
        socket.create_connection((url.hostname, url.port or 443), timeout=5).close()
    except OSError as error:
        raise RuntimeError(f"{hint}, and the model hub ({url.hostname}) cannot be reached; "
                           "the default models are made without it by: "
                           "python tools/offline_models.py") from error
    try:
        return snapshot_download(name, revision=revision, allow_patterns=patterns)
    except HfHubHTTPError as error:
        raise RuntimeError(f"{hint}, and the hub answers: {error}") from error


class TextLLM(PreTrainedModel):
    """Decoder and output head of a multimodal model: a causal LM that shares their weights."""
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, model):
        super().__init__(model.get_decoder().config)
        self.model, self.lm_head = model.get_decoder(), model.get_output_embeddings()

    def forward(self, logits_to_keep=0, **inputs):
        output = self.model(**inputs)
        logits = self.lm_head(output.last_hidden_state[:, -logits_to_keep:]) * logit_scale(self)
        return CausalLMOutputWithPast(logits=logits)


def logit_scale(llm):
    """Logits are this times hidden @ head.T: Cohere multiplies, Granite divides."""
    config = llm.config.get_text_config(decoder=True)
    return ((getattr(config, "logit_scale", None) or 1.0)
            / (getattr(config, "logits_scaling", None) or 1.0))


def load_tokenizer(folder, name):
    """Tokenizer of a local folder, with the chat template of its model or processor."""
    tokenizer = from_folder(AutoTokenizer, folder, mistral_format=False)
    legacy = Path(folder) / "chat_template.json"
    if not tokenizer.chat_template and legacy.exists():
        tokenizer.chat_template = json.loads(legacy.read_text())["chat_template"]
    elif not tokenizer.chat_template and (Path(folder) / "tekken.json").exists():
        tokenizer.chat_template, tokenizer.eos_token = TEKKEN_TEMPLATE, "</s>"
    if not tokenizer.chat_template:
        raise RuntimeError(f"{name}: its tokenizer has no chat template; "
                           "use an instruction-tuned model")
    chat_parts(tokenizer)  # or the template refuses
    return tokenizer


def load_multimodal(folder, dtype, **options):
    """A multimodal model in eval mode; of one that also speaks, only the part that thinks."""
    config = PretrainedConfig.get_config_dict(folder)[0]
    name = THINKERS.get(config.get("model_type")) or (config.get("architectures") or [""])[0]
    loader = AutoModel if options else getattr(transformers, name, AutoModelForMultimodalLM)
    return from_folder(loader, folder, dtype=dtype, **options).eval()


def load_llm(name, dtype=torch.float32, revision=None):
    """Text LLM, or the text side of a multimodal model, by folder or hub id
    -> (causal LM in eval mode, tokenizer with a chat template)."""
    folder = resolve(name, revision)
    tokenizer = load_tokenizer(folder, name)
    if from_folder(AutoConfig, folder).model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return from_folder(AutoModelForCausalLM, folder, dtype=dtype).eval(), tokenizer
    return TextLLM(load_multimodal(folder, dtype)).eval(), tokenizer


def audio_seconds(path):
    """Length of an audio file by its header; raises ValueError if that is no usable audio's."""
    import soundfile
    try:
        with soundfile.SoundFile(str(path)) as file:
            frames, rate = file.frames, file.samplerate
    except (RuntimeError, TypeError, OSError) as error:
        raise ValueError(f"{path}: not a readable audio file ({error})") from error
    if rate % 25 or not 0.02 <= frames / rate <= MAX_SECONDS:  # odd rates: a huge kernel
        raise ValueError(f"{path}: {frames} samples at {rate} Hz, expected 20 ms to {MAX_SECONDS} "
                         "s at a rate in steps of 25 Hz; cut or resample it")
    return frames / rate


def load_audio(path):
    """Audio file -> waveform (S,) float32 at 16 kHz, mono.
    Raises ValueError if it is no usable audio."""
    import soundfile
    seconds = audio_seconds(path)
    try:
        samples, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except RuntimeError as error:
        raise ValueError(f"{path}: not a readable audio file ({error})") from error
    waveform = torch.from_numpy(samples).mean(dim=1)
    if len(waveform) < 0.95 * seconds * rate:
        raise ValueError(f"{path}: cut: {len(waveform)} of {seconds * rate:.0f} samples are there")
    if not waveform.abs().max() < 100:
        raise ValueError(f"{path}: a sample of {waveform.abs().max()}, expected finite samples "
                         "of -1 to 1; divide them by their full scale")
    if rate != SAMPLE_RATE:
        from torchaudio.functional import resample
        waveform = resample(waveform, rate, SAMPLE_RATE)
    return waveform


def edit_distance(a, b):
    """Levenshtein distance between two sequences;
    over word lists it is the numerator of the word error rate."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def chat_parts(tokenizer, system=None, instruction=None):
    """Token ids of the chat template before and after what the user says.

    prompt_ids = before + said + after. Text and speech share both parts, so the two channels differ
    in nothing but what stands between them.
    """
    said = f"{instruction}\n\n{AUDIO_MARK}" if instruction else AUDIO_MARK
    messages = [{"role": "system", "content": system}] if system else []
    try:
        text = tokenizer.apply_chat_template(
            messages + [{"role": "user", "content": said}], tokenize=False,
            add_generation_prompt=True, enable_thinking=False)
    except TemplateError as error:
        raise ValueError(f"the chat template of {tokenizer.name_or_path} refuses system message "
                         f"{str(system)[:60]!r} ({error})") from error
    if text.count(AUDIO_MARK) != 1:
        raise ValueError(f"{AUDIO_MARK} stands in a system message or instruction, "
                         "or the template repeats the question")
    before, after = text.split(AUDIO_MARK)
    return [tokenizer(part, add_special_tokens=False).input_ids for part in (before, after)]


def end_token(tokenizer):
    """Id of the token that ends a turn:
    the template's own, which need not be the tokenizer's eos."""
    mark = "\N{SNOWMAN}"
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    after = tokenizer.apply_chat_template(chat, tokenize=False).rsplit(mark, 1)[1]
    ids = tokenizer(after, add_special_tokens=False).input_ids
    return ids[0] if ids and ids[0] in tokenizer.all_special_ids else tokenizer.eos_token_id


# ---- attention, and many rows in one ----

# LLMs whose tokens meet in attention alone, which hand `packing` on to it (a test each)
PACKABLE = {"cohere", "gemma", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2",
            "qwen2_5_omni_text", "qwen3", "smollm3"}


class Packing(NamedTuple):
    """B rows of at most T positions in one of S: first what all share, then the rest of each."""
    shared: int
    places: Tensor  # (B, T) where a row's positions lie among the S; 0 beyond its end
    back: Tensor    # (S,) where the S lie in the flattened (B, T)

    def unfold(self, x):  # (S, h, D) -> (B, T, h, D)
        return x[self.places]

    def fold(self, x):  # (B, T, h, D) -> (S, h, D)
        return x.flatten(0, 1)[self.back]


def packing_of(lengths, shared, device):
    """Packing of rows of these lengths whose first `shared` positions are the same."""
    width, start = max(lengths), shared
    places, back = [], list(range(shared))
    for row, length in enumerate(lengths):
        rest = length - shared
        places += [*range(shared), *range(start, start + rest), *[0] * (width - length)]
        back += range(row * width + shared, row * width + length)
        start += rest
    places, back = torch.tensor(places + back, device=device).split([len(places), len(back)])
    return Packing(shared, places.view(-1, width), back)


class Unfold(torch.autograd.Function):
    """What is packed, (S, h, D) -> each row with all that comes before it, (B, T, h, D)."""

    @staticmethod
    def forward(ctx, x, packing):
        ctx.packing = packing
        return packing.unfold(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        packed = ctx.packing.fold(grad)
        packed[:ctx.packing.shared] = grad[:, :ctx.packing.shared].sum(0)
        return packed, None


class Fold(torch.autograd.Function):
    """Rows (B, T, h, D) -> packed again, (S, h, D)."""

    @staticmethod
    def forward(ctx, x, packing):
        ctx.packing = packing
        return packing.fold(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        places, back = ctx.packing.places, ctx.packing.back
        rows = grad.new_zeros(places.numel(), *grad.shape[1:]).index_copy_(0, back, grad)
        return rows.unflatten(0, places.shape), None                              # (B, T, h, D)


def attend(attention, *states, packing=None):
    """attention(query, key, value), each (B, h, T, D). On a CPU it learns in float32, also under
    autocast (the backward of sdpa in bfloat16 is slower there), and of packed rows it keeps the
    packed ones, in the dtype that they came in."""
    if states[0].device.type != "cpu" or not states[0].requires_grad:
        return attention(*states)
    dtype, hooks = states[-1].dtype, contextlib.nullcontext()
    if packing is not None:
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda x: (packing.fold(x.transpose(1, 2)).to(dtype),) if x.dim() == 4 else x,
            lambda x: packing.unfold(x[0]).transpose(1, 2).float() if isinstance(x, tuple) else x)
    with torch.autocast("cpu", enabled=False), hooks:
        return attention(*(x.float() for x in states)).to(dtype)


def packed_attention(module, query, key, value, attention_mask, scaling=None, packing=None,
                     **options):
    """sdpa, of packed rows too, (1, h, S, D); on a CPU, for one new token a row (B, h, 1, D),
    plain matrix products, which are faster there."""
    def sdpa(*states):
        return sdpa_attention_forward(module, *states, attention_mask, scaling=scaling,
                                      **options)[0]                               # (B, T, h, D)

    if packing is not None:
        attention_mask = None  # rows are padded on the right, where no causal attention looks
        states = [Unfold.apply(x[0].transpose(0, 1), packing).transpose(1, 2)
                  for x in (query, key, value)]                                   # (B, h, T, D)
        mixed = attend(sdpa, *states, packing=packing)                            # (B, T, h, D)
        return Fold.apply(mixed, packing)[None], None                             # (1, S, h, D)
    if query.shape[2] > 1 or query.device.type != "cpu":
        return attend(sdpa, query, key, value), None
    grouped = (query.unflatten(1, (key.shape[1], -1))[:, :, :, 0]
               * (scaling or query.shape[-1] ** -0.5))                            # (B, k, h/k, D)
    scores = (grouped @ key.transpose(2, 3)).float()                              # (B, k, h/k, T)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    mixed = scores.softmax(-1).to(value.dtype) @ value                            # (B, k, h/k, D)
    return mixed.flatten(1, 2)[:, None], None                                     # (B, 1, h, D)


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", sdpa_mask)


def suit_attention(llm):
    """sdpa of an LLM becomes `packed_attention`."""
    if llm.config._attn_implementation == "sdpa":
        llm.set_attn_implementation("packed")


def packs(llm):
    """Whether rows can be packed for this LLM; torch.compile has not been tried with it."""
    config = llm.config.get_text_config(decoder=True)
    return (llm.config._attn_implementation == "packed" and config.model_type in PACKABLE
            and not getattr(config, "sliding_window", None)
            and llm.base_model._compiled_call_impl is None)


def answer_states(llm, rows, lengths, shared=0, speech=None):
    """Hidden states that predict the last tokens of each row, before the output head.

    Rows are packed where that is possible: nothing is padded, and what all share (system message,
    template) is read once for all.

    Args:
        llm: causal LM of transformers.
        rows: B rows of ids (T_i,) or of embeddings (T_i, H).
        lengths: how many tokens of each row are the answer.
        shared: so many positions at the start of all rows are the same.
        speech: B rows (T_i, 1), 1 = speech: where LoRA acts, if only at speech.
    Returns:
        hidden (N, H) with N = sum(lengths); positions that were read: all, and without padding.
    """
    suit_attention(llm)
    sizes, device, packed = list(map(len, rows)), rows[0].device, packs(llm)
    if packed:
        def join(rows):
            return torch.cat([rows[0], *(row[shared:] for row in rows[1:])])[None]  # (1, S, ...)
        packing = packing_of(sizes, shared, device)
        places = packing.places                                                   # (B, T)
        options = dict(packing=packing, position_ids=(packing.back % max(sizes))[None],
                       attention_mask=packing.back.new_empty(1, 1, 1, 1))  # so that none is made
    else:
        join = functools.partial(nn.utils.rnn.pad_sequence, batch_first=True)     # (B, T, ...)
        places = torch.arange(len(rows) * max(sizes), device=device).view(len(rows), -1)
        options = {}
    inputs = join(rows)
    if speech is not None:
        llm.lora_mask = join(speech)
    name = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
    hidden = llm.base_model(**{name: inputs}, use_cache=False, **options).last_hidden_state
    read = hidden.shape[:2].numel()
    predict = torch.cat([row[size - n - 1:size - 1]  # each token is predicted from the one before
                         for row, size, n in zip(places, sizes, lengths)])
    return hidden.flatten(0, 1)[predict], read, read if packed else sum(sizes)


# ---- generation ----

def check_context(llm, prompt_tokens, new_tokens):
    context = getattr(llm.config, "max_position_embeddings", None)
    if context and prompt_tokens + new_tokens > context:
        raise ValueError(f"{prompt_tokens} tokens of prompt and {new_tokens} new ones exceed the "
                         f"LLM's context of {context}; shorten it or lower --max-new-tokens")


class Room(DynamicLayer):
    """Keys and values of a layer, with room for `length` positions: new ones copy no old ones."""

    def __init__(self, length):
        super().__init__()
        self.length = length

    def update(self, key_states, value_states, *args, **kwargs):
        """New ones, (B, h, T, D) each -> all so far."""
        start = self.get_seq_length()
        stop = start + key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.room = [x.new_empty(*x.shape[:2], self.length, x.shape[3])
                         for x in (key_states, value_states)]
        for room, new in zip(self.room, (key_states, value_states)):
            room[:, :, start:stop] = new
        self.keys, self.values = (room[:, :, :stop] for room in self.room)
        return self.keys, self.values


@torch.inference_mode()
def generate(llm, prompts, *, max_new_tokens, eos_ids, temperature=0.0, top_k=50, generator=None,
           speech=None):
    """Batched decoding: the prefix that all prompts share is read once,
    finished rows leave the batch.

    Args:
        llm: causal LM of transformers.
        prompts: list of (T_i, H) prompt embeddings on the LLM's device, of any lengths.
        max_new_tokens: at most so many new tokens a row.
        eos_ids: ids that end a row; the ending id is kept in the result.
        temperature: 0 = greedy, else the softmax temperature among the top_k tokens;
            draws from `generator`.
        speech: list of (T_i, 1), 1 = speech: where LoRA acts, if only at speech.
    Returns:
        list of token id lists; a row that was cut at max_new_tokens does not
        end in an id of eos_ids.
    """
    suit_attention(llm)
    batch, device, width = len(prompts), prompts[0].device, max(map(len, prompts))
    check_context(llm, width, max_new_tokens)
    known = inspect.signature(llm.base_model.forward).parameters
    cache_name = "cache" if "cache" in known else "past_key_values"  # until transformers 5.24

    def new_cache():
        cache = DynamicCache(config=llm.config)
        cache.layers = [Room(width + max_new_tokens) if type(layer) is DynamicLayer else layer
                        for layer in cache.layers]
        return cache

    def rows_of(caches, keep=slice(None)):  # of a batch, or of several, as one
        cache = new_cache()
        for i, layers in enumerate(zip(*(cache.layers for cache in caches))):
            cache.update(torch.cat([layer.keys[keep] for layer in layers]),
                         torch.cat([layer.values[keep] for layer in layers]), i)
        return cache

    def read(cache, lora_mask=None, **inputs):
        if speech is not None:
            llm.lora_mask = lora_mask
        return llm(**inputs, logits_to_keep=1, **{cache_name: cache}).logits[:, -1]  # (B, V)

    # ---- the prompts: what all share, then the rest, on a CPU so much as its caches hold ----
    plain, shared = all(isinstance(layer, Room) for layer in new_cache().layers), 0
    if plain and batch > 1:  # only these can be copied
        shortest = min(map(len, prompts))
        heads = torch.stack([p[:shortest - 1] for p in prompts])                  # (B, T_min-1, H)
        shared = int((heads == heads[:1]).all(-1).all(0).int().cumprod(0).sum())
    prefix = new_cache()
    if shared:
        read(prefix, speech and speech[0][None, :shared], inputs_embeds=prompts[0][None, :shared])
    # (B, T, H), padded on the left
    embeds = prompts[0].new_zeros(batch, width - shared, prompts[0].shape[1])
    mask = torch.zeros(batch, width + max_new_tokens, dtype=torch.long, device=device)  # 1 = attend
    mask[:, :shared] = 1
    for b, prompt in enumerate(prompts):
        embeds[b, width - len(prompt):] = prompt[shared:]
        mask[b, shared + width - len(prompt):width] = 1
    positions = (mask[:, :width].cumsum(1) - 1).clamp(min=0)                      # (B, T)
    if speech is not None:
        speech = nn.utils.rnn.pad_sequence(
            speech, batch_first=True, padding_side="left")[:, shared:]            # (B, T, 1)
    at_once = batch if device.type != "cpu" or not plain else max(1, CPU_READ // embeds.shape[1])
    caches, logits = [], []
    for start in range(0, batch, at_once):
        some = slice(start, min(start + at_once, batch))
        caches.append(rows_of([prefix], [0] * (some.stop - start)) if shared else new_cache())
        logits.append(read(caches[-1], None if speech is None else speech[some],
                           inputs_embeds=embeds[some], attention_mask=mask[some, :width],
                           position_ids=positions[some, shared:]))
    cache = rows_of(caches) if len(caches) > 1 else caches[0]
    logits = torch.cat(logits)                                                    # (B, V)

    # ---- the answers, a token of each row at a time ----
    positions, alive, eos = (positions[:, -1:], list(range(batch)),
                             torch.tensor(eos_ids, device=device))
    rows = [[] for _ in range(batch)]
    done = torch.zeros(batch, dtype=torch.bool, device=device)
    for length in range(width, width + max_new_tokens):
        if temperature:
            values, candidates = logits.topk(min(top_k, logits.shape[-1]))        # (B, K)
            drawn = torch.multinomial((values.float() / temperature).softmax(-1), 1,
                                      generator=generator)
            tokens = candidates.gather(1, drawn)[:, 0]
        else:
            tokens = logits.max(-1).indices  # as argmax, which is slower on a CPU
        for b, token, ended in zip(alive, tokens.tolist(), done.tolist()):
            if not ended:
                rows[b].append(token)
        done |= torch.isin(tokens, eos)
        if done.all() or length + 1 == width + max_new_tokens:
            break
        mask[:, length], positions = 1, positions + 1
        keep = (~done).nonzero()[:, 0]
        if plain and len(keep) <= 0.85 * len(alive):  # copying the cache costs about half a step
            cache, alive = rows_of([cache], keep), [alive[k] for k in keep.tolist()]
            mask, positions, tokens, done = mask[keep], positions[keep], tokens[keep], done[keep]
        logits = read(cache, 0, input_ids=tokens[:, None], position_ids=positions,
                      attention_mask=mask[:, :length + 1])
    return rows


# ---- what training keeps of a layer ----

class LeanNorm(torch.autograd.Function):
    """RMSNorm that keeps its output alone, which the linear layers behind it keep anyway:
    x (..., H) -> (..., H) in `dtype`. No weight may be zero."""

    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)  # (..., 1)
        scale = (scale.square_() / x.shape[-1] + eps).rsqrt_()
        y = (weight * (x * scale).to(x.dtype)).to(dtype)
        ctx.save_for_backward(y, weight, scale)
        ctx.dtype = x.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        y, weight, scale = ctx.saved_tensors
        normed, grad = y / weight.float(), grad.float()                           # (..., H)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        grad = grad * weight
        along = torch.linalg.vecdot(grad, normed)[..., None] / y.shape[-1]        # (..., 1)
        return grad.sub_(normed.mul_(along)).mul_(scale).to(ctx.dtype), grad_weight, None, None


class LeanGate(torch.autograd.Function):
    """silu(gate) * up, which keeps gate and up alone."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def lean_norm(norm, x):
    if not torch.is_grad_enabled():
        return type(norm).forward(norm, x)
    autocast = torch.is_autocast_enabled(x.device.type)  # linear layers follow: one cast for all
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    return LeanNorm.apply(x, norm.weight, norm.variance_epsilon, dtype)


def lean_mlp(mlp, x):
    if not torch.is_grad_enabled():
        return type(mlp).forward(mlp, x)
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    inner = LeanGate.apply(gate, up)                                              # (B, T, I)
    place, gate, up = inner.untyped_storage()._cdata, gate.detach(), up.detach()
    with torch.autograd.graph.saved_tensors_hooks(  # what the last product reads is made anew, too
            lambda x: x.shape if x.untyped_storage()._cdata == place else x,
            lambda x: x if isinstance(x, Tensor) else F.silu(gate).mul_(up).reshape(x)):
        return mlp.down_proj(inner)


def keep_little(llm):
    """Norms of an LLM of Llama's kind learn from their outputs, gated MLPs from their inputs: what
    lies between is computed anew in the backward, and a layer keeps half as much. Without gradients
    nothing changes, and layers of other kinds stay as they are."""
    for layer in layers_of(llm):
        norms = [getattr(layer, name, None)
                 for name in ("input_layernorm", "post_attention_layernorm")]
        if all(hasattr(norm, "variance_epsilon") and (norm.weight.is_meta or norm.weight.all())
               for norm in norms):
            for norm in norms:
                norm.forward = types.MethodType(lean_norm, norm)
        mlp = getattr(layer, "mlp", None)
        if (all(hasattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj"))
                and getattr(llm.config, "hidden_act", None) == "silu"):
            mlp.forward = types.MethodType(lean_mlp, mlp)


# ---- LoRA ----

def layers_of(model):
    """The layers of a causal LM or an encoder: the outermost list of modules in it."""
    lists = [x for x in getattr(model, "base_model", model).modules()
             if isinstance(x, nn.ModuleList)]
    return lists[0] if lists else []


def add_lora(llm, rank, alpha):
    """LoRA, untrained and in float32, on the linear layers of the decoder.

    It acts where llm.lora_mask says: None = everywhere, 0 = nowhere, (B, T, 1) = where that is 1.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise RuntimeError("LoRA needs the package peft: pip install peft") from error
    linear = {x for x in layers_of(llm).modules() if isinstance(x, nn.Linear)}
    llm.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=[
        name for name, x in llm.named_modules() if x in linear]))
    llm.lora_mask = None

    def masked(module, inputs, output):
        return output if llm.lora_mask is None else output * llm.lora_mask

    for name, module in llm.named_modules():
        if name.endswith((".lora_A.default", ".lora_B.default")):
            module.weight = nn.Parameter(module.weight.data.float())
        if name.endswith(".lora_B.default"):
            module.register_forward_hook(masked)


def save_adapter(config, state, folder):
    """LoRA's weights in a state dict -> peft's own format, under the names of the base model."""
    weights = {k.removeprefix("llm.").replace(".default.", "."): v
               for k, v in state.items() if ".lora_" in k}
    config = copy.copy(config)
    config.target_modules = sorted({k.rpartition(".lora_")[0] for k in weights})
    config.save_pretrained(folder)
    save_file({f"base_model.model.{k}": v for k, v in weights.items()},
              folder / "adapter_model.safetensors", metadata={"format": "pt"})


def merge_lora(config, state):
    """State dict with LoRA -> that of the plain model: W + alpha / rank * B A."""
    merged = {k.replace(".base_layer.", "."): v for k, v in state.items() if ".lora_" not in k}
    for key in [k for k in state if k.endswith(".lora_A.default.weight")]:
        a, b = state[key].float(), state[key.replace(".lora_A.", ".lora_B.")].float()
        name = key.replace(".lora_A.default.", ".")
        weight = merged[name].float() + config.lora_alpha / config.r * (b @ a)
        merged[name] = weight.to(merged[name].dtype)
    return merged


# ---- the adapter ----

def short_tokenizer(tokenizer, num_merges):
    """The LLM's BPE stopped after `num_merges` merges:
    every token it gives is a short token of the same vocabulary.

    Returns (tokenizers.Tokenizer, sorted ids that it can give). Few, short classes are each heard
    often, so that words which were never heard can still be spelled. A tokenizer without merges is
    used as it is.
    """
    from tokenizers import Tokenizer
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = spec["model"]["vocab"]
    if spec["model"]["type"] != "BPE" or "\u0120" not in vocab:  # the space of byte-level BPE
        raise ValueError(f"the LLM's tokenizer is {spec['model']['type']} of another kind, "
                         "expected byte-level BPE")
    merges = spec["model"]["merges"] = spec["model"]["merges"][:num_merges]
    spec["model"]["ignore_merges"] = False
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]
    special = {t["id"] for t in spec["added_tokens"]}
    ids = {i for token, i in vocab.items() if len(token) == 1 and i not in special}
    ids |= {vocab[a + b] for a, b in pairs}
    return Tokenizer.from_str(json.dumps(spec)), sorted(ids)


class Block(nn.Module):
    """Depthwise convolution, attention, MLP; each with a pre-norm and a residual."""

    def __init__(self, dim, heads, kernel):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.conv = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.mix = nn.Linear(dim, dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x, mask):
        """x (B, A, D), mask (B, A) 1 = real frame -> (B, A, D)."""
        y = (self.norm1(x) * mask[..., None]).transpose(1, 2)        # (B, D, A); padding is silence
        x = x + self.mix(F.gelu(self.conv(y).transpose(1, 2)))                    # (B, A, D)
        # each (B, h, A, D/h)
        q, k, v = self.qkv(self.norm2(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = attend(functools.partial(F.scaled_dot_product_attention,
                                     attn_mask=mask[:, None, None, :].bool()), q, k, v)
        x = x + self.out(y.transpose(1, 2).flatten(2))                            # (B, A, D)
        return x + self.down(F.gelu(self.up(self.norm3(x))))                      # (B, A, D)

def encode(encoder, mel, mel_lengths):
    """Whisper encoder on the clips' own length: its forward insists on 30 s and knows no mask.

    Args:
        encoder: WhisperEncoder.
        mel: (B, M, F) log-mel, zero-padded.  mel_lengths: (B,) real frames, at most 3,000 each.
    Returns:
        features (B, ceil(F/2), D), zero at padding; lengths (B,) = ceil(mel_lengths / 2).
    """
    def keep(x, lengths):  # (B, D, F)
        # the next convolution must see zeros beyond the end, as it would without padding
        return x * (torch.arange(x.shape[2], device=x.device) < lengths[:, None])[:, None]

    lengths = (mel_lengths + 1) // 2
    x = keep(F.gelu(encoder.conv1(keep(mel, mel_lengths))), mel_lengths)          # (B, D, F)
    x = F.gelu(encoder.conv2(x)).transpose(1, 2)                          # (B, S, D), S = ceil(F/2)
    x = x + encoder.embed_positions.weight[:x.shape[1]]
    mask = torch.arange(x.shape[1], device=x.device) < lengths[:, None]           # (B, S) 1 = real
    for layer in encoder.layers:
        x = layer(x, attention_mask=mask[:, None, None, :])
    return encoder.layer_norm(x) * mask[..., None], lengths                       # (B, S, D), (B,)


class Adapter(nn.Module):
    """Encoder features -> states at 12.5 Hz, their spelling (CTC logits),
    what each stretch adds to the LLM's input.

    `llm_dim` H is the width of the LLM's embeddings, whose rows are the CTC classes
    (cosine logits, blank beside them).
    """

    def __init__(self, feature_dim, dim, llm_dim, layers, heads, kernel):
        super().__init__()
        self.stack = nn.Linear(STACK * feature_dim, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, kernel) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.spell = nn.Linear(dim, llm_dim)
        self.blank = nn.Parameter(torch.randn(1, llm_dim) / llm_dim**0.5)
        self.log_scale = nn.Parameter(torch.tensor([3.0]))  # logits need about 20 times a cosine
        self.correct = nn.Linear(dim, llm_dim)             # added to a heard token's embedding
        self.sound = nn.Linear(dim, llm_dim)               # stands alone where no token is heard
        nn.init.zeros_(self.correct.weight)
        nn.init.zeros_(self.correct.bias)

    def forward(self, features, lengths, classes):
        """features (B, S, D'), lengths (B,), classes (C, H)
        -> states (B, A, D), logits (B, A, 1+C), lengths (B,)."""
        batch, width, _ = features.shape
        frames = -(-width // STACK)                                               # A
        x = F.pad(features, (0, 0, 0, frames * STACK - width)).reshape(batch, frames, -1)
        lengths = -(-lengths // STACK)
        mask = torch.arange(frames, device=x.device) < lengths[:, None]           # (B, A) 1 = real
        x = self.stack(x)                                                 # (B, A, 4D') -> (B, A, D)
        for block in self.blocks:
            x = block(x, mask)
        states = self.norm(x)                                                     # (B, A, D)
        with torch.autocast(x.device.type, enabled=False):
            classes = F.normalize(torch.cat([self.blank, classes.float()]), dim=-1)  # (1+C, H)
            cosines = F.normalize(self.spell(states.float()), dim=-1) @ classes.T    # (B, A, 1+C)
            return states.float(), cosines * self.log_scale.exp(), lengths


# ---- the student ----

class Lookup(torch.autograd.Function):
    """Rows of a table (V, H) by ids (N,) -> the table again, for who reads it next, and (N, H).
    The next reader's gradient takes the rows' in: one buffer of the table's size for all."""

    @staticmethod
    def forward(ctx, table, ids, ignored):
        ctx.save_for_backward(ids)
        ctx.shape, ctx.ignored = table.shape, ignored
        ctx.set_materialize_grads(False)
        return table.view_as(table), table[ids]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, rows):
        ids, = ctx.saved_tensors
        if rows is not None:
            grad = rows.new_zeros(ctx.shape) if grad is None else grad.contiguous()
            if ctx.ignored is not None:
                rows = rows.masked_fill((ids == ctx.ignored)[:, None], 0)
            grad.index_put_((ids,), rows, accumulate=True)
        return grad, None, None


class Table:
    """The embeddings of an LLM during one pass: called with ids (N,) -> (N, H). `head` is the
    output head, which has to be read last; where it is the same matrix, both share a gradient."""

    def __init__(self, llm):
        self.embed, self.head = llm.get_input_embeddings(), llm.get_output_embeddings().weight
        self.weight, self.tied = self.embed.weight, self.head is self.embed.weight

    def __call__(self, ids):
        if type(self.embed) is not nn.Embedding:  # some scale what they give
            return self.embed(ids)
        self.weight, rows = Lookup.apply(self.weight, ids, self.embed.padding_idx)
        self.head = self.weight if self.tied else self.head
        return rows


class SpeechLLMConfig(PretrainedConfig):
    """encoder, llm: configurations (or dicts) of the two pretrained parts;
    ctc_merges: see short_tokenizer."""
    model_type = "speech_llm"
    encoder: dict | PretrainedConfig | None = None
    llm: dict | PretrainedConfig | None = None
    adapter_dim: int = 384
    adapter_layers: int = 2
    adapter_heads: int = 6
    adapter_kernel: int = 7
    ctc_merges: int = 500
    speech_lora: dict | None = None  # rank, alpha of LoRA that acts at speech only: never merged

    def __post_init__(self, **kwargs):
        for name in ("encoder", "llm"):
            part = getattr(self, name)
            if isinstance(part, dict):
                part = dict(part)
                setattr(self, name, AutoConfig.for_model(part.pop("model_type"), **part))
        super().__post_init__(**kwargs)


class SpeechLLM(PreTrainedModel):
    config_class = SpeechLLMConfig
    main_input_name = "before"
    spoken_hz = 3  # positions of the LLM that a second of speech takes, for planning
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Block"]
    _keep_in_fp32_modules_strict = ["adapter"]

    def __init__(self, config, encoder=None, llm=None):
        super().__init__(config)
        c = config
        self.encoder = encoder if encoder is not None else WhisperEncoder(c.encoder)
        self.llm = (llm if llm is not None
                    else AutoModelForCausalLM.from_config(c.llm, dtype=torch.get_default_dtype()))
        if c.speech_lora:
            add_lora(self.llm, **c.speech_lora)
        self.adapter = Adapter(c.encoder.d_model, c.adapter_dim,
                               self.llm.get_input_embeddings().embedding_dim,
                               c.adapter_layers, c.adapter_heads, c.adapter_kernel)
        self.processors = None
        self.positions = [0, 0]  # that the LLM has read: all, and without padding
        self.post_init()

    def _init_weights(self, module):
        """Nothing: the adapter keeps what its constructor drew,
        the pretrained parts what they were loaded with."""

    def train(self, mode=True):
        """A frozen encoder stays in eval mode: no dropout, no layer drop."""
        super().train(mode)
        if not any(p.requires_grad for p in self.encoder.parameters()):
            self.encoder.eval()
        return self

    def load_processors(self, tokenizer=None, feature_extractor=None):
        """Tokenizer and feature extractor: given, or from the folder that the model came from.
        Idempotent."""
        if self.processors is None:
            tokenizer = tokenizer or from_folder(AutoTokenizer, self.name_or_path)
            extractor = feature_extractor or from_folder(WhisperFeatureExtractor, self.name_or_path)
            short, classes = short_tokenizer(tokenizer, self.config.ctc_merges)
            self.processors = dict(
                tokenizer=tokenizer, extractor=extractor, short=short, classes=classes,
                class_of={token: c for c, token in enumerate(classes, 1)})
        return self.processors

    @property
    def tokenizer(self):
        return self.load_processors()["tokenizer"]

    def mel(self, waveform):
        """waveform (S,) float32 at 16 kHz -> log-mel (M, F) at 100 Hz, on the clip's own length."""
        extractor = self.load_processors()["extractor"]
        waveform = F.pad(waveform, (0, max(0, extractor.n_fft - len(waveform))))
        return torch.from_numpy(extractor(
            waveform.numpy(), sampling_rate=SAMPLE_RATE, padding=False, truncation=False,
            return_tensors="np").input_features[0])

    def clip(self, row):
        """A row of the manifest -> what forward needs of its audio."""
        return self.mel(load_audio(row["audio"]))

    def spelling(self, text):
        """Text -> CTC classes in [1, C], the targets of losses.ctc."""
        processors = self.load_processors()
        return [processors["class_of"][i]
                for i in processors["short"].encode(text, add_special_tokens=False).ids
                if i in processors["class_of"]]

    def features(self, mels):
        """List of B log-mels (M, F_i) -> encoder features, list of B (S_i, D).
        Long clips go window by window."""
        windows = [mel.split(WINDOW_FRAMES, dim=1) for mel in mels]
        flat = [window for clip in windows for window in clip]
        lengths = torch.tensor([window.shape[1] for window in flat], device=self.device)
        weight = self.encoder.conv1.weight
        padded = weight.new_zeros(len(flat), flat[0].shape[0], int(lengths.max()))  # (W, M, F)
        for row, window in zip(padded, flat):
            row[:, :window.shape[1]] = window
        encoded, lengths = encode(self.encoder, padded, lengths)                  # (W, S, D), (W,)
        flat = iter([row[:n] for row, n in zip(encoded, lengths.tolist())])
        return [torch.cat([next(flat) for _ in clip]) for clip in windows]

    def spell(self, features):
        """List of B features (S_i, D')
        -> states (B, A, D), CTC logits (B, A, 1+C), lengths (B,)."""
        table = self.llm.get_input_embeddings().weight
        lengths = torch.tensor([len(f) for f in features], device=table.device)
        padded = nn.utils.rnn.pad_sequence([f.to(table.device) for f in features],
                                           batch_first=True)                      # (B, S, D')
        classes = table.detach()[torch.tensor(self.load_processors()["classes"],
                                              device=table.device)]               # (C, H)
        return self.adapter(padded.to(self.adapter.stack.weight.dtype), lengths, classes)

    def read(self, states, logits, lengths, table=None):
        """What `spell` gives -> embeddings, list of B (A_i, H), and the texts heard, list of B str.

        A_i is the number of tokens heard, plus one for each second in which nothing is.
        """
        table, texts, spans, counts = table or Table(self.llm), [], [], []
        # which tokens, and over which frames: discrete, so no gradient goes this way
        for b, (path, length) in enumerate(zip(logits.argmax(-1).tolist(), lengths.tolist())):
            text, events = read_path(path[:length], self.processors)
            texts.append(text)
            counts.append(len(events))
            spans += [(b, *event) for event in events]
        clip, token, first, last = torch.tensor(spans, device=states.device).T     # (sum A,) each
        sums = F.pad(states.cumsum(dim=1), (0, 0, 1, 0))                          # (B, 1+A, D)
        mean = ((sums[clip, last + 1] - sums[clip, first])
                / (last + 1 - first)[:, None])                                    # (sum A, D)
        heard = table(token.clamp(min=0)).float() + self.adapter.correct(mean)    # (sum A, H)
        norm = table.weight.detach().float().norm(dim=-1).mean()  # a sound is as loud as a word
        sound = F.normalize(self.adapter.sound(mean).float(), dim=-1) * norm      # (sum A, H)
        return list(torch.where((token >= 0)[:, None], heard, sound)
                    .to(table.weight.dtype).split(counts)), texts

    def hear(self, waveforms):
        """List of waveforms (S_i,) at 16 kHz
        -> embeddings, list of (A_i, H), and texts, list of str."""
        return self.read(*self.spell(self.features(
            [self.mel(w).to(self.device) for w in waveforms])))

    def forward(self, before, after, answers, clips=None, features=None, mels=None, llm=True):
        """Hidden states that predict the answers' tokens; what DDP wraps.

        Args:
            before, after, answers: B lists of token ids each;
                the prompt is before + (speech) + after.
            clips: rows that have speech between `before` and `after`,
                in the order of features or mels.
            features: list of (S_i, D) encoder features, or mels: list of (M, F_i) log-mels.
            llm: False stops after the adapter (the CTC warm start needs no LLM).
        Returns:
            (hidden (N, H) with N = all answer tokens in row order, CTC logits (len(clips), A, 1+C),
            lengths, output head (V, H)); logits and lengths are None without speech. What the head
            makes of `hidden` is the losses' business: no (B, T, V) tensor is made.
        """
        speech, logits, lengths, zero, table = {}, None, None, 0, Table(self.llm)
        # DDP waits for all that trains, used or not
        if self.training and torch.is_grad_enabled() and not isinstance(self, FSDPModule):
            idle = [p for part in (self.adapter, self.encoder) for p in part.parameters()
                    if p.requires_grad]
            zero = 0 * sum(p.sum() for p in idle)
        if clips:
            states, logits, lengths = self.spell(
                self.features(mels) if features is None else features)
            if not llm:
                return None, logits + zero, lengths, None
            speech = dict(zip(clips, self.read(states, logits, lengths, table)[0]))
        after = [a + y for a, y in zip(after, answers)]
        embeds = self.splice(before, after, speech, table)
        shared = len(os.path.commonprefix(before))
        spoken = (self.speech_positions(before, after, speech)
                  if getattr(self.config, "speech_lora", None) else None)
        hidden, *read = answer_states(self.llm, embeds, list(map(len, answers)), shared, spoken)
        self.positions = [a + b for a, b in zip(self.positions, read)]
        # a view, since FSDP hangs a hook on what it gets
        return hidden + zero, logits, lengths, table.head.view_as(table.head)

    def splice(self, before, after, speech, table=None):
        """Token ids and speech embeddings -> list of B (T_i, H) inputs of the LLM."""
        lengths = [n for b, a in zip(before, after) for n in (len(b), len(a))]
        flat = torch.tensor([i for b, a in zip(before, after) for i in b + a], dtype=torch.long,
                            device=self.device)
        parts = iter((table or Table(self.llm))(flat).split(lengths))
        return [torch.cat([next(parts), *([speech[row]] if row in speech else []), next(parts)])
                for row in range(len(before))]

    def speech_positions(self, before, after, speech):
        """As splice -> list of B (T_i, 1), 1 = speech."""
        return [torch.tensor([0.] * len(b) + [1.] * len(speech.get(row, ())) + [0.] * len(a),
                             device=self.device)[:, None]
                for row, (b, a) in enumerate(zip(before, after))]

    def prompt(self, row):
        """A row of the manifest -> (before, after, waveform or None).
        Audio is a path or (S,); text joins `before`."""
        before, after = chat_parts(self.tokenizer, row.get("system"), row.get("instruction"))
        if row.get("audio") is None:
            return before + text_ids(self.tokenizer, row["prompt"]), after, None
        audio = row["audio"]
        return before, after, audio if isinstance(audio, Tensor) else load_audio(audio)

    @torch.inference_mode()
    def generate(self, rows, max_new_tokens=128, **options):
        """Answer a batch of questions:
        [{"audio": path or (S,) at 16 kHz} or {"prompt": text}, ...] -> list of str.

        Rows may carry "system" and "instruction"; options are those of the function `generate`.
        """
        was_training = self.training
        self.eval()  # in training mode, gradient checkpointing turns the cache off
        before, after, waveforms = zip(*(self.prompt(row) for row in rows))
        clips = [b for b, waveform in enumerate(waveforms) if waveform is not None]
        heard = self.hear([waveforms[b] for b in clips])[0] if clips else []
        speech = dict(zip(clips, heard))
        if getattr(self.config, "speech_lora", None):
            options["speech"] = self.speech_positions(before, after, speech)
        ids = generate(self.llm, self.splice(before, after, speech), max_new_tokens=max_new_tokens,
                       eos_ids=[end_token(self.tokenizer)], **options)
        self.train(was_training)
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)


class HubStudent(nn.Module):
    """A speech LLM of transformers, taken apart as SpeechLLM is: encoder, adapter, llm.

    What hears is its own code, what asks and answers is SpeechLLM's. `whole` keeps the model in
    one piece, out of parameters(): what is none of the three parts (vision) never trains.
    """
    forward, splice, generate = SpeechLLM.forward, SpeechLLM.splice, SpeechLLM.generate
    spell = staticmethod(lambda features: (features, None, None))  # embeddings, no CTC logits
    read = staticmethod(lambda embeddings, *_: (embeddings, None))
    spelling = staticmethod(lambda text: [])
    spoken_hz = 25

    def __init__(self, model, processor, tokenizer):
        super().__init__()
        self.__dict__["whole"] = model
        self.positions = [0, 0]  # that the LLM has read: all, and without padding
        self.processor, self.tokenizer, self.config = processor, tokenizer, model.config
        parts = dict(model.model.named_children())
        self.encoder = parts.get("audio_tower", parts.get("encoder"))
        self.adapter = parts.get("multi_modal_projector", parts.get("projector"))
        if self.adapter is None:  # Omni: the encoder ends in it; nothing reads its audio_bos_eos
            inner = dict(self.encoder.named_children())
            self.adapter = inner.pop("proj")
            self.encoder = nn.ModuleDict({k: v for k, v in inner.items() if "bos_eos" not in k})
        self.llm = TextLLM(model)
        self.audio_token = tokenizer.convert_ids_to_tokens(self.config.audio_token_id)

    @property
    def device(self):
        return self.llm.device

    def train(self, mode=True):
        """What hears stays in eval mode: no dropout, no statistics of a batch."""
        super().train(mode)
        self.encoder.eval()
        self.adapter.eval()
        return self

    def prompt(self, row):
        """A row of the manifest -> (before, after, clip or None) as of SpeechLLM.prompt;
        a clip is a whole prompt."""
        if row.get("audio") is not None:
            return [], [], self.clip(row)
        before, after = chat_parts(self.tokenizer, row.get("system"), row.get("instruction"))
        return before + text_ids(self.tokenizer, row["prompt"]), after, None

    def clip(self, row):
        """A row with audio -> its whole prompt by the model's own template, see expand.
        An instruction follows the sound, as these models were trained."""
        audio = row["audio"] if isinstance(row["audio"], Tensor) else load_audio(row["audio"])
        audio = F.pad(audio, (0, max(0, SAMPLE_RATE // 10 - len(audio)))).numpy()
        chat = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        question = row.get("instruction") or ""
        said = self.audio_token + question
        if self.audio_token in self.tokenizer.chat_template:  # else it knows text only
            said = [{"type": "audio"}, {"type": "text", "text": question}][:1 + bool(question)]
        text = self.tokenizer.apply_chat_template(
            [*chat, {"role": "user", "content": said}], tokenize=False, add_generation_prompt=True,
            enable_thinking=False)
        if text.count(self.audio_token) != 1:
            raise ValueError(f"{self.audio_token} stands in a system message or instruction, "
                             "or the template repeats the question")
        return self.expand(text, audio)

    def expand(self, text, audio):
        """A prompt with one audio token, audio (S,) -> {"ids": (T,) with as many audio tokens as
        embeddings, the features that the model makes these of}."""
        token, config = self.audio_token, self.config
        options = {"sampling_rate": SAMPLE_RATE, "return_tensors": "pt"}
        if config.model_type == "voxtral":
            mel = self.processor(audio, padding=True, truncation=False,
                                 pad_to_multiple_of=30 * SAMPLE_RATE, **options).input_features
            mel = mel[0].unflatten(1, (-1, WINDOW_FRAMES)).transpose(0, 1)        # (W, M, 3000)
            stacked = config.audio_config.intermediate_size // config.audio_config.hidden_size
            count, features = len(mel) * (WINDOW_FRAMES // 2 // stacked), {"input_features": mel}
        elif config.model_type.endswith("thinker"):
            frames = -(-len(audio) // self.processor.hop_length)
            mel = self.processor(np.pad(audio, (0, self.processor.n_fft)), padding="longest",
                                 **options).input_features[..., :frames]  # as if padded to 300 s
            features = {"input_features": mel,                                    # (1, M, F)
                        "feature_attention_mask": torch.ones(1, frames, dtype=torch.long)}
            count = self.whole.model.audio_tower._get_feat_extract_output_lengths(frames)[1]
        else:
            features = dict(self.processor(text=text, audio=[audio], add_special_tokens=False,
                                           **options))
            del features["attention_mask"]
            return {"ids": features.pop("input_ids")[0], **features}
        ids = self.tokenizer(text.replace(token, token * count), add_special_tokens=False).input_ids
        return {"ids": torch.tensor(ids), **features}

    def features(self, clips):
        """List of B clips -> embeddings of their prompts, list of (T_i, H)."""
        ids = [clip["ids"].to(self.device) for clip in clips]
        places = [i == self.config.audio_token_id for i in ids]                   # (T_i,) each
        alone = self.config.model_type.startswith("granite")  # its encoder knows no mask
        sounds = torch.cat([self.sounds(group) for group in
                            ([[clip] for clip in clips] if alone else [clips])])  # (sum N_i, H)
        table = self.llm.get_input_embeddings()
        return [table(i).masked_scatter(at[:, None], sound.to(table.weight.dtype)) for i, at, sound
                in zip(ids, places, sounds.split([int(at.sum()) for at in places]))]

    def sounds(self, clips):
        """Clips -> what the model makes of their sounds, one after the other (N, H)."""
        base, dtype, inputs = self.whole.model, next(self.encoder.parameters()).dtype, {}
        hear = getattr(base, "get_audio_features", functools.partial(qwen2_audio_features, base))
        for key in inspect.signature(hear).parameters.keys() & clips[0].keys():
            width = max(clip[key].shape[-1] for clip in clips)
            joined = torch.cat([F.pad(c[key], (0, width - c[key].shape[-1])) for c in clips])
            inputs[key] = joined.to(self.device, dtype if joined.is_floating_point() else None)
        with (torch.autocast(self.device.type, dtype) if dtype != torch.float32
              else contextlib.nullcontext()):  # beside a frozen encoder, the adapter is fp32
            states = hear(**inputs)
        return getattr(states, "pooler_output", states).flatten(0, -2)

    def hear(self, clips):
        """As features, and no texts: these models do not spell what they hear."""
        return self.features(clips), None


def qwen2_audio_features(base, input_features, feature_attention_mask):
    """What Qwen2AudioModel.forward does to hear: it has no get_audio_features. -> (N, H)"""
    frames, counts = base.audio_tower._get_feat_extract_output_lengths(
        feature_attention_mask.sum(-1))
    places = torch.arange(input_features.shape[2] // 2, device=input_features.device)
    mask = (places < frames[:, None])[:, None, None]                              # (B, 1, 1, 1500)
    states = base.audio_tower(input_features, attention_mask=mask).last_hidden_state
    states = base.multi_modal_projector(states)                                   # (B, 750, H)
    return states[places[:states.shape[1]] < counts[:, None]]


def text_ids(tokenizer, text):
    """What a user says -> token ids; text that looks like a special token stays text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def read_path(path, processors):
    """Best CTC path (A ints, 0 = blank) -> (text, events);
    an event is (token id, or -1 for sound, first, last frame).

    The spelled pieces are joined to text and tokenised again,
    so that the LLM meets the tokens that it knows.
    """
    frame_hz = FEATURE_RATE_HZ // STACK
    raw, frames, previous = b"", [], 0
    for frame, c in enumerate(path):
        if c and c != previous:
            piece = bytes(
                BYTES[x] for x in processors["short"].id_to_token(processors["classes"][c - 1]))
            raw, frames = raw + piece, frames + [frame] * len(piece)
        previous = c
    decoded = raw.decode("utf-8", "surrogateescape")  # a stray byte is a surrogate, left out below
    kept = [k for k, x in enumerate(decoded) if not "\udc80" <= x <= "\udcff"]
    text = "".join(decoded[k] for k in kept)
    coded = processors["tokenizer"](text, add_special_tokens=False, split_special_tokens=True,
                                    return_offsets_mapping=True)
    starts = np.cumsum([0] + [len(x.encode("utf-8", "surrogateescape")) for x in decoded])
    events = []
    for token, (first, end) in zip(coded.input_ids, coded.offset_mapping):
        first, last = kept[first], kept[max(first, end - 1)]
        events.append((token, frames[starts[first]], frames[starts[last + 1] - 1]))
    gaps, edges = [], [0] + [f for e in events for f in (e[1], e[2] + 1)] + [len(path)]
    for start, stop in zip(edges[::2], edges[1::2]):  # a second without a word, or no word at all
        seconds = (max((stop - start) // frame_hz, 0 if events else 1)
                   if stop - start >= frame_hz or not events else 0)
        gaps += [(-1, start + i * frame_hz, min(start + (i + 1) * frame_hz, len(path)) - 1)
                 for i in range(seconds)]
    return text, sorted(events + gaps, key=lambda e: e[1])


# ---- build, load, save ----

def build_student(name=DEFAULT_STUDENT, revision=None, **adapter):
    """ENCODER+LLM, by hub ids or folders -> SpeechLLM in fp32;
    torch's generator draws the untrained adapter."""
    from transformers import WhisperModel
    encoder_name, _, llm_name = name.partition("+")
    folder = resolve(encoder_name, revision)
    config = from_folder(AutoConfig, folder)
    if config.model_type != "whisper":
        raise RuntimeError(f"{encoder_name}: speech encoder of type {config.model_type!r}, "
                           "expected a Whisper model")
    llm, tokenizer = load_llm(llm_name)
    encoder = from_folder(WhisperModel, folder, dtype=torch.float32).encoder
    model = SpeechLLM(
        SpeechLLMConfig(encoder=config.to_dict(), llm=llm.config.to_dict(), **adapter),
        encoder, llm)
    model.load_processors(tokenizer, from_folder(WhisperFeatureExtractor, folder))
    return model.eval()


def load_student(name, revision=None, trust_remote_code=False):
    """--student: ENCODER+LLM, a folder that save_student wrote, or a speech LLM of transformers
    -> SpeechLLM or HubStudent in fp32."""
    if "+" in name and not Path(name).exists():
        return build_student(name, revision)
    folder = resolve(name, revision)
    config = PretrainedConfig.get_config_dict(folder)[0]
    if config.get("model_type") == SpeechLLMConfig.model_type:
        return from_folder(SpeechLLM, folder, dtype=torch.float32).eval()
    remote = "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING
    if remote and not trust_remote_code:
        raise RuntimeError(f"{name}: a model of type {config.get('model_type')!r} that runs code "
                           "from its own folder; read it, then allow it with --trust-remote-code")
    options = {"trust_remote_code": True} if remote else {}
    model = load_multimodal(folder, torch.float32, **options)
    if not hasattr(model, "model") or not hasattr(model.config, "audio_token_id"):
        raise RuntimeError(f"{name}: a model of type {config.get('model_type')!r}, expected "
                           "ENCODER+LLM, a folder that train_kd.py wrote, or a speech LLM of "
                           "transformers")
    if (Path(folder) / "adapter_config.json").exists():
        merge_adapter(model)
    # Omni's processor wants torchvision, for what is never shown; Voxtral's takes files only
    plain = hasattr(model.model, "visual") or model.config.model_type == "voxtral"
    processor = from_folder(AutoFeatureExtractor if plain else AutoProcessor, folder, **options)
    return HubStudent(model, processor, load_tokenizer(folder, name)).eval()


def merge_adapter(model):
    """Granite-Speech's LoRA, which it switches on when it hears, becomes a part of its weights."""
    if not importlib.util.find_spec("peft"):
        raise RuntimeError(f"{model.name_or_path} comes with an adapter: pip install peft")
    for name, layer in [x for x in model.named_modules() if hasattr(x[1], "base_layer")]:
        layer.merge()
        model.set_submodule(name, layer.base_layer)
    model._hf_peft_config_loaded = model.config.has_lora_adapter = False
    model._weight_conversions = None  # those of the adapter's names would spoil a saved folder


def whole(tensor, keep=True):
    """What FSDP has sharded, gathered on the CPU: every rank must ask, `keep` or not."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    tensor = tensor.full_tensor()
    return tensor.cpu() if keep else None


def save_student(model, folder, dtype=None, write=True):
    """Write a transformers folder that AutoModel.from_pretrained(folder, trust_remote_code=True)
    loads anywhere.

    The folder is written beside its place and renamed: it is complete or not there at all.
    With a sharded model every rank must call it, one with `write`.
    """
    state = getattr(model, "whole", model).state_dict()
    state = {k: whole(v, write) for k, v in state.items()}
    if not write:
        return
    folder = Path(folder)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    config = getattr(model.llm, "peft_config", {}).get("default")
    lora = None if getattr(model.config, "speech_lora", None) else config
    weights = merge_lora(lora, state) if lora else state
    if isinstance(model, HubStudent):
        save_whole(model.whole, weights, temporary, dtype)
    else:
        weights = {k: v.to(dtype) if dtype and not k.startswith("adapter.") else v
                   for k, v in weights.items()
                   if k not in model.all_tied_weights_keys}  # a cast copy is not seen to be tied
        SpeechLLM.register_for_auto_class("AutoModel")
        SpeechLLMConfig.register_for_auto_class("AutoConfig")
        original, model.__class__ = model.__class__, SpeechLLM  # fully_shard makes it a subclass
        model.save_pretrained(temporary, state_dict=weights)
        model.__class__ = original
        model.tokenizer.save_pretrained(temporary)
        model.processors["extractor"].save_pretrained(temporary)
    if lora:
        save_adapter(lora, state, temporary / "adapter")
    config = json.loads((temporary / "config.json").read_text())
    config["dtype"] = str(dtype or torch.float32).removeprefix("torch.")  # not the live model's
    (temporary / "config.json").write_text(json.dumps(config, indent=2))
    for path in filter(Path.is_file, temporary.rglob("*")):  # on the disk before the rename
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def save_whole(model, state, folder, dtype):
    """A model of transformers, and all else of the folder that it came from: the processor; of a
    model that also speaks, the weights that nothing here loads."""
    source = Path(model.name_or_path)
    state = {k: v.to(dtype) if dtype and v.is_floating_point() else v
             for k, v in state.items() if k not in model.all_tied_weights_keys}
    if json.loads((source / "config.json").read_text())["model_type"] in THINKERS:
        folder.mkdir(parents=True)
        trained = revert_weight_conversion(model, state)  # the names that the files have
        for path in source.glob("*.safetensors"):
            tensors = {k: trained.pop(k, v) for k, v in load_file(path).items()}
            save_file(tensors, folder / path.name, metadata={"format": "pt"})
        if trained:
            raise RuntimeError(f"{source}: no place for {len(trained)} trained tensors, "
                               f"e.g. {next(iter(trained))}")
    else:
        model.save_pretrained(folder, state_dict=state)
    skip = {"adapter_config.json"}
    if (folder / "model.safetensors").exists():
        skip.add("model.safetensors.index.json")
    for path in source.iterdir():
        if ((path.suffix in (".json", ".jinja", ".txt", ".model", ".py")
             or path.name == "spk_dict.pt") and path.name not in skip
                and not (folder / path.name).exists()):
            shutil.copy(path, folder)


AutoConfig.register(SpeechLLMConfig.model_type, SpeechLLMConfig, exist_ok=True)
AutoModel.register(SpeechLLMConfig, SpeechLLM, exist_ok=True)
