"""Decoding by precision beside transformers and llama.cpp: the same random Qwen3 weights, taking turns.

    python benchmarks/decoding.py [--quick] [--cpu-time] [--json PATH] [--rounds N] [--llama-python PYTHON]

Asked: at batch 1, int8 weights 3.5 times and int4 weights 5 times as fast as transformers' bf16, aiming at llama.cpp.
The model has 91M parameters (12 layers, width 768, 6 heads of 128, feed-forward 2048, vocabulary 8192). A decode step
is the median of those of 128 tokens after a 64-token prompt; prefill reads 448 tokens and writes one. Contenders take
turns, so a machine that slows down slows them alike; ratios are taken within a round, and the median is reported.
On a machine that others use too, `--cpu-time` counts the seconds that one thread computes instead of those that pass.
`--llama-python` is an interpreter that has llama_cpp (with ggml built for this CPU); the `gguf` package here writes its
files.
"""

import argparse
import copy
import itertools
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import machine
import torch
import transformers
from transformers import LogitsProcessorList, Qwen3ForCausalLM
from transformers import Qwen3Config as HuggingFaceConfig

from dougong.adapt.quantize import Form, round_to_nearest, take
from dougong.generate import Engine, SamplingConfig
from dougong.interop.gguf_form import gguf_form
from dougong.interop.maps.qwen3 import MAP
from dougong.runtime.device import Runtime, usable_cores

PROMPT, LONG_PROMPT, ROWS = 64, 448, 16
FORMS = {"int8": Form(8), "int4": Form(4), "int8, int8 activations": Form(8, None, "int8")}
BITS = {"fp32": 32, "bf16": 16, "int8": 8.5, "int4": 4.5, "int8, int8 activations": 8, "f32": 32, "q8_0": 8.5,
        "q4_0": 4.5}
Call = Callable[[int, int, int], list[float]]
"""(rows, tokens of the prompt, tokens to write) -> seconds after which each token was there"""

LLAMA = '''
import json, sys, time
import llama_cpp as L
path, threads, now = sys.argv[1], int(sys.argv[2]), getattr(time, sys.argv[3])
quiet = L.llama_log_callback(lambda *a: None)
L.llama_log_set(quiet, None)
L.llama_backend_init()
model = L.llama_model_load_from_file(path.encode(), L.llama_model_default_params())
params = L.llama_context_default_params()
params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 16 * 512, 2048, 512, 16
params.n_threads = params.n_threads_batch = threads
context = L.llama_init_from_model(model, params)
memory = L.llama_get_memory(context)
batch = L.llama_batch_init(2048, 0, 1)
def decode(entries):
    batch.n_tokens = len(entries)
    for i, (token, place, row, wanted) in enumerate(entries):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, place, 1, wanted
        batch.seq_id[i][0] = row
    assert L.llama_decode(context, batch) == 0
    L.llama_get_logits_ith(context, len(entries) - 1)[0]
print("ready", flush=True)
for line in sys.stdin:
    rows, prompt, steps = json.loads(line)
    L.llama_memory_clear(memory, True)
    begin = now()
    for row in range(rows):
        decode([(7 + t * 13 % 8000, t, row, t == prompt - 1) for t in range(prompt)])
    times = [now() - begin]
    for step in range(steps - 1):
        decode([(11 + step, prompt + step, row, True) for row in range(rows)])
        times.append(now() - begin)
    print(json.dumps(times), flush=True)
'''


def build() -> tuple[Qwen3ForCausalLM, torch.nn.Module]:
    """transformers' model and ours with the same numbers."""
    torch.manual_seed(0)
    theirs = Qwen3ForCausalLM(HuggingFaceConfig(
        vocab_size=8192, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=6,
        num_key_value_heads=6, head_dim=128, max_position_embeddings=1024, tie_word_embeddings=True,
        initializer_range=0.05)).eval()
    config = MAP.config_from_hf(theirs.config.to_dict())
    ours = config.build()
    ours.load_state_dict(MAP.tensors_from_hf(config, theirs.state_dict()))
    return theirs, ours.eval()


class Clock:
    """Seconds since it was made, at each call; transformers calls it with the logits of each token."""

    name = "perf_counter"     # of the function of `time`

    def __init__(self) -> None:
        self.now = getattr(time, self.name)
        self.begin, self.times = self.now(), []

    def __call__(self, _ids: object = None, scores: object = None) -> object:
        self.times.append(self.now() - self.begin)
        return scores


def prompts(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 8192, (rows, length), generator=torch.Generator().manual_seed(1))


def by_transformers(model: Qwen3ForCausalLM) -> Call:
    def call(rows: int, prompt: int, steps: int) -> list[float]:
        tokens, clock = prompts(rows, prompt), Clock()
        with torch.inference_mode():
            model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=steps,
                           min_new_tokens=steps, pad_token_id=0, logits_processor=LogitsProcessorList([clock]))
        return clock.times
    return call


def by_engine(model: torch.nn.Module, dtype: torch.dtype) -> Call:
    engine = Engine(model, Runtime(dtype=dtype, threads=torch.get_num_threads()))

    def call(rows: int, prompt: int, steps: int) -> list[float]:
        tokens, clock = prompts(rows, prompt).tolist(), Clock()
        for _ in engine.start(tokens, SamplingConfig(temperature=0, max_tokens=steps)):
            clock()
        return clock.times
    return call


class ByLlama:
    """llama.cpp in a process of its own, so that its threads and its build are its own."""

    def __init__(self, python: str, file: Path, threads: int) -> None:
        self.process = subprocess.Popen([python, "-c", LLAMA, str(file), str(threads), Clock.name], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert self.process.stdout is not None and self.process.stdout.readline() == "ready\n", \
            f"{python} has no llama_cpp that opens {file}"

    def __call__(self, rows: int, prompt: int, steps: int) -> list[float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps([rows, prompt, steps]), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def write_gguf(path: Path, model: torch.nn.Module, quant: str) -> None:
    """A file without a vocabulary: token ids are all that is measured."""
    import gguf

    form = gguf_form(MAP, model.config)
    writer = gguf.GGUFWriter(str(path), form.architecture)
    for key, value in form.keys.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{form.architecture}.{key}", value)
    writer.add_tokenizer_model("no_vocab")
    for key, tensor in form.stored(model.state_dict()).items():
        kind = gguf.GGMLQuantizationType[quant.upper() if tensor.dim() > 1 else "F32"]
        writer.add_tensor(key, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def contenders(llama_python: str | None, folder: Path, threads: int) -> dict[str, Call]:
    theirs, ours = build()
    calls: dict[str, Call] = {"transformers bf16": by_transformers(copy.deepcopy(theirs).bfloat16()),
                              "transformers fp32": by_transformers(theirs)}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        calls[f"dougong {name}"] = by_engine(ours, dtype)
    for name, form in FORMS.items():
        rounded = copy.deepcopy(ours)
        take(rounded, round_to_nearest(rounded, bits=form.bits, group=form.group), form)
        calls[f"dougong {name}"] = by_engine(rounded, torch.float32)
    if llama_python is None:
        print("llama.cpp is left out: --llama-python names no interpreter that has llama_cpp.\n")
        return calls
    for quant in ("f32", "bf16", "q8_0", "q4_0"):
        write_gguf(folder / f"{quant}.gguf", ours, quant)
        calls[f"llama.cpp {quant}"] = ByLlama(llama_python, folder / f"{quant}.gguf", threads)
    return calls


def step(times: list[float]) -> float:
    """Seconds of a decode step."""
    return statistics.median(b - a for a, b in itertools.pairwise(times))


def read_bandwidth(mebibytes: int = 256, repeats: int = 7) -> float:
    """Bytes a second of a sum over memory that no cache holds; the best of the repeats."""
    block = torch.ones(mebibytes << 18)
    best = float("inf")
    for _ in range(repeats):
        clock = Clock()
        block.sum()
        clock()
        best = min(best, clock.times[0])
    return (mebibytes << 20) / best


def measure(calls: dict[str, Call], steps: int, steps_many: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of a decode step at batch 1 and 16, and of a prefill, of each contender in each round."""
    found: dict[str, dict[str, list[float]]] = {name: {"step": [], "step of 16": [], "prefill": []} for name in calls}
    for call in calls.values():
        call(1, LONG_PROMPT, 2)
    for number in range(rounds):
        for name, call in calls.items():
            found[name]["step"].append(step(call(1, PROMPT, steps)))
            found[name]["step of 16"].append(step(call(ROWS, PROMPT, steps_many)))
            found[name]["prefill"].append(call(1, LONG_PROMPT, 1)[0])
        print(f"round {number + 1} of {rounds}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="32 tokens instead of 128")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, and the seconds that it computes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--llama-python", help="an interpreter that has llama_cpp")
    options = parser.parse_args()
    if options.cpu_time:
        Clock.name, options.threads = "process_time", 1
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    facts = machine.header()
    steps, rounds = 32 if options.quick else 128, options.rounds
    with tempfile.TemporaryDirectory() as folder:
        calls = contenders(options.llama_python, Path(folder), options.threads)
        bandwidth = read_bandwidth()
        found = measure(calls, steps, steps // 4, rounds)
    parameters = sum(p.numel() for p in build()[1].parameters())
    base = found["transformers bf16"]
    print(f"\nreading memory: {bandwidth / 1e9:.1f} GB/s\n{'':32}{'ms/token':>10}{'GB/s':>7}{'of it':>7}"
          f"{'× bf16 of transformers':>24}{'16 rows: tokens/s':>19}{'prefill tokens/s':>18}")
    results = {}
    for name, times in found.items():
        median = statistics.median(times["step"])
        gain = sorted(b / t for b, t in zip(base["step"], times["step"]))
        read = parameters * BITS[name.partition(" ")[2]] / 8 / median
        results[name] = {
            "ms_per_token": machine.spread([1e3 * t for t in times["step"]]),
            "batch_16_tokens_per_s": machine.spread([ROWS / t for t in times["step of 16"]]),
            "prefill_tokens_per_s": machine.spread([LONG_PROMPT / t for t in times["prefill"]]),
            "weights_read_bytes_per_s": read, "fraction_of_bandwidth": read / bandwidth,
            "times_transformers_bf16": {"median": statistics.median(gain), "low": gain[0], "high": gain[-1]}}
        print(f"{name:32}{1e3 * median:10.2f}{read / 1e9:7.1f}{read / bandwidth:7.0%}"
              f"{statistics.median(gain):10.2f} ({gain[0]:.2f} to {gain[-1]:.2f})"
              f"{statistics.median(ROWS / t for t in times['step of 16']):17.0f}"
              f"{statistics.median(LONG_PROMPT / t for t in times['prefill']):18.0f}")
    machine.write(options.json, {
        "benchmark": "decoding", **facts, "transformers": transformers.__version__, "parameters": parameters,
        "read_bandwidth_bytes_per_s": bandwidth, "steps": steps, "rounds": rounds, "clock": Clock.name,
        "results": results,
        "asked": {"dougong int8 / transformers bf16": 3.5, "dougong int4 / transformers bf16": 5.0}})


if __name__ == "__main__":
    main()
