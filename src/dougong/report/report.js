// The page works without this script. With it: language and theme, axes, read-outs, copying.
"use strict";
(() => {
  const root = document.documentElement;
  const remembered = (key) => { try { return localStorage.getItem("dougong." + key); } catch { return null; } };
  const remember = (key, value) => { try { localStorage.setItem("dougong." + key, value); } catch { /* private mode */ } };
  const setLanguage = (name) => {
    root.dataset.lang = name;
    root.lang = name === "zh" ? "zh-Hans" : "en";
    for (const b of document.querySelectorAll("[data-lang-to]")) b.setAttribute("aria-pressed", b.dataset.langTo === name);
  };

  // Before the first paint, so that nothing flashes.
  root.classList.add("js");
  setLanguage(remembered("lang") || ((navigator.language || "").toLowerCase().startsWith("zh") ? "zh" : "en"));
  if (remembered("theme")) root.dataset.theme = remembered("theme");

  // Numbers, as numbers.py writes them.
  const NARROW = "\u202f", MINUS = "\u2212";
  const isZh = () => root.dataset.lang === "zh";
  const inLanguage = (pair) => pair[isZh() ? 1 : 0];
  const significant = (value, digits) => {
    if (value === 0) return "0";
    const exponent = Math.floor(Math.log10(Math.abs(Number(value.toPrecision(digits)))));
    const trim = (text) => text.includes(".") ? text.replace(/\.?0+$/, "") : text;
    if (exponent >= -5 && exponent < 6) return trim(value.toFixed(Math.max(digits - 1 - exponent, 0))).replace("-", MINUS);
    const raised = String(exponent).replace(/[-0-9]/g, (c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]);
    return `${trim((value / 10 ** exponent).toFixed(digits - 1))}${NARROW}×${NARROW}10${raised}`.replace("-", MINUS);
  };
  const compact = (value) => {
    const units = isZh() ? [[1e12, " 万亿"], [1e8, " 亿"], [1e4, " 万"]] : [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]];
    for (const [size, unit] of units)
      if (Math.abs(value) >= 0.9995 * size) return significant(value / size, 3) + (isZh() ? unit : NARROW + unit);
    return significant(value, Number.isInteger(value) ? 6 : 3);
  };
  const shown = { fixed: (v) => v.toFixed(3).replace("-", MINUS), compact, significant: (v) => significant(v, 3) };
  const tickLabel = (v) => Math.abs(v) >= 1000 ? compact(v) : significant(v, 4);

  const ticks = (low, high, wanted) => {
    const raw = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(raw));
    const stride = power * ([1, 2, 2.5, 5, 10].find((m) => m * power >= raw * 0.999) || 10);
    const found = [];
    for (let k = Math.ceil(low / stride - 1e-9); k <= high / stride + 1e-9; k++) found.push(Number((k * stride).toPrecision(10)));
    return found;
  };
  const logTicks = (low, high) => {
    const few = Math.log10(high / low) < 2.2, found = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++)
      for (const m of few ? [1, 2, 5] : [1]) if (m * 10 ** e >= low * 0.999 && m * 10 ** e <= high * 1.001) found.push(m * 10 ** e);
    return found;
  };
  // Before the first entry a clock runs in proportion, a curve stays at its first value.
  const interpolate = (x, xs, ys, clock = true) => {
    let low = 0, high = xs.length - 1;
    if (x <= xs[0]) return clock && xs[0] > 0 && x >= 0 ? ys[0] * x / xs[0] : ys[0];
    if (x >= xs[high]) return ys[high];
    while (high - low > 1) { const middle = (low + high) >> 1; if (xs[middle] <= x) low = middle; else high = middle; }
    const span = xs[high] - xs[low];
    return span ? ys[low] + (ys[high] - ys[low]) * (x - xs[low]) / span : ys[low];
  };

  const SVG = "http://www.w3.org/2000/svg", LEFT = 56, RIGHT = 18, TOP = 16, BOTTOM = 34;
  const element = (name, attributes, text) => {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const state = { axis: "step", log: false, at: null };
  const charts = [];
  let data;

  class Chart {
    constructor(figure) {
      this.figure = figure;
      this.spec = data.charts[figure.dataset.chart];
      this.svg = figure.querySelector("svg");
      this.layer = figure.querySelector(".drawn");
      this.readout = figure.querySelector(".readout");
      this.svg.addEventListener("pointermove", (e) => this.point(e));
      this.svg.addEventListener("pointerdown", (e) => this.point(e));
      this.svg.addEventListener("pointerleave", (e) => { if (e.pointerType === "mouse") showAt(null); });
      this.svg.addEventListener("keydown", (e) => this.key(e));
      this.svg.addEventListener("blur", () => showAt(null));
    }

    toAxis(run, step) {
      const clock = data.runs[run];
      return state.axis === "step" ? step : interpolate(step, clock.step, clock[state.axis]);
    }

    px(x) {
      const [low, high] = this.domain, f = state.log
        ? Math.log(Math.max(x, low) / low) / Math.log(high / low) : (x - low) / (high - low);
      return LEFT + f * (this.width - LEFT - RIGHT);
    }

    fromPx(p) {
      const [low, high] = this.domain, f = Math.min(1, Math.max(0, (p - LEFT) / (this.width - LEFT - RIGHT)));
      return state.log ? low * (high / low) ** f : low + f * (high - low);
    }

    py(y) {
      const [low, high] = state.log ? this.spec.full : this.spec.y;
      return this.height - BOTTOM - (y - low) / (high - low) * (this.height - TOP - BOTTOM);
    }

    draw() {
      this.width = Math.max(260, Math.round(this.svg.getBoundingClientRect().width));
      this.height = this.spec.wide ? (this.width < 560 ? 260 : 340) : 230;
      this.svg.setAttribute("viewBox", `0 0 ${this.width} ${this.height}`);
      this.domain = domain();
      this.series = this.spec.lines.map((line) => ({ ...line, axis: line.x.map((s) => this.toAxis(line.run, s)) }));
      const clip = `clip-${this.figure.dataset.chart}`, inside = element("g", { "clip-path": `url(#${clip})` });
      const box = element("clipPath", { id: clip });
      box.append(element("rect", { x: LEFT - 5, y: TOP - 4, width: this.width - LEFT - RIGHT + 10, height: this.height - TOP - BOTTOM + 4 }));
      this.layer.replaceChildren(box, ...this.grid(), ...this.references(), ...this.marks(), inside);
      for (const line of this.series) inside.append(...this.path(line));
      this.cross = element("g", {});
      this.layer.append(this.cross);
    }

    grid() {
      const found = [], right = this.width - RIGHT, bottom = this.height - BOTTOM, [low, high] = this.domain;
      for (const t of state.log ? this.spec.fullTicks : this.spec.ticks) {
        found.push(element("path", { class: "grid", d: `M${LEFT} ${this.py(t)}H${right}` }));
        found.push(element("text", { class: "tick", x: LEFT - 9, y: this.py(t) + 4, "text-anchor": "end" }, tickLabel(t)));
      }
      found.push(element("path", { class: "axis", d: `M${LEFT} ${bottom}H${right}` }));
      for (const t of state.log ? logTicks(low, high) : ticks(low, high, Math.max(3, Math.round(this.width / 140))))
        found.push(element("text", { class: "tick", x: this.px(t), y: bottom + 20, "text-anchor": "middle" }, tickLabel(t)));
      return found;
    }

    references() {
      const right = this.width - RIGHT;
      return this.spec.references.flatMap((r) => [
        element("path", { class: "reference", d: `M${LEFT} ${this.py(r.y)}H${right}` }),
        element("text", { class: "reference-label", x: right, y: this.py(r.y) - 5, "text-anchor": "end" }, inLanguage(r.label))]);
    }

    marks() {
      return this.spec.marks.map((m) => {
        const x = this.px(this.toAxis(m.run, m.x)), bottom = this.height - BOTTOM, group = element("g", { class: `mark ${m.kind}` });
        group.append(element("title", {}, inLanguage(m.label)),
          element("path", { d: m.kind === "resume" ? `M${x} ${TOP}V${bottom}` : `M${x} ${bottom - 9}l-4.5 8h9z` }));
        return group;
      });
    }

    path(line) {
      const colour = `c${line.colour % 8}`, places = line.axis.map((x, i) => [this.px(x), this.py(line.y[i])]);
      const d = places.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L");
      const made = [element("path", { class: `line ${line.kind} ${colour}`, d: d && "M" + d })];
      if (line.kind === "points" || places.length === 1)
        for (const [x, y] of places) made.push(element("circle", { class: `dot ${colour}`, cx: x, cy: y, r: 3.6 }));
      return made;
    }

    point(event) {
      const box = this.svg.getBoundingClientRect();
      showAt(this.fromPx((event.clientX - box.left) * this.width / box.width), this);
    }

    key(event) {
      const [low, high] = this.domain, here = state.at ?? low, width = this.width - LEFT - RIGHT;
      const moves = { ArrowLeft: -width / 60, ArrowRight: width / 60, Home: -width, End: width };
      if (event.key === "Escape") showAt(null);
      else if (event.key in moves) {
        showAt(this.fromPx(this.px(Math.min(high, Math.max(low, here))) + moves[event.key]), this);
        event.preventDefault();
      }
    }

    // Values of every line at x: the neighbour for evaluations and raw steps, interpolated for means.
    valuesAt(x) {
      return this.series.filter((line) => line.axis.length && line.kind !== "raw").map((line) => {
        if (line.kind === "smooth") {
          const over = x > line.axis[line.axis.length - 1] * 1.001;
          return over ? null : { line, x, y: interpolate(x, line.axis, line.y, false) };
        }
        let best = 0;
        line.axis.forEach((v, i) => { if (Math.abs(this.px(v) - this.px(x)) < Math.abs(this.px(line.axis[best]) - this.px(x))) best = i; });
        return { line, x: line.axis[best], y: line.y[best] };
      }).filter(Boolean);
    }

    show(x, active) {
      this.cross.replaceChildren();
      this.readout.hidden = !active;
      if (x === null) return;
      const at = this.px(x);
      this.cross.append(element("path", { class: "cross", d: `M${at} ${TOP}V${this.height - BOTTOM}` }));
      const values = this.valuesAt(x);
      for (const v of values)
        this.cross.append(element("circle", { class: `cross-dot c${v.line.colour % 8}`, cx: this.px(v.x), cy: this.py(v.y), r: 4.5 }));
      if (!active) return;
      const heading = document.createElement("p");
      heading.textContent = positionText(x);
      this.readout.replaceChildren(heading, ...values.map((v) => {
        const row = document.createElement("div"), name = document.createElement("span"), value = document.createElement("b");
        const key = document.createElement("i");
        key.className = `key ${v.line.kind} c${v.line.colour % 8}`;
        name.append(key, inLanguage(v.line.label));
        value.textContent = shown[this.spec.number](v.y);
        row.append(name, value);
        return row;
      }));
      const place = at / this.width * this.svg.getBoundingClientRect().width, wide = this.readout.offsetWidth;
      const right = place + 14, room = this.svg.getBoundingClientRect().width;
      this.readout.style.left = `${Math.max(0, right + wide > room ? place - wide - 14 : right)}px`;
    }
  }

  const positionText = (x) => {
    const names = { step: ["step ", "第 ", "", " 步"], tokens: ["", "", " tokens", " 词元"], minutes: ["", "", " min", " 分钟"] };
    const unit = (key, value) => inLanguage(names[key].slice(0, 2)) + value + inLanguage(names[key].slice(2));
    const say = { step: (v) => unit("step", compact(Math.round(v))), minutes: (v) => unit("minutes", significant(v, 3)),
      tokens: (v) => { const button = document.querySelector('[data-axis="tokens"]');
        return `${compact(v)} ${button ? button.querySelector(isZh() ? ".zh" : ".en").textContent : ""}`; } };
    if (data.runs.length > 1) return say[state.axis](x);
    const clock = data.runs[0], step = state.axis === "step" ? x : interpolate(x, clock[state.axis], clock.step);
    return ["step", "tokens", "minutes"].filter((k) => clock[k]).map((k) =>
      say[k](k === "step" ? step : interpolate(step, clock.step, clock[k]))).join(" · ");
  };

  // All charts share one x range, so that a glance down the page compares the same moment.
  const domain = () => {
    const ends = data.runs.map((r) => r[state.axis]).filter(Boolean);
    const last = Math.max(...ends.map((e) => e[e.length - 1])), first = Math.min(...ends.map((e) => e[0]));
    if (!state.log) return [first < 0.2 * last ? 0 : first, last > first ? last : first + 1];
    const positive = ends.flatMap((e) => e.filter((v) => v > 0)), low = Math.min(...positive);
    return [low, last > low ? last : low * 10];
  };

  const showAt = (x, active) => {
    state.at = x;
    for (const chart of charts) chart.show(x, chart === active);
  };
  const drawAll = () => { for (const chart of charts) chart.draw(); };
  const press = (attribute, value) => {
    for (const b of document.querySelectorAll(`[data-${attribute}]`)) b.setAttribute("aria-pressed", b.dataset[attribute] === value);
  };

  const startCharts = () => {
    data = JSON.parse(document.getElementById("curves-data").textContent);
    if (!data.runs.length || data.runs.some((r) => !r.step)) return;
    for (const figure of document.querySelectorAll("[data-chart]")) charts.push(new Chart(figure));
    drawAll();
    press("axis", state.axis);
    press("scale", "linear");
    let width = innerWidth;
    addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; drawAll(); } });
  };

  const copy = async (button) => {
    const text = document.getElementById(button.dataset.copy).textContent;
    try {
      await navigator.clipboard.writeText(text);
    } catch { // a page opened from a file has no clipboard in some browsers
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    const before = [...button.childNodes];
    button.textContent = inLanguage(button.dataset.done.split(" · "));
    setTimeout(() => button.replaceChildren(...before), 1600);
  };

  addEventListener("DOMContentLoaded", () => {
    setLanguage(root.dataset.lang);
    startCharts();
    document.addEventListener("click", (event) => {
      const b = event.target.closest("button");
      if (!b) return;
      if (b.dataset.langTo) { setLanguage(b.dataset.langTo); remember("lang", b.dataset.langTo); drawAll(); }
      else if (b.dataset.axis) { state.axis = b.dataset.axis; press("axis", state.axis); drawAll(); }
      else if (b.dataset.scale) { state.log = b.dataset.scale === "log"; press("scale", b.dataset.scale); root.classList.toggle("scale-log", state.log); drawAll(); }
      else if (b.dataset.copy) copy(b);
      else if ("themeToggle" in b.dataset) {
        const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
        root.dataset.theme = dark ? "light" : "dark";
        remember("theme", root.dataset.theme);
      }
    });
  });
  addEventListener("beforeprint", () => {
    showAt(null);
    for (const d of document.querySelectorAll("details.numbers, .one-of-many > details")) d.open = true;
  });
})();
