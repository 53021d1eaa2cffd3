// Main: which page is shown, by the address, and what is new in the run.
//
// The address says all that is on the screen: #view?key=value&..., so a link opens exactly that.

import { comparePage, problemHead, problemRow } from "./compare.js";
import { drawCurves } from "./curves.js";
import { element, oneLine } from "./dom.js";
import { openSource } from "./source.js";
import { isSettled, mostMixed, treeList } from "./tree_list.js";
import { legend, treePage } from "./tree_page.js";

const main = document.getElementById("main");
const searchForm = document.getElementById("search");
const source = openSource();
const pages = { overview, trees: treeList, tree: treePage, compare: comparePage };
const MOST_MIXED = 12;
const MOST_FIXED = 5;
const PRUNED_BY = {
  range: "the range of its values",
  tree_range: "the range of its tree's rewards",
  significance: "the significance of its differences",
  shrinkage: "the share of its spread that is no noise",
};
const KEYS = [
  ["1 2 3", "overview, trees, before and after"],
  ["← → ↑ ↓", "to the parent, a child, the siblings; in a list up and down"],
  ["Home", "to the prompt"],
  ["Enter", "to the panel of the step; in a list open the tree"],
  ["f", "whole tree on one screen, and back"],
  ["z", "only what is below the step, and back"],
  ["[ ]", "tree before, next tree"],
  ["/", "search on this page"],
  ["s", "search the answers of all trees and evaluations"],
  ["?", "this"],
];

let status = null;
let page = null; // the one that is shown, and what it is of
let shownFor = "";
let hasFailed = false; // whether a warning stands in its place

const WRITE_MS = 100; // browsers take so many changes of the address in a time, not more

let writing = 0;
let current = address();

function address() {
  const [view, query = ""] = location.hash.slice(1).split("?");
  return {
    view: Object.hasOwn(pages, view) ? view : "overview",
    query: Object.fromEntries(new URLSearchParams(query)),
  };
}

function hash({ view, query }) {
  const text = String(new URLSearchParams(query));
  return `#${view}${text ? `?${text}` : ""}`;
}

function cleaned(query) {
  const kept = Object.entries(query).filter(([, value]) => value !== undefined && value !== "");
  return Object.fromEntries(kept.map(([key, value]) => [key, String(value)]));
}

function write() {
  clearTimeout(writing);
  history.replaceState(null, "", hash(current));
}

const context = {
  source,
  status: () => status,
  query: () => current.query,
  /** To another page. */
  go(view, query) {
    write();
    location.hash = hash({ view, query: cleaned(query) });
  },
  /** To another page instead of this one. */
  redirect(view, query) {
    clearTimeout(writing);
    location.replace(hash({ view, query: cleaned(query) }));
  },
  /** The same page with another query; it is one entry of the history. */
  set(query) {
    current = { view: current.view, query: cleaned(query) };
    clearTimeout(writing);
    writing = setTimeout(write, WRITE_MS);
    show();
  },
};

/** What a page is made anew for; all else it applies itself. */
function subject({ view, query }) {
  if (view === "tree") return `tree ${query.ref}`;
  if (view === "compare") return `compare ${query.a} ${query.b} ${query.a ? "" : query.problem}`;
  return view;
}

async function show() {
  for (const link of document.querySelectorAll("[data-view]")) {
    if (link.dataset.view === current.view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const own = subject(current);
  hasFailed = false;
  try {
    if (shownFor === own) {
      await page?.apply(); // if it is still being made, it takes the query as it is then
    } else {
      page?.close();
      page = null;
      shownFor = own;
      const place = element("div", { class: `page ${current.view}-view` });
      main.replaceChildren(place);
      const made = await pages[current.view](place, context);
      if (shownFor !== own) return made?.close();
      page = made;
      await page?.ready;
    }
    main.dataset.shown = hash(current);
  } catch (error) {
    if (shownFor === own) fail(error);
  }
}

function fail(error) {
  shownFor = "";
  page = null;
  hasFailed = true;
  main.replaceChildren(element("p", { class: "warning", role: "alert" }, oneLine(error.message, 500)));
}

async function overview(root) {
  const state = element("p", { class: "note" });
  const change = element("section", { class: "change" });
  const curves = element("section", { "aria-label": "curves" });
  const trees = element("section", { class: "newest" });
  root.append(element("h1", { class: "unseen-heading" }, "Overview"), change, state, curves, trees);
  let close = () => {};

  async function draw() {
    const [found, changed] = await Promise.all([source.curves(), source.change()]);
    close();
    change.replaceChildren(...fixedMistakes(changed));
    curves.replaceChildren();
    state.textContent = found.panels.length
      ? `${credit()} A click on a curve leads to the trees of that step.`
      : "No learner step is done yet: curves and trees appear here by themselves.";
    close = drawCurves(curves, found, (step) => {
      const saved = status.tree_steps.filter((own) => own <= step).at(-1) ?? status.tree_steps[0];
      if (saved !== undefined) context.go("trees", { step: saved });
    });
    const newest = status.tree_steps.at(-1);
    trees.replaceChildren();
    if (newest === undefined) return;
    const { rows, text } = mostMixed(await source.trees(newest), MOST_MIXED);
    trees.replaceChildren(
      element("h2", {}, `The most mixed trees of step ${newest} `, element("a", { href: "#trees" }, "all trees")),
      ...(text ? [element("p", { class: "note" }, `${text[0].toUpperCase()}${text.slice(1)}.`)] : []),
      element("div", { class: "tree-list", role: "list" }, rows),
    );
  }

  await draw();
  const theme = matchMedia("(prefers-color-scheme: dark)");
  theme.addEventListener("change", draw); // charts are pixels in the colours of the style sheet
  return {
    apply: () => {},
    refresh: draw,
    close: () => {
      theme.removeEventListener("change", draw);
      close();
    },
    key: () => false,
  };
}

/** What training fixed: problems whose answers were mostly wrong and are mostly right. */
function fixedMistakes(change) {
  if (!change) return [];
  const [before, after] = change.steps;
  const [few, many] = change.num_answers;
  const sampled = few === many ? `${many} sampled ${many === 1 ? "answer" : "answers"} each` : `${few} and ${many} sampled answers each`;
  const text =
    `Of ${change.num_problems} held-out problems, asked at learner steps ${before} and ${after} (${sampled}), ` +
    `${change.num_fixed} were mostly wrong and are mostly right now, ${change.num_broken} the other way round. `;
  const all = element("a", { href: "#compare?kind=evaluation" }, "all problems");
  return [
    element("h2", {}, "Mistakes that training fixed ", all),
    element("p", { class: "note" }, text, change.fixed.length ? "A click shows the answers before and after." : ""),
    element("div", { class: "tree-list", role: "list" }, problemHead(), change.fixed.slice(0, MOST_FIXED).map(problemRow)),
  ];
}

/** How advantages are made of values, in a sentence or two. */
function credit() {
  const form = `Advantage: ${status.advantage.replaceAll("_", " ")}.`;
  const rule = PRUNED_BY[status.prune] ?? oneLine(status.prune, 80);
  const kept = ` A step group is kept where ${rule} is above ${status.prune_threshold}.`;
  const own = status.own_code.map((name) => oneLine(name, 80)).join(" and ");
  return form + kept + (own ? ` ${own} is code of the run's user, which is not run here: what the learner saved of it is shown.` : "");
}

function fillHead() {
  document.title = `${status.name} · treerpo_ray`;
  document.getElementById("run-name").textContent = oneLine(status.name, 80);
  document.getElementById("run-name").title = oneLine(status.folder, 300);
  const atMost = status.step < status.num_steps ? ` (of at most ${status.num_steps})` : "";
  const parts = [status.is_finished ? `finished after ${status.step} steps${atMost}` : `step ${status.step} of ${status.num_steps}`];
  if (!status.is_finished && source.isLive && status.written_at_s) parts.push(`last written ${ago(Date.now() / 1000 - status.written_at_s)} ago`);
  if (!source.isLive) parts.push("a saved page");
  document.getElementById("run-state").textContent = parts.join(" · ");
}

function ago(seconds) {
  if (seconds < 120) return `${Math.max(0, Math.round(seconds))} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} days`;
}

/** Look whether there is something new, as long as the page is seen. */
async function follow() {
  if (!document.hidden) {
    try {
      const found = await source.status();
      const before = status;
      status = found;
      fillHead();
      if (found.state !== before.state) await takeIn(before);
      document.body.classList.remove("lost");
    } catch {
      document.body.classList.add("lost");
      document.getElementById("run-state").textContent = "the viewer has ended: start it again to go on";
    }
  }
  setTimeout(follow, 1000 * status.poll_s);
}

/** Show what is new in the run since it was as `before`. */
async function takeIn(before) {
  source.forget();
  if (hasFailed) return show(); // what was not there may have come
  const outdated = await firstOutdated(page?.trees ?? [], before);
  if (!outdated) return page?.refresh();
  page?.close();
  page = null;
  shownFor = "";
  await show();
  const what = outdated.ticket === null ? `The evaluation at step ${outdated.step}` : `Learner step ${outdated.step}`;
  const told = hasFailed
    ? `${what} was taken back: the run was resumed from a step before it. It is shown here once it is done again.`
    : `${what} was done once more: this is the newer one.`;
  main.prepend(element("p", { class: "note redone", role: "status" }, told));
}

/** The first of some trees that is not as it was, or not there any more. */
async function firstOutdated(trees, before) {
  for (const tree of trees) {
    const settled = tree.ticket === null ? isSettled(tree.step, before, status, "evaluations") : isSettled(tree.step, before, status);
    if (settled) continue;
    const found = await source.tree(tree.ref).catch(() => null);
    if (JSON.stringify(found) !== JSON.stringify(tree)) return tree;
  }
  return null;
}

function help() {
  const dialog = document.getElementById("help");
  const keys = KEYS.flatMap(([key, text]) => [element("dt", {}, element("kbd", {}, key)), element("dd", {}, text)]);
  dialog.replaceChildren(
    element("h2", {}, "Reading a tree"),
    element("p", {}, "To the right run the tokens of an answer: a step is as wide as it is long. Siblings stand below each other; the line before them is solid where their group was kept, dashed where it was pruned."),
    element("p", {}, "The value of a step is the mean reward of the answers that go on from it. Its advantage (A) is how far the learner is to make it more or less likely than its siblings; v is the version of the weights that sampled it, tok its tokens."),
    legend(),
    element("h2", {}, "Keys"),
    element("dl", { class: "facts" }, keys),
    element("button", { type: "button", onclick: () => dialog.close() }, "close"),
  );
  dialog.showModal();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") document.activeElement?.blur();
  if (event.target.closest("input, select, textarea, dialog")) return;
  if (event.key === "s" && !event.target.closest("button, summary, a")) {
    searchForm.elements.text.focus();
    event.preventDefault();
    return;
  }
  const view = { 1: "overview", 2: "trees", 3: "compare" }[event.key];
  const isButton = event.target.closest("button, summary, a") && event.key === "Enter";
  if (event.key === "?") help();
  else if (view) context.go(view, {});
  else if (isButton || !page?.key(event)) return;
  event.preventDefault();
});
document.getElementById("help-button").addEventListener("click", help);
searchForm.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = searchForm.elements.text.value;
  if (!text) return;
  context.go("trees", { step: "all", text });
  searchForm.elements.text.blur();
});
window.addEventListener("hashchange", () => {
  clearTimeout(writing);
  current = address();
  show();
});

try {
  status = await source.status();
  fillHead();
  await show();
  if (source.isLive) setTimeout(follow, 1000 * status.poll_s);
} catch (error) {
  fail(error);
}
