"use strict";
// The schedule: rows of spans that are drawn anew for the part of time that is shown, so that thousands of them stay quick.

(() => {
  const data = read("timeline-data");
  if (!data) return;
  const box = document.getElementById("timeline");
  const canvas = box.querySelector(".canvas");
  const says = document.getElementById("timeline-says");
  const [ROW, GAP, TOP] = [20, 8, 24];
  let [from, to] = [0, data.end];
  let pinned = "";

  const svg = (tag, attributes, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    return element;
  };

  const time = (us) => {
    for (const [unit, scale] of [["s", 1e6], ["ms", 1e3]]) if (Math.abs(us) >= scale) return `${+(us / scale).toPrecision(4)} ${unit}`;
    return `${+us.toPrecision(4)} µs`;
  };

  function lead() {
    return Math.min(150, Math.max(84, box.clientWidth * 0.16));
  }

  function draw() {
    const width = Math.max(box.clientWidth - 2, 240);
    const left = lead();
    const scale = (width - left - 8) / (to - from);
    let y = TOP;
    const parts = [];
    let group = null;
    for (const row of data.rows) {
      const first = row.group !== group;
      if (first && group !== null) y += GAP;
      group = row.group;
      parts.push(svg("rect", { x: left, y, width: width - left - 8, height: ROW - 2, class: "band" }));
      const label = first ? row.group : row.name;
      const room = Math.floor(left / 6.2);
      const name = svg("text", { x: first ? 6 : 14, y: y + 13 }, label.length > room ? `${label.slice(0, room - 1)}…` : label);
      name.append(svg("title", {}, `${row.group}, ${row.name}`));
      parts.push(name, ...spans(row, left, y, scale, width));
      y += ROW;
    }
    const picture = svg("svg", { width, height: y + 6, role: "img", "aria-label": `from ${time(from)} to ${time(to)}` });
    picture.append(...axis(left, width, scale, y), ...parts);
    canvas.replaceChildren(picture);
  }

  function axis(left, width, scale, height) {
    const raw = (to - from) / Math.max(2, (width - left) / 110);
    const unit = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((m) => m * unit).find((value) => value >= raw);
    const parts = [];
    for (let t = Math.ceil(from / step) * step; t <= to; t += step) {
      const x = left + (t - from) * scale;
      parts.push(svg("line", { x1: x, x2: x, y1: 18, y2: height, class: "grid" }), svg("text", { x: x + 3, y: 14 }, time(t)));
    }
    return parts;
  }

  function spans(row, left, y, scale, width) {
    const parts = [];
    const s = row.spans;
    let low = 0;
    let high = s.length / 4;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (s[4 * middle] + s[4 * middle + 1] < from) low = middle + 1;
      else high = middle;
    }
    let filled = -1; // pixels up to which narrow spans are drawn already
    for (let i = low; i < s.length / 4 && s[4 * i] < to; i++) {
      const [start, length, name, kind] = s.slice(4 * i, 4 * i + 4);
      const x = Math.max(left, left + (start - from) * scale);
      const end = Math.min(width - 8, left + (start + length - from) * scale);
      if (end <= left || end - filled < 0.7) continue;
      const wide = Math.max(end - x, 0.7);
      filled = x + wide;
      const words = `${data.names[name]}: ${time(length)}, from ${time(start)} to ${time(start + length)} · ${data.kinds[kind]} · ${row.group}, ${row.name}`;
      parts.push(svg("rect", { x, y, width: wide, height: ROW - 2, rx: wide > 6 ? 2 : 0, class: `span hue-${data.hues[kind]}`, "data-words": words }));
      if (wide > 8 * data.names[name].length) parts.push(svg("text", { x: x + wide / 2, y: y + 13, class: "words", "text-anchor": "middle" }, data.names[name]));
    }
    return parts;
  }

  function zoom(factor, centre = (from + to) / 2) {
    const length = Math.min(data.end, Math.max((to - from) * factor, data.end / 1e6));
    const share = (centre - from) / (to - from);
    from = Math.max(0, Math.min(data.end - length, centre - share * length));
    to = from + length;
    draw();
  }

  function move(by) {
    const length = to - from;
    from = Math.max(0, Math.min(data.end - length, from + by));
    to = from + length;
    draw();
  }

  const at = (x) => from + ((x - box.getBoundingClientRect().left - lead()) / (box.clientWidth - lead() - 10)) * (to - from);

  box.addEventListener("wheel", (event) => {
    if (event.ctrlKey || event.metaKey) {
      event.preventDefault();
      zoom(event.deltaY > 0 ? 1.25 : 0.8, at(event.clientX));
    } else if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
      event.preventDefault();
      move((event.deltaX / box.clientWidth) * (to - from));
    }
  }, { passive: false });
  box.addEventListener("keydown", (event) => {
    const keys = { "+": () => zoom(0.6), "=": () => zoom(0.6), "-": () => zoom(1 / 0.6), "−": () => zoom(1 / 0.6), ArrowLeft: () => move((from - to) / 5), ArrowRight: () => move((to - from) / 5), 0: () => zoom(Infinity) };
    if (event.ctrlKey || event.metaKey || !keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  });
  for (const button of document.querySelectorAll("[data-zoom]")) button.addEventListener("click", () => zoom({ in: 0.6, out: 1 / 0.6, all: Infinity }[button.dataset.zoom]));
  let grabbed = null;
  box.addEventListener("pointerdown", (event) => {
    grabbed = { x: event.clientX, from };
    box.classList.add("dragging");
  });
  addEventListener("pointerup", () => {
    grabbed = null;
    box.classList.remove("dragging");
  });
  box.addEventListener("pointermove", (event) => {
    if (grabbed) return move(grabbed.from - ((event.clientX - grabbed.x) / (box.clientWidth - lead())) * (to - from) - from);
    const words = event.target.dataset ? event.target.dataset.words : null;
    says.textContent = words || pinned;
  });
  box.addEventListener("click", (event) => {
    pinned = (event.target.dataset && event.target.dataset.words) || "";
    for (const other of canvas.querySelectorAll(".on")) other.classList.remove("on");
    if (pinned) event.target.classList.add("on");
    says.textContent = pinned;
  });
  new ResizeObserver(draw).observe(box);
  addEventListener("beforeprint", draw);
})();
