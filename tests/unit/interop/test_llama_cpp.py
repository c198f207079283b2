"""llama.cpp itself reads our GGUF files: the same tokens, the same logits, the same greedy text.

`make test-llamacpp` builds it. The yardstick is our model with the file's own weights in float64. llama.cpp computes
GELU from a table of float16 values and, where weights are in blocks, rounds activations to 8 bits too, so each type has
a bound of its own; the control shows that a wrong file is far outside of it.
"""

import pytest
import torch

from dougong.interop import gguf_form as form_module
from dougong.interop.export_hf import with_weights, without_special_tokens
from dougong.interop.gguf_file import dequantized, read_gguf
from dougong.interop.gguf_form import gguf_form
from dougong.interop.maps import MAPS
from dougong.interop.verify import UNUSUAL
from dougong.recipes.export import export_gguf
from dougong.recipes.open_run import open_run

pytestmark = pytest.mark.llamacpp
llama_cpp = pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")
pytest.importorskip("transformers")
import tiny_hf  # noqa: E402

PRE = {"gpt2": "gpt-2", "llama": "llama-bpe", "qwen3": "qwen2", "qwen3_moe": "qwen2"}
TEXTS = [tiny_hf.TEXT, "def add(a, b):\n    return a + b\n", "斗拱是中国古代建筑特有的构件。 The fox", *UNUSUAL]
ALLOWED = {"f32": 2e-5, "f16": 2e-3, "bf16": 2e-2, "q8_0": 3e-2, "q4_0": 6e-2}
"""of the largest logit"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    patch = pytest.MonkeyPatch()
    patch.setattr("dougong.recipes.import_model.usable_cores", lambda: 1)
    yield {kind: open_run(tiny_hf.write(folder / kind, kind, pre_tokenizer=PRE[kind])) for kind in PRE}
    patch.undo()


class Read:
    """An export as llama.cpp reads it, and our model with the weights of that file."""

    def __init__(self, opened, directory, quant, *, verify=True):
        kind = opened.recipe.model.kind
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

    def apart(self):
        """The largest difference of logits, as a share of the largest."""
        found = []
        with torch.no_grad():
            for row in self.rows():
                truth = self.model(torch.tensor([row]))[0]
                found.append(((self.logits(row) - truth).abs().max() / truth.abs().max()).item())
        return max(found)

    def greedy(self, row, count):
        tokens = list(row)
        with torch.no_grad():
            for _ in range(count):
                tokens.append(int(self.model(torch.tensor([tokens]))[0, -1].argmax()))
        return tokens[len(row):]


CASES = [(kind, quant) for kind in PRE for quant in ("f32", "q8_0", "q4_0")] + [("qwen3", "f16"), ("qwen3", "bf16")]


@pytest.mark.parametrize(("kind", "quant"), CASES)
def test_llama_cpp_computes_what_the_model_computes(runs, kind, quant, tmp_path):
    read = Read(runs[kind], tmp_path / "out", quant)
    apart = read.apart()
    print(f"{kind} {quant}: {apart:.1e}")
    assert apart <= ALLOWED[quant]


@pytest.mark.parametrize("kind", PRE)
def test_llama_cpp_cuts_text_into_the_same_tokens(runs, kind, tmp_path):
    read = Read(runs[kind], tmp_path / "out", "f32")
    for text in without_special_tokens(TEXTS, read.tokenizer):
        theirs = read.llama.tokenize(text.encode(), add_bos=True, special=False)
        assert theirs == [read.tokenizer.begin_id, *map(int, read.tokenizer.encode(text))], text
    assert read.llama.token_eos() == read.tokenizer.document_id


@pytest.mark.parametrize(("kind", "quant"), [case for case in CASES if case[1] in ("f32", "q8_0")])
def test_llama_cpp_writes_the_same_greedy_text(runs, kind, quant, tmp_path):
    read = Read(runs[kind], tmp_path / "out", quant)
    row = read.rows()[0][:12]
    ours = read.greedy(row, 12)
    theirs = []
    for token in read.llama.generate(row, temp=0.0, repeat_penalty=1.0):
        theirs.append(token)
        if len(theirs) == len(ours):
            break
    assert theirs == ours
    assert read.llama.detokenize(theirs) == read.llama.detokenize(ours)
    assert read.llama.detokenize(theirs).decode(errors="replace") == read.tokenizer.decode(ours)


def test_a_llama_without_the_permutation_is_far_outside_of_every_bound(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(form_module, "_interleaved", lambda tensor, _heads: tensor)
    monkeypatch.setattr(form_module, "_halves", lambda tensor, _heads: tensor)
    assert Read(runs["llama"], tmp_path / "out", "f32", verify=False).apart() > 3 * max(ALLOWED.values())
