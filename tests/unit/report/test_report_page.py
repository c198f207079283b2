"""The page as a whole: self-contained, safe, complete, whatever state the run is in."""

import base64
import hashlib
import html.parser
import json
import re
from pathlib import Path

import fake_runs
import pytest
from tiny_recipe import dougong

from dougong.core.errors import CheckpointError, ConfigError
from dougong.core.events import EventLog
from dougong.core.files import lock
from dougong.core.run import RunDirectory
from dougong.report import numbers, write_report
from dougong.report.baselines import baselines
from dougong.report.facts import read_facts
from dougong.report.page import parameters_of, time_parts

VOID = {"meta", "link", "br", "hr", "img", "input"}
LOADING = {"src", "srcset", "data", "poster", "action", "formaction", "background", "xlink:href", "href"}


class Page(html.parser.HTMLParser):
    """Elements with their attributes, text by element, and a check that every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.unbalanced, self.words, self.scripts = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("script", "style"):
            self.scripts.append([tag, dict(attrs), ""])

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            self.scripts[-1][2] += data
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words).replace("\u202f", " "))

    def named(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(*runs: RunDirectory, out: Path) -> tuple[Page, str]:
    text = write_report(list(runs), out).read_text(encoding="utf-8")
    return Page(text), text


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> RunDirectory:
    return fake_runs.finished(tmp_path_factory.mktemp("runs") / "first")


def test_returns_the_path_it_wrote(finished, tmp_path):
    out = tmp_path / "report.html"
    assert write_report([finished], out) == out
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_says_what_the_model_reached_in_plain_words_in_both_languages(finished, tmp_path):
    page, _ = page_of(finished, out=tmp_path / "r.html")
    assert (
        "The model needs 1.31 bits for each byte of unseen text; a byte 5-gram needs 1.95: 33 % fewer."
        in page.text
    )
    beside_xz = "The model needs 1.31 bits for each byte of unseen text; xz -9 per document needs 1.68: 22 % fewer."
    assert beside_xz in page.text
    assert "0.347 to 0.396, excludes 0" in page.text
    assert "每个字节的未见文本，模型需要 1.31 比特；字节 5 元语法需要 1.95 比特：少 33%。" in page.text


def test_holds_everything_the_report_promises(finished, tmp_path):
    page, _ = page_of(finished, out=tmp_path / "r.html")
    for words in (
        "AMD EPYC 9V74", "2.13.0+cpu", "780 GFLOP/s", "1.31 GiB", "2.71 Wh",
        "2 of 80 cores of a 400 W processor",
        "matrix products here: bf16 780 GFLOP/s", "stack.0.attention.q.weight", "2 064 384", "28.6 MB",
        "9.34 M",
        "Each document went to one split by a hash", "best fit", "looks like a secret", "keycert.pem",
        "library",
        "dougong train first", "dougong train first.yaml", "宇宙洪荒。日月盈昃", 
        "step 840 skipped: non-finite gradient",
        "resumed at step 600, attempt 2", "continuing from the newest valid checkpoint", "warmup: 0.05",
    ):  # fmt: skip
        assert words in page.text, words
    charts = {a["data-chart"] for a in page.named("figure") if "data-chart" in a}
    assert {"loss", "bits", "c-lr", "c-grad_norm", "c-tokens_per_s"} <= charts


def test_loads_nothing_and_allows_only_its_own_style_and_script(finished, tmp_path):
    page, text = page_of(finished, out=tmp_path / "r.html")
    for tag, attributes in page.elements:
        assert tag not in ("iframe", "object", "embed", "base", "form", "img")
        assert not {a for a in attributes if a.startswith("on") or a == "style"}
        for name in LOADING & set(attributes):
            assert attributes[name].startswith(("#", "data:image/svg+xml,")), (tag, name)
        assert tag != "script" or "src" not in attributes
    for kind, _, body in page.scripts:
        assert kind == "script" or not re.search(r"@import|url\(", body)
        assert "fetch(" not in body and "XMLHttpRequest" not in body and "import(" not in body
    meta = next(m for m in page.named("meta") if m.get("http-equiv") == "Content-Security-Policy")
    policy = dict(part.strip().split(" ", 1) for part in meta["content"].split(";"))
    assert policy["default-src"] == "'none'" and policy["img-src"] == "data:"
    for kind, attributes, body in page.scripts:
        if attributes.get("type") != "application/json":
            digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
            assert policy[f"{kind}-src"] == f"'sha256-{digest}'"
    urls = set(re.findall(r"https?://[^\"'\s<>]+", text))
    assert urls <= {"http://www.w3.org/2000/svg"}, urls  # the name of SVG, never loaded


PAYLOADS = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\"><svg onload=alert(1)>{{ 7*7 }}' -->]]>",
    "</pre></title></style><!-- <b>",
)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_text_from_runs_stays_text(payload, tmp_path):
    run = fake_runs.hostile(tmp_path / "run", payload)
    other = fake_runs.hostile(tmp_path / "other", payload + "2")
    plain = fake_runs.hostile(tmp_path / "plain", "harmless")
    harmless, _ = page_of(plain, out=tmp_path / "h.html")
    for runs, like in (
        ((run,), (plain,)),
        ((run, other), (plain, fake_runs.hostile(tmp_path / "p2", "harmless2"))),
    ):
        page, _ = page_of(*runs, out=tmp_path / "r.html")
        harmless, _ = page_of(*like, out=tmp_path / "h.html")
        assert [tag for tag, _ in page.elements] == [tag for tag, _ in harmless.elements]
        assert not page.unbalanced and not page.open
        assert payload in "".join(page.words)
        assert "49" not in "".join(page.words) or "49" in "".join(harmless.words)
        data = next(body for _, attributes, body in page.scripts if attributes.get("id") == "curves-data")
        assert "<" not in data and json.loads(data)["runs"]


@pytest.mark.parametrize("make", ["finished", "running", "gan", "digits", "begun"])
def test_every_kind_of_run_makes_a_balanced_page(make, tmp_path):
    page, text = page_of(getattr(fake_runs, make)(tmp_path / make), out=tmp_path / "r.html")
    assert not page.unbalanced and not page.open
    assert not re.search(r"\b(nan|NaN|None|Undefined|inf|undefined)\b", page.text)
    assert not re.search(r"[dxy]=\"[^\"]*nan", text)
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for reference in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(reference, ids[0]) in ids
        if attributes.get("href", "").startswith("#"):
            assert attributes["href"][1:] in ids
        if "data-copy" in attributes:
            assert attributes["data-copy"] in ids


def test_a_gan_has_its_own_curves_and_no_bits_per_byte(tmp_path):
    page, _ = page_of(fake_runs.gan(tmp_path / "gan"), out=tmp_path / "r.html")
    charts = {a["data-chart"] for a in page.named("figure") if "data-chart" in a}
    assert "bits" not in charts and "discriminator" in page.text and "generator" in page.text
    assert "bits per byte" not in page.text and "examples read" in page.text


def test_accuracy_takes_the_place_of_bits_and_an_interval_with_zero_is_called_chance(tmp_path):
    page, _ = page_of(fake_runs.digits(tmp_path / "digits"), out=tmp_path / "r.html")
    assert "The model is right in 98.9 % of unseen examples; linear SVM in 98.3 %." in page.text
    assert "−0.6 points to 1.7 points, includes 0: it may be chance" in page.text
    assert "stopped early" in page.text


def told(run: RunDirectory, *events: dict) -> RunDirectory:
    with open(run.events, "a", encoding="utf-8") as file:
        for event in events:
            file.write(json.dumps({"attempt": 1, "time": fake_runs.BEGAN, **event}) + "\n")
    return run


def test_parts_add_up_to_the_parameters_and_what_an_adapter_trains_stands_beside_them(finished, tmp_path):
    facts = read_facts(finished)
    rows = parameters_of(facts)
    assert rows[-1][1].en == numbers.exact(2_064_384).en and "matrices" not in [name.en for name, *_ in rows]
    assert sum(share for *_, share in rows[:-1]) == pytest.approx(1)
    adapter = told(fake_runs.begun(tmp_path / "a"), {"event": "model", "parameters": {
        "total": 1000, "matrices": 900, "by_part": {"stem": 400, "stack.mlp": 600}, "trained": 50}})
    page, _ = page_of(adapter, out=tmp_path / "r.html")
    assert "50 more numbers are trained beside these, which stay as they are: 5.0 % of the total." in page.text


def test_what_is_written_beside_training_counts_for_how_long_training_stood_still(tmp_path):
    run = told(fake_runs.begun(tmp_path / "run"),
               *({"event": "step", "step": n, "loss": 3.0, "elapsed_s": n * 10.0,
                  "phases": {"forward": 9.0, "checkpoint": 0.5, "sample": 0.25}} for n in (1, 2)),
               {"event": "checkpoint", "step": 2, "bytes": 100, "seconds": 500.0})
    parts = {name.en: share for name, _, share in time_parts(read_facts(run))}
    assert parts == pytest.approx({"training": 20 / 21.5, "samples": 0.5 / 21.5, "waiting for checkpoints": 1 / 21.5})


@pytest.mark.parametrize("bits, rival, interval, advantage", [
    (1.0, 1.001, [-0.002, 0.003], (-0.003, 0.002)),     # better by a hair, though the interval leans the other way
    (1.0, 0.9, [0.05, 0.15], (-0.15, -0.05)),
])
def test_an_interval_is_read_as_its_event_defines_it(bits, rival, interval, advantage, tmp_path):
    run = told(fake_runs.begun(tmp_path / "run"), {
        "event": "result", "split": "test", "bits_per_byte": bits,
        "baselines": [{"name": "5-gram", "bits_per_byte": rival, "difference": bits - rival, "interval": interval}]})
    found, = baselines(read_facts(run))
    assert found.advantage == pytest.approx(rival - bits) and found.interval == pytest.approx(advantage)


def test_baselines_beside_a_curve_name_the_split_they_were_measured_on(finished, tmp_path):
    page, _ = page_of(finished, out=tmp_path / "r.html")
    assert "byte 5-gram, test: 1.951" in page.text


def test_an_empty_directory_is_refused_and_a_bare_recipe_is_not(tmp_path):
    with pytest.raises(CheckpointError, match="is not a run"):
        write_report([RunDirectory(tmp_path)], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()
    with pytest.raises(ConfigError, match="at least one run"):
        write_report([], tmp_path / "r.html")
    (tmp_path / "recipe.yaml").write_text("name: [not closed")
    page, _ = page_of(RunDirectory(tmp_path), out=tmp_path / "r.html")
    assert "No step has been recorded yet." in page.text


def test_events_of_the_wrong_shape_do_not_break_the_page(tmp_path):
    run = fake_runs.begun(tmp_path / "run")
    odd = [
        {"event": "data", "facts": [1]},
        {"event": "data", "facts": {"split": 3, "sources": "x", "skipped": 2}},
        {"event": "model", "parameters": None, "groups": [None, 3]}, {"event": "derived", "values": None},
        {"event": "step", "step": None}, {"event": "step", "step": 1, "loss": None, "lr": "x"},
        {"event": "step", "step": 2, "loss": True}, {"event": "evaluation", "step": 2, "bits_per_byte": None},
        {"event": "sample", "step": 2}, {"event": "skip"}, {"event": "warning"}, {"event": "checkpoint"},
        {"event": "result", "bits_per_byte": 1.0, "baselines": [None, {"name": "a"}], "sources": [3, {}],
         "interval": [None, 1]}, {"event": "end"}, {"event": "new kind", "x": 1},
    ]  # fmt: skip
    with open(run.events, "a", encoding="utf-8") as file:
        for event in odd:
            file.write(json.dumps({"attempt": 1, "time": None, **event}) + "\n")
    page, _ = page_of(run, out=tmp_path / "r.html")
    assert not page.unbalanced and "The model needs 1.00 bits" in page.text


@pytest.mark.slow
def test_a_hundred_thousand_steps_stay_below_a_megabyte(tmp_path):
    run = fake_runs.begun(tmp_path / "long")
    line = (
        '{{"event":"step","time":1.0,"attempt":1,"step":{0},"loss":{1:.5f},"lr":0.001,"grad_norm":{2:.4f},'
        '"tokens":{3},"tokens_per_s":{4},"elapsed_s":{5:.2f}}}\n'
    )
    with open(run.events, "a", encoding="utf-8") as file:
        for step in range(1, 100_001):
            wobble = (step * 7919 % 1000) / 1000
            file.write(
                line.format(
                    step, 3 + 5 / step + wobble, wobble, step * 8192, 28_000 + 900 * wobble, step * 0.3
                )
            )
    page, text = page_of(run, out=tmp_path / "r.html")
    assert len(text.encode()) < 1_000_000
    data = json.loads(next(body for _, a, body in page.scripts if a.get("id") == "curves-data"))
    for chart in data["charts"].values():
        assert all(len(line["x"]) == len(line["y"]) <= 600 for line in chart["lines"])
    assert data["runs"][0]["step"][-1] == 100_000 and len(data["runs"][0]["step"]) <= 301


def test_several_runs_stand_side_by_side(finished, tmp_path):
    wide = fake_runs.finished(tmp_path / "wide", seed=5, bits=1.247, model__dim=256, optim__lr=0.009)
    page, _ = page_of(finished, wide, out=tmp_path / "r.html")
    assert "2 runs compared" in page.text and "−0.065" in page.text
    assert (
        "model.dim" in page.text
        and "optim.lr" in page.text
        and "tokenizer.vocab_size"
        not in page.text.split("Where the recipes differ")[1].split("What it reached")[0]
    )
    highlighted = [a for a in page.named("td") if a.get("class") == "differs"]
    assert len(highlighted) == 3  # seed, model.dim, optim.lr of the second run
    data = json.loads(next(body for _, a, body in page.scripts if a.get("id") == "curves-data"))
    assert {line["run"] for line in data["charts"]["loss"]["lines"]} == {0, 1}
    assert [run["name"] for run in data["runs"]] == ["first", "wide"]
    assert not page.unbalanced and "mean ± sd" not in page.text
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_runs_that_differ_in_seed_alone_show_their_spread(tmp_path):
    runs = [
        fake_runs.finished(tmp_path / f"s{s}", steps=300, seed=s, bits=b)
        for s, b in ((1, 1.30), (2, 1.31), (3, 1.35))
    ]
    for run in runs:  # a name is no difference
        text = run.recipe.read_text(encoding="utf-8").replace("name: first", f"name: {run.path.name}")
        run.recipe.write_text(text, encoding="utf-8")
    page, _ = page_of(*runs, out=tmp_path / "r.html")
    assert "mean ± sd" in page.text and "1.320 ± 0.026" in page.text
    assert "2.71 Wh ±" not in page.text  # the same in every run: rounding is no spread


def test_different_kinds_of_runs_can_share_a_page(finished, tmp_path):
    page, _ = page_of(
        finished, fake_runs.gan(tmp_path / "gan"), fake_runs.begun(tmp_path / "begun"), out=tmp_path / "r"
    )
    assert not page.unbalanced and "3 runs compared" in page.text


def test_every_word_has_both_languages_and_the_script_has_a_default(finished, tmp_path):
    page, text = page_of(finished, out=tmp_path / "r.html")
    english = [a for a in page.named("span") if a.get("class") == "en"]
    chinese = [a for a in page.named("span") if a.get("class") == "zh"]
    assert len(english) == len(chinese) > 100
    assert all(a["lang"] == "zh-Hans" for a in chinese)
    assert page.named("html")[0] == {"lang": "en", "data-lang": "en"}  # readable without the script
    assert "navigator.language" in text and "prefers-color-scheme: dark" in text and "@media print" in text


def test_facts_of_a_real_corpus_are_laid_out(tmp_path):
    from dougong.core.config import from_dict
    from dougong.data import TOKENIZERS
    from dougong.data.prepare import TextData, prepare

    for number in range(200):
        words = " ".join(str(number * k * k) for k in range(1, 60))
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{number}.txt").write_text(words, encoding="utf-8")
    (tmp_path / "texts" / "copy.txt").write_text(words, encoding="utf-8")
    (tmp_path / "texts" / "broken.txt").write_bytes(b"abc \xff\xfe def")
    data = from_dict(TextData, {"sources": [{"kind": "files", "path": str(tmp_path / "texts")}]})
    corpus = prepare(data, from_dict(TOKENIZERS["bytes"], {}), context=32, cache=tmp_path / "cache", seed=0)
    writer = fake_runs.Writer(tmp_path / "run", fake_runs.recipe())
    writer.event("data", facts=json.loads(json.dumps(corpus.facts)))
    page, _ = page_of(writer.finish(), out=tmp_path / "r.html")
    told = page.text.split("What it learned from")[1].split("What was built")[0]
    assert corpus.facts["split"]["sentence"] in told and "每篇文档按内容哈希归入一个划分" in told
    assert "documents cut" in told and "passes per epoch" in told and "broken.txt" in told
    train = corpus.facts["splits"]["train"]
    assert f"train训练集{train['documents']}" in told.replace(" ", "")
    assert "copy.txt = " in told or " = copy.txt" in told


def test_the_report_reads_what_the_event_log_writes(tmp_path):
    run = RunDirectory(tmp_path / "run")
    log = EventLog(run.events)
    log.write("start", step=0, command=["dougong", "train", "first"])
    log.write("step", step=1, loss=float("nan"), lr=0.1)
    log.write("step", step=2, loss=2.5, lr=0.1)
    facts = read_facts(run)
    assert facts.status == "running" and facts.series.last("loss") == 2.5  # fresh, and no lock says otherwise
    assert read_facts(run, now=2e10).status == "interrupted"
    with lock(run.lock, owner="a test"):
        assert read_facts(run, now=2e10).status == "running"
    assert read_facts(run).status == "interrupted"  # a lock file that nobody holds
    log.write("end", step=2, reason="failed")
    log.close()
    assert read_facts(run).status == "failed"


def test_a_journey_stands_for_its_last_run(tmp_path):
    fake_runs.digits(tmp_path / "trip" / "1-pretrain")
    fake_runs.digits(tmp_path / "trip" / "2-tune")
    stage = "{kind: train, recipe: digits_cnn}"
    (tmp_path / "trip" / "journey.yaml").write_text(f"name: trip\nstages:\n  pretrain: {stage}\n  tune: {stage}\n")
    told = dougong("report", tmp_path / "trip")
    assert told.code == 0, told.err
    assert (tmp_path / "trip" / "2-tune" / "report.html").is_file()
