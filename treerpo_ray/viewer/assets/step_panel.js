// Step panel: what a step says, from the prompt down to it, and what its siblings say instead.

import { choice, element, number, oneLine, signed, textBlock, visible, withError } from "./dom.js";
import { ROOT, childrenOf, pathTo, versions } from "./drawing.js";
import { VERDICTS, diverging, fullLogRatio, largestAdvantage, ratioFill, recency, strength, surprise } from "./scales.js";

export const TOKEN_COLORS = [
  ["logprob", "log-probability"],
  ["advantage", "advantage"],
  ["version", "version"],
  ["ratio", "ratio learner/engine"],
  ["none", "none"],
];
const NO_RATIO_NOTE =
  "The ratio of learner to engine is not stored of this tree: nothing of it was trained on, or it " +
  "was saved by an earlier version.";

/**
 * Fill a panel with a step.
 *
 * @param root What to fill.
 * @param tree, index The step; ROOT is the prompt.
 * @param texts The texts of the path to it, by `source.texts`.
 * @param color One of TOKEN_COLORS.
 * @param actions choose(index), color(name): what a click does; null for a panel of texts alone.
 */
export function fillPanel(root, tree, index, texts, color, actions) {
  root.replaceChildren();
  if (actions) {
    root.append(
      element("h2", {}, title(tree, index)),
      index === ROOT ? treeFacts(tree) : stepFacts(tree, index),
      choice("colour of tokens", "token-color", TOKEN_COLORS, color, actions.color),
    );
    const note = colorNote(tree, color, texts);
    if (note) root.append(element("p", { class: "note" }, note));
  }
  root.append(block("prompt", tree.root_value, null, textBlock(tree.question)));
  const path = index === ROOT ? [] : pathTo(tree, index);
  let before = tree.root_value;
  const shown = texts.some((text) => text.answer !== null) ? path.slice(-1) : path;
  for (const step of shown) {
    const text = texts.find((own) => own.index === step);
    const heading = tree.verdict[step] ? `${title(tree, step)}: ${VERDICTS[tree.verdict[step]][1]}` : title(tree, step);
    const part = block(heading, tree.value[step], before, tokens(tree, text, color));
    if (step === index) part.classList.add("selected");
    if (actions && step !== index) part.querySelector("h3").append(button("select", () => actions.choose(step)));
    root.append(part);
    before = tree.value[step];
  }
  if (index === ROOT) {
    const references = tree.answers.map((answer) => oneLine(answer, 400)).join("  ·  ");
    root.append(element("p", { class: "reference" }, "reference: ", element("b", {}, references)));
  } else if (actions) {
    root.append(siblings(tree, index, actions.choose));
  }
}

function title(tree, index) {
  if (index === ROOT) return "prompt";
  return `${tree.verdict[index] ? "leaf" : "step"} ${index}, depth ${tree.depth[index]}`;
}

function block(heading, value, before, content) {
  const change = before === null || before === undefined || value === null ? null : value - before;
  const shown = change ? ` (${signed(change)})` : "";
  return element(
    "section",
    { class: "block" },
    element("h3", {}, element("span", {}, heading), element("span", { class: "fact" }, `value ${number(value)}${shown}`)),
    content,
  );
}

function tokens(tree, text, color) {
  if (text.answer !== null) return textBlock(text.answer);
  const background = tokenColor(tree, text, color);
  const pieces = text.text.map((piece, place) =>
    element(
      "span",
      {
        class: "token",
        style: { backgroundColor: background(place) },
        title: tokenTitle(text, place),
      },
      visible(piece),
    ),
  );
  return element("div", { class: "text", dir: "auto" }, pieces);
}

function tokenColor(tree, text, color) {
  const known = tree.newest_version.filter((version) => version !== null);
  const [oldest, newest] = [Math.min(...known), Math.max(...known)];
  const advantage = tree.advantage[text.index];
  switch (color) {
    case "logprob":
      return (place) => strength(surprise(text.logprob[place]));
    case "version":
      return (place) => strength(0.1 + 0.7 * recency(text.version[place], oldest, newest), "--new");
    case "ratio":
      return (place) => (text.learner_logprob[place] === null ? "" : ratioFill(logRatio(text, place), fullLogRatio(tree)));
    case "advantage":
      return () => (advantage === null ? "" : diverging(0.5 + advantage / (2 * largestAdvantage(tree))));
    default:
      return () => "";
  }
}

function logRatio(text, place) {
  return text.learner_logprob[place] - text.logprob[place];
}

function tokenTitle(text, place) {
  const count = text.num_tokens[place];
  return [
    count > 1 ? `${count} tokens` : "token",
    oneLine(text.text[place], 40),
    `log-probability ${number(text.logprob[place], 3)} nats (${(100 * Math.exp(text.logprob[place])).toFixed(1)} %)`,
    text.learner_logprob[place] === null ? null : `ratio learner/engine ${Math.exp(logRatio(text, place)).toFixed(3)}`,
    `version ${text.version[place]}`,
  ].filter(Boolean).join(" · ");
}

function colorNote(tree, color, texts) {
  if (texts.some((text) => text.answer !== null)) {
    return tree.ticket === null
      ? "An evaluation stores whole answers, without tokens."
      : "The tokenizer is neither in the run's model folder nor on this machine, so an answer " +
          "cannot be divided into its steps: this is that of the first leaf at or below this one.";
  }
  if (color === "ratio") {
    if (tree.largest_log_ratio === null) return NO_RATIO_NOTE;
    const full = Math.exp(fullLogRatio(tree)).toFixed(2);
    return (
      "Probability of the token under the learner, before it was trained on it, over that under the engine " +
      `when it was sampled: orange below 1, blue above, full at 1/${full} and ${full}; without colour: not trained on.`
    );
  }
  if (color === "advantage") return "All tokens of a step have its advantage; without colour: not trained on.";
  if (color === "logprob") return "The stronger, the less likely the token was when it was sampled.";
  return color === "version" ? "The stronger, the newer the weights that sampled the token." : null;
}

function facts(rows) {
  const parts = rows
    .filter(([, value]) => value !== null && value !== undefined && value !== "")
    .flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, String(value))]);
  return element("dl", { class: "facts" }, parts);
}

function stepFacts(tree, index) {
  return facts([
    ["value", withError(tree.value[index], tree.value_se[index])],
    ["advantage", tree.advantage[index] === null ? null : withError(tree.advantage[index], tree.advantage_se[index])],
    ["group", tree.state[index]],
    ["verdict", tree.verdict[index] && VERDICTS[tree.verdict[index]][1]],
    ["length", `${tree.length[index]} tokens`],
    ["ended", tree.stop[index].replaceAll("_", " ")],
    ["version", tree.newest_version[index] === null ? null : versions(tree, index)],
    ["ratio", tree.mean_log_ratio[index] === null ? null : `${Math.exp(tree.mean_log_ratio[index]).toFixed(3)} learner/engine, geometric mean over its tokens`],
    ["mean log p", tree.mean_logprob[index] === null ? null : `${number(tree.mean_logprob[index], 3)} nats a token`],
  ]);
}

function treeFacts(tree) {
  const groups = Object.entries(tree.groups).filter(([, count]) => count).map(([state, count]) => `${count} ${state}`);
  return facts([
    ["value", withError(tree.root_value, tree.root_se)],
    ["problem", oneLine(tree.prompt_id, 60)],
    [tree.ticket === null ? "answers" : "steps", tree.parent.length],
    ["groups", groups.join(", ")],
    ["tokens", tree.length.reduce((sum, length) => sum + length, 0)],
    ["ticket", tree.ticket],
    ["redraws", tree.num_redraws || null],
    ["engine", tree.engine],
    ["seed", tree.seed],
    ["grown in", tree.grow_s === null ? null : `${number(tree.grow_s, 1)} s`],
  ]);
}

function siblings(tree, index, choose) {
  const all = childrenOf(tree).get(tree.parent[index]);
  const known = all.filter((own) => tree.advantage[own] !== null);
  const sides = known.length
    ? [
        ["pushed up", known.filter((own) => tree.advantage[own] > 0)],
        ["pushed down", known.filter((own) => tree.advantage[own] <= 0)],
      ]
    : [
        ["above the mean", all.filter((own) => tree.value[own] > mean(tree, all))],
        ["not above it", all.filter((own) => !(tree.value[own] > mean(tree, all)))],
      ];
  const columns = sides.map(([heading, steps]) =>
    element(
      "div",
      { class: "side" },
      element("h4", {}, `${heading} (${steps.length})`),
      steps.map((own) => card(tree, own, own === index, choose)),
    ),
  );
  const state = tree.state[index] ? `, a ${tree.state[index]} group` : "";
  return element(
    "section",
    { class: "siblings" },
    element("h3", {}, `siblings: ${all.length}${state}`),
    element("div", { class: "sides" }, columns),
  );
}

function mean(tree, steps) {
  return steps.reduce((sum, step) => sum + tree.value[step], 0) / steps.length;
}

function card(tree, index, isSelected, choose) {
  const verdict = tree.verdict[index];
  const line = [
    `${verdict ? "leaf" : "step"} ${index}`,
    number(tree.value[index]),
    tree.advantage[index] === null ? null : `A ${signed(tree.advantage[index])}`,
    verdict ? VERDICTS[verdict][0] : null,
  ].filter(Boolean);
  const node = element(
    "button",
    { type: "button", class: "card", "aria-pressed": String(isSelected), onclick: () => choose(index) },
    element("span", { class: "fact" }, line.join("  ")),
    element("span", { class: "beginning", dir: "auto" }, oneLine(tree.text[index], 160)),
  );
  node.style.borderLeftColor = diverging(tree.value[index]);
  return node;
}

function button(text, clicked) {
  return element("button", { type: "button", class: "link", onclick: clicked }, text);
}
