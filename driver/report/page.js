"use strict";
// What all parts share, and what is small: the bar of sections, folding, the memory under the pointer, printing.

/** The value in an element of data, or null where the page has none. */
function read(id) {
  const element = document.getElementById(id);
  return element ? JSON.parse(element.textContent) : null;
}

/** An element with attributes and children; text is only ever set as text. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

function bytes(number) {
  for (const [unit, scale] of [["TB", 1e12], ["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) if (number >= scale) return `${(number / scale).toFixed(2)} ${unit}`;
  return `${number} B`;
}

(() => {
  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const [id, link] of links) id === entry.target.id ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current");
      const bar = document.querySelector("nav");
      const link = links.get(entry.target.id);
      bar.scrollLeft = link.offsetLeft - (bar.clientWidth - link.offsetWidth) / 2;
    }
  }, { rootMargin: "-20% 0px -75% 0px" });
  for (const id of links.keys()) seen.observe(document.getElementById(id));

  for (const button of document.querySelectorAll("[data-fold]")) {
    button.addEventListener("click", () => {
      const all = [...button.closest("section").querySelectorAll(".tree details")];
      for (const details of all) details.open = button.dataset.fold === "open" || details === all[0];
    });
  }

  const points = read("memory-points");
  const chart = document.getElementById("memory-chart");
  if (points && chart) {
    const says = document.getElementById("memory-says");
    const cursor = document.getElementById("memory-cursor");
    const [left, right, width] = [Number(chart.dataset.left), Number(chart.dataset.right), chart.viewBox.baseVal.width];
    const total = (i) => Object.values(points.series).reduce((sum, values) => sum + values[i], 0);
    const show = (i) => {
      const parts = Object.entries(points.series).map(([kind, values]) => `${kind} ${bytes(values[i])}`);
      says.textContent = `${bytes(total(i))} at ${points.places[i]}: ${parts.join(", ")}`;
      const x = left + ((i + 0.5) / points.places.length) * (width - left - right);
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
      cursor.style.opacity = 1;
    };
    chart.addEventListener("pointermove", (event) => {
      const box = chart.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * width;
      show(Math.max(0, Math.min(points.places.length - 1, Math.floor(((x - left) / (width - left - right)) * points.places.length))));
    });
    let fullest = 0;
    for (let i = 1; i < points.places.length; i++) if (total(i) > total(fullest)) fullest = i;
    show(fullest);
  }

  addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("section > details")) details.open = true;
  });
})();
