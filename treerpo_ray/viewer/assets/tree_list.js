// Tree list: the saved trees of a learner step or of all, filtered and in order.

import { choice, element, oneLine, short, withError } from "./dom.js";
import { VERDICTS, diverging } from "./scales.js";

const SHOWN = 100; // rows at a time
const REDRAW_MS = 250;
const AT_A_TIME = 4; // learner steps that are asked for
const ORDERS = {
  mixed: ["most mixed first", (a, b) => mixed(b) - mixed(a)],
  ticket: ["by ticket", (a, b) => a.step - b.step || a.ticket - b.ticket],
  low: ["lowest value first", (a, b) => (a.value ?? 2) - (b.value ?? 2)],
  high: ["highest value first", (a, b) => (b.value ?? -1) - (a.value ?? -1)],
  uncertain: ["most uncertain first", (a, b) => (b.se ?? 0) - (a.se ?? 0)],
  kept: ["most groups kept first", (a, b) => b.groups.kept - a.groups.kept],
  long: ["longest first", (a, b) => b.num_tokens - a.num_tokens],
};

const GROUPS = [
  ["", "any"],
  ["kept", "some kept"],
  ["pruned", "some pruned"],
  ["none", "none kept"],
  ["errored", "some errored"],
];

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

/** The page of the list; arguments and result as those of `treePage`. */
export function treeList(root, context) {
  const page = new TreeList(context);
  root.replaceChildren(...page.parts);
  page.ready = page.apply();
  return page;
}

class TreeList {
  constructor(context) {
    this.context = context;
    this.filters = new Filters(context, (change) => this.set(change));
    this.count = element("p", { class: "note", role: "status" });
    this.list = element("div", { class: "tree-list", role: "list" });
    this.more = element("button", { type: "button", hidden: true, onclick: () => this.showMore() }, "show more");
    this.read = new Map(); // trees by learner step
    this.found = new Map(); // by learner step what was found of the text, by ticket
    this.answers = new Map(); // by learner step of an evaluation the problems whose answers have it
    this.foundFor = "";
    this.seen = context.status(); // when what was read was asked for
    this.shown = SHOWN;
    this.reading = 0; // number of the newest request; older ones stop
    this.isStopped = false;
    this.stop = element("button", { type: "button", hidden: true, onclick: () => this.stopReading() }, "stop");
    this.drawnAt = 0;
    this.timer = null; // of the next time
    const heading = element("h1", { class: "unseen-heading" }, "Trees");
    const told = element("div", { class: "told" }, this.count, this.stop);
    this.evaluated = element("section", { class: "evaluated", "aria-label": "answers of evaluations", hidden: true });
    this.parts = [heading, this.filters.root, told, this.list, this.more, this.evaluated];
  }

  set(change) {
    this.shown = SHOWN;
    this.context.set({ ...this.context.query(), ...change });
  }

  stopReading() {
    this.reading += 1;
    this.isStopped = true;
    this.draw();
  }

  showMore() {
    this.shown += SHOWN;
    this.draw();
  }

  /** Learner steps whose trees the query asks for, those to read first in front. */
  wanted() {
    const steps = this.context.status().tree_steps;
    const { step } = this.context.query();
    if (step === "all") return [...steps].reverse();
    return step === undefined ? steps.slice(-1) : [Number(step)];
  }

  /** Evaluations whose answers are searched, the newest in front. */
  wantedAnswers() {
    if (!this.foundFor) return [];
    const steps = [...this.context.status().evaluations].reverse();
    const { step } = this.context.query();
    return step === "all" ? steps : steps.filter((own) => own === Number(step));
  }

  /** Whether all that is asked for of a learner step is here. */
  isHere(step) {
    return this.read.has(step) && (!this.foundFor || this.found.has(step));
  }

  /** Draw what has come, but not all the time. */
  drawSoon() {
    const wait = REDRAW_MS - (performance.now() - this.drawnAt);
    if (wait <= 0) this.draw();
    else this.timer ??= setTimeout(() => this.draw(), wait);
  }

  draw() {
    clearTimeout(this.timer);
    this.timer = null;
    this.drawnAt = performance.now();
    const trees = this.wanted().filter((step) => this.isHere(step)).flatMap((step) => this.read.get(step));
    const found = this.foundFor ? trees.filter((tree) => this.textIn(tree)) : trees;
    const passing = filtered(found, this.context.query());
    const missing = this.wanted().filter((step) => !this.isHere(step)).length;
    this.stop.hidden = !missing || this.isStopped;
    this.count.replaceChildren(...this.counted(passing.length, trees.length, missing));
    const focused = document.activeElement?.getAttribute("href");
    this.list.replaceChildren(listHead(), ...passing.slice(0, this.shown).map((tree) => treeRow(tree, this.textIn(tree))));
    if (focused) this.list.querySelector(`[href="${CSS.escape(focused)}"]`)?.focus();
    this.more.hidden = passing.length <= this.shown;
    this.drawAnswers();
  }

  /** Below the trees: what the evaluations have of the text. */
  drawAnswers() {
    const steps = this.wantedAnswers().filter((step) => this.answers.has(step));
    this.evaluated.hidden = !steps.length;
    if (!steps.length) return this.evaluated.replaceChildren();
    const all = steps.flatMap((step) => this.answers.get(step));
    const at = steps.length > 1 ? `the evaluations at learner steps ${steps.join(", ")}` : `the evaluation at learner step ${steps[0]}`;
    const more = all.length > SHOWN ? `; the first ${SHOWN} are shown` : "";
    this.evaluated.replaceChildren(
      element("h2", {}, "In evaluations"),
      element("p", { class: "note", role: "status" }, `${all.length} held-out problems of ${at} have it in an answer${more}`),
      element("div", { class: "tree-list", role: "list" }, all.slice(0, SHOWN).map(answerRow)),
    );
  }

  textIn(tree) {
    return this.found.get(tree.step)?.get(tree.ticket);
  }

  counted(passing, all, missing) {
    const numSaved = this.context.status().tree_steps.length;
    if (!numSaved) {
      return ["No trees are saved yet: the first come with the first learner step (metrics.save_trees_every)."];
    }
    const steps = this.wanted();
    const of = steps.length > 1 ? `${steps.length - missing} learner steps` : `learner step ${steps[0]}`;
    const more = missing ? (this.isStopped ? `; stopped before ${missing} more` : `; reading ${missing} more …`) : "";
    const text = this.foundFor ? ` have “${oneLine(this.foundFor, 60)}” in an answer` : "";
    const told = [`${passing} of ${all} trees of ${of}${text}${more}`];
    if (text && steps.length < numSaved) {
      told.push(" ", element("a", { href: `#trees?${new URLSearchParams({ ...this.context.query(), step: "all" })}` }, `search all ${numSaved} steps`));
    }
    return told;
  }

  async apply() {
    this.filters.fill();
    const own = ++this.reading;
    const { text = "" } = this.context.query();
    if (text !== this.foundFor) {
      this.found.clear();
      this.answers.clear();
    }
    this.foundFor = text;
    this.isStopped = false;
    this.draw();
    const missing = this.wanted().filter((step) => !this.isHere(step));
    for (let first = 0; first < missing.length; first += AT_A_TIME) {
      await Promise.all(missing.slice(first, first + AT_A_TIME).map((step) => this.readStep(step, text, own)));
      if (own !== this.reading) return;
    }
    for (const step of this.wantedAnswers().filter((step) => !this.answers.has(step))) {
      const found = await this.context.source.searchAnswers(step, text);
      if (own !== this.reading) return;
      this.answers.set(step, found);
      this.drawSoon();
    }
    this.draw();
  }

  async readStep(step, text, own) {
    const { source } = this.context;
    const [trees, found] = await Promise.all([
      this.read.get(step) ?? source.trees(step),
      text ? source.search(step, text) : [],
    ]);
    if (own !== this.reading) return;
    this.read.set(step, trees);
    if (text) this.found.set(step, new Map(found.map((each) => [each.ticket, each])));
    this.drawSoon();
  }

  refresh() {
    const status = this.context.status();
    for (const step of [...this.read.keys()]) {
      if (isSettled(step, this.seen, status)) continue;
      this.read.delete(step);
      this.found.delete(step);
    }
    this.answers.clear();
    this.seen = status;
    return this.apply();
  }

  close() {
    this.reading += 1;
    clearTimeout(this.timer);
  }

  key(event) {
    if (event.key === "/") {
      this.filters.root.querySelector("[name=q]").focus();
      return true;
    }
    if (event.key !== "ArrowDown" && event.key !== "ArrowUp") return false;
    const rows = [...this.list.querySelectorAll("a")];
    const next = rows[rows.indexOf(document.activeElement) + (event.key === "ArrowDown" ? 1 : -1)];
    next?.focus();
    return Boolean(next);
  }
}

/** Whether the trees of a learner step (or the answers: `evaluations`) are still those of an earlier
 * look: it was there and not the newest, which may still change, and no step was done once more. */
export function isSettled(step, before, now, kind = "tree_steps") {
  const isDone = ({ [kind]: steps }) => steps.includes(step) && step !== steps.at(-1);
  return isDone(before) && isDone(now) && before.num_redone === now.num_redone;
}

/** The fields that say which trees are listed; `changed` gets what was changed of the query. */
class Filters {
  constructor(context, changed) {
    this.context = context;
    this.changed = changed;
    this.root = element("form", { class: "filters", onsubmit: (event) => event.preventDefault() });
  }

  /** Show the query; who types or chooses is not disturbed. */
  fill() {
    if (this.root.contains(document.activeElement)) return;
    const steps = [...this.context.status().tree_steps].reverse();
    const share = { type: "number", min: 0, max: 1, step: 0.01 };
    this.root.replaceChildren(
      this.pick("learner step", "step", [
        ["", `newest (${steps[0] ?? "none"})`],
        ["all", `all (${steps.length})`],
        ...steps.map((step) => [step, step]),
      ]),
      this.input("problem", "q", { type: "search", placeholder: "question or id  /" }),
      this.input("text of an answer", "text", { type: "search", placeholder: "text, then Enter", maxlength: 1000 }, "onchange"),
      this.input("value from", "min", { ...share, placeholder: "0" }),
      this.input("to", "max", { ...share, placeholder: "1" }),
      this.input("error from", "se", { ...share, placeholder: "0" }),
      this.pick("depth", "depth", [["", "any"], ...[1, 2, 3, 4, 5, 6].map((depth) => [depth, depth])]),
      this.pick("step groups", "groups", GROUPS),
      this.pick("verdict", "verdict", [
        ["", "any"],
        ...Object.entries(VERDICTS).map(([name, [, text]]) => [name, `a leaf: ${text}`]),
      ]),
      this.pick("order", "order", Object.entries(ORDERS).map(([name, [text]]) => [name === "mixed" ? "" : name, text])),
    );
  }

  input(label, name, attributes, event = "oninput") {
    const field = element("input", {
      name,
      value: this.context.query()[name] ?? "",
      ...attributes,
      [event]: ({ target }) => this.changed({ [name]: target.value || undefined }),
    });
    return element("label", { class: "field" }, element("span", {}, label), field);
  }

  pick(label, name, options) {
    const value = this.context.query()[name] ?? "";
    return choice(label, name, options, value, (chosen) => this.changed({ [name]: chosen || undefined }));
  }
}

/** What stands in each column. */
export function listHead() {
  const names = ["step:ticket", "value ± standard error", "verdicts", "step groups and size", "problem", "reference"];
  return element("div", { class: "tree-row list-head", "aria-hidden": true }, names.map((name) => element("span", {}, name)));
}

/** One tree as a line that leads to it, and to the answer in which a text was found, if one was. */
export function treeRow(tree, found) {
  const more = found ? `&${new URLSearchParams({ node: found.leaf, find: found.passage.text })}` : "";
  const total = Object.values(tree.verdicts).reduce((sum, count) => sum + count, 0);
  const groups = tree.groups.kept + tree.groups.pruned + tree.groups.errored;
  return element(
    "a",
    { href: `#tree?ref=${tree.step}:${tree.ticket}${more}`, class: "tree-row", role: "listitem" },
    element("span", { class: "ref" }, `${tree.step}:${tree.ticket}`),
    element("span", { class: "value" }, gauge(tree.value, tree.se), element("span", {}, withError(tree.value, tree.se))),
    element("span", { class: "verdicts", title: verdictText(tree.verdicts) }, verdictBar(tree.verdicts, total)),
    element("span", { class: "counts" }, `${tree.groups.kept}/${groups} kept · depth ${tree.depth} · ${tree.num_steps} steps · ${short(tree.num_tokens)} tok`),
    element("span", { class: "problem", dir: "auto" }, oneLine(tree.question, 160)),
    element("span", { class: "answer", dir: "auto" }, oneLine(tree.answer, 40)),
    found ? foundLine(found, found.num_answers > 1 ? `${found.num_answers} answers` : "1 answer") : null,
  );
}

/** One problem of an evaluation as a line that leads to the answer in which a text was found. */
function answerRow(found) {
  const query = new URLSearchParams({ ref: `e${found.step}:${found.problem}`, node: found.leaf, find: found.passage.text });
  return element(
    "a",
    { href: `#tree?${query}`, class: "tree-row answer-row", role: "listitem" },
    element("span", { class: "ref" }, `step ${found.step}`),
    element("span", { class: "problem", dir: "auto" }, oneLine(found.question, 160)),
    element("span", { class: "answer", dir: "auto" }, oneLine(found.reference, 40)),
    foundLine(found, `${found.num_answers} of ${found.total} answers, the first ${VERDICTS[found.verdict][1]}`),
  );
}

function foundLine({ passage }, count) {
  return element(
    "span",
    { class: "found-text" },
    element("span", { class: "fact" }, `${count}: `),
    element("span", { dir: "auto" }, oneLine(passage.before), element("mark", {}, oneLine(passage.text)), oneLine(passage.after)),
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

/** Whether answers of a tree are worth more than others: some right and some wrong. */
function isMixed(tree) {
  return tree.value > 0 && tree.value < 1;
}

/** A number of rows of the most mixed trees, for the overview; and what is to be said of them. */
export function mostMixed(trees, count) {
  const found = filtered(trees.filter(isMixed), {});
  const rows = found.slice(0, count).map((tree) => treeRow(tree));
  const few = `${found.length || "none"} of ${trees.length} ${trees.length === 1 ? "tree" : "trees"} has both right and wrong answers`;
  return {
    rows: rows.length ? [listHead(), ...rows] : [],
    text: found.length < Math.min(count, trees.length) ? few.replace("has", found.length > 1 ? "have" : "has") : "",
  };
}
