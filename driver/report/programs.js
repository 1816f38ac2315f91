"use strict";
// The program after each step: functions that fold, lines with their ops explained, search, and two steps side by side, aligned by the ids of ops.

(() => {
  const packed = read("programs-data");
  if (!packed) return;
  const root = document.getElementById("ir");
  const query = document.getElementById("ir-query");
  const found = document.getElementById("ir-found");
  const FUNC = /^func @([\w.$]+)/;
  const PLACE = /  @ (\S+#[\d.]+) [A-Z]+$/;
  const TOKEN = /%[\w.$]+|@[\w.$]+|"(?:[^"\\]|\\.)*"|[A-Za-z_][\w.]*|\d[\w.+-]*|\s+|[^\s]/g;
  const TYPE = /^(bf16|f16|f32|f64|f8e\w+|e\d+m\d+|i8|i16|i32|i64|u8|u16|u32|bool|bundle|async)$/;
  const LONG = 420; // characters of a line that are shown at first
  const ALIKE = 3; // equal lines around a change that are shown
  let step = -1;
  let view = "text";
  let hits = [];
  let at = -1;

  // ---- texts

  const texts = new Map();

  /** The functions of a step, in order: name, lines, and a key for each line, which is the id of its op. */
  function functions(index) {
    if (!texts.has(index)) texts.set(index, split(lines(packed.texts[index])));
    return texts.get(index);
  }

  function lines(runs) {
    const all = [];
    for (let i = 0; i < runs.length; i += 2) for (let j = 0; j < runs[i + 1]; j++) all.push(packed.lines[runs[i] + j]);
    return all;
  }

  function split(all) {
    const made = [{ name: "module", lines: [], keys: [], first: 1 }];
    all.forEach((line, i) => {
      const start = FUNC.exec(line);
      if (start) made.push({ name: `@${start[1]}`, lines: [], keys: [], first: i + 1 });
      const current = made[made.length - 1];
      if (!line && !start) return;
      const place = PLACE.exec(line);
      current.lines.push(line);
      current.keys.push(place ? place[1] : start ? "func" : /^(module|  return)\b/.test(line) ? line.match(/\w+/)[0] : line);
    });
    return made;
  }

  // ---- two steps side by side

  /** Pairs of positions whose lines bear one key, as many as stand in the same order on both sides: keys are unique, so it is a longest rising row. */
  function anchors(a, b) {
    const where = new Map(a.map((key, i) => [key, i]));
    const tails = [];
    const before = [];
    b.forEach((key, j) => {
      const i = where.get(key);
      if (i === undefined) return;
      let low = 0;
      let high = tails.length;
      while (low < high) {
        const middle = (low + high) >> 1;
        if (tails[middle].i < i) low = middle + 1;
        else high = middle;
      }
      const pair = { i, j };
      before.push([pair, low ? tails[low - 1] : null]);
      tails[low] = pair;
    });
    const links = new Map(before);
    const chain = [];
    for (let pair = tails[tails.length - 1]; pair; pair = links.get(pair)) chain.push(pair);
    return chain.reverse();
  }

  /** Rows of two lines each; null where a side has none. */
  function compare(a, b) {
    const rows = [];
    const [left, right] = [a ? a.keys : [], b ? b.keys : []];
    const [inLeft, inRight] = [new Set(left), new Set(right)];
    const inBoth = (key) => inLeft.has(key) && inRight.has(key);
    let [i, j] = [0, 0];
    const upTo = (endA, endB) => {
      for (; i < endA; i++) rows.push({ a: a.lines[i], b: null, moved: inBoth(left[i]) });
      for (; j < endB; j++) rows.push({ a: null, b: b.lines[j], moved: inBoth(right[j]), line: j });
    };
    for (const pair of anchors(left, right)) {
      upTo(pair.i, pair.j);
      rows.push({ a: a.lines[i], b: b.lines[j], same: a.lines[i] === b.lines[j], line: j });
      i++;
      j++;
    }
    upTo(left.length, right.length);
    return rows;
  }

  /** Each function with the one that it came from: of the same name, or, where that is gone, the one whose name it begins with. */
  function partners(before, after) {
    const old = new Map(before.map((func) => [func.name, func]));
    const kept = new Set(after.map((func) => func.name));
    const used = new Set();
    const pairs = after.map((func) => {
      if (old.has(func.name)) return [old.get(func.name), func];
      const origin = before.find((other) => !kept.has(other.name) && !used.has(other.name) && func.name.startsWith(`${other.name}_`));
      if (origin) used.add(origin.name);
      return [origin || null, func];
    });
    return [...pairs, ...before.filter((func) => !kept.has(func.name) && !used.has(func.name)).map((func) => [func, null])];
  }

  // ---- lines as elements

  function colour(text) {
    const parts = document.createDocumentFragment();
    const tokens = text.match(TOKEN) || [];
    tokens.forEach((token, i) => {
      const call = tokens[i + 1] === "(" && packed.ops[token] !== undefined;
      const kind = call ? "to" : /^[%@]./.test(token) ? "tv" : TYPE.test(token) ? "tt" : null;
      if (!kind) return parts.append(token);
      const span = make("span", { class: kind, title: call ? packed.ops[token] : null }, token);
      parts.append(span);
    });
    return parts;
  }

  /** A line, its place in quiet colour, and what is too long cut off behind a button. */
  function content(text, whole) {
    const cut = !whole && text.length > LONG;
    const shown = cut ? text.slice(0, LONG) : text;
    const place = cut ? null : PLACE.exec(shown);
    const parts = document.createDocumentFragment();
    parts.append(colour(place ? shown.slice(0, place.index) : shown));
    if (place) parts.append(make("span", { class: "tn" }, shown.slice(place.index)));
    if (cut) {
      const more = make("button", { class: "more", type: "button" }, `… ${(text.length - LONG).toLocaleString("en")} more characters`);
      more.addEventListener("click", () => more.parentNode.replaceChildren(content(text, true)));
      parts.append(more);
    }
    return parts;
  }

  /** What differs between two lines, marked in both: words that a common row of words leaves over. */
  function marked(a, b) {
    const [x, y] = [a.match(TOKEN) || [], b.match(TOKEN) || []];
    let head = 0;
    while (head < x.length && head < y.length && x[head] === y[head]) head++;
    let tail = 0;
    while (tail < x.length - head && tail < y.length - head && x[x.length - 1 - tail] === y[y.length - 1 - tail]) tail++;
    const [m, n] = [x.length - head - tail, y.length - head - tail];
    const common = [new Set(), new Set()];
    if (m * n <= 60000) {
      const table = Array.from({ length: m + 1 }, () => new Uint16Array(n + 1));
      for (let i = m - 1; i >= 0; i--)
        for (let j = n - 1; j >= 0; j--)
          table[i][j] = x[head + i] === y[head + j] ? table[i + 1][j + 1] + 1 : Math.max(table[i + 1][j], table[i][j + 1]);
      for (let i = 0, j = 0; i < m && j < n; ) {
        if (x[head + i] === y[head + j]) {
          common[0].add(head + i++);
          common[1].add(head + j++);
        } else if (table[i + 1][j] >= table[i][j + 1]) i++;
        else j++;
      }
    }
    return [x, y].map((tokens, side) => {
      const parts = document.createDocumentFragment();
      let run = "";
      let strong = false;
      const flush = () => {
        if (run) parts.append(strong ? make("b", {}, run) : run);
        run = "";
      };
      tokens.forEach((token, i) => {
        const differs = i >= head && i < tokens.length - tail && !common[side].has(i);
        if (differs !== strong) flush();
        strong = differs;
        run += token;
      });
      flush();
      return parts;
    });
  }

  // ---- the view

  function show(index, kind = view) {
    step = index;
    view = packed.steps[step].before === null || packed.texts[packed.steps[step].before] === null ? "text" : kind;
    for (const button of document.querySelectorAll("[data-step]")) button.setAttribute("aria-pressed", String(Number(button.dataset.step) === step));
    for (const button of document.querySelectorAll("[data-view]")) {
      button.setAttribute("aria-pressed", String(button.dataset.view === view));
      button.disabled = button.dataset.view === "diff" && (packed.steps[step].before === null || packed.texts[packed.steps[step].before] === null);
    }
    root.replaceChildren();
    view === "diff" ? showChanges() : showText();
    search();
  }

  /** A function that is filled when it is opened; `fill` gives the elements of its lines by position. */
  function folded(name, words, fill) {
    const box = make("div", { class: "box", tabindex: "0" });
    const details = make("details", { class: "func" }, make("summary", {}, name, ...words), box);
    details.ready = () => {
      if (!details.rows) details.rows = fill(box);
      return details.rows;
    };
    details.addEventListener("toggle", () => details.open && details.ready());
    root.append(details);
    return details;
  }

  function showText() {
    for (const func of functions(step)) {
      const ops = func.keys.filter((key) => key.includes("#")).length;
      const details = folded(func.name, [make("small", {}, ops ? `${ops.toLocaleString("en")} op${ops === 1 ? "" : "s"}` : "what the program says of itself")], (box) => {
        const rows = func.lines.map((line, i) => make("div", { class: "line" }, make("i", {}, String(func.first + i)), make("span", {}, content(line, false))));
        box.append(make("div", { class: "lines" }, ...rows));
        return rows;
      });
      details.func = func;
    }
    const best = [...root.children].find((details) => details.func.lines.length > 2 && details.func.lines.length <= 60);
    if (best && root.children.length <= 3) best.open = true;
  }

  function showChanges() {
    const before = functions(packed.steps[step].before);
    let changed = 0;
    for (const [a, b] of partners(before, functions(step))) {
      const rows = compare(a, b);
      const [added, cut] = [rows.filter((row) => !row.same && row.b !== null).length, rows.filter((row) => !row.same && row.a !== null).length];
      if (!added && !cut) continue;
      changed++;
      const words = [make("small", { class: "plus" }, `+${added.toLocaleString("en")}`), make("small", { class: "minus" }, `−${cut.toLocaleString("en")}`)];
      words.push(make("small", {}, !a ? "new" : !b ? "gone" : a.name !== b.name ? `was ${a.name}` : ""));
      const details = folded((b || a).name, words, (box) => fillPairs(box, rows));
      details.func = b || a;
      details.changes = rows;
    }
    if (!changed) root.append(make("p", { class: "quiet" }, `${packed.steps[step].name} changed nothing.`));
    else if (root.children.length === 1) root.firstElementChild.open = true;
  }

  function fillPairs(box, rows) {
    const near = new Set();
    rows.forEach((row, i) => {
      if (!row.same) for (let k = i - ALIKE; k <= i + ALIKE; k++) near.add(k);
    });
    const elements = rows.map(pair);
    const list = make("div", { class: "pairs" });
    let hidden = [];
    const flush = () => {
      if (!hidden.length) return;
      const group = hidden;
      const button = make("button", { class: "same", type: "button" }, `… ${group.length} line${group.length === 1 ? "" : "s"} alike`);
      const open = () => button.replaceWith(...group);
      button.addEventListener("click", open);
      for (const element of group) element.reveal = open;
      list.append(button);
      hidden = [];
    };
    elements.forEach((element, i) => {
      if (near.has(i) || (near.has(i - 1) && near.has(i + 1))) {
        flush();
        list.append(element);
      } else hidden.push(element);
    });
    flush();
    box.append(list);
    return elements;
  }

  function pair(row) {
    const side = (text, kind, body) => make("div", { class: text === null ? "none" : `${kind}${row.moved ? " moved" : ""}`, title: row.moved ? "moved" : null }, text === null ? "" : body);
    if (row.same) return make("div", { class: "pair alike" }, make("div", {}, content(row.a, false)), make("div", {}, content(row.b, false)));
    if (row.a !== null && row.b !== null) {
      const [a, b] = marked(row.a, row.b);
      return make("div", { class: "pair" }, side(row.a, "cut", a), side(row.b, "add", b));
    }
    return make("div", { class: "pair" }, side(row.a, "cut", row.a === null ? null : content(row.a, false)), side(row.b, "add", row.b === null ? null : content(row.b, false)));
  }

  // ---- search

  function search() {
    const words = query.value.trim().toLowerCase();
    for (const element of root.querySelectorAll(".hit, .here")) element.classList.remove("hit", "here");
    hits = [];
    at = -1;
    for (const details of root.querySelectorAll(".func")) {
      const texts = details.changes ? details.changes.map((row) => `${row.a === null ? "" : row.a}\n${row.b === null ? "" : row.b}`) : details.func.lines;
      if (words) texts.forEach((text, i) => text.toLowerCase().includes(words) && hits.push({ details, i }));
    }
    const inside = new Set(hits.map((hit) => hit.details));
    const what = view === "diff" ? "changed functions" : `${packed.steps[step].name}`;
    found.textContent = !words ? "" : hits.length ? `${hits.length.toLocaleString("en")} line${hits.length === 1 ? "" : "s"} in ${inside.size} function${inside.size === 1 ? "" : "s"}` : `nothing in ${what}`;
    if (hits.length) go(1);
  }

  function go(by) {
    if (!hits.length) return;
    if (at >= 0) element(hits[at]).classList.remove("here");
    at = (at + by + hits.length) % hits.length;
    const { details } = hits[at];
    details.open = true;
    details.ready();
    for (const hit of hits) if (hit.details.rows) hit.details.rows[hit.i].classList.add("hit");
    const target = element(hits[at]);
    if (target.reveal && !target.isConnected) target.reveal();
    const more = target.querySelector(".more");
    if (more) more.click();
    target.classList.add("here");
    const box = target.closest(".box");
    box.scrollTop += target.getBoundingClientRect().top - box.getBoundingClientRect().top - box.clientHeight / 2;
    details.scrollIntoView({ block: "nearest" });
    const words = found.textContent.replace(/^\d[\d,]* of /, "");
    found.textContent = `${(at + 1).toLocaleString("en")} of ${words}`;
  }

  function element(hit) {
    return hit.details.ready()[hit.i];
  }

  let waiting = 0;
  query.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(search, 120);
  });
  query.addEventListener("keydown", (event) => {
    if (event.key === "Enter") {
      event.preventDefault();
      go(event.shiftKey ? -1 : 1);
    } else if (event.key === "Escape") {
      query.value = "";
      search();
    }
  });
  document.getElementById("ir-next").addEventListener("click", () => go(1));
  document.getElementById("ir-previous").addEventListener("click", () => go(-1));
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !/^(INPUT|TEXTAREA)$/.test(document.activeElement.tagName)) {
      event.preventDefault();
      query.focus();
    }
  });
  for (const button of document.querySelectorAll("[data-step]")) button.addEventListener("click", () => show(Number(button.dataset.step)));
  for (const button of document.querySelectorAll("[data-view]")) button.addEventListener("click", () => show(step, button.dataset.view));

  const passes = packed.steps.filter((one) => one.name !== "optimiser").length;
  show(passes - 1);
})();
