// Compare: the same problem at two learner steps, side by side.

import { choice, element, number, oneLine, signed, textBlock } from "./dom.js";
import { ROOT, drawTree, neighbour, pathTo } from "./drawing.js";
import { gauge } from "./tree_list.js";
import { boundedStep, legend } from "./tree_page.js";
import { fillPanel } from "./step_panel.js";

const SHOWN = 200;
const HEIGHT = 320;

/** Page of the problems that were met twice or, if a query names one, of that; as `treePage`. */
export async function comparePage(root, context) {
  root.replaceChildren(element("p", { class: "note" }, "looking which problems were met at several steps …"));
  const problems = await context.source.problems();
  const { a, b, problem } = context.query();
  if (a && b) return sideBySide(root, context, problems);
  const found = problem === undefined ? undefined : problems.find((own) => own.problem === problem && kind(own) === (context.query().kind ?? kind(own)));
  if (found) {
    context.redirect("compare", { a: found.refs[0], b: found.refs.at(-1) });
    return null;
  }
  return problemList(root, context, problems, problem);
}

const kind = (problem) => (problem.is_evaluation ? "evaluation" : "tree");

function problemList(root, context, known, missing) {
  let problems = known;
  const note = element("p", { class: "note", role: "status" });
  const list = element("div", { class: "tree-list", role: "list" });
  const form = element("form", { class: "filters", onsubmit: (event) => event.preventDefault() });

  function draw() {
    const { q = "", kind: wanted = "" } = context.query();
    const passing = problems.filter(
      (own) => (!wanted || kind(own) === wanted) && `${own.problem}\n${own.question}`.toLowerCase().includes(q.toLowerCase()),
    );
    note.textContent = problems.length
      ? `${passing.length} of ${problems.length} problems that were met at several learner steps, the largest gain first` +
        (passing.length > SHOWN ? `; the first ${SHOWN} are shown` : "")
      : "No problem was met at two learner steps yet: the evaluation before and after training has the same problems.";
    list.replaceChildren(problemHead(), ...passing.slice(0, SHOWN).map(problemRow));
  }

  form.append(
    choice("met in", "kind", [["", "either"], ["evaluation", "evaluations"], ["tree", "training trees"]], context.query().kind ?? "", (value) => context.set({ ...context.query(), kind: value || undefined })),
    element("label", { class: "field" }, element("span", {}, "problem"), element("input", {
      type: "search", name: "q", value: context.query().q ?? "", placeholder: "question or id  /",
      oninput: (event) => context.set({ ...context.query(), q: event.target.value || undefined }),
    })),
  );
  root.replaceChildren(
    element("h1", { class: "unseen-heading" }, "Before and after"),
    missing === undefined ? "" : element("p", { class: "warning" }, `Problem ${oneLine(missing, 60)} was met at one learner step only.`),
    form, note, list,
  );
  draw();
  return {
    apply: draw,
    async refresh() {
      problems = await context.source.problems();
      draw();
    },
    close: () => {},
    key: (event) => event.key === "/" && (form.querySelector("[name=q]").focus(), true),
  };
}

/** What stands in each column. */
export function problemHead() {
  const names = ["gain", "mean reward before", "mean reward after", "met in", "problem"];
  return element("div", { class: "tree-row problem-row list-head", "aria-hidden": true }, names.map((name) => element("span", {}, name)));
}

/** One problem as a line that leads to it before and after. */
export function problemRow(problem) {
  const query = new URLSearchParams({ a: problem.refs[0], b: problem.refs.at(-1) });
  const [first, last] = [problem.values[0], problem.values.at(-1)];
  return element(
    "a",
    { href: `#compare?${query}`, class: "tree-row problem-row", role: "listitem" },
    element("span", { class: "ref" }, problem.gain === null ? "–" : signed(problem.gain)),
    element("span", { class: "value" }, gauge(first, 0), element("span", {}, number(first))),
    element("span", { class: "value" }, gauge(last, 0), element("span", {}, number(last))),
    element("span", { class: "counts" }, `${problem.is_evaluation ? "evaluation" : "trees"} · steps ${problem.refs.map(stepOf).join(", ")}`),
    element("span", { class: "problem", dir: "auto" }, oneLine(problem.question, 160)),
  );
}

const stepOf = (ref) => ref.split(":")[0].replace("e", "");

async function sideBySide(root, context, problems) {
  const { a, b } = context.query();
  const trees = await Promise.all([a, b].map((ref) => context.source.tree(ref)));
  const problem = problems.find((own) => own.refs.includes(a) && own.refs.includes(b));
  const sides = trees.map((tree, n) => makeSide(tree, n ? "b" : "a", context, problem));
  let active = 0;
  root.replaceChildren(
    element(
      "header",
      { class: "tree-head" },
      element("h1", {}, "before and after"),
      element("span", { class: "fact" }, `mean reward ${number(trees[0].root_value)} → ${number(trees[1].root_value)}`),
      element("span", { class: "fact" }, "reference ", element("b", { dir: "auto" }, oneLine(trees[0].answers.join(" · "), 60))),
      element("span", { class: "links" }, element("a", { href: "#compare" }, "all problems")),
      textBlock(trees[0].question, "question text"),
    ),
    legend("value", trees[0]),
    element("div", { class: "compare" }, sides.map((side) => side.root)),
  );
  const apply = async () => {
    await Promise.all(sides.map((side) => side.apply()));
  };
  await apply();
  const resized = new ResizeObserver(() => sides.forEach((side) => side.draw()));
  resized.observe(root);
  return {
    trees,
    apply,
    refresh: () => {},
    close: () => resized.disconnect(),
    key(event) {
      const at = sides.findIndex((side) => side.root.contains(document.activeElement));
      active = at < 0 ? active : at;
      return sides[active].key(event);
    },
  };
}

function makeSide(tree, name, context, problem) {
  const key = `${name}n`;
  const place = element("div", { class: "drawing" });
  const panel = element("div", { class: "panel" });
  const chosen = () => {
    const named = context.query()[key];
    return named === undefined ? typicalLeaf(tree) : boundedStep(tree, named);
  };
  const choose = (index) => context.set({ ...context.query(), [key]: index });
  let drawing = null;

  function draw() {
    drawing = drawTree(tree, { width: Math.max(260, place.clientWidth), height: HEIGHT, isFit: tree.parent.length > 64 });
    place.replaceChildren(drawing.svg);
    drawing.select(chosen());
  }

  async function apply() {
    if (!drawing) draw();
    const index = chosen();
    drawing.select(index);
    const texts = index === ROOT ? [] : await context.source.texts(tree.ref, pathTo(tree, index));
    fillPanel(panel, tree, index, texts, "logprob", null);
  }

  place.addEventListener("click", (event) => {
    const item = event.target.closest("[data-step]");
    if (item) choose(Number(item.dataset.step));
    drawing.svg.focus({ preventScroll: true });
  });
  const refs = problem?.refs ?? [tree.ref];
  const heading = choice(
    name === "a" ? "before: learner step" : "after: learner step",
    name,
    refs.map((ref) => [ref, stepOf(ref)]),
    tree.ref,
    (ref) => context.go("compare", { ...context.query(), [name]: ref, [key]: undefined }),
  );
  const link = element("a", { href: `#tree?${new URLSearchParams({ ref: tree.ref })}` }, "open");
  const fact = element("span", { class: "fact" }, `value ${number(tree.root_value)}`);
  return {
    root: element("section", { class: "compare-side", "aria-label": name === "a" ? "before" : "after" }, element("div", { class: "tools" }, heading, fact, link), place, panel),
    draw,
    apply,
    key(event) {
      const next = neighbour(tree, drawing.children, chosen(), event.key);
      if (next !== null) choose(next);
      return event.key.startsWith("Arrow");
    },
  };
}

/** Of the leaves that are right if most are, else wrong, one with the text that most of them have;
 * the first step if there is none. */
function typicalLeaf(tree) {
  const isMostlyRight = (tree.root_value ?? 0) >= 0.5;
  const leaves = [...tree.verdict.keys()].filter((step) => tree.verdict[step] && (tree.verdict[step] === "correct") === isMostlyRight);
  if (!leaves.length) return 0;
  const texts = leaves.map((leaf) => tree.text[leaf]);
  const counts = texts.map((text) => texts.filter((other) => other === text).length);
  return leaves[counts.indexOf(Math.max(...counts))];
}
