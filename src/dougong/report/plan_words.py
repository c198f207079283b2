"""What the plan's page says, in English and simplified Chinese."""

from typing import Any

from dougong.report.numbers import Text

_PHRASES: dict[str, tuple[str, str]] = {
    "plan": ("Plan", "规划"),
    "on": ("{devices} × {name}", "{devices} × {name}"),
    "memory": ("memory of one process", "每个进程的内存"),
    "of_capacity": ("of {size}", "共 {size}"),
    "speed": ("speed", "速度"),
    "tokens_per_s": ("tokens per second", "词元/秒"),
    "time": ("training time", "训练时间"),
    "for_tokens": ("for {tokens} tokens", "共 {tokens} 词元"),
    "energy": ("energy", "能耗"),
    "without_cooling": ("devices and hosts, cooling not included", "设备与主机，不含制冷"),
    "cost": ("cost", "费用"),
    "at_price": ("at {price} for a device and hour; {energy}", "每设备每小时 {price}；{energy}"),
    "parameters": ("{count} parameters", "{count} 参数"),
    "flops": ("{count} FLOP a token", "每词元 {count} FLOP"),
    "batch": ("{rows} rows × {context} tokens a step, {steps} steps", "每步 {rows} 行 × {context} 词元，共 {steps} 步"),
    "memory_title": ("Memory, layout by layout", "各布局的内存"),
    "memory_lead": ("Each bar is one process at the worst moment of a step; the line is what the device has.",
                    "每条是一个进程在一步中占用最多的时刻；竖线是设备的容量。"),
    "layout_title": ("The layout, drawn", "布局图"),
    "layout_lead": ("Each square is a device, each row a host. One colour: the same part (of more than eight parts, "
                    "neighbouring ones).",
                    "每格是一个设备，每行是一台主机。同色者持有相同的部分（多于八份时为相邻的几份）。"),
    "some_hosts": ("{shown} of {all} hosts, evenly spread", "{all} 台主机中均匀取 {shown} 台"),
    "curve_title": ("Speed against memory", "速度与内存"),
    "curve_lead": ("Numbers are places in the ranking; the line joins layouts that none beats in both; crosses do "
                   "not fit.", "数字为名次；连线上的布局，没有别的布局能在两方面都胜过；叉号表示放不下。"),
    "axis_memory": ("GiB of one process", "每进程 GiB"),
    "axis_speed": ("tokens/s", "词元/秒"),
    "axis_capacity": ("{name} holds this", "{name} 的容量"),
    "ranking_title": ("Ranking", "排名"),
    "layout": ("layout", "布局"),
    "why": ("why", "理由"),
    "rows_at_once": ("rows at once", "一次行数"),
    "traffic_title": ("What is sent in a step", "一步中的通信"),
    "axis": ("axis", "轴"), "messages": ("messages", "消息数"), "bytes": ("bytes sent", "发送量"),
    "link": ("over", "经由"),
    "takes": ("takes", "用时"), "hidden": ("while computing", "与计算重叠"), "waited": ("waited for", "需等待"),
    "host": ("the host's links", "主机内"), "network": ("the network", "网络"),
    "how_title": ("How it was computed", "如何算出"),
    "efficiency": ("Efficiency {share} of the device's peak: {source}.", "效率为设备峰值的 {share}：{source}。"),
    "simulated": ("The divided model ran on fake tensors: {peak} at the peak (arithmetic: {arithmetic}).",
                  "切分后的模型已用假张量运行：峰值 {peak}（算术估计：{arithmetic}）。"),
    "assumed": ("Assumed", "假设"),
    "considered": ("{number} ways were tried.", "共比较 {number} 种方案。"),
    "fails": ("does not fit or work", "放不下或不可行"),
    "step_title": ("Where a step's time goes", "一步的时间去向"),
    "bubble": ("{share} of a step is the pipeline's bubble", "流水线气泡占 {share}"),
    "communication": ("{share} waits for messages", "{share} 在等待通信"),
    "recompute": ("{share} computes activations again", "{share} 用于重算激活"),
    "slower": ("{share} slower than the best", "比最好的慢 {share}"),
    "too_large": ("does not fit: {size} of {capacity}", "放不下：{size}，容量 {capacity}"),
    "one": ("everything fits one device", "一个设备即可"),
    "tensor": ("each product shared by {n} neighbours", "每个矩阵乘法由相邻的 {n} 个设备分担"),
    "context": ("rows cut into {n} stretches", "每行切成 {n} 段"),
    "pipeline": ("layers in {n} places", "各层分布于 {n} 处"),
    "shard": ("weights in {n} parts", "权重切成 {n} 份"),
    "replicate": ("{n} copies that only sum gradients", "{n} 份副本，只合计梯度"),
    "expert": ("experts in {n} places", "专家分布于 {n} 处"),
}

KINDS = {
    "weights": Text("weights", "权重"), "gradients": Text("gradients", "梯度"),
    "optimizer": Text("optimiser", "优化器"),
    "activations": Text("activations", "激活"), "logits": Text("logits", "logits"),
    "gathered": Text("gathered weights", "收集的权重"), "recomputed": Text("layer at work", "当前层"),
    "temporary": Text("temporary", "临时"), "inputs": Text("inputs", "输入"), "allowance": Text("allowance", "余量"),
}
PARTS = {
    "compute": Text("compute", "计算"), "recompute": Text("recompute", "重算"), "bubble": Text("bubble", "气泡"),
    "communication": Text("communication", "通信"), "optimizer": Text("optimiser", "优化器"),
}


def say(key: str, **values: object) -> Text:
    """The phrase `key` with its braces filled."""
    return filled(_PHRASES[key], **values)


def filled(phrase: tuple[str, str], **values: object) -> Text:
    """A phrase in both languages with its braces filled; of a `Text` each language takes its own."""
    en, zh = phrase
    return Text(en.format(**{k: v.en if isinstance(v, Text) else v for k, v in values.items()}),
                zh.format(**{k: v.zh if isinstance(v, Text) else v for k, v in values.items()}))


def axis_words(axis: str, size: int) -> Text:
    """What dividing along an axis means."""
    return say("one") if size == 1 else say(axis, n=f"{size:,}")


def reason(option: dict[str, Any], best: dict[str, Any]) -> Text:
    """Why an option works as it does or fails: the plan's sentence, said in both languages."""
    if option["refused"]:
        return Text.same(option["refused"])
    if not option["fits"]:
        return say("too_large", size=f"{option['memory_bytes'] / 2**30:,.1f} GiB",
                   capacity=f"{option['capacity_bytes'] / 2**30:,.1f} GiB")
    layout = option["layout"]
    axes = ("tensor", "context", "expert", "pipeline", "shard", "replicate")
    parts = [axis_words(axis, layout[axis]) for axis in axes
             if (layout[axis] or 1) > 1] or [say("one")]
    for kind in ("bubble", "communication", "recompute"):
        if (share := option["seconds"][kind] / option["step_seconds"]) > 0.02:
            parts.append(say(kind, share=f"{share:.0%}"))
    if option["tokens_per_s"] < 0.995 * best["tokens_per_s"]:
        parts.append(say("slower", share=f"{1 - option['tokens_per_s'] / best['tokens_per_s']:.0%}"))
    return Text("; ".join(p.en for p in parts), "；".join(p.zh for p in parts))
