// Drawing: one tree. To the right run tokens, so a step is as wide as it is long; below each other
// stand siblings, so a step is as high as the leaves below it need.

import { drawn, number, oneLine, short, signed, withError } from "./dom.js";
import { VERDICTS, largestAdvantage, stepFill } from "./scales.js";

const ROOT_WIDTH = 64;
const GUTTER = 9; // between a step and its children: the bracket of their group
const END_WIDTH = 22; // behind the leaves: their verdicts
const AXIS_HEIGHT = 18;
const LEAST_ROW = 7;
const MOST_ROW = 46;
const LABEL_HEIGHT = 12;
const CHARACTER = 6.2; // width of one in a label
const ERROR_SCALE = 60 / 0.5; // pixels of the line for a standard error of 1
export const ROOT = -1;
let drawings = 0; // so that the steps of each have names of their own

/** Steps below each step and below ROOT, in order. */
export function childrenOf(tree) {
  const children = new Map();
  tree.parent.forEach((parent, index) => {
    if (!children.has(parent)) children.set(parent, []);
    children.get(parent).push(index);
  });
  return children;
}

/** Steps from the first below the prompt down to `index`. */
export function pathTo(tree, index) {
  const path = [];
  for (let at = index; at !== ROOT; at = tree.parent[at]) path.unshift(at);
  return path;
}

/** What a screen reader says of a step, and the pointer shows. */
export function describe(tree, index) {
  if (index === ROOT) return `prompt, value ${withError(tree.root_value, tree.root_se)}`;
  const verdict = tree.verdict[index];
  return [
    verdict ? `leaf ${index}` : `step ${index}`,
    `depth ${tree.depth[index]}`,
    `value ${withError(tree.value[index], tree.value_se[index])}`,
    tree.advantage[index] === null
      ? tree.state[index] === null ? null : `${tree.state[index]} group`
      : `advantage ${withError(tree.advantage[index], tree.advantage_se[index])}`,
    `${tree.length[index]} tokens`,
    tree.newest_version[index] === null ? null : `version ${versions(tree, index)}`,
    verdict ? VERDICTS[verdict][1] : null,
    oneLine(tree.text[index], 120),
  ].filter(Boolean).join(", ");
}

/** Version or versions that sampled a step. */
export function versions(tree, index) {
  const [oldest, newest] = [tree.oldest_version[index], tree.newest_version[index]];
  return oldest === newest ? String(newest) : `${oldest}–${newest}`;
}

/**
 * Draw a tree.
 *
 * @param tree As the server tells it.
 * @param options width and height of the place (px); color: one of STEP_COLORS; top: the step of
 *   which only what is below is drawn, or ROOT; isFit: whether all must fit the height.
 * @returns the drawing, with `select(index)` and `mark(indices)`.
 */
export function drawTree(tree, { width, height, color = "value", top = ROOT, isFit = false }) {
  const children = childrenOf(tree);
  const data = (index) => ({ index, children: (children.get(index) ?? []).map(data) });
  const hierarchy = d3.hierarchy(data(top)).count();
  const rows = Math.max(1, hierarchy.value);
  const room = Math.max(120, height - AXIS_HEIGHT) / rows;
  const row = Math.min(MOST_ROW, isFit ? room : Math.max(LEAST_ROW, room));
  d3.partition().size([rows * row, 1])(hierarchy);

  const ends = new Map([[top, 0]]); // tokens from the left edge to the end of each step
  for (const node of hierarchy.descendants().slice(1)) {
    const { index } = node.data;
    ends.set(index, ends.get(node.parent.data.index) + tree.length[index]);
  }
  const most = Math.max(1, ...ends.values());
  const plot = width - ROOT_WIDTH - END_WIDTH - GUTTER * hierarchy.height;
  const perToken = Math.max(40, plot) / most;
  const left = (node) => {
    const { index } = node.data;
    return ROOT_WIDTH + GUTTER * node.depth + (ends.get(index) - tree.length[index]) * perToken;
  };
  const context = {
    tree,
    name: `tree${++drawings}-`,
    perToken,
    left,
    fill: stepFill(tree, color),
    largest: largestAdvantage(tree),
    pad: row >= 14 ? 2 : row >= 4 ? 0.8 : 0,
  };
  const svg = drawn("svg", {
    width,
    height: rows * row + AXIS_HEIGHT,
    viewBox: `0 0 ${width} ${rows * row + AXIS_HEIGHT}`,
    role: "tree",
    tabindex: 0,
    class: "tree",
    "aria-label": `tree ${tree.ref}: ${tree.parent.length} steps; arrow keys move`,
  });
  svg.append(hatch());
  const body = drawn("g", { transform: `translate(0 ${AXIS_HEIGHT})` });
  const items = new Map();
  for (const node of hierarchy.descendants()) {
    const item = node.depth === 0 ? topItem(context, node) : stepItem(context, node);
    items.set(node.data.index, item);
    if (node.children) body.append(bracket(context, node, perToken));
    body.append(item);
  }
  svg.append(axis(most, perToken, rows * row, tree, hierarchy, width), body);
  return { svg, items, children, row, ...selection(svg, body, items, tree) };
}

function selection(svg, body, items, tree) {
  return {
    select(index) {
      const path = new Set([ROOT, ...(index === ROOT ? [] : pathTo(tree, index))]);
      for (const [own, item] of items) {
        item.classList.toggle("on-path", path.has(own) && own !== index);
        item.classList.toggle("selected", own === index);
        item.setAttribute("aria-selected", own === index);
      }
      const chosen = items.get(index);
      if (!chosen) return;
      svg.setAttribute("aria-activedescendant", chosen.id);
      body.append(chosen); // above its neighbours' outlines
    },
    /** Let these stand out; null: none in particular. */
    mark(indices) {
      const marked = new Set(indices);
      svg.classList.toggle("searched", indices !== null);
      for (const [own, item] of items) item.classList.toggle("found", marked.has(own));
    },
  };
}

function topItem({ tree, name }, node) {
  const { index } = node.data;
  const [value, error] = index === ROOT
    ? [tree.root_value, tree.root_se]
    : [tree.value[index], tree.value_se[index]];
  const height = node.x1 - node.x0;
  const item = group(tree, name, index, 0);
  const box = { x: 1, y: 1, width: ROOT_WIDTH - 6, height: Math.max(2, height - 2), rx: 2 };
  const rectangle = drawn("rect", { ...box, class: "step" });
  rectangle.style.fill = stepFill({ ...tree, value: [value] }, "value")(0);
  item.append(rectangle);
  if (height >= 3 * LABEL_HEIGHT) {
    const middle = Math.min(height / 2, 4 * LABEL_HEIGHT);
    item.append(
      label(8, middle - 4, index === ROOT ? "prompt" : `step ${index}`),
      label(8, middle + 10, number(value)),
      label(8, middle + 23, error ? `±${number(error)}` : ""),
    );
  }
  return item;
}

function stepItem({ tree, name, perToken, left, fill, largest, pad }, node) {
  const { index } = node.data;
  const x = left(node);
  const y = node.x0 + pad / 2;
  const width = Math.max(1.5, tree.length[index] * perToken);
  const height = Math.max(0.7, node.x1 - node.x0 - pad);
  const item = group(tree, name, index, node.depth);
  const box = { x, y, width, height };
  const rectangle = drawn("rect", { ...box, class: "step" });
  rectangle.style.fill = fill(index);
  item.append(rectangle);
  const [advantage, error] = [tree.advantage[index], tree.value_se[index]];
  let inset = 4;
  if (advantage) {
    const strip = Math.min(width, 2 + (10 * Math.abs(advantage)) / largest);
    item.append(drawn("rect", { x, y, width: strip, height, class: advantage > 0 ? "up" : "down" }));
    inset += strip;
  } else if (tree.state[index] === "pruned" || tree.state[index] === "errored") {
    item.append(drawn("rect", { ...box, class: "hatched", fill: "url(#hatch)" }));
  }
  if (error > 0 && height >= 4) {
    const line = Math.min(width - inset, error * ERROR_SCALE);
    if (line > 0) item.append(drawn("rect", { x: x + inset, y: y + height - 2, width: line, height: 1.5, class: "error" }));
  }
  if (height >= LABEL_HEIGHT) item.append(...labels(tree, index, x + inset, y, width - inset, height));
  if (tree.verdict[index]) item.append(...ending(tree.verdict[index], x + width, y, height));
  return item;
}

/** As much of what is known as there is place for: numbers first, text below them. */
function labels(tree, index, x, y, width, height) {
  const { value, value_se, advantage, advantage_se, length } = tree;
  const parts = [
    number(value[index]),
    value_se[index] ? `±${number(value_se[index])}` : null,
    advantage[index] === null ? null : `A ${signed(advantage[index])}`,
    advantage_se[index] ? `±${number(advantage_se[index])}` : null,
    tree.newest_version[index] === null ? null : `v${versions(tree, index)}`,
    `${length[index]} tok`,
  ].filter((part) => part !== null);
  const room = Math.floor((width - 4) / CHARACTER);
  let text = "";
  for (const part of parts) {
    if (text.length + part.length + 1 > room) break;
    text += (text ? " " : "") + part;
  }
  const hasText = height >= 2.3 * LABEL_HEIGHT && tree.text[index];
  const middle = y + Math.min(height / 2, 4 * LABEL_HEIGHT); // a high step is told at its top
  const shown = text ? [label(x, hasText ? middle - 3 : middle + 4, text)] : [];
  if (hasText && room > 4) {
    // Characters of other scripts have other widths: what goes beyond the step is cut off.
    const clip = drawn("svg", { x, y: middle, width: Math.max(0, width - 3), height: 16 });
    clip.append(label(0, 11, oneLine(tree.text[index], room), "label beginning"));
    shown.push(clip);
  }
  return shown;
}

function ending(verdict, x, y, height) {
  const parts = [drawn("rect", { x: x + 1, y, width: 4, height, class: `ending ${verdict}` })];
  if (height >= 8) parts.push(label(x + 8, y + height / 2 + 4, VERDICTS[verdict][0], `glyph ${verdict}`));
  return parts;
}

function bracket({ tree, left, pad }, node) {
  const x = left(node.children[0]) - GUTTER / 2 + 1;
  const [first, last] = [node.children[0], node.children.at(-1)];
  const state = tree.state[first.data.index] ?? "none";
  return drawn("line", { x1: x, x2: x, y1: first.x0 + pad, y2: last.x1 - pad, class: `bracket ${state}` });
}

function axis(most, perToken, height, tree, hierarchy, width) {
  const group = drawn("g", { class: "axis", "aria-hidden": true });
  group.append(drawn("text", { x: 2, y: 12 }, "tokens"));
  const first = hierarchy.children?.[0];
  const depths = hierarchy.height;
  const step = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 1e6].find((size) => size * perToken >= 60);
  for (let tokens = 0; tokens <= most; tokens += step) {
    // Gutters make the axis exact where all steps of a depth are full, and near it elsewhere.
    const gutters = first ? GUTTER * Math.min(depths, 1 + Math.floor((depths * tokens) / (most + 1))) : 0;
    const x = ROOT_WIDTH + gutters + tokens * perToken;
    if (x < width - 30) group.append(drawn("text", { x, y: 12 }, short(tokens)));
  }
  return group;
}

function group(tree, name, index, depth) {
  return drawn("g", {
    id: `${name}${index}`,
    role: "treeitem",
    "data-step": index,
    "aria-level": depth + 1,
    "aria-label": describe(tree, index),
  });
}

function label(x, y, text, className = "label") {
  return drawn("text", { x, y, class: className }, text);
}

function hatch() {
  const pattern = drawn("pattern", {
    id: "hatch", width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)",
  });
  pattern.append(drawn("line", { x1: 0, x2: 0, y1: 0, y2: 6, class: "hatch" }));
  return drawn("defs", {}, pattern);
}

/** The step that an arrow key leads to from `index`, or null. */
export function neighbour(tree, children, index, key) {
  const siblings = index === ROOT ? [ROOT] : children.get(tree.parent[index]);
  switch (key) {
    case "ArrowLeft":
      return index === ROOT ? null : tree.parent[index];
    case "ArrowRight":
      return children.get(index)?.[0] ?? null;
    case "ArrowUp":
    case "ArrowDown": {
      const by = key === "ArrowUp" ? -1 : 1;
      return siblings[siblings.indexOf(index) + by] ?? cousin(tree, children, index, by);
    }
    default:
      return null;
  }
}

/** The step of the same depth in the next group above or below. */
function cousin(tree, children, index, by) {
  if (index === ROOT) return null;
  const order = inOrder(children, ROOT);
  const same = order.filter((own) => tree.depth[own] === tree.depth[index]);
  return same[same.indexOf(index) + by] ?? null;
}

function inOrder(children, index) {
  return (children.get(index) ?? []).flatMap((child) => [child, ...inOrder(children, child)]);
}
