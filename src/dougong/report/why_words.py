"""What the explanation of a run says, in both languages."""

WHY_PHRASES: dict[str, tuple[str, str]] = {
    "nav_why": ("Why", "为何"),
    "why_title": ("Why it went as it did", "为何如此"),
    "why_slow_title": ("Where the time went", "时间花在哪里"),
    "why_spiked_title": ("What went wrong", "出了什么问题"),
    "why_ranks_title": ("Seconds a step, by process", "各进程每步秒数"),
    "why_outliers_title": ("Slow steps", "慢步"),
    "why_time": ("time", "时间"),
    "why_process": ("process", "进程"),
    "why_usual": ("times the median", "中位数的倍数"),
    "why_mostly": ("mostly", "主要花在"),
    "why_step": ("step", "步"),
    "why_batch": ("batch", "批次"),
    "why_happened": ("what happened", "发生了什么"),
    "why_whose": ("whose fault", "谁的问题"),
    "why_documents": ("documents", "文档"),
    "why_layer": ("grew first", "最先增大的层"),
    "phase_data": ("waiting for data", "等待数据"),
    "phase_wait": ("waiting for the other processes", "等待其他进程"),
    "phase_forward": ("forward", "前向"),
    "phase_backward": ("backward", "反向"),
    "phase_norm": ("joining losses and norms", "汇总损失与范数"),
    "phase_optimizer": ("optimizer", "优化器"),
    "phase_read": ("waiting for the device", "等待设备"),
    "phase_rerun": ("computing suspicious steps again", "重算可疑的步"),
    "phase_gc": ("garbage collection", "垃圾回收"),
    "phase_evaluation": ("evaluation", "评估"),
    "phase_sample": ("samples", "生成样例"),
    "phase_checkpoint": ("checkpoints", "检查点"),
    "phase_other": ("everything else", "其他"),
    "why_no_phases": (
        "This run's events hold no times by phase: it was made by an older version, or has not finished a step.",
        "该训练的事件没有分阶段计时：由旧版本产生，或尚未完成一步。",
    ),
    "why_nothing_slow": (
        "Nothing to explain: {share} of the time went into forward, backward and optimizer; a step takes {step}.",
        "无需解释：{share} 的时间用于前向、反向与优化器；每步 {step}。",
    ),
    "why_computing": (
        "{share} of the time went into forward, backward and optimizer; a step takes {step}.",
        "{share} 的时间用于前向、反向与优化器；每步 {step}。",
    ),
    "why_input_bound": (
        "Input-bound: {share} of the time was spent waiting for batches. Put the prepared data on a faster disk, or "
        "make steps larger (train.rows).",
        "受限于输入：{share} 的时间在等待批次。可把准备好的数据放到更快的磁盘，或加大每步（train.rows）。",
    ),
    "why_not_input_bound": (
        "Not input-bound: waiting for batches took {share}.",
        "不受限于输入：等待批次占 {share}。",
    ),
    "why_straggler": (
        "Process {rank} holds the others up: its own work takes {late} a step longer than theirs ({share} of a step), "
        "most of it {phase}; they wait {wait} a step.",
        "进程 {rank} 拖慢了其他进程：它自己的工作每步多用 {late}（一步的 {share}），主要是{phase}；"
        "其他进程每步等待 {wait}。",
    ),
    "why_even": (
        "No process holds the others up: their own work differs by less than 5 % of a step.",
        "没有进程拖慢其他进程：各自的工作相差不到一步的 5%。",
    ),
    "why_between": (
        "{phase} took {share} of the time. Do it less often ({setting}).",
        "{phase}占 {share} 的时间。可降低频率（{setting}）。",
    ),
    "why_mfu": (
        "The model's own arithmetic reached {mfu} of the measured peak (median).",
        "模型自身的运算达到实测峰值的 {mfu}（中位数）。",
    ),
    "why_slower": (
        "Steps became slower: {early} in the first quarter, {late} in the last.",
        "步变慢了：前四分之一为 {early}，后四分之一为 {late}。",
    ),
    "why_faster": (
        "Steps became faster: {early} in the first quarter, {late} in the last.",
        "步变快了：前四分之一为 {early}，后四分之一为 {late}。",
    ),
    "why_slow_steps": (
        "Steps of 3 times the median or more: {n}. Together they cost {time}.",
        "有 {n} 步耗时达到中位数的 3 倍以上，共多花 {time}。",
    ),
    "why_first_step": ("the first step: making ready", "第一步：做准备"),
    "why_nothing_wrong": (
        "Nothing to explain: no step was skipped, no loss or gradient leapt, no process hung.",
        "无需解释：没有跳过的步，损失与梯度没有突跳，没有进程挂起。",
    ),
    "why_skipped": (
        "Steps skipped: {n} of {steps}.",
        "{steps} 步中有 {n} 步被跳过。",
    ),
    "why_faults": (
        "Steps with a wrong result once and a good one when computed again: {n}. The machine{where} is suspect, "
        "the data are not. The good result was taken.",
        "有 {n} 步第一次结果有误、重算后正常：可疑的是机器{where}，而不是数据。已采用正常的结果。",
    ),
    "why_where": (" of process {ranks}", "（进程 {ranks}）"),
    "why_leaps": (
        "Steps whose loss or gradient norm leapt and that were taken: {n}. With train.spikes={{}} they are skipped.",
        "有 {n} 步的损失或梯度范数突跳，但仍被采用；设 train.spikes={{}} 会跳过它们。",
    ),
    "why_data": (
        "The same documents stand out in skipped steps: {documents}. Look at them first.",
        "被跳过的步中反复出现这些文档：{documents}。请先查看它们。",
    ),
    "why_rewind": (
        "Training went back from step {step} to {to}, and passed over batches {first} to {last}.",
        "训练从第 {step} 步退回第 {to} 步，并略过批次 {first} 至 {last}。",
    ),
    "why_hang": (
        "Process {rank} hung at step {step} while in phase “{phase}”; all processes were ended after {time}.",
        "进程 {rank} 在第 {step} 步的“{phase}”阶段挂起；{time} 后结束了所有进程。",
    ),
    "why_persistent": ("data or weights (came back)", "数据或权重（重算仍然如此）"),
    "why_transient": ("machine (did not come back)", "机器（重算后消失）"),
    "why_transient_rank": ("machine of process {ranks} (did not come back)", "进程 {ranks} 的机器（重算后消失）"),
    "why_unknown": ("not computed again", "未重算"),
    "why_taken": ("{reason}; taken", "{reason}；已采用"),
    "why_layer_is": ("{layer} at step {step}, {times} × its usual norm", "{layer}，第 {step} 步，为平时的 {times} 倍"),
    "why_layer_nan": ("{layer} at step {step}: no number", "{layer}，第 {step} 步：非数值"),
    "why_all_layers": ("all layers at once, at step {step}", "第 {step} 步，所有层同时"),
    "why_more": ("and {n} more", "另有 {n} 步"),
}
