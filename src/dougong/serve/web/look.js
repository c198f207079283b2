// Before anything is drawn: the theme and language that were chosen here before, or that the browser asks for.
(() => {
  let kept = {};
  try { kept = JSON.parse(localStorage.getItem("dougong.look")) || {}; } catch { /* private mode */ }
  const root = document.documentElement;
  if (kept.theme) root.dataset.theme = kept.theme;
  const asked = new URLSearchParams(location.search).get("lang");
  root.dataset.lang = asked || kept.lang || (/^zh/i.test(navigator.language) ? "zh" : "en");
  root.lang = root.dataset.lang === "zh" ? "zh-Hans" : "en";
})();
