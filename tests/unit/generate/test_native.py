"""One row in C against PyTorch in float64, and what happens where it cannot be compiled."""

import platform
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dougong.adapt.quantize import Form, round_to_nearest, take
from dougong.generate import Engine, SamplingConfig, native
from dougong.generate.cache import KVCache
from dougong.models.compose import DecoderConfig
from dougong.models.families.gpt2 import GPT2Config
from dougong.models.families.llama import LlamaConfig
from dougong.models.families.nano import NanoConfig
from dougong.models.families.qwen3 import Qwen3Config
from dougong.models.families.qwen3_moe import Qwen3MoEConfig
from dougong.nn.attention import AttentionConfig
from dougong.nn.embedding import Embedding
from dougong.nn.feed_forward import GELUConfig, ReLU2Config
from dougong.nn.linear import Linear
from dougong.nn.norm import RMSNorm
from dougong.nn.position import ALiBiConfig, NoPositionConfig, rope_table, rotate
from dougong.nn.quantized import Quantized, quantize
from dougong.nn.residual import X0ResidualConfig
from dougong.runtime.device import Runtime

needed = pytest.mark.skipif(native.library() is None, reason=native.reason())


def close(got: torch.Tensor, right: torch.Tensor, relative: float = 1e-5) -> None:
    """Finite, and within so much of the largest."""
    assert torch.isfinite(got).all()
    assert (got.double() - right.double()).abs().max() <= relative * right.double().abs().max()


def run(action: str, reads: list[torch.Tensor | None], writes: Any, *numbers: int, texts: int = 1, threads: int = 2,
        places: Sequence[native.Place] = (), **more: Any) -> Any:
    operations = (native.Operation * 1)(native.Operation.of(action, reads, writes, *numbers, **more))
    native.library().run(operations, 1, (native.Place * max(1, len(places)))(*places), texts, threads)
    return writes


def product(x_BI, matrix, scale, bias, form, group=32, threads=2) -> torch.Tensor:
    texts, inputs = x_BI.shape
    if form == 4:
        x_BI = run("sorted", [x_BI], torch.empty_like(x_BI), inputs, texts=texts)
    return run("product", [x_BI, matrix, scale, bias], torch.full((texts, len(matrix)), torch.nan), len(matrix), inputs,
               group, kind=native.KINDS[form], texts=texts, threads=threads)


@needed
@pytest.mark.parametrize("texts", [1, 2, 3, 7, 16, 32])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 64), (7, 192), (300, 256), (515, 1040)])
def test_products_of_floats(outputs, inputs, dtype, threads, texts):
    torch.manual_seed(0)
    matrix, bias, x_BI = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs), torch.randn(texts, inputs)
    right_BO = x_BI.double() @ matrix.double().t() + bias.double()
    close(product(x_BI, matrix, None, bias, dtype, threads=threads), right_BO)


@needed
@pytest.mark.parametrize("texts", [1, 2, 7])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("outputs", "inputs", "group"), [(1, 64, 32), (9, 96, 32), (130, 4352, 32), (66, 512, 128),
                                                          (12, 320, None)])
def test_products_of_integers(outputs, inputs, group, bits, texts):
    torch.manual_seed(0)
    part = Quantized(outputs, inputs, bits, group, "float")
    part.set(*quantize(torch.randn(outputs, inputs), bits, group))
    x_BI = torch.randn(texts, inputs)
    close(product(x_BI, part.values, part.scale, None, bits, group or inputs),
          x_BI.double() @ part.weight.double().t())


@needed
def test_nan_stays_nan():
    x = torch.randn(64)
    x[5] = torch.nan
    for dtype in (torch.float32, torch.bfloat16):
        for texts in (1, 5):
            x_BI = torch.stack([x] + [torch.randn(64)] * (texts - 1))
            y = product(x_BI, torch.randn(6, 64).to(dtype), None, None, dtype)
            assert y[0].isnan().all() and y[1:].isfinite().all()
    assert run("rms_norm", [x], torch.empty(64), 64, real=1e-6).isnan().all()
    assert run("layer_norm", [x], torch.empty(64), 64, real=1e-6).isnan().all()
    for name in ("gate", "gelu", "gelu_tanh", "relu2", "add"):
        y = run(name, [x, torch.ones(64)], torch.zeros(64), 64)
        assert y[5].isnan() and y.isnan().sum() == 1, name
    k, v = torch.randn(1, 9, 64), torch.randn(1, 9, 64)
    where, places = [torch.tensor([part.data_ptr()]) for part in (k, v)], [native.Place(0, 9, 9)]
    assert run("attend", [x, *where], torch.empty(64), 1, 1, 64, places=places).isnan().all()
    k[0, 3] = torch.nan
    assert run("attend", [torch.randn(64), *where], torch.empty(64), 1, 1, 64, places=places).isnan().all()


@needed
@pytest.mark.parametrize("learned", [True, False])
def test_norms_and_heads(learned):
    torch.manual_seed(0)
    x, (weight, bias) = torch.randn(192) * 3 + 1, torch.randn(2, 192)
    given = weight if learned else None
    close(run("rms_norm", [x, given], torch.empty(192), 192, real=1e-5),
          F.rms_norm(x.double(), (192,), None if given is None else given.double(), 1e-5))
    close(run("layer_norm", [x, given, bias if learned else None], torch.empty(192), 192, real=1e-5),
          F.layer_norm(x.double(), (192,), *((weight.double(), bias.double()) if learned else (None, None)), 1e-5))

    heads, (query, key) = torch.randn(2, 6 * 64), torch.randn(2, 64)
    cos, sin = rope_table(40, 64, 10_000.0, torch.device("cpu"), torch.float32)
    right_BMH = heads.double().view(2, 6, 64).clone()      # three of queries, one of keys, two of values
    right_BMH[:, :3] = F.rms_norm(right_BMH[:, :3], (64,), query.double() if learned else None, 1e-6)
    right_BMH[:, 3:4] = F.rms_norm(right_BMH[:, 3:4], (64,), key.double() if learned else None, 1e-6)
    right_BMH[:, :4] = rotate(right_BMH[None, :, :4], (cos[[39, 7]].double(), sin[[39, 7]].double()))[0]
    places = [native.Place(0, 0, 0, cos[at].data_ptr(), sin[at].data_ptr()) for at in (39, 7)]
    run("heads", [None, query if learned else None, key if learned else None], heads, 3, 1, 64, 1, 1, real=1e-6,
        texts=2, places=places)
    close(heads, right_BMH.flatten(1))


@needed
@pytest.mark.parametrize(("name", "function"), [
    ("gate", lambda x, y: F.silu(x) * y), ("gelu", lambda x, y: F.gelu(x)), ("relu2", lambda x, y: F.relu(x).square()),
    ("gelu_tanh", lambda x, y: F.gelu(x, approximate="tanh")), ("add", lambda x, y: x + y)])
def test_number_by_number(name, function):
    x, y = torch.cat([torch.linspace(-120, 120, 512), torch.linspace(-4, 4, 512)]), torch.randn(1024)
    close(run(name, [x, y], torch.empty(1024), 1024), function(x.double(), y.double()))
    close(run("mix", [x, y, torch.tensor([0.7]), torch.tensor([-2.0])], torch.empty(1024), 1024), 0.7 * x - 2.0 * y)


@needed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "K", "H", "S"), [(4, 4, 32, 1), (6, 2, 64, 37), (3, 1, 96, 200), (2, 2, 256, 64)])
@pytest.mark.parametrize(("window", "sloped"), [(0, False), (9, False), (0, True), (30, True)])
def test_attention_over_columns_of_a_store(N, K, H, S, window, sloped, dtype):
    torch.manual_seed(0)
    keys, values = (torch.full((2, K, S + 9, H), torch.nan).to(dtype) for _ in range(2))    # outside is not read
    begins, end = (4, 4 + S // 2), 4 + S      # two texts, aligned at the end
    for store in (keys, values):
        for text, begin in enumerate(begins):
            store[text, :, begin:end] = torch.randn(K, end - begin, H).to(dtype)
    q, new, slopes = torch.randn(2, N * H) * 3, torch.randn(2, 2 * K * H), torch.rand(N)
    where = [torch.tensor([store[text].data_ptr() for text in range(2)]) for store in (keys, values)]
    places, kind = [native.Place(begin, end, S + 9) for begin in begins], native.KINDS[dtype]
    run("append", [new, *where], None, K, H, places=places, kind=kind, texts=2)
    assert torch.equal(torch.stack([keys, values], 1)[:, :, :, end - 1], new.view(2, 2, K, H).to(dtype))
    got = run("attend", [q, *where, slopes if sloped else None], torch.empty(2, N * H), N, K, H, window, places=places,
              kind=kind, texts=2)
    for text, begin in enumerate(begins):
        seen = min(window or S, end - begin)
        k, v = (store[text, :, end - seen:end].double().repeat_interleave(N // K, 0) for store in (keys, values))
        scores = (k @ q[text].double().view(N, H, 1)).squeeze(-1) * H**-0.5
        if sloped:
            scores = scores - slopes.double()[:, None] * torch.arange(seen - 1, -1, -1)
        close(got[text], (scores.softmax(-1)[:, None] @ v).flatten())


def built(name: str) -> Any:
    model = CONFIGS[name].build().eval()
    model.initialise(1)
    for parameter in model.parameters():
        if not parameter.any():      # what begins at zero would hide what comes before it
            torch.nn.init.normal_(parameter, std=0.1)
    return model


CONFIGS = {
    "qwen3": Qwen3Config(vocab_size=61, context=64, dim=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=32),
    "llama": LlamaConfig(vocab_size=61, context=64, dim=96, num_layers=2, num_heads=3),
    "gpt2": GPT2Config(vocab_size=61, context=64, dim=64, num_layers=2, num_heads=2),
    "windows, alibi": DecoderConfig(vocab_size=61, context=64, dim=64, num_layers=4, window=7, window_pattern="SL",
                                    attention=AttentionConfig(num_heads=2, num_kv_heads=1), position=ALiBiConfig(),
                                    norm_placement="post", residual=X0ResidualConfig()),
    "value embeddings": DecoderConfig(vocab_size=61, context=64, dim=64, num_layers=2, value_embeddings="alternate",
                                      attention=AttentionConfig(num_heads=2), feed_forward=ReLU2Config(), soft_cap=9.0),
    "nano": NanoConfig(vocab_size=61, context=64, dim=64, num_layers=2, num_heads=2, position="rope_alibi",
                       norm="layer_norm", head_std=0.02, soft_cap=3.0),
    "no positions": DecoderConfig(vocab_size=61, context=64, dim=64, num_layers=2, position=NoPositionConfig(),
                                  attention=AttentionConfig(num_heads=2, bias=True, output_bias=True),
                                  feed_forward=GELUConfig(approximate="none")),
    "experts": Qwen3MoEConfig(vocab_size=61, context=64, dim=64, num_layers=2, num_heads=2, num_experts=4,
                              top_k=2, ffn_dim=32),
    "width of no use": LlamaConfig(vocab_size=61, context=64, dim=60, num_layers=2, num_heads=3),
}


def steps(engine: Engine, prompt: Engine | None = None, texts: int = 1) -> torch.Tensor:
    """Logits of 20 steps after prompts of five tokens and more, which another engine may have read."""
    cache = KVCache(start_B=torch.arange(texts - 1, -1, -1))
    tokens = torch.arange(texts * (4 + texts)).view(texts, -1) % 61
    (prompt or engine).read(tokens, cache)
    return torch.cat([engine.read((7 + 2 * t + torch.arange(texts)[:, None]) % 61, cache) for t in range(20)])


def without(model: Any) -> Engine:
    engine = Engine(model)
    engine.program = None
    return engine


@needed
@pytest.mark.parametrize("texts", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_an_engine_writes_the_same_with_and_without(name, texts):
    model = built(name)
    assert (Engine(model).program is None) == (name in ("value embeddings", "width of no use", "experts"))
    close(steps(Engine(model), texts=texts), steps(without(model), texts=texts))


@needed
@pytest.mark.parametrize("texts", [1, 5])
@pytest.mark.parametrize(("bits", "group"), [(8, 32), (4, 32), (8, None), (4, 64)])
def test_integers_are_read_where_they_are_stored(bits, group, texts):
    model = built("qwen3")
    take(model, round_to_nearest(model, bits=bits, group=group), Form(bits, group))
    exact = built("qwen3")
    for name, part in exact.named_modules():
        if isinstance(part, Linear | Embedding):
            part.weight.data = model.get_submodule(name).weight
    assert Engine(model).program is not None
    right = steps(without(exact), texts=texts)
    close(steps(Engine(model), without(exact), texts), right)      # prompts read alike: PyTorch's kernel rounds rows


def rounded_to_bf16() -> Any:
    model = built("qwen3")
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


@needed
@pytest.mark.parametrize("texts", [1, 5])
def test_weights_of_bf16_are_multiplied_in_float32(texts):
    """Of bf16 there are only the weights: the rest is as exact as in a float32 model that has those weights."""
    right, engine = without(rounded_to_bf16()), Engine(built("qwen3"), Runtime(dtype=torch.bfloat16))
    engine.program.most = 32      # also where the processor has products of bf16
    close(steps(engine, right, texts), steps(right, texts=texts))


def test_without_bf16_products_prompts_are_read_in_float32(monkeypatch):
    from dougong.generate import engine, fused
    tokens = torch.arange(12)[None]
    exact = Engine(rounded_to_bf16()).read(tokens, KVCache())
    for module in (engine, fused):
        monkeypatch.setattr(module, "multiplies_bf16", lambda: False)
    widened = Engine(built("qwen3"), Runtime(dtype=torch.bfloat16))
    assert {parameter.dtype for parameter in widened.model.parameters()} == {torch.bfloat16}
    close(widened.read(tokens, KVCache()), exact)


@needed
def test_a_processor_with_bf16_products_keeps_them_for_several_texts(monkeypatch):
    from dougong.generate import program
    assert Engine(built("qwen3"), Runtime(dtype=torch.float32)).program.most == program.MOST
    monkeypatch.setattr(program, "multiplies_bf16", lambda: True)
    assert Engine(built("qwen3"), Runtime(dtype=torch.float32)).program.most == program.MOST
    engine = Engine(built("qwen3"), Runtime(dtype=torch.bfloat16))
    assert engine.program.most == 1
    config = SamplingConfig(temperature=0, max_tokens=9)
    assert len(list(engine.start([[1, 2], [3]], config))) == 9


@needed
def test_a_model_too_large_to_be_kept_twice_is_left_to_pytorch(monkeypatch):
    from dougong.generate import program
    monkeypatch.setattr(program, "memory_bytes", lambda: 1000)
    assert Engine(built("qwen3")).program is None


@needed
def test_parts_of_ones_own_are_left_to_pytorch():
    class Mine(RMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = built("qwen3")
    model.norm = Mine(64)
    model.norm.weight.data.fill_(1.0)
    assert Engine(model).program is None
    model = built("qwen3")
    model.position.__class__ = type("Turned", (type(model.position),), {})
    assert Engine(model).program is None


@needed
def test_two_texts_that_take_turns_on_one_engine():
    engine, config = Engine(built("qwen3")), SamplingConfig(temperature=0, max_tokens=40)
    alone = [[step[0].id for step in engine.start([prompt], config)] for prompt in ([1, 2, 3], [5, 4])]
    turns = [engine.start([prompt], config) for prompt in ([1, 2, 3], [5, 4])]
    both = list(zip(*turns))
    assert [[a[0].id for a, _ in both], [b[0].id for _, b in both]] == alone


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing opened yet, an empty cache; afterwards as before."""
    def forget():
        native._open.cache_clear()
    monkeypatch.setenv("DOUGONG_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("DOUGONG_NATIVE", raising=False)
    forget()
    yield
    monkeypatch.undo()
    forget()


def compiler(path: Path, script: str) -> str:
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@needed
def test_what_computes_something_else_is_not_used(fresh, monkeypatch, tmp_path):
    wrong = compiler(tmp_path / "cc", f"""
        sed 's/part\\[r\\] += even \\* low_half/part[r] -= even * low_half/' {native._SOURCE} > {tmp_path}/wrong.c
        for argument; do shift; case $argument in *one_token.c) argument={tmp_path}/wrong.c;; esac
        set -- "$@" "$argument"; done
        exec cc "$@" """)
    monkeypatch.setenv("CC", wrong)
    assert native.library() is None
    assert "computes something else" in native.reason()


@needed
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names processors of x86-64")
@pytest.mark.parametrize(("processor", "lanes"), [("haswell", 8), ("x86-64", 4)])
def test_older_processors_get_shorter_vectors(fresh, monkeypatch, tmp_path, processor, lanes):
    if processor == "haswell" and not torch.cpu._is_avx2_supported():
        pytest.skip("no AVX2 here")
    monkeypatch.setenv("CC", compiler(tmp_path / "cc", f"""
        for argument; do shift; [ $argument = -march=native ] && argument=-march={processor}
        set -- "$@" "$argument"; done
        exec cc "$@" """))
    assert native.library() is not None, native.reason()
    assert native.library().lanes() == lanes
    model = built("qwen3")
    close(steps(Engine(model), texts=3), steps(without(model), texts=3))


@pytest.mark.parametrize(("cc", "said"), [("no-such-compiler", "no C compiler"), ("false", "failed (exit status 1)")])
def test_without_a_compiler_pytorch_computes(fresh, monkeypatch, cc, said):
    monkeypatch.setenv("CC", cc)
    assert native.library() is None and said in native.reason()
    model = built("qwen3")
    engine = Engine(model)
    assert engine.program is None and torch.isfinite(steps(engine)).all()


def test_it_can_be_left_out(fresh, monkeypatch):
    monkeypatch.setenv("DOUGONG_NATIVE", "0")
    assert native.library() is None and "DOUGONG_NATIVE=0" in native.reason()


@needed
def test_it_is_compiled_once(fresh, monkeypatch, tmp_path):
    counted = compiler(tmp_path / "cc", f'echo x >> {tmp_path}/calls\nexec cc "$@"')
    monkeypatch.setenv("CC", counted)
    assert native.library() is not None
    native._open.cache_clear()
    assert native.library() is not None
    assert (tmp_path / "calls").read_text() == "x\n"
    assert [path.suffix for path in (tmp_path / "cache" / "native").iterdir()] == [".so"]


@needed
def test_a_damaged_or_unwritable_cache(fresh, monkeypatch, tmp_path):
    assert native.library() is not None
    (file,) = (tmp_path / "cache" / "native").iterdir()
    file.unlink()
    file.write_bytes(b"not a library")
    native._open.cache_clear()
    assert native.library() is not None, native.reason()      # compiled anew
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("DOUGONG_CACHE", str(tmp_path / "a file"))
    native._open.cache_clear()
    assert native.library() is not None, native.reason()


@needed
def test_greedy_text_is_the_same_alone_and_beside_others():
    model = built("qwen3")
    engine, config = Engine(model), SamplingConfig(temperature=0, max_tokens=30)
    prompts = [[1, 2, 3], [9, 8, 7, 6], [5]]
    together: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for step in engine.start(prompts, config):
        for token in step:
            together[token.row].append(token.id)
    for row, prompt in enumerate(prompts):
        alone = [step[0].id for step in engine.start([prompt], config)]
        assert alone == together[row]
