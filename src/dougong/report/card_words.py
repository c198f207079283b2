"""What the compression card says, in English and simplified Chinese: names of what was made, and which to take."""

from collections.abc import Sequence
from typing import Any

from dougong.report import numbers
from dougong.report.numbers import NARROW, Text

Rows = Sequence[dict[str, Any]]
_CLOSE, _USABLE = 0.005, 0.03
"""share of bits per byte more: what nobody notices, and what is still worth taking"""
_FASTER, _ALIKE = 1.1, 1.05
"""times the speed that is worth naming; and what passes for equal size or speed"""

_PHRASES: dict[str, tuple[str, str]] = {
    "card": ("Compression card", "压缩卡片"),
    "variants": ("{count} variants", "{count} 个版本"),
    "scored": ("{documents} held-out documents, {size}", "{documents} 篇留出文档，共 {size}"),
    "smaller": ("smaller on disk", "磁盘体积缩小"),
    "costs": ("more bits per byte", "每字节比特数增加"),
    "faster": ("speed, one text at a time", "单条生成速度"),
    "agrees": ("same first choice", "首选词元一致"),
    "plot_title": ("Size, quality, speed", "体积、质量与速度"),
    "plot_lead": ("Down and left is better. The larger the dot, the faster it writes; the line joins what no other "
                  "variant beats in size and quality, and a ring marks what none beats in all three. Whiskers are "
                  "paired 95 % intervals.",
                  "越靠左下越好。圆点越大，生成越快；连线上的版本，没有别的版本能在体积与质量上同时胜过；"
                  "带环的，在三方面都没有别的版本能同时胜过。误差线为配对的 95% 区间。"),
    "axis_size": ("weights in memory", "权重占用内存"),
    "axis_costs": ("bits per byte, against the original", "每字节比特数，与原模型相比"),
    "bars_title": ("Side by side", "逐项对照"),
    "size": ("size on disk", "磁盘体积"), "quality": ("bits per byte", "每字节比特数"),
    "speed": ("tokens per second", "词元/秒"),
    "one": ("one text", "单条"), "many": ("16 texts", "16 条"),
    "close_title": ("How close it stays", "与原模型的接近程度"),
    "close_lead": ("Every token of {documents} documents, read by both. Divergence is what a code made for the variant "
                   "would waste on the original's text; the 99th percentile shows the tokens that suffer most. "
                   "Calibration, over the whole split, is how far confidence lies from being right.",
                   "{documents} 篇文档的每个词元都由两个模型各读一遍。散度为按该版本编码原模型文本所浪费的量；"
                   "第 99 百分位反映受影响最大的词元。校准误差（整个划分）为置信度与正确率之差。"),
    "variant": ("variant", "版本"),
    "parameters": ("parameters", "参数"), "bits_per_weight": ("bits a weight", "每权重比特"),
    "disk": ("on disk", "磁盘"), "memory": ("in memory", "内存"),
    "difference": ("against the original", "与原模型相比"),
    "kl_mean": ("mean KL, nats", "平均 KL（奈特）"), "kl_p99": ("99th percentile", "第 99 百分位"),
    "top1": ("same first choice", "首选一致"), "ece": ("calibration error", "校准误差"),
    "bandwidth": ("of memory bandwidth", "内存带宽占比"),
    "table_title": ("All figures", "全部数字"),
    "worst_title": ("Where it hurts most", "受损最大的文档"),
    "worst_lead": ("The documents whose bits per byte grew most. A mean can be fine while one kind of text is not.",
                   "每字节比特数增加最多的文档。平均值正常时，某一类文本仍可能受损。"),
    "document": ("document", "文档"), "before": ("original", "原模型"), "after": ("variant", "该版本"),
    "other_tokens": ("other tokens: not compared", "词元不同，无法比较"),
    "how_title": ("How it was measured", "测量方法"),
    "how_quality": ("Bits per byte: every token of all {documents} documents of the {split} split, scored once.",
                    "每字节比特数：{split} 划分全部 {documents} 篇文档的每个词元各计一次。"),
    "how_interval": ("Intervals: bootstrap over documents, in pairs with the original.",
                     "区间：对文档自助重采样，与原模型配对。"),
    "how_speed": ("Speed: prompts of 16 tokens, {written} tokens written greedily, all variants in turns; the median.",
                  "速度：提示词 16 个词元，贪心生成 {written} 词元，各版本轮流运行，取中位数。"),
    "how_bandwidth": ("Bandwidth: weights read for each token of one text, times tokens per second, of the {rate} that "
                      "copying memory reaches here. Above 100 % the weights fit the processor's caches.",
                      "带宽：单条生成时每词元读取的权重量乘以速度，占本机内存复制所达 {rate} 的比例；"
                      "超过 100% 表示权重可放入处理器缓存。"),
    "machine": ("Machine: {name}, {threads} threads.", "机器：{name}，{threads} 线程。"),
    "for_everyday": ("everyday use", "日常使用"),
    "for_small": ("little memory", "内存紧张"),
    "for_fast": ("one reader who waits", "单个用户等待回答"),
    "for_many": ("many requests at once", "大量并发"),
    "take": ("{name} for {uses} ({facts})", "{uses}时选 {name}（{facts}）"),
    "times_smaller": ("{times} smaller", "体积缩小 {times}"),
    "cost_said": ("{cost} bits per byte", "每字节比特数 {cost}"),
    "times_fast": ("{speed} as fast", "速度为 {speed}"),
    "keep": ("keep {name} to train on, and where every bit counts", "继续训练或不容任何损失时保留 {name}"),
    "none": ("no variant stays within {limit} of the original's bits per byte: keep {name}, or train a variant on",
             "没有版本的每字节比特数与原模型相差在 {limit} 以内：请保留 {name}，或对某一版本继续训练"),
}


def say(key: str, **values: object) -> Text:
    """The phrase `key` with its braces filled."""
    return Text(*_PHRASES[key]).filled(**values)


_KINDS = {"pruned": ("pruned", "剪枝"), "trimmed": ("vocabulary trimmed", "裁剪词表"), "whole": ("as trained", "原样")}


def made_by(row: dict[str, Any], original: dict[str, Any]) -> Text:
    """How a variant of the original came to be, in a few words."""
    what = row["what"]
    if what["kind"] == "integers":
        group_en = f"groups of {what['group']}" if what["group"] else "one scale a row"
        group_zh = f"每组 {what['group']} 列" if what["group"] else "每行一个缩放系数"
        rounded = ("", "") if what["activations"] == "float" else (", int8 activations", "，激活 int8")
        trained = (", trained for it", "，经量化感知训练") if what["trained_on"] else ("", "")
        return Text(f"int{what['bits']}, {what['method']}, {group_en}{rounded[0]}{trained[0]}",
                    f"int{what['bits']}，{what['method']}，{group_zh}{rounded[1]}{trained[1]}")
    if what["kind"] == "qat":
        return Text(f"trained for int{what['bits']}", f"针对 int{what['bits']} 训练")
    if what["kind"] == "whole" and what["trained_on"]:
        smaller = row["parameters"] < original["parameters"]
        return Text("made smaller, then trained on", "缩小后继续训练") if smaller else Text("trained on", "继续训练")
    return Text(*_KINDS[what["kind"]])


def times(value: float) -> Text:
    return Text(f"{value:.1f}{NARROW}×", f"{value:.1f} 倍")


def change(share: float) -> Text:
    """A relative change with its sign: +1.2 %."""
    text = numbers.percent(share, 2 if abs(share) < 0.1 else 0)
    return Text(f"+{text.en}", f"+{text.zh}") if share >= 0 else text


def advice(rows: Rows) -> Text:
    """One sentence: which to take for which use. The first row is the original."""
    original, picked = rows[0], picks(rows)
    if not picked:
        found = say("none", limit=numbers.percent(_USABLE), name=original["name"])
        return Text(_first_up(found.en) + ".", found.zh + "。")
    uses: dict[str, list[str]] = {}
    for use, row in picked.items():
        uses.setdefault(row["name"], []).append(use)
    parts = [_taken(next(row for row in rows if row["name"] == name), mine, original) for name, mine in uses.items()]
    parts[0] = Text("take " + parts[0].en, parts[0].zh)
    parts.append(say("keep", name=original["name"]))
    return Text(_first_up("; ".join(part.en for part in parts)) + ".", "；".join(part.zh for part in parts) + "。")


def _taken(row: dict[str, Any], uses: list[str], original: dict[str, Any]) -> Text:
    """One variant, what it is good for and what it gives."""
    facts = [say("times_smaller", times=times(original["disk_bytes"] / row["disk_bytes"])),
             say("cost_said", cost=change(row["relative"]))]
    batch = "16" if uses == ["many"] else "1"
    speed = row["tokens_per_s"][batch]["median"] / original["tokens_per_s"][batch]["median"]
    facts.append(say("times_fast", speed=times(speed)))
    words = [say(f"for_{use}") for use in uses]
    english = words[0].en if len(words) == 1 else f"{', '.join(w.en for w in words[:-1])} and {words[-1].en}"
    return say("take", name=row["name"], uses=Text(english, "、".join(w.zh for w in words)),
               facts=Text(", ".join(f.en for f in facts), "，".join(f.zh for f in facts)))


def _first_up(text: str) -> str:
    return text[0].upper() + text[1:]


def picks(rows: Rows) -> dict[str, dict[str, Any]]:
    """Use -> variant, for the uses that one is good for: the smallest that nobody tells apart, one that is smaller
    still and worth taking, the fastest for one and for many. Who is picked already is preferred to one nearly equal."""
    original, found = rows[0], dict[str, dict[str, Any]]()
    usable = [row for row in rows[1:] if row["relative"] <= _USABLE and row["disk_bytes"] < original["disk_bytes"]]
    close = [row for row in usable if row["relative"] <= _CLOSE]
    if close:
        least = min(row["disk_bytes"] for row in close)
        found["everyday"] = min((row for row in close if row["disk_bytes"] <= least * _ALIKE),
                                key=lambda row: row["relative"])
    if usable:
        least = min(row["disk_bytes"] for row in usable)
        smallest = min((row for row in usable if row["disk_bytes"] <= least * _ALIKE), key=lambda row: row["relative"])
        if "everyday" not in found or smallest["disk_bytes"] * _ALIKE < found["everyday"]["disk_bytes"]:
            found["small"] = smallest
    for use, batch in (("fast", "1"), ("many", "16")):
        if usable:
            speeds = [row["tokens_per_s"][batch]["median"] for row in usable]
            before = [row for row in found.values() if row["tokens_per_s"][batch]["median"] * _ALIKE >= max(speeds)]
            fastest = before[0] if before else usable[speeds.index(max(speeds))]
            if max(speeds) >= _FASTER * original["tokens_per_s"][batch]["median"]:
                found[use] = fastest
    return found
