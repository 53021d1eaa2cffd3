// Tree page: one tree with the panel of the step that is chosen.

import { choice, element, oneLine, textBlock, withError } from "./dom.js";
import { ROOT, drawTree, neighbour, pathTo } from "./drawing.js";
import { STEP_COLORS, VERDICTS, diverging } from "./scales.js";
import { fillPanel } from "./step_panel.js";

const LEAST_HEIGHT = 260; // of a drawing that is to fit the screen
const WIDE = 1000; // from here on the panel is beside the drawing

/**
 * The page of a tree.
 *
 * @param root Where it goes.
 * @param context source, status, query(), go(view, query), set(query).
 */
export async function treePage(root, context) {
  const { source } = context;
  const { ref } = context.query();
  const tree = await source.tree(ref);
  const place = element("div", { class: "drawing" });
  const panel = element("aside", { class: "panel", "aria-label": "the chosen step" });
  const found = element("output", { class: "fact" });
  let drawing = null;
  let drawnFor = "";

  const chosen = () => boundedStep(tree, context.query().node);
  const set = (more) => context.set({ ...context.query(), ...more });
  const choose = (index) => set({ node: index === ROOT ? undefined : index });

  /** What stands above the drawing; a tree is as high as what is left of the screen, if it can. */
  const above = () => Math.round(place.getBoundingClientRect().top + window.scrollY);

  function draw() {
    const { color = "value", top, fit } = context.query();
    const options = {
      width: Math.max(280, place.clientWidth),
      height: Math.max(LEAST_HEIGHT, window.innerHeight - above() - 8),
      color,
      top: boundedStep(tree, top),
      isFit: fit === "1",
    };
    if (drawnFor === JSON.stringify(options)) return;
    drawnFor = JSON.stringify(options);
    const hadFocus = document.activeElement === drawing?.svg;
    performance.mark("draw-start");
    drawing = drawTree(tree, options);
    place.replaceChildren(drawing.svg);
    performance.measure("draw", "draw-start");
    if (hadFocus) drawing.svg.focus({ preventScroll: true });
  }

  async function search() {
    const { find } = context.query();
    if (!find) {
      drawing.mark([]);
      found.textContent = "";
      return;
    }
    const steps = await source.holding(ref, find);
    drawing.mark(steps);
    found.textContent = `${steps.length} of ${tree.parent.length} steps`;
  }

  async function fill() {
    const index = chosen();
    drawing.select(index);
    const path = index === ROOT ? [] : pathTo(tree, index);
    const texts = path.length ? await source.texts(ref, path) : [];
    if (index !== chosen()) return; // another one was chosen meanwhile
    fillPanel(panel, tree, index, texts, context.query().tokens ?? "logprob", {
      choose,
      color: (tokens) => set({ tokens }),
    });
  }

  async function apply() {
    draw();
    fillTools();
    await Promise.all([fill(), search()]);
  }

  const colors = choice("colour", "color", stepColors(tree), "value", (color) => set({ color }));
  const whole = toggle("whole tree on one screen", "f", () => {
    set({ fit: context.query().fit === "1" ? undefined : "1" });
  });
  const below = toggle("only below this step", "z", () => {
    set({ top: context.query().top === undefined && chosen() !== ROOT ? chosen() : undefined });
  });
  const input = element("input", {
    type: "search",
    name: "find",
    placeholder: "find in steps  /",
    "aria-label": "find in the steps' texts",
    onchange: (event) => set({ find: event.target.value || undefined }),
  });
  const tools = element("div", { class: "tools" }, colors, whole, below, input, found, legend());

  function fillTools() {
    const { color, top, fit, find } = context.query();
    colors.querySelector("select").value = color ?? "value";
    whole.setAttribute("aria-pressed", String(fit === "1"));
    below.setAttribute("aria-pressed", String(top !== undefined));
    if (document.activeElement !== input) input.value = find ?? "";
  }

  place.addEventListener("click", (event) => {
    const item = event.target.closest("[data-step]");
    if (item) choose(Number(item.dataset.step));
    drawing.svg.focus({ preventScroll: true });
  });
  const tip = element("div", { class: "tip", role: "tooltip", hidden: true });
  place.addEventListener("pointermove", (event) => {
    const item = event.target.closest?.("[data-step]");
    tip.hidden = !item || event.pointerType === "touch";
    if (tip.hidden) return;
    tip.textContent = item.getAttribute("aria-label");
    tip.style.left = `${Math.min(event.clientX + 14, window.innerWidth - 320)}px`;
    tip.style.top = `${event.clientY + 16}px`;
  });
  place.addEventListener("pointerleave", () => (tip.hidden = true));

  root.replaceChildren(
    head(tree, context),
    element("div", { class: "tree-page" }, element("div", { class: "left" }, tools, place), panel),
    tip,
  );
  const resized = new ResizeObserver(() => {
    draw();
    drawing.select(chosen());
  });
  await apply();
  resized.observe(place);
  drawing.svg.focus({ preventScroll: true });

  return {
    apply,
    refresh: () => {},
    close: () => resized.disconnect(),
    key(event) {
      const next = neighbour(tree, drawing.children, chosen(), event.key);
      if (event.key.startsWith("Arrow")) {
        if (next !== null) {
          choose(next);
          drawing.items.get(next)?.scrollIntoView({ block: "nearest", inline: "nearest" });
        }
        return true;
      }
      switch (event.key) {
        case "Home":
          choose(ROOT);
          return true;
        case "f":
          whole.click();
          return true;
        case "z":
          below.click();
          return true;
        case "/":
          input.focus();
          return true;
        case "Enter":
          if (window.innerWidth < WIDE) panel.scrollIntoView();
          panel.querySelector("button, select")?.focus();
          return true;
        case "[":
        case "]":
          turn(tree, context, event.key === "[" ? -1 : 1);
          return true;
        default:
          return false;
      }
    },
  };
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
    element("span", { class: "fact" }, `value ${withError(tree.root_value, tree.root_se)}`),
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

/** What colours and marks mean, in one line. */
export function legend() {
  const bar = [0, 0.25, 0.5, 0.75, 1].map((value) => {
    const part = element("i", { class: "swatch" });
    part.style.background = diverging(value);
    return part;
  });
  const verdicts = Object.entries(VERDICTS).slice(0, 4).map(([name, [glyph, text]]) =>
    element("span", {}, element("b", { class: `glyph ${name}` }, glyph), ` ${text}`),
  );
  return element(
    "div",
    { class: "legend" },
    element("span", {}, "value 0 ", bar, " 1"),
    element("span", {}, element("i", { class: "swatch up" }), " advantage up ", element("i", { class: "swatch down" }), " down"),
    element("span", {}, element("i", { class: "swatch line" }), " standard error"),
    element("span", {}, element("i", { class: "swatch hatched" }), " pruned"),
    verdicts,
  );
}
