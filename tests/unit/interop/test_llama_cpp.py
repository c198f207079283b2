"""llama.cpp itself reads our GGUF files: the same tokens, the same logits, the same greedy text.

`make test-llamacpp` builds it. The yardstick is our model with the file's own weights in float64. Where weights are of
another type than f32, llama.cpp rounds what they are multiplied with too (to float16, bfloat16, or blocks of 8 bits),
so it may stray as far as our model does when its products' inputs are rounded likewise, times a slack.
"""

import copy
import itertools

import pytest
import torch

from dougong.interop import gguf_form as form_module
from dougong.interop.export_hf import with_weights, without_special_tokens
from dougong.interop.gguf_file import dequantized, read_gguf
from dougong.interop.gguf_form import gguf_form
from dougong.interop.maps import MAPS
from dougong.interop.verify import UNUSUAL
from dougong.models.heads import TiedHead
from dougong.nn.linear import Linear
from dougong.nn.moe import Experts
from dougong.recipes.export import export_gguf
from dougong.recipes.open_run import open_run

pytestmark = pytest.mark.llamacpp
llama_cpp = pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")
pytest.importorskip("transformers")
import tiny_hf  # noqa: E402

PRE = {"gpt2": "gpt-2", "llama": "llama-bpe", "qwen3": "qwen2", "qwen3_moe": "qwen2"}
TEXTS = [tiny_hf.TEXT, "def add(a, b):\n    return a + b\n", "斗拱是中国古代建筑特有的构件。 The fox", *UNUSUAL]
SLACK = 3.0
FLOOR = {"gpt2": 1e-3}
"""share of the largest logit; llama.cpp looks GELU up in a table of float16 values. Elsewhere `ROUNDING`"""
ROUNDING = 5e-6


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    patch = pytest.MonkeyPatch()
    patch.setattr("dougong.recipes.open_run.usable_cores", lambda: 1)
    yield {kind: open_run(tiny_hf.write(folder / kind, kind, pre_tokenizer=PRE[kind])) for kind in PRE}
    patch.undo()


def rounding_inputs(model, quant):
    """A copy that rounds what enters its products, as llama.cpp does beside weights of this type."""
    other = copy.deepcopy(model)

    def rounded(_module, inputs):
        x = inputs[0]
        if quant == "f32":
            return None
        if not quant.startswith("q"):
            return (x.to({"f16": torch.float16, "bf16": torch.bfloat16}[quant]).to(x.dtype), *inputs[1:])
        blocks = x.unflatten(-1, (-1, 32))
        scale = (blocks.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
        return ((blocks / scale).round().mul(scale).flatten(-2), *inputs[1:])

    for name, module in other.named_modules():
        if isinstance(module, Linear | TiedHead | Experts) and "router" not in name:
            module.register_forward_pre_hook(rounded)
    return other


class Read:
    """An export as llama.cpp reads it, and our model with the weights of that file."""

    def __init__(self, opened, directory, quant, *, verify=True):
        self.kind, self.quant = kind, quant = opened.recipe.model.kind, quant
        export_gguf(opened, directory, quant=quant, verify=verify)
        path = next(directory.glob("*.gguf"))
        self.llama = llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, n_threads_batch=1, logits_all=True,
                                     type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, verbose=False)
        held = {name: dequantized(tensor) for name, tensor in read_gguf(path)[1].items()}
        form = gguf_form(MAPS[kind], opened.model.config)
        self.model = with_weights(opened.model, form.restored(held)).double()
        self.model.compute_dtype = torch.float64
        self.tokenizer = opened.tokenizer

    def rows(self):
        begin = self.tokenizer.begin_id
        ids = (self.tokenizer.encode(text) for text in without_special_tokens(TEXTS, self.tokenizer))
        return [[begin, *map(int, one)][:60] for one in ids]

    def logits(self, row):
        self.llama.reset()
        self.llama.eval(row)
        return torch.from_numpy(self.llama.scores[:len(row)].copy()).double()

    def apart(self, logits):
        """How far these logits are from our model's, as a share of the largest: at the worst token, but where tokens
        choose experts (a near tie may tip) at the median one."""
        found = []
        with torch.no_grad():
            for row in self.rows():
                truth = self.model(torch.tensor([row]))[0]
                found.append((logits(row) - truth).abs().amax(-1) / truth.abs().max())
        apart = torch.cat(found)
        return (apart.median() if self.kind == "qwen3_moe" else apart.max()).item()

    def allowed(self):
        own = self.apart(lambda row: rounding_inputs(self.model, self.quant)(torch.tensor([row]))[0].detach())
        return max(SLACK * own, FLOOR.get(self.kind, ROUNDING))

    def greedy(self, row, count):
        tokens = list(row)
        with torch.no_grad():
            for _ in range(count):
                tokens.append(int(self.model(torch.tensor([tokens]))[0, -1].argmax()))
        return tokens[len(row):]

    def continued(self, row, count):
        return list(itertools.islice(self.llama.generate(row, temp=0.0, repeat_penalty=1.0), count))


CASES = [(kind, quant) for kind in PRE for quant in ("f32", "q8_0", "q4_0")] + [("qwen3", "f16"), ("qwen3", "bf16")]


@pytest.mark.parametrize(("kind", "quant"), CASES)
def test_llama_cpp_computes_what_the_model_computes(runs, kind, quant, tmp_path):
    read = Read(runs[kind], tmp_path / "out", quant)
    apart, allowed = read.apart(read.logits), read.allowed()
    print(f"\n{kind} {quant}: {apart:.1e} of the largest logit, {allowed:.1e} allowed")
    assert apart <= allowed


@pytest.mark.parametrize("kind", PRE)
def test_llama_cpp_cuts_text_into_the_same_tokens(runs, kind, tmp_path):
    read = Read(runs[kind], tmp_path / "out", "f32")
    for text in without_special_tokens(TEXTS, read.tokenizer):
        theirs = read.llama.tokenize(text.encode(), add_bos=True, special=False)
        assert theirs == [read.tokenizer.begin_id, *map(int, read.tokenizer.encode(text))], text
    assert read.llama.token_eos() == read.tokenizer.document_id


@pytest.mark.parametrize("kind", PRE)
def test_llama_cpp_writes_the_same_greedy_text(runs, kind, tmp_path):
    read = Read(runs[kind], tmp_path / "out", "f32")
    row = read.rows()[0][:12]
    ours, theirs = read.greedy(row, 16), read.continued(row, 16)
    assert theirs == ours
    assert read.llama.detokenize(theirs).decode(errors="replace") == read.tokenizer.decode(ours)


@pytest.mark.parametrize("quant", ["q8_0", "q4_0"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
def test_of_a_quantised_file_llama_cpp_writes_what_is_as_good_as_likeliest(runs, kind, quant, tmp_path):
    """Near ties may fall otherwise, by no more than the logits may differ."""
    read = Read(runs[kind], tmp_path / "out", quant)
    row = read.rows()[0][:12]
    theirs = read.continued(row, 16)
    with torch.no_grad():
        logits = read.model(torch.tensor([row + theirs]))[0, len(row) - 1:-1]
    behind = logits.amax(-1) - logits.gather(1, torch.tensor(theirs)[:, None])[:, 0]
    assert (behind <= 2 * read.allowed() * logits.abs().max()).all()


def test_a_llama_without_the_permutation_is_far_outside_of_the_widest_bound(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(form_module, "_interleaved", lambda tensor, _heads: tensor)
    monkeypatch.setattr(form_module, "_halves", lambda tensor, _heads: tensor)
    read = Read(runs["llama"], tmp_path / "out", "q4_0", verify=False)
    assert read.apart(read.logits) > 3 * read.allowed()
