// Every word of the page, in both languages.
const WORDS = {
  skip: ["Skip to the message box", "跳到输入框"], conversations: ["Conversations", "对话列表"],
  fresh: ["New conversation", "新对话"], local: ["Conversations stay in this browser.", "对话只保存在本浏览器中。"],
  model: ["Model", "模型"], mode: ["What the model does with your text", "模型如何处理你的文字"], chat: ["Chat", "对话"],
  go_on_text: ["Continue text", "续写"], language: ["中文", "English"], theme: ["Light or dark", "浅色或深色"],
  settings: ["Settings", "设置"], close: ["Close", "关闭"], talk: ["The conversation", "对话内容"],
  ask: ["Your message", "你的消息"], ask_chat: ["Say something…", "说点什么……"],
  ask_continue: ["Write a beginning; the model goes on…", "写一个开头，模型接着写……"],
  ask_more: ["Add words of your own, or just let it go on…", "加上你自己的话，或直接让它继续……"],
  send: ["Send", "发送"], go_on: ["Go on", "继续"], stop: ["Stop", "停止"], system: ["System prompt", "系统提示词"],
  stops: ["Stop at these texts (one per line)", "遇到这些文字即停（每行一个）"],
  inspect: ["Ask for token probabilities", "获取词元概率"], shade: ["Shade what the model found unlikely", "标出模型认为不太可能的词元"],
  reset: ["Back to the defaults", "恢复默认"], keys: ["Keyboard", "快捷键"],
  temperature: ["Temperature", "温度"], top_p: ["Top-p", "Top-p"], top_k: ["Top-k (0: off)", "Top-k（0 为关）"],
  min_p: ["Min-p", "Min-p"], max_tokens: ["New tokens at most", "最多新词元"],
  repetition_penalty: ["Repetition penalty", "重复惩罚"], seed: ["Seed (empty: a new one each time)", "种子（留空则每次不同）"],
  you: ["You", "你"], assistant: ["Model", "模型"], copy: ["Copy", "复制"], copied: ["Copied", "已复制"], edit: ["Edit", "编辑"],
  again: ["Write again", "重写"], remove: ["Delete", "删除"], save: ["Save and send", "保存并发送"],
  save_text: ["Save", "保存"], cancel: ["Cancel", "取消"], retry: ["Try again", "重试"],
  writing: ["Writing…", "正在写……"], waiting: ["Waiting for the first token…", "等待第一个词元……"], stopped: ["Stopped.", "已停止。"],
  done: ["{n} tokens · {s} tokens/s · first after {f} ms", "{n} 个词元 · 每秒 {s} 个 · 首个用时 {f} 毫秒"],
  room: ["{n} of {m} tokens of context", "上下文 {n} / {m} 词元"], one_token: ["{n} tokens", "{n} 个词元"],
  ended_length: ["ended at the limit", "达到上限"], probability: ["probability", "概率"], others: ["instead", "其他候选"],
  empty_title_chat: ["Talk to {m}", "与 {m} 对话"], empty_title_continue: ["Write with {m}", "与 {m} 一起写"],
  empty_chat: ["Ask it something. What it says is made up from its training data; check what matters.", "问它点什么。它的回答由训练数据推断而来，重要内容请核实。"],
  empty_continue: ["This is a base model: it continues texts, as it learned to. Write a beginning, or press Go on for a text of its own.", "这是一个基础模型：它按所学接着写文字。写一个开头，或直接点“继续”让它自己写。"],
  base_chat: ["This model was not trained on conversations; turns are spelled as “User:” and “Assistant:”, so expect rough replies.", "该模型没有用对话训练过；对话以 “User:” 和 “Assistant:” 的形式拼写，回答会比较粗糙。"],
  offline: ["The server does not answer. Is it still running?", "服务器没有响应。它还在运行吗？"],
  key_needed: ["The server asks for an API key: reload the page and enter it as the password.", "服务器需要 API 密钥：请刷新页面，把密钥作为密码输入。"],
  untitled: ["Untitled", "未命名"], hint: ["Arrow keys walk through the tokens", "方向键逐个查看词元"],
  k_send: ["send", "发送"], k_line: ["new line", "换行"], k_stop: ["stop", "停止"], k_new: ["new conversation", "新对话"],
  k_edit: ["edit the last message (box empty)", "编辑上一条（输入框为空时）"], k_walk: ["walk through a reply's tokens", "逐个查看回复的词元"],
  parameters: ["parameters", "参数"], step: ["step", "步"], special: ["special", "特殊"],
};

export const language = () => document.documentElement.dataset.lang === "zh" ? 1 : 0;

export function word(name, values = {}) {
  const text = WORDS[name][language()];
  return text.replace(/\{(\w)\}/g, (whole, key) => key in values ? values[key] : whole);
}

// Fills every element that names its word, as text or as its label for screen readers.
export function spell(root = document) {
  for (const element of root.querySelectorAll("[data-word]")) element.textContent = word(element.dataset.word);
  for (const element of root.querySelectorAll("[data-label]")) {
    element.setAttribute("aria-label", word(element.dataset.label));
    if (element.matches("button")) element.title = word(element.dataset.label);
  }
}
