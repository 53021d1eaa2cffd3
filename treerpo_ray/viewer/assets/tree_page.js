// Tree page: one tree with the panel of the step that is chosen.

import { choice, element, oneLine, textBlock, withError } from "./dom.js";
import { ROOT, drawTree, neighbour, pathTo } from "./drawing.js";
import { STEP_COLORS, VERDICTS, diverging, fullMeanLogRatio, largestAdvantage, strength } from "./scales.js";
import { fillPanel } from "./step_panel.js";

const LEAST_HEIGHT = 260; // of a drawing that is to fit the screen
const LEAST_WIDTH = 280;
const WIDE = 1000; // from here on the panel is beside the drawing

/**
 * The page of a tree.
 *
 * @param root Where it goes.
 * @param context source, status(), query(), go(view, query), redirect(view, query), set(query).
 * @returns what is shown: apply() takes another query, refresh() what is new in the run, key(event)
 *   tells whether it had a use for a key, close() is its end; trees are those that it is made of, if
 *   it is to be made anew for others.
 */
export async function treePage(root, context) {
  const page = new TreePage(context, await context.source.tree(context.query().ref));
  root.replaceChildren(...page.parts);
  await page.apply();
  page.watch();
  return page;
}

class TreePage {
  constructor(context, tree) {
    this.context = context;
    this.tree = tree;
    this.trees = [tree];
    this.place = element("div", { class: "drawing" });
    this.panel = element("aside", { class: "panel", "aria-label": "the chosen step" });
    this.tip = element("div", { class: "tip", role: "tooltip", hidden: true });
    this.tools = new Tools(this);
    this.drawing = null;
    this.drawnFor = "";
    this.found = null; // steps that hold what is searched
    this.foundFor = undefined;
    this.resized = new ResizeObserver(() => this.draw());
    const left = element("div", { class: "left" }, this.tools.root, this.place);
    const body = element("div", { class: "tree-page" }, left, this.panel);
    this.parts = [head(tree, context), body, this.tip];
    this.listen();
  }

  get chosen() {
    return boundedStep(this.tree, this.context.query().node);
  }

  set(more) {
    this.context.set({ ...this.context.query(), ...more });
  }

  choose(index) {
    this.set({ node: index === ROOT ? undefined : index });
  }

  /** What the query says, on the screen. */
  async apply() {
    this.tools.fill();
    this.draw();
    this.drawing.select(this.chosen);
    await Promise.all([this.fill(), this.search()]);
  }

  refresh() {}

  close() {
    this.resized.disconnect();
  }

  /** Draw again when the place has another width. */
  watch() {
    this.resized.observe(this.place);
    this.drawing.svg.focus({ preventScroll: true });
  }

  draw() {
    const { color = "value", top, fit } = this.context.query();
    const width = Math.max(LEAST_WIDTH, this.place.clientWidth);
    const wanted = JSON.stringify([width, window.innerHeight, color, top, fit]);
    if (this.drawnFor === wanted) return;
    this.drawnFor = wanted;
    const above = Math.round(this.place.getBoundingClientRect().top + window.scrollY);
    const hadFocus = document.activeElement === this.drawing?.svg;
    performance.mark("draw-start");
    this.drawing = drawTree(this.tree, {
      width,
      height: Math.max(LEAST_HEIGHT, window.innerHeight - above - 8),
      color,
      top: boundedStep(this.tree, top),
      isFit: fit === "1",
    });
    this.place.replaceChildren(this.drawing.svg);
    performance.measure("draw", "draw-start");
    this.drawing.select(this.chosen);
    this.drawing.mark(this.found);
    if (hadFocus) this.drawing.svg.focus({ preventScroll: true });
  }

  async fill() {
    const index = this.chosen;
    const path = index === ROOT ? [] : pathTo(this.tree, index);
    const texts = path.length ? await this.context.source.texts(this.tree.ref, path) : [];
    if (index !== this.chosen) return; // another one was chosen meanwhile
    fillPanel(this.panel, this.tree, index, texts, this.context.query().tokens ?? "logprob", {
      choose: (own) => this.choose(own),
      color: (tokens) => this.set({ tokens }),
    });
  }

  async search() {
    const { find } = this.context.query();
    if (find === this.foundFor) return;
    this.foundFor = find;
    const steps = find ? await this.context.source.holding(this.tree.ref, find) : null;
    if (find !== this.foundFor) return;
    this.found = steps;
    this.tools.tellFound(steps);
    this.drawing.mark(steps);
  }

  listen() {
    const { place, tip } = this;
    place.addEventListener("click", (event) => {
      const item = event.target.closest("[data-step]");
      if (item) this.choose(Number(item.dataset.step));
      this.drawing.svg.focus({ preventScroll: true });
    });
    place.addEventListener("pointermove", (event) => {
      const item = event.target.closest?.("[data-step]");
      tip.hidden = !item || event.pointerType === "touch";
      if (tip.hidden) return;
      tip.textContent = item.getAttribute("aria-label");
      tip.style.left = `${Math.min(event.clientX + 14, window.innerWidth - 320)}px`;
      tip.style.top = `${event.clientY + 16}px`;
    });
    place.addEventListener("pointerleave", () => (tip.hidden = true));
  }

  key(event) {
    if (event.key.startsWith("Arrow")) {
      const next = neighbour(this.tree, this.drawing.children, this.chosen, event.key);
      if (next !== null) {
        this.choose(next);
        this.drawing.items.get(next)?.scrollIntoView({ block: "nearest", inline: "nearest" });
      }
      return true;
    }
    const uses = {
      Home: () => this.choose(ROOT),
      Enter: () => this.toPanel(),
      f: () => this.tools.whole.click(),
      z: () => this.tools.below.click(),
      "/": () => this.tools.input.focus(),
      "[": () => turn(this.tree, this.context, -1),
      "]": () => turn(this.tree, this.context, 1),
    };
    if (!Object.hasOwn(uses, event.key)) return false;
    uses[event.key]();
    return true;
  }

  toPanel() {
    if (window.innerWidth < WIDE) this.panel.scrollIntoView();
    this.panel.querySelector("button, select")?.focus();
  }
}

/** What stands above the drawing. */
class Tools {
  constructor(page) {
    const { context, tree } = page;
    this.page = page;
    this.colors = choice("colour", "color", stepColors(tree), "value", (color) => page.set({ color }));
    this.whole = toggle("whole tree on one screen", "f", () => {
      page.set({ fit: context.query().fit === "1" ? undefined : "1" });
    });
    this.below = toggle("only below this step", "z", () => {
      const isAll = context.query().top === undefined && page.chosen !== ROOT;
      page.set({ top: isAll ? page.chosen : undefined });
    });
    this.input = element("input", {
      type: "search",
      name: "find",
      placeholder: "find in steps  /",
      "aria-label": "find in the steps' texts",
      onchange: (event) => page.set({ find: event.target.value || undefined }),
    });
    this.count = element("output", { class: "fact found-count" });
    this.meaning = element("div", { class: "meaning" });
    const { colors, whole, below, input, count, meaning } = this;
    this.root = element("div", { class: "tools" }, colors, whole, below, input, count, meaning);
  }

  fill() {
    const { color, top, fit, find } = this.page.context.query();
    this.colors.querySelector("select").value = color ?? "value";
    this.whole.setAttribute("aria-pressed", String(fit === "1"));
    this.below.setAttribute("aria-pressed", String(top !== undefined));
    if (document.activeElement !== this.input) this.input.value = find ?? "";
    this.meaning.replaceChildren(legend(color, this.page.tree));
  }

  tellFound(steps) {
    this.count.textContent = steps ? `${steps.length} of ${this.page.tree.parent.length} steps` : "";
  }
}

/** A step of the tree as a query names it; ROOT for anything else. */
export function boundedStep(tree, text) {
  const index = Number(text ?? ROOT);
  return Number.isInteger(index) && index >= 0 && index < tree.parent.length ? index : ROOT;
}

function head(tree, context) {
  const isTrained = tree.ticket !== null;
  const name = isTrained ? `step ${tree.step}, ticket ${tree.ticket}` : `evaluation at step ${tree.step}`;
  const question = element("details", { class: "question" }, element("summary", {}, oneLine(tree.question, 180)), textBlock(tree.question));
  const links = element(
    "span",
    { class: "links" },
    isTrained ? keyed("‹ tree before", "[", () => turn(tree, context, -1)) : null,
    isTrained ? keyed("next tree ›", "]", () => turn(tree, context, 1)) : null,
    element("a", { href: `#compare?${new URLSearchParams({ problem: tree.prompt_id, kind: isTrained ? "tree" : "evaluation" })}` }, "same problem, other steps"),
  );
  return element(
    "header",
    { class: "tree-head" },
    element("h1", {}, name),
    element("span", { class: "fact" }, tree.root_value === null ? "no value: a leaf has no verdict" : `value ${withError(tree.root_value, tree.root_se)}`),
    element("span", { class: "fact" }, "reference ", element("b", { dir: "auto" }, oneLine(tree.answers.join(" · "), 60))),
    links,
    question,
  );
}

async function turn(tree, context, by) {
  if (tree.ticket === null) return;
  const tickets = (await context.source.trees(tree.step)).map((own) => own.ticket);
  const next = tickets[tickets.indexOf(tree.ticket) + by];
  if (next !== undefined) {
    const { color, tokens, fit } = context.query();
    context.go("tree", { ref: `${tree.step}:${next}`, color, tokens, fit });
  }
}

/** A button that a key presses too. */
function keyed(text, key, clicked) {
  return element("button", { type: "button", onclick: clicked, title: `key ${key}` }, text);
}

function toggle(text, key, clicked) {
  const button = keyed(text, key, clicked);
  button.setAttribute("aria-pressed", "false");
  return button;
}

/** What steps can be coloured by; the answers of an evaluation have values alone. */
function stepColors(tree) {
  return tree.ticket === null ? STEP_COLORS.slice(0, 1) : STEP_COLORS;
}

function fullRatio(tree) {
  return Math.exp(fullMeanLogRatio(tree)).toFixed(3);
}

/** What colours and marks mean, in one line; the colours are those of `value` if none is named. */
export function legend(color = "value", tree = null) {
  const bar = [0, 0.25, 0.5, 0.75, 1].map((share) => {
    const part = element("i", { class: "swatch" });
    part.style.background = {
      logprob: strength(share),
      version: strength(0.15 + 0.85 * share, "--new"),
    }[color] ?? diverging(share);
    return part;
  });
  const most = tree && largestAdvantage(tree).toFixed(2);
  const [low, high] = {
    advantage: [`advantage \u2212${most}`, `+${most}`],
    logprob: ["likely", "unlikely (1 nat a token)"],
    ratio: tree && [`mean ratio 1/${fullRatio(tree)}`, fullRatio(tree)],
    version: ["oldest", "newest weights"],
  }[color] ?? ["value 0", "1"];
  const verdicts = Object.entries(VERDICTS).slice(0, 4).map(([name, [glyph, text]]) =>
    element("span", {}, element("b", { class: `glyph ${name}` }, glyph), ` ${text}`),
  );
  const trained = [
    element("span", {}, element("i", { class: "swatch up" }), " advantage A up ", element("i", { class: "swatch down" }), " down"),
    element("span", {}, element("i", { class: "swatch line" }), " standard error"),
    element("span", {}, element("i", { class: "swatch hatched" }), " pruned"),
    element("span", {}, "v version of the weights"),
  ];
  const isTrained = tree === null || tree.ticket !== null;
  return element(
    "div",
    { class: "legend" },
    element("span", {}, `${low} `, bar, ` ${high}`),
    isTrained ? trained : null,
    verdicts,
  );
}
