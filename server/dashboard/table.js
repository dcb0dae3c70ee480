// A table whose rows are kept by key: what did not change is not touched, so that focus and a screen reader's place survive updates.
// On a phone its rows become cards, which takes a table's meaning away from it; the roles give it back.

import { button, el, setText } from "./dom.js";

/**
 * Columns are {head, text(row), [node(row), sign(row)], [title(row)], [kind]}; kind is number, or still for what does not wrap. A column with `node` shows what it makes, remade when
 * `sign` differs. `keyOf(row)` names a row. With `most`, so many rows are shown until more are asked for.
 */
export class Table {
  constructor({ caption, columns, keyOf, most = null, empty = "Nothing yet.", rowClass = () => "" }) {
    Object.assign(this, { columns, keyOf, most, shown: most, rowClass, rows: new Map(), data: [] });
    this.body = el("tbody", { role: "rowgroup" });
    const heads = columns.map((column) => el("th", { scope: "col", role: "columnheader", class: column.kind ?? null }, column.head));
    this.table = el(
      "table",
      { role: "table" },
      el("caption", { class: "unseen" }, caption),
      el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, ...heads)),
      this.body,
    );
    this.box = el("div", { class: "scroll", role: "region", "aria-label": caption, tabindex: "0" }, this.table);
    this.nothing = el("p", { class: "nothing" }, empty);
    this.more = button("Show more", () => {
      this.shown += 4 * this.most;
      this.show(this.data);
    });
    this.element = el("div", {}, this.box, this.nothing, this.more);
    this.show([]);
  }

  /** Shows these rows in this order. */
  show(data) {
    this.data = data;
    const part = this.shown === null ? data : data.slice(0, this.shown);
    const wanted = new Set(part.map(this.keyOf));
    for (const [key, row] of this.rows) {
      if (!wanted.has(key)) {
        row.remove();
        this.rows.delete(key);
      }
    }
    let place = this.body.firstChild;
    for (const item of part) {
      const row = this.#row(item);
      if (row === place) place = place.nextSibling;
      else this.body.insertBefore(row, place);
    }
    this.box.hidden = part.length === 0;
    this.nothing.hidden = part.length > 0;
    this.more.hidden = part.length === data.length;
    setText(this.more, `Show more (${data.length - part.length} left)`);
  }

  /** Back to the first rows: for another run's data. */
  fold() {
    this.shown = this.most;
  }

  #row(item) {
    const key = this.keyOf(item);
    let row = this.rows.get(key);
    if (!row) {
      row = el("tr", { role: "row" });
      for (const [index, column] of this.columns.entries()) {
        const attributes = { "data-label": column.head, class: column.kind ?? null };
        row.append(index ? el("td", { role: "cell", ...attributes }) : el("th", { scope: "row", role: "rowheader", ...attributes }));
      }
      this.rows.set(key, row);
    }
    row.className = this.rowClass(item);
    for (const [index, column] of this.columns.entries()) {
      const cell = row.children[index];
      if (column.node) {
        const sign = String(column.sign(item));
        if (cell.dataset.sign !== sign) {
          cell.dataset.sign = sign;
          cell.replaceChildren(...[column.node(item)].flat().filter((node) => node !== null));
        }
      } else {
        setText(cell, column.text(item));
      }
      if (column.title) cell.title = column.title(item);
    }
    return row;
  }
}
