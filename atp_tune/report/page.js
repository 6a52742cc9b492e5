"use strict";
const PAPER = 660; // px of a figure's width in print: A4 less its margins
const SHORTER = 0.82; // of its height: two on a page
const root = document.documentElement;
const plots = [...document.querySelectorAll(".plot")];
const touch = matchMedia("(pointer: coarse)").matches; // there a drag scrolls the page
const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();

function look(layout) {
  const changes = {
    "font.color": colour("--soft"),
    "hoverlabel.bgcolor": colour("--raised"), "hoverlabel.bordercolor": colour("--rule"),
    "hoverlabel.font.color": colour("--ink"),
  };
  for (const axis of Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key))) {
    changes[`${axis}.gridcolor`] = colour("--grid");
    changes[`${axis}.linecolor`] = changes[`${axis}.tickcolor`] = colour("--axis");
  }
  return changes;
}

function put(layout, changes) {
  for (const [path, value] of Object.entries(changes)) {
    const keys = path.split("."), last = keys.pop();
    keys.reduce((part, key) => (part[key] ??= {}), layout)[last] = value;
  }
}

function draw(plot) {
  const figure = JSON.parse(plot.querySelector("script").textContent);
  put(figure.layout, { ...look(figure.layout), dragmode: touch ? false : "zoom" });
  plot.dataset.height = figure.layout.height; // kept by the element: Plotly forgets a layout's on resizing
  plot.style.height = `${figure.layout.height}px`;
  delete figure.layout.height;
  plot.replaceChildren();
  Plotly.newPlot(plot, figure.data, figure.layout, {
    responsive: true, displaylogo: false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
  });
}

const drawn = () => plots.filter((plot) => plot.layout);
const restyle = () => drawn().forEach((plot) => Plotly.relayout(plot, look(plot.layout)));

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", restyle);
addEventListener("beforeprint", () => {
  root.classList.add("on-paper");
  plots.filter((plot) => !plot.layout).forEach(draw);
  document.querySelectorAll("details").forEach((details) => { details.open = true; });
  for (const plot of drawn()) {
    const height = SHORTER * plot.dataset.height;
    plot.style.height = `${height}px`;
    Plotly.relayout(plot, { ...look(plot.layout), width: PAPER, height });
  }
});
addEventListener("afterprint", () => {
  root.classList.remove("on-paper");
  for (const plot of drawn()) {
    plot.style.height = `${plot.dataset.height}px`;
    Plotly.relayout(plot, { ...look(plot.layout), width: null, height: null, autosize: true });
  }
});

let next = 0; // one after the other, so that the page answers from the start
(function step() {
  if (next < plots.length) {
    const plot = plots[next++];
    if (!plot.layout) draw(plot);
    setTimeout(step, 0);
  }
})();
