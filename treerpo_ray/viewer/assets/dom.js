// Elements and texts. Text of a model or a data set becomes text nodes and attributes, never HTML,
// and characters that cannot be seen, or that turn the direction of others, are written out.

const SVG = "http://www.w3.org/2000/svg";
const UNSEEN =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb]|[\u{e0000}-\u{e0fff}]/gu;

/** An HTML element; properties that start with "on" are listeners, children are nodes or texts. */
export function element(tag, properties = {}, ...children) {
  return filled(document.createElement(tag), properties, children);
}

/** An SVG element; as `element`. */
export function drawn(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(node, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(node.style, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

/** How a character that cannot be seen is written. */
export function written(character) {
  const code = character.codePointAt(0);
  return `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
}

/** A text on one line, with nothing in it that cannot be seen. */
export function oneLine(text, most = Infinity) {
  const shown = text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(UNSEEN, written);
  const characters = most === Infinity ? null : Array.from(shown.slice(0, 4 * most + 4));
  return !characters || characters.length <= most
    ? shown
    : `${characters.slice(0, most).join("")}…`;
}

/** Nodes for a text of many lines; what cannot be seen stands in a span of its own. */
export function visible(text) {
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(new RegExp(`${UNSEEN.source}|\\n`, "gu"))) {
    if (match.index > end) nodes.push(document.createTextNode(text.slice(end, match.index)));
    const isBreak = match[0] === "\n";
    nodes.push(element("span", { class: "unseen" }, isBreak ? "⏎" : written(match[0])));
    if (isBreak) nodes.push(document.createTextNode("\n"));
    end = match.index + match[0].length;
  }
  if (end < text.length) nodes.push(document.createTextNode(text.slice(end)));
  return nodes;
}

/** A block of such text, whose direction is its own. */
export function textBlock(text, className = "text") {
  return element("div", { class: className, dir: "auto" }, visible(text));
}

/** A number with so many digits behind the point, or a dash where there is none. */
export function number(value, digits = 2) {
  return value === null || value === undefined ? "–" : value.toFixed(digits);
}

/** The same with its sign. */
export function signed(value, digits = 2) {
  if (value === null || value === undefined) return "–";
  return `${value < 0 ? "\u2212" : "+"}${Math.abs(value).toFixed(digits)}`;
}

/** A value with its standard error. */
export function withError(value, error, digits = 2) {
  if (value === null || value === undefined) return "no value";
  return error ? `${number(value, digits)} ± ${number(error, digits)}` : number(value, digits);
}

/** A large number, such as 12.3k. */
export function short(value) {
  if (value >= 1e6) return `${(value / 1e6).toFixed(1)}M`;
  return value >= 1e4 ? `${(value / 1e3).toFixed(1)}k` : String(value);
}

/** A select with its label; options are [value, text]. */
export function choice(label, name, options, value, changed) {
  const select = element(
    "select",
    { name, onchange: (event) => changed(event.target.value) },
    options.map(([key, text]) =>
      element("option", { value: key, selected: String(key) === String(value) }, text),
    ),
  );
  return element("label", { class: "field" }, element("span", {}, label), select);
}
