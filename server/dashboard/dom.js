// Elements made of text and other elements. Nothing here parses a string as markup: what strangers wrote stays text.

/** An element: attributes by name (true: present, false or null: absent), `on` maps events to listeners; children are nodes or text. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") {
      for (const [kind, listener] of Object.entries(value)) node.addEventListener(kind, listener);
    } else if (value !== false && value !== null && value !== undefined) {
      node.setAttribute(name, value === true ? "" : String(value));
    }
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** An SVG element of attributes and children. */
export function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, String(value));
  node.append(...children);
  return node;
}

/** The element of the page with this id. */
export function byId(id) {
  return document.getElementById(id);
}

/** Sets text only where it differs, so that screen readers are not told what they know. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** A button that is disabled while its asynchronous action runs. */
export function button(label, action, attributes = {}) {
  const node = el("button", { type: "button", class: "plain", ...attributes }, label);
  node.addEventListener("click", async () => {
    node.disabled = true;
    try {
      await action(node);
    } finally {
      node.disabled = false;
    }
  });
  return node;
}

let ids = 0;

/** An id that is used once. */
export function freshId(stem) {
  ids += 1;
  return `${stem}-${ids}`;
}
