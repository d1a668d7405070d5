"""
The student: Whisper hears, a text LLM answers, and a small adapter tells it what words leave out.

  waveform (S,) -> Whisper -> words  -> the LLM's own tokens -> embeddings + correction --+
                           -> sound  -> a few vectors a second -> one linear layer -------+-> LLM

What Whisper writes enters as the LLM's own tokens, so the untrained student is the plain cascade;
training adds the rest. Speech LLMs of transformers are students too: HubStudent.
"""
import argparse
import codecs
import contextlib
import datetime
import hashlib
import inspect
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import soundfile
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (AutoConfig, AutoFeatureExtractor, AutoModelForCausalLM,
                          AutoModelForMultimodalLM, AutoProcessor, AutoTokenizer, BatchFeature,
                          GenerationMixin, PretrainedConfig, PreTrainedModel,
                          WhisperFeatureExtractor, WhisperForConditionalGeneration)
from transformers import modeling_outputs as outputs
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.whisper.tokenization_whisper import LANGUAGES

# with AMX, oneDNN's kernels hold megabytes each, and it would keep a thousand, of every shape met
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")

DEFAULT_LLM = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_STUDENT = f"openai/whisper-base+{DEFAULT_LLM}"
SAMPLE_RATE = 16_000
MAX_SECONDS = 600                  # of a clip
FEATURE_HZ = 50                    # Whisper's encoder positions a second
SOUND_HZ = 2                       # so often the mean of these, so far, tells how it sounded
CONTEXT_S = (10, 15, 20, 25, 30)   # clip + a second of silence (else the decoder loops); cut at 29
HEAR_BATCH = 32                    # of these at once: a clip of ten minutes has 21 parts
TOKENS_PER_S, NO_SPEECH = 12, 0.6  # more tokens than anyone says; likelier than that: no words
DENSE = "hi mr ne sa ta te ml kn bn as gu pa si ka hy am my km lo th bo".split()  # but in these 40
RIDGE, GAIN = 0.3, 2.0             # of Adapter.align, see there
TOP_K = 50                         # tokens among which one is drawn; transformers' own
LORA_SCALE = 2.0                   # alpha / rank, as most papers have it
PACKED_POSITIONS = 4096            # of one packed row at most: its mask is quadratic
AUDIO_MARK = "<|audio|>"           # stands for the speech in the rendered template
TAG = re.compile(r"</?\|?\w*(?:audio|speech|sound)\w*\|?>|\[audio\]", re.I)  # others' marks
TODAY = datetime.date(2025, 1, 1)  # in templates that tell the date: no run may change next day
FILLER = "user"                    # a sound begins as this: of 20 tokens it changes answers least
BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
BESIDE = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")  # beside weights in a model's folder


# ---- what people give: options, JSON, files ----

def number(kind, low, high=sys.float_info.max):
    """argparse type: a number of this kind from low to high."""
    def parse(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high:  # NaN never is
                return value
        wanted = f"{low} or more" if high == sys.float_info.max else f"{low} to {high}"
        raise argparse.ArgumentTypeError(f"{text}: expected a number, {wanted}")
    return parse


def json_lines(path, parse, bad=None):
    """parse(object, FILE:LINE) of each line of a file, or item of its JSON list -> list. What is no
    object in UTF-8, or raises ValueError in parse, raises, or is added to `bad`."""
    def read(text, where):
        try:
            value = json.loads(str(text, "utf-8-sig"))
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON in UTF-8 ({error})") from error
        return value

    data, rows = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8), []
    listed = data.lstrip().startswith(b"[")
    lines = read(data, f"{path}:1") if listed else data.split(b"\n")
    for line, value in enumerate(lines, 1):
        where = f"{path}:{line}"
        try:
            if not listed and not value.removeprefix(codecs.BOM_UTF8).strip():
                continue
            row = value if listed else read(value, where)
            if not isinstance(row, dict):
                raise ValueError(f"{where}: '{row!s:.60}' is no JSON object; expected one a line")
            rows.append(parse(row, where))
        except ValueError as error:
            if bad is None:
                raise
            bad.append({"id": where, "reason": str(error)})
    return rows


def check_texts(row, where, *keys):
    """ValueError unless each key holds text or null, or is absent."""
    for key in keys:
        if not isinstance(row.get(key), str | None):
            raise ValueError(f"{where}: {key} is {str(row[key])[:60]!r}, expected text or null")


def untagged(prompt, where):
    """A prompt without others' tags for the sound at its ends; ValueError if one is inside."""
    words = [part.strip() for part in TAG.split(prompt) if part.strip()]
    if len(words) > 1:
        raise ValueError(f"{where}: <audio> or the like inside the prompt; write words alone")
    return "".join(words) if TAG.search(prompt) else prompt


def leave_out(bad, limit, out, write=True):
    """Bad rows, [{"id", "reason"}], are listed in OUT/bad_rows.jsonl -> what to say about it.
    Raises: ValueError if there are more than `limit`."""
    if len(bad) > limit:
        raise ValueError(f"{bad[0]['reason']} (bad rows: {len(bad)}; mend them, or leave them out "
                         f"by --max-bad-rows {len(bad)})")
    if bad and write:
        Path(out).mkdir(parents=True, exist_ok=True)
        write_atomically(f"{out}/bad_rows.jsonl", "".join(json.dumps(row) + "\n" for row in bad))
    return f"{len(bad)} bad rows are left out, listed in {out}/bad_rows.jsonl" if bad else ""


def file_below(folder, name, where):
    """FOLDER/NAME; ValueError unless it is a file that lies below FOLDER, also behind links."""
    path = Path(folder, name)
    if (not os.path.isfile(path) or os.path.isabs(name)
            or not path.resolve().is_relative_to(Path(folder).resolve())):
        raise ValueError(f"{where}: audio file {name!r} not found below {folder}; copy it there, "
                         "and give its path from there")
    return str(path)


def write_atomically(path, content):
    """Text or bytes: the file appears complete or not at all, whichever rank is quicker."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(temporary, path)


def stop_now(*_):
    """Handler of SIGTERM and Ctrl-C."""
    print("stopped; the same command goes on", file=sys.stderr, flush=True)
    sys.exit(143)


def ranks():
    """Rank of this process of torchrun, and how many there are."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start_processes(device, backend="gloo"):
    """SIGTERM or Ctrl-C ends a script in one line, transformers keeps quiet; under torchrun all
    processes meet -> rank, how many."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop_now)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward under a mask: nan (pytorch#196678)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))  # one writes 91 GB
        torch.set_num_threads(cores())  # else one
    return ranks()


def digest(path):
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cores():
    """Processor cores that this process may use; under torchrun its share of them."""
    ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, ours // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def cast(module, dtype):
    """What module.to(dtype) does, but for RoPE's frequencies, which from_pretrained keeps, too."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point() and not name.endswith("inv_freq"):
            tensor.data = tensor.data.to(dtype)


# ---- models by name ----

def from_folder(loader, folder, **options):
    """loader.from_pretrained: no code of the folder's own runs, no pickle is read (a model has
    `dtype` among its options). Raises RuntimeError, also for missing weights."""
    if "dtype" in options:
        options |= dict(use_safetensors=True, output_loading_info=True)
        if Path(folder, "adapter_config.json").exists():  # as Granite-Speech 3.3
            raise RuntimeError(f"{folder}: a LoRA adapter lies beside its weights; expected plain "
                               "ones: merge it into them first, by peft's merge_and_unload")
    try:
        loaded = loader.from_pretrained(folder, **{"trust_remote_code": False, **options})
    except (OSError, ValueError, RuntimeError, LookupError, AttributeError, ImportError, TypeError,
            SafetensorError) as error:
        raise RuntimeError(f"{folder}: no {loader.__name__} can be read from it ({error!s:.200}); "
                           "expected transformers' files whose weights are safetensors") from error
    if "dtype" not in options:
        return loaded
    model, found = loaded
    if found["missing_keys"]:
        raise RuntimeError(f"{folder}: its safetensors do not fit its config.json: no weights for "
                           f"{', '.join(sorted(found['missing_keys']))[:200]}; expected all")
    return model


def resolve(name):
    """A model's name, NAME or NAME@REVISION -> a local folder: the folder itself, models/NAME, or
    what the hub or its cache has. Raises: RuntimeError, within seconds if the hub is not there."""
    for folder in (Path(name), Path("models", name), Path(__file__).parent / "models" / name):
        if (folder / "config.json").is_file():
            return str(folder)
    repository, _, revision = name.partition("@")
    try:
        return huggingface_hub.snapshot_download(
            repository, revision=revision or None, etag_timeout=5,  # seconds
            allow_patterns=[*BESIDE, "*.safetensors"])
    except Exception as error:  # a proxy's is neither OSError nor any that the hub's client names
        reason = (str(error) or repr(error)).splitlines()[0]
        raise RuntimeError(f"{name!r} is no local folder with a config.json, and no hub id "
                           f"(ORG/NAME) that can be reached ({reason}); without the hub: python "
                           "tools/offline_models.py") from error


class TextLLM(PreTrainedModel, GenerationMixin):
    """Decoder and output head of a multimodal model: a causal LM that shares their weights."""
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, model):
        super().__init__(model.get_decoder().config)
        self.model, self.lm_head = model.get_decoder(), model.get_output_embeddings()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, logits_to_keep=0,
                **inputs):
        found = self.model(input_ids=input_ids, attention_mask=attention_mask,
                           position_ids=position_ids, **inputs)
        logits = self.lm_head(found.last_hidden_state[:, -logits_to_keep:]) * logit_scale(self)
        return outputs.CausalLMOutputWithPast(logits=logits, past_key_values=found.past_key_values)


def logit_scale(llm):
    """Logits are this times hidden @ head.T: Cohere multiplies, Granite divides."""
    config = llm.config.get_text_config(decoder=True)
    return (getattr(config, "logit_scale", None) or 1) / (getattr(config, "logits_scaling", 0) or 1)


def load_tokenizer(folder, name):
    """Tokenizer of a local folder, with the chat template of its model or processor."""
    tokenizer = from_folder(AutoTokenizer, folder, mistral_format=False)
    legacy = Path(folder) / "chat_template.json"
    if not tokenizer.chat_template and legacy.exists():
        tokenizer.chat_template = json.loads(legacy.read_text())["chat_template"]
    if not tokenizer.chat_template:
        raise RuntimeError(f"{name}: its tokenizer has no chat template; use an instruction-tuned "
                           "model, or put chat_template.jinja into its folder")
    tokenizer.chat_template = re.sub(
        r"strftime_now\(\s*['\"](.*?)['\"]\s*\)", lambda found: repr(TODAY.strftime(found[1])),
        tokenizer.chat_template)
    chat_parts(tokenizer)  # or the template refuses
    return tokenizer


def load_multimodal(folder, dtype):
    """A multimodal model; of Qwen2.5-Omni the part that hears and thinks, which does not speak."""
    config = PretrainedConfig.get_config_dict(folder)[0]
    name = (config.get("architectures") or [""])[0]
    if config.get("model_type") == "qwen2_5_omni":
        name = "Qwen2_5OmniThinkerForConditionalGeneration"
    return from_folder(getattr(transformers, name, AutoModelForMultimodalLM), folder, dtype=dtype)


def load_llm(name, dtype=torch.float32):
    """Text LLM, or the text side of a multimodal model, by folder or hub id
    -> (causal LM in eval mode, tokenizer with a chat template)."""
    folder = resolve(name)
    tokenizer = load_tokenizer(folder, name)
    if from_folder(AutoConfig, folder).model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return from_folder(AutoModelForCausalLM, folder, dtype=dtype).eval(), tokenizer
    return TextLLM(load_multimodal(folder, dtype)).eval(), tokenizer


# ---- audio, text ----

def audio_seconds(path):
    """Length of an audio file by its header; raises ValueError if that is no usable audio's."""
    try:
        header = soundfile.info(str(path))
    except (RuntimeError, TypeError, OSError) as error:
        raise ValueError(f"{path}: not a readable audio file ({error}); fetch it again, or convert "
                         f"it: ffmpeg -i {path} {path}.wav") from error
    if header.samplerate % 25 or not 0.02 <= header.duration <= MAX_SECONDS:  # a huge kernel
        raise ValueError(f"{path}: {header.frames} samples at {header.samplerate} Hz, expected 20 "
                         f"ms to {MAX_SECONDS} s at a rate in steps of 25 Hz; cut or resample it")
    return header.duration


def load_audio(path):
    """Audio file -> waveform (S,) float32 at 16 kHz, the mean of its channels. A waveform is given
    back. ValueError: no usable audio."""
    from torchaudio.functional import resample
    if isinstance(path, Tensor):
        return path
    seconds = audio_seconds(path)
    try:
        samples, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except RuntimeError as error:
        raise ValueError(f"{path}: not a readable audio file ({error}); fetch it again") from error
    waveform = torch.from_numpy(samples).mean(dim=1)                              # (S,)
    if len(waveform) < 0.95 * seconds * rate or not waveform.abs().max() < 100:
        raise ValueError(f"{path}: {len(waveform)} samples up to {waveform.abs().max()}, expected "
                         f"{seconds * rate:.0f} of -1 to 1; fetch it again, or scale it")
    return resample(waveform, rate, SAMPLE_RATE)


def chat_parts(tokenizer, system=None, instruction=None, content=None, mark=AUDIO_MARK):
    """Token ids of the chat template before and after what the user says (content, `mark` a part of
    it), up to the answer. Text and speech share both, and differ in what stands between them.
    Raises: ValueError if the template refuses, thinks, or shows `mark` twice."""
    messages = [{"role": "system", "content": system}] if system else []
    content = content or (f"{instruction}\n\n{mark}" if instruction else mark)
    try:
        text = tokenizer.apply_chat_template(
            [*messages, {"role": "user", "content": content}], tokenize=False,
            add_generation_prompt=True, enable_thinking=False)
    except (TemplateError, TypeError) as error:
        raise ValueError(f"the chat template of {tokenizer.name_or_path} refuses system message "
                         f"{str(system)[:60]!r} ({error})") from error
    if text.count(mark) != 1:
        raise ValueError(f"{mark} stands in a system message or instruction, "
                         "or the template repeats the question")
    if text.rstrip().endswith("<think>"):
        raise ValueError(f"the chat template of {tokenizer.name_or_path} opens <think> though "
                         "thoughts are switched off; choose a model that answers without them")
    return [tokenizer(part, add_special_tokens=False).input_ids for part in text.split(mark)]


def end_token(tokenizer):
    """Id of the token that ends a turn: the template's own, which need not be the tokenizer's."""
    mark, added = "\N{SNOWMAN}", tokenizer.added_tokens_decoder
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    after = tokenizer.apply_chat_template(chat, tokenize=False).rsplit(mark, 1)[1]
    ids = tokenizer(after, add_special_tokens=False).input_ids
    return ids[0] if ids and ids[0] in added and added[ids[0]].special else tokenizer.eos_token_id


def text_ids(tokenizer, text):
    """What a user says -> token ids; text that looks like a special token stays text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


# ---- hearing ----

class Heard(NamedTuple):
    """What Whisper makes of a clip: n tokens, and A vectors that tell how it sounded."""
    text: str
    ids: Tensor     # (n,)
    states: Tensor  # (n, D) of the decoder, which chose the tokens
    sound: Tensor   # (A, D) of the encoder, its mean so far, SOUND_HZ a second
    spans: Tensor   # (n, 2) first character of the text that a token has a part in, and their end


class Whisper(WhisperForConditionalGeneration):
    """A whole Whisper, frozen: what was said, and how it sounded. Each clip gets silence behind it,
    up to the next of CONTEXT_S: no mask is needed, and the rest of a batch changes nothing."""

    def __init__(self, config, folder=None):
        super().__init__(config)
        self.folder = folder or self.name_or_path
        self.extractor = from_folder(WhisperFeatureExtractor, self.folder)
        self.tokenizer = from_folder(AutoTokenizer, self.folder)
        vocab = self.tokenizer.get_vocab()
        known = LANGUAGES if config.vocab_size > 51864 else ()  # else it writes English alone
        self.languages = {code: vocab[f"<|{code}|>"] for code in known if f"<|{code}|>" in vocab}

    def heard(self, ids, states, sound):
        """What a clip's tokens write, and which characters each has a part in -> Heard."""
        decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        text, spans = "", []
        for token in self.tokenizer.convert_ids_to_tokens(ids.tolist()):
            first = len(text)
            text += decoder.decode(bytes(map(BYTES.get, token)))
            spans.append((first, len(text) + bool(decoder.getstate()[0])))  # a letter may go on
        spans = torch.tensor(spans).view(-1, 2) - (len(text) - len(text.lstrip()))
        return Heard(text.strip(), ids, states, sound, spans)

    @torch.inference_mode()
    def hear(self, waveforms, language=None):
        """B clips (S_i,) float32 at 16 kHz, of any length -> B Heard, on the CPU; no words where
        Whisper hears no speech. language: ISO code, or one for each clip; None = detected.
        Raises: ValueError if this Whisper does not know it."""
        self.eval()  # also within a student that is being trained
        spoken = language if isinstance(language, list) else [language] * len(waveforms)
        unknown = set(spoken) - {None, "en", *self.languages}
        if unknown:
            raise ValueError(f"language {unknown.pop()!r}: this Whisper knows "
                             f"{', '.join(sorted(self.languages)) or 'en'}")
        parts, groups = [], {}  # context -> clips or parts of clips that share it
        for row, waveform in enumerate(waveforms):
            parts.append(list(waveform.split((CONTEXT_S[-1] - 1) * SAMPLE_RATE)))
            for k, piece in enumerate(parts[row]):
                context = next(s for s in CONTEXT_S if len(piece) <= (s - 1) * SAMPLE_RATE)
                groups.setdefault(context, []).append((row, k))
        for context, places in groups.items():
            for start in range(0, len(places), HEAR_BATCH):
                batch = places[start:start + HEAR_BATCH]
                some = [parts[row][k] for row, k in batch]
                found = self.hear_batch(some, context, [spoken[row] for row, _ in batch])
                for (row, k), said in zip(batch, found):
                    parts[row][k] = said
        return [self.heard(*map(torch.cat, zip(*pieces))) for pieces in parts]

    def encode(self, mel):
        """Log-mel (B, M, F) at 100 Hz -> (B, F/2, D): the encoder's own forward insists on 30 s."""
        encoder = self.model.encoder
        x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel)))).transpose(1, 2)     # (B, S, D)
        x = x + encoder.embed_positions.weight[:x.shape[1]]
        for layer in encoder.layers:
            x = layer(x, None)
        return encoder.layer_norm(x)

    def hear_batch(self, waveforms, context_s, spoken):
        """B waveforms that fit a context -> B (ids (n,), states (n, D), sound (A, D)), greedy."""
        config, token_id = self.config, self.tokenizer.convert_tokens_to_ids
        mel = self.extractor([waveform.numpy() for waveform in waveforms], return_tensors="pt",
                             sampling_rate=SAMPLE_RATE, max_length=context_s * SAMPLE_RATE)
        mel = mel.input_features.to(self.device, self.dtype)                      # (B, M, F)
        # four at a time stay in a CPU's cache: 1.2 times as fast there as all at once
        features = outputs.BaseModelOutput(torch.cat([self.encode(some) for some in mel.split(4)]))

        # what the first token tells: is it speech, in which language
        prompts = torch.full((len(mel), 1), config.decoder_start_token_id, device=mel.device)
        first = self(encoder_outputs=features, decoder_input_ids=prompts).logits[:, 0].float()
        plain = token_id("<|notimestamps|>")
        silent = first.softmax(-1)[:, plain - 1] > NO_SPEECH  # <|nospeech|> stands before it
        more = [[plain]] * len(mel)
        if self.languages:
            known = list(self.languages.values())
            for row, guess in enumerate(first[:, known].argmax(-1).tolist()):
                language = self.languages.get(spoken[row], known[guess])
                more[row] = [language, token_id("<|transcribe|>"), plain]
        prompts = torch.cat([prompts, prompts.new_tensor(more)], 1)               # (B, P)

        end, seconds = config.eos_token_id, [len(w) / SAMPLE_RATE for w in waveforms]
        dense, most = {self.languages.get(code) for code in DENSE}, config.max_target_positions - 8
        rates = [40 if row[0] in dense else TOKENS_PER_S for row in more]
        limits = [min(most, 8 + int(rate * s)) for rate, s in zip(rates, seconds)]
        banned = [*(config.suppress_tokens or []), *range(end + 1, config.vocab_size)]  # special
        said = GenerationMixin.generate(  # Whisper's own wants 30 s
            self, encoder_outputs=features, attention_mask=torch.ones_like(mel[:, 0, ::2]),
            decoder_input_ids=prompts, max_new_tokens=max(limits), max_length=None, do_sample=False,
            begin_suppress_tokens=config.begin_suppress_tokens, suppress_tokens=banned,
            eos_token_id=end, output_hidden_states=True, return_dict_in_generate=True)
        tokens = said.sequences[:, prompts.shape[1]:].cpu()                       # (B, n)
        states = torch.cat([layers[-1][:, -1:] for layers in said.decoder_hidden_states], 1).cpu()
        results = []
        for row, length in enumerate(seconds):
            written = (tokens[row, :limits[row]] != end).cumprod(0)
            n = 0 if silent[row] else int(written.sum())
            count = max(1, round(length * FEATURE_HZ))  # encoder positions of the clip
            ends = torch.linspace(0, count, max(1, round(length * SOUND_HZ)) + 1)[1:].long()
            so_far = features[0][row, :count].float().cumsum(0)[ends - 1].cpu()   # (A, D)
            sound = (so_far / ends[:, None]).to(mel.dtype)
            results.append((tokens[row, :n], states[row, :n], sound))
        return results


def load_whisper(name, dtype=torch.float32):
    """A Whisper of transformers by folder or hub id -> Whisper in eval mode."""
    folder = resolve(name)
    kind = from_folder(AutoConfig, folder).model_type
    if kind != "whisper":
        raise RuntimeError(f"{name}: a model of type {kind!r} cannot hear, expected a Whisper")
    model = from_folder(Whisper, folder, dtype=dtype)
    for name in ("suppress_tokens", "begin_suppress_tokens"):  # what it must not write
        setattr(model.config, name, getattr(model.generation_config, name))
    return model.requires_grad_(False).eval()


# ---- many rows through an LLM ----

def packs(llm, longest, total):
    """Whether rows can stand behind one another under a mask: tokens of this LLM meet in attention
    alone, and none of its windows is shorter than the longest row."""
    config = llm.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) or longest
    return (llm.config._attn_implementation == "sdpa" and total <= PACKED_POSITIONS
            and kinds <= {"full_attention", "sliding_attention"} and window >= longest
            and not getattr(llm, "_is_stateful", False)
            and "position_ids" in inspect.signature(llm.base_model.forward).parameters)


def answer_states(llm, rows, lengths, shared=0):
    """Hidden states (N, H) that predict the last tokens of each row, before the output head. Rows
    are packed where that is possible: nothing is padded, and what all share is read once for all.
    rows: B rows of ids (T_i,) or embeddings (T_i, H). lengths: how many tokens of each are the
    answer, N in sum. shared: so many positions at the start of all rows are the same."""
    sizes, device = [len(row) for row in rows], rows[0].device
    packed = packs(llm, max(sizes), sum(sizes) - shared * (len(rows) - 1))
    shared = shared if packed else 0
    owner, position_ids, predict = [-1] * shared, list(range(shared)), []  # -1 = read by all rows
    for b, (size, count) in enumerate(zip(sizes, lengths)):
        places = [*range(shared), *range(len(owner), len(owner) + size - shared)]
        predict += places[-count - 1:-1]  # each predicts the token behind it
        owner += [b] * (size - shared)
        position_ids += range(shared, size)
    if packed:
        inputs = torch.cat([rows[0][:shared], *[row[shared:] for row in rows]])[None]
        owner, order = torch.tensor(owner), torch.arange(len(owner))
        mask = ((owner[:, None] == owner) | (owner == -1)) & (order[:, None] >= order)
        options = dict(attention_mask=mask[None, None].to(device),  # (1, 1, S, S), 1 = attend
                       position_ids=torch.tensor([position_ids], device=device))
    else:
        inputs = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # no causal row looks right
        mask = (torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]).to(device)
        options = dict(attention_mask=mask.long())
    name = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
    hidden = llm.base_model(**{name: inputs}, use_cache=False, **options).last_hidden_state
    hidden = hidden[0] if packed else hidden[mask]                                # (S, H)
    return hidden[torch.tensor(predict, dtype=torch.long, device=device)]


def check_context(llm, prompt_tokens, new_tokens):
    context = getattr(llm.config, "max_position_embeddings", None)
    if context and prompt_tokens + new_tokens > context:
        raise ValueError(f"{prompt_tokens} tokens of prompt and {new_tokens} new ones exceed the "
                         f"LLM's context of {context}; shorten it or lower --max-new-tokens")


@torch.inference_mode()
def generate(llm, prompts, *, max_new_tokens, eos_id, temperature=0.0):
    """Answers to prompts, embeddings (T_i, H) each, on the LLM's device -> lists of at most
    max_new_tokens ids; eos_id ends a row, and stays. temperature: of the softmax among the TOP_K
    likeliest tokens, one of which torch's generator draws; 0 takes the likeliest."""
    check_context(llm, max(map(len, prompts)), max_new_tokens)
    ones = [torch.ones(len(prompt), dtype=torch.long, device=prompt.device) for prompt in prompts]
    embeds = nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left")  # (B, T, H)
    mask = nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_side="left")       # (B, T)
    ids = llm.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=max_new_tokens,
                       do_sample=temperature > 0, temperature=temperature or 1.0, top_k=TOP_K,
                       top_p=1.0, repetition_penalty=1.0, eos_token_id=eos_id, pad_token_id=eos_id)
    return [row[:row.index(eos_id) + 1] if eos_id in row else row for row in ids.tolist()]


# ---- LoRA ----

def add_lora(llm, rank):
    """LoRA, untrained, on all linear layers but the head; the rest is frozen."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise RuntimeError("LoRA needs the package peft: pip install peft") from error
    llm.add_adapter(LoraConfig(r=rank, lora_alpha=LORA_SCALE * rank, target_modules="all-linear"))


def merge_lora(state):
    """State dict with LoRA -> that of the plain model: W + alpha / rank * B A."""
    merged = {k.replace(".base_layer.", "."): v for k, v in state.items() if ".lora_" not in k}
    for key, a in state.items():
        if key.endswith(".lora_A.default.weight"):
            b, name = state[key.replace(".lora_A.", ".lora_B.")], key.replace(".lora_A.default", "")
            weight = merged[name].float() + LORA_SCALE * (b.float() @ a.float())
            merged[name] = weight.to(merged[name].dtype)
    return merged


# ---- the student ----

class Adapter(nn.Module):
    """What words leave out: a correction of each word, and a few embeddings of the sound. Untrained
    it says nothing: corrections are zero, and sounds are left out. They begin with the first
    training step, each as the filler token, which changes answers by 0.02 to 0.04 nats."""

    def __init__(self, heard_dim, llm_dim):
        super().__init__()
        self.norm = nn.LayerNorm(heard_dim)
        self.words, self.sound = nn.Linear(heard_dim, llm_dim), nn.Linear(heard_dim, llm_dim)
        self.register_buffer("mean", torch.zeros(heard_dim))  # of the sounds that it aligned to
        self.register_buffer("std", torch.ones(heard_dim))
        self.register_buffer("listens", torch.tensor(False))  # True = sounds are a part of prompts
        for parameter in (self.words.weight, self.words.bias, self.sound.weight, self.sound.bias):
            nn.init.zeros_(parameter)

    @torch.no_grad()
    def align(self, sounds, targets):
        """Begin to listen, in closed form: ridge regression from how a clip sounds on average to
        what is said about it. Gradients alone would need a thousand rows to find that direction.
        sounds: C clips, (A_i, D) each. targets: (C, H), embeddings less the filler's."""
        vectors = torch.cat(sounds).double()                                      # (sum A, D)
        self.mean.copy_(vectors.mean(0))
        self.std.copy_(vectors.std(0) + 1e-3)
        means = torch.stack([sound.double().mean(0) for sound in sounds])         # (C, D)
        x = (means - self.mean) / self.std
        gram = x.T @ x + RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        self.sound.weight.copy_(GAIN * torch.linalg.solve(gram, x.T @ targets.double()).T)

    def forward(self, states, sounds):
        """Decoder states (W, D) of W words, sounds (A, D) -> (W, H), (A, H), float32."""
        dtype = self.norm.weight.dtype
        return (self.words(self.norm(states.to(dtype))).float(),
                self.sound((sounds.to(dtype) - self.mean) / self.std).float())


class Prompt(NamedTuple):
    """What the student reads: before + words + sound + after. By text `before` holds the question
    and nothing is heard. HubStudent: words are audio tokens, states what they are made of."""
    before: list     # token ids
    words: list      # token ids of the words heard, W
    states: Tensor   # (W, D) decoder states that chose each word
    sound: Tensor    # (A, D)
    after: list      # token ids


def positions(prompt):
    """How many positions of the LLM a prompt takes."""
    return sum(len(part) for part in (prompt.before, prompt.words, prompt.sound, prompt.after))


class SpeechLLMConfig(PretrainedConfig):
    """whisper, llm: configurations of the two pretrained parts, as dicts."""
    model_type = "speech_llm"
    whisper: dict | None = None
    llm: dict | None = None


class SpeechLLM(PreTrainedModel):
    config_class = SpeechLLMConfig
    _keep_in_fp32_modules_strict = ["adapter"]

    def __init__(self, config, whisper=None, llm=None, tokenizer=None):
        super().__init__(config)
        if whisper is None:  # from_pretrained fills in the weights
            folder = Path(resolve(self.name_or_path))  # of a student that a hub has, too
            whisper = Whisper(AutoConfig.for_model(**config.whisper), folder / "whisper")
            llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.llm),
                                                   dtype=torch.get_default_dtype())
            tokenizer = from_folder(AutoTokenizer, folder, config=config)
        self.whisper, self.llm, self.tokenizer = whisper, llm, tokenizer
        self.adapter = Adapter(config.whisper["d_model"],
                               llm.get_input_embeddings().embedding_dim)
        self.post_init()

    def _init_weights(self, module):
        """Nothing: the parts keep what they were made or loaded with."""

    def parts(self):
        """What can train, by name."""
        return {"adapter": [self.adapter], "llm": [self.llm]}

    def save_pretrained(self, folder, **options):
        """With its code, the LLM's tokenizer, and what Whisper reads and writes with."""
        folder = Path(folder)
        self.config.auto_map = {"AutoConfig": "model.SpeechLLMConfig",
                                "AutoModel": "model.SpeechLLM"}
        super().save_pretrained(folder, **options)
        shutil.copy(__file__, folder / "model.py")
        self.tokenizer.save_pretrained(folder)
        for part in (self.whisper.extractor, self.whisper.tokenizer):
            part.save_pretrained(folder / "whisper")

    def hear(self, waveforms, language=None):
        """List of B waveforms (S_i,) at 16 kHz -> list of B Heard, see Whisper.hear."""
        return self.whisper.hear(waveforms, language)

    def prompt(self, row, heard=None):
        """A row of the manifest -> Prompt: by speech if it has audio (a path or a waveform), else
        by text. heard: what is known of the clip already."""
        before, after = chat_parts(self.tokenizer, row.get("system"), row.get("instruction"))
        if row.get("audio") is None:
            nothing = torch.zeros(0, self.config.whisper["d_model"])
            said = text_ids(self.tokenizer, row["prompt"])
            return Prompt(before + said + after, [], nothing, nothing, [])
        if heard is None:
            heard = self.hear([load_audio(row["audio"])], row.get("language"))[0]
        words = self.tokenizer(heard.text, add_special_tokens=False, split_special_tokens=True,
                               return_offsets_mapping=True)
        offsets = torch.tensor(words.offset_mapping).view(-1, 2)                  # (W, 2)
        ends = torch.maximum(offsets[:, 1], offsets[:, 0] + 1)  # some tokenizers have empty ones
        # a word's state is the mean of those of the tokens that wrote a part of it
        overlap = (heard.spans[:, 0] < ends[:, None]) & (heard.spans[:, 1] > offsets[:, :1])
        share = overlap / overlap.sum(1, keepdim=True).clamp(min=1)               # (W, n)
        states = share @ heard.states.float()
        return Prompt(before, words.input_ids, states, heard.sound, after)

    def embed(self, prompts, answers):
        """B Prompts and B lists of answer tokens -> B (T_i, H), the LLM's inputs."""
        table, listens, rows = self.llm.get_input_embeddings(), bool(self.adapter.listens), []
        for prompt, answer in zip(prompts, answers):
            sound = prompt.sound if listens else prompt.sound[:0]
            corrections, sound = self.adapter(prompt.states.to(self.device), sound.to(self.device))
            ids = prompt.before + prompt.words + prompt.after + answer
            embeds = table(torch.tensor(ids, device=self.device))                 # (T - A, H)
            sizes = [len(prompt.before), len(prompt.words), len(prompt.after + answer)]
            before, words, after = embeds.split(sizes)
            words, sound = words + corrections.to(words.dtype), sound.to(words.dtype)
            rows.append(torch.cat([before, words, sound, after]))                 # (T, H)
        return rows

    def forward(self, prompts, answers):
        """Hidden states that predict the answers' tokens, (N, H) in row order; what DDP wraps. All
        that trains is always a part of the graph: DDP waits for it, used or not."""
        shared = len(os.path.commonprefix([prompt.before for prompt in prompts]))
        return answer_states(self.llm, self.embed(prompts, answers),
                             [len(answer) for answer in answers], shared)

    @torch.inference_mode()
    def generate(self, rows, max_new_tokens=128):
        """[{"audio": path or (S,) at 16 kHz} or {"prompt": text}, ...] -> answers, list of str.
        Rows may carry "system", "instruction", "language"."""
        spoken = [row for row in rows if row.get("audio") is not None]
        waveforms = [load_audio(row["audio"]) for row in spoken]
        heard = self.hear(waveforms, [row.get("language") for row in spoken])  # together
        known = dict(zip(map(id, spoken), heard))
        prompts = [self.prompt(row, known.get(id(row))) for row in rows]
        ids = generate(self.llm, self.embed(prompts, [[]] * len(prompts)),
                       max_new_tokens=max_new_tokens, eos_id=end_token(self.tokenizer))
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)


class HubStudent(nn.Module):
    """A speech LLM of transformers. Its own processor and forward make what its LLM reads; from
    there on it is a student as the other is."""

    def __init__(self, model, processor, tokenizer):
        super().__init__()
        self.model, self.processor, self.tokenizer = model, processor, tokenizer
        self.config, self.__dict__["llm"] = model.config, TextLLM(model)  # shares its weights
        self.audio_token = tokenizer.convert_ids_to_tokens(self.config.audio_token_id)
        self.silence = self.prompt({"audio": torch.zeros(SAMPLE_RATE)})

    def parts(self):
        """What can train, by name. Vision never does, nor the audio_bos_eos that nothing reads."""
        inner = dict(self.model.model.named_children())
        inside = dict(inner.get("audio_tower", inner.get("encoder")).named_children())
        inside.pop("audio_bos_eos_token", None)
        adapter = [part for name, part in inner.items() if "projector" in name]
        adapter = adapter or [inside.pop("proj")]  # Omni: the encoder ends in its adapter
        return {"encoder": list(inside.values()), "adapter": adapter, "llm": [self.llm]}

    def hear(self, waveforms, language=None):
        """These models hear at each step: nothing can be known before."""
        return [None] * len(waveforms)

    def prompt(self, row, heard=None):
        """A row of the manifest -> Prompt by the model's own template. An instruction follows the
        sound, as these models were trained."""
        if row.get("audio") is None:
            before, after = chat_parts(self.tokenizer, row.get("system"), row.get("instruction"))
            return Prompt(before + text_ids(self.tokenizer, row["prompt"]) + after, [], {}, [], [])
        mark, question = self.audio_token, row.get("instruction") or ""
        content = mark + question
        if mark in self.tokenizer.chat_template:  # else it knows text only
            content = [{"type": "audio"}, {"type": "text", "text": question}][:1 + bool(question)]
        before, after = chat_parts(self.tokenizer, row.get("system"), None, content, mark)
        count, inputs = self.inputs_of(load_audio(row["audio"]))
        return Prompt(before, [self.config.audio_token_id] * count, inputs, [], after)

    def inputs_of(self, audio):
        """Audio (S,) -> number of embeddings, {name: what the model makes these of}."""
        audio = F.pad(audio, (0, max(0, SAMPLE_RATE // 10 - len(audio))))
        kind, options = self.config.model_type, dict(sampling_rate=SAMPLE_RATE, return_tensors="pt")
        extractor = getattr(self.processor, "feature_extractor", self.processor)
        if kind in ("qwen2_audio", "qwen2_5_omni_thinker") and len(audio) > extractor.n_samples:
            raise ValueError(f"a clip of {len(audio) / SAMPLE_RATE:.0f} s, {kind} hears "
                             f"{extractor.n_samples / SAMPLE_RATE:.0f}; cut it")
        if kind == "voxtral":  # its processor takes files only
            mel = self.processor(audio.numpy(), padding=True, truncation=False,
                                 pad_to_multiple_of=30 * SAMPLE_RATE, **options).input_features
            mel = mel[0].unflatten(1, (-1, 3000)).transpose(0, 1)                 # (W, M, 3000)
            return 375 * len(mel), {"input_features": mel}
        if kind.endswith("thinker"):  # its processor wants torchvision
            frames = -(-len(audio) // self.processor.hop_length)
            audio = F.pad(audio, (0, self.processor.n_fft)).numpy()
            mel = self.processor(audio, padding="longest", **options).input_features[..., :frames]
            count = self.model.model.audio_tower._get_feat_extract_output_lengths(frames)[1]
            return count, {"input_features": mel,                                 # (1, M, F)
                           "feature_attention_mask": torch.ones(1, frames, dtype=torch.long)}
        inputs = dict(self.processor(text=self.audio_token, audio=[audio.numpy()], **options))
        del inputs["attention_mask"]
        return int((inputs.pop("input_ids") == self.config.audio_token_id).sum()), inputs

    def embed(self, prompts, answers):
        """B Prompts and B lists of answer tokens -> B (T_i, H), the LLM's inputs: the model's own
        forward, while its LLM gives back what it gets."""
        def give_back(inputs_embeds, **_):
            return outputs.BaseModelOutputWithPast(last_hidden_state=inputs_embeds)

        self.model.eval()  # what hears: no dropout, no statistics of a batch
        self.llm.train(self.training)
        rows, decoder = [], self.model.get_decoder()
        decoder.forward = give_back
        try:
            for prompt, answer in zip(prompts, answers):  # one by one: not all encoders know masks
                ids = torch.tensor([prompt.before + prompt.words + prompt.after + answer])
                inputs = BatchFeature({"input_ids": ids, "attention_mask": torch.ones_like(ids),
                                       **prompt.states})
                inputs.to(self.llm.device, self.model.dtype)  # floats alone get the dtype
                rows.append(self.model.model(**inputs, use_cache=False).last_hidden_state[0])
        finally:
            del decoder.forward  # the class's own is there again
        if torch.is_grad_enabled() and not any(prompt.words for prompt in prompts):
            # DDP and FSDP wait for all that trains: hear silence, which changes nothing
            rows[0] = rows[0] + 0 * self.embed([self.silence], [[]])[0].sum()
        return rows

    forward, generate = SpeechLLM.forward, SpeechLLM.generate

    def save_pretrained(self, folder, state_dict):
        """Beside the weights, all else of the folder that it came from, as its processor."""
        source = Path(self.model.name_or_path)
        folder.mkdir(parents=True)
        for path in source.iterdir():
            if any(map(path.match, BESIDE)) and path.name != "model.safetensors.index.json":
                shutil.copy(path, folder)
        self.model.save_pretrained(folder, state_dict=state_dict)


# ---- build, load, save ----

def build_student(name=DEFAULT_STUDENT):
    """WHISPER+LLM, by hub ids or folders -> SpeechLLM in fp32: the plain cascade, until trained."""
    whisper_name, _, llm_name = name.partition("+")
    whisper = load_whisper(whisper_name)
    llm, tokenizer = load_llm(llm_name)
    config = SpeechLLMConfig(whisper=whisper.config.to_dict(), llm=llm.config.to_dict())
    model = SpeechLLM(config, whisper, llm, tokenizer)
    filler = tokenizer(FILLER, add_special_tokens=False).input_ids[-1]
    with torch.no_grad():
        model.adapter.sound.bias.copy_(llm.get_input_embeddings()(torch.tensor([filler]))[0])
    return model.eval()


def load_student(name):
    """--student: WHISPER+LLM, a folder that save_student wrote, or a speech LLM of transformers
    -> SpeechLLM or HubStudent in fp32."""
    if "+" in name and not Path(name).exists():
        return build_student(name)
    folder = resolve(name)
    if PretrainedConfig.get_config_dict(folder)[0].get("model_type") == SpeechLLMConfig.model_type:
        return from_folder(SpeechLLM, folder, dtype=torch.float32).eval()
    model = load_multimodal(folder, torch.float32)
    if not hasattr(model, "model") or not hasattr(model.config, "audio_token_id"):
        raise RuntimeError(f"{name}: a model of type {model.config.model_type!r}, expected "
                           "WHISPER+LLM, a student of train_kd.py, or a speech LLM of transformers")
    plain = hasattr(model.model, "visual") or model.config.model_type == "voxtral"
    processor = from_folder(AutoFeatureExtractor if plain else AutoProcessor, folder)
    return HubStudent(model, processor, load_tokenizer(folder, name)).eval()


def save_student(model, folder, dtype=None, state=None):
    """Write a folder that AutoModel.from_pretrained(folder, trust_remote_code=True) loads anywhere:
    complete, or not there at all. state: all weights, where they are spread over GPUs."""
    folder = Path(folder)
    temporary, old = (folder.with_name(folder.name + end) for end in (".tmp", ".old"))
    shutil.rmtree(temporary, ignore_errors=True)
    weights = {}
    for name, value in merge_lora(model.state_dict() if state is None else state).items():
        exact = name.startswith(("adapter.", "whisper."))
        rounded = dtype and value.is_floating_point() and not exact
        weights[name.removeprefix("model.")] = value.to(dtype) if rounded else value
    for name in getattr(model, "model", model).all_tied_weights_keys:
        weights.pop(name, None)  # a cast copy is not seen to be tied
    model.save_pretrained(temporary, state_dict=weights)
    config = json.loads((temporary / "config.json").read_text())
    config["dtype"] = str(dtype or torch.float32).removeprefix("torch.")  # not the live model's
    (temporary / "config.json").write_text(json.dumps(config, indent=2))
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)
