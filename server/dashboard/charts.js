// Line charts as SVG, drawn to the width they have; each has a title and a description for screen readers and its data as a table.

import { el, freshId, setText, svg } from "./dom.js";
import { figure } from "./format.js";
import { thinned, ticks } from "./scale.js";

const HEIGHT = 240;
const MARGIN = { top: 10, right: 12, bottom: 34, left: 52 };
const MOST_POINTS = 320; // of a line; a chart is about 450 pixels wide
const MOST_ROWS = 1000; // of the table

export class Chart {
  /** `series` are {name, role, dots?, format?}; role is one of main, quiet, limit and decides colour and dash. `x` names the axis. */
  constructor({ title, caption, x, series, fromZero = false }) {
    Object.assign(this, { title, x, series, fromZero, lines: series.map(() => []), width: 0 });
    const ids = [freshId("chart"), freshId("chart")];
    this.svg = svg("svg", { class: "plot-svg", role: "img", "aria-labelledby": ids.join(" "), height: HEIGHT });
    this.name = svg("title", { id: ids[0] }, title);
    this.description = svg("desc", { id: ids[1] });
    this.legend = el("ul", { class: "legend" }, ...series.map((line) => el("li", { class: `${line.role}${line.dots ? " ring" : ""}` }, el("i"), line.name)));
    this.readout = el("p", { class: "readout", "aria-hidden": "true" });
    this.data = el("div", { class: "scroll", role: "region", "aria-label": `${title}: data`, tabindex: "0" });
    this.details = el("details", { class: "data" }, el("summary", {}, "Data as a table"), this.data);
    this.details.addEventListener("toggle", () => this.#fillTable());
    this.nothing = el("p", { class: "nothing" }, "Nothing to draw yet.");
    this.element = el(
      "figure",
      {},
      el("div", { class: "figure-head" }, el("h3", {}, title), this.legend),
      this.nothing,
      this.svg,
      this.readout,
      el("figcaption", {}, caption),
      this.details,
    );
    this.svg.addEventListener("pointermove", (event) => this.#point(event));
    this.svg.addEventListener("pointerleave", () => this.#unpoint());
    new ResizeObserver(() => this.#draw()).observe(this.element);
  }

  /** Draws these lines, one for each series: arrays of [x, y], x growing. */
  show(lines) {
    this.lines = lines.map((line) => line.filter(([, y]) => Number.isFinite(y)));
    this.width = 0;
    this.#draw();
    this.#fillTable();
  }

  #draw() {
    const drawn = this.lines.some((line) => line.length);
    this.nothing.hidden = drawn;
    this.svg.toggleAttribute("hidden", !drawn);
    this.details.hidden = !drawn;
    const style = getComputedStyle(this.element);
    const width = this.element.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
    if (!drawn || width < 60 || width === this.width) return;
    this.width = width;
    const all = this.lines.flat();
    const xs = all.map(([x]) => x);
    const ys = all.map(([, y]) => y);
    const [left, right] = [Math.min(...xs), Math.max(...xs)];
    const yTicks = ticks(this.fromZero ? 0 : Math.min(...ys), Math.max(...ys), 4);
    const xTicks = ticks(left, right, Math.max(2, Math.floor(width / 90))).filter((at) => at >= left && at <= right && Number.isInteger(at));
    const [low, high] = [yTicks[0], yTicks.at(-1)];
    const [inner, tall] = [width - MARGIN.left - MARGIN.right, HEIGHT - MARGIN.top - MARGIN.bottom];
    this.toX = (x) => MARGIN.left + (right > left ? ((x - left) / (right - left)) * inner : inner / 2);
    this.toY = (y) => MARGIN.top + (1 - (y - low) / (high - low)) * tall;
    this.fromX = (px) => left + ((px - MARGIN.left) / inner) * (right - left);
    const grid = yTicks.map((at) =>
      svg(
        "g",
        {},
        svg("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: this.toY(at), y2: this.toY(at) }),
        svg("text", { x: MARGIN.left - 8, y: this.toY(at) + 4, "text-anchor": "end" }, figure(at)),
      ),
    );
    const bottom = HEIGHT - MARGIN.bottom;
    const below = xTicks.map((at) => svg("text", { x: this.toX(at), y: bottom + 16, "text-anchor": "middle" }, figure(at)));
    const axis = svg("line", { class: "axis", x1: MARGIN.left, x2: width - MARGIN.right, y1: bottom, y2: bottom });
    const label = svg("text", { x: width - MARGIN.right, y: HEIGHT - 2, "text-anchor": "end" }, this.x);
    this.cursor = svg("line", { class: "cursor", y1: MARGIN.top, y2: bottom, x1: 0, x2: 0, visibility: "hidden" });
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.svg.replaceChildren(this.name, this.description, ...grid, axis, ...below, label, ...this.#marks(), this.cursor);
    setText(this.description, this.#summary());
  }

  #marks() {
    return this.series.map((series, index) => {
      const points = thinned(this.lines[index], MOST_POINTS).map(([x, y]) => [this.toX(x).toFixed(1), this.toY(y).toFixed(1)]);
      const group = svg("g", { class: `series ${series.role}` });
      if (points.length > 1) group.append(svg("polyline", { class: "line", points: points.map((point) => point.join()).join(" ") }));
      if (series.dots ? points.length < 60 : points.length === 1) {
        group.append(...points.map(([cx, cy]) => svg("circle", { class: "dot", cx, cy, r: 3.5 })));
      }
      return group;
    });
  }

  #summary() {
    const parts = this.series.map((series, index) => {
      const line = this.lines[index];
      if (!line.length) return `${series.name}: none yet.`;
      const [first, last] = [line[0], line.at(-1)];
      return `${series.name}: from ${figure(first[1])} at ${this.x} ${first[0]} to ${figure(last[1])} at ${this.x} ${last[0]}.`;
    });
    return parts.join(" ");
  }

  #fillTable() {
    if (!this.details.open) return;
    const rows = new Map();
    for (const [index, line] of this.lines.entries()) {
      for (const [x, y] of line) {
        if (!rows.has(x)) rows.set(x, this.series.map(() => ""));
        rows.get(x)[index] = figure(y);
      }
    }
    const sorted = [...rows].sort((a, b) => b[0] - a[0]).slice(0, MOST_ROWS);
    const head = [this.x, ...this.series.map((series) => series.name)].map((text) => el("th", { scope: "col", class: "number" }, text));
    const body = sorted.map(([x, cells]) =>
      el("tr", {}, el("th", { scope: "row", class: "number" }, String(x)), ...cells.map((text) => el("td", { class: "number" }, text))),
    );
    const caption = el("caption", { class: "unseen" }, this.title);
    this.data.replaceChildren(el("table", { class: "plain" }, caption, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...body)));
  }

  #point(event) {
    if (!this.width) return;
    const wanted = this.fromX(((event.clientX - this.svg.getBoundingClientRect().left) / this.svg.clientWidth) * this.width);
    const near = this.lines.map((line) => line.reduce((best, point) => (best && Math.abs(best[0] - wanted) <= Math.abs(point[0] - wanted) ? best : point), null));
    const closest = near.filter((point) => point).reduce((a, b) => (Math.abs(a[0] - wanted) <= Math.abs(b[0] - wanted) ? a : b));
    const said = near.map((point, index) => (point && point[0] === closest[0] ? `${this.series[index].name} ${figure(point[1])}` : null));
    setText(this.readout, `${this.x} ${closest[0]}: ${said.filter((text) => text).join(", ")}`);
    for (const end of ["x1", "x2"]) this.cursor.setAttribute(end, this.toX(closest[0]));
    this.cursor.setAttribute("visibility", "visible");
  }

  #unpoint() {
    setText(this.readout, "");
    this.cursor?.setAttribute("visibility", "hidden");
  }
}
