// Tree list: the saved trees of a learner step or of all, filtered and in order.

import { choice, element, oneLine, short, withError } from "./dom.js";
import { VERDICTS, diverging } from "./scales.js";

const SHOWN = 100; // rows at a time
const REDRAW_MS = 250;
const ORDERS = {
  mixed: ["most mixed first", (a, b) => mixed(b) - mixed(a)],
  ticket: ["by ticket", (a, b) => a.step - b.step || a.ticket - b.ticket],
  low: ["lowest value first", (a, b) => (a.value ?? 2) - (b.value ?? 2)],
  high: ["highest value first", (a, b) => (b.value ?? -1) - (a.value ?? -1)],
  uncertain: ["most uncertain first", (a, b) => (b.se ?? 0) - (a.se ?? 0)],
  kept: ["most groups kept first", (a, b) => b.groups.kept - a.groups.kept],
  long: ["longest first", (a, b) => b.num_tokens - a.num_tokens],
};

/** How much there is to see: kept groups, and a value that is neither 0 nor 1. */
function mixed(tree) {
  return (tree.value ?? 0) * (1 - (tree.value ?? 0)) + tree.groups.kept / 1000;
}

/** Trees that pass the filters of a query, in its order. */
export function filtered(trees, query) {
  const text = (query.q ?? "").toLowerCase();
  const least = numberOr(query.min, -Infinity);
  const most = numberOr(query.max, Infinity);
  const uncertain = numberOr(query.se, 0);
  const kept = trees.filter(
    (tree) =>
      (!text || `${tree.prompt_id}\n${tree.question}\n${tree.answer}`.toLowerCase().includes(text)) &&
      (query.min === undefined || (tree.value !== null && tree.value >= least)) &&
      (query.max === undefined || (tree.value !== null && tree.value <= most)) &&
      (!uncertain || (tree.se ?? 0) >= uncertain) &&
      (!query.depth || tree.depth === Number(query.depth)) &&
      (!query.groups || (query.groups === "none" ? !tree.groups.kept : tree.groups[query.groups] > 0)) &&
      (!query.verdict || tree.verdicts[query.verdict] > 0),
  );
  return kept.sort((ORDERS[query.order] ?? ORDERS.mixed)[1]);
}

function numberOr(text, otherwise) {
  const value = Number.parseFloat(text);
  return Number.isNaN(value) ? otherwise : value;
}

/** The page of the list; arguments as `treePage`. */
export function treeList(root, context) {
  const { source } = context;
  const form = element("form", { class: "filters", onsubmit: (event) => event.preventDefault() });
  const count = element("p", { class: "note", role: "status" });
  const list = element("div", { class: "tree-list", role: "list" });
  const more = element("button", { type: "button", hidden: true }, "show more");
  const read = new Map(); // trees by learner step
  let shown = SHOWN;
  let reading = 0; // of the newest request; an older one stops
  let drawnAt = 0;

  const set = (change) => {
    shown = SHOWN;
    context.set({ ...context.query(), ...change });
  };
  more.addEventListener("click", () => {
    shown += SHOWN;
    draw();
  });

  function wanted() {
    const steps = context.status().tree_steps;
    const { step } = context.query();
    if (step === "all") return [...steps].reverse();
    return step === undefined ? steps.slice(-1) : [Number(step)];
  }

  function draw() {
    drawnAt = performance.now();
    const steps = wanted();
    const trees = steps.flatMap((step) => read.get(step) ?? []);
    const passing = filtered(trees, context.query());
    const missing = steps.filter((step) => !read.has(step)).length;
    count.textContent = !context.status().tree_steps.length
      ? "No trees are saved yet: the first come with the first learner step (metrics.save_trees_every)."
      : `${passing.length} of ${trees.length} trees` +
        (steps.length > 1 ? ` of ${steps.length - missing} learner steps` : ` of learner step ${steps[0]}`) +
        (missing ? `; reading ${missing} more …` : "");
    const focused = document.activeElement?.getAttribute("href");
    list.replaceChildren(listHead(), ...passing.slice(0, shown).map(treeRow));
    if (focused) list.querySelector(`[href="${CSS.escape(focused)}"]`)?.focus();
    more.hidden = passing.length <= shown;
  }

  async function apply() {
    fillForm();
    const own = ++reading;
    draw();
    for (const step of wanted()) {
      if (read.has(step)) continue;
      const trees = await source.trees(step);
      read.set(step, trees);
      if (own !== reading) return;
      if (performance.now() - drawnAt > REDRAW_MS) draw();
    }
    draw();
  }

  function fillForm() {
    if (form.contains(document.activeElement)) return;
    const query = context.query();
    const steps = [...context.status().tree_steps].reverse();
    const input = (label, name, attributes) =>
      element(
        "label",
        { class: "field" },
        element("span", {}, label),
        element("input", {
          name, value: query[name] ?? "", ...attributes,
          oninput: (event) => set({ [name]: event.target.value || undefined }),
        }),
      );
    const pick = (label, name, options) =>
      choice(label, name, options, query[name] ?? "", (value) => set({ [name]: value || undefined }));
    form.replaceChildren(
      pick("learner step", "step", [["", `newest (${steps[0] ?? "none"})`], ["all", `all (${steps.length})`], ...steps.map((step) => [step, step])]),
      input("problem", "q", { type: "search", placeholder: "question, answer or id  /" }),
      input("value from", "min", { type: "number", min: 0, max: 1, step: 0.05, placeholder: "0" }),
      input("to", "max", { type: "number", min: 0, max: 1, step: 0.05, placeholder: "1" }),
      input("error from", "se", { type: "number", min: 0, max: 1, step: 0.01, placeholder: "0" }),
      pick("depth", "depth", [["", "any"], ...[1, 2, 3, 4, 5, 6].map((depth) => [depth, depth])]),
      pick("step groups", "groups", [["", "any"], ["kept", "some kept"], ["pruned", "some pruned"], ["none", "none kept"], ["errored", "some errored"]]),
      pick("verdict", "verdict", [["", "any"], ...Object.entries(VERDICTS).map(([name, [, text]]) => [name, `a leaf: ${text}`])]),
      pick("order", "order", Object.entries(ORDERS).map(([name, [text]]) => [name === "mixed" ? "" : name, text])),
    );
  }

  root.replaceChildren(element("h1", { class: "unseen-heading" }, "Trees"), form, count, list, more);
  const ready = apply();
  return {
    ready,
    apply,
    refresh: () => {
      const steps = new Set(context.status().tree_steps);
      for (const step of [...read.keys()]) if (!steps.has(step)) read.delete(step); // rolled back
      return apply();
    },
    close: () => (reading += 1),
    key(event) {
      if (event.key === "/") {
        form.querySelector("[name=q]").focus();
        return true;
      }
      if (event.key !== "ArrowDown" && event.key !== "ArrowUp") return false;
      const rows = [...list.querySelectorAll("a")];
      const at = rows.indexOf(document.activeElement);
      const next = rows[at + (event.key === "ArrowDown" ? 1 : -1)];
      next?.focus();
      return Boolean(next);
    },
  };
}

/** What stands in each column. */
export function listHead() {
  const names = ["step:ticket", "value ± standard error", "verdicts", "step groups and size", "problem", "reference"];
  return element("div", { class: "tree-row list-head", "aria-hidden": true }, names.map((name) => element("span", {}, name)));
}

/** One tree as a line that leads to it. */
export function treeRow(tree) {
  const total = Object.values(tree.verdicts).reduce((sum, count) => sum + count, 0);
  const groups = tree.groups.kept + tree.groups.pruned + tree.groups.errored;
  return element(
    "a",
    { href: `#tree?ref=${tree.step}:${tree.ticket}`, class: "tree-row", role: "listitem" },
    element("span", { class: "ref" }, `${tree.step}:${tree.ticket}`),
    element("span", { class: "value" }, gauge(tree.value, tree.se), element("span", {}, withError(tree.value, tree.se))),
    element("span", { class: "verdicts", title: verdictText(tree.verdicts) }, verdictBar(tree.verdicts, total)),
    element("span", { class: "counts" }, `${tree.groups.kept}/${groups} kept · depth ${tree.depth} · ${tree.num_steps} steps · ${short(tree.num_tokens)} tok`),
    element("span", { class: "problem", dir: "auto" }, oneLine(tree.question, 160)),
    element("span", { class: "answer", dir: "auto" }, oneLine(tree.answer, 40)),
  );
}

/** A value on a line from 0 to 1, with its standard error. */
export function gauge(value, error) {
  const bar = element("i", { class: "gauge" });
  if (value === null) return bar;
  const range = element("i", { class: "range" });
  const low = Math.max(0, value - (error ?? 0));
  const high = Math.min(1, value + (error ?? 0));
  range.style.left = `${100 * low}%`;
  range.style.width = `${100 * (high - low)}%`;
  const dot = element("i", { class: "dot" });
  dot.style.left = `${100 * value}%`;
  dot.style.background = diverging(value);
  bar.append(range, dot);
  return bar;
}

function verdictBar(verdicts, total) {
  return Object.entries(VERDICTS).filter(([name]) => verdicts[name]).map(([name]) => {
    const part = element("i", { class: `part ${name}` });
    part.style.width = `${(100 * verdicts[name]) / total}%`;
    return part;
  });
}

function verdictText(verdicts) {
  return Object.entries(VERDICTS).filter(([name]) => verdicts[name]).map(([name, [, text]]) => `${verdicts[name]} ${text}`).join(", ");
}

/** A number of rows of the most mixed trees, for the overview. */
export function mostMixed(trees, count) {
  return [listHead(), ...filtered(trees, {}).slice(0, count).map(treeRow)];
}
