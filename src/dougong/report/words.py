"""Every phrase of the page, in English and simplified Chinese. `say("key", name=value)` fills the braces."""

import re

from dougong.report.numbers import Text
from dougong.report.why_words import WHY_PHRASES

PHRASES: dict[str, tuple[str, str]] = {
    **WHY_PHRASES,
    # page and navigation
    "report": ("training report", "训练报告"),
    "compare_title": ("{n} runs compared", "{n} 次训练对比"),
    "skip_to": ("Skip to content", "跳到正文"),
    "theme": ("Light or dark", "明暗主题"),
    "made_by": (
        "Made by dougong {version}. This page holds everything it shows and loads nothing from anywhere.",
        "由 dougong {version} 生成。页面自带全部内容，不从任何地方加载数据。",
    ),
    "nav_result": ("Result", "结果"),
    "nav_curves": ("Curves", "曲线"),
    "nav_before_after": ("Before and after", "训练前后"),
    "nav_samples": ("Samples", "样例"),
    "nav_data": ("Data", "数据"),
    "nav_model": ("Model", "模型"),
    "nav_cost": ("Cost", "开销"),
    "nav_reproduce": ("Reproduce", "复现"),
    "nav_numbers": ("Numbers", "数字"),
    "nav_differences": ("Recipes", "配方"),
    "copy": ("Copy", "复制"),
    "copied": ("Copied", "已复制"),
    # status
    "status_done": ("done", "已完成"),
    "status_running": ("running", "进行中"),
    "status_interrupted": ("interrupted", "已中断"),
    "status_failed": ("failed", "失败"),
    "early_stop": ("stopped early: no further improvement", "提前停止：不再改进"),
    "at_step": ("step {step}", "第 {step} 步"),
    "at_step_of": ("step {step} of {total}", "第 {step} 步，共 {total} 步"),
    "seed_is": ("seed {seed}", "种子 {seed}"),
    "attempts_count": ("{n} attempts", "启动 {n} 次"),
    # before and after
    "before_after_title": ("Before and after", "训练前后"),
    "before_after_note": (
        "The model that this run began from ({start}) and the one it ended with, asked the same questions of the "
        "{split} split, which was never trained on. Both answer with the most likely token each time.",
        "本次训练的起点模型（{start}）与训练后的模型，回答{split}中同样的问题；这些问题从未用于训练。两者每一步都取概率最高的词元。",
    ),
    "before": ("before", "训练前"),
    "after": ("after", "训练后"),
    "reference": ("reference", "参考答案"),
    "reply_loss": ("loss of the reference (nats a token)", "参考答案的损失（奈特/词元）"),
    "reply_loss_difference": (
        "After less before: {difference} nats a token (95 % interval {low} to {high}, paired over {n} conversations).",
        "训练后减训练前：{difference} 奈特/词元（95% 区间 {low} 至 {high}，按 {n} 段对话配对）。",
    ),
    "answers_right": ("answers exactly right", "完全答对"),
    "no_words": ("(nothing)", "（无内容）"),
    # headline numbers
    "bits_per_byte": ("bits per byte", "每字节比特数"),
    "interval_on": ("95 % interval {low} to {high}, {split} split", "95% 区间 {low} 至 {high}，{split}"),
    "whole_split": ("whole {split} split", "整个{split}"),
    "during_training": (
        "best during training, step {step}, {split} split",
        "训练中最好，第 {step} 步，{split}",
    ),
    "fewer_bits": ("fewer bits than {name}", "比{name}省的比特"),
    "more_bits": ("more bits than {name}", "比{name}多用的比特"),
    "better_accuracy": ("accuracy above {name}", "准确率高于{name}"),
    "worse_accuracy": ("accuracy below {name}", "准确率低于{name}"),
    "paired_interval": (
        "paired 95 % interval {low} to {high} bits per byte",
        "配对 95% 区间 {low} 至 {high} 比特/字节",
    ),
    "paired_interval_plain": ("paired 95 % interval {low} to {high}", "配对 95% 区间 {low} 至 {high}"),
    "accuracy": ("accuracy", "准确率"),
    "loss_last": ("training loss at the end", "训练末期损失"),
    "evaluation_loss": ("evaluation loss", "评估损失"),
    "parameters": ("parameters", "参数"),
    "of_them_embedding": ("{n} of them embeddings", "其中嵌入 {n}"),
    "tokens_read": ("tokens read", "读过的词元"),
    "examples_read": ("examples read", "读过的样本"),
    "epochs": ("{n} times through the data", "遍历数据 {n} 遍"),
    "training_time": ("training time", "训练时间"),
    "throughput_short": ("tokens per second", "词元/秒"),
    "throughput_other": ("examples per second", "样本/秒"),
    "of_peak": ("{mfu} of the measured peak", "实测峰值的 {mfu}"),
    "on_device": ("{cores} × {processor}", "{cores} × {processor}"),
    "peak_memory": ("peak memory", "内存峰值"),
    "energy": ("energy, estimated", "能耗（估计）"),
    "steps": ("steps", "步数"),
    # result and baselines
    "result_title": ("What it reached", "达到的水平"),
    "no_result": (
        "No final evaluation yet: it is made when training ends.",
        "还没有最终评估：训练结束时进行。",
    ),
    "verdict_fewer": (
        "The model needs {model} bits for each byte of unseen text; {name} needs {base}: {share} fewer.",
        "每个字节的未见文本，模型需要 {model} 比特；{name}需要 {base} 比特：少 {share}。",
    ),
    "verdict_more": (
        "The model needs {model} bits for each byte of unseen text; {name} needs {base}: {share} more.",
        "每个字节的未见文本，模型需要 {model} 比特；{name}需要 {base} 比特：多 {share}。",
    ),
    "verdict_same": (
        "The model and {name} need the same {model} bits for each byte of unseen text.",
        "每个字节的未见文本，模型与{name}同样需要 {model} 比特。",
    ),
    "verdict_alone": (
        "The model needs {model} bits for each byte of unseen text.",
        "每个字节的未见文本，模型需要 {model} 比特。",
    ),
    "verdict_accuracy": (
        "The model is right in {model} of unseen examples; {name} in {base}.",
        "对未见样本，模型的正确率为 {model}；{name}为 {base}。",
    ),
    "verdict_accuracy_alone": (
        "The model is right in {model} of unseen examples.",
        "对未见样本，模型的正确率为 {model}。",
    ),
    "excludes_zero": (
        "The paired 95 % interval of the difference, {low} to {high}, excludes 0: "
        "chance alone would rarely give this.",
        "差值的配对 95% 区间为 {low} 至 {high}，不含 0：仅凭偶然很难如此。",
    ),
    "includes_zero": (
        "The paired 95 % interval of the difference, {low} to {high}, includes 0: it may be chance.",
        "差值的配对 95% 区间为 {low} 至 {high}，包含 0：可能只是偶然。",
    ),
    "bars_title": ("Bits per byte on unseen text; shorter is better", "未见文本的每字节比特数；越短越好"),
    "bars_title_accuracy": ("Accuracy on unseen examples; longer is better", "未见样本的准确率；越长越好"),
    "bars_note_model": ("Whisker of the model: its 95 % interval.", "模型的误差线：其 95% 区间。"),
    "bars_note_baseline": (
        "Whisker of a baseline: the model's value plus the 95 % interval of the paired difference.",
        "基线的误差线：模型值加上配对差值的 95% 区间。",
    ),
    "this_model": ("this model", "本模型"),
    "baseline": ("compared with", "比较对象"),
    "difference": ("difference", "差值"),
    "interval": ("95 % interval", "95% 区间"),
    "value": ("value", "数值"),
    "by_source": ("By source", "按来源"),
    "measured_how": (
        "Measured with context {context} and stride {stride}, {weights} weights.",
        "测量时上下文 {context}，步幅 {stride}，{weights}权重。",
    ),
    "calibration_title": ("Does it know what it does not know?", "它知道自己不知道什么吗？"),
    "calibration_note": (
        "The likeliest token of every place, sorted by how sure the model was of it: sure of {confidence} on average, "
        "right {accuracy} of the time. Calibration error {error} (0 is best), Brier score {brier} (0 to 2, 0 is best).",
        "把每个位置上最可能的词元按模型的把握分组：平均把握 {confidence}，实际正确率 {accuracy}。"
        "校准误差 {error}（0 最好），Brier 分数 {brier}（0 到 2，0 最好）。",
    ),
    "confidence": ("sure of", "把握"),
    "was_right": ("was right", "正确率"),
    "raw": ("raw", "原始"),
    "ema": ("averaged", "滑动平均"),
    # curves
    "curves_title": ("How it learned", "学习过程"),
    "x_axis": ("Over", "横轴"),
    "x_step": ("steps", "步数"),
    "x_tokens": ("tokens", "词元"),
    "x_examples": ("examples", "样本"),
    "x_minutes": ("minutes", "分钟"),
    "x_linear": ("linear", "线性"),
    "x_log": ("log", "对数"),
    "scale": ("Scale", "刻度"),
    "no_steps": ("No step has been recorded yet.", "还没有记录任何训练步。"),
    "curve_loss": ("Loss", "损失"),
    "curve_bits": ("Bits per byte", "每字节比特数"),
    "curve_lr": ("Learning rate", "学习率"),
    "curve_grad_norm": ("Gradient norm", "梯度范数"),
    "curve_tokens_per_s": ("Throughput", "吞吐量"),
    "unit_nats": ("nats", "奈特"),
    "unit_bits": ("bits / byte", "比特/字节"),
    "unit_before_clip": ("before clipping", "裁剪前"),
    "unit_per_s": ("tokens / s", "词元/秒"),
    "unit_examples_per_s": ("examples / s", "样本/秒"),
    "line_raw": ("each step", "每步"),
    "line_smooth": ("weighted mean of {n}", "{n} 个点的加权平均"),
    "line_baseline": ("{name}, {split}: {value}", "{name}（{split}）{value}"),
    "line_value": ("value", "数值"),
    "line_eval": ("{split}", "{split}"),
    "line_eval_ema": ("{split}, averaged weights", "{split}，平均权重"),
    "mark_skip": ("step {step} skipped: {reason}", "第 {step} 步被跳过：{reason}"),
    "mark_resume": ("resumed at step {step}, attempt {attempt}", "第 {step} 步续训，第 {attempt} 次启动"),
    "legend_skip": ("step skipped", "跳过的步"),
    "legend_resume": ("resumed", "续训"),
    "outside": ("Points beyond the frame: {n}.", "超出图框的点：{n} 个。"),
    "starts_above": (
        "The first steps lie above the frame; the log scale shows them.",
        "最初几步高于图框；对数刻度可见。",
    ),
    "curves_table": ("The numbers behind the curves", "曲线背后的数字"),
    # samples
    "samples_title": ("What it wrote", "它写的文字"),
    "samples_note": (
        "The same prompts at different moments of training. The prompt is grey, the model's words are dark.",
        "同样的提示词，训练的不同时刻。灰色是提示词，深色是模型所写。",
    ),
    "samples_some": ("{shown} of {total} moments shown.", "共 {total} 个时刻，显示 {shown} 个。"),
    "no_samples": ("This run wrote no samples.", "本次训练没有写样例。"),
    "no_prompt": ("without a prompt", "无提示词"),
    "nothing_written": ("(nothing)", "（空）"),
    "prompts_left": ("{n} more prompts are in events.jsonl.", "另有 {n} 个提示词，见 events.jsonl。"),
    # data
    "data_title": ("What it learned from", "学习的数据"),
    "no_data": ("Nothing about the data has been recorded yet.", "还没有记录数据信息。"),
    "documents": ("documents", "文档"),
    "bytes": ("bytes", "字节数"),
    "size": ("size", "大小"),
    "tokens": ("tokens", "词元"),
    "bytes_per_token": ("bytes per token", "字节/词元"),
    "examples": ("examples", "样本"),
    "duplicates": ("Duplicates removed", "去除的重复"),
    "not_searched": ("not searched for", "未查找"),
    "rows": ("rows", "行"),
    "documents_cut": ("documents cut", "被切断的文档"),
    "padding_share": ("padding", "填充"),
    "weight": ("weight", "权重"),
    "passes_per_epoch": ("passes per epoch", "每轮遍数"),
    "exact": ("exact", "完全相同"),
    "near": ("near", "近似"),
    "skipped_files": ("Left out", "未采用"),
    "reason": ("reason", "原因"),
    "number": ("number", "数量"),
    "split": ("split", "划分"),
    "source": ("source", "来源"),
    "share": ("share", "占比"),
    "splits_title": ("Split", "划分"),
    "packing_title": ("Packing", "打包"),
    "sources_title": ("Sources", "来源"),
    "rule_hash": (
        "Each document went to one split by a hash of its content, so none is on two sides.",
        "每篇文档按内容哈希归入一个划分，任何文档都不会同时出现在两边。",
    ),
    "rule_tail": (
        "The end of the text was held out as one piece, with a gap of one context before it.",
        "文本末尾整段留出，并与训练部分隔开一个上下文的距离。",
    ),
    "other_facts": ("Further facts", "其他信息"),
    "train": ("train", "训练集"),
    "validation": ("validation", "验证集"),
    "test": ("test", "测试集"),
    # model
    "model_title": ("What was built", "构建的模型"),
    "parameters_by_part": ("Parameters", "参数"),
    "part": ("part", "部分"),
    "total": ("total", "合计"),
    "trained": (
        "{n} more numbers are trained beside these, which stay as they are: {share} of the total.",
        "上述参数保持不变，另有 {n} 个数参与训练，为总数的 {share}。",
    ),
    "flops_per_token": (
        "{n} FLOPs for each training token, forward and backward.",
        "每个训练词元前向加反向共 {n} 次浮点运算。",
    ),
    "derived_title": ("Numbers that were derived, and why", "推导出的数字及其理由"),
    "key": ("key", "键"),
    "why": ("why", "理由"),
    "groups_title": ("Parameter groups of the optimizer", "优化器的参数组"),
    "optimizer": ("optimizer", "优化器"),
    "names": ("parameters in it", "所含参数"),
    "lr": ("rate", "学习率"),
    "weight_decay": ("weight decay", "权重衰减"),
    "and_more": ("and {n} more", "另有 {n} 个"),
    "no_model": ("Nothing about the model has been recorded yet.", "还没有记录模型信息。"),
    # cost
    "cost_title": ("What it took", "付出的代价"),
    "time_title": ("Time", "时间"),
    "time_training": ("training", "训练"),
    "time_evaluation": ("evaluation", "评估"),
    "time_samples": ("samples", "样例"),
    "time_checkpoints": ("waiting for checkpoints", "等待检查点"),
    "energy_title": ("Energy", "能耗"),
    "energy_is": ("About {energy}. An estimate, not a measurement.", "约 {energy}。这是估计，不是测量。"),
    "energy_assumption": ("Basis: {text}", "依据：{text}"),
    "no_energy": ("No estimate was recorded.", "没有记录估计。"),
    "machine_title": ("Machine and versions", "机器与版本"),
    "processor": ("processor", "处理器"),
    "cores": ("cores", "核数"),
    "memory_bytes": ("memory", "内存"),
    "system": ("system", "系统"),
    "device": ("device", "设备"),
    "precision": ("precision", "精度"),
    "threads": ("threads", "线程"),
    "compile": ("compiled", "编译"),
    "yes": ("yes", "是"),
    "no": ("no", "否"),
    "peak_flops_per_s": ("measured matrix peak", "实测矩阵峰值"),
    "model_flops": ("reached in training", "训练中达到"),
    "attempts_title": ("Attempts", "启动记录"),
    "attempt": ("attempt", "次"),
    "began": ("began", "开始"),
    "from_step": ("from step", "起始步"),
    "to_step": ("to step", "到达步"),
    "ended": ("ended", "结束方式"),
    "end_done": ("done", "完成"),
    "end_interrupted": ("interrupted", "中断"),
    "end_early stop": ("stopped early", "提前停止"),
    "end_failed": ("failed", "失败"),
    "end_silent": ("no word (killed)", "无记录（被终止）"),
    "end_running": ("still running", "仍在进行"),
    "checkpoints_title": ("Checkpoints", "检查点"),
    "checkpoints_are": (
        "{n} written, the newest at step {step}, {size} each.",
        "共写 {n} 个，最新在第 {step} 步，每个 {size}。",
    ),
    "warnings_title": ("Warnings", "警告"),
    "skips_title": ("Skipped steps", "跳过的步"),
    "skips_are": (
        "Steps that moved no weight, each for its reason: {n}.",
        "没有更新权重的步数（各有原因）：{n}。",
    ),
    # reproduce
    "reproduce_title": ("Make it again", "再做一遍"),
    "reproduce_command": ("The command that made this run", "产生本次训练的命令"),
    "reproduce_recipe": (
        "Or from the resolved recipe below, saved as {file}, with every derived number fixed",
        "或把下面的完整配方存为 {file}，其中所有推导值都已固定",
    ),
    "reproduce_resumed": ("Continued with", "续训命令"),
    "reproduce_seed": (
        "Seed {seed}, precision {precision}, {threads} threads. With the same data, processor "
        "type, versions and threads the numbers should come out the same.",
        "种子 {seed}，精度 {precision}，{threads} 线程。数据、处理器类型、版本与线程数相同时，数字应当相同。",
    ),
    "recipe_title": ("The whole recipe", "完整配方"),
    "no_command": ("The command was not recorded.", "没有记录命令。"),
    # compare
    "numbers_title": ("Side by side", "并排对照"),
    "numbers_note": ("Differences are against {name}.", "差值以 {name} 为准。"),
    "seeds_note": (
        "These runs differ in their seed alone: mean ± standard deviation over {n} runs.",
        "这些训练只有种子不同：{n} 次的均值 ± 标准差。",
    ),
    "mean_spread": ("mean ± sd", "均值 ± 标准差"),
    "differences_title": ("Where the recipes differ", "配方的不同之处"),
    "no_differences": ("The recipes are the same.", "配方完全相同。"),
    "absent": ("absent", "无"),
    "samples_compare": ("The last sample of each run", "各次训练最后的样例"),
    "details_of": ("Details of {name}", "{name} 的详情"),
}


_NO_SPACE = re.compile(r"(?<=[；：，。]) | (?=[；：，。])|(?<=[\u4e00-\u9fff]) (?=[\u4e00-\u9fff])")
"""Chinese sets a space beside letters and digits only"""


def say(key: str, **values: object) -> Text:
    """The phrase `key` with its braces filled."""
    filled = Text(*PHRASES[key]).filled(**values)
    return Text(filled.en, _NO_SPACE.sub("", filled.zh).strip())


_NAMES = frozenset((
    "train", "validation", "test", "raw", "ema", "total",
    "accuracy", "exact", "near", "documents", "bytes", "tokens", "examples", "rows", "documents_cut",
    "padding_share", "weight", "passes_per_epoch", "share", "bytes_per_token", "lr", "loss",
    "processor", "cores", "memory_bytes", "system", "device", "precision", "threads", "compile",
))  # fmt: skip


def word(name: object) -> Text:
    """A name that a run gave, in both languages where it is one of the field's (validation, embedding, …)."""
    text = str(name)
    return say(text) if text in _NAMES else Text.same(text)


_RIVALS = {"random forest": "随机森林", "linear SVM": "线性 SVM ", "xz -9 per document": " xz -9（逐篇）"}


def baseline_name(name: object) -> Text:
    """How a sentence speaks of a baseline: "a byte 5-gram", "xz -9 per document"."""
    text = str(name)
    number, gram, rest = text.partition("gram")
    digits = number.removeprefix("byte ").rstrip("- ")
    if gram and digits.isdigit():
        unit = "字节 " if number.startswith("byte ") else ""
        return Text(f"a {text}", f" {unit}{digits} 元语法{rest}")
    return Text(text, _RIVALS.get(text, f" {text} "))
