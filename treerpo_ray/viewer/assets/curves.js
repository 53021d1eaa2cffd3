// Curves: the run's metrics as small charts, one a panel.

import { element, number } from "./dom.js";

const CHART_HEIGHT = 150;
const COLORS = ["--line-1", "--line-2", "--line-3"];
const WIDTHS = [2.4, 1.6, 1.2]; // so that of two lines with the same values both are seen
const LEAST_RANGE = 0.1; // of an axis, as a share of what stands on it: less is noise
const MARKED_STEPS = 40;

/** Draw all panels into `root`; a click calls `chosen` with the learner step below it. */
export function drawCurves(root, curves, chosen) {
  const grid = element("div", { class: "curves" });
  root.append(grid);
  const charts = curves.panels.map((panel) => {
    const figure = element("figure", { class: "curve" });
    grid.append(figure);
    return drawPanel(figure, panel, curves, chosen);
  });
  const resized = new ResizeObserver(() => {
    for (const [figure, chart] of charts) chart.setSize({ width: figure.clientWidth, height: CHART_HEIGHT });
  });
  resized.observe(grid);
  return () => {
    resized.disconnect();
    for (const [, chart] of charts) chart.destroy();
  };
}

function drawPanel(figure, panel, curves, chosen) {
  const { lines, ends, data, at } = columnsOf(panel, curves);
  const shown = (value) => (isThere(value) ? (panel.is_share ? percent(value, 1) : sensible(value)) : "–");
  const output = element("output");
  const tellValues = (find, before = "") => {
    const parts = lines.flatMap(([label, name], n) => {
      const key = label ? element("i", { class: `key line-${n + 1}` }) : null;
      const told = element("span", {}, key, `${label ? `${label} ` : ""}${shown(find(name))}`);
      return n ? [", ", told] : [told]; // a line may break between two
    });
    const interval = ends.length ? ` [${ends.map((name) => shown(find(name))).join(", ")}]` : "";
    output.replaceChildren(before, ...parts, interval);
  };
  const tellLast = () => tellValues((name) => curves.series[name].findLast(isThere));
  tellLast();
  figure.setAttribute("role", "img");
  figure.setAttribute("aria-label", `${panel.title} by learner step; last: ${output.textContent}`);
  figure.append(element("figcaption", {}, panel.title, output));
  const tell = ({ cursor: { idx } }) => {
    if (isThere(idx)) tellValues((name) => at(name, idx), `step ${data[0][idx]}: `);
    else tellLast();
  };
  const chart = new uPlot(chartOptions(figure, panel, lines, ends, data[0].length, tell), data, figure);
  chart.over.addEventListener("click", () => {
    if (isThere(chart.cursor.idx)) chosen(data[0][chart.cursor.idx]);
  });
  return [figure, chart];
}

/** Of a panel the lines and the ends of its interval that there are, and the steps that have any:
 * as uPlot's data, and by name and place. */
function columnsOf(panel, curves) {
  const isKnown = (name) => curves.series[name]?.some(isThere);
  const lines = Object.entries(panel.lines).filter(([, name]) => isKnown(name));
  const ends = panel.interval?.every(isKnown) ? panel.interval : [];
  const names = [...lines.map(([, name]) => name), ...ends];
  const kept = [...curves.steps.keys()].filter((i) => names.some((name) => isThere(curves.series[name][i])));
  const columns = names.map((name) => kept.map((i) => curves.series[name][i]));
  return {
    lines,
    ends,
    data: [kept.map((i) => curves.steps[i]), ...columns],
    at: (name, place) => columns[names.indexOf(name)][place],
  };
}

function chartOptions(figure, panel, lines, ends, numSteps, tell) {
  const y = (_, ticks) => ticks.map((tick) => (panel.is_share ? percent(tick, 0) : sensible(tick)));
  const points = { show: numSteps <= MARKED_STEPS, size: 4 };
  const of = (name, stroke, more) => ({ label: name, stroke: color(stroke), spanGaps: true, ...more });
  const [first, second] = [lines.length + 1, lines.length + 2]; // behind the steps and the lines
  return {
    width: figure.clientWidth || 280,
    height: CHART_HEIGHT,
    scales: { x: { time: false }, y: { range: (_, low, high) => padded(low, high, panel.is_share) } },
    axes: [axis({ size: 24 }), axis({ size: 48, values: y })],
    series: [
      { label: "step" },
      ...lines.map(([, name], n) => of(name, COLORS[n], { width: lines.length > 1 ? WIDTHS[n] : 1.6, points })),
      ...ends.map((name) => of(name, "--faint-line", { width: 0.8, points: { show: false } })),
    ],
    bands: ends.length ? [{ series: [second, first], fill: color("--band") }] : [],
    legend: { show: false },
    cursor: { y: false, points: { size: 6 } },
    hooks: { setCursor: [tell] },
  };
}

const isThere = (value) => value !== null && value !== undefined;

function axis(more) {
  return {
    stroke: color("--faint"),
    grid: { stroke: color("--grid"), width: 1 },
    ticks: { show: false },
    font: "11px system-ui, sans-serif",
    gap: 3,
    ...more,
  };
}

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function padded(low, high, isShare) {
  if (low === null || high === null) return [0, 1];
  const lack = LEAST_RANGE * Math.max(Math.abs(low), Math.abs(high)) - (high - low);
  const more = Math.max((high - low) * 0.08, lack / 2) || 0.08;
  return isShare ? [Math.max(-0.03, low - more), Math.min(1.03, high + more)] : [low - more, high + more];
}

function percent(share, digits) {
  return `${(100 * share).toFixed(digits)} %`;
}

function sensible(value) {
  const amount = Math.abs(value);
  if (amount >= 1000) return `${number(value / 1000, 1)}k`;
  if (amount >= 10 || value === 0) return String(Math.round(value * 10) / 10);
  return amount < 0.001 ? value.toExponential(0) : String(Number(value.toPrecision(3)));
}
