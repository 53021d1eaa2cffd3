// Scales: colours by quantity. They are mixed by the browser from the style sheet's, so that light
// and dark follow by themselves; orange and blue differ for all kinds of colour blindness.

export const VERDICTS = {
  correct: ["✓", "right"],
  wrong: ["✗", "wrong"],
  unanswered: ["∅", "no answer"],
  cut_off: ["…", "cut off"],
  timed_out: ["⏱", "verdict timed out"],
  errored: ["!", "error"],
};
const LEAST_LOGPROB = -4;
const LEAST_LOG_RATIO = 0.1; // of full colour: what rounding makes stays pale

/** From orange over neutral to blue; 0 to 1. */
export function diverging(share) {
  if (share === null || Number.isNaN(share)) return "var(--none)";
  const away = Math.round(Math.abs(share - 0.5) * 200);
  return `color-mix(in oklab, var(${share < 0.5 ? "--low" : "--high"}) ${away}%, var(--middle))`;
}

/** From nothing to full strength of one colour; 0 to 1. */
export function strength(share, color = "--surprise") {
  const percent = Math.round(100 * Math.min(1, Math.max(0, share)));
  return `color-mix(in oklab, var(${color}) ${percent}%, transparent)`;
}

/** How unexpected a token was: 0 for certain, 1 for a log-probability of -4 nats or less. */
export function surprise(logprob) {
  return logprob === null ? 0 : Math.min(1, logprob / LEAST_LOGPROB);
}

/** The log-ratio of learner to engine of full colour: the largest of a tree's tokens. */
export function fullLogRatio(tree) {
  return Math.max(LEAST_LOG_RATIO, tree.largest_log_ratio ?? 0);
}

/** The same for means over steps, which are smaller. */
export function fullMeanLogRatio(tree) {
  return Math.max(LEAST_LOG_RATIO / 10, ...tree.mean_log_ratio.map((value) => Math.abs(value ?? 0)));
}

/** Colour of a log-ratio, which is null where a step was not trained on. */
export function ratioFill(logRatio, full) {
  return logRatio === null ? "var(--none)" : diverging(Math.min(1, Math.max(0, 0.5 + logRatio / (2 * full))));
}

/** Place between two versions, 0 to 1. */
export function recency(version, oldest, newest) {
  return newest > oldest ? (version - oldest) / (newest - oldest) : 1;
}

export const STEP_COLORS = [
  ["value", "value"],
  ["advantage", "advantage"],
  ["logprob", "mean log-probability"],
  ["ratio", "ratio learner/engine"],
  ["version", "version"],
];

/** Fill of each step of a tree by one of STEP_COLORS. */
export function stepFill(tree, quantity) {
  const largest = largestAdvantage(tree);
  const versions = tree.newest_version.filter((version) => version !== null);
  const oldest = Math.min(...versions);
  const newest = Math.max(...versions);
  switch (quantity) {
    case "advantage":
      return (i) => (tree.advantage[i] === null ? "var(--none)" : diverging(0.5 + tree.advantage[i] / (2 * largest)));
    case "logprob":
      return (i) => (tree.mean_logprob[i] === null ? "var(--none)" : strength(surprise(4 * tree.mean_logprob[i])));
    case "ratio": {
      const full = fullMeanLogRatio(tree);
      return (i) => ratioFill(tree.mean_log_ratio[i], full);
    }
    case "version":
      return (i) =>
        tree.newest_version[i] === null
          ? "var(--none)"
          : strength(0.15 + 0.85 * recency(tree.newest_version[i], oldest, newest), "--new");
    default:
      return (i) => diverging(tree.value[i]);
  }
}

/** The largest advantage of a tree by its amount; 1 if it has none. */
export function largestAdvantage(tree) {
  return Math.max(...tree.advantage.map((value) => Math.abs(value ?? 0))) || 1;
}
